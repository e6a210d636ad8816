"""F1-weighted cross-entropy (Su 2020, kexue.fm/archives/7708), whose gradient leads to F1 and does not vanish.

With D = sum (t + p) / 2, the gradient of soft F1 = sum t p / D is sum (t - F/2) dp / D. It vanishes with dp = p (1 - p)
dz where the network is sure and wrong. Written as (1 - F/2) dp for positives and (F/2) d(1 - p) for negatives, and with
the logarithm taken of p and of 1 - p, it is that of

    L = -sum [t (1 - F/2) log p + (1 - t) (F/2) log(1 - p)] / D

where F and D are numbers, not functions. The minimum of a weighted cross-entropy is known: p exceeds 1/2 where the
probability of a positive exceeds F/2, which is the threshold that maximises F1 (Lipton et al. 2014).

Deviations: Su drops D, a constant for the one class there; here classes have each their own, without which the macro
mean would not be that of F1. F-beta has 1 + beta² in place of 2. For the softmax, 1 - p is the sum of the others.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.losses.confusion import CountsLoss
from zoo.losses.counts import Average, ConfusionCounts, add_up, divide, f_beta, sum_over_ranks
from zoo.losses.inputs import Judged, Task
from zoo.losses.soft import check_positive


class F1WeightedCrossEntropy(CountsLoss):
    """Cross-entropy whose weights of positives and negatives make it lead to the best F1 (Su 2020).

    It can train from scratch, and with its running counts batches may be small. Classes without positives, in the batch
    and the counts before it, have F1 0 and count nothing. ``metric`` is the soft F-beta.

    Args:
        task: "binary", "multiclass" or "multilabel".
        average: Of which F1: "macro", "micro" or "samples".
        beta: Weight of recall against precision, above 0.
        tau: Temperature of the probabilities in F, above 0; the cross-entropy has none.
        class_weight: A number for each class, as of :class:`SoftFBetaLoss`.
        momentum: Decay of the counts that F is made of; None, and for "samples", those of the batch.
        sync_dist: Adds up counts and losses of all processes, as of :class:`SoftFBetaLoss`.
        ignore_index: Target of elements that do not count.
        num_classes: Needed with ``momentum`` for the macro mean.

    Shape:
        As of :class:`SoftFBetaLoss`; the loss is 0-dimensional, float32 or wider, and not negative.
    """

    def __init__(
        self,
        task: Task = "multiclass",
        average: Average = "macro",
        beta: float = 1.0,
        tau: float = 1.0,
        class_weight: Sequence[float] | None = None,
        momentum: float | None = 0.9,
        sync_dist: bool = True,
        ignore_index: int = -100,
        num_classes: int | None = None,
    ) -> None:
        momentum = None if average == "samples" else momentum
        super().__init__(task, average, tau, class_weight, "skip", momentum, sync_dist, ignore_index, num_classes)
        check_positive(beta, "beta")
        self.beta = beta

    def score(self, counts: ConfusionCounts) -> Tensor:
        return f_beta(counts, self.beta)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The weighted cross-entropy; earlier batches and other processes count in training mode only."""
        judged = self.read(logits, target)
        with torch.no_grad():
            of_batch = of_all = self.count(judged)
            if self.training and self.average != "samples":
                of_batch, of_all = self.gather(of_all)
            f, weights = self.weigh(of_all)
            negative = f / (1 + self.beta**2)
            share = divide(torch.stack(of_batch).sum(0), torch.stack(of_all).sum(0))
            scale = self._scale(of_all) * share
        losses = self._cross_entropy(judged, negative)
        if self.training and self.sync_dist and self.average != "samples":
            losses = sum_over_ranks(losses)
        return self.mean(divide(losses, scale) * weights, weights)

    def _scale(self, counts: ConfusionCounts) -> Tensor:
        """D of each count, by which the gradient of F-beta is divided."""
        tp, fp, fn, _ = counts
        return (self.beta**2 * (tp + fn) + tp + fp) / (1 + self.beta**2)

    def _cross_entropy(self, judged: Judged, negative: Tensor) -> Tensor:
        """The cross-entropy of each count, with the weights of negatives; those of positives are the rest to 1."""
        t = judged.target
        if self.average == "samples":
            negative = negative.view(-1, *(1 for _ in t.shape[1:]))
        else:
            negative = negative.view(-1, *(1 for _ in t.shape[2:]))
        log_p, log_rest = log_probabilities(judged.logits, self.task)
        losses = -(t * (1 - negative) * log_p + (judged.counted - t) * negative * log_rest)
        if self.class_weight is not None and self.average != "macro":
            losses = losses * self.class_weight.to(t.dtype).view(-1, *(1 for _ in t.shape[2:]))
        return add_up(losses, self.task, self.average)


def log_probabilities(logits: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    """Logarithms of p and of 1 - p for logits (N, C, ...), exact where either is near 0."""
    if task != "multiclass":
        return F.logsigmoid(logits), F.logsigmoid(-logits)
    log_p = logits.log_softmax(1)
    # The others of the most probable class are added up without it; elsewhere p is 1/2 at most.
    is_top = torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.argmax(1, keepdim=True), True)
    others = log_p.masked_fill(is_top, -torch.inf).logsumexp(1, keepdim=True)
    return log_p, torch.where(is_top, others, (-log_p.exp().masked_fill(is_top, 0.0)).log1p())
