"""Metrics, and whatever else adds up, in float32 or wider, whatever the precision of the network around them."""

from collections.abc import Callable
from typing import Any

import torch
import torchmetrics
from torch import Tensor, nn


class FullPrecision(nn.Module):
    """A metric, a container of metrics, or another module, whose states no change of dtype makes narrower than float32.

    ``module.to(torch.bfloat16)``, which is what Lightning's ``bf16-true`` calls, converts the states of torchmetrics as
    well (``half()`` it knows, and lets pass): a sum in bfloat16 stands still once it is 256 times what is added, so
    that means over an evaluation are off by any amount. Here floating states are at least float32 whatever is asked
    for, by ``to``, ``half`` or a default dtype at the time of construction; whole numbers stay what they are;
    ``double`` widens.

    To be named first: ``class Mine(FullPrecision, Metric)``, or with ``nn.ModuleDict`` or ``MetricCollection``, whose
    metrics may then be any. States that a metric adds in its own constructor it adds in float32 itself.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._apply(_same)  # what a narrow default dtype has made

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        def applied(tensor: Tensor) -> Tensor:
            if tensor.is_floating_point():
                found = fn(tensor.new_empty(0))
                wanted = torch.promote_types(found.dtype, torch.float32)
                # Not by way of what is narrow: that would have rounded already.
                return fn(tensor) if found.dtype == wanted else tensor.to(found.device, wanted)
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(applied, *args, **kwargs)


class MeanMetric(FullPrecision, torchmetrics.MeanMetric):
    """torchmetrics' weighted mean of values, in float32 or wider."""


class Metrics(FullPrecision, torchmetrics.MetricCollection):
    """torchmetrics' collection of metrics that take the same arguments, all of them in float32 or wider."""


def _same(tensor: Tensor) -> Tensor:
    return tensor
