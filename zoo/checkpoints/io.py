"""Saving and loading of checkpoints, for a Trainer and for modules."""

import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from zoo._lightning import NAMESPACE, rank_zero_warn
from zoo.checkpoints import files
from zoo.checkpoints.looking import DamagedError, damage, newest_of, whole_content
from zoo.checkpoints.plain import objects

if TYPE_CHECKING or NAMESPACE == "lightning":
    from lightning.pytorch.plugins.io import TorchCheckpointIO
    from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
else:
    from pytorch_lightning.plugins.io import TorchCheckpointIO
    from pytorch_lightning.utilities.model_helpers import _restricted_classmethod


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint plugin, but a file has its name only once it is whole and on the disk.

    A checkpoint is streamed to a hidden file beside its destination, synced and renamed. A process that dies meanwhile
    leaves the checkpoints before as they were, and the hidden file; the next one that saves there removes it. A file
    that cannot be written takes nothing with it and is reported in a line. Remote paths (``s3://...``) are written
    Lightning's own way, and so are the folders of distributed checkpoints (``ModelParallelStrategy``).

    Reading never runs code unless told so: ``weights_only=None`` means True, also for a URL, where Lightning's own
    plugin unpickles. A local file is compared with its checksums first, which torch does not do.

    Args:
        exclusive: Whether to refuse a folder that another process saves to; see :func:`claim`.
        weights_only: What to do with a checkpoint that holds Python objects, which reading without running code would
            refuse: True refuses to save it, None warns the first time, False saves it. Where it comes from, a
            callback's state or a hyperparameter, is told.
    """

    def __init__(self, exclusive: bool = False, weights_only: bool | None = None) -> None:
        self.exclusive, self.weights_only = exclusive, weights_only
        self._known: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Saves a checkpoint. Arguments: see Lightning's ``TorchCheckpointIO``.

        Raises:
            OSError: If the file cannot be written: the disk is full, read-only, or the path leads elsewhere.
            RuntimeError: With ``exclusive``, if another process saves to the folder.
            ValueError: With ``weights_only``, if it holds Python objects.
        """
        self._look_for_objects(checkpoint)
        target = _local(path)
        if target is None or storage_options is not None:  # the latter is refused there
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            self._enter(target.parent)
            files.write(checkpoint, target)
        except OSError as error:
            raise _unsaved(target, error) from error

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Loads a checkpoint.

        Args:
            path: A file, or a URL.
            map_location: See ``torch.load``.
            weights_only: False unpickles whatever the file holds, which can run code. Everything else does not.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, or holds Python objects.
        """
        with _checked(path, weights_only) as (file, safe):
            return super().load_checkpoint(file, map_location, weights_only=safe)

    def _look_for_objects(self, checkpoint: dict[str, Any]) -> None:
        if self.weights_only is False:
            return
        found = objects(checkpoint)
        if found is None:
            return
        if self.weights_only:
            raise ValueError(
                f"the checkpoint was not saved: {found}, or set --weights_only false for a run whose files you trust"
            )
        self.weights_only = False  # once is enough
        rank_zero_warn(f"{found}; as they are, the checkpoints load with weights_only=False alone")

    def _enter(self, folder: Path) -> None:
        """Prepares a folder that is saved to, once."""
        folder.mkdir(parents=True, exist_ok=True)
        if folder in self._known:
            return
        if self.exclusive:
            files.claim(folder)
        files.sweep(folder)
        self._known.add(folder)


class SafeLoading:
    """Makes a module's ``load_from_checkpoint`` safe: ``class Net(SafeLoading, LightningModule)``."""

    @_restricted_classmethod
    def load_from_checkpoint(
        cls,  # noqa: N805
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        **kwargs: Any,
    ) -> Self:
        """Lightning's own, but nothing is unpickled unless ``weights_only`` is False, also from a URL.

        Args:
            checkpoint_path: A file, an open file, or a URL.
            map_location, hparams_file, strict: See ``LightningModule.load_from_checkpoint``.
            weights_only: False unpickles whatever the file holds, which can run code.
            kwargs: Hyperparameters that replace those in the checkpoint.

        Raises:
            ValueError: If the file is damaged, or holds Python objects.
        """
        with _checked(checkpoint_path, weights_only) as (file, safe):
            load: Any = super().load_from_checkpoint  # type: ignore[misc]  # of the LightningModule beside this
            return load(file, map_location, hparams_file, strict, weights_only=safe, **kwargs)


def read(path: str | Path) -> dict[str, Any]:
    """Content of a checkpoint file, on the CPU, without running code; a damaged one is not read.

    Raises:
        ValueError: If the file is damaged, holds Python objects, or anything but a mapping.
    """
    path = Path(path)
    try:
        content = whole_content(path, "cpu")
    except DamagedError as error:
        raise ValueError(f"{path} is damaged, {error}{_beside(path)}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds Python objects, which can run code, and is not read") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no checkpoint: it holds a {type(content).__name__}")
    return content


def _unsaved(target: Path, cause: OSError) -> OSError:
    error = OSError(f"{target} was not saved: {cause.strerror or cause}; the checkpoints before it are whole")
    error.errno = cause.errno
    return error


@contextmanager
def _checked(path: Any, weights_only: bool | None) -> Iterator[tuple[Any, bool]]:
    """Opens a path, a URL or a file for reading, decides whether for tensors only, and words what went wrong."""
    safe = weights_only is not False
    with _downloaded(path) if str(path).startswith(("http://", "https://")) else nullcontext(path) as file:
        local = _local(file) if isinstance(file, str | Path) else None
        if local is not None and local.is_file() and (reason := damage(local)):
            raise ValueError(f"{path} is damaged, {reason}{_beside(local)}")
        try:
            yield file, safe
        except pickle.UnpicklingError as error:
            if not safe:
                raise
            raise ValueError(
                f"{path} holds Python objects, which can run code, and is not read; if you trust it like a program: "
                "weights_only=False"
            ) from error


@contextmanager
def _downloaded(url: str) -> Iterator[Path]:
    # Lightning keeps the file by its name alone: of two runs' last.ckpt the first would be taken for both.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "downloaded.ckpt")
        try:
            torch.hub.download_url_to_file(str(url), str(file), progress=False)
        except OSError as error:
            raise OSError(f"{url} could not be fetched: {error}") from error
        yield file


def _beside(path: Path) -> str:
    found, _ = newest_of(path.parent.glob("*.ckpt"))
    return f"; the newest whole one beside it is {found}" if found else ""


def _local(path: str | Path) -> Path | None:
    """The path on this machine, or None for one elsewhere."""
    name = str(path).removeprefix("file://")
    return None if "://" in name else Path(name)
