"""Base of all detection data sets: images and boxes together, and batches of images that differ in size.

    raw_samples(split) -> (image, target) -> DetectionTransform, in the worker -> pad_batch
                       -> on_after_batch_transfer: float32, normalised, padding 0

A target is a dict. A data set's own file gives ``boxes`` float32 (n, 4), xyxy in pixels, and ``labels`` int64 (n,) from
0, and may give ``iscrowd`` bool (n,), ``area`` float32 (n,) in pixels squared, ``image_id``, and other tensors with an
entry for each box. A batch's targets have all of these, and ``size`` and ``orig_size``, (height, width) of the image in
the batch without its padding, and of the image as it was. Those of training have ``scale``, pixels of the image in the
batch by one of the image as it was, also where a part is cropped; and with ``valid_ranges`` ``in_range`` bool (n,),
which objects are learned in this batch. Boxes are pixels of the image in the batch, areas of the image as it was.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any, Protocol, Unpack

import numpy as np
import torch
from torch import Tensor

from datamodules.base import IMAGENET_MEAN, IMAGENET_STD, ImageDataModule
from datamodules.loading.options import LoaderOptions, part, with_defaults
from datamodules.loading.padding import ExactTargets, check_sizes, normalize_padded, with_exact_targets
from datamodules.loading.seeding import Samples
from datamodules.preprocessing import Fit
from datamodules.reading.listing import Split
from datamodules.transforms.detection import DetectionTransform, Target, complete
from datamodules.transforms.scales import Range, ShortSides


class RawSamples(Protocol):
    """Samples of one split as they are: ``raw[index]`` is ``(image, target)``, or None if unreadable.

    Images are uint8 tensors (3, h, w). Without a target, an image is one to predict. Optional attributes: ``names``,
    ``unreadable`` and ``random`` as :class:`datamodules.loading.seeding.Samples` has them; ``sizes`` (N, 2), (height,
    width) of each image, for ``group_by_aspect``.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


class DetectionSamples:
    """A data set's samples, transformed, with all that a target may say."""

    def __init__(self, raw: RawSamples, transform: DetectionTransform) -> None:
        self.raw, self.transform = raw, transform
        self.names, self.unreadable = getattr(raw, "names", None), getattr(raw, "unreadable", None)
        self.random = transform.training or getattr(raw, "random", False)

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, index: int) -> tuple[Tensor, Target] | None:
        sample = self.raw[index]
        if sample is None:
            return None
        image, target = sample if isinstance(sample, tuple) else (sample, {})
        return complete(image, target, index, self.transform)

    def in_batch(self, seed: int) -> "DetectionSamples":
        """The samples as they are made in one batch: in multi-scale training, of the short side drawn for it."""
        return DetectionSamples(self.raw, self.transform.in_batch(seed))


class BoxOptions(LoaderOptions, total=False):
    """Augmentation of images with boxes, and padding; :class:`DetectionDataModule` says what each does."""

    short_sides: ShortSides | None
    valid_ranges: Sequence[Range] | None
    hflip: float
    scale_jitter: tuple[float, float] | None
    iou_crop: float
    photometric: float
    pad_multiple: int


class DetectionOptions(BoxOptions, total=False):
    """Besides, sizes and normalisation; :class:`DetectionDataModule` says what each does."""

    mean: Sequence[float]
    std: Sequence[float]
    image_size: int | None
    max_size: int | None
    square: int | None
    size_buckets: Sequence[tuple[int, int]] | None
    group_by_aspect: bool


BOX_OPTIONS: BoxOptions = {
    "batch_size": 16,
    "num_workers": None,
    "seed": 0,
    "drop_last": True,
    "short_sides": None,
    "valid_ranges": None,
    "hflip": 0.0,
    "scale_jitter": None,
    "iou_crop": 0.0,
    "photometric": 0.0,
    "pad_multiple": 32,
}
DETECTION_OPTIONS: DetectionOptions = {
    **BOX_OPTIONS,
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
    "image_size": None,
    "max_size": None,
    "square": None,
    "size_buckets": None,
    "group_by_aspect": False,
}


