"""Plain data: what a checkpoint may hold so that it is read without running code, ``torch.load(weights_only=True)``."""

import datetime
import enum
import io
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SCALARS = frozenset({bool, int, float, str, type(None)})
CONTAINERS = frozenset({dict, OrderedDict, list, tuple})
TENSORS = frozenset({Tensor, nn.Parameter})

# What to keep in place of an object.
INSTEAD: dict[type, str] = {
    np.floating: "float(...)",
    np.integer: "int(...)",
    np.generic: ".item()",
    np.ndarray: "torch.from_numpy(...) or .tolist()",
    datetime.date: ".isoformat()",  # of a datetime too
    datetime.time: ".isoformat()",
    datetime.timedelta: ".total_seconds()",
    PurePath: "str(...)",
    enum.Enum: "its .name or .value",
    nn.Module: "its state_dict()",
    dict: "dict(...)",
    frozenset: "set(...)",
}


def objects(checkpoint: dict[str, Any]) -> str | None:
    """The first Python object in a checkpoint that reading without running code would refuse, or None.

    Containers, tensors, numbers and strings are told by their type. What else there is, is written into memory and
    read back: torch knows more types, and some that a program has declared safe.

    Returns:
        Whose it is, of which type, and what to keep in its place: ``callback KeepsState: state['best'] is a
        numpy.float64, which cannot be read without running code: keep float(...)``.
    """
    for path, value in _leaves(checkpoint, ()):
        if not _reads_back(value):
            kind = type(value)
            instead = next((INSTEAD[known] for known in INSTEAD if isinstance(value, known)), None)
            name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
            return (
                f"{_place(path)} is a {name}, which cannot be read without running code: keep "
                f"{instead or 'plain data, such as numbers, strings, tensors and lists of them'}"
            )
    return None


def _leaves(checkpoint: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The parts that are neither containers nor known to be safe, with the keys that lead there."""
    stack, seen = [(path, checkpoint)], set()
    while stack:
        path, value = stack.pop()
        kind = type(value)
        if kind in SCALARS or id(value) in seen:
            continue
        if kind in TENSORS:
            if vars(value):  # attributes are saved with it
                stack.append((path, vars(value)))
        elif kind not in CONTAINERS:
            yield path, value
        else:
            seen.add(id(value))
            parts = value.items() if isinstance(value, dict) else enumerate(value)
            found = [((*path, key), part) for key, part in parts if type(part) not in SCALARS]
            if isinstance(value, dict):
                found += [((*path, key), key) for key in value if type(key) not in SCALARS]
            stack += reversed(found)


def _reads_back(value: Any) -> bool:
    """Tells whether torch writes a value, and reads it without running code."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # a class's own way to be pickled may raise anything
        return False
    return True


def _place(path: tuple[Any, ...]) -> str:
    """``callback EMA: state['updates']`` for a callback's state, ``hyper_parameters['size']`` for the rest."""
    if path[:1] == ("callbacks",) and len(path) > 1:
        head, keys = f"callback {path[1]}: state", path[2:]
    else:
        head, keys = str(path[0]), path[1:]
    return head + "".join(f"[{key!r}]" for key in keys)
