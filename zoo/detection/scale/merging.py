"""Merging of the detections of several views of one image: NMS, soft-NMS, soft vote, weighted boxes fusion.

- Bodla et al., "Soft-NMS - Improving Object Detection With One Line of Code", ICCV 2017, arXiv 1704.04503
- soft vote: the released code of ATSS (Zhang et al., CVPR 2020, arXiv 1912.02424), ``bbox_aug_vote``
- Solovyev et al., "Weighted boxes fusion", Image and Vision Computing 107, 2021, arXiv 1910.13302

Each merges by class. Of two boxes the overlap is their IoU, unless a tile's border has cut one: a piece lies in what it
is a piece of, so that intersection over the smaller tells. Whole candidates are merged first, by themselves and
therefore as if no tile had been; then the pieces that none of them holds.

Deviations: boxes have no pixel added to their sides, as ATSS's have. What one method's source leaves open, the order of
equal scores, is that of the candidates.

Memory does not grow with the square of the candidates: pairs are looked at in blocks.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.ops import batched_nms

Merge = Literal["nms", "soft_nms", "soft_vote", "weighted"]
Overlap = Callable[[Tensor, Tensor], Tensor]

BLOCK = 1024
"""Boxes a side of the pairs that are in memory at once."""


def iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU (...) of boxes (..., 4) xyxy whose shapes broadcast, computed as in torchvision's NMS."""
    common = _common(first, second)
    return common / (_area(first) + _area(second) - common)


