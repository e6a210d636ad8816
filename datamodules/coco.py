"""Boxes of your own, as COCO keeps them: ``CocoDetectionDataModule(root)``, a JSON file and images a split.

``root`` may be COCO's own folder, or any other with, for a split ``train`` (or ``training``), ``val`` (``valid``,
``validation``, ``eval``, ``evaluation``) and ``test`` (``testing``), in small letters or capitals, one of

- ``annotations/instances_train*.json`` (CVAT's ``instances_Train.json``) or ``annotations/train.json``;
- ``train/_annotations.coco.json`` (as Roboflow exports) or ``train/annotations.json`` (as :func:`export_coco` does);
- ``train.json``.

The images lie beside the file, in ``images`` or ``data`` there, or in a folder of the split's name (``train2017`` for
``instances_train2017.json``) beside the file or one level up, possibly within ``images`` or ``data``; capitals make no
difference. All else can be said by ``train_annotations`` and ``train_images``, and so on. A ``file_name`` may have
backslashes, escapes (``a%20b.png``) or another Unicode form than the file.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from datamodules._lightning import rank_zero_info, rank_zero_warn
from datamodules.coco_export import export_coco
from datamodules.detection import DETECTION_OPTIONS, DetectionDataModule, DetectionOptions, RawSamples
from datamodules.loading.options import with_defaults
from datamodules.reading import coco_layout, listing
from datamodules.reading.annotations import Annotations, read
from datamodules.reading.files import ImageFiles, OnError
from datamodules.reading.images import UnreadableImageError, decode, is_turned
from datamodules.reading.listing import Split
from datamodules.transforms.detection import Target

__all__ = ["CocoDetectionDataModule", "CocoSamples", "export_coco"]


class CocoSamples:
    """Samples ``(image, target)``: uint8 (3, h, w), upright, and its boxes, labels, iscrowd, area and image_id.

    Args:
        folder: Where the images lie.
        annotations: Their boxes.
        category_ids: By label, the category's id.
        on_error: "raise" raises :class:`UnreadableImageError` for a file that cannot be read, or that has another size
            than its annotations say; "skip" gives None for it, and marks it in ``unreadable``.
    """

    random = False

    def __init__(
        self, folder: Path, annotations: Annotations, category_ids: Sequence[int], on_error: OnError = "raise"
    ) -> None:
        self.folder, self.annotations, self.names = folder, annotations, annotations.names
        self.labels = np.searchsorted(np.asarray(category_ids), annotations.categories)
        self.sizes = annotations.sizes if annotations.sizes.all() else None
        self.unreadable: Tensor | None = None
        if on_error == "skip":
            self.unreadable = torch.zeros(len(annotations), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> tuple[Tensor, Target] | None:
        try:
            image = self._read(index)
        except UnreadableImageError:
            if self.unreadable is None:
                raise
            self.unreadable[index] = 1
            return None
        part = slice(*self.annotations.offsets[index : index + 2].tolist())
        return F.pil_to_tensor(image), {
            "boxes": torch.from_numpy(self.annotations.boxes[part].copy()),
            "labels": torch.from_numpy(self.labels[part].copy()),
            "iscrowd": torch.from_numpy(self.annotations.iscrowd[part].copy()),
            "area": torch.from_numpy(self.annotations.area[part].copy()),
            "image_id": int(self.annotations.image_ids[index]),
        }

    def _read(self, index: int) -> Image.Image:
        path = self.folder / str(self.names[index])
        image = decode(path, channels=3)
        height, width = self.annotations.sizes[index].tolist()
        if height and width and (image.height, image.width) != (height, width):
            reason = ": its boxes belong to another size of it"
            if (image.height, image.width) == (width, height):
                reason = ": its sides are swapped"
                if is_turned(path):
                    reason += (
                        ", as its EXIF orientation swaps them. Draw the boxes over the upright image: where they fit, "
                        "exchange width and height in the annotations, and leave the image as it is; where they fit "
                        "the image without its orientation, take that out of the file"
                    )
                else:
                    reason += ", and no EXIF orientation says why: it was turned after its annotations were made"
            raise UnreadableImageError(
                f"{path} is {image.width}x{image.height} pixels, but {width}x{height} in {self.annotations.path}"
                + reason
            )
        return image


class CocoDetectionDataModule(DetectionDataModule):
    """Images with boxes in COCO's format. See the top of this file for what ``root`` may hold.

    Batches as :mod:`datamodules.detection` says. Labels run from 0 in the order of the categories' ids; ``classes`` and
    ``category_ids`` are in that order, and in every checkpoint. Crowd regions and images without boxes are kept.

    Args:
        root: The folder that the other paths are relative to. If none of the annotations is given, they are looked for
            in it. It may be missing if there is a ``predict_root``, for prediction away from the data.
        train_annotations: JSON file of the training images.
        train_images: Folder that the ``file_name`` of training images is relative to. None: looked for.
        val_annotations: JSON file of the validation images.
        val_images: Folder that the ``file_name`` of validation images is relative to. None: looked for.
        test_annotations: JSON file of the test images; it may have no annotations, for prediction.
        test_images: Folder that the ``file_name`` of test images is relative to. None: looked for.
        predict_root: For prediction, a folder, searched at any depth, or one image. None: the test images. Their
            targets have no boxes, and as ``image_id`` the number in the order of names.
        category_ids: Categories to detect; boxes of others are left out. None: all of the training file, or if there
            is none, of the next.
        keep_empty: Whether to train on images without boxes (or of crowds alone) too, on which nothing is to be found.
        on_error: What happens at a file that cannot be read, or whose size is not what its annotations say. "raise"
            stops and names it. "skip" goes on without it, as for :class:`datamodules.ImageFolderDataModule`.
        options: See :class:`datamodules.detection.DetectionDataModule`.

    Raises:
        FileNotFoundError: If a file or folder is missing; from ``setup``, if images are.
        ValueError: If an annotation file is not as it should be (:func:`datamodules.reading.annotations.read`), or
            means something else by a category than the first, or has none of ``category_ids``.
    """

    @with_defaults(DETECTION_OPTIONS | {"image_size": 800, "max_size": 1333, "hflip": 0.5, "group_by_aspect": True})
    def __init__(
        self,
        root: str = ".",
        train_annotations: str | None = None,
        train_images: str | None = None,
        val_annotations: str | None = None,
        val_images: str | None = None,
        test_annotations: str | None = None,
        test_images: str | None = None,
        predict_root: str | None = None,
        category_ids: Sequence[int] | None = None,
        keep_empty: bool = True,
        on_error: OnError = "raise",
        **options: Unpack[DetectionOptions],
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"unknown on_error {on_error!r}: expected raise or skip")
        if options["square"] is not None:  # which takes the place of the default sizes
            options["image_size"] = options["max_size"] = None
        super().__init__(**options)
        self.root, self.predict_root = Path(root), predict_root
        self.keep_empty, self.on_error = keep_empty, on_error
        given = {"train": train_annotations, "val": val_annotations, "test": test_annotations}
        folders = {"train": train_images, "val": val_images, "test": test_images}
        self.files = {split: self.root / path for split, path in given.items() if path is not None}
        self.folders = {split: self.root / path for split, path in folders.items() if path is not None}
        self.files = self.files or dict(coco_layout.annotation_files(self.root))
        if not self.files and predict_root is None:
            looked_for = ", ".join(layout.format("train") for layout in coco_layout.LAYOUTS)
            there = listing.seen(self.root) if self.root.is_dir() else "there is no such folder"
            raise FileNotFoundError(f"{self.root} has no annotations: looked for {looked_for}, or val or test; {there}")
        self._annotations: dict[str, Annotations] = {}
        self._category_names: dict[int, str] = {}
        first = next(iter(self.files), None)
        if first is not None and (predict_root is None or self.files[first].exists()):
            self._choose(first, category_ids)

    def raw_samples(self, split: Split) -> RawSamples | None:
        if split == "predict":
            if self.predict_root is None:
                return None
            return ImageFiles.under(self.predict_root, F.pil_to_tensor, on_error=self.on_error)
        if split not in self.files:
            return None
        annotations = self._read(split).with_categories(self.category_ids)
        if len(annotations) == 0:
            return None
        if split == "train":
            if annotations.iscrowd.all():
                raise ValueError(
                    f"{annotations.path} has no boxes of {listing.some(self.classes or [])} to train on: set "
                    "category_ids to others, or to null"
                )
            annotations = annotations if self.keep_empty else annotations.not_empty()
        folder = self._folder(split, annotations)
        names = self._found(split, folder, annotations.names)
        return CocoSamples(folder, replace(annotations, names=names), self.category_ids, self.on_error)

    def setup(self, stage: str) -> None:
        """Looks at a stage's annotations and images, so that what is missing is said before anything starts."""
        splits: dict[str, list[Split]] = {"fit": ["train", "val", "test"], "validate": ["val"], "test": ["test"]}
        taken = [(split, self.samples(split)) for split in splits.get(stage, ["predict"])]
        said = [f"{split} {'none' if samples is None else f'{len(samples):,} images'}" for split, samples in taken]
        files = [f" of {self.files[split]}" if split in self.files else "" for split, _ in taken]
        rank_zero_info("data: " + ", ".join(text + file for text, file in zip(said, files, strict=True)))
        for split, samples in taken:
            raw = samples.raw if samples is not None else None
            if split != "train" and isinstance(raw, CocoSamples) and raw.annotations.iscrowd.all():
                kind = "crowds alone" if raw.annotations.iscrowd.size else "no boxes"
                rank_zero_warn(
                    f"{self.files[split]} has {kind} of {listing.some(self.classes or [])}: average precision of "
                    f"{split} is undefined (-1)"
                )
        if stage == "fit" and "train" in self.files and self.files["train"] == self.files.get("val"):
            rank_zero_warn(f"train and val have one file, {self.files['train']}: validation is on training images")

    # Categories.

    def _choose(self, first: str, category_ids: Sequence[int] | None) -> None:
        self._category_names = self._read(first).category_names
        chosen = self._category_names if category_ids is None else category_ids
        if unknown := [i for i in chosen if i not in self._category_names]:
            there = listing.some([f"{i} ({name})" for i, name in self._category_names.items()])
            raise ValueError(f"category_ids has {unknown}: {self.files[first]} has {there}")
        if not chosen:
            raise ValueError("category_ids is empty: expected ids of categories, or null for all")
        self.category_ids = sorted(set(chosen))
        names = [self._category_names[i] for i in self.category_ids]
        twice = {name for name, count in Counter(names).items() if count > 1}
        numbered = [f"{name} ({i})" for name, i in zip(names, self.category_ids, strict=True)]
        self.classes = [new if name in twice else name for name, new in zip(names, numbered, strict=True)]
        if len(set(self.classes)) < len(names):  # one is called as another with its id
            self.classes = numbered
        if twice:
            rank_zero_warn(
                f"{self.files[first]} has several categories called {listing.some(sorted(twice))}: each is a class of "
                "its own, with its id behind the name. category_ids says which to take"
            )

    def _read(self, split: str) -> Annotations:
        """A split's annotations; their categories are those of the first file, or some of them."""
        if split not in self._annotations:
            path = self.files[split]
            found = read(path, need_annotations=split != "test")
            known = self._category_names or found.category_names
            used = set(np.unique(found.categories).tolist())
            for i, name in found.category_names.items():
                if known.get(i, name) != name or (i not in known and i in used):
                    theirs = f"is {known[i]}" if i in known else "is missing"
                    raise ValueError(
                        f"{path}: category {i} is {name}, but {theirs} in {self.files[next(iter(self.files))]}"
                    )
            self._annotations[split] = found
        return self._annotations[split]

    # Images.

    def _folder(self, split: str, annotations: Annotations) -> Path:
        if split in self.folders:
            folder = self.folders[split]
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder}: no such folder; {split}_images has to be one")
            return folder
        first = str(annotations.names[0])
        folders = list(coco_layout.image_folders(self.files[split]))
        if (found := coco_layout.holding(folders, first)) is not None:
            return found
        raise FileNotFoundError(
            f"{first}, the first image of {self.files[split]}, is in none of {', '.join(map(str, folders))}: set "
            f"{split}_images to the folder that it is in"
        )

    def _found(self, split: str, folder: Path, names: np.ndarray) -> np.ndarray:
        """The files of all images, as they are spelt there."""
        found, missing = coco_layout.find(folder, names)
        if not missing:
            return found
        first, hint = missing[0], ""
        base = first.replace("\\", "/").rpartition("/")[2]
        for other, path in self.folders.items():
            if (path / first).is_file():
                hint = f". {first} is in {path}, which is given as {other}_images"
        if base != first and (folder / base).is_file():
            hint = f". {base} is there without its folder: set {split}_images to the one that {first} is in"
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} images of {self.files[split]} are not in {folder}: "
            f"{listing.some(missing)}{hint}"
        )
