"""Augmentation on the device: float batches (B, C, H, W) keep their shape and dtype.

Every image has parameters of its own, drawn from an explicit generator on the images' device: :func:`flip`,
:func:`affine`, :func:`binarize`, :func:`erase`. None of them loops over images or makes the host wait. All of them
compile without graph breaks as long as ``generator`` is None (torch's global one then); torch.compile cannot take a
generator as an argument.
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as nnf
from torch import Generator, Tensor

Binarization = Literal["threshold", "draw", "draw_once"]


def to_float(images: Tensor) -> Tensor:
    """Converts uint8 images to float32 in [0, 1]."""
    return images.to(torch.float32) / 255


def finish(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    binarized: Binarization | None = None,
    generator: Generator | None = None,
    jitter: float = 0.0,
) -> Tensor:
    """Binarises float images (B, C, H, W) in [0, 1], if they are to be, and normalises them.

    This is the last that evaluation and training alike do to them. With ``draw_once`` they were drawn before.
    """
    if binarized:
        images = binarize(images, binarized == "draw", generator, jitter)
    return normalize(images, mean, std)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalises float images (B, C, H, W): (images - mean) / std, with a value for each channel or one for all."""
    channels = images.shape[-3]
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise ValueError(
                f"{name} has {len(values)} values, but images have {channels} channel(s): expected one each, or one"
            )
    return (images - _per_channel(tuple(mean), images)) / _per_channel(tuple(std), images)


def denormalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undoes :func:`normalize`: float32 images (B, C, H, W) in [0, 1], clipped to that range."""
    images = images.float()
    return (images * _per_channel(tuple(std), images) + _per_channel(tuple(mean), images)).clamp(0, 1)


def _per_channel(values: tuple[float, ...], images: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # then a constant of the graph
        return torch.tensor(values, dtype=images.dtype, device=images.device).view(-1, 1, 1)
    return _constant(values, images.dtype, images.device)


@functools.cache
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Constants on a device, (C, 1, 1). Kept, because the host waits for the device whenever it copies them there."""
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
    """Binarises float (B, C, H, W) in [0, 1] to 0 and 1, every channel on its own; the dtype is kept.

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
    """Mask (B, length) of the positions in [start, stop)."""
    positions = torch.arange(length, device=start.device)
    return (positions >= start.unsqueeze(-1)) & (positions < stop.unsqueeze(-1))


def _uniform(count: int, images: Tensor, generator: Generator | None) -> Tensor:
    """Uniform draws (count, B), float32 in [0, 1)."""
    return torch.rand((count, len(images)), dtype=torch.float32, generator=generator, device=images.device)
