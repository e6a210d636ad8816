"""Decoding of one image file to 8-bit pixels: upright, grey or RGB, whatever the file holds.

How the less usual kinds are read:

- EXIF orientation is applied.
- Transparency (alpha channel, palette, colour key) lies over white.
- 16-bit grey is divided by 257, so that 65535 becomes 255. 32-bit integers count as 16-bit ones; floats are expected in
  [0, 1]. Other values of these two raise, since what is white in them would be a guess.
- CMYK and other colour spaces become RGB by Pillow's conversion, without colour profiles.
- Of animations and pages the first counts.

An image of more pixels than ``PIL.Image.MAX_IMAGE_PIXELS`` (89 million) is an error before any of them is decoded;
whoever has larger ones sets that number. Truncated files are errors. A file is only ever opened as one of the formats
below: Pillow knows others, PostScript among them, which it would hand to an outside program.
"""

import functools
import os
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS

EXTENSIONS = (*IMG_EXTENSIONS, ".jpe", ".jfif", ".gif", ".pbm", ".pnm", ".jp2", ".avif")
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImageError(ValueError):
    """An image file that cannot be read. Its message is one line with the path and the reason."""


def decode(path: str | os.PathLike[str], channels: int = 3) -> Image.Image:
    """Reads an image file as 8-bit grey (``channels=1``) or RGB (``channels=3``), upright.

    Raises:
        UnreadableImageError: If the file is missing, empty, truncated, broken, far too large, or not an image.
    """
    try:
        # An open file, not a path: Pillow 13 maps a path into memory, and scrambles an uncompressed TIFF that way
        # if its orientation swaps the sides.
        with open(path, "rb") as file, Image.open(file, formats=_known_formats()) as image:
            return loaded(image, channels)
    except Exception as error:  # on broken files Pillow's readers raise nearly anything
        raise UnreadableImageError(f"{os.fspath(path)} cannot be read: {reason(path, error)}") from error


def loaded(image: Image.Image, channels: int) -> Image.Image:
    """An opened image, read now, as 8-bit grey (``channels=1``) or RGB (``channels=3``), upright; always a copy.

    It raises whatever Pillow does where that fails.
    """
    _check_size(image)
    image.load()
    return convert(_upright(image), channels)


def _check_size(image: Image.Image) -> None:
    """Refuses images above Pillow's limit, of which Pillow only warns up to twice that."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise Image.DecompressionBombError(f"it has {image.width} x {image.height} pixels, over Pillow's {limit:,}")


def convert(image: Image.Image, channels: int) -> Image.Image:
    """A loaded image as 8-bit grey (``channels=1``, mode L) or RGB (``channels=3``); always a copy.

    Raises:
        ValueError: For another number of channels, and for integers or floats out of range.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}: expected 1 (grey) or 3 (RGB)")
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(to_8_bit(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    converted = image.convert("L" if channels == 1 else "RGB")
    converted.info.clear()  # of the pixels as they were: who reads it would turn them once more
    return converted


def to_8_bit(pixels: np.ndarray) -> np.ndarray:
    """Levels of 16-bit integers, or of floats in [0, 1], as uint8. Raises ValueError for others."""
    white = 1 if pixels.dtype.kind == "f" else 65535
    low, high = pixels.min(), pixels.max()
    if not (low >= 0 and high <= white):  # so that NaN is out of range as well
        raise ValueError(f"its {pixels.dtype} pixels run from {low} to {high}, expected 0 to {white}")
    return (pixels * (255 / white)).round().astype(np.uint8)


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation; Pillow's exif_transpose also rewrites the metadata, and fails if it is broken."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # unreadable metadata say nothing about the pixels, which are there
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def header_size(path: str | os.PathLike[str], upright: bool = True) -> tuple[int, int]:
    """Height and width of an image file by its header, turned upright if ``upright`` says so.

    Raises:
        UnreadableImageError: If the file is missing, empty, far too large, or not an image.
    """
    try:
        with open(path, "rb") as file, Image.open(file, formats=_known_formats()) as image:
            _check_size(image)
            turned = upright and _swaps_sides(image)
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception as error:  # as above
        raise UnreadableImageError(f"{os.fspath(path)} cannot be read: {reason(path, error)}") from error


def is_turned(path: str | os.PathLike[str]) -> bool:
    """True where the EXIF orientation of a file exchanges its sides."""
    try:
        with open(path, "rb") as file, Image.open(file, formats=_known_formats()) as image:
            return _swaps_sides(image)
    except Exception:  # as above
        return False


def _swaps_sides(image: Image.Image) -> bool:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except Exception:  # unreadable metadata, as above
        return False


def reason(path: str | os.PathLike[str], error: Exception) -> str:
    """Reason for which an image could not be read, without its path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, Image.DecompressionBombError):
        return (
            f"{str(error).rstrip('.')}: PIL.Image.MAX_IMAGE_PIXELS, {Image.MAX_IMAGE_PIXELS:,}, is what may be decoded"
        )
    if isinstance(error, UnidentifiedImageError):
        return "it is empty" if Path(path).stat().st_size == 0 else "it is no image of a known format"
    return " ".join(str(error).split()) or type(error).__name__


@functools.cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # AVIF came with Pillow 11.3
