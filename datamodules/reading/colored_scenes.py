"""Rendered scenes of one to four coloured shapes, each a pure function of its composition, a seed and its number.

All shapes are drawn at once, by distance to their outlines. Only sums, products, roots, minima and maxima go over the
pixels, which IEEE 754 rounds everywhere alike, so that a scene is the same in whatever company it is drawn; across
machines the noise may differ in its last digit.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

COLORS = {
    "red": (1.0, 0.1, 0.1),
    "green": (0.1, 0.8, 0.1),
    "blue": (0.15, 0.2, 1.0),
    "yellow": (1.0, 0.9, 0.1),
    "magenta": (0.9, 0.1, 0.9),
    "cyan": (0.1, 0.9, 0.9),
}
SIZES = {"small": 3.2, "large": 6.0}  # radius, as all lengths here in pixels of an image of UNIT pixels
PLACES = {"top left": (9.0, 9.0), "top right": (23.0, 9.0), "bottom left": (9.0, 23.0), "bottom right": (23.0, 23.0)}
UNIT = 32
MOVED, SCALED, TURNED = 3.0, 0.15, 0.25  # a centre by up to so many pixels, a radius by this share, a shape in radians
TINT = 0.15  # a colour's red, green and blue by up to so much, of 1; others are farther away
PALE = 0.75  # up to so much of a colour is white: in full ones a network learns shapes for each colour anew
GRAIN = 0.05  # standard deviation of the background
GREY = (0.1, 0.35)  # of the background, between these
CHUNK = 1024  # scenes drawn at once


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(v - 0.8, 0.87 * u.abs() - 0.5 * v - 0.5)


def _cross(u: Tensor, v: Tensor) -> Tensor:
    u, v = u.abs(), v.abs()
    return torch.maximum(torch.maximum(u, v) - 1, torch.minimum(u, v) - 0.32)


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": lambda u, v: (u * u + v * v).sqrt() - 1,
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) - 0.88,
    "triangle": _triangle,
    "cross": _cross,
    "ring": lambda u, v: ((u * u + v * v).sqrt() - 0.75).abs() - 0.25,
    "diamond": lambda u, v: (u.abs() + v.abs() - 1.15) * math.sqrt(0.5),
}
"""By name, the signed distance to the outline of a shape of radius 1, negative inside; v points down.

Off the edges of the straight ones it is a bound of the distance.
"""


def render(
    scenes: Tensor, seed: int, numbers: Tensor, image_size: int | tuple[int, int] = UNIT, moved: float = MOVED
) -> Tensor:
    """Draws scenes to uint8 images (N, 3, S, S), or (N, 3, H, W).

    In an image that is no square, places are stretched to it and shapes are not: each is as large as in a square of the
    shorter side. So what is left, right, above or below stays that, a corner is the image's own, a circle is round, and
    objects lie no nearer to each other.

    Args:
        scenes: int64 (N, objects, 4): shape, colour, size and place of each object, by number in the tables above.
            Later objects lie over earlier ones.
        seed: Seed of what is random in an image: exact place, size, angle, tint and paleness of each object, background
            and noise.
        numbers: int64 (N,): the scenes' numbers, which make their images differ.
        image_size: Side S in pixels, or height and width.
        moved: How far a centre is moved from its place at most, of 32 pixels, which are stretched alike.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    chunks = zip(scenes.split(CHUNK), numbers.split(CHUNK), strict=True)
    parts = [_render(some, seed, these.tolist(), size, moved) for some, these in chunks]
    return torch.cat(parts) if parts else torch.empty(0, 3, *size, dtype=torch.uint8)


def render_each(
    scenes: Sequence[Sequence[Sequence[int]]], seed: int, numbers: Tensor, image_size: int | tuple[int, int] = UNIT
) -> Tensor:
    """Draws scenes of several numbers of objects, each in a place of its own, to uint8 images as :func:`render`.

    Centres are moved by half as much as in :func:`render`, so that objects in places that meet hide little of others.

    Args:
        scenes: N scenes, each a list of objects as there.
        seed, numbers, image_size: See :func:`render`.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    images = torch.empty(len(scenes), 3, *size, dtype=torch.uint8)
    lengths = torch.tensor([len(scene) for scene in scenes])
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero().flatten()
        some = torch.tensor([scenes[row] for row in rows.tolist()], dtype=torch.int64)
        images[rows] = render(some, seed, numbers[rows], size, MOVED / 2)
    return images


def _render(scenes: Tensor, seed: int, numbers: list[int], size: tuple[int, int], moved: float) -> Tensor:
    objects, (height, width), short = scenes.shape[1], size, min(size)
    draws = torch.empty(len(numbers), objects, 4)
    tints = torch.empty(len(numbers), objects, 3)
    pales = torch.empty(len(numbers), objects, 1)
    greys = torch.empty(len(numbers), 1, 1, 1)
    images = torch.empty(len(numbers), 3, height, width)
    for i, number in enumerate(numbers):  # one by one, so that a scene's draws are its own
        rng = np.random.default_rng((seed, number))
        draws[i] = torch.from_numpy(rng.uniform(-1, 1, draws[i].shape))
        tints[i] = torch.from_numpy(rng.uniform(-1, 1, tints[i].shape))
        pales[i] = torch.from_numpy(rng.uniform(0, PALE, pales[i].shape))
        greys[i] = rng.uniform(*GREY)
        images[i] = torch.from_numpy(rng.standard_normal(images[i].shape, dtype=np.float32))
    images.mul_(GRAIN).add_(greys)
    colors, radii, places = (torch.tensor(list(table.values())) for table in (COLORS, SIZES, PLACES))
    outlines = list(SHAPES.values())
    x, y = ((torch.arange(side) + 0.5) * (UNIT / short) for side in (width, height))
    stretch = torch.tensor([width / short, height / short])
    for k in range(objects):
        shape, color, extent, place = scenes[:, k].unbind(1)
        center = (places[place] + moved * draws[:, k, :2]) * stretch
        radius = (radii[extent] * (1 + SCALED * draws[:, k, 2]))[:, None, None]
        angle = TURNED * draws[:, k, 3].double()[:, None, None]
        cos, sin = angle.cos().float(), angle.sin().float()
        right = (x - center[:, :1])[:, None, :] / radius
        down = (y - center[:, 1:])[:, :, None] / radius
        u, v = right * cos + down * sin, down * cos - right * sin
        distance = torch.empty_like(u)
        for number in shape.unique().tolist():
            of_it = shape == number
            distance[of_it] = outlines[number](u[of_it], v[of_it])
        covered = (0.5 - distance * radius * (short / UNIT)).clamp(0, 1)[:, None]
        full = (colors[color] + TINT * tints[:, k]).clamp(0, 1)
        tint = (full + pales[:, k] * (1 - full))[:, :, None, None]
        images = covered * tint + (1 - covered) * images
    return images.clamp(0, 1).mul(255).round().to(torch.uint8)
