"""What lies in a folder of images, by listing alone: splits, classes, files, and how to say what is there instead."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from datamodules.images import EXTENSIONS

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation"),
    "test": ("test", "testing"),
}
EXPECTED = (
    "expected a folder for each class (cat/1.jpg), or train, val and test folders that hold class folders or images, "
    "or images alone"
)


def split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split, training first; the root itself as "train" if there are no such folders.

    Raises:
        FileNotFoundError: If there is no root.
        ValueError: If it is a file, or two of its folders stand for one split.
    """
    if root.is_file():
        raise ValueError(f"{root} is a file: root has to be a folder; {EXPECTED}. To predict it: predict_root")
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; {EXPECTED}")
    found: dict[str, Path] = {}
    folders = visible_folders(root)
    for split, spellings in SPLIT_FOLDERS.items():
        matches = [name for name in folders if name.casefold() in spellings]
        if len(matches) > 1:
            raise ValueError(f"{root} has {' and '.join(matches)}: expected one folder for {split}")
        if matches:
            found[split] = root / matches[0]
    others = len(folders) > len(found)
    # "train", "val" and "test" may be names of classes as well: trains among other vehicles.
    if "train" in found and (len(found) > 1 or not others or visible_folders(found["train"])):
        return found
    return found if found and not others else {"train": root}


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        yield from (entry for entry in entries if not entry.name.startswith(".") and entry.name != "__MACOSX")


def visible_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted."""
    return sorted(entry.name for entry in _entries(folder) if entry.is_dir())


def visible_files(folder: Path) -> list[str]:
    """Names of the files in a folder, sorted."""
    return sorted(entry.name for entry in _entries(folder) if entry.is_file())


def images_in(folder: Path, start: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Image files at any depth, relative to the folder, in no order. Links are followed, but not in circles."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for entry in _entries(folder):
        if entry.is_dir():
            yield from images_in(folder / entry.name, f"{start}{entry.name}/", above | {here})
        elif is_image(entry.name):
            yield start + entry.name


def is_image(name: str) -> bool:
    """Whether a file's name ends like an image's."""
    return name.lower().endswith(EXTENSIONS)


def endings() -> str:
    """The endings of images, for a message."""
    return " ".join(EXTENSIONS)


def seen(folder: Path) -> str:
    """What a folder holds, in a few words."""
    folders, files = visible_folders(folder), visible_files(folder)
    if not folders and not files:
        return "it is empty"
    counted = [("folder(s)", folders), ("file(s)", files)]
    return "it holds " + " and ".join(f"{len(names)} {kind} ({some(names)})" for kind, names in counted if names)


def some(names: Sequence[str]) -> str:
    """The first few of many names, for a message."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
