"""The classification data sets of torchvision under one class, by name.

Official splits are kept. Where a set has no validation split, a stratified share of its training images is held out,
fixed by ``split_seed``; EuroSAT, which has no split at all, gives a share for testing in the same way. ImageNet's test
labels are not public: its validation images serve as both.

Archives are unpacked by ``datamodules/reading/archives.py``, and CIFAR is read from its binary version by ``cifar.py``
there: torchvision would run whatever the pickled one holds.
"""

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
import torchvision
from torchvision import datasets

from datamodules.base import IMAGENET_MEAN, IMAGENET_STD
from datamodules.classification import CLASSIFICATION_OPTIONS, ClassificationDataModule, ClassificationOptions
from datamodules.loading.labels import labels_of
from datamodules.loading.options import with_defaults
from datamodules.loading.seeding import Samples
from datamodules.loading.shares import stratified_split
from datamodules.reading import archives
from datamodules.reading.cache import Cache, builds
from datamodules.reading.cifar import ARCHIVES, Cifar
from datamodules.reading.files import ImageFiles
from datamodules.reading.listing import Split
from datamodules.reading.torchvision_samples import TorchvisionSamples, listed_labels

Name = Literal[
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "FashionMNIST",
    "Flowers102",
    "OxfordIIITPet",
    "Food101",
    "EuroSAT",
    "STL10",
    "ImageNet",
]


@dataclass(frozen=True)
class Source:
    """torchvision's names for a set's splits, and the facts about its images."""

    classes: int
    image_size: int
    train: dict[str, Any] = field(default_factory=dict)
    val: dict[str, Any] | None = None
    test: dict[str, Any] | None = None
    channels: int = 3
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    downloads: bool = True


_TRAIN_FLAG: dict[str, Any] = {"train": {"train": True}, "test": {"train": False}}
_TRAIN_SPLIT: dict[str, Any] = {"train": {"split": "train"}, "test": {"split": "test"}}

# Means and deviations of the training pixels; where none is given, those of ImageNet serve.
SOURCES: dict[str, Source] = {
    "CIFAR10": Source(10, 32, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), **_TRAIN_FLAG),
    "CIFAR100": Source(100, 32, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762), **_TRAIN_FLAG),
    "MNIST": Source(10, 28, channels=1, mean=(0.1307,), std=(0.3081,), **_TRAIN_FLAG),
    "FashionMNIST": Source(10, 28, channels=1, mean=(0.2860,), std=(0.3530,), **_TRAIN_FLAG),
    "Flowers102": Source(102, 224, val={"split": "val"}, **_TRAIN_SPLIT),
    "OxfordIIITPet": Source(37, 224, train={"split": "trainval"}, test={"split": "test"}),
    "Food101": Source(101, 224, **_TRAIN_SPLIT),
    "EuroSAT": Source(10, 64),
    "STL10": Source(10, 96, **_TRAIN_SPLIT),
    "ImageNet": Source(
        1000, 224, train={"split": "train"}, val={"split": "val"}, test={"split": "val"}, downloads=False
    ),
}

DECODED = ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "STL10")
"""Sets that are files of numbers, which torchvision holds in memory."""


