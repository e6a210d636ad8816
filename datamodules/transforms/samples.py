"""Augmentation in the loader's workers: one image becomes a uint8 tensor (C, H, W) of the wanted size.

:func:`train_transform` draws from torch's, Python's and NumPy's global generators, which the loader seeds for every
sample; :func:`eval_transform` draws nothing. Both take PIL images and uint8 tensors (C, H, W), as decoders and caches
give them, draw the same for either, and give the same image up to rounding (``reading/pixels.py``).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from datamodules.reading.pixels import (
    Pixels,
    ToTensor,
    as_image,
    as_tensor,
    covering,
    height_and_width,
    planes,
    resize,
    size_of,
)
from datamodules.transforms.policies import policy

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")

TRAIN_OPTIONS = ("image_size", "scale", "ratio", "interpolation", "auto_augment", "color_jitter", "padding")
"""Arguments of :func:`train_transform` that a data module passes on as its user gave them."""

LONGEST = 16
"""Longer than this many times its width, an image is cut before it is resized, since it could fill the memory."""


def train_transform(
    image_size: int | tuple[int, int],
    scale: tuple[float, float] | None = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bicubic",
    auto_augment: str | None = None,
    color_jitter: float = 0.0,
    padding: int = 0,
    fill: Sequence[float] = (0.485, 0.456, 0.406),
) -> ToTensor:
    """Training transform of an image to a uint8 tensor (C, H, W): random crop, auto-augment, colour jitter.

    Args:
        image_size: Side in pixels, or (height, width).
        scale: Area of the random resized crop, as a share of the image. None: no such crop; the short side is resized
            and the crop falls anywhere along the long one, so that square images are only resized (the simple random
            crop of DeiT III).
        ratio: Aspect (width / height) of the random resized crop.
        interpolation: nearest, bilinear, bicubic or lanczos; for the auto-augment policy as well.
        auto_augment: One of timm's policies, with its settings: ``rand-m9-mstd0.5-inc1`` (RandAugment), ``original`` or
            ``v0`` (AutoAugment), ``augmix-m3-w3``, ``3a`` (the 3-Augment of DeiT III). They are written for RGB; grey
            images are turned to RGB for it and back.
        color_jitter: Brightness, contrast and saturation change by a factor in [1 - color_jitter, 1 + color_jitter].
            It applies whatever the policy, while timm drops it under all but ``3a``.
        padding: Black pixels around the image before the random crop (4 for CIFAR). Only without ``scale``.
        fill: RGB in [0, 1] of the corners that a policy's rotations and shifts leave open; usually the data's mean.

    Raises:
        ValueError: For an unknown policy, setting or interpolation, and for values out of range.
    """
    size = height_and_width(image_size)
    mode = _interpolation(interpolation)
    steps: list[Callable[[Any], Any]] = []
    if scale is not None:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale is {tuple(scale)}: expected two shares of the area, 0 < low <= high <= 1, or null")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio is {tuple(ratio)}: expected two positive aspects, low <= high")
        if padding:
            raise ValueError(f"padding is {padding}, but padding goes with a plain random crop only: set scale to null")
        steps += [ResizedCrop(size, scale, ratio, mode)]
    else:
        if padding < 0:
            raise ValueError(f"padding is {padding}: expected 0 or more pixels")
        steps += [Cover(size, mode), v2.RandomCrop(size, padding or None)]
    if auto_augment is not None or color_jitter:
        steps += [as_image]  # a tensor as well, now that it is small: the policies are Pillow's
    if auto_augment is not None:
        steps += [_InRGB(policy(auto_augment, size, interpolation, fill))]
    if not 0 <= color_jitter <= 1:
        raise ValueError(f"color_jitter is {color_jitter}: expected a number in [0, 1]")
    if color_jitter:
        steps += [v2.ColorJitter(color_jitter, color_jitter, color_jitter)]
    return v2.Compose([*steps, planes])


def eval_transform(
    image_size: int | tuple[int, int], crop_ratio: float = 0.875, interpolation: str = "bicubic"
) -> ToTensor:
    """Evaluation transform to a uint8 tensor (C, H, W): resize to cover image_size / crop_ratio, centre crop.

    Args:
        image_size: Side in pixels, or (height, width).
        crop_ratio: Side of the crop by that of the resized image; 1 keeps all of a square image. 224 at 0.875 is the
            usual "resize to 256, crop 224".
        interpolation: nearest, bilinear, bicubic or lanczos.
    """
    size = height_and_width(image_size)
    if not 0 < crop_ratio <= 1:
        raise ValueError(f"crop_ratio is {crop_ratio}: expected a number in (0, 1]")
    resized = covered_by_evaluation(image_size, crop_ratio)
    return v2.Compose([Cover(resized, _interpolation(interpolation)), v2.CenterCrop(size), planes])


def crops_of_evaluation(
    image_size: int | tuple[int, int], crop_ratio: float = 0.875, interpolation: str = "bicubic"
) -> Callable[[Pixels], list[Tensor]]:
    """Transform of an image to five crops: four corners and the centre of what :func:`eval_transform` resizes it to.

    The centre, the last one, is what that transform makes. Arguments: see there.
    """
    size = list(height_and_width(image_size))
    cover = Cover(covered_by_evaluation(image_size, crop_ratio), _interpolation(interpolation))
    return lambda image: [planes(crop) for crop in v2.functional.five_crop(cover(image), size)]


def plain_resize(images: Pixels, size: tuple[int, int], interpolation: str = "bicubic") -> Tensor:
    """Resizes an image, or images (..., H, W) of uint8 or floats, to a height and width, whatever their aspect was.

    That is by torch, which has no lanczos.
    """
    return v2.functional.resize(as_tensor(images), list(size), _interpolation(interpolation), antialias=True)


def covered_by_evaluation(image_size: int | tuple[int, int], crop_ratio: float) -> tuple[int, int]:
    """The height and width that :func:`eval_transform` has an image cover before it is cropped."""
    height, width = height_and_width(image_size)
    return math.floor(height / crop_ratio), math.floor(width / crop_ratio)


def _interpolation(name: str) -> v2.InterpolationMode:
    if name not in INTERPOLATIONS:
        raise ValueError(f"unknown interpolation {name!r}: expected one of {', '.join(INTERPOLATIONS)}")
    return v2.InterpolationMode(name)


class Cover:
    """Resizes an image, its aspect kept, to the smallest size that covers (height, width)."""

    def __init__(self, size: tuple[int, int], interpolation: v2.InterpolationMode) -> None:
        self.size, self.interpolation = size, interpolation

    def __call__(self, image: Pixels) -> Pixels:
        height, width = size = size_of(image)
        longest = LONGEST * max(self.size) // min(self.size) * min(size)
        if max(size) > longest:
            image = v2.functional.center_crop(image, [min(height, longest), min(width, longest)])
        return resize(image, *covering(size_of(image), *self.size), self.interpolation)


class ResizedCrop(v2.RandomResizedCrop):
    """torchvision's random resized crop, alike for PIL images and tensors; the latter are resized by a shorter way."""

    def forward(self, image: Pixels) -> Pixels:
        if isinstance(image, Image.Image):
            return super().forward(image)
        box = self.make_params([image])
        rows, columns = (slice(box[a], box[a] + box[b]) for a, b in (("top", "height"), ("left", "width")))
        height, width = self.size
        return resize(image[:, rows, columns], height, width, self.interpolation)


class _InRGB:
    """Applies a transform of RGB images to images of any mode, which they keep."""

    def __init__(self, transform: Callable[[Image.Image], Image.Image]) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.transform(image.convert("RGB")).convert(image.mode)
