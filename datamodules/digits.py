"""1,797 handwritten digits that come with scikit-learn: real data, no download.

Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998: 8x8 counts of ink, 0 to 16, by 43 people.
Accuracies on them are not comparable with MNIST's.

There are three splits; tests hold the checksums of the first two.

- ``stratified``: 1,077 / 180 / 540 images for training, validation and testing, the same share of every digit in each.
  It is scikit-learn's stratified shuffle, twice, with ``random_state=split_seed``. Accuracies are on this one.
- ``digits8x8-bin-v1``, for densities of binary images (``binarize="threshold"``: 8 counts or more): 1,297 / 200 / 300
  images, the consecutive parts of ``numpy.random.RandomState(0).permutation(1797)``.
- ``random``: 1,097 / 300 / 400, the consecutive parts of that permutation with ``split_seed`` for its seed, to be
  repeated with several.
"""

from collections.abc import Callable
from functools import cache, cached_property, partial
from typing import Any, Literal, Unpack, get_args

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC
from torch import Tensor

from datamodules import transforms
from datamodules.base import ImageDataModule
from datamodules.loading.captions import About, Captioned, about
from datamodules.loading.options import IMAGE_OPTIONS, ImageOptions, with_defaults
from datamodules.loading.seeding import Samples
from datamodules.preprocessing import Resize
from datamodules.reading.files import ImageFiles
from datamodules.reading.listing import Split

SplitName = Literal["stratified", "digits8x8-bin-v1", "random"]
LabelKind = Literal["digit", "attributes", "captions"]

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a handwritten {word}",
    "a handwritten {digit}",
    "the digit {digit}",
    "the number {word}",
    "a scan of the digit {word}",
)
"""Captions of a digit, by its word or its numeral."""

ATTRIBUTES = {
    "prime": (2, 3, 5, 7),
    "multiple of 3": (0, 3, 6, 9),
    "square": (0, 1, 4, 9),
    "power of 2": (1, 2, 4, 8),
    "triangular": (0, 1, 3, 6),
    "at least 7": (7, 8, 9),
}
"""Digits that have each attribute: three or four of ten, and each digit has one to three attributes."""


class DigitSamples:
    """Digits of one split, as images (1, S, S) with white ink on black, and their labels.

    Images are uint8, or floats in which white is 1; labels (N,) are integers, or (N, labels) 0 and 1.
    """

    random = False

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


def captions_of(digit: int) -> list[str]:
    """All captions of a digit, "a handwritten seven" and "the digit 7" among them."""
    return [template.format(word=WORDS[digit], digit=digit) for template in TEMPLATES]


