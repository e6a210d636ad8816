"""Augmentation: in the loader's workers on single images, and on the device on batches.

In a worker, an image becomes a uint8 tensor (C, H, W) of the wanted size: :func:`train_transform`,
:func:`eval_transform`. The former draws from torch's, Python's and NumPy's global generators, which the loader seeds
for every sample. Both take PIL images and uint8 tensors (C, H, W), as decoders and caches give them, draw the same for
either, and give the same image up to rounding (``resizing.py``).

On the device, float batches (B, C, H, W) keep their shape and dtype, and every image has parameters of its own, drawn
from an explicit generator on the images' device: :func:`flip`, :func:`affine`, :func:`binarize`, :func:`erase`. None of
them loops over images or makes the host wait. All of them compile without graph breaks as long as ``generator`` is None
(torch's global one then); torch.compile cannot take a generator as an argument.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, Literal

import torch
import torch.nn.functional as nnf
from PIL import Image
from timm.data import auto_augment as policies
from torch import Generator, Tensor
from torchvision.transforms import v2

from datamodules.resizing import Cover, Pixels, ResizedCrop, as_image, planes

ToTensor = Callable[[Pixels], Tensor]

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")

# timm's policies by their first word, and the settings it takes after it (#: whole number, %: number). It passes over
# some wrong settings in silence, and asserts on others.
POLICIES = {
    "rand": ("m#", "n#", "p%", "mstd%", "mmax#", "inc#", "tweights", "t3a", "t3aw"),
    "augmix": ("m#", "w#", "d#", "a%", "b#", "mstd%"),
    **dict.fromkeys(("original", "originalr", "v0", "v0r", "3a"), ("mstd%",)),
}

TRAIN_OPTIONS = ("image_size", "scale", "ratio", "interpolation", "auto_augment", "color_jitter", "padding")
"""What a data module passes to :func:`train_transform` as its user gave it."""

Binarization = Literal["threshold", "draw", "draw_once"]


# In the worker: one image.


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
    """An image (grey or RGB) becomes an augmented uint8 tensor (C, H, W): crop, auto-augment, colour jitter.

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
        steps += [_InRGB(_policy(auto_augment, size, interpolation, fill))]
    if not 0 <= color_jitter <= 1:
        raise ValueError(f"color_jitter is {color_jitter}: expected a number in [0, 1]")
    if color_jitter:
        steps += [v2.ColorJitter(color_jitter, color_jitter, color_jitter)]
    return v2.Compose([*steps, planes])


def eval_transform(
    image_size: int | tuple[int, int], crop_ratio: float = 0.875, interpolation: str = "bicubic"
) -> ToTensor:
    """An image becomes a uint8 tensor (C, H, W): resized to cover image_size / crop_ratio, its centre cropped.

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


def covered_by_evaluation(image_size: int | tuple[int, int], crop_ratio: float) -> tuple[int, int]:
    """The height and width that :func:`eval_transform` has an image cover before it is cropped."""
    height, width = height_and_width(image_size)
    return math.floor(height / crop_ratio), math.floor(width / crop_ratio)


class _InRGB:
    """Applies a transform of RGB images to images of any mode, which they keep."""

    def __init__(self, transform: Callable[[Image.Image], Image.Image]) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.transform(image.convert("RGB")).convert(image.mode)


def _policy(
    name: str, size: tuple[int, int], interpolation: str, fill: Sequence[float]
) -> Callable[[Image.Image], Image.Image]:
    kind, *settings = name.split("-")
    if kind not in POLICIES:
        near = get_close_matches(kind, POLICIES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"unknown auto_augment {name!r}: expected {', '.join(POLICIES)}, as in rand-m9-mstd0.5-inc1{hint}"
        )
    known = "|".join(POLICIES[kind]).replace("#", r"\d+").replace("%", r"\d*\.?\d+")
    for setting in settings:
        if not re.fullmatch(known, setting):
            forms = ", ".join(POLICIES[kind]).replace("#", "9").replace("%", "0.5")
            raise ValueError(f"auto_augment {name!r}: unknown setting {setting!r}, {kind} takes those like {forms}")
    values = {letters: float(number) for letters, number in re.findall(r"-([a-z]+)([\d.]+)", name)}
    if kind == "rand" and values.get("m", 0) > values.get("mmax", 10):  # timm would take the lesser of the two
        wanted = f"{values['m']:.0f}"
        raise ValueError(f"auto_augment {name!r}: a magnitude above 10 needs a higher limit, add -mmax{wanted}")
    hparams = {  # as timm's own transform factory sets them
        "translate_const": int(min(size) * 0.45),
        "img_mean": tuple(min(255, round(255 * value)) for value in (*fill, *fill, *fill)[:3]),
        "interpolation": Image.Resampling[interpolation.upper()],
    }
    policy: Any
    if kind == "rand":
        policy = policies.rand_augment_transform(name, hparams)
    elif kind == "augmix":
        policy = policies.augment_and_mix_transform(name, hparams | {"translate_pct": 0.3})
    else:
        policy = policies.auto_augment_transform(name, hparams)
    for step in policy.ops if hasattr(policy, "ops") else [step for steps in policy.policy for step in steps]:
        if step.aug_fn is policies.posterize:
            step.aug_fn = _posterize
    return policy


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """As timm does it, but without an error from Pillow 13 for the 0 bits of strong settings: these leave black."""
    return policies.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def _interpolation(name: str) -> v2.InterpolationMode:
    if name not in INTERPOLATIONS:
        raise ValueError(f"unknown interpolation {name!r}: expected one of {', '.join(INTERPOLATIONS)}")
    return v2.InterpolationMode(name)


def height_and_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Of an ``image_size``: a side in pixels, or (height, width)."""
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"image_size is {image_size}: expected a side in pixels, or height and width")
    return size


