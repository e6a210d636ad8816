"""Reading batches: torchvision's ``(images, labels)`` or ``(images, targets)``, bare images, or a dict.

Images are float tensors (B, C, H, W), or a list of B tensors (C, H, W); labels are integers (B,), or for several labels
an image (B, classes) of 0 and 1; targets are B dicts of ``boxes`` and ``labels``. A named tuple is read as a dict if it
names its images as one does, else as a tuple. Only shapes and types are looked at, never values, so that nothing waits
for a device. Nothing here, and no step, writes into a batch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from zoo.common import loaders
from zoo.common.protocols import KnownOrder, KnownSamples

IMAGE_KEYS = ("image", "images", "pixel_values")
LABEL_KEYS = ("label", "labels")
TARGET_KEYS = ("target", "targets")


def images(batch: Any) -> Tensor:
    """The images of a batch, float (B, C, H, W).

    Raises:
        ValueError: If there are none, if a list of them is not of one size, or if they are uint8: somebody has to turn
            them into normalised floats first.
    """
    found = _images(batch)
    if not isinstance(found, Tensor):
        odd = next((i for i, image in enumerate(found) if image.shape != found[0].shape), None)
        if odd is not None:
            raise ValueError(
                f"image {odd} of the batch is {tuple(found[odd].shape)}, image 0 {tuple(found[0].shape)}: expected one "
                "size, the loader's collate_fn has to pad them"
            )
        found = torch.stack(list(found))
    return found


def images_of_any_size(batch: Any) -> Tensor | list[Tensor]:
    """The images of a batch, float (B, C, H, W), or a list of B images (C, H, W), each of its own size.

    Raises:
        ValueError: If there are none, or if they are uint8.
    """
    found = _images(batch)
    return found if isinstance(found, Tensor) else list(found)


def _images(batch: Any) -> Tensor | Sequence[Tensor]:
    """The images as the batch has them, once they are known to be floats."""
    found = batch = by_name(batch)
    if isinstance(batch, Mapping):
        found = _first(batch, IMAGE_KEYS)
    elif isinstance(batch, list | tuple) and batch and not _is_list_of_images(batch):
        found = batch[0]
    listed = _is_list_of_images(found)
    if not listed and (not isinstance(found, Tensor) or found.ndim != 4):
        raise ValueError(f"expected images (B, C, H, W) in the batch, got {_describe(found)}")
    odd = next((image.dtype for image in (found if listed else [found]) if not image.is_floating_point()), None)
    if odd is not None:
        raise ValueError(
            f"the images are {odd}: normalised floats are expected "
            "(the zoo's data modules make them in on_after_batch_transfer)"
        )
    return found


Read = Callable[[Any], Tensor | list[Tensor]]
"""Reads the images of a batch: :func:`images`, or :func:`images_of_any_size`."""


def images_and_labels(batch: Any, read: Read = images) -> tuple[Any, Tensor]:
    """Images, float (B, C, H, W), and their labels: int64 (B,), or as they are if they have more dimensions.

    Args:
        batch: The batch.
        read: How its images are read; those of several sizes are a list.

    Raises:
        ValueError: If the batch carries no labels, if they are not one for each image, or if they are numbers (B,) that
            are no whole ones.
    """
    found = _labels(batch)
    if not isinstance(found, Tensor):
        if found is not None:
            got = f"{_describe(found)} beside the images"
        else:
            got = f"the keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else _describe(batch)
        raise ValueError(f"expected (images, labels), got {got}: this module learns from labels, a tensor of integers")
    pixels = read(batch)
    if found.shape[:1] != (len(pixels),):
        raise ValueError(f"labels are {tuple(found.shape)} for {len(pixels)} images: expected one for each")
    if found.ndim > 1:
        return pixels, found
    if found.is_floating_point() or found.is_complex():
        raise ValueError(f"labels are {found.dtype} {tuple(found.shape)}: expected classes, integers from 0")
    return pixels, found.to(torch.int64)


def has_labels(batch: Any) -> bool:
    """Tells whether a batch carries class labels beside its images: integers (B,). Whatever else it carries is none.

    Negative ones, as of images whose class is not known, are integers like others: values are not looked at.
    """
    found = _labels(batch)
    if not isinstance(found, Tensor) or found.ndim == 0 or found.is_floating_point() or found.is_complex():
        return False
    return found.shape == (len(_images(batch)),)


def images_and_targets(batch: Any) -> tuple[Tensor, list[dict[str, Any]]]:
    """Images, float (B, C, H, W), and for each a target: ``boxes`` (n, 4) xyxy in pixels, ``labels`` (n,) int64.

    Further keys of a target are handed on; ``iscrowd``, ``area`` and ``in_range`` have one entry a box, in a tensor, an
    array or a list. An image without objects may have boxes and labels of shape (0,).

    Raises:
        ValueError: If the batch carries no targets, or if they are not of this form.
    """
    batch = by_name(batch)
    if _dicts(batch) is None:
        got = f"the keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else _describe(batch)
        raise ValueError(f"expected (images, targets), a dict of boxes and labels for each image, got {got}")
    return images(batch), [_checked(target, number) for number, target in enumerate(about_images(batch))]


def about_images(batch: Any) -> list[Mapping[str, Any]]:
    """The dict that a batch carries for each image, as it is: where nothing is known of boxes, it may say sizes alone.

    Empty ones, if it carries none.

    Raises:
        ValueError: If they are not as many as the images.
    """
    count, found = len(images(batch)), _dicts(batch)
    if found is not None and len(found) != count:
        raise ValueError(f"{len(found)} targets for {count} images: expected one for each")
    return [{}] * count if found is None else list(found)


def has_targets(batch: Any) -> bool:
    """Tells whether a batch carries dicts of boxes and labels beside its images."""
    return any("boxes" in target or "labels" in target for target in _dicts(batch) or [])


def _dicts(batch: Any) -> Sequence[Mapping[str, Any]] | None:
    """A batch's targets, if they are dicts."""
    batch, found = by_name(batch), None
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in TARGET_KEYS if key in batch), None)
    elif isinstance(batch, list | tuple) and len(batch) > 1:
        found = batch[1]
    is_dicts = isinstance(found, list | tuple) and bool(found) and all(isinstance(part, Mapping) for part in found)
    return found if is_dicts else None


