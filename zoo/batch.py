"""What a batch may look like: torchvision's ``(images, labels)``, a bare tensor of images, or a dict of either.

Images are float tensors (B, C, H, W); labels are int64 (B,), or for several labels an image (B, classes) of 0 and 1.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

IMAGE_KEYS = ("image", "images", "pixel_values")
LABEL_KEYS = ("label", "labels")


def images(batch: Any) -> Tensor:
    """The images of a batch, float (B, C, H, W).

    Raises:
        ValueError: If there are none, or if they are uint8: somebody has to turn them into normalised floats first.
    """
    found = batch
    if isinstance(batch, Mapping):
        found = _first(batch, IMAGE_KEYS)
    elif isinstance(batch, list | tuple) and batch:
        found = batch[0]
    if not isinstance(found, Tensor) or found.ndim != 4:
        raise ValueError(f"expected images (B, C, H, W) in the batch, got {_describe(found)}")
    if not found.is_floating_point():
        raise ValueError(
            f"the images are {found.dtype}: normalised floats are expected "
            "(the zoo's data modules make them in on_after_batch_transfer)"
        )
    return found


def images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    """Images, float (B, C, H, W), and their labels.

    Raises:
        ValueError: If the batch carries no labels.
    """
    found: Any = None
    if isinstance(batch, Mapping):
        found = _first(batch, LABEL_KEYS)
    elif isinstance(batch, list | tuple) and len(batch) > 1:
        found = batch[1]
    if not isinstance(found, Tensor):
        raise ValueError(f"expected (images, labels), got {_describe(batch)}: this module learns from labels")
    return images(batch), found if found.ndim > 1 else found.to(torch.int64)


def has_labels(batch: Any) -> bool:
    """Whether a batch carries labels beside its images."""
    if isinstance(batch, Mapping):
        return any(key in batch for key in LABEL_KEYS)
    return isinstance(batch, list | tuple) and len(batch) > 1


def _first(batch: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    for key in keys:
        if key in batch:
            return batch[key]
    raise ValueError(f"the batch has the keys {sorted(batch)}: expected one of {', '.join(keys)}")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{type(value).__name__}"
