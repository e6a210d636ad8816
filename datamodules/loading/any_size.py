"""Images of any size in one batch: how many patches each gets, and batches of them, without padding.

What a sample gets is a function of its key and of the image's size, so that the order knows it before the image is read
(:mod:`datamodules.loading.budget`). In training its number of patches may be drawn anew each time: resolution sampling
(NaViT, Dehghani et al. 2023, arXiv 2307.06304, section 2.1), for which the side of a square of as many patches is drawn
uniformly. The aspect is kept, up to whole patches.

Deviations: NaViT's batches are several sequences, padded to one length; here a batch is one sequence, and nothing is
padded. Of the distributions of sizes that the paper compares, there is the uniform one of the side.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from datamodules.loading.order import Key, mixed
from datamodules.loading.seeding import with_transform
from datamodules.reading.pixels import Pixels, ToTensor, size_of


class Sizing(Protocol):
    """Sizes of samples as they are made: their attribute ``sizing``."""

    def tokens(self, samples: Any, epoch: int, copies: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Patches (N,) of samples with keys of this epoch, these copies (N,) and these indices (N,)."""

    def plans(self, samples: Any, keys: Sequence[Key]) -> Sequence[Any]:
        """Plans, not None, of how large the samples of a batch's keys are made."""

    def made(self, samples: Any, number: int, plan: Any) -> Any:
        """A sample by a plan, be it its own or that of one that it stands in for: with as many patches at most."""


