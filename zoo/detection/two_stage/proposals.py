"""Region proposals: their anchors, the head that predicts them, and which of them the second stage looks at.

All but the head is float32, whatever the precision.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from zoo.common.labels import is_remote
from zoo.detection.assign import pairwise_iou
from zoo.detection.cells import RETINANET_WEIGHTS, Anchors, Cells, base_anchors, decode_deltas, place_anchors
from zoo.detection.heads import by_anchor
from zoo.detection.postprocessing import at_most, repeat

RATIOS = 3
"""Anchors of each size: a square, and rectangles as large of twice the height, and of twice the width."""
LEAST_SIDE = 1e-3
"""Pixels that a proposal has at least, within its image, as in torchvision."""
ROUNDS = 32
"""Of NMS where nobody may wait for its end: see :func:`suppress_in_rounds`. 2,000 anchors of one size, whose scores are
as smooth a field as of one value every 25 cells, take 20 until it is exact."""


class RegionMaps(NamedTuple):
    """Raw predictions of :meth:`zoo.FasterRCNN.forward` for N anchors, all levels, finest first, and the maps.

    Attributes:
        objectness: (B, N) logits.
        boxes: (B, N, 4) deltas.
        features: Maps (B, channels, h, w) of the levels.
        shapes: (rows, columns) of each.
        image_size: (H, W) of the images.
        branches: See :class:`zoo.detection.DenseMaps`.
    """

    objectness: Tensor
    boxes: Tensor
    features: tuple[Tensor, ...]
    shapes: tuple[tuple[int, int], ...]
    image_size: tuple[int, int]
    branches: tuple[int, ...] = (0,)


class Proposals(NamedTuple):
    """Proposals of a batch, R an image, best first.

    Attributes:
        boxes: (B, R, 4) xyxy in pixels, within the images; zeros where there are no more.
        scores: (B, R) logits; minus infinity where there are no more.
    """

    boxes: Tensor
    scores: Tensor

    @property
    def valid(self) -> Tensor:
        """Places (B, R) in which there is one."""
        return self.scores > -torch.inf


class ProposalHead(nn.Module):
    """A 3x3 convolution, and objectness and box of each anchor (Ren et al. 2015, section 3.1), shared by all levels.

    Args:
        in_channels: Of the maps.
        channels: Of what the convolution gives.
        anchors: Anchors a cell, A.
        depth: Convolutions, one behind the other: ``conv``, ``conv2`` and so on.
    """

    def __init__(self, in_channels: int, channels: int, anchors: int, depth: int = 1) -> None:
        super().__init__()
        self.convs = ("conv", *(f"conv{number}" for number in range(2, depth + 1)))
        for name in self.convs:
            self.add_module(name, nn.Conv2d(in_channels, channels, 3, padding=1))
            in_channels = channels
        self.cls_out, self.box_out = nn.Conv2d(channels, anchors, 1), nn.Conv2d(channels, anchors * 4, 1)
        for layer in self.children():
            nn.init.normal_(cast(Tensor, layer.weight), std=0.01)
            nn.init.zeros_(cast(Tensor, layer.bias))

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Objectness (B, N), logits, and boxes (B, N, 4), deltas, of all anchors of all levels, finest first."""
        hidden = list(maps)
        for name in self.convs:
            hidden = [F.relu(self.get_submodule(name)(each)) for each in hidden]
        objectness = torch.cat([by_anchor(self.cls_out(each), 1) for each in hidden], 1).squeeze(2)
        return objectness, torch.cat([by_anchor(self.box_out(each), 4) for each in hidden], 1)


def anchor_sides(sizes: Sequence[float] | None, strides: Sequence[float]) -> list[list[float]]:
    """Sides in pixels of each level's anchors; None: eight strides, or of one level 2, 4, 8, 16 and 32 strides.

    Raises:
        ValueError: For sizes that are not one for each of several levels.
    """
    if sizes is None:
        factors = (2, 4, 8, 16, 32) if len(strides) == 1 else (8,)
        return [[factor * stride for factor in factors] for stride in strides]
    if not sizes or not all(0 < size < math.inf for size in sizes):
        raise ValueError(f"anchor_sizes are {list(sizes)}: expected sides in pixels, finite numbers above 0")
    if len(strides) == 1:
        return [list(sizes)]
    if len(sizes) != len(strides):
        raise ValueError(f"anchor_sizes are {list(sizes)}: expected {len(strides)}, one for each level")
    return [[size] for size in sizes]


def proposal_cells(
    sides: Sequence[Sequence[float]],
    shapes: Sequence[tuple[int, int]],
    strides: Sequence[float],
    image_size: tuple[int, int],
    anchors: Anchors = "centered",
    device: torch.device | str | None = None,
) -> Cells:
    """The anchors of one batch of images: of each size three.

    Args:
        sides: Of each level, sides in pixels of the squares that its anchors are as large as.
        shapes, strides, image_size, anchors, device: See :func:`zoo.detection.cells.make_cells`.
    """
    placed = [
        place_anchors(base_anchors(own, anchors), shape, stride, image_size, anchors)
        for own, shape, stride in zip(sides, shapes, strides, strict=True)
    ]
    counts = [each.shape[0] for each in placed]
    all_anchors = torch.cat(placed).to(device)
    ranges = torch.tensor([[0.0, math.inf]], dtype=torch.float32, device=device).expand(sum(counts), 2)
    return Cells(all_anchors, ranges, all_anchors.split(counts))


