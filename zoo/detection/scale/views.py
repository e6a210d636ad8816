"""Views of images at test time: scales, flips and tiles, each with the sizes of objects that it is asked for.

Every view is shown to the same network, and what that finds in them is merged in pixels of the original image:
:mod:`zoo.detection.detections`. Scales with valid ranges are the image pyramid of SNIP (Singh and Davis 2018); tiles
beside the whole image are slicing aided hyper inference, SAHI (Akyon et al. 2022, arXiv 2202.06934).

A view resizes the images that it is given: for scales above 1, and tiles of large images, let the data module leave
images as large as they are.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from zoo.detection.scale.ranges import Range, check_valid_ranges

Size = tuple[int, int]  # height and width


class View(NamedTuple):
    """A view of an image; as plain data a mapping with these keys.

    Attributes:
        scale: Factor by which the image is resized, or its tiles are.
        flip: Whether it is mirrored, left to right.
        tile: Side of its tiles in pixels of the original image, before ``scale``. None: the whole image is shown.
        overlap: Share of a tile's side that neighbours share at least, from 0 to 0.5.
        valid_range: Least and greatest size of the objects that are taken from it, the square root of their boxes'
            areas in pixels of the original image. None for no end.
    """

    scale: float = 1.0
    flip: bool = False
    tile: float | None = None
    overlap: float = 0.25
    valid_range: Range = (0, None)

    def __str__(self) -> str:
        parts = [f"scale {self.scale:g}"]
        parts += ["flip"] if self.flip else []
        parts += [] if self.tile is None else [f"tile {self.tile:g}"]
        return ", ".join(parts)


def parse_views(views: Sequence[View | Mapping[str, Any]], stride: float = 1) -> tuple[View, ...]:
    """Views out of plain data.

    Args:
        views: At least one.
        stride: The network's largest stride, which no tile may be smaller than.

    Raises:
        ValueError: For an unknown key, a value out of range, and ranges that leave objects of a size to no view.
    """
    if isinstance(views, Mapping | str) or not isinstance(views, Sequence) or not views:
        raise ValueError(f"views is {views!r:.80}: expected a list of mappings such as {{'scale': 2.0}}, or None")
    found = tuple(_parse_view(number, view) for number, view in enumerate(views))
    for number, view in enumerate(found):
        if view.tile is not None and view.tile * view.scale < stride:
            raise ValueError(
                f"views[{number}] shows tiles of {view.tile * view.scale:g} pixels: expected at least the network's "
                f"largest stride, {stride:g}"
            )
    names = [f"views[{number}] ({view})" for number, view in enumerate(found)]
    check_valid_ranges([view.valid_range for view in found], names)
    return found


def _parse_view(number: int, given: Any) -> View:
    name = f"views[{number}]"
    given = given._asdict() if isinstance(given, View) else given
    if not isinstance(given, Mapping):
        raise ValueError(f"{name} is {given!r:.80}: expected a mapping with {', '.join(View._fields)}")
    if unknown := [key for key in given if key not in View._fields]:
        raise ValueError(f"{name} has no {unknown[0]!r}: expected {', '.join(View._fields)}")
    view = View(**given)
    low_high = view.valid_range
    checks = {
        "scale": (_is_number(view.scale) and view.scale > 0, "a finite number above 0"),
        "flip": (isinstance(view.flip, bool), "true or false"),
        "tile": (view.tile is None or (_is_number(view.tile) and view.tile >= 1), "at least 1 pixel, or None"),
        "overlap": (_is_number(view.overlap) and 0 <= view.overlap <= 0.5, "a share of the tile, 0 to 0.5"),
        "valid_range": (
            isinstance(low_high, Sequence)
            and len(low_high) == 2
            and _is_number(low_high[0])
            and (low_high[1] is None or _is_number(low_high[1])),
            "two numbers of pixels, the second one None for no end",
        ),
    }
    for key, (is_right, expected) in checks.items():
        if not is_right:
            raise ValueError(f"{key} of {name} is {getattr(view, key)!r}: expected {expected}")
    return view._replace(valid_range=(low_high[0], low_high[1]))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# Where views look.


class Crop(NamedTuple):
    """A part of an image, as a view shows it.

    Attributes:
        image: Number of the image in its batch.
        top, left, height, width: Where it lies in the image, in pixels.
        size: (height, width) that it is resized to.
    """

    image: int
    top: int
    left: int
    height: int
    width: int
    size: Size


class Layout(NamedTuple):
    """All that a view shows of a batch of images.

    Attributes:
        crops: Parts of the images.
        shape: (H, W) that these are padded to, once they are resized: one for all, so that a network compiles once.
        at_once: Crops in a batch for the network.
        plain: Tells whether it shows the batch as it is.
    """

    crops: list[Crop]
    shape: Size
    at_once: int
    plain: bool = False

    @property
    def passes(self) -> int:
        """Batches for the network."""
        return -(-len(self.crops) // self.at_once)


def lay_out(
    view: View,
    shape: Size,
    sizes: Sequence[Size],
    original_sizes: Sequence[Size],
    tiles_at_once: int,
    multiple: int = 32,
    stride: float = 1,
) -> Layout:
    """The parts of images that a view shows.

    Tiles that hold the whole of each image are the images. Of whole images, no more are shown at once than have the
    pixels of the batch.

    Args:
        view: A view.
        shape: (H, W) of the batch, which a view of scale 1 keeps.
        sizes: (height, width) of each image before padding.
        original_sizes: (height, width) of each before it was resized.
        tiles_at_once: Tiles in a batch.
        multiple: H and W become multiples of this.
        stride: Least side of a tile for the network.

    Raises:
        ValueError: For tiles smaller than that.
    """
    tiles = [_tile(view, *pair) for pair in zip(sizes, original_sizes, strict=True)]
    whole = all(t >= s for tile, size in zip(tiles, sizes, strict=True) for t, s in zip(tile, size, strict=True))
    if not whole and (least := min(map(min, tiles)) * view.scale) < stride:
        raise ValueError(
            f"its tiles have {least:g} pixels, of images that were resized: expected at least the network's largest "
            f"stride, {stride:g}"
        )
    crops = []
    for image, ((height, width), (tile_height, tile_width)) in enumerate(zip(sizes, tiles, strict=True)):
        tile_height, tile_width = min(height, tile_height), min(width, tile_width)
        shown = (max(1, round(tile_height * view.scale)), max(1, round(tile_width * view.scale)))
        for top in starts(height, tile_height, view.overlap):
            for left in starts(width, tile_width, view.overlap):
                crops.append(Crop(image, top, left, tile_height, tile_width, shown))
    if whole and view.scale == 1:
        return Layout(crops, shape, len(crops), plain=not view.flip)
    height, width = (-(-max(crop.size[axis] for crop in crops) // multiple) * multiple for axis in (0, 1))
    most = min(len(crops), int(len(crops) / view.scale**2)) if whole else tiles_at_once
    return Layout(crops, (height, width), max(1, most))


def _tile(view: View, size: Size, original_size: Size) -> Size:
    """(height, width) of a view's tiles in pixels of an image; of an image as a whole, its own."""
    if view.tile is None:
        return size
    height, width = (max(1, round(view.tile * s / o)) for s, o in zip(size, original_size, strict=True))
    return height, width


