"""CIFAR-10 and CIFAR-100 from their binary archives, which are numbers and names and so nothing that could run.

torchvision reads the pickled ones, of the same images in the same order. A record of a file is its labels, a byte each
and the class last, and the pixels (3, 32, 32). https://www.cs.toronto.edu/~kriz/cifar.html
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.utils import download_url

from datamodules.reading import archives

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Archive:
    """A version of the set as it is published, and what it unpacks to."""

    file: str
    md5: str
    folder: str
    names: str
    """The file of the classes' names."""
    labels: int
    """Bytes of a record before its pixels."""
    train: dict[str, int]
    """By file, its number of images."""
    test: dict[str, int]
    pickled: str
    """The folder of the version that is not read."""


ARCHIVES = {
    "CIFAR10": Archive(
        file="cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        folder="cifar-10-batches-bin",
        names="batches.meta.txt",
        labels=1,
        train={f"data_batch_{i}.bin": 10_000 for i in range(1, 6)},
        test={"test_batch.bin": 10_000},
        pickled="cifar-10-batches-py",
    ),
    "CIFAR100": Archive(
        file="cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        folder="cifar-100-binary",
        names="fine_label_names.txt",
        labels=2,
        train={"train.bin": 50_000},
        test={"test.bin": 10_000},
        pickled="cifar-100-python",
    ),
}


class Cifar:
    """One split, as torchvision's data sets are: ``source[index]`` is a PIL image and its label.

    Args:
        name: ``CIFAR10`` or ``CIFAR100``.
        root: The folder that the archive's folder lies in.
        train: The training images, or the test images.
        download: Fetches and unpacks the archive, if the set is not there.

    Raises:
        FileNotFoundError: If the set is not there, and not to be fetched.
        OSError, RuntimeError: If it cannot be fetched.
        UnsafeArchiveError, ValueError: If the archive is not one to unpack, or names fewer classes than it has.
    """

    def __init__(self, name: str, root: str, train: bool = True, download: bool = False) -> None:
        self.archive = archive = ARCHIVES[name]
        self.folder = Path(root, archive.folder)
        if download and self._missing():
            self._fetch(Path(root))
        if missing := self._missing():
            raise FileNotFoundError(f"{archive.folder}/{missing} is not there, or not whole{self._instead()}")
        self.classes = (self.folder / archive.names).read_text().split()
        files = archive.train if train else archive.test
        records = np.concatenate([np.fromfile(self.folder / file, np.uint8) for file in files])
        records = records.reshape(-1, archive.labels + PIXELS)
        self.targets = records[:, archive.labels - 1].astype(np.int64)
        self.data = np.ascontiguousarray(records[:, archive.labels :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        if self.targets.max() >= len(self.classes):
            raise ValueError(
                f"{self.folder} has images of class {self.targets.max()}, but {archive.names} names "
                f"{len(self.classes)}: unpack {archive.file} anew"
            )

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.data[index]), int(self.targets[index])

    def _missing(self) -> str | None:
        """The first file that is not there as it was published."""
        sizes = self.archive.train | self.archive.test
        for file, images in sizes.items():
            place = self.folder / file
            if not place.is_file() or place.stat().st_size != images * (self.archive.labels + PIXELS):
                return file
        return None if (self.folder / self.archive.names).is_file() else self.archive.names

    def _fetch(self, root: Path) -> None:
        archive = self.archive
        try:
            download_url(f"https://www.cs.toronto.edu/~kriz/{archive.file}", root, archive.file, archive.md5)
        except (OSError, RuntimeError) as error:
            raise RuntimeError(f"{archive.file} is not there and not to be had: {error}{self._instead()}") from error
        archives.extract(root / archive.file, root)

    def _instead(self) -> str:
        """A message's words on the pickled version, if that is what lies there."""
        if not (self.folder.parent / self.archive.pickled).is_dir():
            return ""
        return f"; {self.archive.pickled}, the pickled version, is not read: {self.archive.file} is"
