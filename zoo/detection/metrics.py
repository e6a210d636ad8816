"""The losses of an evaluation, however it was cut into batches and dealt out to processes."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from zoo.common.precision import FullPrecision
from zoo.detection.losses import LossSums


class TotalLosses(FullPrecision, Metric):
    """Sums over all images, for losses as one batch of them all would have.

    A mean of batches' means would weigh a batch with one object as much as one with a hundred.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(len(LossSums._fields), dtype=torch.float32), dist_reduce_fx="sum")

    def update(self, sums: LossSums) -> None:
        self.sums += torch.stack(sums.total())

    def compute(self) -> LossSums:
        """The sums over all images, whose :meth:`~zoo.detection.losses.LossSums.mean` are the losses."""
        return LossSums(*self.sums)
