"""Memory-mapped file of images: its layout, and how it is written, found and shared.

    pixels, (height, width, channels) uint8, image after image
    heights and widths, (N, 2) int32; 0, 0 for an image that could not be read
    a line of JSON: fingerprint, count, channels
    the line's length, 8 bytes, and 8 bytes by which the end of a whole file is known

Nothing in it is unpickled, and what its index says is checked against its size.
"""

import json
import mmap
import multiprocessing.reduction
import os
import secrets
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from datamodules._lightning import rank_zero_info

_END = b"zooimg01"
_AT_ONCE = 32  # images for each thread, before they are written
_LONGEST_LINE = 4096


@dataclass
class Job:
    """The images of a store.

    Args:
        name: What they are, in a word that can be part of a file's name.
        count: How many there are.
        channels: 1 or 3.
        read: The pixels of an image, uint8 (height, width, channels), or None if it cannot be read. Called by threads.
    """

    name: str
    count: int
    channels: int
    read: Callable[[int], np.ndarray | None]


class Store:
    """Images in a mapped file: ``store[row]`` is a view of it, uint8 (C, H, W), or None if it could not be read.

    The views are for reading only; writing to them ends the process. Workers share the file, whichever way they are
    started.

    Args:
        file: An open file, which the store keeps.

    Raises:
        ValueError: If it is not whole.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        size = os.fstat(file.fileno()).st_size
        if size < 16:
            raise ValueError("it is too short")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        length = int.from_bytes(mapped[-16:-8], "little")
        if mapped[-8:] != _END or length > min(_LONGEST_LINE, size - 16):
            raise ValueError("its end is missing")
        index = json.loads(mapped[-16 - length : -16])
        self.fingerprint: str = index["fingerprint"]
        count, channels = int(index["count"]), int(index["channels"])
        pixels = size - 16 - length - 8 * count
        if count < 0 or pixels < 0:
            raise ValueError("it is too short")
        sides = np.frombuffer(mapped, dtype="<i4", count=2 * count, offset=pixels).reshape(count, 2)
        self.sides, self.channels = sides.astype(np.int64), channels
        ends = np.cumsum(self.sides.prod(axis=1) * channels)
        if (self.sides < 0).any() or (ends[-1] if count else 0) != pixels:
            raise ValueError("its index is not that of its pixels")
        self.starts = np.concatenate(([0], ends))
        with warnings.catch_warnings():  # that it is for reading only is meant
            warnings.simplefilter("ignore", UserWarning)
            self.pixels = torch.frombuffer(mapped, dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.sides)

    @property
    def nbytes(self) -> int:
        """Bytes of all images together."""
        return int(self.starts[-1])

    def __getitem__(self, row: int) -> Tensor | None:
        height, width = self.sides[row].tolist()
        if height == 0:
            return None
        strides = (1, width * self.channels, self.channels)
        return self.pixels.as_strided((self.channels, height, width), strides, int(self.starts[row]))

    def __del__(self) -> None:
        self._file.close()

    def __reduce__(self) -> Any:
        # The open file goes to a worker that is not forked, not its name: it may have none, or be replaced.
        return _received, (multiprocessing.reduction.DupFd(self._file.fileno()),)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Store":
        return self


def _received(duplicate: Any) -> Store:
    return Store(os.fdopen(duplicate.detach(), "rb"))


def in_memory(job: Job) -> Store:
    """A store in memory that only this process and its workers know of.

    Raises:
        OSError: If there is not enough memory.
    """
    # Not torch's shared memory: that lies in /dev/shm, which is small in a container, and filling it kills the process.
    file: Any
    if hasattr(os, "memfd_create"):
        file = os.fdopen(os.memfd_create(f"zoo {job.name}"), "w+b")
    else:
        file = tempfile.TemporaryFile()  # noqa: SIM115  # the store keeps it
    started = time.monotonic()
    try:
        with _named(job, "memory"):
            _write(job, file, "", "memory")
        store = Store(file)
    except BaseException:
        with suppress(OSError):  # what could not be written before cannot be written now
            file.close()
        raise
    _told(job, store, "memory", started)
    return store


def in_folder(folder: Path, job: Job, fingerprint: str, build: bool) -> Store | None:
    """The store in a folder that has this fingerprint; made, if it is not there and ``build`` says so.

    It is written under another name and then renamed. Of several processes, one makes it and the others wait; where the
    file system has no locks, each makes it and the last one's stays.

    Raises:
        OSError: If it cannot be written.
    """
    place = folder / f"{job.name}.images"
    store = _found(place, fingerprint)
    if store is not None or not build:
        return store
    started = time.monotonic()
    with _named(job, str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder) as locked:
            if (store := _found(place, fingerprint)) is not None:  # somebody has made it meanwhile
                return store
            if locked:  # nobody writes: what is there is from somebody who was ended
                for left in folder.glob(f".{job.name}.*.part"):
                    left.unlink(missing_ok=True)
            beside = folder / f".{job.name}.{secrets.token_hex(8)}.part"
            try:
                with open(beside, "xb") as file:
                    _write(job, file, fingerprint, str(folder))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(beside, place)
            finally:
                beside.unlink(missing_ok=True)
    store = Store(open(place, "rb"))  # noqa: SIM115  # the store keeps it
    _told(job, store, str(place), started)
    return store


def _found(place: Path, fingerprint: str) -> Store | None:
    try:
        file = open(place, "rb")  # noqa: SIM115  # the store keeps it
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        store = Store(file)
    except (ValueError, KeyError, TypeError, RecursionError):  # cut, or of another making
        file.close()
        return None
    return store if store.fingerprint == fingerprint else None


def _write(job: Job, file: IO[bytes], fingerprint: str, where: str) -> None:
    sides = np.zeros((job.count, 2), dtype="<i4")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads, before = min(16, cores), torch.get_num_threads()
    rank_zero_info(f"Caching {job.count:,} images ({job.name}) in {where}, with {threads} threads")
    try:
        # One thread of torch's for each of ours; and none of OpenMP's, which a fork of workers would not survive.
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for first in range(0, job.count, threads * _AT_ONCE):  # not all at once: they wait here to be written
                rows = range(first, min(first + threads * _AT_ONCE, job.count))
                for row, pixels in zip(rows, pool.map(job.read, rows), strict=True):
                    if pixels is not None:
                        sides[row] = pixels.shape[:2]
                        file.write(np.ascontiguousarray(pixels).data)
    finally:
        torch.set_num_threads(before)
    line = json.dumps({"fingerprint": fingerprint, "count": job.count, "channels": job.channels}).encode()
    file.write(sides.tobytes() + line + len(line).to_bytes(8, "little") + _END)
    file.flush()


def _told(job: Job, store: Store, where: str, started: float) -> None:
    lost = int((store.sides[:, 0] == 0).sum())
    without = f", {lost} of them unreadable" if lost else ""
    seconds = time.monotonic() - started
    rank_zero_info(f"Cached {len(store):,} images{without} in {where}: {store.nbytes / 1e6:,.1f} MB in {seconds:.0f} s")


@contextmanager
def _named(job: Job, where: str) -> Iterator[None]:
    """Raises OSError, in a line, for a cache that could not be written."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OSError(
            f"the cache of {job.count:,} images cannot be written to {where}: {reason}; make room, or set cache to "
            "another folder or to null, or cache_size to less"
        ) from error


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Locks a folder against other processes, which wait. Yields False where it cannot be locked."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError:
            rank_zero_info(f"Waiting for another process that writes a cache to {folder}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            locked = True
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(descriptor)
