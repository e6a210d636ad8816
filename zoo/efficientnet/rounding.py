"""Rounding of scaled depth and width to whole blocks and channels, and the families that it is done to."""

import math

DIVISOR = 8

NARROWEST = {"efficientnet": 16, "mobilenetv2": 16, "resnet50": 64}
"""The families that can be scaled, by the base network's narrowest stage in channels."""


def round_filters(filters: int, width: float) -> int:
    """A stage's channels at a width: the nearest multiple of 8, at least 8, and at least nine tenths of the product."""
    scaled = filters * width
    rounded = max(DIVISOR, int(scaled + DIVISOR / 2) // DIVISOR * DIVISOR)
    return rounded + DIVISOR if rounded < 0.9 * scaled else rounded


def round_repeats(repeats: int, depth: float) -> int:
    """A stage's blocks at a depth: the product, rounded up, so that no stage loses its last block."""
    return math.ceil(repeats * depth)
