"""Base of folders and torchvision's data sets: crops, held-out shares and the cache."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Unpack

from datamodules import transforms
from datamodules.base import ImageDataModule
from datamodules.loading.options import IMAGE_OPTIONS, ImageOptions, part, with_defaults
from datamodules.loading.seeding import Samples, with_transform
from datamodules.preprocessing import Crop
from datamodules.reading import decoders
from datamodules.reading.cache import Cache


class ClassificationOptions(ImageOptions, total=False):
    """Shares, crops and the cache; :class:`ClassificationDataModule` says what each does."""

    val_fraction: float
    test_fraction: float
    split_seed: int
    predict_root: str | None
    scale: tuple[float, float] | None
    ratio: tuple[float, float]
    padding: int
    auto_augment: str | None
    color_jitter: float
    interpolation: str
    crop_ratio: float
    decoder: decoders.Decoder
    cache: str | None
    cache_size: int


CLASSIFICATION_OPTIONS: ClassificationOptions = {
    **IMAGE_OPTIONS,
    "val_fraction": 0.1,
    "test_fraction": 0.1,
    "split_seed": 0,
    "predict_root": None,
    "scale": (0.08, 1.0),
    "ratio": (3 / 4, 4 / 3),
    "padding": 0,
    "auto_augment": None,
    "color_jitter": 0.0,
    "interpolation": "bicubic",
    "crop_ratio": 0.875,
    "decoder": "pil",
    "cache": None,
    "cache_size": 256,
}


class ClassificationDataModule(ImageDataModule):
    """Images for classification, cropped to one size. Subclasses say which there are.

    Args:
        image_size: Side in pixels, or (height, width).
        channels: 3 (RGB) or 1 (grey). Files are converted to it.
        mean: Mean of each channel, of images in [0, 1].
        std: Standard deviation of each channel, likewise.
        fill: RGB in [0, 1] of the corners that a policy's rotations and shifts leave open.
        val_fraction: Share of the training images that is held out where there is no validation split; 0: none.
        test_fraction: The same for testing.
        split_seed: Seed of these shares.
        predict_root: For prediction, a folder of images, searched at any depth, or one image.
        scale: Area of the random resized crop, as a share of the image. None: no such crop, but a plain one.
        ratio: Aspect (width / height) of the random resized crop.
        padding: Pixels of padding before a random crop, where there is no random resized one.
        auto_augment: One of timm's policies with its settings, such as ``rand-m9-mstd0.5-inc1``, ``original``, ``v0``,
            ``augmix-m3-w3`` or ``3a``; see :func:`datamodules.transforms.train_transform`.
        color_jitter: Brightness, contrast and saturation change by a factor in [1 - color_jitter, 1 + color_jitter].
        interpolation: nearest, bilinear, bicubic or lanczos, for resizing and for the policy.
        crop_ratio: Share of the image that evaluation keeps: it is resized to image_size / crop_ratio and cropped.
        decoder: "pil", or "torchcodec" (``pip install 'vision-zoo[fast]'``), which is quicker at plain JPEGs. It gives
            the same pixels, but they are then resized by torch and not by Pillow, which rounds differently.
        cache: Keeps small copies of the training images, for data that is read more often than once. "ram": in memory,
            each process for itself. A folder, of this data set's own: in files there, which processes share and the
            next run finds again; one in /dev/shm is memory as well. Copies take about cache_size² x 4 bytes each. They
            are made when fitting starts, anew if files or settings have changed. Training crops are taken from them.
            Validation and testing use copies too if they resize to no more than ``cache_size``, otherwise the files,
            as prediction always does.
        cache_size: Short side of the copies in pixels, at least ``image_size``; smaller images are kept as they are.
        options: See :class:`datamodules.base.ImageDataModule`.

    Raises:
        ImportError: If ``decoder`` is a package that is not installed.
        ValueError: For values out of range; if ``cache_size`` is less than ``image_size``.
    """

    stage_settings = transforms.TRAIN_OPTIONS

    @with_defaults(CLASSIFICATION_OPTIONS)
    def __init__(
        self,
        image_size: int | tuple[int, int],
        channels: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        fill: Sequence[float],
        **options: Unpack[ClassificationOptions],
    ) -> None:
        super().__init__(mean=mean, std=std, **part(options, ImageOptions))
        decoders.check(options["decoder"])
        self.image_size, self.channels, self.predict_root = image_size, channels, options["predict_root"]
        self.val_fraction, self.test_fraction = options["val_fraction"], options["test_fraction"]
        self.split_seed, self.decoder = options["split_seed"], options["decoder"]
        self.crop_ratio, self.interpolation = options["crop_ratio"], options["interpolation"]
        chosen = {name: value for name, value in options.items() if name in transforms.TRAIN_OPTIONS}
        self.train_options: dict[str, Any] = {"image_size": image_size, "fill": fill, **chosen}
        self.train_transform = transforms.train_transform(**self.train_options)
        self.eval_transform = self._evaluated().transform
        self.cached: Cache | None = None
        if options["cache"] is not None:
            self.cached = Cache(options["cache"], options["cache_size"], self.interpolation, self.decoder, channels)
            self.cached.check(image_size)
            covered = transforms.covered_by_evaluation(image_size, self.crop_ratio)
            self._evaluates_copies = self.cached.serves(covered)

    def _evaluated(self) -> Crop:
        return Crop(
            channels=self.channels,
            image_size=self.image_size,
            crop_ratio=self.crop_ratio,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            binarize=self.binarize,
            seed=self.seed,
            decoder=self.decoder,
        )

    def preprocessing(self) -> dict[str, Any]:
        """Plain data on what evaluation and prediction do to an image: see :mod:`datamodules.preprocessing`."""
        return self._evaluated().stated()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images in its batches."""
        size = self.image_size
        return (self.channels, size, size) if isinstance(size, int) else (self.channels, *size)

    def in_stage(self, settings: dict[str, Any]) -> Callable[[Samples], Samples]:
        if self.cached is not None:
            self.cached.check(settings.get("image_size", self.image_size))
        return partial(with_transform, transform=transforms.train_transform(**self.train_options | settings))
