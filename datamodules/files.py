"""Base of data sets that are image files: listed once, copied to a cache, and reported where they cannot be read."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np

from datamodules.base import IMAGENET_MEAN, IMAGENET_STD
from datamodules.classification import CLASSIFICATION_OPTIONS, ClassificationDataModule, ClassificationOptions
from datamodules.loading.options import with_defaults
from datamodules.loading.seeding import Samples
from datamodules.reading.cache import builds
from datamodules.reading.files import ImageFiles, OnError
from datamodules.reading.listing import Split


class FilesDataModule(ClassificationDataModule):
    """Image files, cropped to one size. Subclasses list those of a split, in :meth:`_listed`.

    Args:
        image_size: Side in pixels, or (height, width).
        channels: 3 (RGB) or 1 (grey). Files are converted to it.
        on_error: What happens at a file that cannot be read. "raise" stops and names it. "skip" goes on without it
            (training puts another image in its place) and warns how many there were, and which, at the end of each
            training epoch and of each run; of several processes, the first reports its own.
        mean: Mean of each channel, of images in [0, 1]. None: ImageNet's, for one channel the average of the three.
        std: Standard deviation of each channel, likewise.
        options: See :class:`datamodules.classification.ClassificationDataModule`.

    Raises:
        ImportError: If ``decoder`` is a package that is not installed.
        ValueError: For values out of range; if ``cache_size`` is less than ``image_size``.
    """

    @with_defaults(CLASSIFICATION_OPTIONS)
    def __init__(
        self,
        image_size: int | tuple[int, int],
        channels: Literal[1, 3] = 3,
        *,
        on_error: OnError = "raise",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        **options: Unpack[ClassificationOptions],
    ) -> None:
        if channels not in (1, 3):
            raise ValueError(f"channels is {channels}: expected 1 (grey) or 3 (RGB)")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"unknown on_error {on_error!r}: expected raise or skip")
        val_fraction, test_fraction = options["val_fraction"], options["test_fraction"]
        if not (val_fraction >= 0 and test_fraction >= 0 and val_fraction + test_fraction < 1):
            raise ValueError(
                f"val_fraction is {val_fraction} and test_fraction {test_fraction}: expected shares in [0, 1) that "
                "leave something for training"
            )
        mean = mean or (IMAGENET_MEAN if channels == 3 else (sum(IMAGENET_MEAN) / 3,))
        std = std or (IMAGENET_STD if channels == 3 else (sum(IMAGENET_STD) / 3,))
        super().__init__(image_size, channels, mean=mean, std=std, fill=mean, **options)
        self.on_error: OnError = on_error
        self._samples: dict[str, ImageFiles | None] = {}

    def _listed(self, split: str) -> dict[str, ImageFiles | None]:
        """The samples of a split, and of all that come from the same source."""
        raise NotImplementedError

    def _predicted(self) -> dict[str, ImageFiles | None]:
        return {"predict": None if self.predict_root is None else self._under(self.predict_root)}

    def _under(self, root: str | Path) -> ImageFiles:
        """All images under a folder, or one file, as prediction takes them."""
        return ImageFiles.under(root, self.eval_transform, self.channels, self.on_error, self.decoder)

    def _held_out(self, there: Collection[str]) -> dict[str, float]:
        """The splits that are shares of the training images, by those that there are, and how large these are."""
        if "train" not in there or "val" in there:
            return {}
        if "test" in there:
            return {"val": self.val_fraction}
        return {"test": self.test_fraction, "val": self.val_fraction}

    def _of(self, split: str) -> ImageFiles | None:
        """The samples of a split, listed by now, for which no cache is made yet."""
        if split not in self._samples:
            self._samples |= self._predicted() if split == "predict" else self._listed(split)
        return self._samples[split]

    def samples(self, split: Split) -> Samples | None:
        samples = self._of(split)
        if self.cached is not None and split != "predict":
            self.cached.fill(builds(self.trainer))
        return self._sized(samples, split)

    def prepare_data(self) -> None:
        """Builds a cache in a folder, in one process of each node, before the others look for it."""
        if self.cached is not None and not self.cached.in_memory and builds(self.trainer):
            for split in ("train", "val"):
                self.samples(split)

    def _with_copies(
        self, source: str, parts: dict[str, ImageFiles | None], chosen: dict[str, np.ndarray], pool: ImageFiles
    ) -> dict[str, ImageFiles | None]:
        """The splits that come from one source, to be copied to the cache if there is one.

        Args:
            source: Name of the source in the cache.
            parts: Samples of each split.
            chosen: Indices of these in the pool.
            pool: All images of the source.
        """
        if self.cached is None:
            return parts
        copied = [part for part, files in parts.items() if files and (part == "train" or self._evaluates_copies)]
        for part in copied:
            self.cached.lend(parts[part])
        if self.cached.in_memory:  # test images come once
            copied = [part for part in copied if part != "test"]
        if set(copied) - {"test"}:
            self.cached.add(source, pool, [(parts[part], chosen[part]) for part in copied], self.on_error == "skip")
        return parts

    # What could not be read is reported after each training epoch and at the end of a run.

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.trainer and self.trainer.training and self.trainer.is_last_batch:
            self.report_unreadable(self._samples)
        return super().on_after_batch_transfer(batch, dataloader_idx)

    def teardown(self, stage: str) -> None:
        self.report_unreadable(self._samples)
