"""Preprocessing of evaluation and prediction: stated as plain data, and as a function of an image of whatever origin.

    stated = data.preprocessing()  # which every checkpoint of a guarded run keeps
    preprocessing = create(stated)
    batch = preprocessing.to_float(preprocessing.collate([preprocessing.read(path) for path in paths]))

is bit for bit what a data module with these settings gives a module's ``predict_step`` of these files. The data modules
state it of themselves, and use the same transforms, collation and normalisation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from datamodules import transforms
from datamodules.loading.any_size import AnySize, FlatImages
from datamodules.loading.padding import check_sizes, normalize_padded, pad_batch
from datamodules.loading.seeding import drawn
from datamodules.reading import decoders, given
from datamodules.reading.given import Given
from datamodules.reading.pixels import Pixels, ToTensor, as_tensor, height_and_width
from datamodules.transforms import Binarization
from datamodules.transforms.any_size import Whole
from datamodules.transforms.detection import DetectionTransform, Target, complete
from datamodules.transforms.settings import check, plain


class Preprocessing:
    """Steps from an image to what a module gets of it. :func:`create` makes one of its kinds, those of this file.

    Attributes:
        channels: 1 (grey) or 3 (RGB).
        mean: Mean of each channel, of images in [0, 1]; one value serves all.
        std: Standard deviation of each channel, likewise.
        binarize: See :class:`datamodules.base.ImageDataModule`.
        transform: The step in the loader's workers, from a decoded image to uint8 (C, H, W).
    """

    kind: ClassVar[str]
    constants: ClassVar[dict[str, Any]] = {"value_range": [0, 1]}
    """Settings that all of a kind have; they are stated for other programs, which may have others."""
    augmentations: ClassVar[tuple[str, ...]] = ()
    """Names of the test-time augmentations that there are."""

    channels: int
    mean: Sequence[float]
    std: Sequence[float]
    binarize: Binarization | None
    transform: Any

    @property
    def input_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of the images of all batches; None where they differ."""
        raise NotImplementedError

    def read(self, image: Given, number: int = 0) -> Any:
        """Transforms an image to a sample, uint8 on the CPU.

        Args:
            image: A path, PIL image, array or tensor: see :func:`datamodules.reading.given.pixels`.
            number: Its place among those that are predicted, by which it is drawn where ``binarize`` says so.

        Raises:
            UnreadableImageError: If it cannot be read; the message has the path and the reason.
            TypeError: For something else than these.
            ValueError: For an array or a tensor of another shape, dtype or range.
        """
        raise NotImplementedError

    def collate(self, samples: Sequence[Any]) -> Any:
        """Puts samples together to a batch, uint8 on the CPU."""
        raise NotImplementedError

    def to_float(self, batch: Any) -> Any:
        """Converts a batch, on whatever device, to what ``predict_step`` gets: normalised, in the default dtype.

        Raises:
            ValueError: For images that are not uint8.
        """
        raise NotImplementedError

    def views(self, image: Given, number: int = 0, tta: str | None = None) -> list[Any]:
        """Samples of one image for test-time augmentation, whose predictions are then averaged.

        Args:
            image, number: See :meth:`read`.
            tta: "flip": the image and its mirror. "crops": four corners (top left, top right, bottom left, bottom
                right) and the centre of the image as it is resized before it is cropped. "crops+flip": these, and
                their mirrors. None: the image alone.

        Raises:
            ValueError: For what is not among ``augmentations``.
        """
        if tta is not None and tta not in self.augmentations:
            choices = " or ".join(self.augmentations) or "none"
            raise ValueError(f"tta is {tta!r}: expected {choices} for images of kind {self.kind}, or null")
        samples = self._crops(image, number) if tta in ("crops", "crops+flip") else [self.read(image, number)]
        return samples + [sample.flip(-1) for sample in samples] if tta in ("flip", "crops+flip") else samples

    def _crops(self, image: Given, number: int) -> list[Any]:
        raise NotImplementedError

    def restore(self, images: Tensor) -> Tensor:
        """Undoes the normalisation of images (B, C, H, W), to be looked at: float32 in [0, 1]."""
        return transforms.denormalize(images, self.mean, self.std)

    def check(self) -> None:
        """Raises ValueError for settings that contradict each other, and ImportError for a decoder that is not here."""
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                expected = "one value" if self.channels == 1 else f"{self.channels} values, or one for all channels"
                raise ValueError(f"{name} has {len(values)} values, expected {expected}")

    def stated(self) -> dict[str, Any]:
        """Settings as plain data, of which :func:`create` makes the same."""
        own = {field.name: plain(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]
        return {"kind": self.kind, **own, **self.constants}


@dataclass(kw_only=True)
class _OneSize(Preprocessing):
    """Images of one size, in batches (B, C, H, W)."""

    channels: int
    image_size: int | Sequence[int]
    interpolation: str
    mean: Sequence[float]
    std: Sequence[float]
    binarize: Binarization | None = None
    seed: int = 0
    decoder: decoders.Decoder = "pil"

    def check(self) -> None:
        super().check()
        decoders.check(self.decoder)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return height_and_width(self.image_size)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.channels, *self.size

    def read(self, image: Given, number: int = 0) -> Tensor:
        return self._drawn(self.transform(given.pixels(image, self.channels, self.decoder)), number)

    def _drawn(self, sample: Tensor, number: int) -> Tensor:
        return drawn(sample, self.seed, number) if self.binarize in ("draw", "draw_once") else sample

    def collate(self, samples: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(samples))

    def to_float(self, batch: Tensor) -> Tensor:
        threshold: Binarization | None = "threshold" if self.binarize else None  # what is drawn is 0 or 1 already
        images = transforms.finish(transforms.to_float(_of_bytes(batch)), self.mean, self.std, threshold)
        return images.to(torch.get_default_dtype())


@dataclass(kw_only=True)
class Crop(_OneSize):
    """Images resized to cover ``image_size`` / ``crop_ratio``, and their centre: folders and torchvision's sets.

    See :func:`datamodules.transforms.eval_transform`.
    """

    crop_ratio: float

    kind = "crop"
    augmentations = ("flip", "crops", "crops+flip")

    @cached_property
    def transform(self) -> ToTensor:
        return transforms.eval_transform(self.size, self.crop_ratio, self.interpolation)

    def _crops(self, image: Given, number: int) -> list[Tensor]:
        crops = transforms.crops_of_evaluation(self.size, self.crop_ratio, self.interpolation)
        return [self._drawn(crop, number) for crop in crops(given.pixels(image, self.channels, self.decoder))]


@dataclass(kw_only=True)
class Resize(_OneSize):
    """Images resized to ``image_size``, whatever their aspect: digits.

    See :func:`datamodules.transforms.plain_resize`.
    """

    kind = "resize"
    augmentations = ("flip",)

    @cached_property
    def transform(self) -> ToTensor:
        return partial(transforms.plain_resize, size=self.size, interpolation=self.interpolation)


@dataclass(kw_only=True)
class Patched(Preprocessing):
    """Images of sizes of their own, to multiples of a patch, in lists: classification by a budget of tokens.

    See :class:`datamodules.loading.any_size.AnySize`. A batch is a list of images (C, h, w).
    """

    channels: int
    patch_size: int
    tokens: Sequence[int] | None = None
    interpolation: str
    mean: Sequence[float]
    std: Sequence[float]
    binarize: Binarization | None = None
    seed: int = 0
    decoder: decoders.Decoder = "pil"

    kind = "patched"

    def check(self) -> None:
        super().check()
        decoders.check(self.decoder)

    @property
    def input_shape(self) -> None:
        return None

    def transform(self, image: Pixels) -> Tensor:
        tokens = None if self.tokens is None else (self.tokens[0], self.tokens[1])
        return AnySize(self.patch_size, tokens, Whole(self.interpolation)).evaluated(image)

    def read(self, image: Given, number: int = 0) -> Tensor:
        sample = self.transform(given.pixels(image, self.channels, self.decoder))
        return drawn(sample, self.seed, number) if self.binarize in ("draw", "draw_once") else sample

    def collate(self, samples: Sequence[Tensor]) -> FlatImages:
        return FlatImages.of(samples)

    def to_float(self, batch: FlatImages) -> list[Tensor]:
        threshold: Binarization | None = "threshold" if self.binarize else None
        row = transforms.to_float(_of_bytes(batch.pixels))[None, :, None]
        finished = transforms.finish(row, self.mean, self.std, threshold)[0, :, 0]
        return batch.views(finished.to(torch.get_default_dtype()))


@dataclass(kw_only=True)
class Fit(Preprocessing):
    """Images of three channels, resized by their short and long side and padded to one size: detection.

    Samples are ``(image, target)``, batches ``(images (B, 3, H, W), targets)``. A target is a dictionary of the image's
    number, ``image_id``, and of its height and width as it was, ``orig_size``, and in the batch, ``size``.
    """

    image_size: int | None
    max_size: int | None
    pad_multiple: int
    size_buckets: Sequence[Sequence[int]] | None = None
    mean: Sequence[float]
    std: Sequence[float]

    kind = "fit"
    constants: ClassVar[dict[str, Any]] = {"channels": 3, "interpolation": "bilinear", "value_range": [0, 1]}
    channels = 3
    binarize = None

    def check(self) -> None:
        super().check()
        check_sizes(self._sizes, self.max_size)
        _ = self.transform  # which looks at both sides

    @property
    def input_shape(self) -> tuple[int, int, int] | None:
        return (self.channels, *self._sizes[0]) if len(self._sizes) == 1 else None

    @cached_property
    def transform(self) -> DetectionTransform:
        return DetectionTransform(image_size=self.image_size, max_size=self.max_size)

    @property
    def _sizes(self) -> list[tuple[int, int]]:
        return [(height, width) for height, width in self.size_buckets or ()]

    def read(self, image: Given, number: int = 0) -> tuple[Tensor, Target]:
        return complete(as_tensor(given.pixels(image, self.channels)), {}, number, self.transform)

    def collate(self, samples: Sequence[tuple[Tensor, Target]]) -> tuple[Tensor, list[Target]]:
        return pad_batch(samples, self.pad_multiple, self._sizes)

    def to_float(self, batch: tuple[Tensor, Sequence[Target]]) -> tuple[Tensor, Sequence[Target]]:
        images, targets = batch
        return normalize_padded(_of_bytes(images), targets, self.mean, self.std).to(torch.get_default_dtype()), targets


KINDS: dict[str, type[Preprocessing]] = {kind.kind: kind for kind in (Crop, Resize, Fit, Patched)}


def create(stated: Mapping[str, Any]) -> Preprocessing:
    """Creates the preprocessing that a data module has stated.

    Args:
        stated: What its ``preprocessing()`` gave, from a checkpoint or a JSON file as well. ``binarize``, ``seed``,
            ``decoder`` and ``size_buckets`` may be missing.

    Raises:
        ImportError: If its ``decoder`` is not installed here.
        ValueError: For an unknown or a missing key, and for a value that is not possible.
    """
    if not isinstance(stated, Mapping):
        raise ValueError(f"preprocessing is a {type(stated).__name__}: expected a mapping, as data modules state it")
    name = stated.get("kind")
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"preprocessing: kind is {name!r}, expected {', '.join(KINDS)}")
    kind = KINDS[name]
    required = {field.name: field.default is MISSING for field in fields(kind)}  # type: ignore[arg-type]
    if missing := [key for key, needed in required.items() if needed and key not in stated]:
        raise ValueError(f"preprocessing of kind {name} lacks {', '.join(missing)}")
    settings = {key: value for key, value in stated.items() if key != "kind"}
    if unknown := [key for key in settings if key not in required and key not in kind.constants]:
        known = ", ".join([*required, *kind.constants])
        raise ValueError(f"preprocessing of kind {name} has the unknown key {unknown[0]!r}: expected {known}")
    try:
        for key, value in settings.items():
            check(name, key, value, kind.constants.get(key))
        made = kind(**{key: value for key, value in settings.items() if key in required})
        made.check()
    except ValueError as error:
        raise ValueError(f"preprocessing of kind {name}: {error}") from error
    return made


def _of_bytes(images: Tensor) -> Tensor:
    if images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}: expected uint8 from 0 to 255, as read and collate make them")
    return images
