"""Base of image files with texts, one source a split: what was taken is said, and images of two splits are named."""

import os
from pathlib import Path
from typing import Any

from datamodules._lightning import rank_zero_info, rank_zero_warn
from datamodules.files import FilesDataModule
from datamodules.reading.files import ImageFiles


class SourcedDataModule(FilesDataModule):
    """Image files whose texts come from ``sources``. Subclasses fill these in, by split, and say what was taken."""

    sources: dict[str, Path]

    def sample_count(self) -> int:
        return len(self._of("train") or ())

    def setup(self, stage: str) -> None:
        """Reads what a stage needs, for training that of the test too, so that what is wrong is said before it starts.

        One line says what was taken.
        """
        fit: tuple[str, ...] = ("train", "val", "test")
        splits = {"fit": fit, "validate": fit[1:2], "test": fit[2:]}.get(stage, ())
        if splits:
            rank_zero_info("data: " + ", ".join(f"{split} {self._taken(split)}" for split in splits))
        if stage == "fit":
            self._warn_of_overlap()

    def _taken(self, split: str) -> str:
        samples: Any = self._of(split)
        return f"{self._counted(samples)} ({self.sources.get(split, 'held out of train')})" if samples else "none"

    def _counted(self, samples: Any) -> str:
        """Number and kind of a split's samples, in words."""
        raise NotImplementedError

    def _images(self, samples: Any) -> ImageFiles:
        """The image files of a split's samples."""
        files: ImageFiles = samples
        return files

    def _warn_of_overlap(self) -> None:
        """Warns of training images that are in the sources of validation or test as well."""
        paths = {split: self._paths(split) for split in self.sources if split != "predict"}
        training = paths.pop("train", set())
        for split, evaluated in paths.items():
            if shared := sorted(training & evaluated):
                rank_zero_warn(f"{len(shared):,} images of {split} are training images as well, {shared[0]} the first")

    def _paths(self, split: str) -> set[str]:
        samples = self._of(split)
        if not samples:
            return set()
        files = self._images(samples)
        return {os.path.join(files.root.absolute(), name) for name in files.names.tolist()}
