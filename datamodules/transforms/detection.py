"""An image and its boxes together: resized, and in training flipped, cropped, jittered and distorted.

All of it is torchvision's (``torchvision.transforms.v2`` on ``tv_tensors``), in the worker, on one image. Random
choices come from the global generators, which the loader seeds for every sample.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, Image

from datamodules.transforms.scales import Range, ShortSides, in_range, ranges_of, sides_of

Target = dict[str, Any]


class DetectionTransform:
    """Transform of ``(image, target)`` for a detector; of a target without boxes, of the image alone.

    Images are uint8 (3, h, w). Of a target, ``boxes`` (n, 4) xyxy in pixels are kept in step with the image, and where
    a box goes, so do its entries in all other tensors of the target (``labels``, ``iscrowd``, ``area``, ...).

    Training: photometric distortion, IoU crop, resize with jitter, flip; then boxes are clamped to the image, and those
    with a side below one pixel are dropped. ``scale`` says by what factor lengths have grown, whatever was cropped, and
    with ``valid_ranges`` ``in_range`` (n,) says which objects are learned. Evaluation: resize alone, and no box is ever
    dropped.

    Args:
        training: Whether the arguments from ``hflip`` on apply.
        image_size: Short side in pixels, up or down to which an image is resized. None: images stay as they are.
        max_size: What the long side may have at most; the short one is then shorter. None: anything.
        short_sides: In training, short sides of which :meth:`in_batch` takes one.
        valid_ranges: For each of ``short_sides``, the (least, greatest) size of an object that is learned at it.
        hflip: Probability of a horizontal flip.
        scale_jitter: (low, high): an image is resized to a size that is larger by a factor uniform in this range, and
            cropped at random to what it would have been, if that is less; where ``max_size`` is ``image_size``, to a
            square of that side (large-scale jitter, Ghiasi et al. 2021). None: none.
        iou_crop: Probability of SSD's random crop, which leaves the image as it is in one case of seven.
        photometric: Probability of each of brightness, contrast, saturation, hue and a swap of channels to change.
    """

    def __init__(
        self,
        training: bool = False,
        image_size: int | None = None,
        max_size: int | None = None,
        short_sides: ShortSides | None = None,
        valid_ranges: Sequence[Range] | None = None,
        hflip: float = 0.0,
        scale_jitter: tuple[float, float] | None = None,
        iou_crop: float = 0.0,
        photometric: float = 0.0,
    ) -> None:
        for name, probability in (("hflip", hflip), ("iou_crop", iou_crop), ("photometric", photometric)):
            if not 0 <= probability <= 1:
                raise ValueError(f"{name} is {probability}: expected a probability in [0, 1]")
        for name, side in (("image_size", image_size), ("max_size", max_size)):
            if side is not None and side < 1:
                raise ValueError(f"{name} is {side}: expected at least 1 pixel")
        sides, ranges = sides_of(short_sides), ranges_of(valid_ranges, short_sides)
        shortest = [side for side in (image_size, *sides) if side is not None]
        if max_size is not None and not shortest:
            raise ValueError(f"max_size is {max_size}, but image_size is null: expected a short side to resize to")
        if sides and image_size is None:
            raise ValueError("short_sides are for training alone: expected an image_size for evaluation")
        if max_size is not None and max_size < max(shortest):
            raise ValueError(f"max_size is {max_size}: expected at least the short side, {max(shortest)}")
        if scale_jitter is not None and not 0 < scale_jitter[0] <= scale_jitter[1]:
            raise ValueError(f"scale_jitter is {tuple(scale_jitter)}: expected factors 0 < low <= high")
        self.training, self.image_size, self.max_size = training, image_size, max_size
        self.short_sides, self.valid_ranges = (sides, ranges) if training else ((), ())
        self.valid_range: Range | None = None
        self.hflip, self.scale_jitter, self.iou_crop = hflip, scale_jitter, iou_crop
        self._crop = v2.RandomIoUCrop()
        self._distort = v2.RandomPhotometricDistort(p=photometric) if photometric else None
        self._clamp = v2.ClampBoundingBoxes()
        self._sanitize = v2.SanitizeBoundingBoxes(labels_getter=_of_each_box)

    def in_batch(self, seed: int) -> "DetectionTransform":
        """The transform of one batch: this one, but for a short side drawn from ``short_sides``, with its range."""
        if not self.short_sides:
            return self
        drawn, changed = seed % len(self.short_sides), copy.copy(self)
        changed.image_size = self.short_sides[drawn]
        changed.valid_range = self.valid_ranges[drawn] if self.valid_ranges else None
        return changed

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        if "boxes" not in target:
            return _plain(_resize(Image(image), self._size(image))), target
        boxes = BoundingBoxes(target["boxes"], format="XYXY", canvas_size=_height_and_width(image))
        upright: Any = (Image(image), {**target, "boxes": boxes})
        image, target = self._train(*upright) if self.training else _resize(upright, self._size(image))
        return _plain(image), {**target, "boxes": _plain(target["boxes"])}

    def _train(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        if self._distort:
            image = self._distort(image)
        if self.iou_crop and len(target["boxes"]) and min(image.shape[-2:]) >= 4 and _chance(self.iou_crop):
            image, target = self._cropped(image, target)
        before, (height, width) = _height_and_width(image), self._size(image)
        size = self._jittered(height, width) if self.scale_jitter else (height, width)
        image, target = _resize((image, target), size)
        if self.scale_jitter:
            if self.max_size and self.max_size == self.image_size:
                height = width = self.max_size
            image, target = v2.RandomCrop((min(size[0], height), min(size[1], width)))(image, target)
        if self.hflip and _chance(self.hflip):
            image, target = F.horizontal_flip(image), {**target, "boxes": F.horizontal_flip(target["boxes"])}
        image, target = self._sanitize(self._clamp(image, target))
        target["scale"] = math.sqrt(math.prod(size) / math.prod(before))
        if self.valid_range is not None:
            learned = in_range(_plain(target["boxes"]), self.valid_range, target["scale"])
            target["in_range"] = learned & target.get("in_range", True)  # which a data set may have by its own rule
        return image, target

    def _size(self, image: Tensor) -> tuple[int, int]:
        height, width = _height_and_width(image)
        return (height, width) if self.image_size is None else resized(height, width, self.image_size, self.max_size)

    def _cropped(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        """SSD's crop: of the boxes, those whose centre is in it stay; crowd regions do as far as they reach into it."""
        boxes = target["boxes"]
        chosen = self._crop.make_params([image, boxes])
        if chosen and "iscrowd" in target:
            chosen["is_within_crop_area"] = chosen["is_within_crop_area"] | target["iscrowd"]
        return self._crop.transform(image, chosen), {**target, "boxes": self._crop.transform(boxes, chosen)}

    def _jittered(self, height: int, width: int) -> tuple[int, int]:
        assert self.scale_jitter
        low, high = self.scale_jitter
        factor = low + (high - low) * torch.rand((), dtype=torch.float32).item()
        return max(1, round(height * factor)), max(1, round(width * factor))


