"""Losses of the smooth confusion counts of a batch: F-beta, and whatever else is a function of the counts.

Small batches bias such a loss: a ratio of sums is not the mean of ratios, and with 10 % positives the soft F1 of
batches of 8 is 28 % below that of all data. Two options are against it: ``momentum`` adds decayed counts of the batches
before, ``sync_dist`` those of the other processes.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.losses.counts import (
    AVERAGES,
    JOINT,
    METRICS,
    Average,
    ConfusionCounts,
    add_up,
    count,
    divide,
    f_beta,
    sum_over_ranks,
)
from zoo.losses.inputs import Judged, Reader, Task
from zoo.losses.soft import check_choice, check_positive

ZeroDivision = Literal["skip", 0, 1]
Reduction = Literal["mean", "sum", "none"]


class CountsLoss(nn.Module):
    """Base of the losses of smooth confusion counts; the arguments are those of :class:`SoftFBetaLoss`.

    A subclass says in :meth:`score` what the metric is, and in ``has_gaps`` whether absent classes have none.
    """

    running: Tensor | None
    class_weight: Tensor | None
    has_gaps = True

    def __init__(
        self,
        task: Task,
        average: Average,
        tau: float,
        class_weight: Sequence[float] | None,
        zero_division: ZeroDivision | None,
        momentum: float | None,
        sync_dist: bool,
        ignore_index: int,
        num_classes: int | None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.reader = Reader(task, ignore_index)
        check_choice(average, AVERAGES, "average")
        check_positive(tau)
        if zero_division not in (None, "skip", 0, 1):
            raise ValueError(f"zero_division is {zero_division!r}: it has to be 'skip', 0 or 1")
        check_reduction(reduction, average)
        self.task: Task = task
        self.average: Average = average
        self.reduction: Reduction = reduction
        self.tau, self.zero_division, self.sync_dist = tau, zero_division, sync_dist
        self.num_classes, self.momentum = num_classes, momentum
        weight = None if class_weight is None else self._checked_weight(class_weight)
        self.register_buffer("class_weight", weight, persistent=False)
        # Part of the state: a run that goes on has to go on with them.
        self.register_buffer("running", None if momentum is None else self._no_counts(momentum))

    def score(self, counts: ConfusionCounts) -> Tensor:
        """The metric of each count, as they are in shape, or one of all of them."""
        raise NotImplementedError

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """1 - metric, where earlier batches and other processes count, if they do, in training mode only."""
        counts = self.count(self.read(logits, target))
        if self.training and self.average != "samples":
            _, counts = self.gather(counts)
        scores, weights = self.weigh(counts)
        losses = (1 - scores) * weights
        if self.reduction != "mean":
            return losses.sum() if self.reduction == "sum" else losses
        return self.mean(losses, weights)

    def metric(self, logits: Tensor, target: Tensor) -> Tensor:
        """The smooth metric itself, of these logits and targets alone, 0-dimensional; 0 of nothing."""
        scores, weights = self.weigh(self.count(self.read(logits, target)))
        return divide((scores * weights).sum(), weights.sum())

    def read(self, logits: Tensor, target: Tensor) -> Judged:
        look = self.reader.looks_at(logits)
        judged = self.reader(logits, target)
        expected, classes = self.num_classes, judged.logits.shape[1]
        if self.class_weight is not None:
            expected = len(self.class_weight)
        if expected not in (None, classes) and self.task != "binary":
            what = "num_classes is" if self.class_weight is None else "the length of class_weight is"
            raise ValueError(f"{what} {expected}, but logits {tuple(logits.shape)} are of {classes} classes")
        if look and self.has_gaps and self.zero_division is None:
            self._tell_gaps(add_up(judged.target, self.task, self.average) > 0)
        return judged

    def count(self, judged: Judged) -> ConfusionCounts:
        """Smooth confusion counts of what was read."""
        return count(judged, self.task, self.average, self.tau, None if self.average == "macro" else self.class_weight)

    def gather(self, counts: ConfusionCounts) -> tuple[ConfusionCounts, ConfusionCounts]:
        """Counts of this batch in all processes, and the same with those of the batches before, if so asked for."""
        of_batch = torch.stack(counts)
        if self.sync_dist:
            of_batch = sum_over_ranks(of_batch)
        of_all = of_batch
        if self.running is not None and self.momentum is not None:
            of_all = self.running + of_batch
            with torch.no_grad():  # a count that is not finite would stay for ever
                self.running.copy_(self.momentum * of_all.where(of_all.isfinite().all(), self.running))
        return ConfusionCounts(*of_batch), ConfusionCounts(*of_all)

    def weigh(self, counts: ConfusionCounts) -> tuple[Tensor, Tensor]:
        """Scores and their weights in the mean, once it is settled what classes count that do not occur."""
        scores = self.score(counts)
        if scores.shape != counts.tp.shape and scores.ndim:
            raise ValueError(f"the metric is {tuple(scores.shape)}: expected one value, or {tuple(counts.tp.shape)}")
        everything = torch.stack(counts).sum(0)
        if scores.shape != counts.tp.shape:
            return scores, (everything.sum() != 0).to(scores.dtype)
        weights = (everything != 0).to(scores.dtype)  # of what is ignored altogether, there is no metric
        if self.class_weight is not None and self.average == "macro":
            weights = weights * self.class_weight
        if not self.has_gaps:
            return scores, weights
        occurs = counts.tp + counts.fn != 0  # what is not a number does
        if self.zero_division in (None, "skip"):
            return scores.where(occurs, 0.0), weights * occurs
        # With 1, being predicted is what speaks against a class: in the limit it is 1 if nothing is predicted as it.
        absent = self.tau / (self.tau + counts.fp) if self.zero_division else torch.zeros_like(scores)
        return scores.where(occurs, absent), weights

    def mean(self, losses: Tensor, weights: Tensor) -> Tensor:
        """The mean of losses that are multiplied by their weights, over all processes if they are of samples."""
        sums = torch.stack((losses.sum(), weights.sum()))
        if self.training and self.sync_dist and self.average == "samples":
            sums = sum_over_ranks(sums)
        return divide(sums[0], sums[1])

    def extra_repr(self) -> str:
        names = ("task", "average", "tau", "zero_division", "momentum", "sync_dist")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CountsLoss":
        """Converts the module, but no count to less than float32: half precision stands still at 256 or 2,048."""

        def widely(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            wanted = torch.promote_types(found.dtype, torch.float32)
            return found if found.dtype == wanted else tensor.to(found.device, wanted)

        return super()._apply(widely, recurse)

    def _tell_gaps(self, occurs: Tensor) -> None:
        if occurs.all():
            return
        self.zero_division = "skip"  # told once
        absent = (~occurs).flatten().nonzero().flatten().tolist()
        thing = {"macro": "class", "micro": "batch", "samples": "sample"}[self.average]
        warnings.warn(
            f"no positive of {thing} {absent[0]}{' and others' if absent[1:] else ''}: it is left out of the mean, as "
            "zero_division='skip' says; 0 counts it as 0, and 1 as 1 if nothing is predicted as it",
            stacklevel=2,
        )

    def _checked_weight(self, class_weight: Sequence[float]) -> Tensor:
        weight = torch.tensor(list(class_weight), dtype=torch.float32)
        if self.task == "binary":
            raise ValueError("class_weight has no meaning for the binary task, which has one class; beta weighs recall")
        if weight.ndim != 1 or not (weight.isfinite().all() and (weight >= 0).all() and weight.any()):
            raise ValueError(f"class_weight is {list(class_weight)}: expected a number for each class, none negative")
        if self.num_classes not in (None, len(weight)):
            raise ValueError(f"class_weight has {len(weight)} weights for {self.num_classes} classes")
        return weight

    def _no_counts(self, momentum: float) -> Tensor:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}: expected a number in [0, 1)")
        if self.average == "samples":
            raise ValueError("momentum has no meaning for average='samples', which batches do not bias")
        if self.average == "micro" or self.task == "binary":
            return torch.zeros(len(ConfusionCounts._fields), dtype=torch.float32)
        if self.num_classes is None:
            raise ValueError(f"momentum={momentum} counts each class over batches: it needs num_classes")
        return torch.zeros(len(ConfusionCounts._fields), self.num_classes, dtype=torch.float32)


class SoftFBetaLoss(CountsLoss):
    """1 - F-beta of smooth confusion counts: (1 + b²) tp / ((1 + b²) tp + b² fn + fp) with tp = sum t p, and so on.

    In [0, 1]. F1 of the binary task is 2 sum t p / sum (t + p) (Su 2019, kexue.fm/archives/6620), which segmentation
    calls Dice; macro is the mean over classes, micro that of counts added up, samples the mean over samples. It is the
    hard metric as tau vanishes. The gradient vanishes where probabilities are near 0 or 1: start with cross-entropy, or
    see :class:`F1WeightedCrossEntropy`.

    Args:
        task: "binary", "multiclass" or "multilabel".
        average: "macro", "micro" or "samples".
        beta: Weight of recall against precision, above 0.
        tau: Temperature of softmax or sigmoid, above 0, in the unit of the logits.
        class_weight: A number for each class, none negative: its weight in the macro mean, or what its counts are
            multiplied by.
        zero_division: What a class without positives counts (a sample without, for "samples"). "skip": nothing, it is
            left out of the mean; 0: 0; 1: tau / (tau + fp), which is 1 if nothing is predicted as it. None: "skip",
            with a warning when there is one. Of no class at all, loss and metric are 0.
        momentum: Adds the counts of earlier batches, multiplied by this once for each batch since, to those of the
            batch; in [0, 1), about batch / (1 - momentum) samples in all. They have no gradient, so that the gradient
            shrinks to about 1 - momentum of what it was. They are in the state dict, and each process has its own but
            for ``sync_dist``. None: the batch's counts alone.
        sync_dist: Adds up the counts of all processes; with DistributedDataParallel, loss and gradients are those of
            one big batch. Each process has to come by as often as the others.
        ignore_index: Target of elements that do not count.
        num_classes: Only needed with ``momentum`` for the macro mean.
        reduction: "mean"; "sum" and "none", (N,), for average="samples" only.

    Shape:
        logits (N, C, ...), floating point; binary (N, ...). Targets: multiclass (N, ...) indices or (N, C, ...)
        distributions; else as the logits, in [0, 1]. The loss is 0-dimensional, float32 or wider.
    """

    def __init__(
        self,
        task: Task = "multiclass",
        average: Average = "macro",
        beta: float = 1.0,
        tau: float = 1.0,
        class_weight: Sequence[float] | None = None,
        zero_division: ZeroDivision | None = None,
        momentum: float | None = None,
        sync_dist: bool = False,
        ignore_index: int = -100,
        num_classes: int | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            task, average, tau, class_weight, zero_division, momentum, sync_dist, ignore_index, num_classes, reduction
        )
        check_positive(beta, "beta")
        self.beta = beta

    def score(self, counts: ConfusionCounts) -> Tensor:
        return f_beta(counts, self.beta)


class SoftConfusionLoss(CountsLoss):
    """1 - metric of smooth confusion counts, for a metric that is a function of them.

    Args:
        metric: A name: "f_beta", "tversky", "iou", of each class; "balanced_accuracy", "kappa", "mcc", of all classes
            of a multiclass problem at once, and of each label of a multilabel one. Or a function of
            :class:`~zoo.losses.ConfusionCounts` that returns one value, or one for each count;
            :func:`zoo.losses.divide` helps it where there is nothing to count.
        metric_options: Further arguments of the function.

    The others are those of :class:`SoftFBetaLoss`. ``zero_division`` is about metrics of each class. MCC and kappa are
    0 where they are not defined, and balanced accuracy is the mean over classes that occur.
    """

    def __init__(
        self,
        metric: str | Callable[..., Tensor] = "mcc",
        task: Task = "multiclass",
        average: Average = "macro",
        metric_options: Mapping[str, Any] | None = None,
        tau: float = 1.0,
        class_weight: Sequence[float] | None = None,
        zero_division: ZeroDivision | None = None,
        momentum: float | None = None,
        sync_dist: bool = False,
        ignore_index: int = -100,
        num_classes: int | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            task, average, tau, class_weight, zero_division, momentum, sync_dist, ignore_index, num_classes, reduction
        )
        if isinstance(metric, str):
            check_choice(metric, tuple(METRICS), "metric")
        function = METRICS[metric] if isinstance(metric, str) else metric
        self.metric_name = metric if isinstance(metric, str) else getattr(metric, "__name__", repr(metric))
        known = set(inspect.signature(function).parameters) - {"counts", "multiclass"}
        if isinstance(metric, str) and (unknown := set(metric_options or ()) - known):
            has = ", ".join(sorted(known)) or "none"
            raise ValueError(f"unknown option {', '.join(sorted(unknown))} of metric {metric!r}: it has {has}")
        options = dict(metric_options or {})
        if function in JOINT:
            self.has_gaps = False
            if task == "multiclass":
                if average != "macro" or class_weight is not None:
                    raise ValueError(
                        f"{self.metric_name} of a multiclass problem is one value of all classes: it has neither "
                        "class_weight nor another average than 'macro'"
                    )
                options["multiclass"] = True
        self.function = partial(function, **options)

    def score(self, counts: ConfusionCounts) -> Tensor:
        return self.function(counts)

    def extra_repr(self) -> str:
        return f"{self.metric_name}, {super().extra_repr()}"


def check_reduction(reduction: str, average: str) -> None:
    """Raises ValueError for a reduction that a metric has no values for."""
    check_choice(reduction, ("mean", "sum", "none"), "reduction")
    if reduction != "mean" and average != "samples":
        raise ValueError(
            f"reduction is {reduction!r} with average={average!r}: the metric is one of the whole batch, without a "
            "value for each sample; expected 'mean', or average='samples'"
        )
