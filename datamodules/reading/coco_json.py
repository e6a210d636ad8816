"""COCO's JSON files: parsed and checked, whatever their annotations hold."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.reading import listing
from datamodules.reading.json_values import whole


def parsed(path: Path, expected: str, hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Reads a JSON file; ``hook`` gets each object, and what it returns is kept instead.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is a folder, empty, truncated or no JSON. ``expected`` says what would work.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            return json.load(file, object_hook=hook)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; {expected}") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder: {expected}") from None
    except (ValueError, RecursionError) as error:  # also of numbers of thousands of digits
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty: {expected}") from None
        raise ValueError(f"{path} is truncated, or no JSON at all ({error}): {expected}") from None


def check_form(path: Path, content: Any, needed: Sequence[str], expected: str) -> None:
    """Raises ValueError unless the content has the ``needed`` parts, and each of COCO's parts is a list of objects."""
    if isinstance(content, list):
        scored = content and isinstance(content[0], dict) and "score" in content[0]
        kind = f"a results file, a list of {len(content)} detections" if scored else f"a list of {len(content)}"
        raise ValueError(f"{path} is {kind}: {expected}")
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}: {expected}")
    if missing := [key for key in needed if key not in content]:
        raise ValueError(f"{path} has no {' and no '.join(missing)}, but {some(content) or 'nothing'}: {expected}")
    for key in ("images", "annotations", "categories"):
        part = content.get(key, [])
        if not isinstance(part, list) or not all(isinstance(entry, dict) for entry in part):
            raise ValueError(f"{path}: {key} is no list of objects: {expected}")


def name_of(annotation: dict[str, Any], place: int) -> Any:
    """Name of an annotation for a message: its id, or its position."""
    found = annotation.get("id")
    return f"number {place}" if found is None else found if type(found) is int else str(found)


def integers(path: Path, kind: str, entries: list[dict[str, Any]], key: str) -> np.ndarray:
    """The integers (N,) int64 that entries have under a key."""
    return np.array([entry(path, kind, each, key, int, n) for n, each in enumerate(entries)], dtype=np.int64)


def entry(path: Path, kind: str, found: dict[str, Any], key: str, expected: type, place: int) -> Any:
    """The integer or text that an entry has under a key; ValueError for all else names it by id or ``place``."""
    value = whole(found.get(key)) if expected is int else found.get(key)
    if not isinstance(value, expected):
        who = f"{kind} {found['id']}" if "id" in found and key != "id" else f"{kind} number {place}"
        what = "an integer of at most 64 bits" if expected is int else "a text"
        has = f"has the {key} {found[key]!r:.40}" if key in found else f"has no {key}"
        raise ValueError(f"{path}: {who} {has}: expected {what}")
    return value


def check_unique(path: Path, kind: str, key: str, values: list[Any]) -> None:
    """Raises ValueError for values that come more than once."""
    if len(set(values)) < len(values):
        twice = [value for value, count in Counter(values).items() if count > 1]
        raise ValueError(f"{path}: {len(twice)} {key}s of {kind} come more than once: {some(twice)}")


def some(values: Iterable[Any]) -> str:
    """The first few of many values, for a message."""
    return listing.some([f"{value!s:.60}" for value in values])
