"""Post-processing of raw predictions: pre-NMS top-k of each level, NMS, and boxes in the original image.

All of it is float32. In bfloat16 boxes of different classes, which are kept apart by shifting them, would meet.
"""

import torch
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image

from zoo.detection.cells import Cells, Head
from zoo.detection.losses import decode


def pre_nms_top_k(
    head: Head, logits: Tensor, boxes: Tensor, centerness: Tensor | None, cells: Cells, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Pre-NMS top-k of each level, pairs of cell and class: boxes (B, n, 4) xyxy, scores (B, n), labels (B, n).

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
        best, index = scores.flatten(1).topk(min(count, scores[0].numel()))
        cell = index // logits.shape[2]
        coded = boxes[:, level].float().gather(1, cell[..., None].expand(-1, -1, 4))
        found.append((decode(head, coded, cells.anchors[level][cell]), best, index % logits.shape[2]))
        start += cells_of_level
    all_boxes, all_scores, all_labels = zip(*found, strict=True)
    return torch.cat(all_boxes, 1), torch.cat(all_scores, 1), torch.cat(all_labels, 1)


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


def to_original(boxes: Tensor, size: tuple[int, int], original: tuple[int, int]) -> Tensor:
    """Converts boxes (n, 4) xyxy from pixels of an image resized to ``size``, (height, width), to the original's."""
    if tuple(size) == tuple(original):
        return boxes
    y, x = original[0] / size[0], original[1] / size[1]
    return boxes * boxes.new_tensor([x, y, x, y])
