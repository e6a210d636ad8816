"""Labels that no class has, told in a line while training goes on, without making the host wait in every step."""

from typing import Any

import torch
from torch import Tensor


class LabelWatch:
    """Looks on an accelerator at the labels that a module learns from, when its :class:`~zoo.common.log.StepLog` waits.

    A label beyond the classes is a failed assertion there, somewhere in the loss, after which nothing works and nobody
    knows what was wrong. So labels are brought into range, and the least and the largest of them are remembered on the
    device until they are told, at the latest at the epoch's end. On the CPU a module looks before, in every step, and
    where no Trainer logs there is no such moment: then nothing is done. As an attribute of a module::

        labels = self.label_watch(self, labels, num_classes)
        ...
        if self.step_log(self, {"train/loss": loss}):
            self.label_watch.tell(num_classes)
    """

    def __init__(self) -> None:
        self._extremes: Tensor | None = None

    def __call__(self, module: Any, labels: Tensor, num_classes: int) -> Tensor:
        """Labels, integers of any shape, in [0, num_classes)."""
        trainer = module._trainer
        if trainer is None or not trainer.training or not trainer.log_every_n_steps:
            return labels
        if not is_remote(labels) or not labels.numel():
            return labels
        low, high = labels.detach().aminmax()
        extremes = torch.stack((low, -high))
        self._extremes = extremes if self._extremes is None else torch.minimum(self._extremes, extremes)
        return labels.clamp(0, num_classes - 1)

    def tell(self, num_classes: int) -> None:
        """Raises ValueError if there was a label out of range since this was last called. The host waits."""
        if self._extremes is None:
            return
        low, high = self._extremes.tolist()
        self._extremes = None
        check_range(low, -high, num_classes)


def check_range(low: int, high: int, num_classes: int) -> None:
    """Raises ValueError if the least and the largest of some labels are not in [0, num_classes)."""
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise ValueError(f"label {wrong} is out of range: num_classes is {num_classes}, labels run from 0")


def is_remote(tensor: Tensor) -> bool:
    """Tells whether looking at a tensor's values means waiting for a device."""
    return tensor.device.type != "cpu"
