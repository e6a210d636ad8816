"""Class and preprocessing of a module in its checkpoints, so that it can be had from them alone."""

from collections.abc import Callable
from typing import Any

from torch.distributed.fsdp import FSDPModule

import zoo
from zoo._lightning import Callback
from zoo.common.preprocessing import preprocessing_of


class KeepPreprocessing(Callback):
    """Puts the module's class, and what evaluation does to an image, into every checkpoint: "module", "preprocessing".

    The class is called as ``zoo`` exports it, another one by its dotted path. The preprocessing is what the Trainer's
    data module states when the checkpoint is saved (:class:`zoo.common.protocols.StatesPreprocessing`); where the data
    states none, there is none. Both are plain data, which loads with ``weights_only=True``, and are in checkpoints of
    weights alone as well.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        # Callbacks are not asked when only weights are saved.
        if not isinstance(trainer.strategy.save_checkpoint, _Saving):
            trainer.strategy.save_checkpoint = _Saving(trainer, trainer.strategy.save_checkpoint)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["module"] = class_path(pl_module)
        if (stated := preprocessing_of(trainer.datamodule)) is not None:
            checkpoint["preprocessing"] = stated


class _Saving:
    """A strategy's ``save_checkpoint`` that puts both into checkpoints without callbacks, too."""

    def __init__(self, trainer: Any, given: Callable[..., None]) -> None:
        self.trainer, self.given = trainer, given

    def __call__(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if "callbacks" not in checkpoint:
            KeepPreprocessing().on_save_checkpoint(self.trainer, self.trainer.lightning_module, checkpoint)
        self.given(checkpoint, *args, **kwargs)


def class_path(module: Any) -> str:
    """Name of a module's class: as ``zoo`` exports it, else its dotted path."""
    kind = type(module)
    if isinstance(module, FSDPModule):  # torch has put a class before the module's own
        kind = next(base for base in kind.__bases__ if base is not FSDPModule)
    name = kind.__qualname__
    return name if name in zoo._EXPORTS and getattr(zoo, name) is kind else f"{kind.__module__}.{name}"
