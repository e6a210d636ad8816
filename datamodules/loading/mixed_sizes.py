"""Sizing of images that are rendered rather than read: side and aspect are drawn for each, by its key or its number."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from datamodules.loading.any_size import natural, uniform


class MixedSizes:
    """Heights and widths of rendered images, drawn by a sample's key in training and by its number in evaluation.

    Args:
        sizes: Least and greatest side, the square root of the area in pixels, drawn uniformly.
        aspects: Least and greatest width by height, drawn uniformly on a logarithmic scale.
        patch_size: Sides are rounded to multiples of this, 1 to pixels.
        numbers: Of each sample (N,), by which evaluation draws, the same in every run. None: training.
        seed: Seed of what is drawn.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        aspects: Sequence[float],
        patch_size: int,
        numbers: np.ndarray | None,
        seed: int,
    ) -> None:
        self.sizes, self.aspects, self.patch_size = sizes, aspects, patch_size
        self.numbers, self.seed = numbers, seed

    def tokens(self, samples: Any, epoch: int, copies: np.ndarray, indices: np.ndarray) -> np.ndarray:
        return self.patches(epoch, copies, indices)

    def patches(self, epoch: int, copies: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Patches (N,) of the images with these keys."""
        grids: np.ndarray = self.pixels(epoch, copies, indices) // self.patch_size
        return grids.prod(1)

    def pixels(self, epoch: int, copies: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Heights and widths (N, 2) of the images with these keys."""
        low, high = self.sizes
        sides = low + (high - low) * self.draw(0, epoch, copies, indices)
        flat, tall = math.log(self.aspects[0]), math.log(self.aspects[1])
        roots = np.exp((flat + (tall - flat) * self.draw(1, epoch, copies, indices)) / 2)
        return natural(np.stack([sides / roots, sides * roots], axis=1), self.patch_size) * self.patch_size

    def draw(self, draw: int, epoch: int, copies: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Uniform draws (N,) in [0, 1) for these keys: the first of 0 is of the side, 1 of the aspect."""
        if self.numbers is None:
            return uniform(self.seed, epoch, copies, indices, draw)
        return uniform(self.seed, 0, np.zeros_like(copies), self.numbers[indices], draw)


def check_mixed_sizes(
    sizes: Sequence[int] | None,
    aspects: Sequence[float],
    eval_sizes: Sequence[int] | None,
    eval_aspects: Sequence[float] | None,
    **others: bool,
) -> None:
    """Raises ValueError for sizes or aspects out of range, and for those, or others by name, that need ``sizes``."""
    given = {"aspects": tuple(aspects) != (1.0, 1.0), "eval_sizes": eval_sizes, "eval_aspects": eval_aspects, **others}
    if sizes is None and (needing := [name for name, value in given.items() if value]):
        raise ValueError(f"sizes is null, with {' and '.join(needing)}: set sizes as well, [16, 40] say")
    for name, pair in (("sizes", sizes), ("eval_sizes", eval_sizes)):
        if pair is not None and not 1 <= pair[0] <= pair[1]:
            raise ValueError(f"{name} is {tuple(pair)}: expected two sides in pixels, 1 <= low <= high")
    for name, aspect in (("aspects", aspects), ("eval_aspects", eval_aspects)):
        if aspect is not None and not 0 < aspect[0] <= aspect[1]:
            raise ValueError(f"{name} is {tuple(aspect)}: expected two widths by heights, 0 < low <= high")
