"""Captions of images, read and checked once, and kept in arrays: from a table, COCO's JSON or a folder of texts.

``read(source)`` takes

- a ``.csv``, ``.tsv`` or ``.txt`` file with a header and a row for each caption (``caption_tables.py``);
- a ``.jsonl`` file with an object in each line, or a ``.json`` file that is a list of them, with keys for columns and a
  caption or a list of several; or a ``.json`` file that gives the captions by the name of the image;
- COCO's ``captions_*.json``: ``{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}``;
- a folder of images, at any depth, with a text beside each of the same name: ``a.txt``, a caption a line, or ``a.json``
  (``caption_files.py``).

An image may come in several rows, with a caption each. Arrays, since lists of millions of texts would be copied into
every loader worker, by the counting of references.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from datamodules._lightning import rank_zero_warn
from datamodules.reading import caption_files, caption_tables, coco_layout
from datamodules.reading.caption_rows import Rows
from datamodules.reading.files import OnError

EXPECTED = (
    "expected a table (.csv, .tsv, .jsonl, .json), COCO's captions (.json), or a folder with a text beside each image "
    "(a.jpg and a.txt)"
)


class Texts:
    """Many texts in one array of bytes, UTF-8: ``texts[number]``."""

    def __init__(self, texts: Sequence[str]) -> None:
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        self.bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, number: int) -> str:
        start, end = self.ends[number : number + 2].tolist()
        return self.bytes[start:end].tobytes().decode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class Captions:
    """Captions of N images, in the source's order: those of image i are ``texts`` from ``starts[i]`` to ``stops[i]``.

    ``names`` (N,) str, relative to ``folder``; ``image_ids`` (N,) int64, COCO's, or else the image's number in the
    source; ``starts`` and ``stops`` (N,) int64.
    """

    source: Path
    folder: Path
    names: np.ndarray
    image_ids: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    texts: Texts

    def __len__(self) -> int:
        return len(self.names)

    def of(self, index: int) -> list[str]:
        """The captions of an image."""
        return [self.texts[number] for number in range(int(self.starts[index]), int(self.stops[index]))]

    def part(self, indices: np.ndarray) -> "Captions":
        """Captions of some of the images."""
        chosen = {name: getattr(self, name)[indices] for name in ("names", "image_ids", "starts", "stops")}
        return replace(self, **chosen)


def read(
    source: Path,
    images: Path | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    encoding: str = "utf-8",
    on_error: OnError = "raise",
) -> Captions:
    """Reads a source and finds its images.

    A row that is there twice, the same caption of the same image, counts once, with a warning.

    Args:
        source: A file or folder: see the top of this file.
        images: Folder that names of images are relative to. None: for a table, that of the file; for COCO, looked for
            as :mod:`datamodules.coco` says; a folder of texts holds its images.
        image_column: Column of a table that names the image. None: one of the usual names.
        caption_column: Column that has the caption, likewise.
        encoding: Encoding of tables and texts that do not begin with a byte order mark.
        on_error: What happens to captions that are empty, of images that are not there or not listed, and to rows with
            another number of fields than the header. "raise" stops and names the first; "skip" leaves them out, with a
            warning of each kind.

    Raises:
        FileNotFoundError: If the source is missing, or an image.
        ValueError: If it is of another form, or has no captions. One line says what is wrong and where.
    """
    ending = source.suffix.lower()
    if source.is_dir() and images is not None:
        raise ValueError(f"{source} is a folder of images and texts, but images is {images}: leave it out")
    if source.is_dir():
        rows = caption_files.read_folder(source, encoding)
    elif not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder; {EXPECTED}")
    elif ending in (".csv", ".tsv", ".txt"):
        rows = caption_tables.read(source, image_column, caption_column, encoding)
    elif ending == ".json":
        rows = caption_files.read_json(source, image_column, caption_column)
    elif ending == ".jsonl":
        rows = caption_files.read_json_lines(source, image_column, caption_column, encoding)
    else:
        raise ValueError(f"{source} is of no known form: {EXPECTED}")
    return _packed(rows, _folder(rows, images), on_error)


def _folder(rows: Rows, images: Path | None) -> Path:
    """The folder that the names of images are relative to."""
    if images is not None:
        if not images.is_dir():
            raise FileNotFoundError(f"{images}: no such folder, for the images of {rows.source}")
        return images
    if len(rows.folders) == 1 or not rows.names:
        return rows.folders[0]
    some = dict.fromkeys(rows.names[:100])  # of which some may be missing
    found = next((each for name in some if (each := coco_layout.holding(rows.folders, name)) is not None), None)
    if found is None:
        raise FileNotFoundError(
            f"{rows.names[0]}, the first image of {rows.source}, is in none of {', '.join(map(str, rows.folders))}: "
            "give the folder that it is in"
        )
    return found


def _packed(rows: Rows, folder: Path, on_error: OnError) -> Captions:
    """The rows by image, without those that are at fault or there twice."""
    names = list(dict.fromkeys(rows.names))
    found, missing = coco_layout.find(folder, np.array(names, dtype=np.str_))
    lost = set(missing)
    files = dict(zip((name for name in names if name not in lost), found.tolist(), strict=True))
    number_of: dict[str, int] = {}
    spelt: list[str] = []
    owners, kept, repeated = [], [], []
    seen: set[tuple[int, str]] = set()
    for number, (name, caption) in enumerate(zip(rows.names, rows.captions, strict=True)):
        if name not in files:
            rows.fault(f"no such image in {folder}", rows.place(number), name or "''", FileNotFoundError)
            continue
        if not caption:
            rows.fault("an empty caption", rows.place(number))
            continue
        # A file may be spelt in several ways, and must not become two images, of which one is held out.
        owner = number_of.setdefault(os.path.normpath(os.path.join(folder, files[name])), len(number_of))
        if owner == len(spelt):
            spelt.append(name)
        if rows.image_ids is None and (owner, caption) in seen:
            repeated.append(number)
            continue
        seen.add((owner, caption))
        owners.append(owner)
        kept.append(number)
    rows.tell(on_error)
    if not kept:
        raise ValueError(f"{rows.source} has no captions: {EXPECTED}")
    if repeated:
        more = f", and {len(repeated) - 1:,} more" * (len(repeated) > 1)
        rank_zero_warn(f"{rows.source}, {rows.place(repeated[0])}: a row that is there already{more}: counted once")
    order = np.argsort(owners, kind="stable")
    ends = np.searchsorted(np.array(owners)[order], np.arange(len(spelt) + 1))
    ids = range(len(spelt)) if rows.image_ids is None else [rows.image_ids[name] for name in spelt]
    return Captions(
        rows.source,
        folder,
        names=np.array([files[name] for name in spelt], dtype=np.str_),
        image_ids=np.array(ids, dtype=np.int64),
        starts=ends[:-1],
        stops=ends[1:],
        texts=Texts([rows.captions[kept[place]] for place in order]),
    )
