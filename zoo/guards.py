"""What keeps a run whole, added to a Trainer in one line: ``trainer = guard(Trainer(...))``.

Each part can be had alone: the callbacks of ``zoo.callbacks``, and ``zoo.checkpoints.AtomicCheckpointIO`` as a plugin.
The ``zoo`` command adds them all, unless ``--guards false``.
"""

from datetime import timedelta
from typing import Any

from torch.distributed.constants import default_pg_timeout

from zoo._lightning import Checkpoint
from zoo.callbacks import ExactResume, FailTogether, NonFiniteGuard, PreemptionGuard, Provenance
from zoo.checkpoints import AtomicCheckpointIO, TorchCheckpointIO

COLLECTIVE_TIMEOUT = timedelta(minutes=10)


def guard(trainer: Any, config: str | None = None) -> Any:
    """Adds to a Trainer what keeps its runs whole, and returns it. What it has already stays as it is.

    - :class:`zoo.callbacks.NonFiniteGuard`: stops at a loss that is NaN or infinite, with the batch on disk.
    - :class:`zoo.callbacks.Provenance`: configuration, versions and revision in every checkpoint.
    - :class:`zoo.callbacks.FailTogether`: one process fails, the others end.
    - :class:`zoo.callbacks.ExactResume`: a continued run equals the uninterrupted one.
    - :class:`zoo.callbacks.PreemptionGuard`: SIGTERM and SIGUSR1 end a run saved, with status 143.
    - :class:`zoo.checkpoints.AtomicCheckpointIO`: a checkpoint is whole or not there. Another process's folder is
      refused.
    - A collective operation fails after ten minutes rather than thirty, where the strategy has a timeout and nobody has
      set it. (Another: ``Trainer(strategy=DDPStrategy(timeout=...))``.)

    Args:
        trainer: Lightning's Trainer, before its first run.
        config: The configuration that the checkpoints are to hold, as text.
    """
    guards = (NonFiniteGuard(), Provenance(config), FailTogether(), ExactResume(), PreemptionGuard())
    missing = [one for one in guards if not any(isinstance(there, type(one)) for there in trainer.callbacks)]
    savers = (i for i, callback in enumerate(trainer.callbacks) if isinstance(callback, Checkpoint))
    place = next(savers, len(trainer.callbacks))  # what they save is to be as the others have left it
    trainer.callbacks[place:place] = missing
    strategy = trainer.strategy
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO(exclusive=True)
    if getattr(strategy, "_timeout", None) == default_pg_timeout:
        strategy._timeout = COLLECTIVE_TIMEOUT
    return trainer
