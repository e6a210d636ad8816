"""Choices of an aligner, the papers' values of them, and checks of its arguments."""

import math
from typing import Any, Literal

from zoo.alignment.positives import Positives
from zoo.alignment.text import Act
from zoo.common.ranges import check_above, check_choices, check_ranges, check_training

Loss = Literal["softmax", "sigmoid"]
Projection = Literal["linear", "none"]

SCALES: dict[str, float] = {"softmax": 1 / 0.07, "sigmoid": 10.0}
"""Initial scales by loss (Radford et al. 2021, section 2.5; Zhai et al. 2023, section 3.1)."""
LARGEST: dict[str, float | None] = {"softmax": 100.0, "sigmoid": None}
"""Largest scales by loss; None: as it comes, and SigLIP's released ones are above 100."""
BIAS = -10.0
"""SigLIP's initial bias; with "auto" what stands for one until there is a batch."""


def scale_of(hparams: Any) -> float:
    """The initial scale."""
    return SCALES[hparams.loss] if hparams.scale_init is None else hparams.scale_init


def max_scale_of(hparams: Any) -> float | None:
    """The largest scale; None if there is none."""
    return LARGEST[hparams.loss] if hparams.max_scale == "auto" else hparams.max_scale


def check_arguments(hparams: Any) -> None:
    """Raises ValueError for arguments of an aligner out of their ranges, which no part of it checks for itself."""
    check_choices(
        loss=(hparams.loss, Loss),
        positives=(hparams.positives, Positives),
        image_projection=(hparams.image_projection, Projection),
        text_projection=(hparams.text_projection, Projection),
    )
    check_choices(**{name: (hparams[name] or "gelu", Act) for name in ("image_act", "text_act")})
    check_training(hparams)
    least = {"image_size": 1, "in_channels": 1, "embed_dim": 1, "context_length": 1, "vocab_size": 1, "chunk": 1}
    least |= {"micro_batch": 1, "unlock_groups": 0, "unlock_every": 1, "scale_lr": 0}
    least |= {"text_width": 1, "text_depth": 1, "text_heads": 1, "text_mlp_width": 1}
    check_ranges(**{name: (hparams[name], smallest, None) for name, smallest in least.items()})
    check_ranges(text_dropout=(hparams.text_dropout, 0, 1))
    check_ranges(bias_init=(None if hparams.bias_init == "auto" else hparams.bias_init, -math.inf, None))
    scale, largest = scale_of(hparams), max_scale_of(hparams)
    check_above(image_norm_eps=(hparams.image_norm_eps, 0, 1), text_norm_eps=(hparams.text_norm_eps, 0, 1))
    check_above(scale_init=(scale, 0, math.inf), max_scale=(largest, 1, math.inf))
    if largest is not None and not 1 <= scale <= largest:
        raise ValueError(f"scale_init is {scale:g}: expected a number from 1 to max_scale, which is {largest:g}")
    if hparams.loss == "softmax" and hparams.bias_init != BIAS:
        raise ValueError("bias_init is of the sigmoid loss: leave it out, or set loss to 'sigmoid'")
