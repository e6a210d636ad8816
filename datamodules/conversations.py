"""Images with conversations of your own: ``ConversationsDataModule("train.json", root="images")``.

Each split is a file in LLaVA's form or one alike, see :mod:`datamodules.reading.conversations`. A missing ``val`` is
held out of the training conversations, and so is a missing ``test`` if there is no ``val`` either: by image, with all
conversations that it is in, chosen by ``split_seed`` and the images' names.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
import torch
from torch import Tensor

from datamodules.classification import CLASSIFICATION_OPTIONS, ClassificationOptions
from datamodules.loading.any_size import AnySize, by_column, fitted
from datamodules.loading.conversations import IMAGE_PLACE, Conversed, Said
from datamodules.loading.options import with_defaults
from datamodules.loading.order import Key
from datamodules.loading.seeding import with_transform
from datamodules.loading.shares import shares
from datamodules.reading import caption_tables
from datamodules.reading.conversations import EXPECTED, Conversations, read
from datamodules.reading.files import ImageFiles, OnError
from datamodules.reading.pixels import ToTensor
from datamodules.sources import SourcedDataModule


class ConversationFiles:
    """Conversations and their image files as samples: ``(list of images (C, H, W), {"turns", "name", ...})``.

    Args:
        told: The conversations.
        files: Their images.
        skip: Whether a conversation of which an image cannot be read is None, and marked in ``unreadable``.
    """

    sizing: Any = None

    def __init__(self, told: Conversations, files: ImageFiles, skip: bool) -> None:
        self.told, self.files, self.names, self.random = told, files, told.names, files.random
        self.unreadable: Tensor | None = None
        if skip:
            self.unreadable = torch.zeros(len(told), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.told)

    def __getitem__(self, index: int) -> tuple[Any, Said] | None:
        return self.sample(index, [self.files[image] for image in self.told.images_of(index).tolist()])

    def sample(self, index: int, images: Sequence[Any]) -> tuple[Any, Said] | None:
        """A conversation with its images as they were made, None for one that could not be read."""
        if any(image is None for image in images):
            if self.unreadable is not None:
                self.unreadable[index] = 1
            return None
        return list(images), self.told.of(index)

    # What is set on samples is for the images.

    @property
    def transform(self) -> ToTensor:
        return self.files.transform

    @transform.setter
    def transform(self, transform: ToTensor) -> None:
        self.files = with_transform(self.files, transform)  # type: ignore[assignment]  # the same class

    @property
    def sizes_folder(self) -> str | None:
        return self.files.sizes_folder

    @sizes_folder.setter
    def sizes_folder(self, folder: str | None) -> None:
        self.files.sizes_folder = folder


class ConversationSizing:
    """Sizing of all images of a conversation, each drawn for itself; one without images counts as a token.

    Args:
        each: Sizing of an image.
    """

    most_images = 1024
    """Images of a conversation whose draws differ from those of other copies of it."""

    def __init__(self, each: AnySize) -> None:
        self.each = each

    def tokens(self, samples: Any, epoch: int, copies: np.ndarray, indices: np.ndarray) -> np.ndarray:
        rows, grids = self._grids(samples, epoch, copies, indices)
        counts = np.bincount(rows, grids.prod(1), len(indices)).astype(np.int64)
        return np.maximum(counts, 1)

    def plans(self, samples: Any, keys: Sequence[Key]) -> list[tuple[int, list[list[int]]]]:
        """Index of each key, and rows and columns of its images."""
        epoch, copies, indices = by_column(keys)
        rows, grids = self._grids(samples, epoch, copies, indices)
        return [(index, grids[rows == row].tolist()) for row, index in enumerate(indices.tolist())]

    def made(self, samples: Any, number: int, plan: tuple[int, list[list[int]]]) -> Any:
        index, grids = plan
        images = samples.told.images_of(number)
        if number != index:
            most = sum(rows * columns for rows, columns in grids) // max(1, len(images))
            if len(images) and not most:
                return None  # it would not fit
            grids = fitted(samples.files.sizes[images], np.full(len(images), most)).tolist()
        side, found = self.each.patch_size, []
        for image, (rows, columns) in zip(images.tolist(), grids, strict=True):
            made_of = with_transform(samples.files, self.each.transform_of(rows * side, columns * side))
            found.append(made_of[image])
        return samples.sample(number, found)

    def _grids(
        self, samples: Any, epoch: int, copies: np.ndarray, indices: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Places among the samples (M,) of each of their images, and its rows and columns of patches (M, 2)."""
        owned = [samples.told.images_of(index) for index in indices.tolist()]
        counts = np.array([len(each) for each in owned], dtype=np.int64)
        rows, places = np.repeat(np.arange(len(owned)), counts), np.concatenate([np.arange(n) for n in counts.tolist()])
        images = np.concatenate(owned)
        if not len(images):
            return rows, np.zeros((0, 2), dtype=np.int64)
        draws = copies[rows] * self.most_images + places.astype(np.int64)
        return rows, self.each.grids(samples.files.sizes[images], epoch, draws, indices[rows])