def over_smaller(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over the area of the smaller box (...) of boxes (..., 4) xyxy whose shapes broadcast."""
    return _common(first, second) / _area(first).minimum(_area(second))


def merge(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    views: Tensor,
    cut: Tensor,
    method: Merge,
    nms_threshold: float,
    score_threshold: float,
    max_detections: int,
    view_count: int | None = None,
) -> dict[str, Tensor]:
    """Detections of one image, best first, of the candidates of all its views.

    With "nms" and nothing cut it is :func:`zoo.detection.postprocessing.non_maximum_suppression` of clipped boxes. A
    whole box drops a cut one of its class that overlaps it by more than ``nms_threshold``, intersection over the
    smaller, whatever their scores; but where the whole one is the smaller, only if its score is not the lower.

    Args:
        boxes: (n, 4) xyxy in pixels of the original image, clipped to it. "nms" and "soft_nms" take candidates before
            NMS, "soft_vote" and "weighted" those that each view's own NMS left.
        scores: (n,) in [0, 1].
        labels: (n,) int64.
        views: (n,) int64, the number of the view that each is of, from 0. Only "weighted" asks for it.
        cut: (n,) bool, whether a tile's border within the image cut the box.
        method: "nms"; "soft_nms": Gaussian, of its paper's sigma; "soft_vote" and "weighted": at their sources'
            thresholds, 0.66 and 0.55.
        nms_threshold: Of "nms", and between whole boxes and cut ones in every method.
        score_threshold: Candidates are above it, and detections too, but those of "weighted", whose score falls with
            the number of views that did not find them.
        max_detections: At most.
        view_count: How many views there are, for "weighted". None: up to the highest number in ``views``.

    Returns:
        ``boxes`` (m, 4), ``scores`` (m,), ``labels`` (m,).

    Raises:
        ValueError: For an unknown method.
    """
    if method not in get_args(Merge):
        raise ValueError(f"unknown merge {method!r}: expected one of {', '.join(get_args(Merge))}")
    if view_count is None:
        view_count = int(views.max()) + 1 if len(views) else 1
    merged: Callable[..., dict[str, Tensor]]
    if method == "nms":
        merged = partial(nms, threshold=nms_threshold)
    elif method == "soft_nms":
        merged = partial(soft_nms, score_threshold=score_threshold, count=max_detections)
    elif method == "soft_vote":
        merged = partial(soft_vote, score_threshold=score_threshold)
    else:
        merged = partial(weighted_boxes, view_count=view_count)
    above = (scores > score_threshold) & (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    boxes, scores, labels, cut = boxes[above], scores[above], labels[above], cut[above]
    found = merged(boxes[~cut], scores[~cut], labels[~cut])
    if cut.any():
        boxes, scores, labels = boxes[cut], scores[cut], labels[cut]
        alone = ~_held(boxes, scores, labels, found, nms_threshold)
        pieces = merged(boxes[alone], scores[alone], labels[alone], overlap=over_smaller)
        found = _best_first({name: torch.cat([found[name], pieces[name]]) for name in found})
    return {name: values[:max_detections].clone() for name, values in found.items()}  # or all would stay in memory


def nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float = 0.5, overlap: Overlap = iou
) -> dict[str, Tensor]:
    """Greedy NMS by class: torchvision's for IoU, and the same rule for another overlap.

    Args:
        boxes: (n, 4) xyxy.
        scores, labels: (n,).
        threshold: Boxes that overlap a better one by more are dropped.
        overlap: As :func:`iou`.

    Returns:
        ``boxes`` (m, 4), ``scores`` and ``labels`` (m,), best first.
    """
    if overlap is iou:
        kept = batched_nms(boxes, scores, labels, threshold)
        return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}

    def of_class(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        kept = _seeds(boxes, lambda a, b: overlap(a, b).double() > threshold) == torch.arange(len(boxes))
        return boxes[kept], scores[kept]

    return _by_class(of_class, boxes, scores, labels)


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    sigma: float | None = 0.5,
    threshold: float = 0.3,
    score_threshold: float = 0.001,
    count: int | None = None,
    overlap: Overlap = iou,
) -> dict[str, Tensor]:
    """Soft-NMS by class (Bodla et al. 2017, equations 2 and 3): neighbours of the best box lose score, not their place.

    Args:
        boxes: (n, 4) xyxy.
        scores, labels: (n,).
        sigma: Scores are multiplied by exp(-overlap² / sigma). None: linear, by 1 - overlap above ``threshold``.
        threshold: Of the linear form.
        score_threshold: Boxes whose score falls to this or below are dropped.
        count: Of a class, at most. None: all.
        overlap: As :func:`iou`.

    Returns:
        ``boxes`` (m, 4), ``scores`` and ``labels`` (m,), best first.
    """

    def of_class(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        picked: list[int] = []
        decayed, left = scores.clone(), scores.clone()
        for _ in range(len(boxes) if count is None else min(count, len(boxes))):
            best = int(left.argmax())
            if left[best] <= score_threshold:
                break
            picked.append(best)
            decayed[best] = left[best]
            overlaps = overlap(boxes[best], boxes)
            if sigma is None:
                left = left * (1 - overlaps).where(overlaps > threshold, 1)
            else:
                left = left * (-overlaps.square() / sigma).exp()
            left[best] = -1
        kept = torch.tensor(picked, dtype=torch.int64)
        return boxes[kept], decayed[kept]

    return _by_class(of_class, boxes, scores, labels)


def soft_vote(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    threshold: float = 0.66,
    score_threshold: float = 0.05,
    overlap: Overlap = iou,
) -> dict[str, Tensor]:
    """Soft vote by class (ATSS's test with many scales): the best box and those that overlap it become their mean.

    The mean is weighted by score; its own score is the best one's. The others stay beside it as far as their scores,
    multiplied by 1 - overlap with the best, are high enough.

    Args:
        boxes: (n, 4) xyxy.
        scores, labels: (n,).
        threshold: Boxes that overlap the best by this or more are joined with it.
        score_threshold: The others stay if their score then is this or more.
        overlap: As :func:`iou`.

    Returns:
        ``boxes`` (m, 4), ``scores`` and ``labels`` (m,), best first.
    """

    def of_class(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        seeds = _seeds(boxes, lambda a, b: overlap(a, b).double() >= threshold)
        is_seed = seeds == torch.arange(len(boxes))
        weights = scores.double()[:, None]
        sums = torch.zeros(len(boxes), 4, dtype=torch.float64).index_add_(0, seeds, boxes * weights)
        means = (sums / torch.zeros_like(weights).index_add_(0, seeds, weights)).to(boxes.dtype)
        alone = seeds.bincount(minlength=len(boxes)) == 1
        means = boxes.where(alone[:, None], means)  # not even rounded
        decayed = scores * (1 - overlap(boxes, boxes[seeds]))
        stays = ~is_seed & (decayed >= score_threshold)
        return torch.cat([means[is_seed], boxes[stays]]), torch.cat([scores[is_seed], decayed[stays]])

    return _by_class(of_class, boxes, scores, labels)


def weighted_boxes(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    view_count: int = 1,
    threshold: float = 0.55,
    overlap: Overlap = iou,
) -> dict[str, Tensor]:
    """Weighted boxes fusion by class (Solovyev et al. 2021): overlapping boxes become their mean, weighted by score.

    Boxes join, best first, the mean that they overlap most. Its score is that of its T boxes on average, times
    min(T, views) / views.

    Args:
        boxes: (n, 4) xyxy.
        scores, labels: (n,).
        view_count: How many views the boxes are of.
        threshold: Boxes that overlap a mean by more join it.
        overlap: As :func:`iou`.

    Returns:
        ``boxes`` (m, 4), ``scores`` and ``labels`` (m,), best first.
    """

    def of_class(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        means, joined = boxes.clone(), torch.zeros_like(scores)
        sums, weights = torch.zeros(len(boxes), 4, dtype=torch.float64), torch.zeros(len(boxes), dtype=torch.float64)
        found = 0
        for box, score in zip(boxes, scores.double(), strict=True):
            overlaps = overlap(means[:found], box)
            place = int(overlaps.argmax()) if found else 0
            if not found or overlaps[place] <= threshold:
                place, found = found, found + 1
            joined[place] += 1
            sums[place] += score * box
            weights[place] += score
            means[place] = sums[place] / weights[place] if joined[place] > 1 else box
        joined, weights = joined[:found], weights[:found]
        average = (weights / joined).to(scores.dtype)
        return means[:found], average * joined.clamp(max=view_count) / view_count

    return _by_class(of_class, boxes, scores, labels)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _common(first: Tensor, second: Tensor) -> Tensor:
    """Area (...) that boxes (..., 4) have in common."""
    sides = first[..., 2:].minimum(second[..., 2:]) - first[..., :2].maximum(second[..., :2])
    return sides[..., 0].clamp(min=0) * sides[..., 1].clamp(min=0)


def _by_class(
    merged: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], boxes: Tensor, scores: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """Detections, best first, of what ``merged`` makes of boxes (n, 4) and scores (n,) of each class, best first.

    One box depends on the last, so all of it is done on the CPU, and comes out alike for every device.
    """
    order = scores.argsort(descending=True, stable=True).cpu()
    device, boxes, scores, labels = boxes.device, boxes.cpu()[order], scores.cpu()[order], labels.cpu()[order]
    found = {"boxes": [boxes[:0]], "scores": [scores[:0]], "labels": [labels[:0]]}
    for label in labels.unique():
        of_class = labels == label
        of_boxes, of_scores = merged(boxes[of_class], scores[of_class])
        found["boxes"].append(of_boxes)
        found["scores"].append(of_scores)
        found["labels"].append(label.expand(len(of_boxes)))
    return _best_first({name: torch.cat(values).to(device) for name, values in found.items()})


def _best_first(found: dict[str, Tensor]) -> dict[str, Tensor]:
    order = found["scores"].argsort(descending=True, stable=True)
    return {name: values[order] for name, values in found.items()}


def _seeds(boxes: Tensor, joins: Overlap) -> Tensor:
    """Numbers (n,) of the boxes that greedy NMS drops boxes (n, 4) for, a kept one's its own.

    Args:
        boxes: Best first.
        joins: (m, n) bool of boxes (m, 1, 4) and (n, 4).
    """
    seeds = torch.full((len(boxes),), len(boxes))
    kept = seeds[:0]
    for block in torch.arange(len(boxes)).split(BLOCK):
        for before in kept.split(BLOCK):
            seeds[block] = seeds[block].minimum(_first(joins(boxes[before, None], boxes[block]), before, len(boxes)))
        left = block[seeds[block] == len(boxes)]
        joined = joins(boxes[left, None], boxes[left]).triu(1)
        stays, last = torch.ones_like(left, dtype=torch.bool), None
        while last is None or not stays.equal(last):  # the first is right, then those that depend on it, and so on
            stays, last = ~(joined & stays[:, None]).any(0), stays
        seeds[left] = _first(joined.fill_diagonal_(True) & stays[:, None], left, len(boxes))
        kept = torch.cat([kept, left[stays]])
    return seeds


def _first(joined: Tensor, numbers: Tensor, none: int) -> Tensor:
    """Number (n,) of the first row of (m, n) in which each column joins, or that of none."""
    return pad(numbers[:, None].where(joined, none), (0, 0, 0, 1), value=none).amin(0)


def _held(boxes: Tensor, scores: Tensor, labels: Tensor, whole: dict[str, Tensor], threshold: float) -> Tensor:
    """Cut boxes, as a mask (n,), in whose place a whole detection of their class stands; :func:`merge` says when."""
    held = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique():
        holders = _strips(whole["boxes"], whole["labels"] == label)
        for some, top, bottom in _strips(boxes, labels == label):
            for other, other_top, other_bottom in holders:
                if top < other_bottom and other_top < bottom:
                    cut, holder = boxes[some, None], whole["boxes"][other]
                    common, better = _common(cut, holder), whole["scores"][other] >= scores[some, None]
                    areas = _area(cut).where(~better, _area(cut).minimum(_area(holder)))
                    held[some] |= ((common / areas).double() > threshold).any(1)
    return held


def _strips(boxes: Tensor, chosen: Tensor) -> list[tuple[Tensor, float, float]]:
    """Numbers of the chosen boxes, block by block from the top down, with the first and last row of each block."""
    numbers = chosen.nonzero()[:, 0]
    blocks = numbers[boxes[numbers, 1].argsort()].split(BLOCK) if len(numbers) else ()
    return [(block, float(boxes[block, 1].min()), float(boxes[block, 3].max())) for block in blocks]
