"""A directory of its own for each run, whatever its loggers do."""

from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo._lightning import NAMESPACE, Callback, rank_zero_only

if TYPE_CHECKING or NAMESPACE == "lightning":
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
else:
    from pytorch_lightning.callbacks import ModelCheckpoint
    from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger


class RunDirectory(Callback):
    """Gives a run a directory that no other run has: for its configuration, checkpoints, pictures, metrics and exports.

    TensorBoardLogger and CSVLogger make one for each run, and the first of them in the Trainer's list says which. Other
    loggers have none (MLflow with a database) or one for all runs (W&B), and so has a Trainer without a logger: then it
    is the first ``default_root_dir/NAME/version_N`` that is not there yet. A ModelCheckpoint without a ``dirpath``
    saves to ``checkpoints`` in it.

    It is the first of the callbacks. :func:`run_directory` asks it.

    Args:
        name: NAME above.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.path: Path | None = None
        self._moves_savers = False

    def choose(self, trainer: Any) -> Path | None:
        """Settles where the run goes, before the Trainer starts other processes, which are to write to the same place.

        Returns:
            The directory; None on other processes than the first, which are told once they know each other.

        Raises:
            FileExistsError: If a logger was given a version that is there already.
        """
        if getattr(rank_zero_only, "rank", 0) != 0:
            return None
        directories = [_of_logger(logger) for logger in trainer.loggers]
        given = next(filter(None, directories), None)
        self._moves_savers = given is None or directories[0] is None
        if given is None:
            root = trainer.default_root_dir if "://" not in str(trainer.default_root_dir) else "runs"
            self.path = _new(Path(root, self.name, f"version_{number}") for number in count())
            return self.path
        self.path = given
        if given.is_dir() and any(given.iterdir()):
            raise FileExistsError(
                f"the run {given} is there already: leave the logger's version out, for the next free one, or name "
                "another"
            )
        return given

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.path is None:  # else settled for all processes of this run
            self.choose(trainer)
        path, self._moves_savers = trainer.strategy.broadcast((str(self.path), self._moves_savers))
        self.path = Path(path)
        if self._moves_savers:  # else ModelCheckpoint comes to the same
            for saver in trainer.checkpoint_callbacks:
                if isinstance(saver, ModelCheckpoint) and saver.dirpath is None:
                    saver.dirpath = str(self.path / "checkpoints")


def run_directory(trainer: Any) -> Path:
    """The directory of a run, for what is written beside its checkpoints. All processes have to ask.

    It is :class:`RunDirectory`'s, where the Trainer has one, as all runs of the ``zoo`` command have; else the
    Trainer's ``log_dir``, or ``default_root_dir``.
    """
    for callback in trainer.callbacks:
        if isinstance(callback, RunDirectory) and callback.path is not None:
            return callback.path
    return Path(trainer.log_dir or trainer.default_root_dir)


def _of_logger(logger: Any) -> Path | None:
    """The directory that a logger has for this run alone, if it is on this machine."""
    if not isinstance(logger, TensorBoardLogger | CSVLogger) or "://" in str(logger.save_dir):
        return None
    return Path(logger.log_dir)


def _new(paths: Iterable[Path]) -> Path:
    """Makes the first of these directories that is not there yet."""
    for path in paths:
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise AssertionError("there is no end of numbers")
