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
from functools import cached_property, partial
from typing import Any, Literal, Unpack, get_args

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC
from torch import Tensor

from datamodules import transforms
from datamodules.base import ImageDataModule
from datamodules.digit_samples import (
    WORDS,
    CaptionedDigits,
    DigitSamples,
    DigitSizes,
    Rendering,
    captions_of,
    scanned,
    split_indices,
)
from datamodules.loading.any_size import AnySize, check_any_size
from datamodules.loading.captions import Captioned
from datamodules.loading.mixed_sizes import check_mixed_sizes
from datamodules.loading.options import IMAGE_OPTIONS, ImageOptions, with_defaults
from datamodules.loading.seeding import Samples
from datamodules.preprocessing import Patched, Resize
from datamodules.reading.files import ImageFiles
from datamodules.reading.listing import Split
from datamodules.transforms.any_size import Whole

SplitName = Literal["stratified", "digits8x8-bin-v1", "random"]
LabelKind = Literal["digit", "attributes", "captions"]

ATTRIBUTES = {
    "prime": (2, 3, 5, 7),
    "multiple of 3": (0, 3, 6, 9),
    "square": (0, 1, 4, 9),
    "power of 2": (1, 2, 4, 8),
    "triangular": (0, 1, 3, 6),
    "at least 7": (7, 8, 9),
}
"""Digits that have each attribute: three or four of ten, and each digit has one to three attributes."""


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
        sizes: Least and greatest side of images of mixed sizes, in pixels: that of a square of their area. It is drawn
            uniformly from these, by a digit's key in training, anew in each epoch, and by its number among the 1,797 in
            evaluation, the same in every run. None: all images have ``image_size``. Without a ``token_budget`` they are
            then resized to ``image_size``, squares of which nothing says what their size and aspect were.
        aspects: Least and greatest width by height of these, drawn likewise, on a logarithmic scale.
        eval_sizes: The same as ``sizes`` in validation and testing, for sizes that training does not show. None: these.
        eval_aspects: The same as ``aspects`` for validation and testing. None: those.
        rendering: Of these. "stretched": the scan is resized to the whole image, as wide as that. "placed": the digit
            keeps its shape, as large as fits, and lies anywhere along the longer side, on black.
        token_budget: How many patches a batch has at most, on each process; batches are then ``(list of images
            (1, h, w), labels)``, of as many images as fit it. None: ``batch_size`` images of one size.
        patch_size: With a ``token_budget``, side of a patch in pixels, to multiples of which the sides are rounded.
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
        sizes: tuple[int, int] | None = None,
        aspects: tuple[float, float] = (1.0, 1.0),
        eval_sizes: tuple[int, int] | None = None,
        eval_aspects: tuple[float, float] | None = None,
        rendering: Rendering = "stretched",
        token_budget: int | None = None,
        patch_size: int = 4,
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
        check_any_size({**options, "token_budget": token_budget, "patch_size": patch_size})
        check_mixed_sizes(sizes, aspects, eval_sizes, eval_aspects, rendering=rendering != "stretched")
        if rendering not in get_args(Rendering):
            raise ValueError(f"unknown rendering {rendering!r}: expected {' or '.join(get_args(Rendering))}")
        self.sizes, self.aspects, self.rendering = sizes, aspects, rendering
        self.eval_sizes, self.eval_aspects = eval_sizes or sizes, eval_aspects or aspects
        self.token_budget, self.patch_size = token_budget, patch_size

    def _evaluated(self) -> Resize | Patched:
        if self.token_budget is not None:
            return Patched(
                channels=1,
                patch_size=self.patch_size,
                interpolation="bicubic",
                mean=self.mean,
                std=self.std,
                binarize=self.binarize,
                seed=self.seed,
            )
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
    def image_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of the images in its batches; None where they differ."""
        return None if self.token_budget is not None else (1, self.image_size, self.image_size)

    def samples(self, split: Split) -> Samples | None:
        if split == "predict":
            if self.predict_root is None:
                return None
            files = ImageFiles.under(self.predict_root, self._evaluated().transform, channels=1)
            if self.token_budget is not None:
                files.sizing = AnySize(self.patch_size, None, Whole("bicubic"))
            return files
        samples = self._samples_of(*self._arrays, split)
        if self.sizes is not None or self.token_budget is not None:
            numbers = None if split == "train" else self.indices(split)
            samples.scans, samples.sizing = self._scans()[self.indices(split)], self._sizing(numbers)
        return samples

    def _sizing(self, numbers: np.ndarray | None) -> DigitSizes:
        """The rendering of digits, in training without their numbers."""
        sizes = self.sizes if numbers is None else self.eval_sizes
        packed = self.token_budget is not None
        return DigitSizes(
            sizes or (self.image_size, self.image_size),
            self.aspects if numbers is None else self.eval_aspects,
            self.rendering,
            self.patch_size if packed else 1,
            None if packed else self.image_size,
            numbers,
            self.seed,
        )

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
        if self.sizes is not None or self.token_budget is not None:
            raise ValueError(f"image_size is {size} in a stage with sizes or a token_budget: leave it out")
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
        train, val, test = split_indices(self.split, self.split_seed, self.val_size, self.test_size)
        if split == "train" and self.labels_per_class is not None:
            generator = np.random.default_rng(self.labels_seed)
            of_each = [train[scanned()[1][train] == digit] for digit in range(10)]
            train = np.concatenate([generator.permutation(some)[: self.labels_per_class] for some in of_each])
        return np.sort({"train": train, "val": val, "test": test}[split])

    def baselines(self) -> dict[str, float]:
        """Test accuracy of what a deep network has to beat here, on the raw 64 counts and the same images.

        That is an RBF-kernel SVM, whose kernel widens with the pixels' variance where there is noise, and, where few
        images are labelled, the nearest of them. With several labels an image, there is a machine for each, and their
        accuracies are averaged.
        """
        counts = scanned()[0].reshape(-1, 64)
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
        return transforms.plain_resize(self._scans(), (size, size)), torch.tensor(scanned()[1])

    def _scans(self) -> Tensor:
        """All digits as scanned, (1797, 1, 8, 8): uint8, or with noise float32 in which white is 1."""
        counts = torch.tensor(scanned()[0])[:, None]
        if not self.noise:
            return (counts * (255 / 16)).round().to(torch.uint8)
        noise = np.random.default_rng(self.noise_seed).standard_normal(counts.shape)
        return (counts / 16 + self.noise * torch.from_numpy(noise)).float()


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