# On the device: batches.


def to_float(images: Tensor) -> Tensor:
    """uint8 images become float32 in [0, 1]."""
    return images.to(torch.float32) / 255


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std, with a value for each channel or one for all. Float (B, C, H, W) in and out."""
    channels = images.shape[-3]
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise ValueError(f"{name} has {len(values)} values, but images have {channels} channel(s)")
    return (images - _per_channel(tuple(mean), images)) / _per_channel(tuple(std), images)


def _per_channel(values: tuple[float, ...], images: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # then a constant of the graph
        return torch.tensor(values, dtype=images.dtype, device=images.device).view(-1, 1, 1)
    return _constant(values, images.dtype, images.device)


@functools.cache
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on a device, (C, 1, 1). Kept, because the host waits for the device whenever it copies them there."""
    with torch.inference_mode(False):  # validation runs in inference mode, whose tensors training must not meet
        return torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1)


def flip(images: Tensor, p: float, generator: Generator | None = None) -> Tensor:
    """Mirrors each image of (B, C, H, W) left to right with probability p."""
    chosen = _uniform(1, images, generator)[0] < p
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)


def affine(
    images: Tensor,
    degrees: float = 0.0,
    translate: float = 0.0,
    scale: tuple[float, float] = (1.0, 1.0),
    shear: float = 0.0,
    generator: Generator | None = None,
    fill: float = 0.0,
    border: bool = False,
) -> Tensor:
    """Rotates, shifts, scales and shears each image of (B, C, H, W) by amounts drawn for it, uniformly.

    Args:
        images: Float images.
        degrees: Rotation in [-degrees, degrees].
        translate: Shift in [-translate, translate] of the image's width, and of its height.
        scale: Factor of the size, (low, high): above 1 the content grows.
        shear: Horizontal shear in [-shear, shear] degrees.
        generator: On the images' device. None: torch's global one.
        fill: What surrounds the image. 0 is black, if images are not normalised yet.
        border: Repeat the image's outermost pixels around it instead.
    """
    angle, shift_x, shift_y, zoom, slant = _uniform(5, images, generator)
    return warp(
        images,
        angle=(2 * angle - 1) * degrees,
        shift=torch.stack((2 * shift_x - 1, 2 * shift_y - 1), dim=-1) * translate,
        zoom=scale[0] + zoom * (scale[1] - scale[0]),
        shear=(2 * slant - 1) * shear,
        fill=fill,
        border=border,
    )


