"""The checkpoint that ``--ckpt_path`` means, and what makes two runs the same one.

Where checkpoints lie is asked of the Trainer: its loggers, its ModelCheckpoints, its ``default_root_dir``. Whose they
are is asked of the checkpoints, which hold the configuration of the run that wrote them.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import yaml

from zoo._lightning import Checkpoint, rank_zero_info
from zoo.checkpoints import best_path, content_of, made_by, newest
from zoo.cli.mistakes import Mistake
from zoo.common.protocols import Changeable

WORDS = ("last", "best", "hpc")
"""Which --ckpt_path takes beside a path: the newest of this model and data, its run's best, a requeued job's."""

CHANGEABLE = {
    # how it is trained
    *("lr", "learning_rate", "max_lr", "min_lr", "weight_decay", "wd", "momentum", "betas", "eps", "layer_decay"),
    *("optimizer", "schedule", "lr_schedule", "scheduler", "milestones", "gamma_lr", "decay_rate", "decay_epochs"),
    *("warmup", "warmup_epochs", "warmup_steps", "max_epochs", "max_steps"),
    # how it is computed
    *("compile", "grad_checkpointing", "channels_last"),
    # how samples are read and put together
    *("batch_size", "val_batch_size", "test_batch_size", "drop_last", "num_workers", "workers", "pin_memory"),
    *("prefetch_factor", "persistent_workers", "on_error", "download", "decoder", "cache", "cache_size", "cache_mb"),
    "predict_root",
}
"""Options of model and data that may change while a run goes on. A class adds its own as ``changeable``: those that
say how it is evaluated. All others make it another model, or other data."""

Settings = Mapping[str, Any]
Hint = Callable[[], str]  # asked for an error alone: it looks through all runs


def differences(now: Settings, then: Settings, there: str = "", written: Settings | None = None) -> list[str]:
    """The options of model and data in which a run is not the one that a configuration asks for, a line each.

    An option that one of the two releases does not have, and nobody has set, is no difference; nor is a path that leads
    to the same place from another working directory; nor a number of classes that nobody has set: classes are matched
    by name when the run goes on.

    Args:
        now, then: The resolved configurations, ``{"model": {"class_path": ..., "init_args": ...}, "data": ...}``.
        there: The working directory of the other run.
        written: The part of ``now`` that somebody has written. None: all of it.
    """
    found = []
    for part in ("model", "data"):
        ours, theirs = now.get(part), then.get(part)
        if not isinstance(ours, Mapping) or not isinstance(theirs, Mapping):
            found += [] if ours == theirs else [f"{part} is {_short(theirs)} there, {_short(ours)} here"]
        elif _class_name(ours) != _class_name(theirs):
            found.append(f"{part} is {theirs['class_path']} there, {ours['class_path']} here")
        else:
            options = None if written is None else (written.get(part) or {}).get("init_args") or {}
            found += [f"{part}.{line}" for line in _in_options(ours, theirs, there, options)]
    return found


def _in_options(ours: Settings, theirs: Settings, there: str, written: Settings | None) -> Iterator[str]:
    kind = class_of(ours["class_path"])
    free = CHANGEABLE | set(kind.changeable if isinstance(kind, Changeable) else ())
    then = theirs.get("init_args") or {}
    for name, value in (ours.get("init_args") or {}).items():
        if name in free or (
            (name not in then or name == "num_classes") and written is not None and name not in written
        ):
            continue
        before = then[name] if name in then else _default(kind, name)
        if value != before and not _same_place(value, before, there):
            yield f"{name} is {_short(before)} there, {_short(value)} here"


def _default(kind: Any, name: str) -> Any:
    parameter = signature(kind).parameters.get(name) if kind is not None else None
    default = None if parameter is None or parameter.default is Parameter.empty else parameter.default
    return yaml.safe_load(yaml.safe_dump(list(default))) if isinstance(default, tuple) else default


def class_of(path: str) -> Any:
    """The class that a configuration names; None if it is not there any more."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name, None)
    except (ImportError, ValueError):  # a class of another release, or of a script
        return None


def _class_name(settings: Settings) -> tuple[str, str]:
    """A class's package and name: where in the package it lies may change from release to release."""
    path = str(settings["class_path"]).split(".")
    return path[0], path[-1]


def _same_place(ours: Any, theirs: Any, there: str) -> bool:
    if not (isinstance(ours, str) and isinstance(theirs, str)) or "://" in ours + theirs:
        return False
    here = os.path.realpath(ours)
    return here == os.path.realpath(os.path.join(there, theirs)) and os.path.exists(here)


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


# Where checkpoints lie.


