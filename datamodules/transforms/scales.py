"""Multi-scale training: the short sides that batches are resized to, and which objects are learned at each of them.

The latter is SNIP: Singh and Davis, "An Analysis of Scale Invariance in Object Detection - SNIP", CVPR 2018, arXiv
1711.08189. An object is learned where it is neither too small nor too large to be recognised, and elsewhere ignored.
"""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

ShortSides = Sequence[int] | Mapping[str, int]
"""Short sides in pixels; or ``{low: 480, high: 800, step: 32}``, 480 to 800, both included, 32 apart."""
Range = tuple[float, float | None]
"""The least and the greatest size of an object, both included. None: without an end."""

ROUNDING = 1e-3
"""Share by which a size may miss a range: a box that was resized must not lie on a bound that it misses at both."""


def sides_of(short_sides: ShortSides | None) -> tuple[int, ...]:
    """All short sides, in pixels; none for None.

    Raises:
        ValueError: If there are none among them, or one below 1.
    """
    if short_sides is None:
        return ()
    if isinstance(short_sides, Mapping):
        if short_sides.keys() != {"low", "high", "step"}:
            raise ValueError(f"short_sides are {dict(short_sides)}: expected a list, or low, high and step in pixels")
        low, high, step = (short_sides[name] for name in ("low", "high", "step"))
        whole = all(isinstance(each, int) for each in (low, high, step))
        if not whole or step < 1 or high < low or (high - low) % step:
            raise ValueError(f"short_sides are {dict(short_sides)}: expected whole steps that lead from low to high")
        short_sides = range(low, high + 1, step)
    if not short_sides:
        raise ValueError("short_sides is empty: expected short sides in pixels, or null")
    if min(short_sides) < 1:
        raise ValueError(f"short_sides is {min(short_sides)}: expected at least 1 pixel")
    return tuple(short_sides)


def ranges_of(valid_ranges: Sequence[Range] | None, short_sides: ShortSides | None) -> tuple[Range, ...]:
    """The range of each short side; none for None.

    Raises:
        ValueError: If they are not one for each of a list, if one is none, or if they leave a size to no short side.
    """
    if valid_ranges is None:
        return ()
    if short_sides is None or isinstance(short_sides, Mapping):
        there = "null" if short_sides is None else dict(short_sides)
        raise ValueError(f"valid_ranges are given, but short_sides are {there}: expected a list, a range for each")
    if len(valid_ranges) != len(short_sides):
        raise ValueError(f"valid_ranges are {len(valid_ranges)}, short_sides {len(short_sides)}: expected one for each")
    for side, each in zip(short_sides, valid_ranges, strict=True):
        if len(each) != 2 or each[0] is None or not 0 <= each[0] < _end(each):
            raise ValueError(
                f"the valid range of short side {side} is {list(each)}: expected 0 <= low < high, or null for no end"
            )
    covered = 0.0
    for low, high in sorted((low, _end((low, high))) for low, high in valid_ranges):
        if low > covered:
            break
        covered = max(covered, high)
    if covered < math.inf:
        following = min((low for low, _ in valid_ranges if low > covered), default=math.inf)
        sizes = f"from {covered:g} pixels on" if following == math.inf else f"of {covered:g} to {following:g} pixels"
        raise ValueError(
            f"valid_ranges leave objects {sizes} to none of the short_sides {list(short_sides)}: expected ranges that "
            "cover all sizes"
        )
    return tuple((low, high) for low, high in valid_ranges)


def in_range(boxes: Tensor, valid_range: Range, scale: float) -> Tensor:
    """Tells which boxes (n, 4) xyxy of a resized image have a size within a range, both ends included: (n,) bool.

    A size is the square root of a box's area in pixels of the image before.

    Args:
        boxes: In pixels of the resized image.
        valid_range: The least and the greatest size.
        scale: Factor by which lengths have grown.
    """
    width, height = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).unbind(1)
    size = (width * height).sqrt() / scale
    return (size >= valid_range[0] * (1 - ROUNDING)) & (size <= _end(valid_range) * (1 + ROUNDING))


def _end(valid_range: Range) -> float:
    return math.inf if valid_range[1] is None else valid_range[1]
