"""Losses of an image classifier, by name or as modules, and the weights of classes in them."""

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from zoo.common.backbones import name_of
from zoo.common.precision import FullPrecision, MeanMetric
from zoo.losses import LOSSES, ConfusionCounts, create_loss, divide
from zoo.losses.confusion import CountsLoss
from zoo.losses.inputs import Task
from zoo.losses.names import TIMM

Loss = Literal["cross_entropy", "bce", "sigmoid"]
"""They come first in the type of an argument: else jsonargparse looks each up among all subclasses of nn.Module."""
PLAIN: tuple[str, ...] = get_args(Loss)
"""The losses of :func:`classification_loss`, which weights of classes are for."""


class Exchanged(NamedTuple):
    """Criterion that a classifier is trained on in the place of its own loss, for as long as it lasts.

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
        targets = smoothed(targets, classes, smoothing)
    elif kind == "bce":
        targets = targets > 0
    losses = F.binary_cross_entropy_with_logits(
        logits, targets.float(), class_weight, reduction="none", pos_weight=pos_weight
    )
    return losses.mean() if kind == "bce" else losses.sum(1).mean()


def smoothed(targets: Tensor, classes: int, smoothing: float) -> Tensor:
    """Distributions over classes (B, classes) of class indices (B,), by label smoothing."""
    return F.one_hot(targets, classes) * (1 - smoothing) + smoothing / classes


def weight_of(targets: Tensor, class_weight: Tensor) -> Tensor:
    """The weight of a batch in a mean of weighted cross-entropies, by its labels (B,)."""
    return class_weight[targets].sum()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The plain mean cross-entropy of a batch: of several labels (B, classes) the binary one, the mean over labels."""
    return classification_loss(logits, targets, "bce" if targets.ndim > 1 else "cross_entropy")


