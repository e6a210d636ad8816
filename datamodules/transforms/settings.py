"""Settings of preprocessing as plain data, which come out of checkpoints and JSON: which values are possible."""

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, get_args

from datamodules.reading.decoders import Decoder
from datamodules.transforms.batches import Binarization
from datamodules.transforms.samples import INTERPOLATIONS


def check(kind: str, name: str, value: Any, constant: Any = None) -> None:
    """Raises ValueError for a value that a setting cannot have.

    Args:
        kind: The kind of preprocessing, "crop" say.
        name: The setting.
        value: Its value.
        constant: The only value that it has in this kind, if that is so.
    """
    if constant is not None:
        accepted, expected = (list(value) if isinstance(value, tuple) else value) == constant, constant
    else:
        accepts, expected = ACCEPTED.get(f"{kind}: {name}") or ACCEPTED[name]
        accepted = accepts(value)
    if not accepted:
        raise ValueError(f"{name} is {value!r}, expected {expected}")


def plain(value: Any) -> Any:
    """A setting as checkpoints and JSON keep it: Python's own numbers, and lists."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return [plain(part) for part in value]
    return int(value) if isinstance(value, Integral) else float(value)


def _is_side(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_size(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_side, value))


def _are_numbers(value: Any, above: float = -math.inf) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(type(one) in (int, float) and above < one < math.inf for one in value)
    )


_BY_TORCH = tuple(name for name in INTERPOLATIONS if name != "lanczos")
ACCEPTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "channels": (lambda value: _is_side(value) and value in (1, 3), "1 (grey) or 3 (RGB)"),
    "image_size": (lambda value: _is_side(value) or _is_size(value), "a side in pixels, or height and width"),
    "fit: image_size": (lambda value: value is None or _is_side(value), "a short side in pixels, or null"),
    "max_size": (lambda value: value is None or _is_side(value), "a long side in pixels, or null"),
    "patch_size": (_is_side, "a side in pixels"),
    "tokens": (
        lambda value: value is None or (_is_size(value) and value[0] <= value[1]),
        "the fewest and the most, or null",
    ),
    "pad_multiple": (_is_side, "at least 1"),
    "size_buckets": (
        lambda value: value is None or (isinstance(value, list | tuple) and all(map(_is_size, value))),
        "a list of heights and widths, or null",
    ),
    "crop_ratio": (lambda value: type(value) in (int, float) and 0 < value <= 1, "a number in (0, 1]"),
    "interpolation": (lambda value: value in INTERPOLATIONS, " or ".join(INTERPOLATIONS)),
    "resize: interpolation": (lambda value: value in _BY_TORCH, " or ".join(_BY_TORCH)),
    "mean": (_are_numbers, "a list of numbers"),
    "std": (lambda value: _are_numbers(value, above=0), "a list of positive numbers"),
    "binarize": (
        lambda value: value is None or value in get_args(Binarization),
        f"{', '.join(get_args(Binarization))}, or null",
    ),
    "seed": (lambda value: type(value) is int and -(2**63) <= value < 2**63, "a whole number of 64 bits"),
    "decoder": (lambda value: value in get_args(Decoder), " or ".join(get_args(Decoder))),
}
"""By setting, of one kind or of all that have it: what is taken for it, and how that is called."""
