"""Metrics of an aligner's embeddings."""

from collections.abc import Mapping, Sequence

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
        self.counts[0] += len(images)  # a tensor of a list would wait for the device
        self.counts[1] += len(texts)

    def compute(self) -> Tensor:
        """The distance, a scalar."""
        return (self.image_sum / self.counts[0] - self.text_sum / self.counts[1]).norm()


class Shares(Metric):
    """Shares of samples for which something is right, of all and by subset.

    Args:
        names: What may be right, the names of the shares.
        subsets: Names of the parts of the evaluation, by number.
    """

    full_state_update = False
    right: Tensor
    count: Tensor

    def __init__(self, names: Sequence[str], subsets: Sequence[str] = ()) -> None:
        super().__init__()
        self.names, self.subsets = tuple(names), tuple(subsets)
        bins = len(self.subsets) + 1  # the last one: of no subset
        self.add_state("right", torch.zeros(len(self.names), bins, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(bins, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, right: Mapping[str, Tensor], subsets: Tensor | None = None, counts: Tensor | None = None) -> None:
        """Adds n samples.

        Args:
            right: (n,) bool by name. Empty: there are no samples.
            subsets: (n,) integers, of each sample; other numbers than those of subsets, or None: of none.
            counts: (n,) bool, the samples that count. None: all.
        """
        if not right:
            return
        rows = torch.stack([right[name] for name in self.names])
        counts = torch.ones_like(rows[0]) if counts is None else counts
        last = len(self.subsets)
        bins = torch.full_like(rows[0], last, dtype=torch.int64)
        if subsets is not None:
            bins = torch.where((subsets >= 0) & (subsets < last), subsets.long(), bins)
        self.right.index_add_(1, bins, (rows & counts).long())
        self.count.index_add_(0, bins, counts.long())

    def compute(self) -> dict[str, Tensor]:
        """Shares in [0, 1], float32, by ``NAME`` and ``NAME_SUBSET``, without those of no samples."""
        parts = {"": (self.right.sum(1), self.count.sum())}
        parts |= {f"_{name}": (self.right[:, index], self.count[index]) for index, name in enumerate(self.subsets)}
        return {
            f"{name}{part}": right[row].float() / count.float()
            for part, (right, count) in parts.items()
            if count
            for row, name in enumerate(self.names)
        }
