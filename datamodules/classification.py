"""Base of folders and torchvision's data sets: crops, held-out shares and the cache."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Unpack

from datamodules import transforms
from datamodules.base import ImageDataModule
from datamodules.loading.any_size import AnySize, check_any_size
from datamodules.loading.options import IMAGE_OPTIONS, ImageOptions, part, with_defaults
from datamodules.loading.seeding import Samples, with_transform
from datamodules.preprocessing import Crop, Patched
from datamodules.reading import decoders
from datamodules.reading.cache import Cache
from datamodules.transforms.any_size import Crops, Whole


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
    token_budget: int | None
    patch_size: int
    tokens: tuple[int, int] | None
    sizes_cache: str | None


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
    "token_budget": None,
    "patch_size": 16,
    "tokens": None,
    "sizes_cache": None,
}


class ClassificationDataModule(ImageDataModule):
    """Images for classification, cropped to one size, or each of its own. Subclasses say which there are.

    With a ``token_budget`` images keep their aspect, and batches are ``(list of images (C, h, w), labels (B,))``, of as
    many images as fit it. ``image_size``, ``crop_ratio`` and ``batch_size`` are then without meaning: evaluation shows
    whole images. A random resized crop has its ``ratio`` by the aspect of its image.

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
        token_budget: Images of any size: how many patches a batch has at most, on each process. None: images of one
            size, ``batch_size`` to a batch.
        patch_size: With a ``token_budget``, side of a patch in pixels, of which the images' sides become multiples; for
            a merge of 2x2 patches, of the merged ones.
        tokens: With a ``token_budget``, the fewest and the most patches of an image. Training draws the side of a
            square of as many uniformly, anew in each epoch (NaViT's resolution sampling); evaluation takes as many as
            an image has by itself, within these. None: as many as each has, also in training.
        sizes_cache: With a ``token_budget``, a folder where images' sizes, which come from the headers of all files,
            are kept for the next run. None: they are read when a loader is made.
        options: See :class:`datamodules.base.ImageDataModule`.

    Raises:
        ImportError: If ``decoder`` is a package that is not installed.
        ValueError: For values out of range; if ``cache_size`` is less than ``image_size``; for what does not go with a
            ``token_budget``.
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
        check_any_size(options)
        self.token_budget, self.patch_size = options["token_budget"], options["patch_size"]
        self.tokens, self.sizes_cache = options["tokens"], options["sizes_cache"]
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

    def _evaluated(self) -> Crop | Patched:
        if self.token_budget is not None:
            return Patched(
                channels=self.channels,
                patch_size=self.patch_size,
                tokens=self.tokens,
                interpolation=self.interpolation,
                mean=self.mean,
                std=self.std,
                binarize=self.binarize,
                seed=self.seed,
                decoder=self.decoder,
            )
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

    def _sized(self, samples: Any, split: str, **settings: Any) -> Any:
        """The same samples; with a ``token_budget``, to be made in sizes of their own."""
        if self.token_budget is not None and samples is not None and samples.sizing is None:
            samples.sizes_folder, samples.sizing = self.sizes_cache, self._sizing(split, settings)
        return samples

    def _sizing(self, split: str, settings: dict[str, Any]) -> AnySize:
        training = split == "train"
        made = Crops(self.train_options | settings) if training else Whole(self.interpolation)
        return AnySize(self.patch_size, self.tokens, made, draws=training, seed=self.seed)

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of the images in its batches; None where they differ."""
        if self.token_budget is not None:
            return None
        size = self.image_size
        return (self.channels, size, size) if isinstance(size, int) else (self.channels, *size)

    def in_stage(self, settings: dict[str, Any]) -> Callable[[Samples], Samples]:
        if self.cached is not None:
            self.cached.check(settings.get("image_size", self.image_size))
        if self.token_budget is not None:
            if "image_size" in settings:
                raise ValueError(
                    f"image_size is {settings['image_size']} in a stage with a token_budget: images have sizes of "
                    "their own, leave it out"
                )
            train_transform = transforms.train_transform(**self.train_options | settings)  # looks at the values
            return partial(_with_sizing, transform=train_transform, sizing=self._sizing("train", settings))
        return partial(with_transform, transform=transforms.train_transform(**self.train_options | settings))


def _with_sizing(samples: Samples, transform: Any, sizing: AnySize) -> Samples:
    changed: Any = with_transform(samples, transform)
    changed.sizing = sizing
    return changed
