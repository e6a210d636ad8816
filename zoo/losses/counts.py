"""Smooth confusion counts, and what they are turned into: F-beta, IoU, Tversky, MCC, kappa, balanced accuracy.

A count of hard decisions, such as that of true positives, becomes a sum of probabilities, sum t p with the target t. It
is the expected count if each decision were drawn with its probability, and the hard count in the limit of a vanishing
temperature.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from zoo.losses.inputs import TASKS, Judged, Task, read
from zoo.losses.soft import check_choice, check_positive

Average = Literal["macro", "micro", "samples"]
AVERAGES = ("macro", "micro", "samples")


class ConfusionCounts(NamedTuple):
    """True and false positives, false and true negatives; four tensors of one shape, not negative."""

    tp: Tensor
    fp: Tensor
    fn: Tensor
    tn: Tensor


def soft_confusion(
    logits: Tensor,
    target: Tensor,
    tau: float = 1.0,
    task: Task = "multiclass",
    average: Average = "macro",
    ignore_index: int = -100,
) -> ConfusionCounts:
    """Smooth confusion counts of a batch.

    tp = sum t p, fp = sum (1 - t) p, fn = sum t (1 - p), tn = sum (1 - t)(1 - p), where t are targets and p the softmax
    or sigmoid of logits / tau. Counts of several batches add up.

    Args:
        logits: (N, C, ...), floating point; for the binary task (N, ...).
        target: Multiclass: class indices (N, ...) or distributions over classes (N, C, ...). Binary and multilabel: as
            ``logits`` in shape, in [0, 1].
        tau: Temperature, above 0, in the unit of the logits.
        task: "binary", "multiclass", each class against the rest, or "multilabel".
        average: What one count is of. "macro": a class, (C,); "micro": everything, (); "samples": a sample, (N,). The
            binary task has one class, and its counts are () for the first two.
        ignore_index: Target of elements that do not count.

    Returns:
        Counts, float32 or wider.

    Raises:
        TypeError: For logits that are not floating point.
        ValueError: For shapes that do not go together, targets out of range (looked at on the CPU), unknown choices.
    """
    check_choice(task, TASKS, "task")
    check_choice(average, AVERAGES, "average")
    check_positive(tau)
    look = not torch.compiler.is_compiling() and logits.device.type == "cpu"
    return count(read(logits, target, task, ignore_index, look), task, average, tau)


def count(
    judged: Judged, task: Task, average: Average, tau: float = 1.0, weight: Tensor | None = None
) -> ConfusionCounts:
    """Smooth confusion counts of logits and targets that were read; ``weight`` (C,) multiplies what a class counts."""
    p, t = judged.probabilities(task, tau), judged.target
    positive, negative = t * judged.counted, (1 - t) * judged.counted
    if weight is not None:
        weight = weight.to(t.dtype).view(-1, *(1 for _ in t.shape[2:]))
        positive, negative = positive * weight, negative * weight
    parts = positive * p, negative * p, positive * (1 - p), negative * (1 - p)
    return ConfusionCounts(*(add_up(part, task, average) for part in parts))


def add_up(values: Tensor, task: Task, average: Average) -> Tensor:
    """Sums (C,), () or (N,) of values (N, C, ...), as a count is of a class, of everything, or of a sample."""
    if average == "micro" or (average == "macro" and task == "binary"):
        return values.sum()
    return values.transpose(0, 1 if average == "macro" else 0).flatten(1).sum(1)


def f_beta(counts: ConfusionCounts, beta: float = 1.0) -> Tensor:
    """F-beta, (1 + b²) tp / ((1 + b²) tp + b² fn + fp), of each count; 0 of nothing. F1 is also called Dice."""
    tp, weight = counts.tp * (1 + beta**2), beta**2
    return divide(tp, tp + weight * counts.fn + counts.fp)


def tversky(counts: ConfusionCounts, alpha: float = 0.5, beta: float = 0.5) -> Tensor:
    """Tversky index, tp / (tp + alpha fp + beta fn), of each count; 0 of nothing (Salehi et al. 2017)."""
    return divide(counts.tp, counts.tp + alpha * counts.fp + beta * counts.fn)


def iou(counts: ConfusionCounts) -> Tensor:
    """Intersection over union, tp / (tp + fp + fn), of each count; 0 of nothing. Also called Jaccard index."""
    return tversky(counts, 1.0, 1.0)


def balanced_accuracy(counts: ConfusionCounts, multiclass: bool = False) -> Tensor:
    """Mean recall of the classes that occur; 0 if none does.

    Args:
        counts: Of two-class problems, of whatever shape; or of the classes of one problem, (..., C).
        multiclass: Which of the two.

    Returns:
        In [0, 1]; as ``counts`` in shape, or (...).
    """
    classes = counts if multiclass else _both_classes(counts)
    positive = classes.tp + classes.fn
    return divide(divide(classes.tp, positive).sum(-1), (positive != 0).to(positive.dtype).sum(-1))


def kappa(counts: ConfusionCounts, multiclass: bool = False) -> Tensor:
    """Cohen's kappa, the agreement of prediction and target beyond that of chance (Cohen 1960); 0 where chance has all.

    Arguments and shapes are those of :func:`balanced_accuracy`; at most 1.
    """
    agreed, predicted, occurring = _shares(counts if multiclass else _both_classes(counts))
    chance = (predicted * occurring).sum(-1)
    return divide(agreed - chance, 1 - chance, least=_rounding(chance))


def mcc(counts: ConfusionCounts, multiclass: bool = False) -> Tensor:
    """Matthews' correlation of prediction and target, for several classes R_K (Gorodkin 2004).

    0 where target or prediction is constant. Arguments and shapes are those of :func:`balanced_accuracy`; in [-1, 1].
    """
    agreed, predicted, occurring = _shares(counts if multiclass else _both_classes(counts))
    spread = (1 - predicted.square().sum(-1)) * (1 - occurring.square().sum(-1))
    is_constant = spread <= _rounding(spread)
    root = spread.masked_fill(is_constant, 1.0).sqrt()  # the root of 0 has no gradient
    return ((agreed - (predicted * occurring).sum(-1)) / root).masked_fill(is_constant, 0.0)


def divide(a: Tensor, b: Tensor, least: float = 0.0) -> Tensor:
    """a / b, and 0 with a gradient of 0 where b is ``least`` or less; what is not a number stays so."""
    is_nothing = b <= least
    return (a / b.masked_fill(is_nothing, 1.0)).masked_fill(is_nothing, 0.0)


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum over the processes of the default group, if there is one, through which gradients flow.

    Each process gets the gradient of the sum of all processes' losses. DistributedDataParallel then divides by their
    number, so that a loss of such sums has, in each process, the gradient of the loss of one big batch.
    """
    return _SumOverRanks.apply(values) if dist.is_available() and dist.is_initialized() else values


