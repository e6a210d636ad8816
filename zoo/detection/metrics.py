"""The losses of an evaluation, however it was cut into batches and dealt out to processes; its metrics in words."""

import re
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from zoo.common import log
from zoo.common.precision import FullPrecision

COCO_METRIC = re.compile(r"(a[pr]\d*)(?:_(.+))?")
"""AP at an IoU, AR of so many detections, either by size."""


class TotalLosses(FullPrecision, Metric):
    """Sums over all images, for losses as one batch of them all would have.

    A mean of batches' means would weigh a batch with one object as much as one with a hundred.

    Args:
        kind: Named tuple of the sums, as :class:`zoo.detection.losses.LossSums`.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, kind: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kind = kind
        self.add_state("sums", torch.zeros(len(kind._fields), dtype=torch.float32), dist_reduce_fx="sum")

    def update(self, sums: Any) -> None:
        self.sums += torch.stack([each.sum() for each in sums])

    def compute(self) -> Any:
        """The sums over all images, whose :meth:`~zoo.detection.losses.LossSums.mean` are the losses."""
        return self.kind(*self.sums)


def in_words(metric: str, value: float) -> str:
    """COCO's metrics in words: ``AP of small 20.7 %`` for "ap_small".

    Returns:
        "" for the AP of a class, of which there may be eighty.
    """
    if metric.startswith("ap_by_class/"):
        return ""
    found = COCO_METRIC.fullmatch(metric)
    if found is None:
        return log.in_words(metric, value)
    number = "undefined" if value < 0 else f"{100 * value:.1f} %"  # no such objects in the data
    return f"{found[1].upper()} {f'of {found[2]} ' if found[2] else ''}{number}"