def complete(image: Tensor, target: Target, number: int, transform: DetectionTransform) -> tuple[Tensor, Target]:
    """Transforms an image and its target, to which all that a target may say is added.

    Args:
        image: uint8 (3, h, w).
        target: Its boxes and so on; empty for an image to predict.
        number: Its number in the data set, which is its ``image_id`` where the target has none.
        transform: The transform of both.
    """
    target = {"image_id": number, "orig_size": _height_and_width(image), **target}
    if "boxes" in target:
        boxes = target["boxes"]
        target.setdefault("iscrowd", torch.zeros(len(boxes), dtype=torch.bool))
        target.setdefault("area", (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    image, target = transform(image, target)
    return image, {**target, "size": _height_and_width(image)}


def resized(height: int, width: int, short: int, longest: int | None = None) -> tuple[int, int]:
    """(height, width) of an image whose short side becomes ``short``, less if the other exceeded ``longest``.

    As torchvision's ``Resize(short, max_size=longest)`` rounds, down; but no side becomes 0, and both may be equal.
    """
    low, high = min(height, width), max(height, width)
    new_low, new_high = short, int(short * high / low)
    if longest is not None and new_high > longest:
        new_low, new_high = max(1, int(longest * new_low / new_high)), longest
    return (new_low, new_high) if height <= width else (new_high, new_low)


def _resize(inputs: Any, size: tuple[int, int]) -> Any:
    return v2.Resize(size, antialias=True)(inputs)


def _height_and_width(image: Tensor) -> tuple[int, int]:
    return image.shape[-2], image.shape[-1]


def _plain(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor)


def _chance(probability: float) -> bool:
    return torch.rand((), dtype=torch.float32).item() < probability


def _of_each_box(inputs: tuple[Tensor, Target]) -> list[Tensor]:
    """The tensors of a target that have an entry for each box, and lose it with the box."""
    target = inputs[1]
    count = len(target["boxes"])
    return [
        value
        for key, value in target.items()
        if key != "boxes" and isinstance(value, Tensor) and value.shape[:1] == (count,)
    ]
