"""Rendered images of simple shapes, each a pure function of settings, seed and index.

What makes an object's class is its outline alone. Size, colour, texture and background say nothing about it, and a
texture's stripes and squares have their own size in pixels, so that a large object looks like many small ones to a
network that sees only part of it.

Pixels repeat exactly on one machine, in any order and any process. Across machines they agree but for a pixel now and
then: arrays go through float32 sums, products, quotients, square roots and comparisons only, which IEEE 754 rounds
everywhere alike; draws are the generator's plain bits, which NumPy keeps; and logarithms, sines and cosines are taken
of single numbers, in float64, where their last digit seldom survives the rounding to float32.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

Boxes = Literal["amodal", "modal"]
Window = tuple[slice, slice]

CLASSES = ("disc", "square", "triangle", "ring", "plus", "star")
SMALLEST_MASK = 12  # pixels: what covers fewer has no shape to tell
SMALLEST_SIZE = 6  # pixels: a star of this size still covers as many
ATTEMPTS = 10  # places tried for a shape before it is left out
MARGIN = 0.4  # between a shape's centre and the edge of the image, by its size
BLOCK = 16  # side in pixels of the background's blocks
BLOCK_CONTRAST, PIXEL_NOISE = 0.06, 0.04  # standard deviations, of intensities in [0, 1]
PERIODS = (4.0, 32.0)  # of textures, in pixels

# Outlines of width 1, the triangle and the star a little less high: a shape's size is its width, before it is stretched
# and turned.
DISC = 0.5  # radius
SQUARE = 0.5  # half a side
TRIANGLE = 1 / (2 * math.sqrt(3))  # equilateral: radius of the circle inside
RING = 0.5  # outer radius; the inner one is half of it
PLUS = 0.5  # half the length of a bar, which is three times as long as wide
STAR = 1 / (2 * math.sin(math.radians(72)))  # five points at this radius; the corners between them at half of it
REACH = (DISC, SQUARE * math.sqrt(2), 2 * TRIANGLE, RING, PLUS * math.sqrt(10) / 3, STAR)  # farthest point from (0, 0)


@dataclass(frozen=True)
class ShapeSettings:
    """Settings of the renderer; :class:`datamodules.shapes.ShapesDetectionDataModule` says what each means."""

    image_size: int = 128
    min_size: float = 8.0
    max_size: float = 102.4
    max_objects: int = 8
    occlusion: float = 1.0
    texture: float = 0.18
    clutter: int = 6
    contrast: float = 0.25
    shapes: int = len(CLASSES)
    aspect: float = 1.5
    rotation: float = 20.0
    boxes: Boxes = "amodal"
    min_objects: int = 1
    patch_size: int | None = None
    without: tuple[float, float] | None = None
    """A band of sizes in pixels, [low, high), that no object's size lies in, nor the root of its box's area."""

    def __post_init__(self) -> None:
        side, least = self.image_size, SMALLEST_SIZE
        if side < 32:
            raise ValueError(f"image_size is {side}: expected at least 32 pixels")
        if not least <= self.min_size <= self.max_size <= side:
            raise ValueError(
                f"min_size is {self.min_size:g} and max_size {self.max_size:g}: expected them to rise, from {least} or "
                f"more to {side}, the image_size, or less"
            )
        if not 3 <= self.shapes <= len(CLASSES):
            raise ValueError(f"shapes is {self.shapes}: expected 3 to {len(CLASSES)}, of {', '.join(CLASSES)}")
        if not 1 <= self.max_objects <= 1000:
            raise ValueError(f"max_objects is {self.max_objects}: expected 1 to 1000")
        if not 1 <= self.min_objects <= self.max_objects:
            raise ValueError(f"min_objects is {self.min_objects}: expected 1 to {self.max_objects}, the max_objects")
        if self.patch_size is not None and self.patch_size < BLOCK:
            raise ValueError(f"patch_size is {self.patch_size}: expected at least {BLOCK} pixels")
        if self.clutter < 0:
            raise ValueError(f"clutter is {self.clutter}: expected 0 or more line segments")
        for name, value, limit in (
            ("occlusion", self.occlusion, 1),
            ("texture", self.texture, 1),
            ("contrast", self.contrast, 0.5),
            ("rotation", self.rotation, 180),
        ):
            if not 0 <= value <= limit:
                raise ValueError(f"{name} is {value:g}: expected 0 to {limit:g}")
        if not 1 <= self.aspect <= 4:
            raise ValueError(f"aspect is {self.aspect:g}: expected 1 to 4, the longer side by the shorter")
        if self.boxes not in get_args(Boxes):
            raise ValueError(f"unknown boxes {self.boxes!r}: expected one of {', '.join(get_args(Boxes))}")


class Scene(NamedTuple):
    """One image and its n objects, the larger ones first, which is also the order they are painted in."""

    image: np.ndarray
    """uint8 (S, S, 3)."""
    boxes: np.ndarray
    """float32 (n, 4), xyxy in pixels."""
    labels: np.ndarray
    """int64 (n,)."""
    visible: np.ndarray
    """float32 (n,): the share of an object's pixels in the image that no other object hides."""
    area: np.ndarray
    """float32 (n,): of the box around all of an object that lies in the image, hidden or not."""
    truncated: np.ndarray
    """bool (n,): whether the object leaves the image."""
    owner: np.ndarray
    """int16 (S, S): which object each pixel shows, -1 where none."""