def module_loss(criterion: nn.Module, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """The mean loss of a batch by a module like torch's losses, in float32 whatever the precision.

    Args:
        criterion: ``forward(logits, targets)`` gives a scalar.
        logits: (B, classes).
        targets: int64 (B,), or a distribution over classes or 0 and 1 for each of several labels (B, classes).
        smoothing: Label smoothing, for targets that are class indices, of which it makes distributions.

    Raises:
        ValueError: For a module that gives something else.
    """
    if smoothing and targets.ndim == 1:
        targets = smoothed(targets, logits.shape[1], smoothing)
    loss = criterion(logits.float(), targets if targets.ndim == 1 else targets.float())
    if not isinstance(loss, Tensor) or loss.ndim:
        got = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss {type(criterion).__name__} gives {got}: expected a scalar, as with reduction 'mean'")
    return loss


def create_criterion(loss: str | nn.Module, options: Mapping[str, Any] | None, hparams: Mapping[str, Any]) -> Any:
    """Criterion that a classifier is trained on: a name of :data:`PLAIN`, or a module.

    Args:
        loss: A name, of :data:`PLAIN` or of ``zoo.losses.LOSSES``, or a module like torch's losses.
        options: Arguments of a loss of ``zoo.losses``.
        hparams: The classifier's arguments, of which ``multi_label``, ``num_classes``, ``mixup``, ``cutmix`` and
            ``label_smoothing`` matter.

    Raises:
        ValueError: For a loss that does not exist, or does not go with the classifier's other arguments.
    """
    if isinstance(loss, nn.Module):
        if options:
            raise ValueError(f"loss_options are for a loss by name: build {name_of(loss)} with them")
        return loss
    if loss in PLAIN:
        if options:
            raise ValueError(f"loss_options are {', '.join(options)}, and loss {loss!r} has none")
        if hparams["multi_label"] and loss == "cross_entropy":
            raise ValueError("multi_label needs loss 'bce' or 'sigmoid': cross_entropy expects one label an image")
        return loss
    if not isinstance(loss, str) or loss not in LOSSES:
        known = (*PLAIN, *LOSSES)
        near = get_close_matches(str(loss), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
        raise ValueError(f"unknown loss {loss!r}: {hint}; a module of your own is passed as an object")
    task: Task = "multilabel" if hparams["multi_label"] else "multiclass"
    criterion = create_loss(loss, task, hparams["num_classes"], **(options or {}))
    softens = [name for name in ("mixup", "cutmix", "label_smoothing") if hparams[name]]
    if softens and loss in TIMM:
        raise ValueError(f"{softens[0]} makes soft targets, which loss {loss!r} does not take: leave it out")
    return criterion


def weighed_options(loss: str | nn.Module, hparams: Mapping[str, Any]) -> dict[str, Any] | None:
    """The options of a classifier's own loss, with ``class_weight`` among them where it is the loss that weighs.

    Raises:
        ValueError: For weights that the loss has no use for.
    """
    options = hparams.get("loss_options")
    given = {name: hparams.get(name) for name in ("class_weight", "pos_weight") if hparams.get(name) is not None}
    if "pos_weight" in given and not hparams["multi_label"]:
        raise ValueError("pos_weight is for several labels an image, multi_label: class_weight weighs classes")
    for name, weight in given.items() if loss not in PLAIN else ():
        kind = LOSSES.get(loss) if isinstance(loss, str) else None
        if isinstance(loss, nn.Module):
            raise ValueError(f"{name} is for a loss by name: build {name_of(loss)} with it")
        if kind is not None and (name not in inspect.signature(kind).parameters or weight == "balanced"):
            what = f"{name} 'balanced'" if weight == "balanced" else name
            raise ValueError(f"{what} is for the losses {', '.join(PLAIN)}, not for {loss!r}")
        options = {name: weight} | dict(options or {})
    return options


def given_modules(**arguments: Any) -> list[str]:
    """The arguments that are modules, which no hyperparameters hold."""
    return [name for name, value in arguments.items() if isinstance(value, nn.Module)]


class SmoothMetric(FullPrecision, Metric):
    """The smooth metric of a loss over an evaluation: the mean over the images of what it is of each batch.

    Of accuracies and means over samples that is the metric of all images. Average precision and AUC, which compare all
    images with each other, are those within batches.

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


class CountsMetric(FullPrecision, Metric):
    """The smooth metric of a loss of confusion counts, of counts that are summed over an evaluation and its processes.

    Args:
        loss: Whose average is "macro" or "micro".
        num_classes: C of the logits (B, C).
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, loss: CountsLoss, num_classes: int) -> None:
        super().__init__()
        self._loss = (loss,)
        shape = (4, num_classes) if loss.average == "macro" else (4,)
        self.add_state("counts", torch.zeros(shape, dtype=torch.float32), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Adds a batch: logits (B, classes) and targets as the loss takes them."""
        loss = self._loss[0]
        self.counts += torch.stack(loss.count(loss.reader(logits, targets)))  # not by read(), which tells batches' gaps

    def compute(self) -> Tensor:
        scores, weights = self._loss[0].weigh(ConfusionCounts(*self.counts))
        return divide((scores * weights).sum(), weights.sum())


class _WatchedMetrics(FullPrecision, nn.ModuleDict):
    """Metrics by name, in float32 whatever the precision."""


def watched_metrics(smooth: Any, num_classes: int) -> nn.ModuleDict:
    """Metrics of an evaluation beside the loss that is trained: plain cross-entropy, and a loss's smooth metric.

    Args:
        smooth: The loss, a :class:`zoo.common.protocols.HasSmoothMetric`; None for one that has no such metric.
        num_classes: C of the logits (B, C).
    """
    metrics: dict[str, nn.Module] = {"cross_entropy": MeanMetric()}
    if isinstance(smooth, CountsLoss) and smooth.average != "samples":
        metrics["smooth"] = CountsMetric(smooth, num_classes)
    elif smooth is not None:
        metrics["smooth"] = SmoothMetric(smooth)
    return _WatchedMetrics(metrics)
