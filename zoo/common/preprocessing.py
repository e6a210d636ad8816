"""Preprocessing that data modules state, as plain data: ``datamodules.preprocessing`` makes the function of it."""

import inspect
from collections.abc import Mapping
from typing import Any

from zoo.common.protocols import StatesPreprocessing


def preprocessing_of(data: Any) -> dict[str, Any] | None:
    """Preprocessing that a data module states; None where it states none, or calls something else by that name."""
    method = data.preprocessing if isinstance(data, StatesPreprocessing) else None
    if not inspect.ismethod(method) or inspect.signature(method).parameters:
        return None
    stated = method()
    return dict(stated) if isinstance(stated, Mapping) and "kind" in stated else None
