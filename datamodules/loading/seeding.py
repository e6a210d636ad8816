"""Samples and batches under seeds of their own, so that the number of workers changes nothing."""

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules import transforms
from datamodules.loading.order import Key, Keys, mix


class Samples(Protocol):
    """Samples of one split: ``samples[index]`` is an image, ``(image, label or dict)``, or None if unreadable.

    Images are uint8 tensors (C, H, W), labels integers from 0, dicts of plain Python values. Optional attributes:
    ``names``, what each sample is called (a file name); ``labels``, all labels (N,), or (N, labels) of 0 and 1, by
    which classes are counted and balanced; ``unreadable``, a shared uint8 tensor that marks samples which could not be
    read; ``random = False`` when making a sample involves no chance, so that seeding can be left out;
    ``in_batch(seed)``, the same samples as they are made in one batch, for choices that a whole batch shares: ``seed``
    is a function of the data module's seed, the epoch and the batch's number, and the same on every rank;
    ``sizing``, how large each is made, by its key: :class:`datamodules.loading.any_size.Sizing`.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


def seed_all(seed: int) -> None:
    """Seeds the three generators that transforms draw from: torch's (CPU), Python's and NumPy's."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed also visits every accelerator: 85 µs against 1
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


@contextmanager
def isolated_randomness() -> Iterator[None]:
    """Restores the generators' states: in the main process, loading must not disturb the model's randomness."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


class SeededBatches(Dataset[list[Any]]):
    """Makes a batch's samples, each under its own seed, so that the number of workers changes nothing.

    A sample that cannot be read (None) is left out of the batch; in training another one takes its place, so that the
    batch keeps its size. Where none of a batch can be read, or a process has no share in it, another sample stands in:
    all processes have as many batches. :meth:`present` names none of that batch, by which whoever counts knows.

    Args:
        samples: The data set.
        seed: Seed of the samples' random choices.
        substitute: Whether another sample takes the place of one that cannot be read.
        stages: By the epoch they start in, the same samples as they are made from then on.
        drawn: Whether uint8 images are drawn to 0 or 255, each value 255 with its intensity as probability. That is by
            seed and index alone, so that a sample which is made alike is drawn alike, in whatever epoch or batch.
    """

    attempts = 100  # a data set in which a hundred samples in a row cannot be read has no use for a hundred and first

    def __init__(
        self,
        samples: Samples,
        seed: int,
        substitute: bool = False,
        stages: Mapping[int, Samples] | None = None,
        drawn: bool = False,
    ) -> None:
        self.samples, self.seed, self.substitute, self.drawn = samples, seed, substitute, drawn
        self.stages = dict(sorted((stages or {}).items(), reverse=True))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, keys: list[Key]) -> list[Any]:
        keys = keys or Keys([(0, 0, 0)], getattr(keys, "batch", 0))  # a process's share of a last batch may be empty
        samples = self._samples_for(keys)
        if not getattr(self.samples, "random", True):
            kept = self._readable(samples, keys)
        else:
            with isolated_randomness():
                kept = self._readable(samples, keys)
        if not kept:
            raise ValueError(
                f"none of a batch's {len(keys)} images can be read, {self.name(keys[0][2])} the first, nor one of "
                f"{self.attempts} tried in their place"
            )
        return kept

    def _readable(self, samples: Samples, keys: list[Key]) -> list[Any]:
        """The samples of these keys that can be read, or if there are none, one that stands in for them."""
        sizing = getattr(samples, "sizing", None)
        plans = [None] * len(keys) if sizing is None else sizing.plans(samples, keys)
        attempts = self.attempts if self.substitute else 1
        made = (self._make(samples, key, attempts, plan) for key, plan in zip(keys, plans, strict=True))
        kept = [sample for sample in made if sample is not None]
        stand_in = None if kept else self._make(samples, keys[0], self.attempts, plans[0])
        return kept if stand_in is None else [stand_in]

    def _samples_for(self, keys: list[Key]) -> Samples:
        """The samples as they are made in the epoch of these keys, and in their batch."""
        epoch = keys[0][0]
        samples = next((made for first, made in self.stages.items() if first <= epoch), self.samples)
        if isinstance(keys, Keys) and hasattr(samples, "in_batch"):
            return samples.in_batch(mix(self.seed, epoch, keys.batch))
        return samples

    def _make(self, samples: Any, key: Key, attempts: int, plan: Any = None) -> Any:
        epoch, copy, index = key
        for attempt in range(attempts):
            seed = mix(self.seed, epoch, copy, index, attempt)
            if getattr(samples, "random", True):
                seed_all(seed)
            number = index if attempt == 0 else seed % len(self)
            sample = samples[number] if plan is None else samples.sizing.made(samples, number, plan)
            if sample is not None:
                return drawn(sample, self.seed, number) if self.drawn else sample
        return None

    def name(self, index: int) -> str:
        """Name of a sample: its file, or its number."""
        names = getattr(self.samples, "names", None)
        return str(index) if names is None else str(names[index])

    def keys_of(self, indices: Sequence[int]) -> Keys:
        """The keys of some samples, as an evaluation before all training has them: what shows samples asks for it."""
        return Keys(((0, 0, index) for index in indices), batch=0)

    def present(self, indices: Sequence[int]) -> list[tuple[int, str]]:
        """(index, name) of those samples of a loaded batch that could be read, in the batch's order.

        Where there are none, what the batch holds stands in for them.
        """
        unreadable = getattr(self.samples, "unreadable", None)
        return [(i, self.name(i)) for i in indices if unreadable is None or not unreadable[i]]


def drawn(sample: Any, seed: int, number: int) -> Any:
    """A sample's uint8 images (C, H, W) drawn to 0 or 255, each value 255 with its intensity as probability.

    That is by a data module's seed and the sample's number in its split alone.
    """
    generator = torch.Generator().manual_seed(mix(seed, number))

    def draw(image: Tensor) -> Tensor:
        return transforms.binarize(transforms.to_float(image), draw=True, generator=generator).to(torch.uint8) * 255

    return map_images(sample, draw, dimensions=3)


def with_transform(samples: Any, transform: Callable[[Any], Tensor]) -> Samples:
    """The same samples, made by another transform; the originals stay as they are."""
    changed = copy.copy(samples)
    changed.transform = transform
    return changed


def map_images(batch: Any, function: Callable[[Tensor], Tensor], dimensions: int = 4, floats: bool = False) -> Any:
    """Applies a function to the uint8 images (tensors of 4 dimensions; a sample's: 3) in a tensor, mapping or sequence.

    ``floats``: to those of floats as well.
    """
    if isinstance(batch, Tensor):
        of_images = batch.dtype == torch.uint8 or (floats and batch.is_floating_point())
        return function(batch) if of_images and batch.ndim == dimensions else batch
    if isinstance(batch, Mapping):
        return {key: map_images(value, function, dimensions, floats) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        parts = [map_images(part, function, dimensions, floats) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)  # a named tuple takes each
    return batch
