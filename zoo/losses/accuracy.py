"""Smooth accuracy: the mean probability of the class that is right."""

from torch import Tensor, nn

from zoo.losses.confusion import Reduction
from zoo.losses.counts import divide
from zoo.losses.inputs import Reader, Task
from zoo.losses.soft import check_choice, check_positive


class SmoothAccuracyLoss(nn.Module):
    """1 - the probability of what is right, 1 - sum_c t_c p_c (Su 2019, kexue.fm/archives/6620).

    In [0, 1], and the error rate as tau vanishes, if no logits tie. The gradient is that of cross-entropy times p, the
    probability of what is right: 1/C of it in an untrained network, and next to none for an element that is surely
    wrong. So it is for the end of a training that cross-entropy began.

    Args:
        tau: Temperature of softmax or sigmoid, above 0, in the unit of the logits.
        ignore_index: Target of elements that do not count; without the others the loss is 0.
        reduction: "mean" over elements, "sum", or "none", which leaves 0 where they do not count.
        task: "multiclass"; "binary" and "multilabel", where each label is an element.

    Shape:
        logits (N, C, ...), floating point; binary (N, ...). Targets: multiclass (N, ...) indices or (N, C, ...)
        distributions; else as the logits, in [0, 1]. Without reduction (N, ...), multilabel (N, C, ...); else
        0-dimensional. Float32 or wider.
    """

    def __init__(
        self, tau: float = 1.0, ignore_index: int = -100, reduction: Reduction = "mean", task: Task = "multiclass"
    ) -> None:
        super().__init__()
        check_positive(tau)
        check_choice(reduction, ("mean", "sum", "none"), "reduction")
        self.reader, self.task, self.tau = Reader(task, ignore_index), task, tau
        self.reduction: Reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        right, counted = self._right(logits, target)
        losses = counted - right
        if self.reduction == "none":
            return losses
        return losses.sum() if self.reduction == "sum" else divide(losses.sum(), counted.sum())

    def metric(self, logits: Tensor, target: Tensor) -> Tensor:
        """The smooth accuracy itself, 0-dimensional; 0 of nothing."""
        right, counted = self._right(logits, target)
        return divide(right.sum(), counted.sum())

    def extra_repr(self) -> str:
        return f"tau={self.tau:g}, reduction={self.reduction!r}, task={self.task!r}"

    def _right(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Probability of what is right, of each element, 0 if it does not count; and 1 if it does."""
        judged = self.reader(logits, target)
        p, t = judged.probabilities(self.task, self.tau), judged.target
        if self.task == "multiclass":
            return (t * p).sum(1), judged.counted.squeeze(1)
        right, counted = t * p + (judged.counted - t) * (1 - p), judged.counted
        return (right.squeeze(1), counted.squeeze(1)) if self.task == "binary" else (right, counted)
