"""Smooth surrogates of max, argmax, top-k, ranks and counts, and losses made of them: a door that needs no Lightning.

Functions and modules shaped like torch's, for anybody's project. They compute in float32 at least, whatever the
precision of what they are given, and their results stay in it, as torch's losses under autocast do.
"""

from zoo.losses.soft import (
    smooth_max,
    smooth_min,
    smooth_round,
    smooth_step,
    soft_argmax,
    soft_argmax_2d,
    soft_one_hot,
)

__all__ = [
    "smooth_max",
    "smooth_min",
    "smooth_round",
    "smooth_step",
    "soft_argmax",
    "soft_argmax_2d",
    "soft_one_hot",
]
