"""Splits, classes and files of an image folder, by listing alone, and words for what lies there instead."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from datamodules._lightning import rank_zero_warn
from datamodules.reading.images import EXTENSIONS
from datamodules.reading.json_values import one_form

Split = Literal["train", "val", "test", "predict"]

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation"),
    "test": ("test", "testing"),
}
LIKE_SPLITS = ("train", "val", "test", "eval", "dev", "holdout")
"""Beginnings of folder names that suggest a split, such as train_images."""
EXPECTED = (
    "expected a folder for each class (cat/1.jpg), or train, val and test folders that hold class folders or images, "
    "or images alone"
)


def split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split, training first; the root itself as "train" if there are no such folders.

    Raises:
        FileNotFoundError: If there is no root.
        ValueError: If it is a file, two of its folders stand for one split, or its one folder holds the splits.
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
    if found and not others:
        return found
    _check_depth(root, folders)
    alike = [name for name in folders if name.casefold().startswith(LIKE_SPLITS)]
    if len(alike) > 1:
        rank_zero_warn(
            f"{root}: {some(alike)} are taken for classes: if they are splits, call them {', '.join(SPLIT_FOLDERS)}"
        )
    return {"train": root}


def _check_depth(root: Path, folders: Sequence[str]) -> None:
    """Refuses a root whose one folder holds the splits: their images would be mixed, in one class."""
    if len(folders) == 1 and not any(map(is_image, visible_files(root))):
        known = {spelling for spellings in SPLIT_FOLDERS.values() for spelling in spellings}
        splits = [name for name in visible_folders(root / folders[0]) if name.casefold() in known]
        if len(splits) > 1 or "train" in map(str.casefold, splits):
            raise ValueError(
                f"{root} holds one folder, {folders[0]}, and the splits lie in it ({some(splits)}): set root to "
                f"{root / folders[0]}"
            )


def class_folders(folder: Path) -> dict[str, list[str]]:
    """The folders in a folder by the class they hold, sorted: two Unicode forms of a name are one class."""
    classes: dict[str, list[str]] = {}
    for name in visible_folders(folder):
        classes.setdefault(one_form(name), []).append(name)
    if len(classes) == 1 and not any(map(is_image, visible_files(folder / (only := next(iter(classes.values()))[0])))):
        deeper = visible_folders(folder / only)
        if len(deeper) > 1:
            rank_zero_warn(
                f"{folder} holds one folder, {only}, which is taken for the one class, with all images in it: if its "
                f"{len(deeper)} folders are the classes ({some(deeper)}), they lie one folder too deep"
            )
    return dict(sorted(classes.items()))


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        yield from (entry for entry in entries if not entry.name.startswith(".") and entry.name != "__MACOSX")


def visible_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted."""
    return sorted(entry.name for entry in _entries(folder) if entry.is_dir())


def visible_files(folder: Path) -> list[str]:
    """Names of the files in a folder, sorted."""
    return sorted(entry.name for entry in _entries(folder) if entry.is_file())


def files_in(
    folder: Path, wanted: Callable[[str], bool], start: str = "", above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[str]:
    """Wanted files at any depth, relative to the folder, in no order. Links are followed, but not in circles."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for entry in _entries(folder):
        if entry.is_dir():
            yield from files_in(folder / entry.name, wanted, f"{start}{entry.name}/", above | {here})
        elif wanted(entry.name):
            yield start + entry.name


def images_in(folder: Path) -> Iterator[str]:
    """Image files at any depth, relative to the folder, in no order."""
    return files_in(folder, is_image)


def images_under(folder: Path) -> list[str]:
    """The images under a folder at all depths, relative to it and sorted.

    Raises:
        ValueError: If there are none.
    """
    names = sorted(images_in(folder))
    if not names:
        raise ValueError(f"{folder} holds no images ({endings()}) at any depth; {seen(folder)}")
    return names


def is_image(name: str) -> bool:
    """True for a file name with an image's ending."""
    return name.lower().endswith(EXTENSIONS)


def endings() -> str:
    """The endings of images, for a message."""
    return " ".join(EXTENSIONS)


def seen(folder: Path) -> str:
    """A folder's contents in a few words, for a message."""
    folders, files = visible_folders(folder), visible_files(folder)
    if not folders and not files:
        return "it is empty"
    counted = [("folder(s)", folders), ("file(s)", files)]
    return "it holds " + " and ".join(f"{len(names)} {kind} ({some(names)})" for kind, names in counted if names)


def some(names: Sequence[str]) -> str:
    """The first few of many names, for a message."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
