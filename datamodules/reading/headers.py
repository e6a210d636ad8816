"""Sizes of image files, read from their headers, so that it is known how large each is before one is decoded."""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from torch import Tensor

from datamodules._lightning import rank_zero_info
from datamodules.reading.images import UnreadableImageError, header_size

THREADS = 16
"""Files that are looked at together: most of it is waiting for a disk."""

MANY = 20_000
"""More files than this take a while, of which a line says why."""


def header_sizes(
    paths: Sequence[str], upright: bool = True, unreadable: Tensor | None = None, folder: str | None = None
) -> np.ndarray:
    """Heights and widths (N, 2) of image files, int64.

    Args:
        paths: The files.
        upright: Whether EXIF orientations are applied.
        unreadable: (N,) where files that cannot be read are marked; they get the others' median size. None: an error.
        folder: Where sizes are kept for the next run, which reads them anew if files have changed. None: nowhere.

    Raises:
        UnreadableImageError: For a file that cannot be read, unless it may be marked.
    """
    place = None if folder is None else Path(folder, f"sizes-{_fingerprint(paths, upright)}.npy")
    if place is not None and place.is_file():
        sizes = np.load(place)
    else:
        if len(paths) > MANY:
            rank_zero_info(
                f"data: reading the sizes of {len(paths):,} images from their headers"
                + ("; a sizes_cache would keep them for the next run" if folder is None else "")
            )
        sizes = _read(paths, lambda path: header_size(path, upright), skips=unreadable is not None)
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            beside = place.with_suffix(f".{os.getpid()}.npy")  # processes may write at once, all the same
            np.save(beside, sizes)
            os.replace(beside, place)
    missing = sizes[:, 0] == 0
    if missing.any():
        if unreadable is None:
            header_size(paths[int(missing.argmax())], upright)  # kept by a run that skipped them: it raises
        else:
            unreadable[np.flatnonzero(missing)] = 1
        sizes[missing] = np.median(sizes[~missing], axis=0).astype(np.int64) if not missing.all() else 1
    return sizes


def _read(paths: Sequence[str], size_of: Callable[[str], tuple[int, int]], skips: bool) -> np.ndarray:
    def size(path: str) -> tuple[int, int]:
        with suppress(*([UnreadableImageError] if skips else [])):
            return size_of(path)
        return 0, 0

    with ThreadPoolExecutor(THREADS) as pool:
        return np.array(list(pool.map(size, paths)), dtype=np.int64).reshape(-1, 2)


def _fingerprint(paths: Sequence[str], upright: bool) -> str:
    """Hash of all that sizes depend on: names, sizes and times of the files."""
    digest = hashlib.blake2b(str(upright).encode(), digest_size=16)
    for path in paths:
        with suppress(OSError):
            status = os.stat(path)
            digest.update(f"\0{status.st_size} {status.st_mtime_ns}".encode())
        digest.update(f"\0{path}".encode(errors="surrogateescape"))
    return digest.hexdigest()
