"""Export of detection data to COCO annotation files."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from datamodules.detection import DetectionDataModule, RawSamples
from datamodules.reading.listing import Split
from datamodules.transforms.detection import Target


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
        raise ValueError(f"{type(data).__name__} has no {split} samples to export: name another split")
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
    if twice := [image_id for image_id, count in Counter(image["id"] for image in images).items() if count > 1]:
        raise ValueError(f"two samples have the image_id {twice[0]}: a COCO file needs one for each")
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
