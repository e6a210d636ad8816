"""Decoders of image files: Pillow, which reads every format, or torchcodec, which is quicker at JPEGs.

torchcodec gets plain JPEGs only: 8 bits, grey or three channels, upright as they are, within Pillow's limit of pixels.
Everything else, and whatever it fails at, goes to Pillow, which then also says what is wrong with a file. So both
decoders read the same files and refuse the same ones. Their pixels are those of one library, libjpeg-turbo: equal, or a
level apart where the packages bring different versions of it.
"""

import functools
import os
import re
from importlib import import_module
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from datamodules.reading.images import decode
from datamodules.reading.pixels import Pixels, as_image, as_tensor

Decoder = Literal["pil", "torchcodec"]

LARGEST_FILE = 2**26
"""Bytes of a file that is read as a whole; of larger ones Pillow reads what it needs."""

_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive; all with Huffman codes
_PASSED = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}  # tables, comments, what applications add
_UPRIGHT = (b"\x12\x01\x03\x00\x01\x00\x00\x00\x01\x00", b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x01")
_TURNED = re.compile(rb"\x12\x01[\x00-\x0f]\x00|\x01\x12\x00[\x00-\x0f]")  # the tag of orientation and its type


def check(decoder: str) -> None:
    """Raises an error for a decoder that is unknown (ValueError) or cannot be had here (ImportError)."""
    if decoder not in (choices := get_args(Decoder)):
        raise ValueError(f"unknown decoder {decoder!r}: expected {' or '.join(choices)}")
    if decoder == "torchcodec":
        _torchcodec()


def read(path: str | os.PathLike[str], channels: int = 3, decoder: str = "pil") -> Pixels:
    """An image file as 8-bit grey (``channels=1``) or RGB (``channels=3``), upright.

    Returns:
        A PIL image under the decoder ``pil``, and uint8 (channels, H, W) under ``torchcodec``, whatever the format.

    Raises:
        UnreadableImageError: If the file is missing, empty, truncated, broken, far too large, or not an image.
    """
    if decoder == "pil":
        return decode(path, channels)
    pixels = plain_jpeg(path, channels)
    return as_tensor(decode(path, channels)) if pixels is None else pixels


def plain_jpeg(path: str | os.PathLike[str], channels: int = 3) -> Tensor | None:
    """The pixels of a plain JPEG by torchcodec, uint8 (channels, H, W). None if it is not plain, or not whole."""
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if not 0 < size <= LARGEST_FILE:
                return None
            content = bytearray(size)
            if file.readinto(content) != size:
                return None
        components = _plain(content)
        if components is None:
            return None
        encoded = torch.frombuffer(content, dtype=torch.uint8)
        grey = channels == components == 1
        pixels = _torchcodec().decode_jpeg(encoded, mode="GRAY" if grey else "RGB")
    except Exception:  # Pillow is asked next, and says what is wrong in the usual words
        return None
    if channels == 1 and not grey:
        return as_tensor(as_image(pixels).convert("L"))  # Pillow's grey: a JPEG's own is that before it was clipped
    return pixels


def _plain(content: bytearray) -> int | None:
    """Channels of a JPEG that torchcodec may decode; None if it has to be Pillow.

    Goes from segment to segment as libjpeg does, and gives up wherever a file is not as simple as most are. Metadata of
    a camera is hidden in ``content``, so that nobody turns an image by what it says.
    """
    position, end, metadata = 2, len(content), 0
    components: int | None = None
    if content[:2] != b"\xff\xd8":
        return None
    while position + 4 <= end and content[position] == 0xFF:
        marker = content[position + 1]
        segment = content[position + 4 : position + 2 + (content[position + 2] << 8 | content[position + 3])]
        if marker == 0xDA:  # the pixels
            return components
        if marker in _FRAMES and components is None:
            components = _components(segment)
            if components is None:
                return None
        elif marker not in _PASSED:
            return None
        if marker == 0xE2 and segment.startswith(b"MPF\0"):  # several images
            return None
        if marker == 0xE1:
            metadata += segment.startswith(b"Exif")
            if metadata > 1 or not _is_upright(bytes(segment)):
                return None
            content[position + 1] = 0xEF  # what nobody reads
        position += 4 + len(segment)
    return None


def _components(frame: bytearray) -> int | None:
    """Number of channels in a frame's header, which holds bits, height, width and channels; None if it is not plain."""
    if len(frame) < 6 or frame[0] != 8 or frame[5] not in (1, 3):
        return None
    pixels = int.from_bytes(frame[1:3]) * int.from_bytes(frame[3:5])
    limit = Image.MAX_IMAGE_PIXELS
    return frame[5] if pixels > 0 and (limit is None or pixels <= limit) else None


def _is_upright(segment: bytes) -> bool:
    """True where metadata, in EXIF or XMP, surely name no orientation but the usual one."""
    for entry in _UPRIGHT:
        segment = segment.replace(entry, b"")
    return not _TURNED.search(segment) and b"rientation" not in segment


@functools.cache
def _torchcodec() -> Any:
    # By name, since it is an extra: who does not ask for it need not have it.
    try:
        return import_module("torchcodec.decoders")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("torchcodec"):
            raise
        raise ImportError(
            "decoder torchcodec needs a package that is not installed: pip install 'vision-zoo[fast]'"
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ImportError(f"decoder torchcodec cannot be used, its package does not load: {reason}") from error