class DigitsDataModule(Captioned, ImageDataModule):
    """Handwritten digits, bundled with scikit-learn. Batches ``(images (B, 1, S, S), labels (B,))``.

    With several labels an image, ``labels`` are (B, labels) of 0 and 1, for a classifier with ``multi_label``. With
    captions, batches are ``(images, [{"captions": ["a handwritten seven"], "image_id": 12, "label": 7}, ...])``; in
    training each image has one caption, drawn anew in every epoch, in evaluation all of them.

    Args:
        image_size: Side S of the images in pixels. 8 is what was scanned; other sizes are resized from it, bicubic.
        split: How the digits are split: see the top of this file.
        split_seed: Seed of the stratified and of the random split. Stratified with 0 is the published one, which
            figures of this project are on unless they say otherwise.
        labels_per_class: Train on this many images of each digit only, as if no more were labelled. None: on all.
        labels_seed: Seed of which they are.
        predict_root: For prediction, a folder of images (or one image) instead of the test split: bright strokes on
            black, resized to S. No noise is added to them.
        labels: "digit": each image has one label. A list of digits: a label for each of them, 0 or 1, and an image of
            another digit has none: with [8, 5], labels (B, 2). "attributes": six labels that overlap, such as prime
            and square (``ATTRIBUTES`` in this file). "captions": texts beside each image (``TEMPLATES``), for aligning
            images with language; ``classes`` are the digits' words, as zero-shot classification names them.
        noise: Standard deviation of Gaussian noise on each of the 8x8 scanned pixels, as a share of white. It belongs
            to the data, not to augmentation: a digit has the same noise in every epoch, split and size. Such images
            travel as floats, since noise leaves the range of 8 bits.
        noise_seed: Seed of that noise.
        mean: Mean of the pixels, of images in [0, 1]; the training pixels' without noise unless given.
        std: Their standard deviation, likewise.
        options: See :class:`datamodules.base.ImageDataModule`.
    """

    in_memory = True
    stage_settings = ("image_size",)
    val_size, test_size = 180, 540

    @with_defaults(IMAGE_OPTIONS)
    def __init__(
        self,
        image_size: int = 8,
        split: SplitName = "stratified",
        split_seed: int = 0,
        labels_per_class: int | None = None,
        labels_seed: int = 0,
        predict_root: str | None = None,
        *,
        labels: LabelKind | list[int] = "digit",
        noise: float = 0.0,
        noise_seed: int = 0,
        mean: tuple[float, ...] = (0.306,),
        std: tuple[float, ...] = (0.376,),
        **options: Unpack[ImageOptions],
    ) -> None:
        super().__init__(mean=mean, std=std, **options)
        _check_side(image_size)
        if split not in get_args(SplitName):
            raise ValueError(f"unknown split {split!r}: expected one of {', '.join(get_args(SplitName))}")
        if split == "digits8x8-bin-v1" and split_seed != 0:
            raise ValueError(f"split_seed is {split_seed}, but {split} is one split: set split_seed to 0")
        if labels_per_class is not None and not 1 <= labels_per_class <= 100:
            raise ValueError(f"labels_per_class is {labels_per_class}: expected 1 to 100, or null for all")
        if not 0 <= noise < float("inf"):
            raise ValueError(f"noise is {noise}: expected 0 or more, as a share of white")
        if noise and self.binarize is not None:
            raise ValueError(f"noise is {noise} with binarize {self.binarize}: expected 0, or no binarize (null)")
        self.image_size, self.predict_root = image_size, predict_root
        self.split, self.split_seed = split, split_seed
        self.labels_per_class, self.labels_seed = labels_per_class, labels_seed
        self.labels, self.classes = labels, _class_names(labels)
        self.noise, self.noise_seed, self.float_images = noise, noise_seed, noise > 0

    def _evaluated(self) -> Resize:
        return Resize(
            channels=1,
            image_size=self.image_size,
            interpolation="bicubic",
            mean=self.mean,
            std=self.std,
            binarize=self.binarize,
            seed=self.seed,
        )

    def preprocessing(self) -> dict[str, Any]:
        """Plain data on what evaluation and prediction do to an image: see :mod:`datamodules.preprocessing`."""
        return self._evaluated().stated()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images in its batches."""
        return 1, self.image_size, self.image_size

    def samples(self, split: Split) -> Samples | None:
        if split == "predict":
            return (
                ImageFiles.under(self.predict_root, self._evaluated().transform, channels=1)
                if self.predict_root
                else None
            )
        return self._samples_of(*self._arrays, split)

    def _samples_of(self, images: Tensor, digits: Tensor, split: Split) -> DigitSamples:
        if self.labels == "captions":
            return CaptionedDigits(images, digits, self.indices(split), training=split == "train")
        return DigitSamples(images, self._labels_of(digits), self.indices(split))

    def captions(self) -> list[str]:
        """All captions of the training images, one after the other, for a tokenizer to be fitted to.

        Raises:
            ValueError: If the images have labels instead.
        """
        if self.labels != "captions":
            raise ValueError(f"labels is {self.labels!r}, so that these digits have no captions: set it to captions")
        return [caption for digit in self.train_labels().tolist() for caption in captions_of(digit)]

    def in_stage(self, settings: dict[str, Any]) -> Callable[[Samples], Samples]:
        size = settings.get("image_size", self.image_size)
        _check_side(size)
        return partial(self._resized, size=size)

    def _resized(self, samples: Samples, size: int) -> Samples:
        """The training samples at another size: from the scans, not from what the samples were resized to."""
        return self._samples_of(*self._arrays_at(size), "train")

    def _labels_of(self, digits: Tensor) -> Tensor:
        """Labels of some digits (N,): themselves, or (N, labels) int64 of 0 and 1."""
        if self.labels in ("digit", "captions"):
            return digits
        has = ATTRIBUTES.values() if self.labels == "attributes" else [(digit,) for digit in self.labels]
        return torch.stack([torch.isin(digits, torch.tensor(some)) for some in has], dim=1).long()

    def indices(self, split: Split) -> np.ndarray:
        """Indices of a split among the 1,797 digits, ascending."""
        train, val, test = _split(self.split, self.split_seed, self.val_size, self.test_size)
        if split == "train" and self.labels_per_class is not None:
            generator = np.random.default_rng(self.labels_seed)
            of_each = [train[_digits()[1][train] == digit] for digit in range(10)]
            train = np.concatenate([generator.permutation(some)[: self.labels_per_class] for some in of_each])
        return np.sort({"train": train, "val": val, "test": test}[split])

    def baselines(self) -> dict[str, float]:
        """Test accuracy of what a deep network has to beat here, on the raw 64 counts and the same images.

        That is an RBF-kernel SVM, whose kernel widens with the pixels' variance where there is noise, and, where few
        images are labelled, the nearest of them. With several labels an image, there is a machine for each, and their
        accuracies are averaged.
        """
        counts = _digits()[0].reshape(-1, 64)
        gamma = 0.001 * counts.var() / (counts.var() + (16 * self.noise) ** 2)
        if self.noise:
            counts = 16 * self._scans().flatten(1).numpy()
        labels = self._labels_of(self._arrays[1]).reshape(len(counts), -1).numpy()
        train, test = self.indices("train"), self.indices("test")
        machines: dict[str, Any] = {"RBF-kernel SVM": SVC(C=10, gamma=gamma)}
        if self.labels_per_class is not None:
            machines = {"1-nearest neighbour": KNeighborsClassifier(1), **machines}
        return {
            name: float(
                np.mean([machine.fit(counts[train], one[train]).score(counts[test], one[test]) for one in labels.T])
            )
            for name, machine in machines.items()
        }

    def nats(self) -> dict[str, float]:
        """Test log-likelihood, in nats per image, of what a deep density has to beat on the same binary images.

        It is exact: independent pixels, their means fitted to the training images by the rule of succession.
        ``benchmarks/mixture.py`` fits a stronger density, which takes longer than a model trains.

        Raises:
            ValueError: Unless the images are as scanned, and binarised by threshold (which goes with no noise).
        """
        if self.image_size != 8 or self.binarize != "threshold":
            raise ValueError(
                f"nats has figures for 8x8 images of 0 and 1 only, but image_size is {self.image_size} and binarize "
                f"{self.binarize}: set them to 8 and threshold"
            )
        train, test = self._binary("train"), self._binary("test")
        means = (train.sum(0) + 1) / (len(train) + 2)
        independent = torch.where(test.bool(), means, 1 - means).log().sum(1)
        return {"independent pixels": float(independent.mean())}

    def _binary(self, split: Split) -> Tensor:
        """(N, 64) the images of a split as 0 and 1."""
        return transforms.binarize(transforms.to_float(self._arrays[0][self.indices(split)])).flatten(1)

    @cached_property
    def _arrays(self) -> tuple[Tensor, Tensor]:
        return self._arrays_at(self.image_size)

    def _arrays_at(self, size: int) -> tuple[Tensor, Tensor]:
        return transforms.plain_resize(self._scans(), (size, size)), torch.tensor(_digits()[1])

    def _scans(self) -> Tensor:
        """All digits as scanned, (1797, 1, 8, 8): uint8, or with noise float32 in which white is 1."""
        counts = torch.tensor(_digits()[0])[:, None]
        if not self.noise:
            return (counts * (255 / 16)).round().to(torch.uint8)
        noise = np.random.default_rng(self.noise_seed).standard_normal(counts.shape)
        return (counts / 16 + self.noise * torch.from_numpy(noise)).float()


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Counts of ink (1797, 8, 8) in [0, 16] and the digits (1797,), which are not to be written to."""
    found = load_digits()  # parses a text each time
    return found.images, found.target


