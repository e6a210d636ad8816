"""Images with captions of your own: ``CaptionsDataModule("train.csv")``.

Each split is a table of pairs (.csv, .tsv, .jsonl, .json), COCO's captions (.json), or a folder of images and texts;
see :mod:`datamodules.reading.captions` for what they hold. A missing ``val`` is held out of the training images, and so
is a missing ``test`` if there is no ``val`` either: by image, with all of its captions, chosen by ``split_seed`` and
the images' names.
"""

from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import numpy as np

from datamodules.classification import CLASSIFICATION_OPTIONS, ClassificationOptions
from datamodules.loading.captions import About, Captioned, about
from datamodules.loading.options import with_defaults
from datamodules.loading.shares import shares
from datamodules.reading import caption_tables
from datamodules.reading.captions import EXPECTED, Captions, read
from datamodules.reading.files import ImageFiles, OnError
from datamodules.reading.pixels import ToTensor
from datamodules.sources import SourcedDataModule

Choice = Literal["one", "all"]


class CaptionedFiles(ImageFiles):
    """Image files with captions as samples: ``(image, {"captions": [...], "image_id": ...})``.

    Args:
        captions: The images and their captions.
        transform, channels, on_error, random, decoder: See :class:`datamodules.reading.files.ImageFiles`.
        draw: Whether a sample has one of its image's captions, drawn from Python's generator, instead of all.
    """

    def __init__(
        self, captions: Captions, transform: ToTensor, channels: int, draw: bool = False, **options: Any
    ) -> None:
        super().__init__(captions.folder, captions.names, transform, channels, **options)
        self.captions, self.draw, self.image_ids = captions, draw, captions.image_ids

    def captions_of(self, index: int) -> list[str]:
        return self.captions.of(index)

    def __getitem__(self, index: int) -> tuple[Any, About] | None:
        said = about(self.captions_of(index), self.draw, image_id=int(self.image_ids[index]))  # drawn before all else
        image = super().__getitem__(index)
        return None if image is None else (image, said)


class CaptionsDataModule(Captioned, SourcedDataModule):
    """Images of your own with captions. See the top of this file for what a split may be.

    Batches ``(images (B, C, H, W), [{"captions": ["a cat on a mat"], "image_id": 12}, ...])`` with plain Python values.
    In evaluation each image has all of its captions. ``image_id`` is COCO's, or else the image's number in its source.
    There is no horizontal flip unless ``hflip`` says so: captions may say left and right, and signs have letters.

    Args:
        train: Source of the training images.
        val: Source of the validation images. None: a share of the training images is held out.
        test: Source of the test images.
        root: Folder that the other paths are relative to.
        images: Folder that names of images are relative to. None: that of the table; for COCO, ``train2017`` for
            ``captions_train2017.json`` beside the file or one level up, and other usual places. A folder of texts
            holds its images, and takes none.
        val_images: The same for ``val``. None: as for training if ``images`` is given, otherwise looked for.
        test_images: The same for ``test``.
        image_size: Side in pixels, or (height, width).
        image_column: Column of a table that names the images. None: ``filepath``, ``file_name``, ``image`` or another
            of the usual names.
        caption_column: Column of a table that has the captions. None: ``title``, ``caption``, ``text`` or another of
            the usual names.
        encoding: Encoding of tables and texts, unless they begin with a byte order mark.
        captions: In training, "one": one caption of each image, drawn anew in every epoch by the sample's own seed;
            "all": all of them, as in evaluation.
        channels: 3 (RGB) or 1 (grey). Files are converted to it.
        on_error: What happens at an image that cannot be read, and at captions that are empty or whose image is not
            there. "raise" stops and names it, with file and line. "skip" goes on without it (training puts another
            image in the place of one that cannot be read) and warns how many there were.
        mean: Mean of each channel, of images in [0, 1]. None: ImageNet's, for one channel the average of the three.
        std: Standard deviation of each channel, likewise.
        options: See :class:`datamodules.classification.ClassificationDataModule`. ``predict_root`` None: the test
            images.

    Raises:
        FileNotFoundError: If a source is missing; from ``setup``, if an image is.
        ImportError: If ``decoder`` is a package that is not installed.
        ValueError: For values out of range; from ``setup``, if a source is not as it should be
            (:func:`datamodules.reading.captions.read`).
    """

    @with_defaults(CLASSIFICATION_OPTIONS | {"scale": (0.9, 1.0), "crop_ratio": 1.0})
    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        *,
        root: str = ".",
        images: str | None = None,
        val_images: str | None = None,
        test_images: str | None = None,
        image_size: int | tuple[int, int] = 224,
        image_column: str | None = None,
        caption_column: str | None = None,
        encoding: str = "utf-8",
        captions: Choice = "one",
        channels: Literal[1, 3] = 3,
        on_error: OnError = "raise",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        **options: Unpack[ClassificationOptions],
    ) -> None:
        if captions not in get_args(Choice):
            raise ValueError(f"unknown captions {captions!r}: expected {' or '.join(get_args(Choice))}")
        caption_tables.check_encoding(encoding)
        super().__init__(image_size, channels, on_error=on_error, mean=mean, std=std, **options)
        given = {"train": train, "val": val, "test": test}
        folders = {"train": images, "val": val_images, "test": test_images}
        self.sources = {split: Path(root, path) for split, path in given.items() if path is not None}
        self.folders = {split: Path(root, path) for split, path in folders.items() if path is not None}
        self.columns, self.encoding, self.choice = (image_column, caption_column), encoding, captions
        if self.predict_root is not None:
            return  # away from the training data
        if not self.sources:
            raise ValueError("there is no train, val, test or predict_root: expected at least one source of images")
        if missing := [path for path in self.sources.values() if not path.exists()]:
            raise FileNotFoundError(f"{missing[0]}: no such file or folder; {EXPECTED}")

    def captions(self) -> list[str]:
        """All captions of the training images, one after the other, for a tokenizer to be fitted to.

        Raises:
            ValueError: If there are no training images.
        """
        samples = self._of("train")
        if not isinstance(samples, CaptionedFiles):
            raise ValueError(f"{type(self).__name__} has no train, and so no captions to fit to: set it to a source")
        return [caption for index in range(len(samples)) for caption in samples.captions_of(index)]

    def _counted(self, samples: Any) -> str:
        texts = int((samples.captions.stops - samples.captions.starts).sum())
        return f"{len(samples):,} images with {texts:,} captions"

    def _listed(self, split: str) -> dict[str, ImageFiles | None]:
        held_out = self._held_out(self.sources)
        if split not in self.sources and split not in held_out:
            return {split: None}
        source = split if split in self.sources else "train"
        path, folder = self.sources[source], self.folders.get(source)
        if folder is None and not path.is_dir():
            folder = self.folders.get("train")
        said = read(path, folder, *self.columns, self.encoding, self.on_error)
        every = np.arange(len(said))
        chosen = {source: every}
        if source == "train":
            chosen = shares(np.zeros_like(every), said.names, held_out, self.split_seed)
        parts: dict[str, ImageFiles | None]
        parts = {part: self._files(part, said.part(rows)) if len(rows) else None for part, rows in chosen.items()}
        pool = ImageFiles(said.folder, said.names, self.eval_transform, self.channels, decoder=self.decoder)
        return self._with_copies(source, parts, chosen, pool)

    def _files(self, split: str, said: Captions) -> CaptionedFiles:
        training = split == "train"
        return CaptionedFiles(
            said,
            self.train_transform if training else self.eval_transform,
            self.channels,
            draw=training and self.choice == "one",
            on_error=self.on_error,
            random=training,
            decoder=self.decoder,
        )
