"""COCO annotation files: read and checked once, kept in arrays; and written.

``{"images": [{"id", "file_name", "width", "height"}], "annotations": [{"id", "image_id", "category_id", "bbox": [x, y,
width, height], "iscrowd", "area"}], "categories": [{"id", "name"}]}``, https://cocodataset.org/#format-data. Widths and
heights of images, annotation ids, ``iscrowd`` and ``area`` may be missing. Whatever else is there is not read.

Arrays, since a list of a million dictionaries would be copied into every loader worker, by the counting of references.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from datamodules import listing
from datamodules._lightning import rank_zero_warn
from datamodules.base import Split
from datamodules.detection import DetectionDataModule, RawSamples
from datamodules.detection_transforms import Target

EXPECTED = 'expected a COCO file, {"images": [...], "annotations": [...], "categories": [...]}'


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
        """Only the boxes of some categories; all images stay."""
        return self._where(np.isin(self.categories, ids))

    def not_empty(self) -> "Annotations":
        """Only the images that have a box other than of a crowd."""
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
    out. One warning says how many there were, and where.

    Args:
        path: The file.
        need_annotations: Whether ``annotations`` has to be there, as it is not in COCO's own files of test images.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is none of COCO's, or contradicts itself. One line says what is wrong and where.
    """
    content = _parsed(path)
    needed = ("images", "annotations", "categories") if need_annotations else ("images", "categories")
    _check_form(path, content, needed)
    category_names = _categories(path, content["categories"])
    images = content["images"]
    names = [_entry(path, "image", image, "file_name", str, number) for number, image in enumerate(images)]
    image_ids = [_entry(path, "image", image, "id", int, number) for number, image in enumerate(images)]
    _check_unique(path, "images", "id", image_ids)
    sizes = np.array([(image.get("height") or 0, image.get("width") or 0) for image in images], dtype=np.int32)
    return _packed(path, content.get("annotations", []), category_names, names, image_ids, sizes.reshape(-1, 2))


def _packed(
    path: Path,
    annotations: list[dict[str, Any]],
    category_names: dict[int, str],
    names: list[str],
    image_ids: list[int],
    sizes: np.ndarray,
) -> Annotations:
    ids = [annotation.get("id", f"number {number}") for number, annotation in enumerate(annotations)]
    _check_unique(path, "annotations", "id", ids)
    raw = _boxes(path, annotations, ids)
    categories = _integers(path, "annotation", annotations, "category_id")
    if unknown := [i for i, category in enumerate(categories.tolist()) if category not in category_names]:
        first = unknown[0]
        raise ValueError(
            f"{path}: {len(unknown)} annotations have a category_id that is not in categories, the first {ids[first]} "
            f"with {categories[first]}; there is {_some(category_names)}"
        )
    number_of = {image_id: number for number, image_id in enumerate(image_ids)}
    owners = _integers(path, "annotation", annotations, "image_id").tolist()
    images = np.array([number_of.get(owner, -1) for owner in owners], dtype=np.int64)
    if len(images) and (images < 0).all():
        raise ValueError(
            f"{path}: no annotation belongs to one of the images: the first has image_id {owners[0]}, images have the "
            f"ids {_some(image_ids)}"
        )
    iscrowd = np.array([bool(annotation.get("iscrowd")) for annotation in annotations], dtype=bool)
    given = [annotation.get("area") for annotation in annotations]
    areas = np.array([math.nan if area is None else area for area in given], dtype=np.float64)
    areas = np.where(np.isfinite(areas), areas, raw[:, 2] * raw[:, 3])

    stray = images < 0
    flat = ~((raw[:, 2] > 0) & (raw[:, 3] > 0) & np.isfinite(raw).all(axis=1)) & ~stray
    boxes = np.concatenate([raw[:, :2], raw[:, :2] + raw[:, 2:]], axis=1)
    limits = np.where(sizes > 0, sizes, np.inf)[:, ::-1][images] if len(sizes) else np.zeros((0, 2))
    clamped = np.clip(boxes, 0, np.concatenate([limits, limits], axis=1)) if len(boxes) else boxes
    outside = (clamped != boxes).any(axis=1) & ((clamped[:, 2:] - clamped[:, :2]) < 1).any(axis=1) & ~(flat | stray)
    _warn(path, names, images, {"without width or height, or not finite": flat, "outside their image": outside}, stray)

    kept = np.flatnonzero(~(flat | outside | stray))
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


def _parsed(path: Path) -> Any:
    def lean(found: dict[str, Any]) -> dict[str, Any]:
        found.pop("segmentation", None)  # most of the file, and not needed
        return found

    try:
        with path.open(encoding="utf-8-sig") as file:
            return json.load(file, object_hook=lean)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; {EXPECTED}") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder: {EXPECTED}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty: {EXPECTED}") from None
        raise ValueError(f"{path} is truncated, or no JSON at all ({error}): {EXPECTED}") from None


def _check_form(path: Path, content: Any, needed: Sequence[str]) -> None:
    if isinstance(content, list):
        scored = content and isinstance(content[0], dict) and "score" in content[0]
        kind = f"a results file, a list of {len(content)} detections" if scored else f"a list of {len(content)}"
        raise ValueError(f"{path} is {kind}: {EXPECTED}")
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}: {EXPECTED}")
    if missing := [key for key in needed if key not in content]:
        raise ValueError(f"{path} has no {' and no '.join(missing)}, but {_some(content) or 'nothing'}: {EXPECTED}")
    for key in ("images", "annotations", "categories"):
        part = content.get(key, [])
        if not isinstance(part, list) or not all(isinstance(entry, dict) for entry in part):
            raise ValueError(f"{path}: {key} is no list of objects: {EXPECTED}")
        if not part and key != "annotations":
            raise ValueError(f"{path} has no {key}: its list is empty")