class DetectionDataModule(ImageDataModule):
    """Loaders for detection. Batches ``(images (B, 3, H, W), targets)``, see the top of this file.

    ``classes`` and ``category_ids`` give, by label, a class's name and what a results file says instead of the label;
    ``size_ranges`` areas by name, (low, high) in pixels squared, for average precision by size (None: COCO's).

    Args:
        batch_size: Images per process and step.
        image_size: Short side in pixels that images are resized to. None: they stay as they are.
        max_size: What the long side may have at most; the short one is then shorter. None: anything.
        short_sides: Multi-scale training: each training batch has a short side drawn from these, the same on all
            ranks: a list, or ``{low: 480, high: 800, step: 32}``, both ends included. ``image_size`` is then that of
            evaluation.
        valid_ranges: SNIP (Singh and Davis 2018): for each of ``short_sides``, a list, the (least, greatest) size of an
            object that is learned in its batches, both included, null for no end; others are ignored there, neither
            learned nor background. A size is the square root of the box's area in pixels of the image as it was, of
            what crops have left of the box. SNIP's scales on COCO, with the ranges of its successor SNIPER:
            ``image_size: 800, max_size: 2000, short_sides: [480, 800, 1400], valid_ranges: [[120, null], [32, 150],
            [0, 80]]``. None: all objects are learned at every short side.
        square: Side of a square that all images are resized to fit, and padded to, so that all batches have one shape.
            In place of ``image_size``, ``max_size`` and ``short_sides``.
        hflip: Probability of a horizontal flip.
        scale_jitter: In training, (low, high): an image is resized to a size that is larger by a factor uniform in this
            range, and cropped at random to what it would have been, if that is less; where ``max_size`` is
            ``image_size``, to a square of that side (large-scale jitter, Ghiasi et al. 2021). None: none.
        iou_crop: In training, probability of SSD's random crop, which leaves one image of seven as it is.
        photometric: In training, probability of each of brightness, contrast, saturation, hue and a swap of channels to
            change.
        pad_multiple: A batch's height and width are rounded up to a multiple of this.
        size_buckets: (height, width) that batches are padded to, the smallest that fits, so that a compiled model sees
            few shapes; in place of ``pad_multiple``. One of them has to hold ``max_size`` in both directions.
        group_by_aspect: Training batches are of wide images or of others, as far as possible, which saves padding.
        options: See :class:`datamodules.base.ImageDataModule`.

    Raises:
        ValueError: For values out of range, or that contradict each other.
    """

    stage_settings = (
        *("image_size", "max_size", "short_sides", "valid_ranges"),
        *("hflip", "scale_jitter", "iou_crop", "photometric"),
    )
    category_ids: list[int]
    size_ranges: dict[str, tuple[float, float]] | None = None

    @with_defaults(DETECTION_OPTIONS)
    def __init__(
        self,
        **options: Unpack[DetectionOptions],
    ) -> None:
        super().__init__(mean=options["mean"], std=options["std"], **part(options, LoaderOptions))
        image_size, max_size, square = options["image_size"], options["max_size"], options["square"]
        short_sides, size_buckets = options["short_sides"], options["size_buckets"]
        if options["pad_multiple"] < 1:
            raise ValueError(f"pad_multiple is {options['pad_multiple']}: expected at least 1")
        if square is not None:
            given = {
                "image_size": image_size,
                "max_size": max_size,
                "short_sides": short_sides,
                "size_buckets": size_buckets,
            }
            if names := [name for name, value in given.items() if value is not None]:
                raise ValueError(f"square and {' and '.join(names)} are given: expected one way to say the size")
            image_size = max_size = square
            size_buckets = [(square, square)]
        self.sizes = [(int(height), int(width)) for height, width in size_buckets or ()]
        self.train_options: dict[str, Any] = {
            **{name: value for name, value in options.items() if name in self.stage_settings},
            "image_size": image_size,
            "max_size": max_size,
        }
        self.train_transform = self._training(self.train_options)
        self.pad_multiple, self.group_by_aspect = options["pad_multiple"], options["group_by_aspect"]
        self.eval_transform = self._evaluated().transform
        self._samples: dict[Split, DetectionSamples | None] = {}

    def _evaluated(self) -> Fit:
        return Fit(
            image_size=self.train_options["image_size"],
            max_size=self.train_options["max_size"],
            pad_multiple=self.pad_multiple,
            size_buckets=self.sizes or None,
            mean=self.mean,
            std=self.std,
        )

    @property
    def learned_ranges(self) -> dict[int, Range] | None:
        """The (least, greatest) size of an object that is learned, by the short side of its image; None: all are."""
        sides, ranges = self.train_transform.short_sides, self.train_transform.valid_ranges
        return dict(zip(sides, ranges, strict=True)) if ranges else None

    def preprocessing(self) -> dict[str, Any]:
        """Plain data on what evaluation and prediction do to an image: see :mod:`datamodules.preprocessing`."""
        return self._evaluated().stated()

    def raw_samples(self, split: Split) -> RawSamples | None:
        """The samples of one split as they are, or None if there is no such split. Subclasses define it."""
        raise NotImplementedError

    def samples(self, split: Split) -> DetectionSamples | None:
        if split not in self._samples:
            raw = self.raw_samples(split)
            transform = self.train_transform if split == "train" else self.eval_transform
            self._samples[split] = None if raw is None else DetectionSamples(raw, transform)
        return self._samples[split]

    def in_stage(self, settings: dict[str, Any]) -> Callable[[Any], Samples]:
        transform = self._training(self.train_options | settings)
        return partial(_transformed, transform=transform)

    def _training(self, options: dict[str, Any]) -> DetectionTransform:
        check_sizes(self.sizes, options["max_size"])
        return DetectionTransform(training=True, **options)

    def groups(self, samples: Samples) -> np.ndarray | None:
        if not self.group_by_aspect:
            return None
        sizes = getattr(getattr(samples, "raw", None), "sizes", None)
        if sizes is None:
            raise ValueError("group_by_aspect: the training data does not say the sizes of its images; set it to false")
        return sizes[:, 1] > sizes[:, 0]

    def collate(self) -> Callable[[list[Any]], Any]:
        collate = self._evaluated().collate
        probe = torch.zeros((), dtype=torch.float32)
        if self.trainer is None or self.trainer.precision_plugin.convert_input(probe).dtype == torch.float32:
            return collate
        return partial(with_exact_targets, collate)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """uint8 images (B, 3, H, W) become normalised floats of the Trainer's precision, 0 where they are padded.

        Targets stay as they are: boxes are float32 whatever the precision.
        """
        if self.trainer and self.trainer.training and self.trainer.is_last_batch:
            self.report_unreadable(self._samples)
        images, targets = batch
        if isinstance(targets, ExactTargets):
            targets = targets.targets
            batch = images, targets
        if images.dtype != torch.uint8:
            return batch
        return self.in_precision(normalize_padded(images, targets, self.mean, self.std)), targets

    # What a checkpoint keeps: which label is which class.

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"category_ids": getattr(self, "category_ids", None)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a checkpoint's classes where there are none yet, as in prediction away from the data.

        Raises:
            ValueError: If a label means something else in the checkpoint than in this data, for a module that does not
                look at the names of classes itself.
        """
        saved, ids = state_dict.get("classes"), state_dict.get("category_ids")
        if self.classes is None and ids is not None:
            self.category_ids = ids
        super().load_state_dict(state_dict)
        if hasattr(getattr(self.trainer, "lightning_module", None), "classes"):
            return
        ours, theirs = _table(self.classes, getattr(self, "category_ids", None)), _table(saved, ids)
        if saved is not None and ours != theirs:
            label = next(i for i, (a, b) in enumerate(zip_longest(ours, theirs)) if a != b)
            a, b = (table[label] if label < len(table) else "nothing" for table in (ours, theirs))
            raise ValueError(
                f"the checkpoint's {len(theirs)} classes are not this data's {len(ours)}: label {label} is {b} there "
                f"and {a} here. To start from its weights with other classes, give it to the model as weights"
            )

    # What could not be read is reported after each training epoch and at the end of a run, as for folders.

    def teardown(self, stage: str) -> None:
        self.report_unreadable(self._samples)


def _transformed(samples: DetectionSamples, transform: DetectionTransform) -> DetectionSamples:
    return DetectionSamples(samples.raw, transform)


def _table(classes: Sequence[str] | None, category_ids: Sequence[int] | None) -> list[str]:
    """Name and category id of each class, by label, for comparing and for a message."""
    names = [str(name) for name in classes or ()]
    return [f"{name} (category {i})" for name, i in zip(names, category_ids or range(len(names)), strict=True)]
