"""Samples of a torchvision data set: opened by torchvision, or by torchcodec, or taken from a cache."""

from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from datamodules.reading import decoders
from datamodules.reading.cache import Cached
from datamodules.reading.headers import header_sizes
from datamodules.reading.images import UnreadableImageError, convert
from datamodules.reading.pixels import Pixels, ToTensor, as_tensor


class TorchvisionSamples(Cached):
    """Samples of a torchvision data set, all or some, as (uint8 image (C, H, W), label).

    With the decoder torchcodec, its plain JPEGs are not opened by torchvision; everything else still is.
    """

    def __init__(
        self,
        source: Any,
        name: str,
        indices: np.ndarray,
        transform: ToTensor,
        channels: int,
        decoder: decoders.Decoder = "pil",
    ) -> None:
        self.source, self.indices, self.transform, self.channels = source, indices, transform, channels
        self.decoder = decoder
        self.names = [f"{name}/{index}" for index in indices]
        self.labels = listed_labels(source)[indices]

    def __len__(self) -> int:
        return len(self.indices)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Height and width of each image, (N, 2): of sets in memory, all are alike; of files, from their headers."""
        if hasattr(self.source, "data"):
            image = self._opened(0)
            return np.tile(np.array([[image.height, image.width]]), (len(self), 1))
        # torchvision leaves images as they lie
        return header_sizes([self.path(i) for i in range(len(self))], upright=False, folder=self.sizes_folder)

    def path(self, index: int) -> str:
        return path_of(self.source, int(self.indices[index]))

    def from_source(self, index: int) -> Pixels:
        if self.decoder == "pil":
            return self._opened(index)
        pixels = decoders.plain_jpeg(self.path(index), self.channels)
        return as_tensor(self._opened(index)) if pixels is None else pixels

    def _opened(self, index: int) -> Image.Image:
        try:
            image, _ = self.source[int(self.indices[index])]
        # Pillow raises SyntaxError for some broken PNG files.
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise UnreadableImageError(f"{self.names[index]} cannot be read: {error}") from error
        return convert(image, self.channels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.made(index), int(self.labels[index])


def listed_labels(source: Any) -> np.ndarray:
    """A label for each sample; torchvision calls them differently from set to set."""
    for attribute in ("targets", "labels", "_labels"):
        if hasattr(source, attribute):
            return np.asarray(getattr(source, attribute))
    raise AttributeError(f"{type(source).__name__} has no list of labels: expected targets, labels or _labels")


def path_of(source: Any, index: int) -> str:
    """The file of a sample; torchvision keeps their list under different names."""
    for attribute in ("samples", "_image_files", "_images"):
        if hasattr(source, attribute):
            found = getattr(source, attribute)[index]
            return str(found[0] if isinstance(found, tuple) else found)
    raise AttributeError(f"{type(source).__name__} has no list of files: expected samples, _image_files or _images")
