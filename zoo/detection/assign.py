"""Assignment of objects to cells, of FCOS, ATSS and RetinaNet, for all images of a batch at once.

Each gives ``match`` (B, N) int64: an index into the M slots of the image's targets; BACKGROUND; or IGNORE, for what is
neither. Pairs of objects and anchors are tensors (B, M, N), the anchors last, where memory is contiguous.

Objects outside of a valid range of sizes take no part, as in SNIP (Singh and Davis 2018, section 4): no anchor is
theirs, and those that overlap them are no background. Deviations: an anchor that overlaps one, and belongs to an object
inside of the range, is still learned, where the released code of TridentNet ignores it; and FCOS, which has points in
place of anchors, ignores those that would belong to such an object.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from zoo.detection.cells import Anchors, Cells, Head, Targets

BACKGROUND, IGNORE = -1, -2
# Pairs of objects and anchors that are looked at together: 256 MB for each number kept of a pair.
MAX_PAIRS = 64_000_000
UNWANTED_IOU = 0.3
"""Anchors whose IoU with an unwanted object is above this are no background, as in the released code of TridentNet."""


@torch.no_grad()
def assign(
    head: Head | Literal["rpn"],
    cells: Cells,
    targets: Targets,
    anchors: Anchors = "centered",
    center_radius: float = 1.5,
    parts: int | None = None,
) -> Tensor:
    """Matches the cells of a batch, by the rule of a head.

    Cells mostly inside a crowd region are ignored where they would be background, and so are those of an unwanted
    object: anchors that overlap it by more than UNWANTED_IOU; of FCOS's points, those that would be its own.

    Args:
        head: Whose rule. "rpn": of Faster R-CNN's region proposals, RetinaNet's with IoUs of 0.7 and 0.3.
        cells: The anchors.
        targets: The objects.
        anchors: "torchvision" breaks FCOS's ties as torchvision does: see :func:`assign_fcos`.
        center_radius: For "fcos".
        parts: In how many parts the batch is looked at, which is what the memory goes with. None:
            :func:`parts_of_a_batch`, which a compiled caller has to ask for outside of its graph.

    Returns:
        ``match`` (B, N).
    """
    rules: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "fcos": partial(assign_fcos, cells, radius=center_radius, as_torchvision=anchors == "torchvision"),
        "atss": partial(assign_atss, cells),
        "retinanet": partial(assign_retinanet, cells),
        "rpn": partial(assign_retinanet, cells, positive=0.7, negative=0.3),
    }
    parts = parts_of_a_batch(cells, targets) if parts is None else parts

    def matched(boxes: Tensor, valid: Tensor, crowd: Tensor | None, unwanted: Tensor | None) -> Tensor:
        match = rules[head](boxes, valid)
        if head == "fcos" and unwanted is not None:
            theirs, unwanted = rules[head](boxes, unwanted) != BACKGROUND, None
            match = torch.where((match == BACKGROUND) & theirs, IGNORE, match)
        return ignore_near(match, cells.anchors, boxes, crowd, unwanted)

    with torch.autocast(cells.anchors.device.type, enabled=False):
        if parts == 1:
            return matched(targets.boxes, targets.valid, targets.crowd, targets.unwanted)
        of_slots = (targets.boxes, targets.valid, targets.crowd, targets.unwanted)
        split = [[None] * parts if each is None else each.tensor_split(parts) for each in of_slots]
        return torch.cat([matched(*part) for part in zip(*split, strict=True)])


def ignore_near(match: Tensor, anchors: Tensor, boxes: Tensor, crowd: Tensor | None, unwanted: Tensor | None) -> Tensor:
    """``match`` (B, N) with IGNORE for background in a crowd region, and for what overlaps an unwanted object.

    Args:
        match: Of the anchors.
        anchors: (N, 4) or (B, N, 4).
        boxes: (B, M, 4) xyxy.
        crowd: (B, M), which of them are regions that hide what is mostly inside. None: none.
        unwanted: (B, M), which of them are objects to be overlapped by at most UNWANTED_IOU. None: none.
    """
    for chosen, measure, limit in ((crowd, _inside_share, 0.5), (unwanted, pairwise_iou, UNWANTED_IOU)):
        if chosen is not None:
            near = measure(anchors, torch.where(chosen[..., None], boxes, 0.0)).amax(1) > limit
            match = torch.where((match == BACKGROUND) & near, IGNORE, match)
    return match


def parts_of_a_batch(cells: Cells, targets: Targets) -> int:
    """Number of parts of a batch such that none has over MAX_PAIRS pairs, or is of one image: mostly 1."""
    images, slots = targets.valid.shape
    at_once = max(1, MAX_PAIRS // (slots * len(cells.anchors)))
    return max(1, -(-images // at_once))


def assign_fcos(
    cells: Cells, boxes: Tensor, valid: Tensor, radius: float = 1.5, as_torchvision: bool = False
) -> Tensor:
    """FCOS (Tian et al. 2019, section 3.2, with the centre sampling of the released code).

    A point belongs to the smallest box that it lies in, at most ``radius`` strides from its centre along each axis, and
    whose farthest side is within the range of its level, bounds included.

    Args:
        cells: Points as squares of one stride.
        boxes: (B, M, 4) xyxy.
        valid: (B, M).
        radius: In strides.
        as_torchvision: Bounds of ranges excluded; and areas compared as ``1e8 - area`` in float32, so that the first
            box wins among those that differ by less than 8 square pixels or so.
    """
    x, y = (each[None, None] for each in cells.centers.unbind(1))
    near = radius * cells.sides
    x1, y1, x2, y2 = (each[..., None] for each in boxes.unbind(2))
    left, top, right, bottom = x - x1, y - y1, x2 - x, y2 - y
    nearest = torch.minimum(torch.minimum(left, top), torch.minimum(right, bottom))
    farthest = torch.maximum(torch.maximum(left, top), torch.maximum(right, bottom))
    off_center = torch.maximum((x - (x1 + x2) / 2).abs(), (y - (y1 + y2) / 2).abs())
    low, high = cells.ranges[:, 0], cells.ranges[:, 1]
    in_range = (farthest > low) & (farthest < high) if as_torchvision else (farthest >= low) & (farthest <= high)
    candidate = (nearest > 0) & (off_center < near) & in_range & valid[..., None]
    area = (x2 - x1) * (y2 - y1)
    size = area - 1e8 if as_torchvision else area
    smallest, index = torch.where(candidate, size, torch.inf).min(dim=1)
    return torch.where(smallest < torch.inf, index, BACKGROUND)


def assign_retinanet(
    cells: Cells, boxes: Tensor, valid: Tensor, positive: float = 0.5, negative: float = 0.4
) -> Tensor:
    """RetinaNet (Lin et al. 2017, section 4), with low-quality matches, as in detectron2.

    An anchor belongs to the box that it overlaps most if their IoU is at least ``positive``; below ``negative`` it is
    background, between the two it is ignored. The anchors that overlap a box most, ties included, each belong to the
    box that they themselves overlap most, however little, but not for nothing: there, for a box outside of all anchors,
    detectron2 and torchvision give it every one of them.

    Args:
        cells: Anchors.
        boxes: (B, M, 4) xyxy.
        valid: (B, M).
        positive, negative: IoUs.
    """
    iou = torch.where(valid[..., None], pairwise_iou(cells.anchors, boxes), -1.0)
    best, index = iou.max(dim=1)
    match = torch.where(best < negative, BACKGROUND, torch.where(best < positive, IGNORE, index))
    best_of_box = iou.amax(dim=2, keepdim=True)
    # A box that no anchor overlaps, outside of the image, would else be overlapped most by all of them.
    low_quality = ((iou == best_of_box) & (best_of_box > 0)).any(1)
    return torch.where(low_quality, index, match)


def assign_atss(cells: Cells, boxes: Tensor, valid: Tensor, candidates: int = 9) -> Tensor:
    """ATSS (Zhang et al. 2020, algorithm 1).

    For each box the ``candidates`` anchors of each level whose centres are nearest to its own; of these, those are
    positive whose IoU reaches the mean plus the (unbiased) standard deviation of all candidates' IoUs, and whose centre
    lies inside the box. An anchor that several boxes claim goes to the one it overlaps most.

    Args:
        cells: Square anchors.
        boxes: (B, M, 4) xyxy.
        valid: (B, M).
        candidates: A level's; all of a level that has fewer.
    """
    iou = pairwise_iou(cells.anchors, boxes)
    x, y = (each[None, None] for each in cells.centers.unbind(1))
    x1, y1, x2, y2 = (each[..., None] for each in boxes.unbind(2))
    # Squares are ordered as distances are, and need no root.
    distance = (x - (x1 + x2) / 2).square() + (y - (y1 + y2) / 2).square()
    chosen, start = [], 0
    for count in cells.counts:
        level = distance[..., start : start + count]
        chosen.append(level.topk(min(candidates, count), dim=2, largest=False).indices + start)
        start += count
    indices = torch.cat(chosen, dim=2)
    overlaps = iou.gather(2, indices)
    threshold = overlaps.mean(2, keepdim=True) + overlaps.std(2, keepdim=True)
    nearest = torch.minimum(torch.minimum(x - x1, y - y1), torch.minimum(x2 - x, y2 - y))
    inside = nearest.gather(2, indices) > 0.01  # pixels, as in the released code
    positive = torch.zeros_like(iou, dtype=torch.bool).scatter(2, indices, (overlaps >= threshold) & inside)
    claimed, index = torch.where(positive & valid[..., None], iou, -1.0).max(dim=1)
    return torch.where(claimed >= 0, index, BACKGROUND)


def pairwise_iou(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Intersection over union (B, M, N) of boxes (B, M, 4) and anchors, (N, 4) or (B, N, 4); 0 for one without area."""
    intersection = _intersection(anchors, boxes)
    union = _area(boxes)[..., None] + _area(anchors).unsqueeze(-2) - intersection
    return intersection / union


def _inside_share(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Share (B, M, N) of each anchor that lies inside each box."""
    return _intersection(anchors, boxes) / _area(anchors).unsqueeze(-2)


def _intersection(anchors: Tensor, boxes: Tensor) -> Tensor:
    x1, y1, x2, y2 = (each[..., None] for each in boxes.unbind(2))
    left, top, right, bottom = (each.unsqueeze(-2) for each in anchors.unbind(-1))
    width = (torch.minimum(x2, right) - torch.maximum(x1, left)).clamp(min=0)
    height = (torch.minimum(y2, bottom) - torch.maximum(y1, top)).clamp(min=0)
    return width * height


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
