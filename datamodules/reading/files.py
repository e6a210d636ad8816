"""Image files as samples, with or without labels, read from their files or from a cache of small copies."""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from datamodules.reading import decoders, listing
from datamodules.reading.cache import Cached
from datamodules.reading.headers import header_sizes
from datamodules.reading.images import UnreadableImageError
from datamodules.reading.pixels import Pixels, ToTensor

OnError = Literal["raise", "skip"]


class ImageFiles(Cached):
    """Image files as samples: uint8 images (C, H, W), or ``(image, label)``.

    Args:
        root: The folder that names are relative to.
        names: The files, with forward slashes.
        transform: An image to a uint8 tensor: a PIL image, or a uint8 tensor (C, H, W) from torchcodec or a cache.
        channels: 1 (grey) or 3 (RGB).
        labels: A label for each file; None for images alone.
        on_error: "raise" raises :class:`UnreadableImageError` for a file that cannot be read; "skip" gives None for it
            and marks it in ``unreadable``, which loader workers share with the main process.
        random: Whether the transform involves chance.
        decoder: "pil" or "torchcodec": see :func:`datamodules.reading.decoders.read`.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        names: Sequence[str] | np.ndarray,
        transform: ToTensor,
        channels: int = 3,
        labels: Sequence[int] | np.ndarray | None = None,
        on_error: OnError = "raise",
        random: bool = False,
        decoder: decoders.Decoder = "pil",
    ) -> None:
        self.root, self.transform, self.channels, self.random = Path(root), transform, channels, random
        self.decoder = decoder
        # As arrays: a list's million strings would be copied into every worker, by the counting of references to them.
        self.names = np.asarray(names, dtype=np.str_)
        self.labels = None if labels is None else np.asarray(labels)
        self.unreadable: Tensor | None = None
        if on_error == "skip":
            self.unreadable = torch.zeros(len(names), dtype=torch.uint8).share_memory_()

    @classmethod
    def under(
        cls,
        root: str | os.PathLike[str],
        transform: ToTensor,
        channels: int = 3,
        on_error: OnError = "raise",
        decoder: decoders.Decoder = "pil",
    ) -> "ImageFiles":
        """All images under a folder, at any depth and sorted, or one image file; without labels.

        Raises:
            FileNotFoundError: If there is no such folder or file.
            ValueError: If the folder holds no images.
        """
        path = Path(root)
        if path.is_file():
            return cls(path.parent, [path.name], transform, channels, on_error=on_error, decoder=decoder)
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no such folder or image")
        return cls(path, listing.images_under(path), transform, channels, on_error=on_error, decoder=decoder)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Height and width of each image, upright, (N, 2), from the files' headers."""
        return header_sizes([self.path(i) for i in range(len(self))], True, self.unreadable, self.sizes_folder)

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])

    def from_source(self, index: int) -> Pixels:
        return decoders.read(self.path(index), self.channels, self.decoder)

    def __getitem__(self, index: int) -> Any:
        try:
            pixels = self.made(index)
        except UnreadableImageError:
            if self.unreadable is None:
                raise
            self.unreadable[index] = 1
            return None
        return pixels if self.labels is None else (pixels, int(self.labels[index]))