class AnySize:
    """Sizing by images' own sizes, ``samples.sizes`` (N, 2), height and width.

    Args:
        patch_size: Side of a patch; the sides of images become multiples of it.
        tokens: Fewest and most patches. None: what the image has by itself, to the nearest patch.
        transform_of: Makes a transform to a height and a width.
        draws: Whether the number of patches is drawn from ``tokens``, or that of the image itself within them.
        seed: Seed of what is drawn.
    """

    def __init__(
        self,
        patch_size: int,
        tokens: tuple[int, int] | None,
        transform_of: Callable[[int, int], ToTensor],
        draws: bool = False,
        seed: int = 0,
    ) -> None:
        self.patch_size, self.range, self.transform_of = patch_size, tokens, transform_of
        self.draws, self.seed = draws, seed

    def tokens(self, samples: Any, epoch: int, copies: np.ndarray, indices: np.ndarray) -> np.ndarray:
        return self.grids(samples.sizes[indices], epoch, copies, indices).prod(1)

    def grids(self, sizes: np.ndarray, epoch: int, copies: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Rows and columns of patches (N, 2), of images of these sizes (N, 2)."""
        if self.range is None:
            return natural(sizes, self.patch_size)
        if self.draws:
            low, high = (bound**0.5 for bound in self.range)
            sides = low + (high - low) * uniform(self.seed, epoch, copies, indices)
            # Both ends come out whole: 3**0.5 squared is less than 3.
            most = np.clip(np.floor(sides**2 + 1e-9), *self.range)
            return fitted(sizes, most)
        natural_grids = natural(sizes, self.patch_size)
        tokens = natural_grids.prod(1)
        inside = (tokens >= self.range[0]) & (tokens <= self.range[1])
        return np.where(inside[:, None], natural_grids, fitted(sizes, tokens.clip(*self.range)))

    def plans(self, samples: Any, keys: Sequence[Key]) -> list[tuple[int, int, int]]:
        """Index, rows and columns of each key."""
        epoch, copies, indices = by_column(keys)
        grids = self.grids(samples.sizes[indices], epoch, copies, indices).tolist()
        return [(index, rows, columns) for index, (rows, columns) in zip(indices.tolist(), grids, strict=True)]

    def made(self, samples: Any, number: int, plan: tuple[int, int, int]) -> Any:
        index, rows, columns = plan
        if number != index:
            rows, columns = fitted(samples.sizes[[number]], np.array([rows * columns]))[0].tolist()
        return with_transform(samples, self._transform(rows, columns))[number]

    def evaluated(self, image: Pixels) -> Tensor:
        """One image as evaluation makes it."""
        first = np.zeros(1, dtype=np.int64)
        rows, columns = self.grids(np.array([size_of(image)]), 0, first, first)[0].tolist()
        return self._transform(rows, columns)(image)

    def _transform(self, rows: int, columns: int) -> ToTensor:
        return self.transform_of(rows * self.patch_size, columns * self.patch_size)


def by_column(keys: Sequence[Key]) -> tuple[int, np.ndarray, np.ndarray]:
    """Epoch, copies (N,) and indices (N,) of keys, which are all of one epoch."""
    epochs, copies, indices = np.array(keys, dtype=np.int64).T
    return int(epochs[0]), copies, indices


def natural(sizes: np.ndarray, patch_size: int) -> np.ndarray:
    """Rows and columns of patches (N, 2) nearest to images of these sizes (N, 2), at least one."""
    return np.maximum(1, np.rint(sizes / patch_size)).astype(np.int64)


def fitted(sizes: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Rows and columns of at most so many patches (N,), of the aspect of images of these sizes (N, 2).

    Both are rounded if that is not too many, or else rounded down.
    """
    height, width = sizes.T.astype(np.float64)
    exact = np.stack([(most * height / width) ** 0.5, (most * width / height) ** 0.5], axis=1)
    rounded = np.maximum(1, np.rint(exact))
    grids = np.where((rounded.prod(1) <= most)[:, None], rounded, np.maximum(1, np.floor(exact)))
    # Of a long and thin image one side is a patch already, and the other as long as may be.
    return np.minimum(grids, np.maximum(1, most[:, None] // grids[:, ::-1])).astype(np.int64)


def uniform(seed: int, epoch: int, copies: np.ndarray, indices: np.ndarray, draw: int = 0) -> np.ndarray:
    """Uniform draws (N,) in [0, 1), each by its key and the number of the draw."""
    return mixed(seed, epoch, copies, indices, draw) / 2.0**63


class FlatImages:
    """Images of any size in one tensor, on their way to the device: one copy, and one block of shared memory.

    A sequence of images (C, h, w), which are views. Lightning and a DataLoader move it as a whole, and no precision
    converts it.

    Args:
        pixels: (C, P), image after image, each row by row.
        sizes: Height and width of each.
    """

    def __init__(self, pixels: Tensor, sizes: Sequence[tuple[int, int]]) -> None:
        self.pixels, self.sizes = pixels, tuple(sizes)

    @classmethod
    def of(cls, images: Sequence[Tensor]) -> "FlatImages":
        """Puts images (C, h, w) together."""
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        return cls(torch.cat([image.flatten(1) for image in images], dim=1), sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.views(self.pixels))

    def __getitem__(self, index: int) -> Tensor:
        return self.views(self.pixels)[index]

    def views(self, pixels: Tensor) -> list[Tensor]:
        """Images (C, h, w) in other pixels (C, P) of the same order."""
        parts = pixels.split([height * width for height, width in self.sizes], dim=1)
        return [part.unflatten(1, size) for part, size in zip(parts, self.sizes, strict=True)]

    def to(self, device: torch.device) -> "FlatImages":
        # Lightning's own exceptions: where a copy that does not block is not safe.
        return FlatImages(self.pixels.to(device, non_blocking=device.type not in ("cpu", "mps")), self.sizes)

    def pin_memory(self) -> "FlatImages":
        return FlatImages(self.pixels.pin_memory(), self.sizes)


def collate_flat(samples: list[Any]) -> Any:
    """Batch ``(FlatImages, labels)`` of samples ``(image, label)``; of images alone, their FlatImages."""
    if isinstance(samples[0], Tensor):
        return FlatImages.of(samples)
    images, labels = zip(*samples, strict=True)
    return FlatImages.of(images), default_collate(list(labels))


def map_flat(batch: Any, function: Callable[[FlatImages], Any]) -> Any:
    """Applies a function to the FlatImages that a batch is, or has first."""
    if isinstance(batch, FlatImages):
        return function(batch)
    if isinstance(batch, list | tuple) and batch and isinstance(batch[0], FlatImages):
        return (function(batch[0]), *batch[1:])
    return batch


def check_any_size(options: Mapping[str, Any]) -> None:
    """Raises ValueError for options that do not go with batches by a budget of tokens, or are out of range."""
    budget, tokens, patch_size = options["token_budget"], options.get("tokens"), options["patch_size"]
    if patch_size < 1:
        raise ValueError(f"patch_size is {patch_size}: expected at least 1 pixel")
    if budget is None:
        if tokens is not None:
            raise ValueError(f"tokens is {tuple(tokens)} without a token_budget: set both, or neither (null)")
        return
    if budget < 1:
        raise ValueError(f"token_budget is {budget}: expected at least 1, or null")
    if tokens is not None and not (len(tokens) == 2 and 1 <= tokens[0] <= tokens[1] <= budget):
        raise ValueError(
            f"tokens is {tuple(tokens)}: expected the fewest and the most of an image, 1 <= low <= high <= "
            f"token_budget, {budget}"
        )
    for name, usual in (("cache", None), ("repeats", 1), ("balance", 0.0), ("drop_last", True)):
        if (value := options.get(name, usual)) != usual:
            raise ValueError(f"{name} is {value} with a token_budget: expected {usual}, or no token_budget (null)")
