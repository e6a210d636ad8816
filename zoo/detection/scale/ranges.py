"""Valid ranges: by the size of an object, who learns it and who may detect it, be that a scale, a view or a branch.

A size is the square root of a box's area, in pixels of the original image: as it was before it was resized.
"""

import math
from collections.abc import Sequence

from torch import Tensor

Range = tuple[float, float | None]
"""The least and the greatest size, both included. None: without an end."""


def check_valid_ranges(ranges: Sequence[Range], names: Sequence[str]) -> None:
    """Raises ValueError for ranges that are none, or that leave objects of some size to nobody.

    Args:
        ranges: One or more.
        names: Whose each of them is, "branch 1" say.
    """
    if len(ranges) != len(names):
        raise ValueError(f"valid_ranges are {len(ranges)} for {', '.join(names)}: expected one for each")
    ends = []
    for name, each in zip(names, ranges, strict=True):
        low, high = (math.inf if end is None else end for end in each) if len(each) == 2 else (math.nan, math.nan)
        if not 0 <= low < high:
            raise ValueError(f"the valid range of {name} is {list(each)}: expected 0 <= low < high, or null for no end")
        ends.append((low, high))
    covered = 0.0
    for low, high in sorted(ends):
        if low > covered:
            break
        covered = max(covered, high)
    if covered < math.inf:
        following = min((low for low, _ in ends if low > covered), default=math.inf)
        sizes = f"from {covered:g} pixels on" if following == math.inf else f"of {covered:g} to {following:g} pixels"
        raise ValueError(
            f"valid_ranges leave objects {sizes} to none of {', '.join(names)}: expected all sizes covered"
        )


def within(boxes: Tensor, low: float | Tensor, high: float | Tensor | None) -> Tensor:
    """Tells which boxes (..., 4) xyxy have a size from ``low`` to ``high``, both included: (...) bool.

    Args:
        boxes: In pixels of the original image.
        low: The least size, or one for each box (...).
        high: The greatest, likewise; None or infinity: there is none.
    """
    sides = (boxes[..., 2:].float() - boxes[..., :2].float()).clamp(min=0)
    size = sides.prod(-1).sqrt()
    return size >= low if high is None else (size >= low) & (size <= high)
