"""Losses of an image classifier, by name or as modules, and the weights of classes in them."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from zoo.common.backbones import name_of
from zoo.common.precision import FullPrecision, MeanMetric

Loss = Literal["cross_entropy", "bce", "sigmoid"]
PLAIN: tuple[str, ...] = get_args(Loss)
"""The losses of :func:`classification_loss`, which weights of classes are for."""


class Exchanged(NamedTuple):
    """What a classifier is trained on in the place of its own loss, for as long as it lasts.

    Attributes:
        loss: A name of :data:`PLAIN`, or a module.
        smooth: The loss whose smooth metric evaluation logs.
    """

    loss: str | nn.Module
    smooth: nn.Module | None


def classification_loss(
    logits: Tensor,
    targets: Tensor,
    kind: str,
    smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
) -> Tensor:
    """The mean loss of a batch, in float32 whatever the precision.

    Args:
        logits: (B, classes).
        targets: int64 (B,), or a distribution over classes (B, classes), as mixup makes it, or 0 and 1 for each of
            several labels (B, classes).
        kind: "cross_entropy" over the softmax; "bce", binary cross-entropy averaged over classes, in which every class
            of a mixed image counts as present (DeiT III, Touvron et al. 2022, section 3); "sigmoid", binary
            cross-entropy summed over classes on targets as they are (Beyer et al. 2020, "Are we done with ImageNet?").
        smoothing: Label smoothing (Szegedy et al. 2016), for targets that are class indices.
        class_weight: (classes,) float32. Of "cross_entropy" torch's ``weight``: each image counts by its class, and the
            mean is over the weights; over the images where targets are distributions. Of the others the factor of each
            class's binary cross-entropy, torch's ``weight`` as well.
        pos_weight: (classes,) float32, of "bce" and "sigmoid": the factor of a label's positives, torch's own.
    """
    logits = logits.float()
    classes = logits.shape[1]
    if kind == "cross_entropy":
        if class_weight is None or targets.ndim > 1:
            return F.cross_entropy(
                logits, targets, class_weight, label_smoothing=0.0 if targets.ndim > 1 else smoothing
            )
        total = F.cross_entropy(logits, targets, class_weight, reduction="sum", label_smoothing=smoothing)
        # torch's mean, but 0 of a batch whose classes all weigh 0.
        return total / weight_of(targets, class_weight).clamp_min(torch.finfo(torch.float32).tiny)
    if targets.ndim == 1:
        targets = F.one_hot(targets, classes) * (1 - smoothing) + smoothing / classes
    elif kind == "bce":
        targets = targets > 0
    losses = F.binary_cross_entropy_with_logits(
        logits, targets.float(), class_weight, reduction="none", pos_weight=pos_weight
    )
    return losses.mean() if kind == "bce" else losses.sum(1).mean()


def weight_of(targets: Tensor, class_weight: Tensor) -> Tensor:
    """The weight of a batch in a mean of weighted cross-entropies, by its labels (B,)."""
    return class_weight[targets].sum()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The plain mean cross-entropy of a batch: of several labels (B, classes) the binary one, the mean over labels."""
    return classification_loss(logits, targets, "bce" if targets.ndim > 1 else "cross_entropy")


def module_loss(criterion: nn.Module, logits: Tensor, targets: Tensor) -> Tensor:
    """The mean loss of a batch by a module like torch's losses, in float32 whatever the precision.

    Args:
        criterion: ``forward(logits, targets)`` gives a scalar.
        logits: (B, classes).
        targets: int64 (B,), or a distribution over classes or 0 and 1 for each of several labels (B, classes).

    Raises:
        ValueError: For a module that gives something else.
    """
    loss = criterion(logits.float(), targets if targets.ndim == 1 else targets.float())
    if not isinstance(loss, Tensor) or loss.ndim:
        got = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss {type(criterion).__name__} gives {got}: expected a scalar, as with reduction 'mean'")
    return loss


def create_criterion(loss: str | nn.Module, options: Mapping[str, Any] | None, hparams: Mapping[str, Any]) -> Any:
    """What a classifier is trained on: a name of :data:`PLAIN`, or a module.

    Args:
        loss: A name, or a module like torch's losses.
        options: Arguments of a loss by name.
        hparams: The classifier's arguments: ``multi_label``, ``class_weight`` and so on.

    Raises:
        ValueError: For a loss that does not exist, or does not go with the classifier's other arguments.
    """
    multi_label, name = hparams["multi_label"], name_of(loss)
    weights = [option for option in ("class_weight", "pos_weight") if hparams.get(option) is not None]
    if isinstance(loss, nn.Module):
        if options:
            raise ValueError(f"loss_options are for a loss by name: build {name} with them")
        if weights:
            raise ValueError(f"{weights[0]} is for a loss by name: build {name} with it")
        return loss
    if loss not in PLAIN:
        raise ValueError(
            f"unknown loss {loss!r}: expected one of {', '.join(PLAIN)}; a module of your own is passed as an object"
        )
    if options:
        raise ValueError(f"loss_options are {', '.join(options)}, and loss {loss!r} has none")
    if multi_label and loss == "cross_entropy":
        raise ValueError("multi_label needs loss 'bce' or 'sigmoid': cross_entropy expects one label an image")
    if "pos_weight" in weights and not multi_label:
        raise ValueError("pos_weight is for several labels an image, multi_label: class_weight weighs classes")
    return loss


def given_modules(**arguments: Any) -> list[str]:
    """The arguments that are modules, which no hyperparameters hold."""
    return [name for name, value in arguments.items() if isinstance(value, nn.Module)]


class SmoothMetric(FullPrecision, Metric):
    """The smooth metric of a loss over an evaluation: the mean over the images of what it is of each batch.

    Args:
        loss: A :class:`zoo.common.protocols.HasSmoothMetric`.
    """

    full_state_update = False
    total: Tensor
    images: Tensor

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self._loss = (loss,)  # in a tuple, lest it become a part, and its state the classifier's a second time
        for name in ("total", "images"):
            self.add_state(name, torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Adds a batch: logits (B, classes) and targets as the loss takes them."""
        self.total += len(logits) * self._loss[0].metric(logits, targets)
        self.images += len(logits)

    def compute(self) -> Tensor:
        return self.total / self.images


class _WatchedMetrics(FullPrecision, nn.ModuleDict):
    """Metrics by name, in float32 whatever the precision."""


def watched_metrics(smooth: Any) -> nn.ModuleDict:
    """Metrics of an evaluation beside the loss that is trained: plain cross-entropy, and a loss's smooth metric.

    Args:
        smooth: The loss, a :class:`zoo.common.protocols.HasSmoothMetric`; None for one that has no such metric.
    """
    metrics: dict[str, nn.Module] = {"cross_entropy": MeanMetric()}
    if smooth is not None:
        metrics["smooth"] = SmoothMetric(smooth)
    return _WatchedMetrics(metrics)
