"""The trained backbone in a file that other programs read."""

from pathlib import Path
from typing import Any

from zoo import weights
from zoo._lightning import Callback
from zoo.callbacks.run_directory import run_directory
from zoo.common.backbones import backbone_of
from zoo.sharding import is_split, whole_state


class ExportBackbone(Callback):
    """Writes ``module.backbone`` at the end of a fit: ``encoder.safetensors`` in the run's directory.

    Names are those of the backbone itself, in our modules timm's: ``--model.weights``, :func:`zoo.weights.load` and
    timm read it. The file appears complete or not at all.

    Args:
        filename: Name of the file, ending in ``.safetensors``.

    Raises:
        ValueError: For another ending, or for a module without a backbone.
    """

    writes = "encoder"

    def __init__(self, filename: str = "encoder.safetensors") -> None:
        if not filename.endswith(".safetensors"):
            raise ValueError(f"filename is {filename!r}: expected one that ends in .safetensors")
        self.filename = filename
        self.last_path: Path | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if backbone_of(pl_module) is None:  # now, and not after days of training
            raise ValueError(f"{type(pl_module).__name__} has no backbone to write: leave ExportBackbone out")

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        folder = run_directory(trainer)  # all ranks have to ask
        if trainer.fast_dev_run:
            return
        state = whole_state(pl_module.backbone) if is_split(trainer) else None  # all ranks have to ask
        if trainer.is_global_zero:
            self.last_path = folder / self.filename
            weights.save(pl_module.backbone, self.last_path, state)
