"""Folder layouts of COCO files and their images, as programs export them, and spellings of file names in them."""

import os
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from datamodules.reading import listing
from datamodules.reading.json_values import one_form
from datamodules.reading.listing import Split

SPLITS: tuple[Split, ...] = ("train", "val", "test")
LAYOUTS = (
    "annotations/instances_{}*.json",
    "annotations/{}.json",
    "{}/_annotations.coco.json",
    "{}/annotations.json",
    "{}.json",
)


def spellings(name: str) -> Iterator[str]:
    """A file's name as it is, with slashes, without escapes, and in both Unicode forms of each."""
    slashes = name.replace("\\", "/")
    for spelling in dict.fromkeys((name, slashes, unquote(slashes))):
        yield from dict.fromkeys((spelling, one_form(spelling), unicodedata.normalize("NFD", spelling)))


def find(folder: Path, names: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Matches image names with the files of a folder: the files as they are spelt there, and the names without one.

    By one listing of each folder: asking for a million files takes minutes in a network's file system.
    """
    parents: dict[str, dict[str, str]] = {}
    found, missing = [], []
    for name in map(str, names):
        for spelling in spellings(name):
            parent, slash, base = spelling.rpartition("/")
            if parent not in parents:
                there = os.listdir(folder / parent) if (folder / parent).is_dir() else []
                parents[parent] = {one_form(entry): entry for entry in there} | {entry: entry for entry in there}
            if base in parents[parent]:
                found.append(parent + slash + parents[parent][base])
                break
        else:
            missing.append(name)
    return np.array(found, dtype=np.str_), missing


def holding(folders: Iterable[Path], name: str) -> Path | None:
    """The first folder that has a file of this name, in one of its spellings."""
    return next((each for each in folders if any((each / spelt).is_file() for spelt in spellings(name))), None)


def annotation_files(root: Path) -> Iterator[tuple[str, Path]]:
    """The splits that there are, and the annotation file of each."""
    for split in SPLITS:
        patterns = (layout.format(name) for layout in LAYOUTS for name in listing.SPLIT_FOLDERS[split])
        found = sorted({path for pattern in patterns for path in root.glob(_any_case(pattern))})
        if len(found) > 1:
            raise ValueError(f"{root} has {' and '.join(map(str, found))}: say which is {split}_annotations")
        if found:
            yield split, found[0]


def _any_case(pattern: str) -> str:
    return "".join(f"[{letter.lower()}{letter.upper()}]" if letter.isalpha() else letter for letter in pattern)


def image_folders(file: Path) -> Iterator[Path]:
    """Candidate folders for the images of an annotation file, most likely first, in capitals or not."""
    name = file.stem
    for prefix in ("instances_", "captions_", "image_info_"):
        name = name.removeprefix(prefix)
    here, above = file.parent, file.parent.parent
    for folder in (
        *(here, here / "images", here / "data"),
        *(base / middle / name for base in (here, above) for middle in (".", "images", "data")),
        *(above, above / "images", above / "data"),
    ):
        yield folder if folder.is_dir() else _in_any_case(folder)


def _in_any_case(folder: Path) -> Path:
    """The folder of this name in other capitals, if there is one; else as it is asked for."""
    parent = folder.parent if folder.parent.is_dir() or folder.parent == folder else _in_any_case(folder.parent)
    there = listing.visible_folders(parent) if parent.is_dir() else []
    return next((parent / name for name in there if name.casefold() == folder.name.casefold()), folder)
