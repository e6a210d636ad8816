"""Detections of images: of one pass of the network, or merged from several views.

What views find is taken to pixels of the original image, in float32, before all of it is merged at once
(:mod:`zoo.detection.scale.merging`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms

from zoo.detection.postprocessing import Candidates, in_range, non_maximum_suppression, to_original
from zoo.detection.scale import merging
from zoo.detection.scale.ranges import within
from zoo.detection.scale.views import (
    Crop,
    Layout,
    Size,
    View,
    check_learned,
    lay_out,
    pad_multiple,
    parse_views,
    shows_as_given,
)
from zoo.sharding import is_split

if TYPE_CHECKING:
    from zoo.detection.base import Detector

NEAR = 0.05
"""Share of a box's side: it ends at a tile's border if it is not farther from it. Networks are not exact."""
MOST = 10_000
"""Candidates of an image that are merged, the best of all views: the time goes with the square of their number."""
AFTER_NMS = ("soft_vote", "weighted")
"""Ways to merge that take what NMS leaves of each view."""


@torch.no_grad()
def detect(
    detector: "Detector",
    images: Any,
    maps: Any = None,
    sizes: Sequence[Size] | None = None,
    original_sizes: Sequence[Size] | None = None,
    views: Any = None,
    merge: merging.Merge | None = None,
) -> list[dict[str, Tensor]]:
    """Detections in images. Arguments, results and errors: see :meth:`zoo.detection.base.Detector.detect`.

    Args:
        images: (B, C, H, W); None where only their raw predictions are known.
        maps: Raw predictions for the images as they are, where they have been computed.
    """
    hp = detector.hparams
    method, views = hp.merge if merge is None else merge, hp.views if views is None else views
    views = parse_views([{}] if views is None else views, detector.strides[-1])
    whole = maps.image_size if images is None else (images.shape[2], images.shape[3])
    known = [whole] if sizes is None else sizes
    if method == "nms" and shows_as_given(views, known, known if original_sizes is None else original_sizes):
        return _detect_plain(detector, detector(images) if maps is None else maps, sizes, original_sizes)
    if images is None:
        raise ValueError("views and merge are of images, and these are raw predictions: give the images")
    trainer = detector._trainer
    if trainer is not None and trainer.world_size > 1 and is_split(trainer):
        raise ValueError(
            f"views are not computed under {type(trainer.strategy).__name__}: processes that share weights run alike, "
            "and each has its own number of tiles; evaluate with ddp, or on one device"
        )

    if detector.trained_ranges:
        check_learned(views, [whole] if sizes is None else sizes, detector.trained_ranges)

    def find(batch: Tensor, sizes: Sequence[Size]) -> Candidates:
        return detector.candidates(detector(batch) if maps is None or batch is not images else maps, sizes)

    sizes = [whole] * len(images) if sizes is None else sizes
    original_sizes = sizes if original_sizes is None else original_sizes
    multiple, stride = pad_multiple(detector.maps.strides), detector.strides[-1]
    limits = hp.score_threshold, hp.tiles_at_once, multiple, stride
    most = max(MOST, 30 * hp.max_detections)
    every = [found.best(most) for found in find_in_views(find, images, sizes, original_sizes, views, *limits)]
    if method in AFTER_NMS:
        every = [after_nms(found, hp.nms_threshold) for found in every]
    thresholds = hp.nms_threshold, hp.score_threshold, hp.max_detections
    return [merging.merge(*found, method, *thresholds, len(views)) for found in every]


def _detect_plain(
    detector: "Detector", maps: Any, sizes: Sequence[Size] | None, original_sizes: Sequence[Size] | None
) -> list[dict[str, Tensor]]:
    """Detections of one pass."""
    sizes = [maps.image_size] * (len(maps.boxes) // len(maps.branches)) if sizes is None else sizes
    hp, candidates = detector.hparams, in_range(detector.candidates(maps, sizes), sizes, original_sizes)
    found = [
        non_maximum_suppression(boxes, scores, labels, size, hp.score_threshold, hp.nms_threshold, hp.max_detections)
        for boxes, scores, labels, size in zip(*candidates[:3], sizes, strict=True)
    ]
    if original_sizes is not None:
        for detection, size, original in zip(found, sizes, original_sizes, strict=True):
            detection["boxes"] = to_original(detection["boxes"], size, original)
    return found


class Found(NamedTuple):
    """Candidates of one image out of all views, arguments of :func:`zoo.detection.scale.merging.merge`.

    Attributes:
        boxes: (n, 4) xyxy in pixels of the original image, float32.
        scores: (n,).
        labels: (n,) int64.
        views: (n,) int64, number of the view.
        cut: (n,) bool, whether a border between tiles cuts the box.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    views: Tensor
    cut: Tensor

    def best(self, count: int) -> "Found":
        """The best so many of them."""
        if len(self.scores) <= count:
            return self
        kept = self.scores.topk(count).indices
        return Found(*(each[kept] for each in self))


