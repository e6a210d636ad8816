"""Captions beside images: what a sample and a batch say of each image, and the hop to the device."""

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.data import default_collate

from datamodules._lightning import LightningDataModule
from datamodules.loading.any_size import FlatImages

About = dict[str, Any]
"""``{"captions": list[str], ...}``, plain Python values: what a data module knows of one image beside its pixels."""


def about(captions: Sequence[str], draw: bool, **more: Any) -> About:
    """Entry of one image for a batch: its captions, or one of them, and whatever else is known.

    Args:
        captions: All captions of the image.
        draw: Whether one of them is drawn, from Python's generator, which the loader seeds for every sample.
        more: Further keys, such as ``image_id``.
    """
    return {"captions": [random.choice(captions)] if draw else list(captions), **more}


def collate(samples: Sequence[Any], images: Callable[[list[Any]], Any] = default_collate) -> Any:
    """Batch ``(images (B, C, H, W), B dicts)`` of samples ``(image, dict)``, whose values stay plain Python.

    Args:
        samples: Those of another form are put together by ``images``.
        images: What puts images together.
    """
    first = samples[0]
    if not (isinstance(first, tuple) and isinstance(first[1], dict)):
        return images(list(samples))
    return images([image for image, _ in samples]), [said for _, said in samples]


class Captioned(LightningDataModule):
    """Mixin of data modules with captions, in front of :class:`datamodules.base.ImageDataModule`.

    The hop takes the images alone. Of thousands of dicts, Lightning would look through every text for tensors to copy,
    which takes longer than a step's other work on the host.
    """

    def collate(self) -> Any:
        return partial(collate, images=super().collate())  # type: ignore[misc]  # of the data module that this is for

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        moved = super().transfer_batch_to_device(_pixels(batch), device, dataloader_idx)
        return (moved, batch[1]) if _has_captions(batch) else moved

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        made = super().on_after_batch_transfer(_pixels(batch), dataloader_idx)
        return (made, batch[1]) if _has_captions(batch) else made


def _has_captions(batch: Any) -> bool:
    """True for a batch as :func:`collate` makes it of captions."""
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[0], Tensor | FlatImages | list)):
        return False
    return isinstance(batch[1], list) and bool(batch[1]) and isinstance(batch[1][0], dict)


def _pixels(batch: Any) -> Any:
    """The images of such a batch; another one as it is."""
    return batch[0] if _has_captions(batch) else batch
