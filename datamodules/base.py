"""Order, seeding, workers and the hop to the device: the one place for all four.

    samples(split) -> SeededBatches, read in BatchOrder by a plain DataLoader -> uint8 on the device
                   -> on_after_batch_transfer: float32, flip, affine, binarise, normalise, erase, per sample

A data set's own file only says what a sample is. The order is a pure function of seed and epoch, and so is every random
choice: a sample's from (seed, epoch, index), whatever the number of workers; the device's from (seed, epoch, batch,
rank). A run can therefore be continued anywhere without asking a loader for its state.
"""

import copy
import math
import os
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler, default_collate

from datamodules import transforms
from datamodules._lightning import LightningDataModule, rank_zero_warn

Split = Literal["train", "val", "test", "predict"]
Key = tuple[int, int, int]
"""(epoch, copy, index) of one sample: all that its random choices depend on besides the seed."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Samples(Protocol):
    """What a data set's file provides: ``samples[index]`` is an image, or ``(image, label)``, or None if unreadable.

    Images are uint8 tensors (C, H, W), labels integers from 0. Optional attributes:
    ``names``, what each sample is called (a file name); ``unreadable``, a shared uint8 tensor that marks samples which
    could not be read; ``random = False`` when making a sample involves no chance, so that seeding can be left out;
    ``in_batch(seed)``, the same samples as they are made in one batch, for choices that a whole batch shares: ``seed``
    is a function of the data module's seed, the epoch and the batch's number, and the same on every rank.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


class Keys(list[Key]):
    """The keys of one rank's share of a batch, and the number of that batch in its epoch."""

    def __init__(self, keys: Iterable[Key], batch: int) -> None:
        super().__init__(keys)
        self.batch = batch


def mix(*values: int) -> int:
    """A 63-bit seed from a few integers, every bit of each mixed in (SplitMix64's finaliser, Steele et al. 2014)."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def seed_all(seed: int) -> None:
    """Seeds the three generators that transforms draw from: torch's (CPU), Python's and NumPy's."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed also visits every accelerator: 85 µs against 1
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


