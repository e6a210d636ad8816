"""Checks of a detector's arguments, which say what would be right."""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from zoo.common.ranges import check_ranges, check_training

Schedule = Literal["cosine", "steps"]


def check_choices(values: Mapping[str, Any], **kinds: Any) -> None:
    """Raises ValueError for a value that is none of those of its Literal, with what there is to choose from."""
    for name, kind in kinds.items():
        if values[name] not in (choices := get_args(kind)):
            raise ValueError(f"unknown {name} {values[name]!r}: expected one of {', '.join(choices)}")


def check_detector(values: Mapping[str, Any]) -> None:
    """Raises ValueError for the arguments that all detectors have, by name, where one is out of range."""
    check_training(values)
    check_choices(values, schedule=Schedule)
    names = ("num_classes", "max_detections", "channels", "in_channels", "image_size")
    check_ranges(**{name: (values[name], 1, None) for name in names}, norm_eps=(values["norm_eps"], -math.inf, None))
    check_shares(values, "score_threshold", "nms_threshold")
    norm_eps = values["norm_eps"]
    if norm_eps is not None and (norm_eps < 0 or (norm_eps == 0 and not values["freeze_norm"])):
        raise ValueError(f"norm_eps is {norm_eps}: expected more than 0, or 0 with freeze_norm")


def check_shares(values: Mapping[str, Any], *names: str) -> None:
    """Raises ValueError for arguments that are not in [0, 1]."""
    for name in names:
        if not 0 <= values[name] <= 1:
            raise ValueError(f"{name} is {values[name]}: expected a number in [0, 1]")


def check_levels(levels: tuple[int, int], neck: str) -> None:
    """Raises ValueError for levels that a neck cannot have."""
    first, last = levels
    if not 0 < first <= last or (neck != "fpn" and first != last):
        expected = "one level, such as [4, 4]" if neck != "fpn" else "the finest and the coarsest, such as [3, 7]"
        raise ValueError(f"levels are {list(levels)}: expected {expected}")
