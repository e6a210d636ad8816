"""Checkpoints that are whole or absent, say what made them, and run no code when they are read.

``AtomicCheckpointIO`` is a plugin of any Trainer's, ``Trainer(plugins=[AtomicCheckpointIO()])``, and ``SafeLoading`` is
for modules. ``damage``, ``newest`` and ``configuration`` look at what lies on the disk. What made a checkpoint is put
into it by :class:`zoo.callbacks.Provenance`.
"""

import multiprocessing
import os
import pickle
import platform
import re
import secrets
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any, Self

import torch
from torch.utils.serialization import config as serialization

from zoo._lightning import NAMESPACE, rank_zero_warn
from zoo.plain import objects

if TYPE_CHECKING or NAMESPACE == "lightning":
    from lightning.pytorch.plugins.io import TorchCheckpointIO
    from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
else:
    from pytorch_lightning.plugins.io import TorchCheckpointIO
    from pytorch_lightning.utilities.model_helpers import _restricted_classmethod

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows has no such locks: nothing is swept or refused there
    fcntl = None

# Of the file that a checkpoint is written to before it gets its name: .last.ckpt.1f0c93aa.tmp
STAGE = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")

SKEW = 60 * 10**9  # nanoseconds by which the clock of a file server may be behind

_claimed: dict[tuple[int, Path], IO[str]] = {}  # by process, since locks do not pass to a fork


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
            _write(checkpoint, target)
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
        """What is done once for each folder that is saved to."""
        folder.mkdir(parents=True, exist_ok=True)
        if folder in self._known:
            return
        if self.exclusive:
            claim(folder)
        sweep(folder)
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


# Looking at what lies there.


def damage(path: str | Path) -> str | None:
    """Why a checkpoint is not whole, or None if it is. It is read once, and no code is run.

    A file has to be the archive that torch writes, with all its records, each as its checksum says. Of a distributed
    checkpoint, a folder, only what is written last is looked for.
    """
    path = Path(path)
    if path.is_dir():
        missing = next((name for name in (".metadata", "meta.pt") if not (path / name).exists()), None)
        return damage(path / "meta.pt") if missing is None else f"it has no {missing}"
    try:
        with zipfile.ZipFile(path) as archive:
            # Bit 4 makes a record a folder, in place of which torch's reader gives whatever lies in memory.
            folders = [record.filename for record in archive.infolist() if record.external_attr & 0x10]
            wrong = folders[0] if folders else archive.testzip()
        if wrong is not None:
            return f"{wrong} in it is not what was written"
        torch.load(path, map_location="meta", weights_only=True, mmap=True)  # without the tensors' bytes
    except OSError as error:
        return error.strerror or str(error)
    except zipfile.BadZipFile:
        return "it is empty" if path.stat().st_size == 0 else "it was cut short, or is no checkpoint"
    except pickle.UnpicklingError:  # Python objects, and its bytes are right
        return None
    except Exception as error:  # what a wrong byte makes of an archive's index: a dozen kinds
        return f"it cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return None


def newest(folder: str | Path | Sequence[str | Path], accept: Callable[[Path], bool] | None = None) -> Path | None:
    """The newest whole checkpoint under a folder, by when it was saved; links are not followed.

    When that was is in the checkpoint, since copying a run gives its files new times in any order; where it is not,
    the file's own time counts. Damaged ones that are newer are passed over with a warning.

    Args:
        folder: Where to look, however deep: files and folders named ``*.ckpt``. Several are looked at as one.
        accept: Says of a checkpoint whether it may be taken; :func:`configuration` helps. It is asked before the file
            is read as a whole. None: all are.
    """
    folders = [folder] if isinstance(folder, str | Path) else folder
    paths = (path for place in folders for path in Path(place).rglob("*.ckpt") if not path.is_symlink())
    files = {path.resolve(): path for path in paths}
    found, damaged = _newest(files.values(), accept)
    for path, reason in damaged:
        instead = f"taking {found}" if found else f"and there is no whole one in {', '.join(map(str, folders))}"
        rank_zero_warn(f"{path} is damaged, {reason}: {instead}")
    return found


def made_by(path: str | Path) -> dict[str, Any]:
    """The provenance in a checkpoint, see :class:`zoo.callbacks.Provenance`; empty if there is none to be read."""
    return _head(Path(path))[0]


def configuration(path: str | Path) -> str | None:
    """The YAML configuration of the run that wrote a checkpoint; None if there is none, or the file cannot be read."""
    found = made_by(path).get("config")
    return found if isinstance(found, str) else None


def saved_at(path: str | Path) -> int:
    """When a checkpoint was saved, in nanoseconds since 1970; if it does not say, when it was changed."""
    saved = _head(Path(path))[1]
    return _changed(Path(path)) if saved is None else saved


def _head(path: Path) -> tuple[dict[str, Any], int | None]:
    """The provenance in a checkpoint, and when it was saved, without reading its tensors."""
    try:
        content = torch.load(
            path / "meta.pt" if path.is_dir() else path, map_location="meta", weights_only=True, mmap=True
        )
        made, saved = content.get("provenance"), content.get("callbacks", {}).get("Provenance", {}).get("saved")
    except Exception:  # whatever is in a file that is not ours
        return {}, None
    return made if isinstance(made, dict) else {}, saved if isinstance(saved, int) else None


