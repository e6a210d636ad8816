"""Faults of benchmarks/faults.py that show when a run is continued: on a plateau, elsewhere, longer, otherwise."""

import datetime
import shutil
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from runs import Net, Settings, data_of, fit, run, trainer_of

from zoo.checkpoints import newest

SCORES = (0.2, 0.9, 0.5, 0.4, 0.3, 0.1)
"""By epoch: the best is epoch 1, and then there is a plateau."""


class Score(pl.Callback):
    """Logs a score that follows a script, and ends the process in the first step of an epoch, if there is one."""

    def __init__(self, dies_in: int | None = None) -> None:
        self.dies_in = dies_in

    def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
        module.log("score", SCORES[trainer.current_epoch])

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == self.dies_in:
            raise RuntimeError("killed")


def best(folder: str, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "epoch{epoch}", "score", mode="max", auto_insert_metric_name=False, **options)


def found(settings: Settings, folder: str) -> Path | str:
    """The checkpoint to go on from: the newest whole one, as ``--ckpt_path last``, and Lightning's last."""
    return (newest(folder) if settings.guards else None) or Path(folder, "last.ckpt")


def plateau(settings: Settings) -> str:
    def first() -> None:
        fit(settings, Score(4), best("checkpoints", save_last="link"), max_epochs=6)

    run(first)
    epoch = torch.load(found(settings, "checkpoints"), weights_only=True)["epoch"]
    return f"goes on with epoch {epoch + 1} of 4 that were done"


def _continued(settings: Settings, folder: str, then: str, moved: bool, epochs: int) -> str:
    def both() -> str:
        fit(settings, Score(), best(folder, save_last="link"), max_epochs=4)
        place = folder
        if moved:
            place = "elsewhere"
            shutil.move(folder, place)
        trainer = fit(
            settings, Score(), best(then, save_last="link"), max_epochs=epochs, ckpt_path=found(settings, place)
        )
        path = trainer.checkpoint_callback.best_model_path
        if not Path(path).exists():
            return f"the best is {Path(path).name}, which is not where it says"
        epoch = torch.load(path, weights_only=True)["epoch"]
        return f"the best is epoch {epoch}"

    (ended,) = run(both)
    return ended.result or f"status {ended.status}, {ended.error}"


def new_folder(settings: Settings) -> str:
    return _continued(settings, "before", "after", moved=False, epochs=6)


def moved(settings: Settings) -> str:
    return _continued(settings, "before", "after", moved=True, epochs=4)


class Divided(pl.Callback):
    """Divides the learning rate by hand after epoch 0."""

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["lr"] *= 0.1 if trainer.current_epoch == 0 else 1


class Other(Net):
    """With another learning rate, and, as people split it off, biases that do not decay."""

    def __init__(self, lr: float = 1e-2, split: bool = False) -> None:
        super().__init__()
        self.lr, self.split = lr, split

    def configure_optimizers(self) -> Any:
        weights = [p for p in self.parameters() if p.ndim > 1]
        biases = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": weights}, {"params": biases, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups if self.split else self.parameters(), lr=self.lr)


def settings_of_optimizer(settings: Settings, **changed: Any) -> str:
    def both() -> str:
        made = []
        for module, path, epochs in ((Other(), None, 2), (Other(**changed), "checkpoints/epoch=1.ckpt", 3)):
            pl.seed_everything(1, verbose=False)
            saver = ModelCheckpoint("checkpoints", "{epoch}", save_top_k=-1)
            trainer = trainer_of(settings, Divided(), saver, max_epochs=epochs)
            trainer.fit(module, ckpt_path=path, **data_of(settings))
            made.append(trainer.optimizers[0].param_groups)
        return ", ".join(f"{group['lr']:.2g} (decay {group['weight_decay']:.2g})" for group in made[-1])

    (ended,) = run(both)
    return f"learning rate {ended.result}" if ended.result else f"status {ended.status}, {ended.error}"


class Dated(pl.Callback):
    """Keeps a date in its state."""

    def state_dict(self) -> dict[str, Any]:
        return {"when": datetime.datetime(2024, 1, 1)}


def state(settings: Settings) -> str:
    def told() -> str:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(settings, Dated(), ModelCheckpoint("checkpoints", save_last=True), max_epochs=3)
        said = [str(one.message).splitlines()[0] for one in caught if "Dated" in str(one.message)]
        first = f"at the first save: {said[0][:90]}... " if said else "nothing is said; "
        try:
            fit(settings, Dated(), ckpt_path=found(settings, "checkpoints"), max_epochs=4)
        except Exception as error:
            return f"{first}continued: {type(error).__name__}"
        return f"{first}continued"

    (ended,) = run(told)
    return ended.result or f"status {ended.status}, {ended.error}"
