"""Transforms to a height and a width that differ from image to image."""

from typing import Any

from torch import Tensor

from datamodules.reading.pixels import Pixels, ToTensor, planes, resize
from datamodules.transforms.samples import _interpolation, train_transform


class Crops:
    """Makes the training transform to a height and a width, with the random resized crop's ratio by their aspect.

    Args:
        options: Of :func:`datamodules.transforms.train_transform`.
    """

    kept = 256
    """Transforms that are kept for the next image of the same size."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self._made: dict[tuple[int, int], ToTensor] = {}

    def __call__(self, height: int, width: int) -> ToTensor:
        if (height, width) not in self._made:
            if len(self._made) >= self.kept:
                self._made.clear()
            ratio = tuple(bound * width / height for bound in self.options["ratio"])
            sized = {"image_size": (height, width), "ratio": ratio}
            self._made[height, width] = train_transform(**self.options | sized)
        return self._made[height, width]


class Whole:
    """Makes the evaluation transform to a height and a width: the whole image, resized."""

    def __init__(self, interpolation: str = "bicubic") -> None:
        self.interpolation = _interpolation(interpolation)

    def __call__(self, height: int, width: int) -> ToTensor:
        def transform(image: Pixels) -> Tensor:
            return planes(resize(image, height, width, self.interpolation))

        return transform
