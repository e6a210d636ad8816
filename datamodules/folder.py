"""Images in folders: ``ImageFolderDataModule(root)``.

``root`` may hold

- ``train`` (or ``training``), ``val`` (``valid``, ``validation``, ``eval``, ``evaluation``) and ``test`` (``testing``)
  folders, in small letters or capitals, with a folder for each class in them: ``root/train/cat/1.jpg``. Other folders
  beside them are left alone;
- a folder for each class: ``root/cat/1.jpg``;
- images without class folders, in itself or in its ``train``, ``val`` and ``test``: these are unlabelled.

Labelled folders may have a ``test`` without labels beside them: these images are for prediction, not for testing.
(A lone ``train`` among folders of other names, with images right in it, is a class: of vehicles, say.) Within a class,
images may lie in further folders. Hidden files and folders (a leading dot) are ignored, and so are files whose ending
is not that of an image. What was taken, as what, and what was left out, is said in a line when a run starts.

A missing ``val`` is held out of the training images. So is a missing ``test``, but only where there is no ``val``
folder either: a validation set made by hand says that the rest is for training. Shares are taken from every class alike
and chosen by ``split_seed`` and the files' names: the same on every machine, and nearly the same when files are added.
"""

from pathlib import Path
from typing import Literal, Unpack

import numpy as np

from datamodules._lightning import rank_zero_info, rank_zero_warn
from datamodules.classification import CLASSIFICATION_OPTIONS, ClassificationOptions
from datamodules.files import FilesDataModule
from datamodules.loading.labels import labels_of
from datamodules.loading.options import with_defaults
from datamodules.loading.shares import shares
from datamodules.reading import listing
from datamodules.reading.files import ImageFiles, OnError
from datamodules.reading.json_values import one_form


