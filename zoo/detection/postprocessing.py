"""Post-processing of raw predictions: pre-NMS top-k of each level, NMS, and boxes in the original image.

All of it is float32. In bfloat16 boxes of different classes, which are kept apart by shifting them, would meet.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image

from zoo.detection.cells import Cells, Head
from zoo.detection.losses import decode
from zoo.detection.scale.ranges import within


class Candidates(NamedTuple):
    """Detections of a batch of images before NMS.

    Attributes:
        boxes: (B, n, 4) xyxy in pixels of these images, float32.
        scores: (B, n).
        labels: (B, n) int64.
        ranges: (n, 2): the least and the greatest size that a detection may have, as in
            :mod:`zoo.detection.scale.ranges`. None: each may be of every size.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    ranges: Tensor | None = None


def pre_nms_top_k(
    head: Head, logits: Tensor, boxes: Tensor, centerness: Tensor | None, cells: Cells, count: int
) -> Candidates:
    """Pre-NMS top-k of each level, pairs of cell and class.

    A score is the probability of the class, or its geometric mean with the centerness where there is one.

    Args:
        head: Says how boxes are coded.
        logits: (B, N, K).
        boxes: (B, N, 4).
        centerness: (B, N), or None.
        cells: Where they are.
        count: Of a level, at most.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    start = 0
    for cells_of_level in cells.counts:
        level = slice(start, start + cells_of_level)
        scores = logits[:, level].float().sigmoid()
        if centerness is not None:
            scores = (scores * centerness[:, level, None].float().sigmoid()).sqrt()
        scores = scores.flatten(1)
        best, index = scores.topk(torch.sym_min(count, scores.shape[1]))  # min() would choose for an export
        cell = index // logits.shape[2]
        coded = boxes[:, level].float().gather(1, cell[..., None].expand(-1, -1, 4))
        found.append((decode(head, coded, cells.anchors[level][cell]), best, index % logits.shape[2]))
        start += cells_of_level
    all_boxes, all_scores, all_labels = zip(*found, strict=True)
    return Candidates(torch.cat(all_boxes, 1), torch.cat(all_scores, 1), torch.cat(all_labels, 1))


def in_range(candidates: Candidates, sizes: Any, original_sizes: Any = None) -> Candidates:
    """Candidates of which those out of their range have the score 0, with which none is a detection.

    Args:
        candidates: Of a batch.
        sizes: (B, 2) height and width that boxes end at.
        original_sizes: The same before the images were resized. None: they were not.
    """
    if candidates.ranges is None:
        return candidates
    sizes = torch.as_tensor(sizes, dtype=torch.float32, device=candidates.boxes.device)
    boxes = _clipped(candidates.boxes, sizes)
    if original_sizes is not None:
        scales = torch.as_tensor(original_sizes, dtype=torch.float32, device=sizes.device) / sizes
        boxes = boxes * scales.flip(1).repeat(1, 2)[:, None]
    kept = within(boxes, *candidates.ranges.unbind(1))
    return candidates._replace(scores=candidates.scores.where(kept, 0), ranges=None)


def _clipped(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes (B, n, 4) that end with their images, of the sizes (B, 2) height and width."""
    return boxes.clamp(min=0).minimum(sizes.flip(1).repeat(1, 2)[:, None].to(boxes.dtype))


def non_maximum_suppression(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    size: tuple[int, int],
    score_threshold: float,
    nms_threshold: float,
    max_detections: int,
) -> dict[str, Tensor]:
    """Detections of one image, best first: its candidates (n,) above a score, after NMS.

    What has no area in the image is none: boxes that lie in the padding beside it end as lines and points at its edge.

    Args:
        boxes, scores, labels: One image's of :func:`pre_nms_top_k`.
        size: (height, width) that boxes end at.
        score_threshold, nms_threshold, max_detections: See :class:`zoo.FPNDetector`.
    """
    boxes = clip_boxes_to_image(boxes, size)
    above = (scores > score_threshold) & (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    boxes, scores, labels = boxes[above], scores[above], labels[above]
    kept = batched_nms(boxes, scores, labels, nms_threshold)[:max_detections]
    return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}


