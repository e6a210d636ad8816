"""Provenance of a checkpoint, inside of it."""

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import zoo
from zoo._lightning import NAMESPACE, Callback

PACKAGES = ("torch", "torchvision", NAMESPACE.replace("_", "-"), "timm", "torchmetrics", "jsonargparse", "numpy")


class Provenance(Callback):
    """Puts the configuration, the versions of packages and git revisions into every checkpoint, as "provenance".

    They are found once, when the run begins: see :func:`provenance`. The time of the save, in nanoseconds since 1970,
    is in this callback's own state, "saved". All of it is plain data, which loads with ``weights_only=True``.

    Args:
        config: The resolved configuration, as YAML; :func:`zoo.checkpoints.configuration` reads it back.
    """

    def __init__(self, config: str | None = None) -> None:
        self.config = config
        self._found: dict[str, Any] | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self._found is None and trainer.is_global_zero:  # which writes the checkpoints
            self._found = provenance(self.config)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self._found is not None:
            checkpoint["provenance"] = self._found

    def state_dict(self) -> dict[str, Any]:
        return {"saved": time.time_ns()}


def provenance(config: str | None = None) -> dict[str, Any]:
    """The provenance of a run: its configuration, versions of packages, and git revisions of the code.

    Args:
        config: The resolved configuration, as YAML.

    Returns:
        ``{"config": ..., "versions": {package: version}, "git": {"zoo": revision, "here": revision}, "cwd": folder}``.
        A revision, of the zoo's source and of the working directory, is ``{"commit": str, "changed": bool}``, or None
        where there is none. Files that git does not follow do not count as changes. Relative paths in the
        configuration start from ``cwd``, the working directory.
    """
    versions = {"vision-zoo": zoo.__version__, "python": platform.python_version()}
    versions |= {name: _version(name) for name in PACKAGES}
    source = Path(zoo.__file__).parent
    # A .venv may lie inside of the repository of somebody who has only installed the zoo.
    followed = _git(source, "ls-files", "--error-unmatch", "__init__.py") is not None
    git = {"zoo": _revision(source) if followed else None, "here": _revision(Path.cwd())}
    return {"config": config, "versions": versions, "git": git, "cwd": os.getcwd()}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # used from a folder, without having been installed
        return "unknown"


def _revision(folder: Path) -> dict[str, Any] | None:
    said = _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return None if said is None else {"commit": said.removesuffix("-dirty"), "changed": said.endswith("-dirty")}


def _git(folder: Path, *command: str) -> str | None:
    """The output of git, or None: no git, no work tree, or one that takes long."""
    # Neither a program that the repository names nor a lock on its index.
    arguments = ["git", "-c", "core.fsmonitor=false", "-C", str(folder), *command]
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=10, check=True, env=environment)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
