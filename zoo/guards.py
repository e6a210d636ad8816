"""Guards that keep a run whole, added to a Trainer in one line: ``trainer = guard(Trainer(...))``.

Each part can be had alone: the callbacks of ``zoo.callbacks``, and ``zoo.checkpoints.AtomicCheckpointIO`` as a plugin.
The ``zoo`` command adds them all, unless ``--guards false``.
"""

from datetime import timedelta
from typing import Any

from torch.distributed import is_torchelastic_launched
from torch.distributed.constants import default_pg_timeout

from zoo._lightning import Checkpoint
from zoo.callbacks import (
    ExactResume,
    FailTogether,
    KeepPreprocessing,
    NonFiniteGuard,
    OptimizerSettings,
    PreemptionGuard,
    Provenance,
    ResumePoint,
)
from zoo.checkpoints import AtomicCheckpointIO, TorchCheckpointIO

COLLECTIVE_TIMEOUT = timedelta(minutes=10)


def guard(trainer: Any, config: str | None = None, weights_only: bool | None = None) -> Any:
    """Adds to a Trainer what keeps its runs whole, and returns it. What it has already stays as it is.

    - :class:`zoo.callbacks.NonFiniteGuard`: stops at a loss that is NaN or infinite, with the batch on disk.
    - :class:`zoo.callbacks.Provenance`: configuration, versions and revision in every checkpoint.
    - :class:`zoo.callbacks.KeepPreprocessing`: class and preprocessing in every checkpoint, for a prediction from it.
    - :class:`zoo.callbacks.FailTogether`: one process fails, the others end. Not under torchrun, whose agent ends them,
      unless a callback saves when there is an exception: there, the one that failed would wait for the others.
    - :class:`zoo.callbacks.ExactResume`: a continued run equals the uninterrupted one.
    - :class:`zoo.callbacks.PreemptionGuard`: SIGTERM, SIGUSR1, SIGHUP and Ctrl-C end a run saved.
    - :class:`zoo.callbacks.OptimizerSettings`: settings that were changed win over a checkpoint's, the others stay.
    - :class:`zoo.callbacks.ResumePoint`: the newest whole state is kept apart from the best, which is remembered.
    - :class:`zoo.checkpoints.AtomicCheckpointIO`: a checkpoint is whole or not there. Another process's folder is
      refused.
    - A collective operation fails after ten minutes rather than thirty, where the strategy has a timeout and nobody has
      set it. (Another: ``Trainer(strategy=DDPStrategy(timeout=...))``.)

    Args:
        trainer: Lightning's Trainer, before its first run.
        config: The configuration that the checkpoints are to hold, as text.
        weights_only: Whether to refuse to save what reading without running code would refuse, see
            :class:`zoo.checkpoints.AtomicCheckpointIO`. None: to warn.
    """
    saves = any(getattr(saver, "save_on_exception", False) for saver in trainer.checkpoint_callbacks)
    guards = (
        NonFiniteGuard(),
        Provenance(config),
        *((FailTogether(),) if saves or not is_torchelastic_launched() else ()),
        ExactResume(),
        PreemptionGuard(),
        ResumePoint(),
    )
    missing = [one for one in guards if not any(isinstance(there, type(one)) for there in trainer.callbacks)]
    savers = [i for i, callback in enumerate(trainer.callbacks) if isinstance(callback, Checkpoint)]
    place = min(savers, default=len(trainer.callbacks))  # what they save is to be as the others have left it
    trainer.callbacks[place:place] = [one for one in missing if not isinstance(one, Checkpoint)]
    if savers:  # else nobody wants checkpoints
        trainer.callbacks += [one for one in missing if isinstance(one, Checkpoint)]
    keep_optimizer_settings(trainer)
    keep_preprocessing(trainer)
    trainer.callbacks.sort(key=lambda callback: isinstance(callback, ResumePoint))  # it looks at what others have saved
    strategy = trainer.strategy
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO(exclusive=True, weights_only=weights_only)
    if getattr(strategy, "_timeout", None) == default_pg_timeout:
        strategy._timeout = COLLECTIVE_TIMEOUT
    return trainer


def keep_optimizer_settings(trainer: Any) -> None:
    """Adds :class:`zoo.callbacks.OptimizerSettings`, if it is not there."""
    if not any(isinstance(there, OptimizerSettings) for there in trainer.callbacks):
        trainer.callbacks.insert(0, OptimizerSettings())  # before what replaces schedulers or adds groups at the start


def keep_preprocessing(trainer: Any) -> None:
    """Adds :class:`zoo.callbacks.KeepPreprocessing`, if it is not there."""
    if not any(isinstance(there, KeepPreprocessing) for there in trainer.callbacks):
        trainer.callbacks.insert(0, KeepPreprocessing())
