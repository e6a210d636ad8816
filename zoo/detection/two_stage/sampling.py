"""Samples that the two stages learn from, of fixed numbers, and whose they are; nobody waits for the device.

Anchors and regions are drawn by random priorities: the highest of those with an object, up to their share, then the
highest of those without. Where there are not enough of both, places are empty.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.detection.assign import BACKGROUND, IGNORE, ignore_near, pairwise_iou
from zoo.detection.cells import Targets
from zoo.detection.two_stage.proposals import Proposals

EMPTY = -1
GOLDEN = (5**0.5 - 1) / 2


class Samples(NamedTuple):
    """Samples that a loss is computed of; EMPTY in places that nothing is in.

    Attributes:
        anchors: (B, n) int64, numbers of anchors, of the first stage.
        regions: (B, m) int64, numbers of regions, of the second: proposals, then the slots of the targets.
    """

    anchors: Tensor
    regions: Tensor


class Regions(NamedTuple):
    """Regions of a batch, R an image, and the objects that they are of.

    Attributes:
        boxes: (B, R, 4) xyxy in pixels.
        match: (B, R) int64: a slot of the targets, BACKGROUND or IGNORE.
    """

    boxes: Tensor
    match: Tensor


def priorities(like: Tensor, count: int, random: bool) -> Tensor:
    """Priorities (B, count) in [0, 1), float32, for as many images as ``like`` has.

    Args:
        like: (B, ...), on the device that they are for.
        count: Of each image.
        random: Whether they are drawn. Else they are the same for each image, well spread, and those of the first few
            do not depend on the count: what is sampled of an image does not depend on the others in its batch.
    """
    if random:
        return torch.rand(len(like), count, device=like.device, dtype=torch.float32)
    numbers = torch.arange(1, count + 1, device=like.device, dtype=torch.float64)
    return (numbers * GOLDEN).frac().float().expand(len(like), count)


def sample(match: Tensor, priority: Tensor, count: int, share: float) -> Tensor:
    """Numbers (B, count) of what is sampled, objects first; EMPTY behind them.

    Args:
        match: (B, N): what has an object, BACKGROUND, or IGNORE.
        priority: (B, N) in [0, 1).
        count: Of each image.
        share: Of these, at most, with an object.
    """
    most = int(count * share)
    match, priority = F.pad(match, (0, count), value=IGNORE), F.pad(priority, (0, count))
    order = torch.where(match == BACKGROUND, 1 + priority, 0.0)
    if most:
        best, index = torch.where(match >= 0, 1 + priority, 0.0).topk(most, 1)
        order = order.scatter_add(1, index, torch.where(best > 0, 1 + best, 0.0))
    best, index = order.topk(count, 1)
    return torch.where(best > 0, index, EMPTY)


def match_regions(proposals: Proposals, targets: Targets, with_targets: bool, positive: float = 0.5) -> Regions:
    """Regions and their objects: each belongs to the object that it overlaps most, if by ``positive``.

    Source: Girshick 2015, "Fast R-CNN", section 2.3. The others are background, or ignored as anchors are: see
    :func:`zoo.detection.assign.ignore_near`.

    Args:
        proposals: R of each image.
        targets: M slots of each.
        with_targets: Whether the objects are regions, too: before the first stage has learned anything, there is else
            nothing for the second to learn of objects.
        positive: IoU.
    """
    boxes, there = proposals.boxes, proposals.valid
    if with_targets:
        boxes, there = torch.cat([boxes, targets.boxes], 1), torch.cat([there, targets.valid], 1)
    iou = torch.where(targets.valid[..., None], pairwise_iou(boxes, targets.boxes), -1.0)
    best, index = iou.max(1)
    match = torch.where(best < positive, BACKGROUND, index)
    match = ignore_near(match, boxes, targets.boxes, targets.crowd, targets.unwanted)
    return Regions(boxes, torch.where(there, match, IGNORE))


def take(regions: Regions, chosen: Tensor) -> tuple[Regions, Tensor]:
    """The regions that are chosen, R of them, and in which of the places (B, R) there is one: the others have an area.

    Args:
        regions: All of them.
        chosen: (B, R) int64, their numbers, or EMPTY.
    """
    there, index = chosen != EMPTY, chosen.clamp(min=0)
    boxes = regions.boxes.gather(1, index[..., None].expand(-1, -1, 4))
    boxes = torch.cat([boxes[..., :2], boxes[..., 2:] + ~there[..., None]], -1)
    return Regions(boxes, regions.match.gather(1, index)), there