def _categories(path: Path, categories: list[dict[str, Any]]) -> dict[int, str]:
    ids = [_entry(path, "category", category, "id", int, number) for number, category in enumerate(categories)]
    names = [_entry(path, "category", category, "name", str, number) for number, category in enumerate(categories)]
    _check_unique(path, "categories", "id", ids)
    return dict(sorted(zip(ids, names, strict=True)))


def _boxes(path: Path, annotations: list[dict[str, Any]], ids: list[Any]) -> np.ndarray:
    """(M, 4) float64: x, y, width, height, as they are in the file."""
    for annotation, name in zip(annotations, ids, strict=True):
        box = annotation.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(type(value) in (int, float) for value in box):
            raise ValueError(f"{path}: annotation {name} has the bbox {box!r}: expected 4 numbers, x, y, width, height")
    return np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64).reshape(-1, 4)


def _integers(path: Path, kind: str, entries: list[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([_entry(path, kind, entry, key, int, n) for n, entry in enumerate(entries)], dtype=np.int64)


def _entry(path: Path, kind: str, found: dict[str, Any], key: str, expected: type, number: int) -> Any:
    value = found.get(key)
    if not isinstance(value, expected) or isinstance(value, bool):
        who = f"{kind} {found['id']}" if "id" in found and key != "id" else f"{kind} number {number}"
        what = "an integer" if expected is int else "a text"
        has = f"has the {key} {value!r}" if key in found else f"has no {key}"
        raise ValueError(f"{path}: {who} {has}: expected {what}")
    return value


def _check_unique(path: Path, kind: str, key: str, values: list[Any]) -> None:
    if len(set(values)) < len(values):
        twice = [value for value, count in Counter(values).items() if count > 1]
        raise ValueError(f"{path}: {len(twice)} {key}s of {kind} come more than once: {_some(twice)}")


def _warn(path: Path, names: list[str], images: np.ndarray, kinds: dict[str, np.ndarray], stray: np.ndarray) -> None:
    """One warning for all that is left out."""
    said = [f"{found.sum()} {kind}" for kind, found in kinds.items() if found.any()]
    files = [names[image] for image in np.unique(images[np.any(list(kinds.values()), axis=0)])]
    message = f"{' and '.join(said)}, in {listing.some(files)}" if said else ""
    if stray.any():
        message += ("; " if said else "") + f"{stray.sum()} of images that the file does not list"
    if message:
        rank_zero_warn(f"{path} has boxes that are left out: {message}")


def _some(values: Iterable[Any]) -> str:
    return listing.some([str(value) for value in values])


def export_coco(data: DetectionDataModule | RawSamples, split: Split, folder: str | os.PathLike[str]) -> Path:
    """Writes samples as COCO keeps them: ``folder/images/*.png`` and ``folder/annotations.json``, which it returns.

    Read again with :class:`datamodules.CocoDetectionDataModule`, they have the same pixels, boxes, labels, crowds and
    areas.

    Args:
        data: A data module, of which a split is written, as it is before resizing and augmentation. Or samples
            ``(image, target)``, images uint8 (3, h, w); their classes are then called by their labels.
        split: The split of the data module.
        folder: Where to; it is made.

    Raises:
        ValueError: If there is no such split, a sample is unreadable or has no boxes, or two have one ``image_id``.
    """
    samples = data.raw_samples(split) if isinstance(data, DetectionDataModule) else data
    if samples is None:
        raise ValueError(f"{type(data).__name__} has no {split} samples to export")
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(len(samples)):
        sample = samples[index]
        if not isinstance(sample, tuple) or "boxes" not in sample[1]:
            raise ValueError(f"sample {index} cannot be exported: expected (image, target) with boxes")
        image, target = sample
        name, image_id = f"{index:06d}.png", int(target.get("image_id", index))
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / "images" / name)
        images.append({"id": image_id, "file_name": name, "height": image.shape[-2], "width": image.shape[-1]})
        annotations += _records(target, image_id, len(annotations) + 1)
    if len({image["id"] for image in images}) < len(images):
        raise ValueError("two samples have one image_id: they cannot be told apart in a COCO file")
    labels = [annotation["category_id"] for annotation in annotations]
    names = getattr(data, "classes", None) or [str(label) for label in range(max(labels, default=0) + 1)]
    ids = getattr(data, "category_ids", None) or range(len(names))
    for annotation in annotations:
        annotation["category_id"] = ids[annotation["category_id"]]
    categories = [{"id": int(i), "name": name} for i, name in zip(ids, names, strict=True)]
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def _records(target: Target, image_id: int, first: int) -> Iterator[dict[str, Any]]:
    """The annotations of one image; ``category_id`` is the label. In double precision x + (x2 - x) is x2 again."""
    boxes = target["boxes"].double()
    sides = boxes[:, 2:] - boxes[:, :2]
    iscrowd = target.get("iscrowd", torch.zeros(len(boxes), dtype=torch.bool))
    area = target.get("area", sides.prod(dim=1))
    rows = zip(
        torch.cat([boxes[:, :2], sides], 1).tolist(),
        target["labels"].tolist(),
        iscrowd.tolist(),
        area.tolist(),
        strict=True,
    )
    for number, (box, label, crowd, pixels) in enumerate(rows, start=first):
        yield {
            "id": number,
            "image_id": image_id,
            "category_id": label,
            "bbox": box,
            "iscrowd": int(crowd),
            "area": pixels,
        }
