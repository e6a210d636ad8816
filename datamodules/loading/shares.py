"""Stratified shares of the training samples to hold out, the same on every machine."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np


def stratified_split(
    labels: Sequence[int] | np.ndarray, fraction: float, seed: int, names: Sequence[str] | np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Splits samples into those that stay and those that are held out: indices of both, each ascending.

    Every class gives the same share, rounded, but at least one sample, and never its last. Which ones is decided by a
    hash of seed and name: an added or removed sample hardly moves the others.

    Args:
        labels: (N,) class of each sample.
        fraction: Share to hold out, in [0, 1). 0 holds out none.
        seed: Seed of the choice.
        names: What each sample is called. None: its number.
    """
    labels = np.asarray(labels, dtype=np.int64)
    if fraction == 0 or len(labels) == 0:
        return np.arange(len(labels)), np.arange(0)
    keys = range(len(labels)) if names is None else names
    hashes = (hashlib.blake2b(f"{seed}/{key}".encode(errors="surrogateescape"), digest_size=8) for key in keys)
    order = np.lexsort((np.frombuffer(b"".join(h.digest() for h in hashes), dtype="<u8"), labels))
    starts = np.flatnonzero(np.diff(labels[order], prepend=labels[order[0]] - 1))
    held_out = []
    for members in np.split(order, starts[1:]):
        count = max(1, int(len(members) * fraction + 0.5))
        held_out.append(members[: min(count, len(members) - 1)])
    chosen = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def shares(labels: np.ndarray, names: np.ndarray, fractions: Mapping[str, float], seed: int) -> dict[str, np.ndarray]:
    """Splits training samples into parts, each a share of all of them, and what is left for "train": their indices.

    Args:
        labels: (N,) class of each sample.
        names: (N,) what each is called.
        fractions: Share of each part, in [0, 1), together less than 1.
        seed: Seed of the choice.
    """
    chosen, rest, left = {}, np.arange(len(labels)), 1.0
    for part, fraction in fractions.items():
        kept, out = stratified_split(labels[rest], fraction / left, seed, names[rest])
        chosen[part], rest, left = rest[out], rest[kept], left - fraction
    return chosen | {"train": rest}