def warp(
    images: Tensor,
    angle: Tensor,
    shift: Tensor,
    zoom: Tensor,
    shear: Tensor,
    fill: float = 0.0,
    border: bool = False,
) -> Tensor:
    """Shears, then scales, rotates and shifts each image about its centre, bilinearly: torchvision's ``affine``.

    Args:
        images: Float (B, C, H, W).
        angle: (B,) degrees, clockwise.
        shift: (B, 2) to the right and down, as shares of width and height.
        zoom: (B,) factor.
        shear: (B,) degrees: rows shift to the left the lower they lie.
        fill, border: See :func:`affine`.
    """
    height, width = images.shape[-2:]
    angle, shear, zoom = (value.float().view(-1, 1, 1) for value in (torch.deg2rad(angle), torch.deg2rad(shear), zoom))
    cos, sin, tan = angle.cos() / zoom, angle.sin() / zoom, shear.tan()
    # Where each output pixel comes from: the inverse map, in grid_sample's coordinates, which run from -1 to 1 along
    # both sides whatever the aspect. Written out, since affine_grid's matrix product may run in bfloat16 or TF32, which
    # cannot tell neighbouring pixels apart.
    x = _coordinates(width, images.device).view(1, 1, -1) - 2 * shift[:, 0].view(-1, 1, 1)
    y = _coordinates(height, images.device).view(1, -1, 1) - 2 * shift[:, 1].view(-1, 1, 1)
    x_from = (cos - tan * sin) * x + (sin + tan * cos) * (height / width) * y
    y_from = cos * y - sin * (width / height) * x
    mode = "border" if border else "zeros"
    grid = torch.stack((x_from, y_from), dim=-1)
    moved = nnf.grid_sample(images.float() - fill, grid, padding_mode=mode, align_corners=False) + fill
    return moved.to(images.dtype)


def _coordinates(length: int, device: torch.device) -> Tensor:
    """The pixels' centres along a side that runs from -1 to 1."""
    return (2 * torch.arange(length, dtype=torch.float32, device=device) + 1) / length - 1


def binarize(images: Tensor, draw: bool = False, generator: Generator | None = None, jitter: float = 0.0) -> Tensor:
    """Each value of float (B, C, H, W) in [0, 1] becomes 0 or 1, so every channel on its own; the dtype is kept.

    Args:
        images: Float images, not normalised yet.
        draw: 1 with the value as its probability, so that 0 and 1 stay what they are. Otherwise 1 from 0.5 on.
        generator: For draw and jitter, on the images' device. None: torch's global one.
        jitter: Uniform noise of up to this much is added before a threshold, so that values near it may fall on either
            side: what a pixel could as well have been.
    """
    if not draw and not jitter:
        return (images >= 0.5).to(images.dtype)
    noise = torch.rand(images.shape, dtype=torch.float32, generator=generator, device=images.device)
    above = noise < images if draw else images + jitter * (2 * noise - 1) >= 0.5
    return above.to(images.dtype)


def erase(
    images: Tensor,
    p: float,
    generator: Generator | None = None,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 3.3),
) -> Tensor:
    """Fills a rectangle in each image of (B, C, H, W) with standard normal noise, with probability p.

    Random erasing (Zhong et al. 2017, algorithm 1) as timm's mode ``pixel`` does it, for images that are normalised
    already. Of ten rectangles the first that is smaller than the image is taken; if none is, the image stays whole.

    Args:
        images: Float images, normalised.
        p: Probability.
        generator: On the images' device. None: torch's global one.
        area: The rectangle's area as a share of the image's.
        aspect: Its height by its width, drawn on a logarithmic scale.
    """
    attempts, (height, width) = 10, images.shape[-2:]
    draws = _uniform(2 * attempts + 3, images, generator)
    chosen, top, left = draws[:3]
    areas = height * width * (area[0] + (area[1] - area[0]) * draws[3 : 3 + attempts])
    aspects = torch.exp(math.log(aspect[0]) + math.log(aspect[1] / aspect[0]) * draws[3 + attempts :])
    heights, widths = (areas * aspects).sqrt().round(), (areas / aspects).sqrt().round()
    fits = (heights < height) & (widths < width)
    first = fits.to(torch.uint8).argmax(dim=0, keepdim=True)  # of equal values argmax gives the first
    rows, columns = heights.gather(0, first)[0], widths.gather(0, first)[0]
    erased = (chosen < p) & fits.any(dim=0)
    top, left = (top * (height - rows + 1)).floor(), (left * (width - columns + 1)).floor()
    inside = (
        _between(height, top, top + rows).unsqueeze(-1)
        & _between(width, left, left + columns).unsqueeze(-2)
        & erased.view(-1, 1, 1)
    )
    noise = torch.randn(images.shape, generator=generator, dtype=images.dtype, device=images.device)
    return torch.where(inside.unsqueeze(1), noise, images)


def _between(length: int, start: Tensor, stop: Tensor) -> Tensor:
    """(B, length): which positions lie in [start, stop)."""
    positions = torch.arange(length, device=start.device)
    return (positions >= start.unsqueeze(-1)) & (positions < stop.unsqueeze(-1))


def _uniform(count: int, images: Tensor, generator: Generator | None) -> Tensor:
    """(count, B) float32 in [0, 1)."""
    return torch.rand((count, len(images)), dtype=torch.float32, generator=generator, device=images.device)