class _SumOverRanks(torch.autograd.Function):
    """torch.distributed.nn.functional's sum, which torch is about to take away and which cannot be compiled."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        total = values.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return _SumOverRanks.apply(gradients[0])


def _both_classes(counts: ConfusionCounts) -> ConfusionCounts:
    """Counts (..., 2) of the negative and the positive class of two-class problems (...)."""
    tp, fp, fn, tn = counts
    return ConfusionCounts(*(torch.stack(pair, -1) for pair in ((tn, tp), (fn, fp), (fp, fn), (tp, tn))))


def _shares(classes: ConfusionCounts) -> tuple[Tensor, Tensor, Tensor]:
    """Shares of everything: of what is right (...), and of each class in predictions and targets (..., C)."""
    tp, fp, fn, _ = classes
    total = (tp + fn).sum(-1, keepdim=True)
    agreed, predicted, occurring = (divide(part, total) for part in (tp, tp + fp, tp + fn))
    return agreed.sum(-1), predicted, occurring


def _rounding(values: Tensor) -> float:
    """Rounding error of a difference of shares: below it, it is 0."""
    return 8 * torch.finfo(values.dtype).eps


METRICS: dict[str, Callable[..., Tensor]] = {
    "f_beta": f_beta,
    "tversky": tversky,
    "iou": iou,
    "balanced_accuracy": balanced_accuracy,
    "kappa": kappa,
    "mcc": mcc,
}
JOINT = (balanced_accuracy, kappa, mcc)
"""Those that are of all classes of a problem at once."""
