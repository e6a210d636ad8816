"""Smooth surrogates of max, argmax, top-k, ranks and counts, losses made of them, and contrastive losses.

A door that needs no Lightning.

Functions and modules shaped like torch's, for anybody's project. They compute in float32 at least, whatever the
precision of what they are given, and their results stay in it, as torch's losses under autocast do.
"""

from typing import TYPE_CHECKING, Any

from zoo.losses.accuracy import SmoothAccuracyLoss
from zoo.losses.confusion import SoftConfusionLoss, SoftFBetaLoss
from zoo.losses.contrastive import (
    SigmoidContrastiveLoss,
    SoftmaxContrastiveLoss,
    contrastive_sigmoid_loss,
    contrastive_softmax_loss,
    positive_pairs,
)
from zoo.losses.counts import (
    ConfusionCounts,
    balanced_accuracy,
    divide,
    f_beta,
    iou,
    kappa,
    mcc,
    soft_confusion,
    sum_over_ranks,
    tversky,
)
from zoo.losses.cross_entropy import F1WeightedCrossEntropy
from zoo.losses.names import create_loss
from zoo.losses.ranking import SmoothAPLoss, SmoothAUCLoss
from zoo.losses.ranks import effective_count, soft_count, soft_count_distinct, soft_rank
from zoo.losses.soft import (
    smooth_max,
    smooth_min,
    smooth_round,
    smooth_step,
    soft_argmax,
    soft_argmax_2d,
    soft_one_hot,
)
from zoo.losses.topk import soft_kth_largest, soft_topk

if TYPE_CHECKING:
    from torch import nn

    LOSSES: dict[str, type[nn.Module]]

__all__ = [
    "LOSSES",
    "ConfusionCounts",
    "F1WeightedCrossEntropy",
    "SigmoidContrastiveLoss",
    "SmoothAPLoss",
    "SmoothAUCLoss",
    "SmoothAccuracyLoss",
    "SoftConfusionLoss",
    "SoftFBetaLoss",
    "SoftmaxContrastiveLoss",
    "balanced_accuracy",
    "contrastive_sigmoid_loss",
    "contrastive_softmax_loss",
    "create_loss",
    "divide",
    "effective_count",
    "f_beta",
    "iou",
    "kappa",
    "mcc",
    "positive_pairs",
    "smooth_max",
    "smooth_min",
    "smooth_round",
    "smooth_step",
    "soft_argmax",
    "soft_argmax_2d",
    "soft_confusion",
    "soft_count",
    "soft_count_distinct",
    "soft_kth_largest",
    "soft_one_hot",
    "soft_rank",
    "soft_topk",
    "sum_over_ranks",
    "tversky",
]


def __getattr__(name: str) -> Any:
    if name == "LOSSES":  # timm's are among them, and it takes seconds to import
        from zoo.losses.names import losses

        return losses()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
