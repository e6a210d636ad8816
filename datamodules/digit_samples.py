"""The 1,797 digits of scikit-learn as samples, their splits, and their rendering at mixed sizes and aspects.

See :mod:`datamodules.digits`.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import pad

from datamodules.loading.any_size import by_column
from datamodules.loading.captions import About, about
from datamodules.loading.mixed_sizes import MixedSizes
from datamodules.loading.order import Key
from datamodules.transforms import plain_resize

Rendering = Literal["stretched", "placed"]

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a handwritten {word}",
    "a handwritten {digit}",
    "the digit {digit}",
    "the number {word}",
    "a scan of the digit {word}",
)
"""Captions of a digit, by its word or its numeral."""


class DigitSamples:
    """Digits of one split, as images (1, S, S) with white ink on black, and their labels.

    Images are uint8, or floats in which white is 1; labels (N,) are integers, or (N, labels) 0 and 1.
    """

    random = False
    scans: Tensor
    """(N, 1, 8, 8), and below:"""
    sizing: Any = None
    """How they are rendered, :class:`DigitSizes`. None: as ``images``."""

    def __init__(self, images: Tensor, labels: Tensor, indices: np.ndarray) -> None:
        self.images, some = images[indices], labels[indices]
        self.labels: list[int] | Tensor = some.tolist() if some.ndim == 1 else some
        self.names = [f"digits/{index}" for index in indices]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]:
        return self.images[index], self.labels[index]


class CaptionedDigits(DigitSamples):
    """Digits of one split with captions: ``(image, {"captions", "image_id", "label"})``.

    Args:
        images, labels, indices: See :class:`DigitSamples`.
        training: Whether each sample has one caption, drawn from Python's generator, instead of all.
    """

    def __init__(self, images: Tensor, labels: Tensor, indices: np.ndarray, training: bool) -> None:
        super().__init__(images, labels, indices)
        self.image_ids: list[int] = indices.tolist()
        self.random = training

    def captions_of(self, index: int) -> list[str]:
        return captions_of(int(self.labels[index]))

    def __getitem__(self, index: int) -> tuple[Tensor, About]:  # type: ignore[override]
        more = {"image_id": self.image_ids[index], "label": int(self.labels[index])}
        return self.images[index], about(self.captions_of(index), self.random, **more)


class DigitSizes(MixedSizes):
    """Sizing of digits: side and aspect drawn for each, by its key in training and by its number in evaluation.

    Args:
        sizes, aspects, patch_size, numbers, seed: See :class:`datamodules.loading.mixed_sizes.MixedSizes`; numbers are
            those among all digits.
        rendering: "stretched": the scan is resized to the whole image. "placed": it stays square, as large as fits, and
            lies anywhere along the longer side, on black.
        squeezed: Side that images are resized to in the end, whatever their aspect. None: they stay as they are.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        aspects: Sequence[float],
        rendering: Rendering,
        patch_size: int,
        squeezed: int | None,
        numbers: np.ndarray | None,
        seed: int,
    ) -> None:
        super().__init__(sizes, aspects, patch_size, numbers, seed if numbers is None else 0)
        self.rendering, self.squeezed = rendering, squeezed

    def plans(self, samples: Any, keys: Sequence[Key]) -> list[tuple[int, int, float]]:
        """Height, width and place along the longer side, in [0, 1), of each key."""
        pixels, places = self.pixels(*by_column(keys)).tolist(), self.draw(2, *by_column(keys)).tolist()
        return [(height, width, place) for (height, width), place in zip(pixels, places, strict=True)]

    def made(self, samples: Any, number: int, plan: tuple[int, int, float]) -> Any:
        _, *others = samples[number]
        return (self._rendered(samples.scans[number], *plan), *others)

    def _rendered(self, scan: Tensor, height: int, width: int, place: float) -> Tensor:
        if self.rendering == "placed":
            side, free = min(height, width), abs(height - width)
            before = math.floor((free + 1) * place)
            around = (before, free - before, 0, 0) if width > height else (0, 0, before, free - before)
            image = pad(plain_resize(scan, (side, side)), around)
        else:
            image = plain_resize(scan, (height, width))
        return image if self.squeezed is None else plain_resize(image, (self.squeezed, self.squeezed))


def captions_of(digit: int) -> list[str]:
    """All captions of a digit, "a handwritten seven" and "the digit 7" among them."""
    return [template.format(word=WORDS[digit], digit=digit) for template in TEMPLATES]


@cache
def scanned() -> tuple[np.ndarray, np.ndarray]:
    """Counts of ink (1797, 8, 8) in [0, 16] and the digits (1797,), which are not to be written to."""
    found = load_digits()  # parses a text each time
    return found.images, found.target


@cache
def split_indices(kind: str, seed: int, val_size: int, test_size: int) -> tuple[np.ndarray, ...]:
    """Indices for training, validation and test, which are not to be written to."""
    _, labels = scanned()
    if kind != "stratified":
        ends = [1097, 1397] if kind == "random" else [1297, 1497]
        return tuple(np.split(np.random.RandomState(seed).permutation(len(labels)), ends))
    every = np.arange(len(labels))
    rest, test = train_test_split(every, test_size=test_size, stratify=labels, random_state=seed)
    train, val = train_test_split(rest, test_size=val_size, stratify=labels[rest], random_state=seed)
    return train, val, test
