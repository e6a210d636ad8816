"""Conversations beside images: what a sample and a batch say of the images that are theirs, and the hop to the device.

A sample is ``(images, dict)``: one image (C, H, W), several (K, C, H, W), or a list of K images of any sizes, K from 0;
the dict has ``turns``, ``[[prompt, answer], ...]``, and what else is known, as plain Python values. A batch is
``(images, conversations)``: all images of its samples, one after another, and the dicts, each with ``images``, its K.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from datamodules._lightning import LightningDataModule
from datamodules.loading.any_size import FlatImages, collate_flat

IMAGE_PLACE = "<image>"
"""Mark in a prompt where an image stands."""

Said = dict[str, Any]
"""``{"turns": [[prompt, answer], ...], ...}``, plain Python values: what a data module knows of one sample."""


def collate(
    samples: Sequence[Any],
    others: Callable[[list[Any]], Any] = default_collate,
    flat: bool = False,
    shape: tuple[int, int, int] | None = None,
) -> Any:
    """Batch ``(images (N, C, H, W), B dicts)`` of samples ``(images, dict)``, N images of B samples.

    Args:
        samples: Those of another form are put together by ``others``.
        others: What puts them together.
        flat: Whether images come as FlatImages, whatever their sizes; otherwise where they differ in size.
        shape: (C, H, W) of a batch that has no image at all, if no sample says it.
    """
    first = samples[0]
    if not (isinstance(first, tuple) and len(first) == 2 and isinstance(first[1], dict)):
        return others(list(samples))
    parts = [_listed(images) for images, _ in samples]
    said = [{**each, "images": len(part)} for part, (_, each) in zip(parts, samples, strict=True)]
    images = [image for part in parts for image in part]
    if not images:
        empty = next((each for each, _ in samples if isinstance(each, Tensor)), torch.empty(0, *(shape or (3, 1, 1))))
        empty = empty.to(torch.uint8)
        return (FlatImages(empty.new_empty(empty.shape[1], 0), []) if flat else empty), said
    if flat or any(image.shape != images[0].shape for image in images):
        return FlatImages.of(images), said
    return torch.stack(images), said


def _listed(images: Any) -> list[Tensor]:
    """The images (C, H, W) of a sample."""
    if not isinstance(images, Tensor):
        return list(images)
    return [images] if images.ndim == 3 else list(images)


class Conversed(LightningDataModule):
    """Mixin of data modules with conversations, in front of :class:`datamodules.base.ImageDataModule`.

    A subclass says its ``image_shape``, (C, H, W) or None, which a batch without any image has, too.
    The hop takes the images alone. Of thousands of dicts, Lightning would look through every text for tensors to copy,
    which takes longer than a step's other work on the host.
    """

    any_size = False
    """True where images travel as FlatImages; with a ``token_budget`` they always do."""

    image_shape: Any
    token_budget: int | None

    def collate(self) -> Any:
        flat = self.any_size or self.token_budget is not None
        others = collate_flat if flat else super().collate()  # type: ignore[misc]
        return partial(collate, others=others, flat=flat, shape=self.image_shape)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        moved = super().transfer_batch_to_device(_pixels(batch), device, dataloader_idx)
        return (moved, batch[1]) if _has_conversations(batch) else moved

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        made = super().on_after_batch_transfer(_pixels(batch), dataloader_idx)
        return (made, batch[1]) if _has_conversations(batch) else made


def _has_conversations(batch: Any) -> bool:
    """True for a batch as :func:`collate` makes it of conversations."""
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[0], Tensor | FlatImages | list)):
        return False
    return isinstance(batch[1], list) and bool(batch[1]) and isinstance(batch[1][0], dict)


def _pixels(batch: Any) -> Any:
    """The images of such a batch; another one as it is."""
    return batch[0] if _has_conversations(batch) else batch