@contextmanager
def isolated_randomness() -> Iterator[None]:
    """Gives the generators back as they were: in the main process, loading must not disturb the model's randomness."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


class BatchOrder(DistributedSampler[Any], SequentialSampler):
    """Which samples make which batch: yields this rank's batches, each a list of keys (epoch, copy, index).

    Training: a permutation by (seed, epoch) is cut into global batches of ``batch_size * world_size``; rank r takes
    every ``world_size``-th sample of each. Evaluation: the samples in their order, cut into as few global batches as
    the batch size allows, of nearly equal size; each sample comes once, and every rank gets the same number of batches,
    so that nothing is counted twice and no rank waits for another.

    It is a DistributedSampler so that Lightning leaves it in place under distributed strategies, and a
    SequentialSampler so that ``overfit_batches`` does.

    Args:
        size: Number of samples.
        batch_size: Samples per batch on one rank, at most.
        rank, world_size: This process and how many there are.
        seed: Seed of the order.
        shuffle: Whether to permute, anew in each epoch.
        drop_last: Leave out the samples that do not fill the last global batch. Without it, samples are spread as in
            evaluation, and batches may be smaller than ``batch_size``.
        repeats: Each sample comes this often in a row, spread over ranks, the epoch's length unchanged: an epoch then
            sees ``size / repeats`` samples (repeated augmentation, Hoffer et al. 2020, as used by DeiT).
        groups: (size,) the group of each sample, for batches of samples alike (in shape, say). The shuffled order is
            cut into chunks of ``chunk`` batches; each is sorted by group, and its batches are shuffled. Within a chunk,
            only a batch where two groups meet is mixed. Without ``shuffle`` this changes nothing.
    """

    chunk = 64

    def __init__(
        self,
        size: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = False,
        drop_last: bool = False,
        repeats: int = 1,
        groups: np.ndarray | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: expected at least 1")
        if repeats < 1:
            raise ValueError(f"repeats is {repeats}: expected at least 1")
        if repeats > 1 and groups is not None:
            raise ValueError(f"repeats is {repeats}: expected 1 where samples are grouped")
        total = batch_size * world_size
        self.size, self.batch_size, self.repeats = size, batch_size, repeats
        self.rank, self.world_size, self.seed, self.shuffle = rank, world_size, seed, shuffle
        self.groups = groups
        self.batches = size // total if drop_last else math.ceil(size / total)
        self.used = self.batches * total if drop_last else size
        self.epoch = 0

    def __len__(self) -> int:
        return self.batches

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self, epoch: int) -> np.ndarray:
        """The samples of one epoch in their global order, over all ranks: (used,) int64."""
        if not self.shuffle:
            return np.arange(self.used) // self.repeats
        generator = torch.Generator().manual_seed(mix(self.seed, epoch))
        permutation = torch.randperm(self.size, generator=generator).numpy()
        if self.groups is not None:
            return self._grouped(permutation[: self.used], self.groups, generator)
        return permutation[np.arange(self.used) // self.repeats]

    def _grouped(self, order: np.ndarray, groups: np.ndarray, generator: torch.Generator) -> np.ndarray:
        """An order's samples, rearranged within chunks so that batches hold samples of one group, if possible."""
        arranged = np.empty_like(order)
        for first in range(0, self.batches, self.chunk):
            last = min(first + self.chunk, self.batches)
            part = order[self._start(first) : self._start(last)]
            part = part[np.argsort(groups[part], kind="stable")]
            taken = 0  # batches differ in size by one, so they are filled in a random order rather than moved
            for batch in (first + torch.randperm(last - first, generator=generator)).tolist():
                start, end = self._start(batch), self._start(batch + 1)
                arranged[start:end] = part[taken : taken + end - start]
                taken += end - start
        return arranged

    def _start(self, batch: int) -> int:
        """Where in the global order a batch begins."""
        shorter, longer = divmod(self.used, self.batches)  # the first `longer` batches have one sample more
        return batch * shorter + min(batch, longer)

    def positions(self, batch: int) -> range:
        """Where in the global order this rank's share of a batch lies."""
        return range(self._start(batch) + self.rank, self._start(batch + 1), self.world_size)

    def keys_of_batch(self, batch: int, epoch: int | None = None) -> Keys:
        """This rank's keys of one batch; of the current epoch if none is given."""
        epoch = self.epoch if epoch is None else epoch
        return self._keys(batch, epoch, self.order(epoch))

    def batch_indices(self, batch: int, epoch: int | None = None) -> list[int]:
        """This rank's sample indices of one batch; of the current epoch if none is given."""
        return [index for _, _, index in self.keys_of_batch(batch, epoch)]

    def _keys(self, batch: int, epoch: int, order: np.ndarray) -> Keys:
        keys = ((epoch, position % self.repeats, int(order[position])) for position in self.positions(batch))
        return Keys(keys, batch)

    def __iter__(self) -> Iterator[Keys]:  # type: ignore[override]  # whole batches of keys, not indices
        epoch, order = self.epoch, self.order(self.epoch)
        for batch in range(self.batches):
            yield self._keys(batch, epoch, order)


