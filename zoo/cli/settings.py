"""Checks of settings that would end in a traceback, or in another run than the one that is asked for."""

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import NoneType
from typing import get_args, get_type_hints

from jsonargparse import Namespace

from zoo._lightning import Trainer
from zoo.cli.mistakes import Mistake, locate

# The Trainer divides by some of these, and goes on with a negative value of others.
LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "min_epochs": 0,
    "min_steps": 0,
    "num_sanity_val_steps": -1,
}
TRAINING = ("max_epochs", "max_steps", "limit_train_batches")
SEEDS = 2**32  # NumPy's generator takes no larger one


def check(config: Namespace, command: str, configs: list[str], overrides: list[str]) -> None:
    """Checks values that are wrong whatever model and data are.

    Args:
        config: The resolved configuration of the command.
        command: ``fit``, ``test`` and so on.
        configs, overrides: The files and options that it comes from.

    Raises:
        Mistake: For a seed out of range, an option of the Trainer that is null, too small, or leaves nothing to train.
    """
    if found := next(_wrong(config, command), None):
        option, wrong = found
        raise Mistake(f"{locate(option, configs, overrides)}{option} is {wrong}")


def _wrong(config: Namespace, command: str) -> Iterator[tuple[str, str]]:
    seed = config.seed_everything
    if type(seed) is int and not 0 <= seed < SEEDS:  # true and false are values as well
        yield "seed_everything", f"{seed}: expected a whole number from 0 to {SEEDS - 1}"
    types = get_type_hints(Trainer.__init__)
    for name, value in vars(config.trainer).items():
        option = f"trainer.{name}"
        if value is None and NoneType not in get_args(types.get(name)):
            yield option, "null: give it a value, or leave it out"
        if value is not None and name in LEAST and not value >= LEAST[name]:  # it may be no number
            yield option, f"{value}: expected at least {LEAST[name]}"
        if name == "val_check_interval" and value == 0:
            yield (
                option,
                "0: expected a share of the epoch or a number of batches; without validation: limit_val_batches 0",
            )
        if command == "fit" and name in TRAINING and value == 0:
            yield option, "0: there is nothing to train; zoo validate and zoo test measure weights as they are"


def check_places(config: Namespace) -> None:
    """Checks that folders and files can be made where a run writes.

    Args:
        config: The resolved configuration of the command.

    Raises:
        Mistake: If there is a file or a dangling link, or where nothing can be written.
    """
    for option, path in _places(config.trainer) if not config.trainer.fast_dev_run else ():
        if "://" not in str(path) and (obstacle := _obstacle(Path(os.path.expandvars(path)).expanduser())):
            raise Mistake(f"nothing can be written to {path}: {obstacle}; make room there, or set another {option}")


def _places(trainer: Namespace) -> Iterator[tuple[str, str]]:
    """Folders of loggers and checkpoints, by the option that says so."""
    loggers, callbacks = (
        [part for part in (found if isinstance(found, list) else [found]) if isinstance(part, Namespace)]
        for found in (trainer.logger, trainer.callbacks)
    )
    own = [logger for logger in loggers if logger.class_path.endswith(("TensorBoardLogger", "CSVLogger"))]
    if not own or "SLURM_JOB_ID" in os.environ:  # else nothing is written there
        yield "trainer.default_root_dir", trainer.default_root_dir or "."
    for logger in loggers:
        if place := logger.get("init_args.save_dir"):
            name = logger.get("init_args.name") if logger in own else None  # elsewhere it is no folder
            yield "trainer.logger.save_dir", os.path.join(place, name) if name else place
    for callback in callbacks:
        if place := callback.get("init_args.dirpath"):
            yield f"dirpath of {callback.class_path.split('.')[-1]}", place


def _obstacle(path: Path) -> str | None:
    """Reason that keeps a folder from being made, or files from being written into it."""
    try:
        os.fsencode(path)
        for place in (path, *path.parents):
            if place.is_dir():
                with TemporaryDirectory(dir=place, prefix=".zoo-"):  # permissions do not tell of read-only file systems
                    return None
            if place.exists():
                return f"{place} is a file"
            if place.is_symlink():
                return f"{place} is a link to {os.readlink(place)}, which is not there"
    except UnicodeEncodeError:
        return "this locale does not have its letters (PYTHONUTF8=1 has them)"
    except OSError as error:
        return f"{place} takes no files ({error.strerror})"
    return None
