"""Numbers in JSON files that other programs wrote: as text, as whole floats, in a list of one, or as nothing at all."""

import math
import unicodedata
from typing import Any

LARGEST = 2**63


def whole(value: Any) -> int | None:
    """An integer of 64 bits, also as text ("7") or as a float (7.0); None for all else."""
    if type(value) is str:
        try:
            value = int(value)
        except ValueError:
            value = number(value)
    if type(value) is float:
        value = int(value) if value.is_integer() else None
    return value if type(value) is int and -LARGEST <= value < LARGEST else None


def number(value: Any) -> float:
    """A float, also from text or from a list of one; NaN where there is none. What no float holds is infinite."""
    if type(value) is list and len(value) == 1:
        return number(value[0])
    if type(value) not in (int, float, str):
        return math.nan
    try:
        return float(value)
    except ValueError:
        return math.nan
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def flag(value: Any) -> bool | None:
    """0 or 1, also as text, as a truth value, or missing, which is 0; None for all else."""
    if value is None or type(value) is bool:
        return bool(value)
    if type(value) is str and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    return {0.0: False, 1.0: True}.get(number(value))


def outline(segmentation: Any) -> list[float] | None:
    """x, y, width and height of what polygons [[x, y, x, y, ...], ...] enclose; None for run lengths and all else."""
    if not isinstance(segmentation, list) or not all(isinstance(polygon, list) for polygon in segmentation):
        return None
    values = [[number(value) for value in polygon] for polygon in segmentation if len(polygon) >= 6]
    x = [value for polygon in values for value in polygon[0::2]]
    y = [value for polygon in values for value in polygon[1::2]]
    if not x or not all(map(math.isfinite, x + y)):
        return None
    return [min(x), min(y), max(x) - min(x), max(y) - min(y)]


def one_form(text: str) -> str:
    """A name in the form that equal names share: Unicode writes é as one character or as two (NFC, NFD)."""
    return unicodedata.normalize("NFC", text)