class ImageFolderDataModule(FilesDataModule):
    """Images of your own, in a folder for each class or alone. See the top of this file for what ``root`` may hold.

    Batches ``(images (B, C, H, W), labels (B,))``; of unlabelled images ``images`` alone, for pretraining and
    prediction; ``num_classes`` then raises AttributeError. ``classes`` are the training folders' names, sorted.

    Args:
        root: The folder. It may be missing if there is a ``predict_root``, for prediction away from the training data.
        image_size: Side in pixels, or (height, width).
        channels: 3 (RGB) or 1 (grey). Files are converted to it.
        val_fraction: Share of all images to hold out for validation, if there is no such folder; 0: none.
        test_fraction: Share to hold out for testing, if there is neither a validation nor a test folder; 0: none.
        split_seed: Seed of these shares.
        on_error: What happens at a file that cannot be read. "raise" stops and names it. "skip" goes on without it
            (training puts another image in its place) and warns how many there were, and which, at the end of each
            training epoch and of each run; of several processes, the first reports its own.
        predict_root: For prediction, a folder, searched at any depth, or one image. None: the test images, or if
            there is no test folder and nothing is labelled, all images.
        mean: Mean of each channel, of images in [0, 1]. None: ImageNet's, for one channel the average of the three.
        std: Standard deviation of each channel, likewise.
        options: See :class:`datamodules.classification.ClassificationDataModule`.

    Raises:
        FileNotFoundError: If ``root`` is missing.
        ImportError: If ``decoder`` is a package that is not installed.
        ValueError: If ``root`` holds no images, is a file, or has classes for validation or testing that training has
            not; if ``cache_size`` is less than ``image_size``; and from ``samples``, which lists the images, if a class
            folder holds none.
    """

    @with_defaults(CLASSIFICATION_OPTIONS)
    def __init__(
        self,
        root: str,
        image_size: int | tuple[int, int] = 224,
        *,
        channels: Literal[1, 3] = 3,
        on_error: OnError = "raise",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        **options: Unpack[ClassificationOptions],
    ) -> None:
        super().__init__(image_size, channels, on_error=on_error, mean=mean, std=std, **options)
        self.root = Path(root)
        self._folders: dict[str, Path] = {}
        self._unlabelled_test: Path | None = None
        if self.root.exists() or self.predict_root is None:
            self._look()

    def setup(self, stage: str) -> None:
        """Lists what a stage needs, for training that of the test too, so that what is wrong is said before it starts.

        One line says what was taken, as what, and what was left out.
        """
        splits = {"fit": ("train", "val", "test"), "validate": ("val",), "test": ("test",)}.get(stage, ())
        for split in splits:
            self._of(split)
        if splits:
            said = [f"{split} {self._taken(split)}" for split in splits]
            classes = "no classes" if self.classes is None else f"{len(self.classes)} classes"
            rank_zero_info(f"data: {self.root}: {', '.join(said)}; {classes}{self._left_out()}")

    def _taken(self, split: str) -> str:
        files = self._samples[split]
        if files is None:
            return "none"
        folder = self._folders.get(split)
        here = "in class folders" if self.classes else "without class folders"
        origin = "held out of train" if folder is None else here if folder == self.root else folder.name
        return f"{len(files):,} images ({origin})"

    def _left_out(self) -> str:
        """The folders and images of the root that are in no split."""
        taken = [folder.name for folder in (*self._folders.values(), self._unlabelled_test) if folder is not None]
        folders = [] if self.root in self._folders.values() else listing.visible_folders(self.root)
        left = [f"{name}/" for name in folders if name not in taken]
        images = [] if self.classes is None and not folders else listing.visible_files(self.root)
        left += [name for name in images if listing.is_image(name)]
        return f"; left out: {listing.some(left)}" if left else ""

    def train_labels(self) -> np.ndarray:
        return labels_of(self._of("train"), type(self).__name__)  # no cache is made for them

    # What there is, by listing folders only.

    def _look(self) -> None:
        """Finds the folder of each split, and the classes."""
        self._folders = listing.split_folders(self.root)
        (_, reference), *others = self._folders.items()
        self.classes = list(listing.class_folders(reference)) or None
        for split, folder in others:
            if split == "test" and next(listing.images_in(folder), None) is None:
                del self._folders["test"]  # a folder that was made and never filled
                continue
            classes = list(listing.class_folders(folder))
            if split == "test" and self.classes and not classes:
                self._unlabelled_test = self._folders.pop("test")
                continue
            if bool(classes) != bool(self.classes):
                labelled, unlabelled = (folder, reference) if classes else (reference, folder)
                raise ValueError(f"{labelled} has class folders, but {unlabelled} has none; {listing.seen(unlabelled)}")
            if unknown := sorted(set(classes) - set(self.classes or [])):
                raise ValueError(
                    f"{folder} has classes that {reference} has not: {listing.some(unknown)}; {reference} has "
                    f"{listing.some(self.classes or [])}"
                )
        if self.classes is None and not any(listing.is_image(name) for name in listing.visible_files(reference)):
            raise ValueError(f"{reference} holds no images: {listing.EXPECTED}; {listing.seen(reference)}")
        if self.classes and (stray := [name for name in listing.visible_files(reference) if listing.is_image(name)]):
            rank_zero_warn(
                f"{len(stray)} images in {reference} lie in no class folder and are left out: {listing.some(stray)}"
            )

    # The files of a split.

    def _predicted(self) -> dict[str, ImageFiles | None]:
        root = self.predict_root or self._unlabelled_test
        if root is None and self.classes is None and "test" not in self._folders:
            root = self.root
        if root is None:
            return {"predict": None}
        return {"predict": self._under(root)}

    def _listed(self, split: str) -> dict[str, ImageFiles | None]:
        if not self._folders:
            self._look()  # raises: there is a predict_root, but no root
        held_out = self._held_out(self._folders)
        if split not in held_out and split not in self._folders:
            return {split: None}
        if split != "train" and split not in held_out:
            names, labels = self._names_and_labels(split)
            return self._parts(split, names, labels, {split: np.arange(len(names))})
        names, labels = self._names_and_labels("train")
        return self._parts("train", names, labels, shares(labels, names, held_out, self.split_seed))

    def _parts(
        self, folder: str, names: np.ndarray, labels: np.ndarray, chosen: dict[str, np.ndarray]
    ) -> dict[str, ImageFiles | None]:
        """The samples of all splits that come from one folder, and their cache."""
        parts = {part: self._files(part, names[rows], labels[rows]) for part, rows in chosen.items()}
        pool = ImageFiles(self.root, names, self.eval_transform, self.channels, decoder=self.decoder)
        return self._with_copies(folder, parts, chosen, pool)

    def _files(self, split: str, names: np.ndarray, labels: np.ndarray) -> ImageFiles | None:
        if len(names) == 0:
            return None
        training = split == "train"
        transform = self.train_transform if training else self.eval_transform
        given = None if self.classes is None else labels
        return ImageFiles(self.root, names, transform, self.channels, given, self.on_error, training, self.decoder)

    def _names_and_labels(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """A folder's images, relative to root and sorted, and the label of each (0 if there are no classes)."""
        folder = self._folders[split]
        start = folder.relative_to(self.root).as_posix() + "/" if folder != self.root else ""
        if self.classes is None:
            names = sorted(start + name for name in listing.images_in(folder))
            if not names:
                raise ValueError(f"{folder} holds no images ({listing.endings()}); {listing.seen(folder)}")
            return np.array(names), np.zeros(len(names), dtype=np.int64)
        files: list[tuple[str, int]] = []
        for name in listing.visible_folders(folder):
            images = sorted(f"{start}{name}/{image}" for image in listing.images_in(folder / name))
            if not images:
                raise ValueError(
                    f"class folder {folder / name} holds no images ({listing.endings()}); {listing.seen(folder / name)}"
                )
            files += [(image, self.classes.index(one_form(name))) for image in images]
        return np.array([name for name, _ in files]), np.array([label for _, label in files])
