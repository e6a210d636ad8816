"""Losses by name, as a configuration chooses them: our own, and those of timm that are for the same purposes."""

import inspect
from functools import cache
from typing import Any

from torch import nn

from zoo.losses.accuracy import SmoothAccuracyLoss
from zoo.losses.confusion import SoftConfusionLoss, SoftFBetaLoss
from zoo.losses.cross_entropy import F1WeightedCrossEntropy
from zoo.losses.inputs import TASKS, Task
from zoo.losses.ranking import SmoothAPLoss, SmoothAUCLoss
from zoo.losses.soft import check_choice

OWN: dict[str, type[nn.Module]] = {
    "smooth_accuracy": SmoothAccuracyLoss,
    "soft_fbeta": SoftFBetaLoss,
    "f1_cross_entropy": F1WeightedCrossEntropy,
    "soft_confusion": SoftConfusionLoss,
    "smooth_ap": SmoothAPLoss,
    "smooth_auc": SmoothAUCLoss,
}
TIMM = {
    "zlpr": ("ZlprLoss", "multilabel"),
    "asymmetric": ("AsymmetricLossMultiLabel", "multilabel"),
    "asymmetric_single": ("AsymmetricLossSingleLabel", "multiclass"),
    "two_way": ("TwoWayLoss", "multilabel"),
}
"""timm's class for a name, which older versions may lack, and the task that it is for."""


@cache
def losses() -> dict[str, type[nn.Module]]:
    """Classes of losses by name. timm is imported for it, which takes seconds; ``LOSSES`` is the same."""
    import timm.loss

    return OWN | {name: getattr(timm.loss, cls) for name, (cls, _) in TIMM.items() if hasattr(timm.loss, cls)}


def create_loss(name: str, task: Task, num_classes: int, **options: Any) -> nn.Module:
    """Creates a loss by its name, for ``loss(logits, target)``.

    Args:
        name: One of ``LOSSES``.
        task: "binary", "multiclass" or "multilabel".
        num_classes: C of the logits (N, C, ...); 1 for the binary task.
        options: Further arguments of the class.

    Raises:
        ValueError: For a name, a task or an option that there is not, with those that there are.
    """
    check_choice(task, TASKS, "task")
    if name not in OWN:  # timm is not imported for nothing
        check_choice(name, tuple(losses()), "loss")
    cls = OWN.get(name) or losses()[name]
    only = TIMM[name][1] if name in TIMM else task
    if task != only:
        fitting = ", ".join(other for other in losses() if other not in TIMM or TIMM[other][1] == task)
        raise ValueError(f"loss {name!r} is for the {only} task, not for {task}: expected one of {fitting}")
    known = set(inspect.signature(cls).parameters)
    given = {"task": task, "num_classes": num_classes}
    if unknown := set(options) - (known - set(given)):
        raise ValueError(
            f"unknown option {', '.join(sorted(unknown))} of loss {name!r}: expected "
            f"{', '.join(sorted(known - set(given)))}"
        )
    return cls(**{key: value for key, value in given.items() if key in known}, **options)


def __getattr__(name: str) -> Any:
    if name == "LOSSES":
        return losses()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
