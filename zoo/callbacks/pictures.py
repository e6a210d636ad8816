"""Pictures of what a module sees and does, in the run's directory and in TensorBoard."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from zoo._lightning import Callback, isolate_rng, rank_zero_warn
from zoo.callbacks.run_directory import run_directory
from zoo.callbacks.spread import first_loader, spread_batch
from zoo.common.protocols import DrawsPictures
from zoo.sharding import is_split


class SavePictures(Callback):
    """Saves what ``module.pictures(batch)`` draws of a few samples of validation, testing and prediction, as PNG.

    They are evenly spread over the first loader's data, which may be sorted by class, and the same every time; of data
    that is a stream, or whose batches only its own sampler can make, they are the first batch's. They are loaded once,
    no more of them than the loader's batch has, and stay in memory.

    ``pictures`` returns tensors (B, 3, H, W) in [0, 1] by name. A module without it is left alone. The files are
    ``images/epoch019_predictions.png``, ``images/test_predictions.png`` and ``images/predict_predictions.png`` in the
    run's directory; TensorBoard, if it is a logger, gets the same. Drawing takes place on one process, unless weights
    are split between several; it changes no random state and compiles nothing.

    Args:
        every_n_epochs: Epochs between pictures, of those that validate.
        max_images: How many images are shown, at most.
    """

    writes = "pictures"

    def __init__(self, every_n_epochs: int = 1, max_images: int = 16) -> None:
        if every_n_epochs < 1 or max_images < 1:
            raise ValueError(
                f"every_n_epochs is {every_n_epochs}, max_images {max_images}: expected at least 1 of both"
            )
        self.every_n_epochs, self.max_images = every_n_epochs, max_images
        self.folder: Path | None = None
        self.last_path: Path | None = None
        self._samples: dict[str, tuple[Any, Any]] = {}  # by stage: a loader's data, and the batch of it to be drawn

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._samples.clear()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.folder = run_directory(trainer) / "images"  # all ranks have to ask

    on_test_start = on_predict_start = on_validation_start

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        epoch = trainer.current_epoch
        if batch_idx or dataloader_idx or trainer.sanity_checking or (epoch + 1) % self.every_n_epochs:
            return
        self._draw(trainer, pl_module, batch, f"epoch{epoch:03d}", trainer.val_dataloaders)

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not batch_idx and not dataloader_idx:
            self._draw(trainer, pl_module, batch, "test", trainer.test_dataloaders)

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not batch_idx and not dataloader_idx:
            self._draw(trainer, pl_module, batch, "predict", trainer.predict_dataloaders)

    @torch.no_grad()
    def _draw(self, trainer: Any, pl_module: Any, batch: Any, moment: str, loaders: Any) -> None:
        if trainer.fast_dev_run or not isinstance(pl_module, DrawsPictures):
            return
        if not trainer.is_global_zero and not is_split(trainer):
            return
        assert self.folder is not None
        with isolate_rng(), torch.compiler.set_stance("force_eager"):
            spread = self._spread(trainer, pl_module, moment.rstrip("0123456789"), first_loader(loaders))
            some = _first(batch if spread is None else spread, self.max_images)
            with trainer.precision_plugin.forward_context():
                drawn: dict[str, Tensor] = pl_module.pictures(some)
        if not trainer.is_global_zero:
            return
        for name, images in reversed(drawn.items()):  # the first is written last: it is the one to be looked at
            grid = make_grid(images.float().cpu(), nrow=math.ceil(math.sqrt(len(images))), pad_value=0.5)
            self.folder.mkdir(parents=True, exist_ok=True)
            self.last_path = self.folder / f"{moment}_{name}.png"
            save_image(grid, self.last_path)
            for logger in trainer.loggers:
                if hasattr(logger.experiment, "add_image"):
                    logger.experiment.add_image(f"{moment.rstrip('0123456789')}/{name}", grid, trainer.global_step)

    def _spread(self, trainer: Any, module: Any, stage: str, loader: Any) -> Any | None:
        """A batch from all over the data, as steps get it; None where there is none."""
        data, batch = self._samples.get(stage, (None, None))
        if data is None or data is not getattr(loader, "dataset", None):
            try:
                batch = spread_batch(loader, self.max_images)
            except Exception as error:  # whatever somebody's data raises: evaluation may never come to that sample
                rank_zero_warn(f"pictures show the first batch, since one of all over the data cannot be made: {error}")
            self._samples[stage] = getattr(loader, "dataset", None), batch
        if batch is None:
            return None
        # As Lightning itself does with the batch of an evaluation; a hook may write into what it is given.
        batch = trainer.precision_plugin.convert_input(copy.deepcopy(batch))
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _first(batch: Any, count: int) -> Any:
    """The first samples of a batch of any usual form."""
    if isinstance(batch, Mapping):
        return {key: _first(value, count) for key, value in batch.items()}
    if isinstance(batch, tuple | list) and _is_by_sample(batch):
        return batch[:count]
    if isinstance(batch, tuple | list):
        parts = [_first(part, count) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)  # a named tuple takes each
    return batch[:count] if isinstance(batch, Tensor) and batch.ndim else batch


def _is_by_sample(batch: tuple[Any, ...] | list[Any]) -> bool:
    """Tells whether a list has an entry for each sample, not one for all images and one for all labels or targets."""
    if any(isinstance(part, tuple | list) and part and isinstance(part[0], Tensor) for part in batch):
        return False  # images of unequal size, and their targets
    return all(not isinstance(part, Tensor) or part.ndim in (0, 3) for part in batch)