def render(settings: ShapeSettings, seed: int, index: int) -> Scene:
    """Image number ``index``, in [0, 2**63), of the set that settings and seed describe."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index])))
    side = settings.image_size
    image = _background(rng, side, settings.clutter, settings.patch_size or side)
    owner = np.full((side, side), -1, np.int16)
    count = settings.min_objects + int(rng.random() * (settings.max_objects - settings.min_objects + 1))
    placed: list[_Placed] = []
    left: list[int] = []  # pixels still to be seen, by object
    for size in sorted(_sizes(rng, settings, count), reverse=True):
        label = int(rng.random() * settings.shapes)
        color, kind = rng.random(3), rng.random(5).tolist()
        for _ in range(ATTEMPTS):
            shape = _place(rng, settings, label, size)
            if shape.pixels < SMALLEST_MASK or _between(math.sqrt(shape.area), settings.without):
                continue
            under = owner[shape.window][shape.mask]
            hidden = dict(np.stack(np.unique(under[under >= 0], return_counts=True), axis=1).tolist())
            if all(left[i] - gone >= (1 - settings.occlusion) * placed[i].pixels for i, gone in hidden.items()):
                break
        else:
            continue
        for i, gone in hidden.items():
            left[i] -= gone
        left.append(shape.pixels)
        _paint(rng, image, shape, color, kind, settings)
        owner[shape.window][shape.mask] = len(placed)
        placed.append(shape)
    return _scene(image, owner, placed, left, settings.boxes)


class _Placed(NamedTuple):
    label: int
    window: Window  # the part of the image that holds the shape
    mask: np.ndarray  # bool, over the window: pixels whose centre lies inside
    cover: np.ndarray  # float32 in [0, 1], over the window: the same with a soft edge
    pixels: int  # of the mask
    box: tuple[int, int, int, int]  # xyxy, around the mask, in pixels of the image
    truncated: bool

    @property
    def area(self) -> int:
        """Area of the box, in pixels."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


def _sizes(rng: np.random.Generator, settings: ShapeSettings, count: int) -> list[float]:
    """Sizes, log-uniform in [min_size, max_size] outside the band to leave out."""
    low, high = math.log(settings.min_size), math.log(settings.max_size)
    if settings.without is None:
        gap_start, gap = high, 0.0
    else:
        gap_start = min(max(math.log(settings.without[0]), low), high)
        gap = min(max(math.log(settings.without[1]), low), high) - gap_start
    draws = low + rng.random(count) * (high - low - gap)
    return [math.exp(draw if draw < gap_start else draw + gap) for draw in draws.tolist()]


def _between(value: float, band: tuple[float, float] | None) -> bool:
    return band is not None and band[0] <= value < band[1]