@cache
def _split(kind: str, seed: int, val_size: int, test_size: int) -> tuple[np.ndarray, ...]:
    """Indices for training, validation and test, which are not to be written to."""
    _, labels = _digits()
    if kind != "stratified":
        ends = [1097, 1397] if kind == "random" else [1297, 1497]
        return tuple(np.split(np.random.RandomState(seed).permutation(len(labels)), ends))
    every = np.arange(len(labels))
    rest, test = train_test_split(every, test_size=test_size, stratify=labels, random_state=seed)
    train, val = train_test_split(rest, test_size=val_size, stratify=labels[rest], random_state=seed)
    return train, val, test


def _check_side(size: Any) -> None:
    if not isinstance(size, int):
        raise ValueError(f"image_size is {size}: expected one side in pixels, since digits are square")
    if size < 1:
        raise ValueError(f"image_size is {size}: expected at least 1")


def _class_names(labels: Any) -> list[str]:
    """Names of the labels."""
    if labels in ("attributes", "captions"):
        return list(ATTRIBUTES if labels == "attributes" else WORDS)
    digits = list(range(10)) if labels == "digit" else labels
    listed = isinstance(digits, list | tuple) and len(digits) == len({*digits}) > 0
    if not listed or not set(digits) <= set(range(10)):
        kinds = ", ".join(get_args(LabelKind))
        raise ValueError(f"labels is {labels!r}: expected {kinds}, or a list of different digits from 0 to 9")
    return [str(digit) for digit in digits]
