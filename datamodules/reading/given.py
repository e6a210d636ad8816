"""Images that are given by a path, as PIL images, arrays or tensors: the pixels that a file of them would have."""

import os

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.reading import decoders
from datamodules.reading.images import UnreadableImageError, convert, loaded, reason, to_8_bit
from datamodules.reading.pixels import Pixels, as_tensor

Given = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor

EXPECTED = "expected pixels, uint8 from 0 to 255, uint16 (grey) from 0 to 65535 or floats from 0 to 1"


def pixels(image: Given, channels: int = 3, decoder: str = "pil") -> Pixels:
    """An image as 8-bit grey (``channels=1``) or RGB (``channels=3``), upright; transparency lies over white.

    Args:
        image: A file's path; a PIL image, turned by its EXIF orientation; an array (H, W) or (H, W, 1, 3 or 4); a
            tensor (1, 3 or 4, H, W). Four channels are RGB and alpha. Arrays and tensors hold uint8, uint16 where they
            are grey, or floats in [0, 1].
        channels: 1 or 3.
        decoder: See :func:`datamodules.reading.decoders.read`, which also says what comes back.

    Raises:
        UnreadableImageError: If a file, or what a PIL image was opened from, cannot be read.
        TypeError: For something else than these.
        ValueError: For an array or a tensor of another shape, dtype or range.
    """
    if isinstance(image, str | os.PathLike):
        return decoders.read(image, channels, decoder)
    if isinstance(image, Image.Image):
        made = _opened(image, channels)
    elif isinstance(image, Tensor):
        made = convert(_of_array(_of_tensor(image), "tensor"), channels)
    elif isinstance(image, np.ndarray):
        if image.ndim != 2 and not (image.ndim == 3 and image.shape[2] in (1, 3, 4)):
            raise ValueError(
                f"the array has the shape {image.shape}: expected one image, (H, W) or (H, W, C) of 1, 3 or 4 channels"
            )
        made = convert(_of_array(image, "array"), channels)
    else:
        raise TypeError(f"an image is a {type(image).__name__}: expected a path, a PIL image, an array or a tensor")
    return made if decoder == "pil" else as_tensor(made)


def _opened(image: Image.Image, channels: int) -> Image.Image:
    """A PIL image's pixels, which Pillow may have to read now."""
    path = vars(image).get("filename")
    try:
        if path:  # without it, Pillow 13 does not map the file into memory: see images.py
            image.filename = ""  # type: ignore[attr-defined]
        return loaded(image, channels)
    except Exception as error:  # as for files
        name = os.fspath(path) if path else "a PIL image"
        raise UnreadableImageError(f"{name} cannot be read: {reason(name, error)}") from error
    finally:
        if path:
            image.filename = path  # type: ignore[attr-defined]


def _of_tensor(image: Tensor) -> np.ndarray:
    """A tensor (C, H, W) as an array (H, W, C)."""
    if image.ndim != 3 or image.shape[0] not in (1, 3, 4):
        shape = tuple(image.shape)
        raise ValueError(f"the tensor has the shape {shape}: expected one image, (C, H, W) of 1, 3 or 4 channels")
    if not image.is_floating_point() and image.dtype not in (torch.uint8, torch.uint16):
        raise ValueError(f"the tensor holds {image.dtype}: {EXPECTED}")
    image = image.detach().cpu()
    return (image.float() if image.dtype.itemsize < 4 and image.is_floating_point() else image).permute(1, 2, 0).numpy()


def _of_array(image: np.ndarray, name: str) -> Image.Image:
    """An array (H, W) or (H, W, C) as an image of 8 bits."""
    grey = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
    if grey.size == 0:
        raise ValueError(f"the {name} has the shape {image.shape}: it holds no pixels")
    kind, size = grey.dtype.kind, grey.dtype.itemsize
    if (kind, size) != ("u", 1):
        if kind != "f" and not ((kind, size) == ("u", 2) and grey.ndim == 2):
            raise ValueError(f"the {name} holds {grey.dtype}, in {grey.ndim} dimensions: {EXPECTED}")
        try:
            grey = to_8_bit(grey.astype(np.float32) if (kind, size) == ("f", 2) else grey)
        except ValueError as error:
            raise ValueError(f"the {name} cannot be taken, {error}: {EXPECTED}, and not normalised") from None
    return Image.fromarray(np.ascontiguousarray(grey))