class SeededBatches(Dataset[list[Any]]):
    """Makes a batch's samples, each under its own seed, so that the number of workers changes nothing.

    A sample that cannot be read (None) is left out of the batch; in training another one takes its place, so that the
    batch keeps its size.

    Args:
        samples: The data set.
        seed: Seed of the samples' random choices.
        substitute: Whether another sample takes the place of one that cannot be read.
        stages: By the epoch they start in, the same samples as they are made from then on.
        drawn: Whether uint8 images are drawn to 0 or 255, each value 255 with its intensity as probability. That is by
            seed and index alone, so that a sample which is made alike is drawn alike, in whatever epoch or batch.
    """

    attempts = 100  # a data set in which a hundred samples in a row cannot be read has no use for a hundred and first

    def __init__(
        self,
        samples: Samples,
        seed: int,
        substitute: bool = False,
        stages: Mapping[int, Samples] | None = None,
        drawn: bool = False,
    ) -> None:
        self.samples, self.seed, self.substitute, self.drawn = samples, seed, substitute, drawn
        self.stages = dict(sorted((stages or {}).items(), reverse=True))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, keys: list[Key]) -> list[Any]:
        samples = self._samples_for(keys)
        if not getattr(self.samples, "random", True):
            made = [self._make(samples, key) for key in keys]
        else:
            with isolated_randomness():
                made = [self._make(samples, key) for key in keys]
        kept = [sample for sample in made if sample is not None]
        if not kept:
            raise ValueError(f"none of a batch's {len(keys)} images can be read, {self.name(keys[0][2])} the first")
        return kept

    def _samples_for(self, keys: list[Key]) -> Samples:
        """The samples as they are made in the epoch of these keys, and in their batch."""
        epoch = keys[0][0]
        samples = next((made for first, made in self.stages.items() if first <= epoch), self.samples)
        if isinstance(keys, Keys) and hasattr(samples, "in_batch"):
            return samples.in_batch(mix(self.seed, epoch, keys.batch))
        return samples

    def _make(self, samples: Samples, key: Key) -> Any:
        epoch, copy, index = key
        for attempt in range(self.attempts if self.substitute else 1):
            seed = mix(self.seed, epoch, copy, index, attempt)
            if getattr(samples, "random", True):
                seed_all(seed)
            number = index if attempt == 0 else seed % len(self)
            sample = samples[number]
            if sample is not None:
                return self._draw(sample, number) if self.drawn else sample
        return None

    def _draw(self, sample: Any, number: int) -> Any:
        generator = torch.Generator().manual_seed(mix(self.seed, number))

        def draw(image: Tensor) -> Tensor:
            return transforms.binarize(transforms.to_float(image), draw=True, generator=generator).to(torch.uint8) * 255

        return _map_images(sample, draw, dimensions=3)

    def name(self, index: int) -> str:
        """What a sample is called: its file, or its number."""
        names = getattr(self.samples, "names", None)
        return str(index) if names is None else str(names[index])

    def present(self, indices: Sequence[int]) -> list[tuple[int, str]]:
        """(index, name) of those samples of a loaded batch that could be read, in the batch's order."""
        unreadable = getattr(self.samples, "unreadable", None)
        return [(i, self.name(i)) for i in indices if unreadable is None or not unreadable[i]]


def with_transform(samples: Any, transform: Callable[[Any], Tensor]) -> Samples:
    """The same samples, made by another transform; the originals stay as they are."""
    changed = copy.copy(samples)
    changed.transform = transform
    return changed


