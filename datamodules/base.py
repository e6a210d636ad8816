"""Base of all image data modules: loaders, the hop to the device and checkpoints, on top of ``loading/``.

    samples(split) -> SeededBatches, read in BatchOrder by a plain DataLoader -> uint8 on the device
                   -> on_after_batch_transfer: float32, flip, affine, binarise, normalise, erase, per sample;
                      at the end in the Trainer's precision

A data set's own file only says what a sample is. The order is a pure function of seed and epoch, and so is every random
choice: a sample's from (seed, epoch, index), whatever the number of workers; the device's from (seed, epoch, batch,
rank). A run can therefore be continued anywhere: a checkpoint holds the number of samples done.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from datamodules import transforms
from datamodules._lightning import LightningDataModule, rank_zero_warn
from datamodules.loading.any_size import FlatImages, collate_flat, map_flat
from datamodules.loading.budget import BudgetOrder
from datamodules.loading.labels import check_same, counts_of, labels_of
from datamodules.loading.options import IMAGE_OPTIONS, ImageOptions, check_ranges, with_defaults
from datamodules.loading.order import BatchOrder, mix
from datamodules.loading.orders import order_of
from datamodules.loading.seeding import Samples, SeededBatches, map_images
from datamodules.loading.workers import Loader, default_workers, outlive_signals
from datamodules.reading.listing import Split

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ImageDataModule(LightningDataModule):
    """Loaders and the hop to the device, for every image data set here. Subclasses say what a sample is.

    Images travel as uint8 and become normalised floats on the device, in :meth:`on_after_batch_transfer`, where the
    augmentations that need no decoding are drawn for each sample anew, in float32 whatever the precision in which the
    model gets them. Float images, from samples of another kind, are passed on as they are.

    Args:
        mean: Mean of each channel, of images in [0, 1]; one value serves all channels.
        std: Standard deviation of each channel, likewise.
        batch_size: Samples per process and step.
        num_workers: Loader processes for each process. None: by the cores at hand (:func:`default_workers`), or 0 for
            data that is already in memory.
        seed: Seed of order and augmentation. The model's seed is another (``seed_everything``).
        drop_last: Leave out the last training samples if they do not fill a batch.
        hflip: Probability of a horizontal flip.
        degrees: Rotation by up to this many degrees either way.
        translate: Shift by up to this share of the side, along both.
        zoom: Scaling by a factor in [1 - zoom, 1 + zoom].
        shear: Horizontal shear by up to this many degrees either way.
        erase: Probability of random erasing (Zhong et al. 2017).
        binarize: Makes each channel of each pixel 0 or 1, after the affine map and before mean and std (so that they
            stay 0 and 1 with ``mean`` 0 and ``std`` 1) and ``erase``. ``threshold``: 1 from an intensity of 0.5 on.
            ``draw``, dynamic binarisation: 1 with the intensity as probability, anew in every epoch; but each sample of
            evaluation and prediction is drawn by ``seed`` and its index alone, the same in every run. ``draw_once``:
            training samples too (static binarisation, Salakhutdinov and Murray 2008); what the affine map turns grey
            again is thresholded. A random crop changes the intensities, and with them what is drawn.
        jitter: With ``threshold``, in training: uniform noise of up to this much is added to intensities before, anew
            in every epoch, so that what is near the threshold falls on either side. The grey of a scan thus says which
            pixels a model should not be certain of.
        repeats: Repeated augmentation: how often a sample comes in a row (see :class:`BatchOrder`).
        balance: In training, how far classes (of several labels, sets of labels) are to come alike in number. 0: as
            often as there are samples of them; 1: each as often as the others; between: in proportion to the number of
            samples to the power 1 - balance, 0.5 being square-root sampling (see :mod:`datamodules.loading.balance`).
            An epoch stays as long: samples of rare classes come several times in it, of frequent ones not in each.
    """

    in_memory = False
    """True where samples lie decoded in memory, so that workers would only cost."""

    float_images = False
    """True where samples are float images in which white is 1, to be augmented and normalised like those in uint8."""

    token_budget: int | None = None
    """Patches of a batch at most, where images differ in size and samples have a ``sizing``. None: by number."""

    loader_timeout = 300.0
    """Seconds after which a worker that has not made its batch is taken to hang, and the run ends with an error."""

    stage_settings: tuple[str, ...] = ()
    """The arguments that may change in the course of training: see :meth:`train_in_stages`."""

    @with_defaults(IMAGE_OPTIONS)
    def __init__(
        self,
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        **options: Unpack[ImageOptions],
    ) -> None:
        super().__init__()
        check_ranges(options)
        if min(std) <= 0:
            raise ValueError(f"std is {tuple(std)}: expected positive numbers")
        self.batch_size, self.num_workers, self.seed = options["batch_size"], options["num_workers"], options["seed"]
        self.mean, self.std = tuple(mean), tuple(std)
        self.hflip, self.erase, self.binarize = options["hflip"], options["erase"], options["binarize"]
        self.jitter, self.degrees, self.translate = options["jitter"], options["degrees"], options["translate"]
        self.zoom, self.shear, self.drop_last = options["zoom"], options["shear"], options["drop_last"]
        self.repeats, self.balance = options["repeats"], options["balance"]
        self.classes: list[str] | None = None
        self._stages: dict[int, Callable[[Samples], Samples]] = {}
        self._position: Mapping[str, Any] | None = None  # where a checkpoint that is continued from ended
        self._reported: dict[str, int] = {}  # how many images could not be read

    # What a subclass says.

    def samples(self, split: Split) -> Samples | None:
        """The samples of one split, or None if there is no such split."""
        raise NotImplementedError

    def in_stage(self, settings: dict[str, Any]) -> Callable[[Samples], Samples]:
        """Function from the training samples to those with some of ``stage_settings`` replaced."""
        raise NotImplementedError

    def groups(self, samples: Samples) -> np.ndarray | None:
        """Group of each training sample (N,), if batches are to hold samples alike: see :class:`BatchOrder`."""
        return None

    def collate(self) -> Callable[[list[Any]], Any]:
        """The function that makes a batch of its samples. Workers get it by pickling, where they are not forked."""
        return default_collate if self.token_budget is None else collate_flat

    @property
    def num_classes(self) -> int:
        """Number of classes. Unlabelled data has no such attribute."""
        if self.classes is None:
            raise AttributeError(f"{type(self).__name__} has no classes: its images carry no labels")
        return len(self.classes)

    def train_labels(self) -> np.ndarray:
        """Labels of the training samples, of which none is made: (N,) classes, or (N, labels) of 0 and 1.

        Raises:
            ValueError: If the samples do not say them, as unlabelled images.
        """
        return labels_of(self.samples("train"), type(self).__name__)

    def class_counts(self) -> list[int]:
        """Number of training samples of each class, in the order of ``classes``; of several labels, their positives.

        Raises:
            ValueError: If the samples do not say their labels.
        """
        labels = self.train_labels()
        return counts_of(labels, None if self.classes is None else self.num_classes)

    def sample_count(self) -> int:
        """Number of training samples."""
        return len(self.train_labels())

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
        order = order_of(self, samples, split)
        if training and self._position is not None and trainer and trainer.ckpt_path:
            order.resume(self._position)  # kept: Lightning may ask for the loader more than once
        workers = self.num_workers
        if workers is None:
            workers = 0 if self.in_memory else default_workers(trainer.num_devices if trainer else 1)
        if self.in_memory:
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # here they would not help
        return Loader(
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
            timeout=self.loader_timeout if workers > 0 else 0,
            worker_init_fn=outlive_signals,
            pin_memory=torch.accelerator.is_available(),
            generator=torch.Generator().manual_seed(self.seed),  # so that its own draw leaves the global one alone
        )

    def train_dataloader(self) -> Any:
        loader = self._loader("train")
        if loader is None:
            raise ValueError(f"{type(self).__name__} has no training samples: there is nothing that a fit could take")
        return loader

    def val_dataloader(self) -> Any:
        return self._loader("val") or []

    def test_dataloader(self) -> Any:
        loader = self._loader("test")
        if loader is None:
            raise ValueError(f"{type(self).__name__} has no test samples: measure it on its validation data")
        return loader

    def predict_dataloader(self) -> Any:
        loader = self._loader("predict") or self._loader("test")
        if loader is None:
            raise ValueError(f"{type(self).__name__} has nothing to predict: set predict_root to a folder of images")
        return loader

    # The hop to the device.

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augments (in training) and normalises uint8 images (B, C, H, W), to floats of the Trainer's precision.

        All is computed in float32. The rest of the batch stays as it is. Images of any size become a list of (C, h, w).
        """
        training = bool(self.trainer and self.trainer.training)

        def made(images: Tensor) -> Tensor:
            return self.in_precision(self._to_float(images, training))

        batch = map_flat(batch, lambda images: self._of_any_size(images, training))
        return map_images(batch, made, floats=self.float_images)

    def _of_any_size(self, images: FlatImages, training: bool) -> list[Tensor]:
        generator = self._device_generator(images.pixels.device) if training else None
        moved = self.hflip or self.degrees or self.translate or self.zoom or self.shear or self.erase
        if training and moved:
            made = [self._to_float(image[None], training, generator)[0] for image in images]
            return [self.in_precision(image) for image in made]
        as_row = self._to_float(images.pixels[None, :, None], training, generator)[0, :, 0]  # all in one go
        return images.views(self.in_precision(as_row))

    def in_precision(self, images: Tensor) -> Tensor:
        """Converts float images to the default dtype, or that of the Trainer's precision, ``bf16-true`` say.

        Lightning converts a batch before it comes to the device, when images are still uint8.
        """
        images = images.to(torch.get_default_dtype())
        return self.trainer.precision_plugin.convert_input(images) if self.trainer else images

    def _to_float(self, images: Tensor, training: bool, generator: torch.Generator | None = None) -> Tensor:
        images = images.float() if images.is_floating_point() else transforms.to_float(images)
        generator = generator or (self._device_generator(images.device) if training else None)
        if training and self.hflip:
            images = transforms.flip(images, self.hflip, generator)
        if training and (self.degrees or self.translate or self.zoom or self.shear):
            scale = (1 - self.zoom, 1 + self.zoom)
            images = transforms.affine(images, self.degrees, self.translate, scale, self.shear, generator)
        jitter = self.jitter if training else 0.0  # what the loader has drawn already stays as it is
        images = transforms.finish(images, self.mean, self.std, self.binarize, generator, jitter)
        return transforms.erase(images, self.erase, generator) if training and self.erase else images

    def _device_generator(self, device: torch.device) -> torch.Generator:
        """A generator whose state depends on seed, epoch, batch and rank only, so that a resumed run draws the same."""
        loop = self.trainer.fit_loop  # type: ignore[union-attr]  # only asked for while a Trainer trains
        batch = loop.epoch_loop.batch_progress.current.ready
        seed = mix(self.seed, self.trainer.current_epoch, batch, self.trainer.global_rank)  # type: ignore[union-attr]
        return torch.Generator(device).manual_seed(seed)

    # What a checkpoint keeps: the class names, so that predictions can be named where the training data is not, and how
    # far the epoch has come.

    def state_dict(self) -> dict[str, Any]:
        return {"classes": self.classes, "position": self._current_position()}

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        weights_only: bool | None = True,
        **kwargs: Any,
    ) -> Any:
        """Loads as Lightning does, but unpickles nothing unless ``weights_only`` is False, also from a URL."""
        # Lightning takes None for False where a URL is given.
        safe = weights_only is not False
        return super().load_from_checkpoint(checkpoint_path, map_location, hparams_file, weights_only=safe, **kwargs)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a checkpoint's classes where there are none yet, and how far its epoch had come.

        Raises:
            ValueError: If a label means another class in the checkpoint, for a module that learns classes and does not
                look at their names itself.
        """
        saved = state_dict.get("classes")
        if self.classes is None:
            self.classes = saved
        elif saved is not None:
            check_same(self.classes, saved, getattr(self.trainer, "lightning_module", None))
        if self.trainer is None or self.trainer.state.fn != "fit":
            return
        self._position = state_dict.get("position")
        # A strategy that splits the weights restores late, when configure_optimizers may have had a loader made.
        self.trainer.fit_loop._combined_loader = None

    def _current_position(self) -> dict[str, Any] | None:
        trainer: Any = self.trainer
        order = getattr(getattr(trainer, "train_dataloader", None), "sampler", None)
        if not isinstance(order, BatchOrder | BudgetOrder):
            return None
        loop = trainer.fit_loop
        epochs, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress.current
        whole = batches.ready == 0 or loop.epoch_loop._num_ready_batches_reached()  # max_steps may end an epoch within
        if epochs.processed == epochs.ready and whole:  # at an epoch's end
            return order.position(epochs.ready, 0)
        return order.position(epochs.ready - 1, batches.processed)

    def report_unreadable(self, samples: Mapping[Any, Any]) -> None:
        """Warns of each split of which more images than before could not be read."""
        for split, each in samples.items():
            unreadable = getattr(each, "unreadable", None)
            indices = [] if unreadable is None else unreadable.nonzero().flatten().tolist()
            if len(indices) > self._reported.get(split, 0):
                self._reported[split] = len(indices)
                names = getattr(each, "names", indices)
                some = ", ".join(str(names[i]) for i in indices[:5]) + (", ..." if len(indices) > 5 else "")
                rank_zero_warn(f"{len(indices)} of {len(each)} images could not be read and were skipped: {some}")