@torch.no_grad()
def propose(
    maps: RegionMaps,
    cells: Cells,
    ends: Tensor,
    pre_nms_top_k: int,
    post_nms_top_k: int,
    threshold: float,
    waits: bool = True,
    wanted: Callable[[Tensor], Tensor] | None = None,
) -> Proposals:
    """The proposals of a batch: of each level the best anchors, moved, after NMS; of these the best of all levels.

    Args:
        maps: Raw predictions.
        cells: Their anchors.
        ends: (B, 1, 4) or (1, 1, 4), width, height, width, height at which an image's boxes end.
        pre_nms_top_k: Anchors of a level that NMS compares, at most.
        post_nms_top_k: Proposals of an image, at most.
        threshold: IoU above which NMS drops the lower of two.
        waits: Whether the host may wait for the device. If not, NMS on an accelerator is :func:`suppress_in_rounds`.
        wanted: Tells which boxes (B, n, 4) may be proposals, (B, n). None: all.

    Returns:
        As many of each image as there are places for: R is the same in all batches of images of one size.
    """
    found, start = [], 0
    with torch.autocast(maps.boxes.device.type, enabled=False):
        for anchors, count in zip(cells.levels, cells.counts, strict=True):
            level = slice(start, start + count)
            scores, index = maps.objectness[:, level].float().topk(torch.sym_min(pre_nms_top_k, count))
            deltas = maps.boxes[:, level].float().gather(1, index[..., None].expand(-1, -1, 4))
            boxes = decode_deltas(deltas, anchors[index], RETINANET_WEIGHTS).clamp(min=0).minimum(ends)
            large = (boxes[..., 2:] - boxes[..., :2] >= LEAST_SIDE).all(-1)
            large = large if wanted is None else large & wanted(boxes)
            boxes = torch.where(large[..., None], boxes, 0.0)
            if torch.compiler.is_exporting():
                kept = suppress_in_rounds(boxes, large, threshold)
            elif waits or not is_remote(boxes):
                kept = large & suppress(boxes, scores, threshold)
            else:
                kept = suppress_in_rounds(boxes, large, threshold, ROUNDS)
            found.append((boxes, torch.where(kept, scores, -torch.inf)))
            start += count
        of_levels, scores_of_levels = zip(*found, strict=True)
        boxes, scores = torch.cat(of_levels, 1), torch.cat(scores_of_levels, 1)
        scores, index = scores.topk(torch.sym_min(post_nms_top_k, scores.shape[1]))
        boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4))
        return Proposals(torch.where((scores > -torch.inf)[..., None], boxes, 0.0), scores)


def suppress(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Greedy NMS of each image: (B, n), whether a box is kept, of boxes (B, n, 4) and scores (B, n)."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for own, boxes_of_image, scores_of_image in zip(kept, boxes, scores, strict=True):
        own[nms(boxes_of_image, scores_of_image, threshold)] = True
    return kept


def suppress_in_rounds(boxes: Tensor, among: Tensor, threshold: float, rounds: int | None = None) -> Tensor:
    """Greedy NMS of all images at once, by rounds in which nobody waits for the device.

    In each round those are kept that none which was kept overlaps and comes before. After k rounds it is right for the
    boxes that are decided by chains of less than k others, each dropped or kept because of the one before. After an
    even number, those of longer chains are all kept that NMS keeps, and some that it would drop.

    Args:
        boxes: (B, n, 4), best first.
        among: (B, n), the boxes that there are.
        threshold: IoU.
        rounds: None: until nothing changes, which is NMS, and for which the host waits.

    Returns:
        (B, n), whether a box is kept.
    """
    # By column what comes after; matrix products of 0 and 1 are exact here, and read each pair once.
    overlaps = (pairwise_iou(boxes, boxes) > at_most(threshold)).triu(1) & among[..., None]
    overlaps_float = overlaps.float()

    def step(kept: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.bmm(kept.float()[:, None], overlaps_float).squeeze(1) > 0
        return among & ~hidden, kept.clone()

    def changes(kept: Tensor, before: Tensor) -> Tensor:
        return (kept != before).any()

    state = (among.clone(), torch.zeros_like(among))
    if rounds is None:
        return repeat(changes, step, state)[0]
    for _ in range(rounds):
        state = step(*state)
    return state[0]


def image_ends(sizes: Any, device: torch.device | str) -> Tensor:
    """Ends of boxes of each image, (B, 1, 4): width, height, width, height; nobody waits for the device.

    Args:
        sizes: (height, width) of each image, numbers or tensors; or (B, 2).
        device: Of the result.
    """
    if isinstance(sizes, Tensor):
        sides = sizes.to(device, torch.float32, non_blocking=True)
    else:
        sides = torch.stack([_filled(side, device) for size in sizes for side in size]).view(-1, 2)
    return sides.flip(1).repeat(1, 2)[:, None]


def _filled(side: Any, device: torch.device | str) -> Tensor:
    """A side as a scalar tensor: a copy of a number would be waited for."""
    if isinstance(side, Tensor):
        return side.to(device, torch.float32, non_blocking=True)
    return torch.full((), side, dtype=torch.float32, device=device)