def default_workers(processes: int = 1) -> int:
    """Loader workers for one process: its share of the cores this program may use, at most 8, one core left free."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(8, cores // max(1, processes) - 1))


class ImageDataModule(LightningDataModule):
    """Loaders and the hop to the device, for every image data set here. Subclasses say what a sample is.

    Images travel as uint8 and become normalised float32 on the device, in :meth:`on_after_batch_transfer`, where the
    augmentations that need no decoding are drawn for each sample anew. Float images, from samples of another kind, are
    passed on as they are.

    Args:
        batch_size: Samples per process and step.
        num_workers: Loader processes for each process. None: by the cores at hand (:func:`default_workers`), or 0 for
            data that is already in memory.
        seed: Seed of order and augmentation. The model's seed is another (``seed_everything``).
        mean, std: Per channel, of images in [0, 1]. One value serves all channels.
        hflip: Probability of a horizontal flip.
        degrees, translate, zoom, shear: Random affine map: rotation up to ±degrees, shift up to ±translate of the side,
            scale in [1 - zoom, 1 + zoom], shear up to ±shear degrees.
        erase: Probability of random erasing (Zhong et al. 2017).
        binarize: Makes each channel of each pixel 0 or 1, after the affine map and before mean and std (so that they
            stay 0 and 1 with ``mean`` 0 and ``std`` 1) and ``erase``. ``threshold``: 1 from an intensity of 0.5 on.
            ``draw``: 1 with the intensity as probability, anew in every epoch; but each sample of evaluation and
            prediction is drawn by ``seed`` and its index alone, the same in every run. ``draw_once``: training samples
            too (the fixed binarisation of Salakhutdinov and Murray 2008); what the affine map turns grey again is
            thresholded. A random crop changes the intensities, and with them what is drawn.
        jitter: With ``threshold``, in training: uniform noise of up to this much is added to intensities before, anew
            in every epoch, so that what is near the threshold falls on either side. The grey of a scan thus says which
            pixels a model should not be certain of.
        drop_last: Leave out the last training samples if they do not fill a batch.
        repeats: Repeated augmentation: how often a sample comes in a row (see :class:`BatchOrder`).
    """

    in_memory = False
    """Whether samples lie decoded in memory, so that workers would only cost."""

    stage_settings: tuple[str, ...] = ()
    """The arguments that may change in the course of training: see :meth:`train_in_stages`."""

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int | None = None,
        seed: int = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        hflip: float = 0.0,
        degrees: float = 0.0,
        translate: float = 0.0,
        zoom: float = 0.0,
        shear: float = 0.0,
        erase: float = 0.0,
        binarize: transforms.Binarization | None = None,
        jitter: float = 0.0,
        drop_last: bool = True,
        repeats: int = 1,
    ) -> None:
        super().__init__()
        for name, probability in (("hflip", hflip), ("erase", erase)):
            if not 0 <= probability <= 1:
                raise ValueError(f"{name} is {probability}: expected a probability in [0, 1]")
        if binarize is not None and binarize not in (choices := get_args(transforms.Binarization)):
            raise ValueError(f"unknown binarize {binarize!r}: expected {', '.join(choices)}, or null for none")
        if jitter < 0 or (jitter and binarize != "threshold"):
            raise ValueError(f"jitter is {jitter} with binarize {binarize}: expected 0, or more with threshold")
        if min(std) <= 0:
            raise ValueError(f"std is {tuple(std)}: expected positive numbers")
        if num_workers is not None and num_workers < 0:
            raise ValueError(
                f"num_workers is {num_workers}: expected 0 or more, or null to choose by the cores at hand"
            )
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.mean, self.std = tuple(mean), tuple(std)
        self.hflip, self.erase, self.binarize, self.jitter = hflip, erase, binarize, jitter
        self.degrees, self.translate, self.zoom, self.shear = degrees, translate, zoom, shear
        self.drop_last, self.repeats = drop_last, repeats
        self.classes: list[str] | None = None
        self._stages: dict[int, Callable[[Samples], Samples]] = {}

    # What a subclass says.

    def samples(self, split: Split) -> Samples | None:
        """The samples of one split, or None if there is no such split."""
        raise NotImplementedError

    def in_stage(self, settings: dict[str, Any]) -> Callable[[Samples], Samples]:
        """What makes, of the training samples, those with some of ``stage_settings`` replaced."""
        raise NotImplementedError

    def groups(self, samples: Samples) -> np.ndarray | None:
        """(N,) the group of each training sample, if batches are to hold samples alike: see :class:`BatchOrder`."""
        return None

    def collate(self) -> Callable[[list[Any]], Any]:
        """The function that makes a batch of its samples. Workers get it by pickling, where they are not forked."""
        return default_collate

    @property
    def num_classes(self) -> int:
        """Number of classes. Unlabelled data has no such attribute."""
        if self.classes is None:
            raise AttributeError(f"{type(self).__name__} has no classes: its images carry no labels")
        return len(self.classes)

    # Order and workers.

    def train_in_stages(self, stages: Mapping[int, Mapping[str, Any]]) -> None:
        """Lets training images change from stage to stage: their size, say, or how strongly they are augmented.

        A sample's key holds its epoch, so what is made of it stays a function of its key: workers keep running, and a
        run can be continued anywhere. Validation, testing and prediction keep the constructor's arguments.

        Args:
            stages: By the epoch that a stage starts in, arguments of the constructor and their values in it; those in
                ``stage_settings`` are possible. What a stage leaves out, and epochs before the first stage, are as the
                constructor says. Empty: no stages. Loaders that are there already do not change.

        Raises:
            ValueError: For an argument that cannot change, and for values that the constructor would refuse.
        """
        name = type(self).__name__
        if stages and not self.stage_settings:
            raise ValueError(f"{name} cannot train in stages: it has no stage_settings")
        for setting in (setting for settings in stages.values() for setting in settings):
            if setting not in self.stage_settings:
                possible = ", ".join(self.stage_settings)
                raise ValueError(f"{name} cannot change {setting} from stage to stage: it can change {possible}")
        self._stages = {epoch: self.in_stage(dict(settings)) for epoch, settings in stages.items()}

    def _loader(self, split: Split) -> DataLoader[Any] | None:
        samples = self.samples(split)
        if samples is None:
            return None
        trainer, training = self.trainer, split == "train"
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        order = BatchOrder(
            len(samples),
            self.batch_size,
            rank,
            world_size,
            self.seed,
            shuffle=training and not getattr(trainer, "overfit_batches", 0),
            drop_last=training and self.drop_last,
            repeats=self.repeats if training else 1,
            groups=self.groups(samples) if training else None,
        )
        if len(order) == 0 or len(samples) < world_size:
            raise ValueError(
                f"{len(samples)} {split} samples do not fill one batch of {self.batch_size} on {world_size} processes: "
                f"set batch_size to {max(1, len(samples) // world_size)} or less"
            )
        workers = self.num_workers
        if workers is None:
            workers = 0 if self.in_memory else default_workers(trainer.num_devices if trainer else 1)
        if self.in_memory:
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # here they would not help
        return DataLoader(
            SeededBatches(
                samples,
                self.seed,
                substitute=training,
                stages={epoch: made_of(samples) for epoch, made_of in self._stages.items()} if training else None,
                drawn=self.binarize == "draw_once" or (self.binarize == "draw" and not training),
            ),
            batch_size=None,  # the order yields whole batches
            sampler=order,
            collate_fn=self.collate(),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.accelerator.is_available(),
            generator=torch.Generator().manual_seed(
                self.seed
            ),  # the loader's own draw then leaves the global one alone
        )

    def train_dataloader(self) -> Any:
        loader = self._loader("train")
        if loader is None:
            raise ValueError(f"{type(self).__name__} has no training samples")
        return loader

    def val_dataloader(self) -> Any:
        return self._loader("val") or []

    def test_dataloader(self) -> Any:
        loader = self._loader("test")
        if loader is None:
            raise ValueError(f"{type(self).__name__} has no test samples")
        return loader

    def predict_dataloader(self) -> Any:
        loader = self._loader("predict") or self._loader("test")
        if loader is None:
            raise ValueError(f"{type(self).__name__} has nothing to predict: set predict_root to a folder of images")
        return loader

    # The hop to the device.

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """uint8 images (B, C, H, W) become augmented (in training) and normalised float32; the rest stays as it is."""
        training = bool(self.trainer and self.trainer.training)
        return _map_images(batch, lambda images: self._to_float(images, training))

    def _to_float(self, images: Tensor, training: bool) -> Tensor:
        images = transforms.to_float(images)
        generator = self._device_generator(images.device) if training else None
        if training and self.hflip:
            images = transforms.flip(images, self.hflip, generator)
        if training and (self.degrees or self.translate or self.zoom or self.shear):
            scale = (1 - self.zoom, 1 + self.zoom)
            images = transforms.affine(images, self.degrees, self.translate, scale, self.shear, generator)
        if self.binarize:  # what the loader has drawn already stays as it is
            jitter = self.jitter if training else 0.0
            images = transforms.binarize(images, self.binarize == "draw", generator, jitter)
        images = transforms.normalize(images, self.mean, self.std)
        return transforms.erase(images, self.erase, generator) if training and self.erase else images

    def _device_generator(self, device: torch.device) -> torch.Generator:
        """A generator whose state depends on seed, epoch, batch and rank only, so that a resumed run draws the same."""
        loop = self.trainer.fit_loop  # type: ignore[union-attr]  # only asked for while a Trainer trains
        batch = loop.epoch_loop.batch_progress.current.ready
        seed = mix(self.seed, self.trainer.current_epoch, batch, self.trainer.global_rank)  # type: ignore[union-attr]
        return torch.Generator(device).manual_seed(seed)

    # What a checkpoint keeps: the class names, so that predictions can be named where the training data is not.

    def state_dict(self) -> dict[str, Any]:
        return {"classes": self.classes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.classes is None:
            self.classes = state_dict.get("classes")

    def report_unreadable(self, samples: Samples) -> None:
        """Says how many images could not be read so far, and which."""
        unreadable = getattr(samples, "unreadable", None)
        if unreadable is None or not unreadable.any():
            return
        indices = unreadable.nonzero().flatten().tolist()
        names = getattr(samples, "names", indices)
        some = ", ".join(str(names[i]) for i in indices[:5]) + (", ..." if len(indices) > 5 else "")
        rank_zero_warn(f"{len(indices)} of {len(samples)} images could not be read and were skipped: {some}")


def _map_images(batch: Any, function: Callable[[Tensor], Tensor], dimensions: int = 4) -> Any:
    """Applies a function to the uint8 image tensors (4 dimensions; a sample's: 3) of a batch of any usual form."""
    if isinstance(batch, Tensor):
        return function(batch) if batch.dtype == torch.uint8 and batch.ndim == dimensions else batch
    if isinstance(batch, Mapping):
        return {key: _map_images(value, function, dimensions) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(_map_images(part, function, dimensions) for part in batch)
    return batch