def _newest(
    paths: Iterable[Path], accept: Callable[[Path], bool] | None = None
) -> tuple[Path | None, list[tuple[Path, str]]]:
    found, when, damaged = None, -1, []
    changed = {path: _changed(path) for path in paths}
    # Of several names of one file, that which says what it is comes before "last".
    for path in sorted(changed, key=lambda path: (changed[path], not path.stem.startswith("last")), reverse=True):
        if changed[path] < when - SKEW:  # a file is not changed before it is saved: what follows is older
            break
        made, saved = _head(path)
        saved = changed[path] if saved is None else saved
        if saved <= when or (accept is not None and made and not accept(path)):
            continue
        if reason := damage(path):  # such a file does not say whose it is
            damaged.append((saved, path, reason))
        elif accept is None or made or accept(path):
            found, when = path, saved
    return found, [(path, reason) for saved, path, reason in damaged if saved > when]


def _changed(path: Path) -> int:
    """When a checkpoint was changed, in nanoseconds since 1970: a folder's own time is that of its first file."""
    last = path / "meta.pt"
    try:
        return (last if last.exists() else path).stat().st_mtime_ns
    except OSError:  # another run has just replaced it
        return -1


def free_path(folder: str | Path, name: str, replaceable: Callable[[Path], bool]) -> str:
    """The first of ``NAME.ckpt``, ``NAME-v1.ckpt`` and so on that is not there, or that may be replaced.

    Args:
        folder: A folder, or a URL, where nothing is looked at.
        name: NAME.
        replaceable: Says of a checkpoint that is there whether it may be replaced.
    """
    for number in count():
        path = f"{str(folder).rstrip('/')}/{name}{f'-v{number}' if number else ''}.ckpt"
        if "://" in path or not Path(path).exists() or replaceable(Path(path)):
            return path
    raise AssertionError("there is no end of numbers")


def sweep(folder: Path) -> None:
    """Removes what writers that are dead left of unfinished checkpoints. A lock tells the living from the dead."""
    for stage in folder.iterdir():
        if STAGE.fullmatch(stage.name):
            with suppress(OSError), stage.open("r+b") as file:  # in use, gone, or on a file system without locks
                _lock(file)
                stage.unlink()


def claim(folder: str | Path) -> None:
    """Takes a folder for this process, as long as it lives; again, it does nothing.

    A file ``.lock`` in the folder holds the lock and stays behind. The lock goes with the process, however that ends.
    One that this process has taken may be used by one of those that it forks or spawns, at a time. Where the file
    system has no locks nothing is refused.

    Raises:
        RuntimeError: If another process has it.
    """
    folder = Path(folder).resolve()
    if fcntl is None or (os.getpid(), folder) in _claimed:
        return
    file, parent = (folder / ".lock").open("a+"), multiprocessing.parent_process()
    try:
        # Not flock: the workers of a loader would inherit it, and outlive a process that is killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.lockf(file, fcntl.LOCK_UN, 0, 1)  # all but the first byte: for a child's lock
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        holder = file.read().strip()
        if parent is None or holder != _process(parent.pid) or not _lock_second(file):
            file.close()
            raise RuntimeError(
                f"{folder}: another run saves its checkpoints there ({holder}): give this one a folder of its own"
            ) from error
    except OSError:  # no locks here
        pass
    else:
        file.truncate(0)
        file.write(_process(os.getpid()))
        file.flush()
    _claimed[os.getpid(), folder] = file


def _process(number: int | None) -> str:
    return f"process {number} on {platform.node()}"


def _lock_second(file: IO[str]) -> bool:
    """Takes the lock of a child, beside its parent's."""
    assert fcntl is not None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 1)
    except OSError:
        return False
    return True


# Writing and reading a file.


def _write(checkpoint: dict[str, Any], target: Path) -> None:
    file = _stage(target)
    try:
        with file, serialization.patch("save.compute_crc32", True):  # type: ignore[attr-defined]
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, target)
    except RuntimeError as error:  # torch's writer complains once more when it closes
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    finally:
        Path(file.name).unlink(missing_ok=True)
    _sync(target.parent)


def give_name(checkpoint: Path, name: Path) -> bool:
    """Gives a checkpoint that is there a second name, in place of what has it; False where files cannot have two.

    Both names stay whole whatever becomes of the other, as long as nobody writes into the file itself:
    :class:`AtomicCheckpointIO` does not.
    """
    beside = name.with_name(f".{name.name}.{secrets.token_hex(4)}.tmp")
    try:
        if name.exists() and checkpoint.samefile(name):
            return True
        os.link(checkpoint, beside)
        os.replace(beside, name)
    except OSError:  # no such links here, or the checkpoint is a folder
        beside.unlink(missing_ok=True)
        return False
    _sync(name.parent)
    return True


def _stage(target: Path) -> IO[bytes]:
    """A new file beside a path, with a lock that says its writer lives."""
    while True:
        file = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp").open("xb")
        with suppress(OSError):  # no locks here
            _lock(file, wait=True)
        if os.fstat(file.fileno()).st_nlink:  # else it was swept before it had its lock
            return file
        file.close()


def _lock(file: IO[bytes], wait: bool = False) -> None:
    if fcntl is None:
        raise OSError("no locks")
    fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sync(folder: Path) -> None:
    """Makes a rename last; without, it may be lost with the machine's power."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _unsaved(target: Path, cause: OSError) -> OSError:
    error = OSError(f"{target} was not saved: {cause.strerror or cause}; the checkpoints before it are whole")
    error.errno = cause.errno
    return error


@contextmanager
def _checked(path: Any, weights_only: bool | None) -> Iterator[tuple[Any, bool]]:
    """What to read of a path, a URL or an open file, and whether only tensors; then words what went wrong."""
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
    found, _ = _newest(path.parent.glob("*.ckpt"))
    return f"; the newest whole one beside it is {found}" if found else ""


def _local(path: str | Path) -> Path | None:
    """The path on this machine, or None for one elsewhere."""
    name = str(path).removeprefix("file://")
    return None if "://" in name else Path(name)
