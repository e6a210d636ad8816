"""Rendered shapes to detect: no files, any number of images, and every difficulty of detection on a knob.

Six classes (disc, square, triangle, ring, plus, star) that only the outline tells apart, of 8 to 256 pixels, on a noisy
background with line segments that are nobody's. :mod:`datamodules.reading.shape_images` draws them.

An image depends on ``images_seed`` and its number alone, so training, validation and test images are the same in every
run, on any number of workers; their numbers do not overlap. ``seed`` is that of the order, as everywhere.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from datamodules.detection import BOX_OPTIONS, BoxOptions, DetectionDataModule
from datamodules.loading.options import with_defaults
from datamodules.reading.listing import Split
from datamodules.reading.shape_images import CLASSES, Boxes, ShapeSettings, render
from datamodules.transforms.detection import Target

Preset = Literal["easy", "default", "hard", "tiny", "huge", "aerial"]

# By preset, the knobs that differ from ShapeSettings' own; the size of "huge" is a share of the image's side, and the
# objects of "aerial" are those of 1024 pixels squared.
PRESETS: dict[str, dict[str, Any]] = {
    "easy": {
        "min_size": 16.0,
        "max_objects": 4,
        "occlusion": 0.0,
        "texture": 0.0,
        "clutter": 0,
        "contrast": 0.4,
        "aspect": 1.2,
        "rotation": 0.0,
    },
    "default": {},
    "hard": {
        "max_objects": 16,
        "texture": 0.3,
        "clutter": 16,
        "contrast": 0.15,
        "aspect": 2.0,
        "rotation": 180.0,
    },
    "tiny": {"max_size": 16.0, "max_objects": 16},
    "huge": {"min_size": 0.4, "max_objects": 3, "occlusion": 0.6},
    "aerial": {
        "min_size": 10.0,
        "max_size": 14.0,
        "min_objects": 16,
        "max_objects": 48,
        "occlusion": 0.0,
        "patch_size": 128,
    },
}

HIDDEN = 0.4
"""Objects of which less than this share is visible are marked as ``iscrowd``: nobody has to find them."""

# The first image's number. A fresh training image takes any number from FRESH on.
FIRST: dict[str, int] = {"train": 0, "val": 1 << 30, "test": 2 << 30}
FRESH = 1 << 62


class ShapeSamples:
    """Rendered samples ``(image, target)``: a uint8 tensor (3, S, S), and the objects in it.

    ``target`` has boxes float32 (n, 4) xyxy, labels int64 (n,), iscrowd bool (n,) and area float32 (n,) as every
    detection data set; besides, visible float32 (n,), the share of the object that others leave to be seen, and
    truncated bool (n,), whether it leaves the image.

    Args:
        settings: What is rendered.
        seed: Seed of the images.
        size: How many there are.
        first: The first one's number.
        fresh: Render another image each time, drawn from torch's global generator, which the loader seeds by epoch and
            index; ``first`` and ``cache_mb`` then mean nothing.
        cache_mb: How much memory the images may take that are kept once they are rendered, in each process.
        name: What samples are called, before their index.
    """

    def __init__(
        self,
        settings: ShapeSettings,
        seed: int = 0,
        size: int = 1000,
        first: int = 0,
        fresh: bool = False,
        cache_mb: int = 512,
        name: str = "shapes",
    ) -> None:
        self.settings, self.seed, self.first, self.random = settings, seed, first, fresh
        self.names = [f"{name}/{index}" for index in range(size)]
        self.kept = 0 if fresh else min(size, _images_in(cache_mb, settings.image_size))
        self._cache: dict[int, tuple[Tensor, Target]] = {}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        if index not in self._cache:
            made = self._make(index)
            if index >= self.kept:
                return made
            self._cache[index] = made
        image, target = self._cache[index]
        return image, dict(target)

    def _make(self, index: int) -> tuple[Tensor, Target]:
        number = FRESH + int(torch.randint(FRESH, ())) if self.random else self.first + index
        scene = render(self.settings, self.seed, number)
        visible = torch.from_numpy(scene.visible)
        return torch.from_numpy(scene.image).permute(2, 0, 1).contiguous(), {
            "boxes": torch.from_numpy(scene.boxes),
            "labels": torch.from_numpy(scene.labels),
            "iscrowd": visible < HIDDEN,
            "area": torch.from_numpy(scene.area),
            "visible": visible,
            "truncated": torch.from_numpy(scene.truncated),
        }


class ShapesDetectionDataModule(DetectionDataModule):
    """Rendered shapes: disc, square, triangle, ring, plus, star. Batches ``(images (B, 3, S, S), targets)``.

    A shape's size is its width in pixels before it is stretched and turned; its area, by which a size range counts it,
    that of its box. Sizes are log-uniform, and the same for all classes. Boxes are tight. Objects of which less than
    40 % is visible are marked as ``iscrowd``. For the keys of a target see :class:`ShapeSamples`.

    Args:
        preset: Sets the knobs from ``min_size`` to ``patch_size``; one that is given all the same wins.
            ``easy``: up to 4 upright shapes of one colour each, from 16 pixels on, side by side on a plain background;
            ``default``: as those below say; ``hard``: up to 16, turned and stretched, textures and clutter strong,
            contrast low; ``tiny``: up to 16, 8 to 16 pixels; ``huge``: up to 3, 0.4 to 0.8 of the image's side;
            ``aerial``, for large images: 16 to 48 in each 1024 pixels squared, so that one of 4096 pixels has 256 to
            768, 10 to 14 pixels, none hidden, on patches of 128 pixels, each like a default image's background.
        image_size: Side S of the images in pixels, from 32 on.
        train_size: Number of training images.
        val_size: Number of validation images.
        test_size: Number of test images.
        images_seed: Seed of the images.
        fresh: Each epoch's training images are new ones, ``train_size`` of them. They have to be rendered each
            time, a few milliseconds one, while others are kept in memory.
        held_out: Sizes [low, high) that training images have none of, while validation and test images do.
        boxes: ``amodal``: around all of a shape, as far as it lies in the image; ``modal``: around what is visible of
            it. The area, and with it the size range that an object counts in, is that of the amodal box.
        shapes: How many of the classes there are, 3 to 6.
        min_size: The smallest size (8).
        max_size: The largest size (0.8 S, or 256 if that is less).
        max_objects: Each image has up to this many, fewer where there is no room (8).
        occlusion: How much of a shape others may hide, from 0 to 1 (1).
        texture: How far a texture departs from its mean, from 0 to 1 (0.18).
        clutter: Each image has 0 to this many line segments (6), or each patch where there are several.
        contrast: How far a shape's colour is at least from the mean of what it covers, in one of red, green and blue,
            from 0 to 0.5 (0.25).
        aspect: Shapes are stretched, to a ratio of sides of up to this (1.5).
        rotation: They are turned by up to this many degrees either way (20).
        cache_mb: How much memory each split's images may take that are kept once they are rendered, in each process
            that renders. Images beyond it are rendered each time.
        min_objects: Each image has this many objects or more, as far as there is room (1).
        patch_size: Side in pixels of the squares that the background is made of, each of a colour and with line
            segments of its own (the image's side).
        mean: Mean of each channel, of images in [0, 1]; the training pixels' unless given.
        std: Standard deviation of each channel, likewise.
        options: See :class:`datamodules.detection.DetectionDataModule`. What changes the size of an image also brings
            objects into a band that is held out.

    Raises:
        ValueError: For an unknown preset and for a knob out of range.
    """

    @with_defaults(BOX_OPTIONS)
    def __init__(
        self,
        preset: Preset = "default",
        image_size: int = 128,
        train_size: int = 2000,
        val_size: int = 500,
        test_size: int = 500,
        images_seed: int = 0,
        fresh: bool = False,
        held_out: tuple[float, float] | None = None,
        boxes: Boxes = "amodal",
        shapes: int = len(CLASSES),
        min_size: float | None = None,
        max_size: float | None = None,
        max_objects: int | None = None,
        occlusion: float | None = None,
        texture: float | None = None,
        clutter: int | None = None,
        contrast: float | None = None,
        aspect: float | None = None,
        rotation: float | None = None,
        cache_mb: int = 512,
        *,
        min_objects: int | None = None,
        patch_size: int | None = None,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.23, 0.23, 0.23),
        **options: Unpack[BoxOptions],
    ) -> None:
        super().__init__(image_size=image_size, mean=mean, std=std, **options)
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}: expected one of {', '.join(PRESETS)}")
        knobs = {
            "min_size": min_size,
            "max_size": max_size,
            "max_objects": max_objects,
            "occlusion": occlusion,
            "texture": texture,
            "clutter": clutter,
            "contrast": contrast,
            "aspect": aspect,
            "rotation": rotation,
            "min_objects": min_objects,
            "patch_size": patch_size,
        }
        chosen = {"max_size": min(256.0, 0.8 * image_size)} | PRESETS[preset]
        if preset == "huge":
            chosen["min_size"] *= image_size
        if preset == "aerial":
            for name in ("min_objects", "max_objects"):
                chosen[name] = min(max(1, round(chosen[name] * (image_size / 1024) ** 2)), 1000)
            if max_objects is not None:
                chosen["min_objects"] = min(chosen["min_objects"], max_objects)
        chosen |= {name: value for name, value in knobs.items() if value is not None}
        self.settings = ShapeSettings(image_size=image_size, shapes=shapes, boxes=boxes, **chosen)
        self.train_settings = self.settings
        if held_out is not None:
            low, high = held_out
            smallest, largest = self.settings.min_size, self.settings.max_size
            if not low < high or not (smallest < low < largest or smallest < high < largest):
                raise ValueError(
                    f"held_out is {tuple(held_out)}: expected a band [low, high) that leaves out some of the sizes "
                    f"from {smallest:g} to {largest:g} and not all"
                )
            self.train_settings = replace(self.settings, without=(low, high))
        self.counts: dict[Split, int] = {"train": train_size, "val": val_size, "test": test_size, "predict": 0}
        for split, count in self.counts.items():
            if not 0 <= count <= FIRST["val"]:
                raise ValueError(f"{split}_size is {count}: expected 0 to {FIRST['val']} images")
        for name, value in (("images_seed", images_seed), ("cache_mb", cache_mb)):
            if value < 0:
                raise ValueError(f"{name} is {value}: expected 0 or more")
        self.images_seed, self.fresh, self.cache_mb = images_seed, fresh, cache_mb
        self.in_memory = not fresh and train_size <= _images_in(cache_mb, image_size)
        self.classes = list(CLASSES[:shapes])
        self.category_ids = list(range(shapes))
        self.size_ranges = size_ranges(self.settings)

    def raw_samples(self, split: Split) -> ShapeSamples | None:
        if self.counts[split] == 0:
            return None
        return ShapeSamples(
            self.train_settings if split == "train" else self.settings,
            self.images_seed,
            self.counts[split],
            FIRST[split],
            fresh=self.fresh and split == "train",
            cache_mb=self.cache_mb,
            name=f"shapes/{split}",
        )


def size_ranges(settings: ShapeSettings) -> dict[str, tuple[float, float]]:
    """Areas in pixels squared by name, for AP by size: from one power of two to the next, ``8_16`` say.

    They hold boxes, which turning a shape makes larger than its size, and the image's edge smaller: the first range
    therefore begins at 0, and the last has no end but the image's.
    """
    first = math.floor(math.log2(settings.min_size))
    last = max(math.ceil(math.log2(settings.max_size)), first + 1)
    names = [f"{2**power}_{2 ** (power + 1)}" for power in range(first, last)]
    inner = [float(4**power) for power in range(first + 1, last)]
    return dict(zip(names, pairwise([0.0, *inner, float(settings.image_size**2)]), strict=True))


def only(
    targets: Iterable[Target], visible: tuple[float, float] = (0.0, 1.0), truncated: bool | None = None
) -> list[Target]:
    """Marks all objects but some as ``iscrowd``, so that average precision is that of those few.

    Args:
        targets: As :class:`ShapeSamples` gives them.
        visible: Share of an object that is visible, from low to less than high (1 included), as in ``(0.4, 0.9)`` and
            ``(0.9, 1)``.
        truncated: Objects that leave the image (True), or do not (False).
    """
    changed = []
    for target in targets:
        share, (low, high) = target["visible"], visible
        chosen = (share >= low) & ((share < high) | (high >= 1))
        if truncated is not None:
            chosen &= target["truncated"] == truncated
        changed.append({**target, "iscrowd": target["iscrowd"] | ~chosen})
    return changed


def _images_in(megabytes: int, image_size: int) -> int:
    return (megabytes << 20) // (3 * image_size**2)
