"""The newest whole state of a run, to be continued from, apart from the best ones."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zoo._lightning import NAMESPACE, Checkpoint
from zoo.callbacks.remember_best import remember_best
from zoo.callbacks.run_directory import run_directory
from zoo.checkpoints import AtomicCheckpointIO, free_path, give_name, saved_at

if TYPE_CHECKING or NAMESPACE == "lightning":
    from lightning.pytorch.callbacks import ModelCheckpoint
else:
    from pytorch_lightning.callbacks import ModelCheckpoint

NAME = "last"
SHARE = 0.02  # of a run's time, at most, goes into saving by the clock


class ResumePoint(Checkpoint):
    """Keeps ``last.ckpt``, the state of a fit to go on from, beside what ModelCheckpoint saves.

    A ModelCheckpoint that monitors a metric saves nothing while that gets no better, and its ``save_last`` links to
    what it has saved: a run that is killed on a plateau would go on from long ago. This one is written after each
    validation, at the end of a fit, and every few minutes in between. Where a ModelCheckpoint has just saved the same
    state, the file gets a second name instead, which costs nothing. Its ``save_last`` is switched off: ``last.ckpt`` is
    this callback's, in the folder of the first ModelCheckpoint.

    A run that is continued, in another folder or after a move, knows what was the best before it, and where that lies
    (:func:`zoo.callbacks.remember_best.remember_best`).

    A file of another run is not written over: in a ``dirpath`` that runs share the name may be ``last-v1.ckpt``.

    It is the last of the callbacks. Without a ModelCheckpoint (``enable_checkpointing=False``) it does nothing.

    Args:
        minutes: Between saves, or more where a save takes long: together they take at most a fiftieth of the time.
    """

    def __init__(self, minutes: float = 5.0) -> None:
        if not minutes > 0:
            raise ValueError(f"minutes is {minutes}: expected more than 0")
        self.minutes = minutes
        self.path: str | None = None
        """Where the checkpoint is, or will be; known once training has begun."""
        self._before: str | None = None
        self._step, self._look = -1, 0
        self._saved, self._took = 0.0, 0.0
        self._due = False
        self._savers: list[Any] = []
        self._of_others: list[tuple[str, int]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"path": self.path}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict["path"]

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit" and trainer.ckpt_path is not None:
            remember_best(trainer, checkpoint)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        self.path, self._before, self._due = None, None, False
        folder = _folder(trainer)
        self._savers = _savers(trainer)
        for saver in self._savers:
            if saver.save_last and str(saver.dirpath) == folder:
                saver.save_last = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        folder = _folder(trainer)
        if folder is None or trainer.fast_dev_run:
            return
        path = free_path(folder, NAME, lambda path: self._is_past(trainer, path)) if trainer.is_global_zero else None
        self.path = trainer.strategy.broadcast(path)
        self._of_others = [_last(saver) for saver in self._savers]
        self._step, self._saved, self._took = trainer.global_step, time.monotonic(), 0.0
        self._look = trainer.global_step + 1

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if self.path is None:
            return
        if self._others(trainer):
            self._keep(trainer)
        if step < self._look:
            return
        waited, took = time.monotonic() - self._saved, self._took
        if trainer.world_size > 1:  # all have to agree, and the first takes longest to save
            both = torch.tensor([waited, took], device=trainer.strategy.root_device)
            waited, took = trainer.strategy.reduce(both, reduce_op="max").tolist()
        interval = max(60 * self.minutes, took / SHARE)
        if trainer.world_size > 1:
            # They look again, together, when the time is up, as far as can be told from the steps since the last save;
            # at most after twice as many, since steps may become slower.
            done = step - self._step
            self._look = step + max(1, min(done, int((interval - waited) / max(waited, 1e-6) * done)))
        if waited >= interval:
            self._keep(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self.path is None or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._due = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if not self._due:  # else the end of the epoch follows, at which a ModelCheckpoint may save
            self._keep(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.path is None:
            return
        ends = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        ends = ends or trainer.global_step == trainer.max_steps
        if self._due or (ends and self._step != trainer.global_step) or self._others(trainer):
            self._keep(trainer)
        self._due = False

    def _keep(self, trainer: Any) -> None:
        """Saves the state as it is now, or gives what a ModelCheckpoint has just saved a second name."""
        assert self.path is not None
        start, saved = time.monotonic(), self._others(trainer)
        self._of_others = [_last(saver) for saver in self._savers]
        if saved is None or not self._shared(trainer, saved):
            _save(trainer, self.path)
            self._took = time.monotonic() - start
        self._step, self._saved = trainer.global_step, time.monotonic()
        self._look = self._step + 1

    def _others(self, trainer: Any) -> str | None:
        """The whole checkpoint that a ModelCheckpoint has saved since the last look, after this very step."""
        found = None
        for saver, before in zip(self._savers, self._of_others, strict=True):
            path, step = last = _last(saver)
            if last != before and step == trainer.global_step and not saver.save_weights_only:
                found = path  # of several, that of the last: it holds the state of those before
        return found

    def _shared(self, trainer: Any, saved: str) -> bool:
        """Gives the file a second name if that can be done, and nobody writes into a file that is there."""
        done = False
        if trainer.is_global_zero and isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO):
            done = "://" not in saved and give_name(Path(saved), Path(str(self.path)))
        return bool(trainer.strategy.broadcast(done))

    def _is_past(self, trainer: Any, path: Path) -> bool:
        """Tells whether a checkpoint is of the run that this one continues, and no later than where it goes on from."""
        if trainer.ckpt_path is None or not Path(trainer.ckpt_path).exists():
            return False
        own = path.samefile(trainer.ckpt_path) or (self._before is not None and path.name == Path(self._before).name)
        return own and saved_at(path) <= saved_at(trainer.ckpt_path)


def _savers(trainer: Any) -> list[Any]:
    return [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]


def _folder(trainer: Any) -> str | None:
    """The first ModelCheckpoint's folder, or, if another callback saves, ``checkpoints`` in the run's directory."""
    savers = _savers(trainer)
    if savers:
        return str(savers[0].dirpath)
    others = [callback for callback in trainer.checkpoint_callbacks if not isinstance(callback, ResumePoint)]
    return str(run_directory(trainer) / "checkpoints") if others else None


def _last(saver: Any) -> tuple[str, int]:
    """The checkpoint that a ModelCheckpoint has saved last, and after which step."""
    return saver._last_checkpoint_saved, saver._last_global_step_saved


def _save(trainer: Any, path: str) -> None:
    """Saves a whole checkpoint in place of the one before, also where it is a folder, which cannot be replaced."""
    if "://" in path or not trainer.strategy.broadcast(Path(path).is_dir()):
        trainer.save_checkpoint(path, weights_only=False)
        return
    new = f"{path.removesuffix('.ckpt')}-new.ckpt"
    trainer.save_checkpoint(new, weights_only=False)
    if trainer.is_global_zero:
        trainer.strategy.remove_checkpoint(path)
        Path(new).rename(path)
    trainer.strategy.barrier("ResumePoint")
