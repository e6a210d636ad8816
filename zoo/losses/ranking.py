"""Smooth average precision and area under the ROC curve: ranks by sigmoids of differences of scores.

Both compare each positive with all others: time and memory are n² for n elements of a class. Tau is in the unit of the
scores, and has to go with their spread: pairs farther apart than a few tau have no gradient. Pairs are those of the
batch of a process.
"""

import torch
from torch import Tensor, nn

from zoo.losses.confusion import Reduction, check_reduction
from zoo.losses.counts import AVERAGES, Average, divide
from zoo.losses.inputs import Reader, Task
from zoo.losses.soft import check_choice, check_positive


class RankingLoss(nn.Module):
    """Base of losses of ranks; a subclass says in :meth:`score` what the metric is."""

    def __init__(
        self, task: Task, average: Average, tau: float, ignore_index: int, reduction: Reduction = "mean"
    ) -> None:
        super().__init__()
        check_choice(average, AVERAGES, "average")
        check_positive(tau)
        check_reduction(reduction, average)
        self.reader, self.task, self.tau = Reader(task, ignore_index), task, tau
        self.average: Average = average
        self.reduction: Reduction = reduction

    def score(self, scores: Tensor, positive: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """The metric of each row (G,) of scores (G, n), and whether there is one; with what is positive and counted."""
        raise NotImplementedError

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        values, exists = self._values(logits, target)
        losses = (1 - values) * exists
        if self.reduction != "mean":
            return losses.sum() if self.reduction == "sum" else losses
        return divide(losses.sum(), exists.sum())

    def metric(self, logits: Tensor, target: Tensor) -> Tensor:
        """The smooth metric itself, 0-dimensional; 0 of nothing."""
        values, exists = self._values(logits, target)
        return divide((values * exists).sum(), exists.sum())

    def extra_repr(self) -> str:
        return f"task={self.task!r}, average={self.average!r}, tau={self.tau:g}"

    def _values(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        judged = self.reader(logits, target)
        # Elements of a class compare by their probabilities, of which logarithms keep the order.
        scores = judged.logits.log_softmax(1) if self.task == "multiclass" else judged.logits
        parts = scores, judged.target, judged.counted.expand_as(scores)
        if self.average == "micro":
            rows = [part.reshape(1, -1) for part in parts]
        else:
            rows = [part.transpose(0, 1 if self.average == "macro" else 0).flatten(1) for part in parts]
        values, exists = self.score(*rows)
        return values, exists.to(values.dtype)

    def _above(self, scores: Tensor) -> Tensor:
        """Extent to which j is above i, (G, i, j), in [0, 1] and 0 for i = j."""
        above = ((scores.unsqueeze(1) - scores.unsqueeze(2)) / self.tau).sigmoid()
        return above * (1 - torch.eye(scores.shape[1], dtype=scores.dtype, device=scores.device))


class SmoothAPLoss(RankingLoss):
    """1 - average precision with smooth ranks (Brown et al. 2020, "Smooth-AP").

    The mean over positives i of their rank among positives over their rank among all, each 1 + sum_j sigmoid((s_j -
    s_i) / tau). In [0, 1], and 1 - AP as tau vanishes, if no scores tie. For retrieval, logits are the similarities of
    all images, (N), to each query, (C), and targets whether they belong together.

    Args:
        task: "binary", "multiclass", each class against the rest, or "multilabel".
        average: "macro", the mean over classes, of which those without positives are left out; "micro", all labels in
            one ranking; "samples", the mean over samples, each of which ranks its classes.
        tau: Temperature, above 0, in the unit of the scores: 0.01 is the paper's, for cosine similarities. A tenth of
            the spread of logits is a good start.
        ignore_index: Target of elements that do not count.
        reduction: "mean"; "sum" and "none", (N,), for average="samples" only.

    Shape:
        As of :class:`~zoo.losses.SoftFBetaLoss`. Targets between 0 and 1 count as parts of a positive.
    """

    def __init__(
        self,
        task: Task = "multilabel",
        average: Average = "macro",
        tau: float = 0.01,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(task, average, tau, ignore_index, reduction)

    def score(self, scores: Tensor, positive: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        above = self._above(scores)
        # Sums of products and not matmul, which autocast would make half precision.
        among_positives = positive + (above * positive.unsqueeze(1)).sum(2)
        among_all = 1 + (above * counted.unsqueeze(1)).sum(2)
        total = positive.sum(1)
        return divide((positive * among_positives / among_all).sum(1), total), total > 0


class SmoothAUCLoss(RankingLoss):
    """1 - area under the ROC curve, the mean of sigmoid((s+ - s-) / tau) over pairs of a positive and a negative.

    In [0, 1], and 1 - AUC as tau vanishes, if no scores tie. Classes without positives or without negatives are left
    out. The arguments are those of :class:`SmoothAPLoss`.
    """

    def __init__(
        self,
        task: Task = "multilabel",
        average: Average = "macro",
        tau: float = 1.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(task, average, tau, ignore_index, reduction)

    def score(self, scores: Tensor, positive: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        negative = counted - positive
        pairs = positive.unsqueeze(1) * negative.unsqueeze(2)
        total = positive.sum(1) * negative.sum(1)
        return divide((self._above(scores) * pairs).sum((1, 2)), total), total > 0
