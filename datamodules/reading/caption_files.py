"""Captions in COCO's JSON, and in text files beside images."""

from pathlib import Path
from typing import Any

from datamodules._lightning import rank_zero_warn
from datamodules.reading import coco_layout, listing
from datamodules.reading.caption_rows import Rows
from datamodules.reading.caption_tables import lines
from datamodules.reading.coco_json import check_form, check_unique, entry, integers, name_of, parsed

COCO = 'expected COCO\'s captions, {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}'
BESIDE = 'expected a text, a list of texts, or {"caption": ...}'
TEXTS = (".txt", ".json")
KEYS = ("captions", "caption", "texts", "text", "title")


def read_coco(path: Path) -> Rows:
    """Reads COCO's captions. Captions whose annotations have ids of their own count each, also where they are equal.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is of another form, none of its annotations has a caption, or ids or file names repeat.
    """
    content = parsed(path, COCO)
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
        if owner not in name_by_id:
            rows.fault("an image_id that is not among the images", f"annotation {said}", str(owner))
        elif not isinstance(caption := annotation.get("caption"), str):
            rows.fault("a caption that is no text", f"annotation {said}", f"{caption!r:.40}")
        else:
            rows.add(name_by_id[owner], caption, said)
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
            if isinstance(caption, str):
                rows.add(image, caption, f"{text}, caption {number + 1}")
            else:
                rows.fault("a caption that is no text", f"{text}, caption {number + 1}", f"{caption!r:.40}")
        return
    said = [(number, line) for number, line in enumerate(lines(rows.source / text, encoding), 1) if line.strip()]
    for number, line in said or [(1, "")]:
        rows.add(image, line, f"{text}, line {number}")


def _captions_in(content: Any) -> list[Any]:
    """Captions that a JSON file beside an image holds, of whatever type; one that is none if it has no captions."""
    if isinstance(content, dict):
        content = next((content[key] for key in KEYS if key in content), None)
    return content if isinstance(content, list) and content else [content]