class TorchvisionDataModule(ClassificationDataModule):
    """CIFAR10, CIFAR100, MNIST, FashionMNIST, Flowers102, OxfordIIITPet, Food101, EuroSAT, STL10 or ImageNet.

    Batches ``(images (B, C, H, W), labels (B,))``. Downloads in ``prepare_data`` only, where the set can be downloaded.

    Args:
        dataset: The set's name.
        root: Where it lies, or is downloaded to.
        image_size: Side in pixels, or (height, width). None: 32 for CIFAR, 28 for MNIST and FashionMNIST, 64 for
            EuroSAT, 96 for STL10, 224 for the others.
        channels: 1 or 3. None: what the set has.
        download: Whether ``prepare_data`` may download.
        mean: Mean of each channel, of images in [0, 1]. None: the set's.
        std: Standard deviation of each channel, likewise.
        options: See :class:`datamodules.classification.ClassificationDataModule`. ``predict_root`` None: the test
            split. ``decoder`` and ``cache`` are for the sets whose images are files; CIFAR, MNIST, FashionMNIST and
            STL10 lie decoded in memory anyway.

    Raises:
        ImportError: If ``decoder`` is a package that is not installed.
        ValueError: For an unknown name.
        FileNotFoundError: If the set is not under ``root`` and cannot be downloaded.
    """

    @with_defaults(CLASSIFICATION_OPTIONS | {"scale": None, "crop_ratio": 1.0})
    def __init__(
        self,
        dataset: Name = "CIFAR10",
        root: str = "data",
        image_size: int | tuple[int, int] | None = None,
        channels: int | None = None,
        download: bool = True,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **options: Unpack[ClassificationOptions],
    ) -> None:
        if dataset not in SOURCES:
            raise ValueError(f"unknown dataset {dataset!r}: expected one of {', '.join(SOURCES)}")
        self.source = SOURCES[dataset]
        if dataset in DECODED and (options["decoder"] != "pil" or options["cache"] is not None):
            raise ValueError(f"{dataset} lies decoded in memory: expected decoder pil and no cache (null)")
        for option in ("val_fraction", "test_fraction"):
            if not 0 <= options[option] < 1:
                raise ValueError(f"{option} is {options[option]}: expected a share in [0, 1)")
        super().__init__(
            image_size or self.source.image_size,
            channels or self.source.channels,
            mean=mean or self.source.mean,
            std=std or self.source.std,
            fill=IMAGENET_MEAN,
            **options,
        )
        self.dataset, self.root, self.download = dataset, root, download
        self._kept: dict[str, TorchvisionSamples | None] = {}

    @property
    def num_classes(self) -> int:
        return self.source.classes

    def prepare_data(self) -> None:
        splits = [options for options in (self.source.train, self.source.val, self.source.test) if options is not None]
        if not self.source.downloads:  # ImageNet's archives are unpacked here, by one process
            splits = [options for options in splits if not (Path(self.root) / options["split"]).is_dir()]
            for split in dict.fromkeys(options["split"] for options in splits):
                self._unpack(split)
        elif not self.download:
            splits = []
        for options in splits:
            self._open(options, download=True)
        if self.cached is not None and not self.cached.in_memory and builds(self.trainer):
            self.samples("train"), self.samples("val")  # one process makes the cache before the others look for it

    def samples(self, split: Split) -> Samples | None:
        if split == "predict":
            if self.predict_root is None:
                return None
            files = ImageFiles.under(self.predict_root, self.eval_transform, self.channels, decoder=self.decoder)
            return self._sized(files, split)
        if self.cached is None:
            return self._sized(self._samples(split, None), split)
        if split not in self._kept:
            self._kept[split] = self._samples(split, self.cached)
        self.cached.fill(builds(self.trainer))
        return self._kept[split]

    def train_labels(self) -> np.ndarray:
        return labels_of(self._samples("train", None), type(self).__name__)  # no cache is made for them

    def _samples(self, split: Split, cached: Cache | None) -> TorchvisionSamples | None:
        official = getattr(self.source, split)
        options = self.source.train if official is None else official
        source = self._open(options)
        indices = np.arange(len(source))
        if self.source.test is None:
            kept, held_out = stratified_split(listed_labels(source), self.test_fraction, self.split_seed)
            indices = held_out if split == "test" else kept
        if self.source.val is None and split != "test":
            kept, held_out = stratified_split(listed_labels(source)[indices], self.val_fraction, self.split_seed)
            indices = indices[held_out if split == "val" else kept]
        if len(indices) == 0:
            return None
        transform = self.train_transform if split == "train" else self.eval_transform
        samples = TorchvisionSamples(source, f"{self.dataset}/{split}", indices, transform, self.channels, self.decoder)
        if cached is not None and (split == "train" or self._evaluates_copies):
            cached.lend(samples)
            if split != "test":
                part = options.get("split", "all")
                pool = TorchvisionSamples(
                    source, f"{self.dataset}/{part}", np.arange(len(source)), transform, self.channels, self.decoder
                )
                cached.add(f"{self.dataset}_{part}", pool, [(samples, indices)])
        return samples

    def _open(self, options: dict[str, Any], download: bool = False) -> Any:
        kwargs = options | ({"download": download} if self.source.downloads else {})
        with self._reading(download):
            kind: Any = partial(Cifar, self.dataset) if self.dataset in ARCHIVES else getattr(datasets, self.dataset)
            source = kind(self.root, **kwargs)
        self.classes = _class_names(source) or self.classes
        return source

    def _unpack(self, split: str) -> None:
        """Unpacks a split of ImageNet, beside its folder, since torchvision takes any folder for the whole."""
        beside = f".{split}.unpacking"
        folder = Path(self.root, beside)
        shutil.rmtree(folder, ignore_errors=True)  # of one that was interrupted
        with self._reading(download=False):
            try:
                if not Path(self.root, datasets.imagenet.META_FILE).is_file():
                    datasets.imagenet.parse_devkit_archive(self.root)
                getattr(datasets.imagenet, f"parse_{split}_archive")(self.root, folder=beside)
                os.rename(folder, Path(self.root, split))
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _reading(self, download: bool) -> Iterator[None]:
        """Lets torchvision read the set within our limits; raises FileNotFoundError, in a line, where it cannot."""
        try:
            with _our_limits():
                yield
        except (RuntimeError, OSError) as error:
            found = Path(self.root).resolve()
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            hint = "download=true fetches it" if self.source.downloads and not download else "put its archives there"
            raise FileNotFoundError(f"{self.dataset} cannot be read from {found}: {reason} ({hint})") from error