def starts(length: int, side: int, overlap: float) -> list[int]:
    """First pixels of tiles of a side that cover a length: the last one ends where the length does.

    Neighbours share at least ``overlap`` of their side.
    """
    if side >= length:
        return [0]
    return [*range(0, length - side, max(1, int(side * (1 - overlap)))), length - side]


def shows_as_given(views: Sequence[View], sizes: Sequence[Size], original_sizes: Sequence[Size]) -> bool:
    """Tells whether there is one view, and it shows images of these sizes as they are: plain detection."""
    if len(views) != 1 or views[0].flip or views[0].scale != 1:
        return False
    return views[0].tile is None or lay_out(views[0], (0, 0), sizes, original_sizes, tiles_at_once=1).plain


def pad_multiple(strides: Sequence[int]) -> int:
    """Number that sides are padded to multiples of: 32, as data modules do, or a backbone's coarsest stride."""
    return max(32, *strides)


def check_learned(views: Sequence[View], sizes: Sequence[Size], learned: Mapping[int, Range]) -> None:
    """Raises ValueError for a view of objects that were not learned at its scale, as SNIP trains.

    Args:
        views: Those of tiles are not looked at, as images may be of another kind than in training.
        sizes: (height, width) of the images that they resize.
        learned: Valid range in training, by the short side of an image.
    """
    for number, view in enumerate(views):
        if view.tile is not None:
            continue
        for size in sizes:
            shown = min(size) * view.scale
            side = min(learned, key=lambda side: abs(math.log(side / shown)))
            (low, high), (least, most) = view.valid_range, learned[side]
            if (most is not None and low >= most) or (high is not None and high <= least):
                raise ValueError(
                    f"views[{number}] ({view}) is of objects of {_in_words(low, high)}, but at a short side of {side} "
                    f"the model has learned those of {_in_words(least, most)}: give the views its ranges"
                )


def _in_words(low: float, high: float | None) -> str:
    return f"{low:g} pixels and more" if high is None else f"{low:g} to {high:g} pixels"


class Cost(NamedTuple):
    """Cost of views of one image.

    Attributes:
        passes: Batches that the network computes.
        pixels: Pixels that it sees in all of them, padding as well.
        plain_pixels: Those of the image alone.
    """

    passes: int
    pixels: int
    plain_pixels: int

    @property
    def factor(self) -> float:
        """Ratio of the pixels to those of plain detection, and about that of the times."""
        return self.pixels / self.plain_pixels


def cost(
    views: Sequence[View | Mapping[str, Any]],
    size: Size,
    original_size: Size | None = None,
    tiles_at_once: int = 8,
    multiple: int = 32,
) -> Cost:
    """Counts what views of an image cost.

    Args:
        views: See :class:`View`.
        size: (height, width) of the image.
        original_size: The same before it was resized. None: it was not.
        tiles_at_once: Tiles in a batch.
        multiple: Sides are padded to multiples of this.
    """
    shape: Any = tuple(-(-side // multiple) * multiple for side in size)
    original_size = size if original_size is None else original_size
    layouts = [lay_out(view, shape, [size], [original_size], tiles_at_once, multiple) for view in parse_views(views)]
    pixels = sum(len(each.crops) * math.prod(each.shape) for each in layouts)
    return Cost(sum(each.passes for each in layouts), pixels, math.prod(shape))