class ConversationsDataModule(Conversed, SourcedDataModule):
    """Images of your own with conversations. See the top of this file for what a split may be.

    Batches ``(images (N, C, H, W), [{"turns": [["<image> what is this?", "a cat"]], "images": 1, "name": "12"}, ...])``
    with plain Python values; ``images`` is how many of the batch's are a conversation's, and may be 0. With a
    ``token_budget``, a list of images (C, h, w), and the budget counts the patches of a conversation's images.
    There is no horizontal flip unless ``hflip`` says so: conversations may say left and right.

    Args:
        train: File of the training conversations.
        val: File of the validation conversations. None: a share of the training ones is held out.
        test: File of the test conversations.
        predict: File of conversations to predict, whose last prompt may have no answer; None: the test ones.
        root: Folder that names of images are relative to. None: that of each file.
        image_size: Side in pixels, or (height, width).
        encoding: Encoding of ``.jsonl`` files, unless they begin with a byte order mark.
        channels: 3 (RGB) or 1 (grey). Files are converted to it.
        on_error: What happens at an image that cannot be read, and at an entry that is no conversation or whose image
            is not there. "raise" stops and names it, with file and entry. "skip" goes on without it (training puts
            another conversation in the place of one with an image that cannot be read) and warns how many there were.
        mean: Mean of each channel, of images in [0, 1]. None: ImageNet's, for one channel the average of the three.
        std: Standard deviation of each channel, likewise.
        options: See :class:`datamodules.classification.ClassificationDataModule`. ``predict_root`` is a folder of
            images, which come without conversations.

    Raises:
        FileNotFoundError: If a file is missing; from ``setup``, if an image is.
        ImportError: If ``decoder`` is a package that is not installed.
        ValueError: For values out of range; from ``setup``, if a file is not as it should be
            (:func:`datamodules.reading.conversations.read`).
    """

    @with_defaults(CLASSIFICATION_OPTIONS | {"scale": (0.9, 1.0), "crop_ratio": 1.0})
    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        *,
        root: str | None = None,
        image_size: int | tuple[int, int] = 224,
        encoding: str = "utf-8",
        channels: Literal[1, 3] = 3,
        on_error: OnError = "raise",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        **options: Unpack[ClassificationOptions],
    ) -> None:
        caption_tables.check_encoding(encoding)
        super().__init__(image_size, channels, on_error=on_error, mean=mean, std=std, **options)
        given = {"train": train, "val": val, "test": test, "predict": predict}
        self.sources = {split: Path(path) for split, path in given.items() if path is not None}
        self.root, self.encoding = None if root is None else Path(root), encoding
        if self.predict_root is not None and predict is not None:
            raise ValueError(f"predict is {predict} and predict_root {self.predict_root}: set one of them")
        if self.predict_root is not None:
            return  # away from the training data
        if not self.sources:
            raise ValueError("there is no train, val, test, predict or predict_root: expected at least one file")
        if missing := [path for path in self.sources.values() if not path.exists()]:
            raise FileNotFoundError(f"{missing[0]}: no such file; {EXPECTED}")

    def captions(self) -> list[str]:
        """All prompts and answers of training, without places of images, for a tokenizer to be fitted to.

        Raises:
            ValueError: If there are no training conversations.
        """
        samples: Any = self._of("train")
        if samples is None:
            raise ValueError(f"{type(self).__name__} has no train, and so no texts to fit to: set it to a file")
        turns = [pair for index in range(len(samples)) for pair in samples.told.of(index)["turns"]]
        return [text.replace(IMAGE_PLACE, " ").strip() for pair in turns for text in pair]

    def _counted(self, samples: Any) -> str:
        return f"{len(samples):,} conversations about {len(samples.files):,} images"

    def _images(self, samples: Any) -> ImageFiles:
        files: ImageFiles = samples.files
        return files

    # The files of a split.

    def _predicted(self) -> dict[str, Any]:
        if "predict" not in self.sources:
            return super()._predicted()
        return self._parts("predict", {"predict": None}, answered=False)

    def _listed(self, split: str) -> dict[str, Any]:
        held_out = self._held_out(self.sources)
        if split not in self.sources and split not in held_out:
            return {split: None}
        source = split if split in self.sources else "train"
        return self._parts(source, held_out if source == "train" else {source: None})

    def _parts(self, source: str, held_out: Mapping[str, Any], answered: bool = True) -> dict[str, Any]:
        """The samples of all splits that come from one file."""
        told = read(self.sources[source], self.root, self.encoding, self.on_error, answered)
        chosen = {source: np.arange(len(told))}
        if source == "train":
            # Groups, not conversations, are held out, by what the first of each shows, or is called.
            firsts, group = np.unique(told.groups, return_inverse=True)
            shown = [told.images_of(first).tolist() for first in firsts.tolist()]
            names = [
                str(told.files[own[0]] if own else told.names[first]) for own, first in zip(shown, firsts, strict=True)
            ]
            of_groups = shares(np.zeros_like(firsts), np.array(names, dtype=np.str_), held_out, self.split_seed)
            chosen = {part: np.flatnonzero(np.isin(group, some)) for part, some in of_groups.items()}
        parts: dict[str, Any] = {}
        images: dict[str, np.ndarray] = {}
        for part, rows in chosen.items():
            parts[part] = None
            if len(rows):
                some, images[part] = told.part(rows)
                parts[part] = ConversationFiles(some, self._files(part, some), self.on_error == "skip")
        pool = ImageFiles(told.folder, told.files, self.eval_transform, self.channels, decoder=self.decoder)
        if source != "predict":
            there = {part: parts[part].files for part in images}
            self._with_copies(source, there, images, pool)  # which says to the files where their copies are
        return parts

    def _files(self, split: str, said: Conversations) -> ImageFiles:
        training = split == "train"
        return ImageFiles(
            said.folder,
            said.files,
            self.train_transform if training else self.eval_transform,
            self.channels,
            on_error=self.on_error,
            random=training,
            decoder=self.decoder,
        )

    def _sizing(self, split: str, settings: dict[str, Any]) -> Any:
        each = super()._sizing(split, settings)
        return each if split == "predict" and "predict" not in self.sources else ConversationSizing(each)

    def report_unreadable(self, samples: Mapping[Any, Any]) -> None:
        """Warns of each split of which more images than before could not be read."""
        files = {split: each.files if isinstance(each, ConversationFiles) else each for split, each in samples.items()}
        super().report_unreadable(files)
