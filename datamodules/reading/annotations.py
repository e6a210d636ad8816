"""COCO annotation files: read and checked once, and kept in arrays.

``{"images": [{"id", "file_name", "width", "height"}], "annotations": [{"id", "image_id", "category_id", "bbox": [x, y,
width, height], "iscrowd", "area"}], "categories": [{"id", "name"}]}``, https://cocodataset.org/#format-data. Widths and
heights of images, annotation ids, ``iscrowd`` and ``area`` may be missing, and so may a ``bbox`` where ``segmentation``
has polygons. Numbers may be texts, ids whole floats. Whatever else is there is not read.

Arrays, since a list of a million dictionaries would be copied into every loader worker, by the counting of references.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from datamodules._lightning import rank_zero_warn
from datamodules.reading import listing
from datamodules.reading.coco_json import check_form, check_unique, entry, integers, name_of, parsed, some
from datamodules.reading.json_values import flag, number, one_form, outline, whole

EXPECTED = 'expected a COCO file, {"images": [...], "annotations": [...], "categories": [...]}'

FARTHEST = 2**31 - 1
"""Pixels that no image has: larger coordinates count as not finite."""


@dataclass(frozen=True)
class Annotations:
    """The boxes of N images, in the file's order: those of image i lie from ``offsets[i]`` to ``offsets[i + 1]``.

    ``names`` (N,) str; ``image_ids`` (N,) int64; ``sizes`` (N, 2) int32, (height, width), 0 if the file does not say;
    ``offsets`` (N + 1,) int64; ``boxes`` (M, 4) float32, xyxy in pixels; ``categories`` (M,) int64, ids as in the file;
    ``iscrowd`` (M,) bool; ``area`` (M,) float32, in pixels squared. ``category_names`` says what an id means.
    """

    path: Path
    category_names: dict[int, str]
    names: np.ndarray
    image_ids: np.ndarray
    sizes: np.ndarray
    offsets: np.ndarray
    boxes: np.ndarray
    categories: np.ndarray
    iscrowd: np.ndarray
    area: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def with_categories(self, ids: Sequence[int]) -> "Annotations":
        """Annotations with the boxes of some categories only; all images stay."""
        return self._where(np.isin(self.categories, ids))

    def not_empty(self) -> "Annotations":
        """Annotations of the images that have a box other than of a crowd."""
        images = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        return self._of_images(np.unique(images[~self.iscrowd]))

    def _where(self, kept: np.ndarray) -> "Annotations":
        before = np.concatenate([[0], np.cumsum(kept)])
        parts = {name: getattr(self, name)[kept] for name in ("boxes", "categories", "iscrowd", "area")}
        return replace(self, offsets=before[self.offsets], **parts)

    def _of_images(self, indices: np.ndarray) -> "Annotations":
        counts = np.diff(self.offsets)
        chosen = np.zeros(len(self), dtype=bool)
        chosen[indices] = True
        boxes = self._where(np.repeat(chosen, counts))
        offsets = np.concatenate([[0], np.cumsum(counts[indices])])
        parts = {name: getattr(self, name)[indices] for name in ("names", "image_ids", "sizes")}
        return replace(boxes, offsets=offsets, **parts)


def read(path: Path, need_annotations: bool = True) -> Annotations:
    """Reads and checks an annotation file.

    Boxes without width or height, or with coordinates that are not finite, are left out, and so are boxes of which less
    than a pixel lies in the image; others are clamped to it. Annotations of images that the file does not have are left
    out, and those without a box or a polygon. One warning says how many there were, and where. Others say of how many
    ``area`` is no number from 0 on (the box's is taken), ``iscrowd`` neither 0 nor 1 (0 is taken), or an image's size
    not known; and that boxes look like shares of the image, or like two corners.

    Args:
        path: The file.
        need_annotations: Whether there have to be images, and ``annotations``, which COCO's own files of test images
            do not have.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is none of COCO's, or contradicts itself. One line says what is wrong and where.
    """
    content = parsed(path, EXPECTED, _lean)
    needed = ("images", "annotations", "categories") if need_annotations else ("images", "categories")
    check_form(path, content, needed, EXPECTED)
    if not content.get("categories") and (content["images"] or need_annotations):
        raise ValueError(f"{path} has no categories: its list is empty")
    if not content["images"] and (need_annotations or content.get("annotations")):
        raise ValueError(f"{path} has no images: its list is empty")
    category_names = _categories(path, content["categories"])
    images = content["images"]
    names = [entry(path, "image", image, "file_name", str, place) for place, image in enumerate(images)]
    image_ids = integers(path, "image", images, "id").tolist()
    check_unique(path, "images", "id", image_ids)
    return _packed(path, content.get("annotations", []), category_names, names, image_ids, _sizes(path, images))


def _packed(
    path: Path,
    annotations: list[dict[str, Any]],
    category_names: dict[int, str],
    names: list[str],
    image_ids: list[int],
    sizes: np.ndarray,
) -> Annotations:
    ids = [name_of(annotation, place) for place, annotation in enumerate(annotations)]
    check_unique(path, "annotations", "id", ids)
    raw, absent = _boxes(path, annotations, ids)
    categories = integers(path, "annotation", annotations, "category_id")
    if unknown := [i for i, category in enumerate(categories.tolist()) if category not in category_names]:
        first = unknown[0]
        raise ValueError(
            f"{path}: {len(unknown)} annotations have a category_id that is not in categories, the first {ids[first]} "
            f"with {categories[first]}; there is {some(category_names)}"
        )
    number_of = {image_id: number for number, image_id in enumerate(image_ids)}
    owners = integers(path, "annotation", annotations, "image_id").tolist()
    images = np.array([number_of.get(owner, -1) for owner in owners], dtype=np.int64)
    if len(images) and (images < 0).all():
        raise ValueError(
            f"{path}: no annotation belongs to one of the images: the first has image_id {owners[0]}, images have the "
            f"ids {some(image_ids)}"
        )
    crowd = [flag(annotation.get("iscrowd")) for annotation in annotations]
    iscrowd = np.array([bool(value) for value in crowd], dtype=bool)
    given = np.array([annotation.get("area") is not None for annotation in annotations], dtype=bool)
    areas = np.array([number(annotation.get("area")) for annotation in annotations], dtype=np.float64)
    usable = (areas >= 0) & (areas < np.finfo(np.float32).max)
    odd = {"iscrowd is neither 0 nor 1 (taken for 0)": np.array([value is None for value in crowd], dtype=bool)}
    odd["area is no number from 0 on (the box's is taken)"] = given & ~usable

    stray = images < 0
    flat = ~((raw[:, 2] > 0) & (raw[:, 3] > 0) & (np.abs(raw) < FARTHEST).all(axis=1)) & ~(stray | absent)
    raw = np.where((flat | absent)[:, None], 0.0, raw)
    areas = np.where(usable, areas, raw[:, 2] * raw[:, 3])
    boxes = np.concatenate([raw[:, :2], raw[:, :2] + raw[:, 2:]], axis=1)
    limits = np.where(sizes > 0, sizes, np.inf)[:, ::-1][images] if len(sizes) else np.zeros((0, 2))
    clamped = np.clip(boxes, 0, np.concatenate([limits, limits], axis=1)) if len(boxes) else boxes
    outside = (clamped != boxes).any(axis=1) & ((clamped[:, 2:] - clamped[:, :2]) < 1).any(axis=1)
    outside &= ~(flat | stray | absent)
    kinds = {"without a box or a polygon": absent & ~stray, "without width or height, or not finite": flat}
    _warn(path, names, images, kinds | {"outside their image": outside}, stray)
    _warn_of_values(path, ids, odd)
    _warn_of_units(path, *(values[~(flat | stray | absent)] for values in (raw, limits)))

    kept = np.flatnonzero(~(flat | outside | stray | absent))
    kept = kept[np.argsort(images[kept], kind="stable")]
    return Annotations(
        path,
        category_names,
        names=np.array(names, dtype=np.str_),
        image_ids=np.array(image_ids, dtype=np.int64),
        sizes=sizes,
        offsets=np.searchsorted(images[kept], np.arange(len(names) + 1)),
        boxes=clamped[kept].astype(np.float32),
        categories=categories[kept],
        iscrowd=iscrowd[kept],
        area=areas[kept].astype(np.float32),
    )


def _lean(found: dict[str, Any]) -> dict[str, Any]:
    """An object without its polygons: they are most of the file, and of no use beside a box."""
    polygons = found.pop("segmentation", None)
    if polygons and not found.get("bbox"):
        found["bbox"] = outline(polygons)
    return found


def _categories(path: Path, categories: list[dict[str, Any]]) -> dict[int, str]:
    ids = integers(path, "category", categories, "id").tolist()
    names = [entry(path, "category", category, "name", str, place) for place, category in enumerate(categories)]
    check_unique(path, "categories", "id", ids)
    return dict(sorted(zip(ids, map(one_form, names), strict=True)))


def _boxes(path: Path, annotations: list[dict[str, Any]], ids: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (M, 4) float64, x, y, width, height as in the file, and (M,) bool, True where there is none."""
    boxes = [annotation.get("bbox") or None for annotation in annotations]
    for place, (box, name) in enumerate(zip(boxes, ids, strict=True)):
        if box is None or (type(box) is list and len(box) == 4 and all(type(value) is float for value in box)):
            continue
        values = [number(value) for value in box] if isinstance(box, list) and len(box) == 4 else []
        meant = [type(v) is float or value == value for v, value in zip(box, values, strict=True)] if values else []
        if len(values) != 4 or not all(meant):
            raise ValueError(
                f"{path}: annotation {name} has the bbox {box!r:.60}: expected 4 numbers, x, y, width, height"
            )
        boxes[place] = values
    absent = np.array([box is None for box in boxes], dtype=bool)
    if len(absent) and absent.all():
        raise ValueError(
            f"{path}: none of its {len(absent)} annotations has a bbox, the first is {ids[0]}: expected 4 numbers, x, "
            "y, width, height"
        )
    return np.array([[0.0] * 4 if box is None else box for box in boxes], dtype=np.float64).reshape(-1, 4), absent


def _sizes(path: Path, images: list[dict[str, Any]]) -> np.ndarray:
    """Sizes of images (N, 2) int32, height and width; 0 where the file does not say."""
    given = [[image.get(key) for key in ("height", "width")] for image in images]
    values = [[0 if value is None else whole(value) for value in pair] for pair in given]
    if large := [place for place, pair in enumerate(values) if max(value or 0 for value in pair) >= FARTHEST]:
        raise ValueError(
            f"{path}: image {images[large[0]]['id']} has height and width {given[large[0]]}: expected pixels, fewer "
            f"than {FARTHEST:,}"
        )
    odd = np.array([any(value is None or value < 0 for value in pair) for pair in values], dtype=bool)
    _warn_of_values(path, [image["id"] for image in images], {"height or width is no number (taken as unknown)": odd})
    return np.array([[max(0, value or 0) for value in pair] for pair in values], dtype=np.int32).reshape(-1, 2)


def _warn(path: Path, names: list[str], images: np.ndarray, kinds: dict[str, np.ndarray], stray: np.ndarray) -> None:
    """Warns once of all that is left out."""
    said = [f"{found.sum()} {kind}" for kind, found in kinds.items() if found.any()]
    files = [names[image] for image in np.unique(images[np.any(list(kinds.values()), axis=0)])]
    message = f"{' and '.join(said)}, in {listing.some(files)}" if said else ""
    if stray.any():
        message += ("; " if said else "") + f"{stray.sum()} of images that the file does not list"
    if message:
        rank_zero_warn(f"{path} has boxes that are left out: {message}")


def _warn_of_values(path: Path, ids: list[Any], kinds: dict[str, np.ndarray]) -> None:
    """A line for each kind of odd value, with the first few that have it."""
    for kind, found in kinds.items():
        if found.any():
            rank_zero_warn(f"{path}: {found.sum()} of {len(found)} times {kind}: {some(np.array(ids)[found])}")


def _warn_of_units(path: Path, raw: np.ndarray, limits: np.ndarray) -> None:
    """Warns if boxes (M, 4) look like shares of images or like corners; ``limits`` (M, 2) are width and height."""
    low, high, meant = raw[:, :2], raw[:, 2:], "a bbox is read as x, y, width, height in pixels"
    small = (high < 1).all(axis=1)
    if small.sum() > len(raw) / 2:
        as_shares = ", as if they were shares of the image" if (np.abs(raw[small]) <= 1).all() else ""
        rank_zero_warn(f"{path}: {small.sum()} of {len(raw)} boxes are smaller than a pixel{as_shares}; {meant}")
    beyond = ((low + high > limits + 1) | (low < -1)).any(axis=1)
    corners = bool(((high > low) & (low >= -1) & (high <= limits + 1)).all())
    if beyond.sum() > len(raw) * (0.1 if corners else 0.5):
        as_corners = ", as if they were two corners, x, y, x, y" if corners else ""
        rank_zero_warn(f"{path}: {beyond.sum()} of {len(raw)} boxes reach out of their image{as_corners}; {meant}")