def fixed_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    sizes: Tensor,
    score_threshold: float,
    nms_threshold: float,
    max_detections: int,
) -> dict[str, Tensor]:
    """Detections of :func:`non_maximum_suppression` for a batch, in tensors of fixed shapes, as a graph has them.

    It is the same greedy NMS, one object after the other: the best candidate is kept, and those of its class that
    overlap it are dropped, until none is left or there are enough.

    Args:
        boxes, scores, labels: Of :func:`pre_nms_top_k`.
        sizes: (B, 2) height and width that boxes end at.
        score_threshold, nms_threshold, max_detections: See :class:`zoo.FPNDetector`.

    Returns:
        ``boxes`` (B, max_detections, 4), ``scores`` and ``labels`` (B, max_detections), best first, and ``count`` (B,),
        how many there are; behind them boxes and scores are 0, labels -1.
    """
    boxes = _clipped(boxes, sizes)
    above = (scores > score_threshold) & (boxes[..., 2:] > boxes[..., :2]).all(dim=2)
    # Side by side in memory, and none a view of another, which a loop in a graph may not have.
    left, top, right, bottom = (side.clone() for side in (boxes + _class_offsets(boxes, labels, above)).unbind(2))
    areas, threshold = (right - left) * (bottom - top), at_most(nms_threshold)

    def keep_best(number: Tensor, remaining: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        score, best = remaining.max(1, keepdim=True)
        width = right.minimum(right.gather(1, best)) - left.maximum(left.gather(1, best))
        height = bottom.minimum(bottom.gather(1, best)) - top.maximum(top.gather(1, best))
        shared = width.clamp(min=0) * height.clamp(min=0)
        overlaps = shared / (areas.gather(1, best) + areas - shared) > threshold
        dropped = (overlaps & (labels == labels.gather(1, best))).scatter(1, best, True)
        place = torch.arange(max_detections, device=kept.device) == number
        return number + 1, remaining.masked_fill(dropped, 0), kept.where(~(place & (score > 0)), best)

    def goes_on(number: Tensor, remaining: Tensor, kept: Tensor) -> Tensor:
        return (number < max_detections) & (remaining > 0).any()

    state = (
        torch.zeros((), dtype=torch.int64, device=boxes.device),
        scores.where(above, 0),
        labels.new_full((scores.shape[0], max_detections), -1),
    )
    _, _, kept = repeat(goes_on, keep_best, state)
    found = kept >= 0
    index = kept.clamp(min=0)
    return {
        "boxes": boxes.gather(1, index[..., None].expand(-1, -1, 4)).where(found[..., None], 0),
        "scores": scores.gather(1, index).where(found, 0),
        "labels": labels.gather(1, index).where(found, -1),
        "count": found.sum(1),
    }


def _class_offsets(boxes: Tensor, labels: Tensor, above: Tensor) -> Tensor:
    """Shifts (B, n, 1) by which torchvision's ``batched_nms`` keeps classes apart where boxes are few, else 0.

    They round the boxes, and so decide whether two of them overlap by a little more than the threshold.
    """
    few = above.sum(1) * 4 <= (4000 if boxes.device.type == "cpu" else 100_000)
    beyond = boxes.masked_fill(~above[..., None], 0).amax((1, 2)) + 1
    return (labels * beyond.where(few, 0)[:, None])[..., None]


def at_most(threshold: float) -> float:
    """The greatest float32 that is not above a threshold: torchvision compares float32 with float64."""
    nearest = np.float32(threshold)  # no tensor: where nobody may wait, none is made of a number
    return float(nearest if float(nearest) <= threshold else np.nextafter(nearest, np.float32(-1)))


def repeat(condition: Callable[..., Tensor], step: Callable[..., Any], state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """State after steps for as long as a condition holds; as one node where a graph is made."""
    if torch.compiler.is_compiling():
        return torch.while_loop(condition, step, state)
    while condition(*state):
        state = step(*state)
    return state


def to_original(boxes: Tensor, size: tuple[int, int], original: tuple[int, int]) -> Tensor:
    """Converts boxes (n, 4) xyxy from pixels of an image resized to ``size``, (height, width), to the original's."""
    if tuple(size) == tuple(original):
        return boxes
    y, x = original[0] / size[0], original[1] / size[1]
    return boxes * boxes.new_tensor([x, y, x, y])