def _labels(batch: Any) -> Any:
    """The part of a batch where labels are expected, whatever it is; None if there is nothing."""
    batch = by_name(batch)
    if isinstance(batch, Mapping):
        return next((batch[key] for key in LABEL_KEYS if key in batch), None)
    is_pair = isinstance(batch, list | tuple) and len(batch) > 1 and not _is_list_of_images(batch)
    return batch[1] if is_pair else None


def by_name(batch: Any) -> Any:
    """A named tuple that names its images in a usual way as a dict, all else as it is."""
    if isinstance(batch, tuple) and any(name in IMAGE_KEYS for name in getattr(batch, "_fields", ())):
        return batch._asdict()  # type: ignore[attr-defined]
    return batch


def _is_list_of_images(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(part, Tensor) and part.ndim == 3 for part in value)
    )


def _checked(target: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A target of the promised form, or an error that names the sample and what is wrong with it."""
    sample = f"sample {number} of the batch"
    if not isinstance(target.get("image_id"), Tensor | None):  # a tensor's value may lie on a device
        sample += f" (image_id {target['image_id']})"
    for key in ("boxes", "labels"):
        if not isinstance(target.get(key), Tensor):
            got = f"{key} as {_describe(target[key])}" if key in target else f"the keys {sorted(map(str, target))}"
            raise ValueError(f"{sample} has {got}: expected tensors boxes (n, 4), xyxy in pixels, and labels (n,)")
    boxes, labels = target["boxes"], target["labels"]
    if boxes.shape in ((0,), (0, 4)):  # what torch makes of an empty list is float, and has no second dimension
        boxes = boxes.reshape(0, 4) if boxes.is_floating_point() else boxes.new_zeros((0, 4), dtype=torch.float32)
        labels = labels.to(torch.int64) if labels.shape == (0,) else labels
    form = getattr(getattr(boxes, "format", None), "value", "XYXY")  # torchvision's BoundingBoxes say what they are
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point() or form != "XYXY":
        got = f"{_describe(boxes)} and {boxes.dtype}" + (f" in the format {form}" if form != "XYXY" else "")
        raise ValueError(f"the boxes of {sample} are {got}: expected (n, 4) floats, xyxy in pixels")
    if labels.shape != boxes.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        got = f"{_describe(labels)} and {labels.dtype}"
        raise ValueError(
            f"the labels of {sample} are {got}: expected ({len(boxes)},) integers from 0, one for each box"
        )
    checked = {**target, "boxes": boxes, "labels": labels.to(torch.int64)}
    for key in ("iscrowd", "area", "in_range"):
        value = target.get(key)
        if value is None:
            checked.pop(key, None)
            continue
        checked[key] = value = torch.as_tensor(value)
        if value.shape != boxes.shape[:1]:
            raise ValueError(f"{key} of {sample} is {_describe(value)}: expected ({len(boxes)},), one for each box")
    return checked


def _first(batch: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    for key in keys:
        if key in batch:
            return batch[key]
    raise ValueError(f"the batch has the keys {sorted(map(str, batch))}: expected one of {', '.join(keys)}")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{type(value).__name__}"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, copied from pinned memory, so that the host does not wait until the device gets to it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def check_shape(shape: Sequence[int], expected: Sequence[int]) -> None:
    """Raises ValueError for images of another shape (C, H, W) than a model's."""
    if tuple(shape) != tuple(expected):
        got, own = ("x".join(map(str, each)) for each in (shape, expected))
        raise ValueError(f"images are {got}, but the model was built for {own}")


def readable(loader: Any, batch_idx: int) -> list[int] | None:
    """The samples' indices in a batch that was loaded, without those that could not be read; None if unknown.

    Of the zoo's own loaders it is known, by their order and data set. Empty: what is in the batch stands in for others.
    """
    order, dataset = getattr(loader, "sampler", None), getattr(loader, "dataset", None)
    if not (isinstance(order, KnownOrder) and isinstance(dataset, KnownSamples)):
        return None
    return [index for index, _ in dataset.present(order.batch_indices(batch_idx))]


def once(module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
    """A batch of an evaluation without the samples that fill this process up, or None if there are no others in it.

    Under several processes Lightning gives other people's loaders a ``DistributedSampler``, which begins again where
    samples run out, so that all processes get as many. What is repeated comes last. Our own order repeats nothing; but
    where none of a batch's images can be read, it has another one stand in for them. A process that could read none of
    its images counts its last stand-in: all have to have something to log.
    """
    trainer = module._trainer
    if trainer is None:
        return batch
    loader = loaders.nth(trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders, dataloader_idx)
    if readable(loader, batch_idx) == []:
        count = loaders.counts(trainer)[dataloader_idx]
        last = batch_idx + 1 == count and not any(readable(loader, i) for i in range(batch_idx))
        return batch if last else None
    if trainer.world_size == 1:
        return batch
    batch_sampler: Any = getattr(loader, "batch_sampler", None)
    sampler: Any = getattr(batch_sampler, "sampler", None)  # where Lightning has put it
    if not isinstance(sampler, DistributedSampler) or not hasattr(batch_sampler, "batch_size"):
        return batch
    dataset: Any = sampler.dataset
    own = len(range(sampler.rank, len(dataset), sampler.num_replicas))
    count = own - batch_idx * batch_sampler.batch_size
    if count >= batch_sampler.batch_size or not own:  # with fewer samples than processes, one has to be counted twice
        return batch
    if count <= 0:
        return None
    batch = by_name(batch)
    if isinstance(batch, Mapping):
        return {key: _cut(part, count) for key, part in batch.items()}
    if isinstance(batch, list | tuple) and not _is_list_of_images(batch):
        return [_cut(part, count) for part in batch]
    return _cut(batch, count)


def _cut(part: Any, count: int) -> Any:
    """The first of what a batch has for each of its samples; what it has for all of them as it is."""
    has_rows = isinstance(part, list | tuple) or (isinstance(part, Tensor) and part.ndim > 0)
    return part[:count] if has_rows else part