def find_in_views(
    find: Callable[[Tensor, Sequence[Size]], Candidates],
    images: Tensor,
    sizes: Sequence[Size],
    original_sizes: Sequence[Size],
    views: Sequence[View],
    score_threshold: float,
    tiles_at_once: int = 8,
    multiple: int = 32,
    stride: float = 1,
) -> list[Found]:
    """Candidates of images out of all views, those in the valid range of their view.

    Memory is that of a batch of tiles and of what is found: no more of an image is resized at once.

    Args:
        find: Computes the candidates in a batch of images, of their sizes before padding. The images of a view that
            shows them as they are, are the very tensor ``images``.
        images: (B, C, H, W).
        sizes: (height, width) of each before padding.
        original_sizes: (height, width) of each before it was resized.
        views: Of :func:`parse_views`.
        score_threshold: Candidates below, or at it, are left out.
        tiles_at_once, multiple, stride: See :func:`lay_out`.

    Raises:
        torch.OutOfMemoryError: For a view that needs more memory than there is; it is named.
        ValueError: For a view whose images the network does not take, or tiles below the stride.
    """
    if len(images) != len(sizes):
        raise ValueError(f"there are {len(sizes)} sizes for {len(images)} images: expected one each")
    if not sizes:
        return []
    parts, whole = list[tuple[Tensor, Found]](), (images.shape[2], images.shape[3])
    for number, view in enumerate(views):
        with _named(f"views[{number}] ({view})"):
            layout = lay_out(view, whole, sizes, original_sizes, tiles_at_once, multiple, stride)
            for crops, batch in _batches(images, view, layout):
                found = find(batch, [crop.size for crop in crops])
                pairs = [(sizes[crop.image], original_sizes[crop.image]) for crop in crops]
                parts.append(_in_original(found, crops, pairs, view, number, score_threshold))
    of_image = torch.cat([numbers for numbers, _ in parts])
    every = Found(*map(torch.cat, zip(*(found for _, found in parts), strict=True)))
    return [Found(*(each[of_image == i] for each in every)) for i in range(len(images))]


@contextmanager
def _named(view: str) -> Iterator[None]:
    """Names the view in errors of what is computed for it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{view}: {error}") from error
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):  # a CPU's words
            raise
        raise torch.OutOfMemoryError(
            f"{view} needs more memory than there is: take a smaller scale, or fewer tiles_at_once"
        ) from error


def _batches(images: Tensor, view: View, layout: Layout) -> Iterator[tuple[list[Crop], Tensor]]:
    """Crops, and the batch (at most ``at_once``, C, H, W) that shows them."""
    if layout.plain:
        yield layout.crops, images
        return
    for first in range(0, len(layout.crops), layout.at_once):
        crops = layout.crops[first : first + layout.at_once]
        batch = images.new_zeros((len(crops), images.shape[1], *layout.shape))
        for row, crop in zip(batch, crops, strict=True):
            part = images[crop.image, :, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
            if part.shape[1:] != crop.size:
                part = F.interpolate(part[None].float(), crop.size, mode="bilinear", antialias=True)[0]
            row[:, : crop.size[0], : crop.size[1]] = part.flip(-1) if view.flip else part
        yield crops, batch


def _in_original(
    found: Candidates,
    crops: Sequence[Crop],
    sizes: Sequence[tuple[Size, Size]],
    view: View,
    number: int,
    score_threshold: float,
) -> tuple[Tensor, Found]:
    """Numbers of images, and the candidates in crops of these that count, in pixels of the original images."""
    shown, factors, corners, borders = [], [], [], []
    for crop, ((height, width), (original_height, original_width)) in zip(crops, sizes, strict=True):
        y, x = original_height / height, original_width / width
        bottom, right = crop.top + crop.height, crop.left + crop.width
        shown.append([crop.size[1], crop.size[0]] * 2)
        factors.append([x * crop.width / crop.size[1], y * crop.height / crop.size[0]] * 2)
        corners.append([x * crop.left, y * crop.top] * 2)
        inner = (crop.left > 0, crop.top > 0, right < width, bottom < height)
        edges = (x * crop.left, y * crop.top, x * right, y * bottom)
        borders.append([edge if cuts else math.inf for edge, cuts in zip(edges, inner, strict=True)])
    numbers = torch.tensor([shown, factors, corners, borders], dtype=torch.float32, device=found.boxes.device)
    ends, factor, corner, border = numbers[:, :, None]
    boxes = found.boxes.float().clamp(min=0).minimum(ends)
    counts = (found.scores > score_threshold) & (boxes[..., 2:] > boxes[..., :2]).all(-1)
    if view.flip:
        x1, y1, x2, y2 = boxes.unbind(-1)
        boxes = torch.stack([ends[..., 0] - x2, y1, ends[..., 0] - x1, y2], -1)
    boxes = boxes * factor + corner
    counts &= within(boxes, *view.valid_range)
    if found.ranges is not None:
        counts &= within(boxes, *found.ranges.unbind(1))
    sides = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)
    cut = ((boxes - border).abs() <= NEAR * sides).any(-1)
    images = torch.tensor([crop.image for crop in crops], device=boxes.device)[:, None].expand_as(counts)
    views = torch.full_like(images, number)
    return images[counts], Found(*(each[counts] for each in (boxes, found.scores, found.labels, views, cut)))


def after_nms(found: Found, threshold: float) -> Found:
    """Candidates that NMS leaves of each view, of its whole boxes and of its cut ones."""
    kept = [found.views[:0]]
    for view in found.views.unique():
        for cut in (False, True):
            own = ((found.views == view) & (found.cut == cut)).nonzero()[:, 0]
            kept.append(own[batched_nms(found.boxes[own], found.scores[own], found.labels[own], threshold)])
    return Found(*(each[torch.cat(kept)] for each in found))
