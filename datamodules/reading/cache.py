"""Small copies of images, made once: in memory that loader workers share, or in one file that the next run finds again.

A copy has a short side of ``cache_size`` pixels, its image's aspect, and 8 bits; an image that is smaller stays as it
is, since enlarging would cost memory and add nothing. In training, crops are taken from the copy.

A cache is one file, of images one after the other and an index behind them (``stores.py``). It is mapped into memory,
so that however many workers and processes read it, it is there once. For ``ram`` that file has no name and ends with
the process; in a folder it is whole or absent, and is made anew if it is not of the files, sizes, times and settings
that are asked for.
"""

import hashlib
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torchvision.transforms import v2

from datamodules.reading import stores
from datamodules.reading.images import UnreadableImageError
from datamodules.reading.pixels import Pixels, ToTensor, as_tensor, covering, height_and_width, owned, resize, size_of
from datamodules.reading.stores import Job, Store


class Shrink:
    """Resizes an image, its aspect kept, to a short side; one whose short side is no longer stays as it is."""

    def __init__(self, side: int, interpolation: v2.InterpolationMode) -> None:
        self.side, self.interpolation = side, interpolation

    def __call__(self, image: Pixels) -> Pixels:
        size = size_of(image)
        if min(size) <= self.side:
            return image
        return resize(image, *covering(size, self.side, self.side), self.interpolation)


class Cached:
    """Samples whose images come from their source or, where they have some, from small copies.

    A subclass says what ``from_source`` and ``path`` of a sample are, and has a ``transform``.
    """

    transform: ToTensor
    shrink: Shrink | None = None
    """Maker of the copies. Set without a ``store``, copies are made anew each time: the same pixels, only later."""
    store: Store | None = None
    rows: np.ndarray | None = None
    """(N,) where in the store each sample is."""
    sizing: Any = None
    """How large each is made: see :class:`datamodules.loading.any_size.Sizing`. None: as the transform makes it."""
    sizes_folder: str | None = None
    """Where sizes from headers are kept for the next run."""

    def from_source(self, index: int) -> Pixels:
        """The whole image, upright. Raises UnreadableImageError."""
        raise NotImplementedError

    def path(self, index: int) -> str:
        """The file of a sample."""
        raise NotImplementedError

    def copied(self, index: int) -> Tensor:
        """The image as a cache keeps it."""
        assert self.shrink is not None
        return as_tensor(self.shrink(self.from_source(index)))

    def made(self, index: int) -> Tensor:
        """The image, transformed."""
        if self.shrink is None:
            return self.transform(self.from_source(index))
        copy = None if self.store is None or self.rows is None else self.store[int(self.rows[index])]
        if copy is None:  # also for a file that could not be read: whoever asks for it learns why
            return self.transform(self.copied(index))
        return owned(self.transform(copy), copy)


class Cache:
    """The copies that a data module's arguments ask for.

    Args:
        place: ``ram``, or a folder.
        size: Short side of the copies, in pixels.
        interpolation, decoder: How they are made.
        channels: 1 or 3.

    Raises:
        ValueError: If ``place`` is no name, or ``size`` no side.
    """

    def __init__(self, place: str, size: int, interpolation: str, decoder: str, channels: int) -> None:
        if not str(place).strip():
            raise ValueError("cache is empty: expected ram, the path of a folder, or null for none")
        if size < 1:
            raise ValueError(f"cache_size is {size}: expected a side in pixels")
        self.place, self.size, self.channels = str(place), size, channels
        self.settings = {"size": size, "interpolation": interpolation, "decoder": decoder, "channels": channels}
        self.shrink = Shrink(size, v2.InterpolationMode(interpolation))
        self._waiting: list[tuple[str, Any, list[tuple[Any, np.ndarray]], bool]] = []

    @property
    def in_memory(self) -> bool:
        return self.place == "ram"

    def check(self, image_size: int | tuple[int, int]) -> None:
        """Raises ValueError for copies too small to train with: a crop of the whole image would still be enlarged."""
        needed = max(height_and_width(image_size))
        if needed > self.size:
            raise ValueError(
                f"cache_size is {self.size}, which is too small to train at image_size {image_size}: set cache_size to "
                f"{needed} or more, or cache to null"
            )

    def serves(self, covered: tuple[int, int]) -> bool:
        """True where copies are large enough to be resized to cover a height and a width."""
        return max(covered) <= self.size

    def lend(self, samples: Any) -> None:
        """Has samples use copies, which are made anew each time until they have a store."""
        samples.shrink = self.shrink

    def add(self, name: str, pool: Any, used: list[tuple[Any, np.ndarray]], skip: bool = False) -> None:
        """Takes note of images that :meth:`fill` is to store.

        Args:
            name: What these images are called in the cache's folder.
            pool: All of them, as :class:`Cached` of a length and with ``names``. A folder holds all, memory only those
                that are used.
            used: Samples, and where in the pool each of them is.
            skip: Whether to leave out what cannot be read.
        """
        for samples in (pool, *(samples for samples, _ in used)):
            self.lend(samples)
        self._waiting.append((name, pool, used, skip))

    def fill(self, build: bool) -> None:
        """Finds the stores of what was added or, if ``build`` says so, makes them.

        Raises:
            UnreadableImageError: If an image cannot be read and is not to be skipped.
            OSError: If there is no room for them.
        """
        for waiting in list(self._waiting):
            name, pool, used, skip = waiting
            rows = np.arange(len(pool))
            if self.in_memory:
                rows = np.unique(np.concatenate([among for _, among in used]))
            job = Job(name, len(rows), self.channels, partial(_pixels, pool, rows, skip))
            store = self._store(job, pool, build)
            if store is not None:
                for samples, among in used:
                    samples.store, samples.rows = store, np.searchsorted(rows, among)
                self._waiting.remove(waiting)

    def _store(self, job: Job, pool: Any, build: bool) -> Store | None:
        if self.in_memory:
            return stores.in_memory(job) if build else None
        return stores.in_folder(Path(self.place), job, self._fingerprint(pool), build)

    def _fingerprint(self, pool: Any) -> str:
        """Hash of all that a store depends on: these settings; names, sizes and times of the files."""
        digest = hashlib.blake2b(json.dumps(self.settings, sort_keys=True).encode(), digest_size=16)
        for index in range(len(pool)):
            digest.update(f"\0{pool.names[index]}\0{_state(pool.path(index))}".encode(errors="surrogateescape"))
        return digest.hexdigest()


def builds(trainer: Any) -> bool:
    """True where copies are worth keeping: where a Trainer does not fit, each image comes once."""
    return trainer is None or trainer.state.fn == "fit"


def _pixels(pool: Cached, rows: np.ndarray, skip: bool, row: int) -> np.ndarray | None:
    try:
        return pool.copied(int(rows[row])).permute(1, 2, 0).numpy()
    except UnreadableImageError:
        if skip:
            return None
        raise


def _state(path: str) -> str:
    try:
        status = os.stat(path)
    except OSError:
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}"
