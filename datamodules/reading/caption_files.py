"""Captions in JSON, COCO's or of other programs, and in text files beside images."""

import json
from pathlib import Path
from typing import Any

from datamodules._lightning import rank_zero_warn
from datamodules.reading import coco_layout, listing
from datamodules.reading.caption_rows import Rows
from datamodules.reading.caption_tables import chosen, lines
from datamodules.reading.coco_json import check_form, check_unique, entry, integers, name_of, parsed

COCO = 'expected COCO\'s captions, {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}'
JSON = COCO + ', or [{"image": ..., "caption": ...}, ...], or {"a.jpg": "a caption", ...}'
BESIDE = 'expected a text, a list of texts, or {"caption": ...}'
TEXTS = (".txt", ".json")
KEYS = ("captions", "caption", "texts", "text", "title")


def read_json(path: Path, image_column: str | None, caption_column: str | None) -> Rows:
    """Reads a JSON file of one of three forms: COCO's captions, a list of objects, captions by name of the image.

    Raises:
        ValueError: If it is of another form, or names no image or caption.
    """
    content = parsed(path, JSON)
    if isinstance(content, dict) and {*content} & {"images", "annotations"}:
        return _coco(path, content)
    if isinstance(content, dict):
        image_column, caption_column = "image", "caption"
        content = [{"image": name, "caption": said} for name, said in content.items()]
    if not isinstance(content, list) or not all(isinstance(each, dict) for each in content):
        raise ValueError(f"{path} holds no objects: {JSON}")
    return _objects(path, list(enumerate(content, 1)), "entry {}", image_column, caption_column)


def read_json_lines(path: Path, image_column: str | None, caption_column: str | None, encoding: str) -> Rows:
    """Reads a file with a JSON object in each line.

    Raises:
        ValueError: If a line holds something else, or the first one names no image or caption.
    """
    objects = []
    for number, line in enumerate(lines(path, encoding), 1):
        if not line.strip():
            continue
        try:
            objects.append((number, json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: no JSON ({error})") from None
        if not isinstance(objects[-1][1], dict):
            raise ValueError(f"{path}, line {number}: expected an object with an image and a caption")
    return _objects(path, objects, "line {}", image_column, caption_column)


def _objects(
    path: Path, objects: list[tuple[int, dict[str, Any]]], where: str, image_column: str | None, column: str | None
) -> Rows:
    """Rows of objects, each with its place, as those of a table; a caption may be a list of several."""
    rows = Rows(path, [path.parent], where=where)
    if not objects:
        return rows
    image_column, column = chosen(path, list(objects[0][1]), image_column, column)
    for place, each in objects:
        image, said = each.get(image_column), each.get(column)
        if not isinstance(image, str):
            rows.fault("an image that is no text", where.format(place), f"{image!r:.40}")
            continue
        for caption in said if isinstance(said, list) and said else [said]:
            rows.add_text(image.strip(), caption, place)
    return rows


def _coco(path: Path, content: dict[str, Any]) -> Rows:
    """Rows of COCO's captions. Those whose annotations have ids of their own count each, also where they are equal."""
    check_form(path, content, ("images", "annotations"), COCO)
    images, annotations = content["images"], content["annotations"]
    names = [entry(path, "image", image, "file_name", str, place) for place, image in enumerate(images)]
    image_ids = integers(path, "image", images, "id").tolist()
    check_unique(path, "images", "id", image_ids)
    check_unique(path, "images", "file_name", names)
    ids = [name_of(annotation, place) for place, annotation in enumerate(annotations)]
    check_unique(path, "annotations", "id", ids)
    if annotations and not any("caption" in annotation for annotation in annotations):
        raise ValueError(f"{path}: none of its {len(annotations)} annotations has a caption: {COCO}")
    rows = Rows(
        path,
        list(coco_layout.image_folders(path)),
        where="annotation {}",
        image_ids=dict(zip(names, image_ids, strict=True)),
    )
    name_by_id = dict(zip(image_ids, names, strict=True))
    owners = integers(path, "annotation", annotations, "image_id").tolist()
    for owner, annotation, said in zip(owners, annotations, ids, strict=True):
        if owner in name_by_id:
            rows.add_text(name_by_id[owner], annotation.get("caption"), said)
        else:
            rows.fault("an image_id that is not among the images", rows.where.format(said), str(owner))
    for image_id in sorted({*image_ids} - {*owners}):
        rows.fault("no caption", f"image {image_id}", name_by_id[image_id])
    return rows


def read_folder(folder: Path, encoding: str) -> Rows:
    """Reads the texts beside the images of a folder, at any depth and sorted; ``.txt`` goes before ``.json``.

    Raises:
        ValueError: If there are no images, or a text cannot be read.
    """
    found = sorted(listing.files_in(folder, lambda name: listing.is_image(name) or name.lower().endswith(TEXTS)))
    texts = {name.lower(): name for name in found if name.lower().endswith(TEXTS)}
    images = [name for name in found if listing.is_image(name)]
    if not images:
        raise ValueError(f"{folder} holds no images ({listing.endings()}) at any depth; {listing.seen(folder)}")
    rows = Rows(folder, [folder])
    used = set()
    for image in images:
        stem = image.rpartition(".")[0].lower()
        text = next((texts[stem + ending] for ending in TEXTS if stem + ending in texts), None)
        if text is None:
            rows.fault("no text beside it", image, f"{Path(image).stem}.txt or .json")
            continue
        used.add(stem)
        _add_text(rows, image, text, encoding)
    alone = [text for name, text in texts.items() if name.endswith(".txt") and name.removesuffix(".txt") not in used]
    if alone:  # notes, perhaps: not a fault
        rank_zero_warn(
            f"{folder}: {len(alone)} texts have no image beside them, and are left out: {listing.some(alone)}"
        )
    return rows


def _add_text(rows: Rows, image: str, text: str, encoding: str) -> None:
    """Adds the captions of an image that a text beside it holds."""
    if text.lower().endswith(".json"):
        for number, caption in enumerate(_captions_in(parsed(rows.source / text, BESIDE))):
            rows.add_text(image, caption, f"{text}, caption {number + 1}")
        return
    said = [(number, line) for number, line in enumerate(lines(rows.source / text, encoding), 1) if line.strip()]
    for number, line in said or [(1, "")]:
        rows.add(image, line, f"{text}, line {number}")


def _captions_in(content: Any) -> list[Any]:
    """Captions that a JSON file beside an image holds, of whatever type; one that is none if it has no captions."""
    if isinstance(content, dict):
        content = next((content[key] for key in KEYS if key in content), None)
    return content if isinstance(content, list) and content else [content]
