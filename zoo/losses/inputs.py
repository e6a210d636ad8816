"""Logits and targets of three tasks, read into one form, and what may be wrong with them."""

import warnings
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from zoo.losses.soft import at_least_float32, check_choice

Task = Literal["binary", "multiclass", "multilabel"]
TASKS = ("binary", "multiclass", "multilabel")


class Judged(NamedTuple):
    """Logits and targets in one form, (N, C, ...), float32 or wider; C is 1 for the binary task."""

    logits: Tensor
    target: Tensor
    """In [0, 1]; 0 where it is ignored."""
    counted: Tensor
    """1 where an element counts, 0 where it is ignored: (N, C, ...), or (N, 1, ...) for the classes of an element."""

    def probabilities(self, task: Task, tau: float) -> Tensor:
        """The softmax over classes, or the sigmoid of each logit, at a temperature."""
        scaled = self.logits / tau
        return scaled.softmax(1) if task == "multiclass" else scaled.sigmoid()


def read(logits: Tensor, target: Tensor, task: Task, ignore_index: int = -100, look: bool = True) -> Judged:
    """Brings logits and targets of a task into one form.

    Args:
        logits: Scores before softmax or sigmoid, floating point. Multiclass, multilabel: (N, C, ...); binary: (N, ...).
        target: Multiclass: class indices (N, ...), or distributions over classes as ``logits`` in shape, such as mixup
            makes. Binary and multilabel: as ``logits`` in shape, 0 and 1 or numbers between, whatever their dtype.
        task: "binary", "multiclass" or "multilabel".
        ignore_index: Target of elements that do not count. Distributions over classes have none.
        look: Look at the targets' values, for which the host waits.

    Raises:
        ValueError: For shapes that do not go together, and for targets out of range if ``look``.
    """
    logits = at_least_float32(logits, "logits")
    given = f"logits are {tuple(logits.shape)} and targets {tuple(target.shape)} for task {task!r}"
    if task == "multiclass":
        if logits.ndim < 2 or logits.shape[1] < 2:
            raise ValueError(f"{given}: expected logits (N, C, ...) with 2 classes or more")
        if target.shape == (*logits.shape[:1], *logits.shape[2:]):
            return _indices(logits, target, ignore_index, look)
        if target.shape != logits.shape:
            indices = (*logits.shape[:1], *logits.shape[2:])
            raise ValueError(f"{given}: expected class indices {indices}, or distributions {tuple(logits.shape)}")
        target = target.to(logits.dtype)
        if look:
            _check_unit(target)
            _check_sums(target)
        return Judged(logits, target, torch.ones_like(target[:, :1]))
    if target.shape != logits.shape or logits.ndim < (1 if task == "binary" else 2):
        expected = "(N, ...)" if task == "binary" else "(N, C, ...)"
        raise ValueError(f"{given}: expected both to be {expected}, one target for each logit")
    if task == "binary":
        logits, target = logits.unsqueeze(1), target.unsqueeze(1)
    target = target.to(logits.dtype)
    counted = target != ignore_index
    target = target.masked_fill(~counted, 0.0)
    if look:
        _check_unit(target)
    return Judged(logits, target, counted.to(logits.dtype))


def check_logits(logits: Tensor, task: Task) -> None:
    """Warns if logits look like probabilities; the host waits for their values."""
    values = logits.detach()
    if not values.numel() or not ((values >= 0) & (values <= 1)).all():
        return
    if task == "multiclass":
        sums = values.float().sum(1)
        alike = bool(((sums - 1).abs() < 0.02).all())  # bfloat16 has two or three digits
        told = "all in [0, 1] and sum to 1 over the classes"
    else:
        alike = values.numel() >= 16 and bool((values > 0).any())  # so many logits are not all positive by chance
        told = "all in [0, 1]"
    if alike:
        warnings.warn(f"logits are {told}, as probabilities are: this loss applies the {_LINK[task]}", stacklevel=3)


_LINK = {"multiclass": "softmax itself", "binary": "sigmoid itself", "multilabel": "sigmoid itself"}


class Reader:
    """Reads logits and targets of one task, looks at their values, and tells of what is wrong with them.

    The host waits for what it looks at: it does in every call on the CPU, in the first one elsewhere, and never in a
    compiled program.
    """

    def __init__(self, task: Task, ignore_index: int) -> None:
        check_choice(task, TASKS, "task")
        self.task: Task = task
        self.ignore_index = ignore_index
        self._is_first = True

    def looks_at(self, values: Tensor) -> bool:
        """Tells whether the next call looks at values on the device of these."""
        if torch.compiler.is_compiling() or values.device.type == "meta":
            return False
        return self._is_first or values.device.type == "cpu"

    def __call__(self, logits: Tensor, target: Tensor) -> Judged:
        """Reads as :func:`read` does; the first time also :func:`check_logits`."""
        if not self.looks_at(logits):
            return read(logits, target, self.task, self.ignore_index, look=False)
        judged = read(logits, target, self.task, self.ignore_index)
        if self._is_first:
            check_logits(logits, self.task)
        self._is_first = False
        return judged


def _indices(logits: Tensor, target: Tensor, ignore_index: int, look: bool) -> Judged:
    if target.is_floating_point() or target.is_complex():
        raise ValueError(f"targets {tuple(target.shape)} are {target.dtype}: class indices are whole numbers")
    target = target.long()
    counted = target != ignore_index
    target = target.masked_fill(~counted, 0)
    if look and target.numel():
        low, high = (int(value) for value in target.aminmax())
        if low < 0 or high >= logits.shape[1]:
            wrong = low if low < 0 else high
            raise ValueError(
                f"target {wrong} is out of range: logits have {logits.shape[1]} classes, from 0, and ignore_index is "
                f"{ignore_index}"
            )
    counted = counted.unsqueeze(1).to(logits.dtype)
    return Judged(logits, torch.zeros_like(logits).scatter(1, target.unsqueeze(1), counted), counted)


def _check_unit(target: Tensor) -> None:
    if target.numel() and not ((target >= 0) & (target <= 1)).all():
        low, high = target.aminmax()
        raise ValueError(f"targets run from {low.item():g} to {high.item():g}: expected numbers in [0, 1]")


def _check_sums(target: Tensor) -> None:
    sums = target.sum(1)
    if target.numel() and (worst := (sums - 1).abs().max()) > 0.02:
        raise ValueError(
            f"targets over the classes sum to 1 within {worst.item():g} only: expected distributions; several labels "
            "an element are task='multilabel'"
        )
