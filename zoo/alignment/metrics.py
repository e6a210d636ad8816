"""Metrics of an aligner's embeddings."""

import torch
from torch import Tensor
from torchmetrics import Metric

from zoo.common.precision import FullPrecision


class ModalityGap(FullPrecision, Metric):
    """Distance between the mean embeddings of images and of texts, in [0, 2] (Liang et al. 2022, "Mind the Gap").

    Args:
        dim: D of the embeddings.
    """

    full_state_update = False
    image_sum: Tensor
    text_sum: Tensor
    counts: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.add_state("image_sum", torch.zeros(dim, dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("text_sum", torch.zeros(dim, dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(2, dtype=torch.float32), dist_reduce_fx="sum")

    def update(self, images: Tensor, texts: Tensor) -> None:
        """Adds unit vectors of images (B, D) and texts (N, D)."""
        self.image_sum += images.sum(0)
        self.text_sum += texts.sum(0)
        self.counts += self.counts.new_tensor([len(images), len(texts)])

    def compute(self) -> Tensor:
        """The distance, a scalar."""
        return (self.image_sum / self.counts[0] - self.text_sum / self.counts[1]).norm()