_unpacking: list[int] = []
"""Threads that unpack with our limits, each as often as it has asked."""
_entrance = threading.Lock()


@contextmanager
def _our_limits() -> Iterator[None]:
    """Has torchvision unpack with our limits in this thread, and with its own in all others.

    Raises:
        ImportError: If torchvision unpacks in other places than the known ones.
    """
    utils, thread = datasets.utils, threading.get_ident()
    extractors = getattr(utils, "_ARCHIVE_EXTRACTORS", {})
    if set(extractors) != {".tar", ".zip"} or not callable(getattr(utils, "_decompress", None)):
        raise ImportError(
            f"torchvision {torchvision.__version__} unpacks its data sets in a way that is not known to be safe; that "
            "of 0.29 is"
        )
    with _entrance:
        if not _unpacking:  # the first exchanges them, and the last puts them back
            extractors.update({ending: partial(_chosen, _extract, theirs) for ending, theirs in extractors.items()})
            utils._decompress = partial(_chosen, _decompress, utils._decompress)
        _unpacking.append(thread)
    try:
        yield
    finally:
        with _entrance:
            _unpacking.remove(thread)
            if not _unpacking:
                extractors.update({ending: exchanged.args[1] for ending, exchanged in extractors.items()})
                utils._decompress = utils._decompress.args[1]


def _chosen(ours: Callable[..., Any], theirs: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return (ours if threading.get_ident() in _unpacking else theirs)(*args, **kwargs)


def _extract(source: str, folder: str, compression: str | None) -> None:
    archives.extract(source, folder)


def _decompress(source: str, target: str | None = None, remove_finished: bool = False) -> Path:
    """Unpacks one compressed file, in the way torchvision asks for it."""
    place = Path(source).with_suffix("") if target is None else Path(target)
    archives.extract(source, place.parent)
    if remove_finished:
        os.remove(source)
    return place


def _class_names(source: Any) -> list[str] | None:
    classes = getattr(source, "classes", None)
    if classes is None:
        return None
    return [name if isinstance(name, str) else name[0] for name in classes]  # ImageNet's are tuples of synonyms
