"""Files and folders of checkpoints: written whole or not at all, swept, and claimed by one process."""

import multiprocessing
import os
import platform
import re
import secrets
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import torch
from torch.utils.serialization import config as serialization

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows has no such locks: nothing is swept or refused there
    fcntl = None

# Of the file that a checkpoint is written to before it gets its name: .last.ckpt.1f0c93aa.tmp
STAGE = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")

_claimed: dict[tuple[int, Path], IO[str]] = {}  # by process, since locks do not pass to a fork


def write(checkpoint: dict[str, Any], target: Path) -> None:
    """Writes a checkpoint to a hidden file beside its place, and gives it its name once it is on the disk."""
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