def _place(rng: np.random.Generator, settings: ShapeSettings, label: int, size: float) -> _Placed:
    """A shape of some size, stretched, turned and put somewhere, its centre well inside the image."""
    side = settings.image_size
    stretch, turn, across, down = rng.random(4).tolist()
    margin = min(MARGIN * size, side / 2)
    x, y = margin + across * (side - 2 * margin), margin + down * (side - 2 * margin)
    aspect = math.exp((stretch - 0.5) * math.log(settings.aspect))  # the root of width by height
    width, height = size * aspect, size / aspect
    angle = math.radians((2 * turn - 1) * settings.rotation)
    cos, sin = math.cos(angle), math.sin(angle)
    # The window reaches one pixel beyond the image, where it shows whether the shape leaves it.
    reach = REACH[label] * max(width, height) + 1
    left, right = max(-1, math.floor(x - reach)), min(side + 1, math.ceil(x + reach))
    top, bottom = max(-1, math.floor(y - reach)), min(side + 1, math.ceil(y + reach))
    dx = np.arange(left, right, dtype=np.float32) + np.float32(0.5 - x)
    dy = np.arange(top, bottom, dtype=np.float32)[:, None] + np.float32(0.5 - y)
    distance = outline(label, dx * (cos / width) + dy * (sin / width), dy * (cos / height) - dx * (sin / height))
    rows, columns = slice(max(top, 0), min(bottom, side)), slice(max(left, 0), min(right, side))
    inner = slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)
    mask = distance <= 0
    cover = np.clip(0.5 - distance[inner] * min(width, height), 0, 1)
    inside = mask[inner]
    pixels = int(np.count_nonzero(inside))
    box = _box(inside, (rows, columns))
    return _Placed(label, (rows, columns), inside, cover, pixels, box, pixels < int(np.count_nonzero(mask)))


def _box(mask: np.ndarray, window: Window) -> tuple[int, int, int, int]:
    """Tight box, xyxy, around a mask in a window of the image; of no area if the mask is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return 0, 0, 0, 0
    top, left = window[0].start, window[1].start
    return left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1


def outline(label: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance of points to a shape of size 1 about (0, 0), v pointing down; 0 or less inside. float32 as given.

    Beyond a corner it is the distance from the farther of the lines that meet there.
    """
    name = CLASSES[label]
    if name == "disc":
        return np.sqrt(u * u + v * v) - DISC
    if name == "ring":
        radius = np.sqrt(u * u + v * v)
        return np.maximum(radius - RING, RING / 2 - radius)
    across = np.abs(u)
    if name == "triangle":
        return np.maximum(v, across * (math.sqrt(3) / 2) - v * 0.5) - TRIANGLE
    if name == "star":
        return _star(across, v)
    down = np.abs(v)
    if name == "square":
        return np.maximum(across, down) - SQUARE
    return np.maximum(np.maximum(across, down) - PLUS, np.minimum(across, down) - PLUS / 3)