def places(trainer: Any) -> list[Path]:
    """Folders in which runs of this configuration keep their checkpoints, on this machine."""
    found: list[Any] = []
    for logger in trainer.loggers:
        place = getattr(logger, "root_dir", None) or logger.save_dir
        found += [place] if place else []
    savers = [callback for callback in trainer.callbacks if isinstance(callback, Checkpoint)]
    found += filter(None, (getattr(saver, "dirpath", None) for saver in savers))
    if not found or "SLURM_JOB_ID" in os.environ:  # where a requeued job finds its own
        found.append(trainer.default_root_dir)
    paths = dict.fromkeys(Path(os.path.relpath(place)) for place in map(str, found) if "://" not in place)
    return [path for path in paths if not any(other in path.parents for other in paths)]


def find(
    trainer: Any, settings: str, written: Settings | None = None, hint: Hint = str, required: bool = False
) -> Path | None:
    """The newest whole checkpoint of a run with the same model and data; None, which is told, if there is none yet.

    First it looks where runs of this configuration go, then everywhere under the Trainer's ``default_root_dir``, for
    runs that were moved.

    Args:
        trainer: The Trainer that is to continue it.
        settings: The resolved configuration, as YAML.
        written: See :func:`differences`.
        hint: Gives more for the error, ``; the newest checkpoint is ...``.
        required: Whether there has to be one.

    Raises:
        Mistake: If there is none, and there has to be.
    """
    now, others = yaml.safe_load(settings), dict[Path, list[str]]()

    def is_ours(path: Path) -> bool:
        others[path] = _differing(path, now, written)
        return not others[path]

    first, everywhere = places(trainer), str(trainer.default_root_dir)
    path = newest(first, is_ours)
    if path is None and "://" not in everywhere:
        path = newest(everywhere, is_ours)
    where = ", ".join(map(str, first)) or everywhere
    if path is None and required:
        raise Mistake(f"there is no checkpoint of this model and data in {where}{_nearest(others) or hint()}")
    told = f"no checkpoint of this model and data in {where}: a new run{_nearest(others)}"
    rank_zero_info(told if path is None else f"continuing with {path}")
    return path


def _nearest(others: Mapping[Path, list[str]]) -> str:
    """The checkpoint that is of almost the same run, and what it differs in."""
    if not others:
        return ""
    path = min(others, key=lambda path: len(others[path]))
    lines = others[path]
    more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
    return f"; {path} is of another: {'; '.join(lines[:3])}{more}. To continue that: --ckpt_path {path}"


def best_of(path: Path) -> Path:
    """The best checkpoint, by its ModelCheckpoint, of the run that wrote a checkpoint.

    Raises:
        Mistake: If it has none that is still there.
    """
    found = best_path(content_of(path), path)
    if found is None:
        raise Mistake(f"the run of {path} has no best checkpoint: a ModelCheckpoint with a monitor keeps one")
    return found


def in_folder(folder: Path, settings: str, written: Settings | None = None) -> Path:
    """The newest whole checkpoint in a folder: of this model and data, or else the newest of all.

    Raises:
        Mistake: If there is none.
    """
    now = yaml.safe_load(settings)
    found = newest(folder, lambda path: not _differing(path, now, written)) or newest(folder)
    if found is None:
        raise Mistake(f"there is no whole checkpoint in the folder {folder}: name a .ckpt file, or a run's folder")
    rank_zero_info(f"taking {found}")
    return found


def _differing(path: Path, now: Settings, written: Settings | None) -> list[str]:
    """The :func:`differences` of the run that wrote a checkpoint; one that does not say counts as another."""
    made = made_by(path)
    then = yaml.safe_load(config) if isinstance(config := made.get("config"), str) else None
    if not isinstance(then, Mapping):
        return ["it does not say of what it is"]
    return differences(now, then, made.get("cwd", ""), written)


def check(asked: str, default_root_dir: str | None, hint: Hint) -> None:
    """Looks at what was given as ``--ckpt_path``, before anything is built.

    Args:
        asked: A path, a URL, or one of ``WORDS``.
        default_root_dir: The Trainer's.
        hint: Gives more for the error, ``; the newest checkpoint is ...``.

    Raises:
        Mistake: If there is no such thing.
    """
    if not asked.strip():
        raise Mistake(f"--ckpt_path is empty: name a checkpoint, a run's folder, or last{hint()}")
    if asked in ("last", "best") or "://" in asked or Path(asked).exists():
        return
    if asked == "hpc":
        if not any(Path(default_root_dir or ".").glob("hpc_ckpt_*.ckpt")):
            raise Mistake(f"there is no checkpoint of a requeued job, hpc_ckpt_N.ckpt, in {default_root_dir or '.'}")
    elif asked.partition(":")[0] == "registry":
        if find_spec("litmodels") is None:
            raise Mistake(f"--ckpt_path {asked} needs the package litmodels: pip install litmodels")
    elif os.path.lexists(asked):
        raise Mistake(f"{asked} is a link to {os.readlink(asked)}, which is not there{hint()}")
    else:
        near = get_close_matches(asked, WORDS, n=1)
        raise Mistake(f"there is no checkpoint {asked}{f'; did you mean {near[0]}?' if near else hint()}")
