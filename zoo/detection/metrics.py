"""The mean losses of an evaluation, however it was cut into batches and dealt out to processes."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from zoo.detection.losses import LossSums


class MeanLosses(Metric):
    """Losses of all cells of all images over the number of cells with an object, as one batch of them all would have.

    A mean of batches' means would weigh a batch with one object as much as one with a hundred.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(3), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(2), dist_reduce_fx="sum")

    def update(self, sums: LossSums) -> None:
        self.sums += torch.stack([sums.classification.sum(), sums.box.sum(), sums.centerness.sum()])
        self.counts += torch.stack([sums.positives.sum(), sums.box_weight.sum()])

    def compute(self) -> dict[str, Tensor]:
        """Classification, box and centerness loss."""
        positives, weight = self.counts[0].clamp(min=1), self.counts[1].clamp(min=1e-6)
        return {
            "classification": self.sums[0] / positives,
            "box": self.sums[1] / weight,
            "centerness": self.sums[2] / positives,
        }
