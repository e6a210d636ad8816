"""Evaluation by COCO's protocol on arrays: columns of boxes, one class at a time, by faster-coco-eval."""

import gc
from typing import Any, NamedTuple

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster


class Images(NamedTuple):
    """Images with what was found and what is there, in columns: the rows of all images one after the other."""

    ids: list[int | str | None]
    found: np.ndarray  # (images,): how many rows of the next three are an image's
    boxes: np.ndarray  # (n, 4), xyxy
    scores: np.ndarray
    labels: np.ndarray
    there: np.ndarray  # (images,): how many rows of the next four are an image's
    true_boxes: np.ndarray  # (m, 4), xyxy
    true_labels: np.ndarray
    crowd: np.ndarray
    area: np.ndarray


def joined(parts: list[Images]) -> Images:
    ids = [image_id for part in parts for image_id in part.ids]
    return Images(ids, *(np.concatenate(columns) for columns in zip(*(part[1:] for part in parts), strict=True)))


def _places(images: Images) -> np.ndarray:
    """The place (images,) of each image in the order of ids, then those without; -1 if its id was there before."""
    ends = np.cumsum(images.there)
    first: dict[tuple[int, Any], int] = {}
    # Numbers, then texts, in their order, then those without an id as they came.
    keys = [(2, at) if id_ is None else (int(isinstance(id_, str)), id_) for at, id_ in enumerate(images.ids)]
    for position, key in enumerate(keys):
        earlier = first.setdefault(key, position)
        if earlier != position:
            (one, boxes), (other, others) = (
                (images.true_labels[rows], images.true_boxes[rows])
                for rows in (slice(ends[at] - images.there[at], ends[at]) for at in (earlier, position))
            )
            if np.array_equal(one, other) and not np.allclose(boxes, others, rtol=1e-3, atol=0.1):
                raise ValueError(
                    f"image_id {key[1]} stands for images of different ground truth, boxes {boxes.tolist()!s:.60} and "
                    f"{others.tolist()!s:.60}: an id is of one image, which counts once"
                )
            if not np.array_equal(one, other):
                raise ValueError(
                    f"image_id {key[1]} stands for images of different ground truth, labels {one.tolist()} and "
                    f"{other.tolist()}: an id is of one image, which counts once"
                )
    order = {key: place for place, key in enumerate(sorted(first))}
    return np.array([order[key] if first[key] == position else -1 for position, key in enumerate(keys)], dtype=np.int64)


def box_sizes(boxes: np.ndarray) -> np.ndarray:
    """Width and height (n, 2) of boxes (n, 4), float64."""
    return boxes[:, 2:].astype(np.float64) - boxes[:, :2]


def evaluate_images(
    images: Images, ranges: list[tuple[float, float]], maxima: list[int]
) -> tuple[dict[int, tuple[np.ndarray, np.ndarray]], set[int]]:
    """Precision and recall by label, of those that have ground truth, and all labels that occur."""
    place = _places(images)
    found_in, there_in = np.repeat(place, images.found), np.repeat(place, images.there)
    found, there = _by_label(images.labels, found_in), _by_label(images.true_labels, there_in)
    none = np.empty(0, np.int64)
    curves = {}
    # One class at a time, and of the images those that have anything of it: memory is that of one class, and the empty
    # pairs of image and class, which are nearly all when there are many classes, cost nothing.
    enabled = gc.isenabled()
    gc.disable()  # or half a million dicts set off a search of everything that the process holds, again and again
    try:
        for label, truth in there.items():
            rows = found.get(label, none)
            boxes, true_boxes = images.boxes[rows], images.true_boxes[truth]
            curves[label] = _evaluate_class(
                _annotations(found_in[rows], boxes, box_sizes(boxes).prod(1), "score", images.scores[rows]),
                _annotations(there_in[truth], true_boxes, images.area[truth], "iscrowd", images.crowd[truth]),
                ranges,
                maxima,
            )
    finally:
        if enabled:
            gc.enable()
    return curves, {*found, *there}


def _by_label(labels: np.ndarray, place: np.ndarray) -> dict[int, np.ndarray]:
    """The rows of each label, in their order. Those of images without a place are left out."""
    rows = np.flatnonzero(place >= 0)
    rows = rows[np.argsort(labels[rows], kind="stable")]
    names, starts = np.unique(labels[rows], return_index=True)
    return dict(zip(names.tolist(), np.split(rows, starts)[1:], strict=True))


def _annotations(
    places: np.ndarray, boxes: np.ndarray, areas: np.ndarray, key: str, values: np.ndarray
) -> list[dict[str, Any]]:
    """Rows as dicts in COCO's format, of the one class 0. Ids run from 1: 0 would stand for "no match"."""
    corners = np.concatenate([boxes[:, :2], box_sizes(boxes)], axis=1)
    rows = zip(places.tolist(), corners.tolist(), areas.tolist(), values.tolist(), strict=True)
    return [
        {"id": number, "image_id": place, "category_id": 0, "bbox": box, "area": area, key: value}
        for number, (place, box, area, value) in enumerate(rows, start=1)
    ]


def _evaluate_class(
    found: list[dict[str, Any]], there: list[dict[str, Any]], ranges: list[tuple[float, float]], maxima: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Precision (thresholds, recalls, 1, ranges, maxima) and recall (thresholds, 1, ranges, maxima) of a class."""
    images = [{"id": place} for place in sorted({row["image_id"] for row in found + there})]
    data = {"images": images, "categories": [{"id": 0}]}
    evaluation = COCOeval_faster(
        COCO({**data, "annotations": there}, print_function=_silent),
        COCO({**data, "annotations": found}, print_function=_silent),
        iouType="bbox",
        print_function=_silent,
    )
    # Given as ranges above, those that do not reach from 0 to 1e10 would be warned about.
    evaluation.params.areaRng = [list(limits) for limits in ranges]
    evaluation.params.areaRngLbl = [str(index) for index in range(len(ranges))]
    evaluation.params.maxDets = maxima
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["precision"], evaluation.eval["recall"]


def _silent(*_: object) -> None:
    pass


def mean_of_defined(values: np.ndarray) -> float:
    """Mean over what is defined: -1 stands for what is not."""
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0
