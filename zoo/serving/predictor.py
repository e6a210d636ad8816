"""Named results of images: the preprocessing of evaluation, a module's ``predict_step``, and names for what it says."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.loading.order import BatchOrder
from datamodules.loading.workers import default_workers
from datamodules.preprocessing import Preprocessing
from datamodules.reading.files import OnError
from datamodules.reading.given import Given
from datamodules.reading.listing import images_under
from zoo.common import batch as batches
from zoo.common.protocols import (
    ChecksImages,
    GivesProbabilities,
    HasCategories,
    HasClasses,
    KeepsArguments,
    NamesResults,
    Reconstructs,
    UsesThresholds,
)

Item = TypeVar("Item")
Made = TypeVar("Made")

BATCH_SIZE = 32


class Answered(NamedTuple):
    """Predictions of images that follow each other.

    Attributes:
        first: The place of the first image among all that are predicted.
        files: The path of each image; None for one that is given in memory.
        errors: The reason why an image could not be read; None for one that could.
        images: What the module got of those that could be read; None if there are none.
        outputs: What ``predict_step`` returned for these.
    """

    first: int
    files: Sequence[str | None]
    errors: Sequence[str | None]
    images: Any
    outputs: Any


class Predictor:
    """A module with the preprocessing of its images: ``predictor("cat.jpg")["label"]``.

    It computes what ``zoo predict`` does, in float32, and holds no graph: the preprocessing is that of the data module,
    the predictions are those of ``predict_step``, and a folder or a list is cut into batches alike. (Images that differ
    in size, as a detector's, are padded to the largest of their batch, which its predictions may depend on.)

    Args:
        module: A LightningModule, which is put on the device and into evaluation mode.
        preprocessing: What ``datamodules.preprocessing.create`` makes.
        classes: Names of the outputs, by label. None: those of the module.
        category_ids: What files of detections call them. None: those of the module.
        thresholds: From which probability on each of several labels counts, in [0, 1]: one for all, or by name. None:
            those of the module, 0.5 unless somebody has set others.
        tta: Test-time augmentation of a classifier, whose probabilities are averaged over "flip", the image and its
            mirror; "crops", its four corners and centre as it is resized; or "crops+flip", these and their mirrors.
        device: Where to compute, "cuda" for example.
        batch_size: Images at a time.
        num_workers: Threads that read images ahead; 0: none. None: by the cores at hand.

    Raises:
        ValueError: For another number of names than the module has outputs; for preprocessing whose images the module
            does not take; for thresholds or an augmentation that do not go with the module; for values out of range.
    """

    def __init__(
        self,
        module: Any,
        preprocessing: Preprocessing,
        classes: Sequence[str] | None = None,
        category_ids: Sequence[int] | None = None,
        *,
        thresholds: float | Mapping[str, float] | None = None,
        tta: str | None = None,
        device: str | torch.device = "cpu",
        batch_size: int = BATCH_SIZE,
        num_workers: int | None = None,
    ) -> None:
        name = type(module).__name__
        if batch_size < 1 or (num_workers is not None and num_workers < 0):
            raise ValueError(f"batch_size is {batch_size}, num_workers {num_workers}: expected at least 1 and 0")
        if preprocessing.input_shape is not None and isinstance(module, ChecksImages):
            try:
                module.check_images(preprocessing.input_shape)
            except ValueError as error:
                raise ValueError(f"the preprocessing does not fit {name}: {error}") from error
        if classes is not None and isinstance(module, HasClasses):
            count = module.hparams.get("num_classes") if isinstance(module, KeepsArguments) else None
            if count not in (None, len(classes)):
                raise ValueError(f"there are {len(classes)} names of classes, and {name} has {count} outputs")
            module.classes = list(classes)
        if category_ids is not None and isinstance(module, HasCategories):
            module.category_ids = list(category_ids)
        if thresholds is not None:
            if not isinstance(module, UsesThresholds):
                raise ValueError(f"thresholds are for classifiers of several labels, and {name} is none")
            module.use_thresholds(thresholds)
        if tta is not None:
            if not isinstance(module, GivesProbabilities):
                raise ValueError(f"tta is for classifiers, whose probabilities can be averaged, and {name} is none")
            if tta not in preprocessing.augmentations:
                choices = " or ".join(preprocessing.augmentations) or "none"
                raise ValueError(f"tta is {tta!r}: expected {choices} for images of kind {preprocessing.kind}, or None")
        try:
            self.device = torch.device(device)
            self.module = module.to(self.device).eval()
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {device} cannot be used: {str(error).splitlines()[0]}") from error
        self.preprocessing, self.tta, self.batch_size = preprocessing, tta, batch_size
        # All cores: whoever computes mostly waits for images.
        self.num_workers = default_workers() + 1 if num_workers is None else num_workers

    def __repr__(self) -> str:
        shape = self.preprocessing.input_shape
        images = "images of their own sizes" if shape is None else f"images {'x'.join(map(str, shape))}"
        classes = self.module.classes if isinstance(self.module, HasClasses) else None
        named = f", {len(classes)} classes: {', '.join(classes[:5])}{', ...' * (len(classes) > 5)}" if classes else ""
        return f"Predictor({type(self.module).__name__}, {images}, {self.device}{named})"

    def __call__(self, images: Any, top: int = 5, on_error: OnError = "raise", reconstruct: bool = False) -> Any:
        """Predicts one image, or several at once.

        Args:
            images: A path, PIL image, array or tensor (:func:`datamodules.reading.given.pixels`); or a folder, of which
                the images at all depths are taken, sorted; or a list of these.
            top: How many classes a classifier names for each image, the most likely first.
            on_error: At an image that cannot be read, "raise" ends with an error that names it, "skip" says so in its
                place and goes on.
            reconstruct: Whether to add what a masked or variational autoencoder makes of an image.

        Returns:
            Of one image a dictionary, of a list or a folder a list of them, in order: of a classifier ``{"label",
            "index", "probability", "top": [{"label", "index", "probability"}, ...]}``, for several labels ``{"labels",
            "top"}``; of a detector ``{"boxes": [[x1, y1, x2, y2], ...], "scores", "labels", "indices",
            "category_ids"}`` in pixels of the upright image as it was given; of others ``{"features"}`` or
            ``{"codes"}`` as tensors. There is a ``"file"`` where it comes from one, ``"reconstruction"`` (C, H, W) in
            [0, 1] if asked for, and of an image that was skipped ``"error"`` alone beside the file.

        Raises:
            ValueError: For an image that cannot be read, with its name and the reason, unless it is to be skipped; a
                folder without images; a choice that there is not.
        """
        found = list(self.stream(images, top, on_error, reconstruct))
        return found[0] if _is_one(images) else found

    def stream(
        self, images: Any, top: int = 5, on_error: OnError = "raise", reconstruct: bool = False
    ) -> Iterator[dict[str, Any]]:
        """Iterates over the results of images, of which it holds no more than a batch and what is read ahead.

        Arguments and results are those of a call; ``images`` may be an iterator as well, whose length nobody knows.
        """
        if top < 1:
            raise ValueError(f"top is {top}: expected at least 1")
        if reconstruct and not isinstance(self.module, Reconstructs):
            raise ValueError(f"{type(self.module).__name__} does not reconstruct images: leave reconstruct out")
        return self._stream(self.batches(images, on_error), top, reconstruct)

    def _stream(self, answers: Iterable[Answered], top: int, reconstruct: bool) -> Iterator[dict[str, Any]]:
        for answered in answers:
            results = iter(self.results(answered, top, reconstruct))
            for file, error in zip(answered.files, answered.errors, strict=True):
                said = {} if file is None else {"file": file}
                yield {**said, **next(results)} if error is None else {**said, "error": error}

    def results(self, answered: Answered, top: int = 5, reconstruct: bool = False) -> list[dict[str, Any]]:
        """Named results of those images of a batch that could be read."""
        if answered.outputs is None:
            return []
        if isinstance(self.module, NamesResults):
            named = self.module.named_results(answered.outputs, top)
        else:
            named = [{"outputs": each} for each in answered.outputs]
        results = [{key: _own(value) for key, value in each.items()} for each in named]
        if reconstruct:
            with torch.inference_mode():
                made = self.preprocessing.restore(self.module.reconstructions(batches.images(answered.images)))
            for result, image in zip(results, made.clamp(0, 1), strict=True):
                result["reconstruction"] = _own(image)
        return results

    def batches(self, images: Any, on_error: OnError = "raise") -> Iterator[Answered]:
        """Iterates over what ``predict_step`` returns, batch by batch. Arguments: see :meth:`__call__`."""
        if on_error not in get_args(OnError):
            raise ValueError(f"unknown on_error {on_error!r}: expected {' or '.join(get_args(OnError))}")
        several = not _is_one(images)

        def read(item: tuple[int, tuple[Given, str | None]]) -> tuple[str | None, list[Any] | str]:
            number, (image, file) = item
            try:
                return file, self.preprocessing.views(image, number, self.tta)
            except ValueError as error:
                said = f"image {number}: {error}" if file is None and several else str(error)
                if on_error == "skip":
                    return file, said
                raise type(error)(said) from error

        items: Iterable[tuple[Given, str | None]] = listed(images)
        sizes: Iterable[int] = itertools.repeat(self.batch_size)
        if not isinstance(images, Iterator):  # batches as prediction has them, all of nearly one size
            items = list(items)
            order = BatchOrder(len(items), self.batch_size)
            sizes = (len(order.positions(batch)) for batch in range(len(order)))
        ahead = self.batch_size + 2 * self.num_workers
        samples = _ahead(read, enumerate(items), self.num_workers if several else 0, ahead)
        return self._answers(samples, sizes)

    def _answers(
        self, samples: Iterator[tuple[str | None, list[Any] | str]], sizes: Iterable[int]
    ) -> Iterator[Answered]:
        first = 0
        for size in sizes:
            some = list(itertools.islice(samples, size))
            if not some:
                return
            files = [file for file, _ in some]
            errors = [found if isinstance(found, str) else None for _, found in some]
            views = [found for _, found in some if not isinstance(found, str)]
            yield Answered(first, files, errors, *(self._predict(views) if views else (None, None)))
            first += len(some)

    @torch.inference_mode()
    def _predict(self, views: Sequence[list[Any]]) -> tuple[Any, Any]:
        """Images as the module gets them, and its predictions, the average over the views of each image."""
        if self.tta is None:
            return self._step([sample for (sample,) in views])
        flat = [sample for each in views for sample in each]
        parts = [flat[start : start + self.batch_size] for start in range(0, len(flat), self.batch_size)]
        found: list[tuple[Any, Tensor]] = [self._step(part) for part in parts]
        probabilities = torch.cat([outputs for _, outputs in found])
        return torch.cat([images for images, _ in found]), probabilities.unflatten(0, (len(views), -1)).mean(1)

    def _step(self, samples: list[Any]) -> tuple[Any, Any]:
        batch = self.module.transfer_batch_to_device(self.preprocessing.collate(samples), self.device, 0)
        batch = self.preprocessing.to_float(batch)
        return batch, self.module.predict_step(batch, 0)


def _is_one(images: Any) -> bool:
    """True for a single image, or what is given for one."""
    if isinstance(images, str | PathLike):
        return not Path(images).is_dir()
    return isinstance(images, Image.Image) or (isinstance(images, np.ndarray | Tensor) and images.ndim < 4)


def listed(images: Any) -> Iterator[tuple[Given, str | None]]:
    """Single images, and the path of each that is a file: those of folders sorted."""
    for image in [images] if _is_one(images) or isinstance(images, str | PathLike) else images:
        if not isinstance(image, str | PathLike):
            yield image, None
        elif Path(image).is_dir():
            for name in images_under(Path(image)):
                path = str(Path(image, name))
                yield path, path
        else:
            yield str(image), str(image)


def _ahead(function: Callable[[Item], Made], items: Iterable[Item], workers: int, ahead: int) -> Iterator[Made]:
    """Results of a function in order, computed by threads, at most so many items ahead of whoever asks; 0: by none."""
    if not workers:
        yield from map(function, items)
        return
    waiting: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="images") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _own(value: Any) -> Any:
    """A tensor of its own on the CPU, which autograd takes, other than those of inference; other values as they are."""
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value