def _star(across: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Distance to the star, by symmetry folded into the tenth between a point (straight up) and the corner beside."""
    up = -v
    for degrees in (72, 36):
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        beyond = 2 * np.maximum(across * cos - up * sin, 0)  # twice the distance beyond the axis
        across, up = np.abs(across - beyond * cos), up + beyond * sin
    cos, sin = math.cos(math.pi / 5), math.sin(math.pi / 5)
    x, y = 1 - cos / 2, sin / 2  # across the edge from the point (0, 1) to the corner (sin 36°, cos 36°) / 2
    length = math.hypot(x, y)
    return across * (x / length) + up * (y / length) - STAR * y / length


def _background(rng: np.random.Generator, side: int, clutter: int, patch: int) -> np.ndarray:
    """Patches side by side, cut off at the image's right and lower edge. float32 (3, S, S)."""
    if patch == side:
        return _patch(rng, side, clutter)
    image = np.empty((3, side, side), np.float32)
    for top in range(0, side, patch):
        for left in range(0, side, patch):
            part = image[:, top : top + patch, left : left + patch]
            part[:] = _patch(rng, patch, clutter)[:, : part.shape[1], : part.shape[2]]
    return image


def _patch(rng: np.random.Generator, side: int, clutter: int) -> np.ndarray:
    """A colour in blocks of slightly different shades, pixel noise, and line segments. float32 (3, side, side)."""
    base = 0.2 + 0.6 * rng.random((3, 1, 1), dtype=np.float32)
    blocks = base + BLOCK_CONTRAST * _noise(rng, (3, -(-side // BLOCK), -(-side // BLOCK)))
    image = blocks.repeat(BLOCK, axis=1).repeat(BLOCK, axis=2)[:, :side, :side]
    image = image + PIXEL_NOISE * _noise(rng, image.shape)
    for _ in range(int(rng.random() * (clutter + 1))):
        start, end, color = rng.random((2, 1)) * side, rng.random((2, 1)) * side, rng.random((3, 1), dtype=np.float32)
        y, x = (start + (end - start) * np.linspace(0, 1, 2 * side)).astype(int)
        for shift in range(1 + int(rng.random() * 3)):  # its width in pixels
            image[:, y, np.minimum(x + shift, side - 1)] = color
            image[:, np.minimum(y + shift, side - 1), x] = color
    return image


def _noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform noise, float32, of mean 0 and standard deviation 1."""
    levels = np.frombuffer(rng.bytes(math.prod(shape)), np.uint8).reshape(shape)
    return (levels.astype(np.float32) - np.float32(127.5)) * np.float32(math.sqrt(12) / 256)


def _paint(
    rng: np.random.Generator,
    image: np.ndarray,
    shape: _Placed,
    color: np.ndarray,
    kind: list[float],
    settings: ShapeSettings,
) -> None:
    """Lays a shape over the image, in a colour that differs from the mean of what it covers.

    Args:
        color: (3,) in [0, 1).
        kind: Five draws in [0, 1): texture, its period and angle; channel and value of another colour, if needed.
    """
    part = image[:, shape.window[0], shape.window[1]]
    mean = part[:, shape.mask].mean(axis=1)
    if np.abs(color - mean).max() < settings.contrast:
        channel = int(kind[3] * 3)
        below = max(mean[channel] - settings.contrast, 0)
        above = max(1 - mean[channel] - settings.contrast, 0)
        value = kind[4] * (below + above)
        color[channel] = value if value < below else mean[channel] + settings.contrast + value - below
    pattern = settings.texture * _texture(rng, shape.window, kind)
    part += (color.astype(np.float32)[:, None, None] + pattern - part) * shape.cover


def _texture(rng: np.random.Generator, window: Window, kind: list[float]) -> np.ndarray:
    """Flat, striped, checkered or noisy texture: float32 of the window's shape (or one that fits), in about [-1, 1].

    Noise has the standard deviation 1.
    """
    choice = int(kind[0] * 4)
    rows, columns = window
    if choice == 0:
        return np.zeros((1, 1), np.float32)
    if choice == 3:
        return _noise(rng, (rows.stop - rows.start, columns.stop - columns.start))
    period = PERIODS[0] * (PERIODS[1] / PERIODS[0]) ** kind[1]
    cos, sin = math.cos(math.pi * kind[2]) / period, math.sin(math.pi * kind[2]) / period
    x = np.arange(columns.start, columns.stop, dtype=np.float32)
    y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None]
    stripes = _wave(x * cos + y * sin)
    return stripes if choice == 1 else stripes * _wave(y * cos - x * sin)


def _wave(phase: np.ndarray) -> np.ndarray:
    """Square wave: 1 in the first half of each period, -1 in the second."""
    return np.where(phase - np.floor(phase) < 0.5, np.float32(1), np.float32(-1))


def _scene(image: np.ndarray, owner: np.ndarray, placed: list[_Placed], left: list[int], boxes: Boxes) -> Scene:
    kept = [i for i in range(len(placed)) if boxes == "amodal" or left[i] > 0]
    if len(kept) < len(placed):  # what is wholly hidden has no visible box
        owner = np.array([*np.searchsorted(kept, range(len(placed))), -1], np.int16)[owner]
    found = [
        shape.box if boxes == "amodal" else _box(owner[shape.window] == i, shape.window)
        for i, shape in enumerate(placed[j] for j in kept)
    ]
    np.clip(image, 0, 1, out=image)  # in place: of a large image there may be no room for another one
    image *= 255
    image += 0.5
    return Scene(
        image=image.astype(np.uint8).transpose(1, 2, 0),
        boxes=np.array(found, np.float32).reshape(-1, 4),
        labels=np.array([placed[i].label for i in kept], np.int64),
        visible=np.array([left[i] / placed[i].pixels for i in kept], np.float32),
        area=np.array([placed[i].area for i in kept], np.float32),
        truncated=np.array([placed[i].truncated for i in kept], bool),
        owner=owner,
    )
