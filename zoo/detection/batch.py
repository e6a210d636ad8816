"""Sizes and names of images, as a detector's batch says them."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from zoo.common import batch as batches


def images_and_sizes(batch: Any) -> tuple[Tensor, list[tuple[int, int]], list[tuple[int, int]]]:
    """Images, and the (height, width) of each before padding and before resizing, where the batch says so."""
    images, about = batches.images(batch), batches.about_images(batch)  # also where there are sizes, but no boxes
    whole = (images.shape[2], images.shape[3])
    sizes = [_pair(each.get("size", whole)) for each in about]
    return images, sizes, [_pair(each.get("orig_size", size)) for each, size in zip(about, sizes, strict=True)]


def image_id_of(about: Mapping[str, Any], otherwise: int | None = None) -> Any:
    """An image's ``image_id``, out of a tensor or an array of one; its number where it has none."""
    image_id = about.get("image_id")
    if image_id is None:
        return otherwise
    return image_id.item() if hasattr(image_id, "item") and math.prod(image_id.shape) == 1 else image_id


def _pair(size: Any) -> tuple[int, int]:
    height, width = size.tolist() if isinstance(size, Tensor) else size
    return int(height), int(width)
