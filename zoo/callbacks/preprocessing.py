"""Class and preprocessing of a module in its checkpoints, so that it can be had from them alone."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch.distributed.fsdp import FSDPModule

import zoo
from zoo._lightning import Callback
from zoo.common.protocols import StatesPreprocessing


class KeepPreprocessing(Callback):
    """Puts the module's class and what evaluation does to an image into every checkpoint, "module" and "preprocessing".

    The class is by its name in ``zoo``, or for another one by its dotted path. The preprocessing is what the Trainer's
    data module states (:class:`zoo.common.protocols.StatesPreprocessing`) when the checkpoint is saved; of data that
    states none, there is none. Both are plain data, which loads with ``weights_only=True``.
    """

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["module"] = class_path(pl_module)
        stated = preprocessing_of(trainer.datamodule)
        if stated is not None:
            checkpoint["preprocessing"] = stated


def class_path(module: Any) -> str:
    """Name of a module's class: as ``zoo`` exports it, else its dotted path."""
    kind = type(module)
    if isinstance(module, FSDPModule):  # which torch has put in front of the module's own class
        kind = next(base for base in kind.__bases__ if base is not FSDPModule)
    name = kind.__qualname__
    ours = name in zoo._EXPORTS and getattr(zoo, name) is kind
    return name if ours else f"{kind.__module__}.{name}"


def preprocessing_of(data: Any) -> dict[str, Any] | None:
    """Preprocessing that a data module states; None where it states none, or calls something else by that name."""
    if not isinstance(data, StatesPreprocessing) or not inspect.ismethod(data.preprocessing):
        return None
    if inspect.signature(data.preprocessing).parameters:
        return None
    stated = data.preprocessing()
    return dict(stated) if isinstance(stated, Mapping) else None
