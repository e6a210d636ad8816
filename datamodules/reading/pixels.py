"""Pixels of one image in a loader's worker, a PIL image or a uint8 tensor (C, H, W), and resizing of both.

Pillow resizes PIL images, torch resizes tensors: its bilinear and bicubic filters are Pillow's, rounded in other places
(by one level, seldom two). Its nearest is another one, and lanczos it has in its newest versions only: for these two,
tensors go through Pillow.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

Pixels = Image.Image | Tensor
ToTensor = Callable[[Pixels], Tensor]

_BY_TORCH = (v2.InterpolationMode.BILINEAR, v2.InterpolationMode.BICUBIC)


def height_and_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of an ``image_size``: a side in pixels, or both."""
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"image_size is {image_size}: expected a side in pixels, or height and width")
    return size


def size_of(image: Pixels) -> tuple[int, int]:
    """Height and width of a PIL image, whose own ``size`` is the other way round, or of a tensor (C, H, W)."""
    return (image.height, image.width) if isinstance(image, Image.Image) else (image.shape[-2], image.shape[-1])


def as_image(image: Pixels) -> Image.Image:
    """Converts uint8 (1 or 3, H, W) to a PIL image, grey or RGB; a PIL image stays what it is."""
    if isinstance(image, Image.Image):
        return image
    return Image.fromarray(np.ascontiguousarray((image[0] if len(image) == 1 else image.permute(1, 2, 0)).numpy()))


def as_tensor(image: Pixels) -> Tensor:
    """Converts a grey or RGB image to uint8 (1 or 3, H, W); a tensor stays what it is."""
    return v2.functional.pil_to_tensor(image) if isinstance(image, Image.Image) else image


def planes(image: Pixels) -> Tensor:
    """An image as batches hold it: uint8 (C, H, W), one channel after the other.

    By NumPy, which is twice as quick at it as torch, be it here or when a batch is put together.
    """
    if isinstance(image, Tensor) and image.is_contiguous():
        return image
    pixels = np.asarray(image) if isinstance(image, Image.Image) else image.permute(1, 2, 0).numpy()
    return torch.from_numpy(np.array(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1), order="C"))


def resize(image: Pixels, height: int, width: int, interpolation: v2.InterpolationMode) -> Pixels:
    """Resizes an image. At the size it has, a tensor comes back as it is, also as a view."""
    if isinstance(image, Image.Image):
        return v2.functional.resize(image, [height, width], interpolation)
    if (height, width) == tuple(image.shape[-2:]):
        return image
    if interpolation not in _BY_TORCH:
        return as_tensor(v2.functional.resize(as_image(image), [height, width], interpolation))
    if len(image) > 1:  # torch's quick filter wants the channels of a pixel side by side, and a crop without gaps
        image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return v2.functional.resize_image(image, [height, width], interpolation, antialias=True)


def covering(size: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """Height and width of the smallest size with an image's aspect that covers ``size``, a height and a width."""
    (old_height, old_width) = size
    if old_width * height >= old_height * width:  # wider than what it has to cover
        return height, max(width, height * old_width // old_height)
    return max(height, width * old_height // old_width), width


def owned(pixels: Tensor, source: Tensor | None) -> Tensor:
    """Pixels in memory of their own, where they were those of ``source``, which nobody may write to."""
    same = source is not None and pixels.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
    return pixels.clone(memory_format=torch.contiguous_format) if same else pixels
