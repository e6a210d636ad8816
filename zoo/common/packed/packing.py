"""Images of any size as flat tokens: how they become patches, and which token belongs to which image.

Tokens (T, D) of all images lie one after another, without padding: of each image first the tokens that stand for no
patch (class token, registers), then its patches row by row. Lengths and grids are numbers on the host, as the loader
knows them, so that nothing waits for a device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple, Self

import torch
from torch import Tensor

Grid = tuple[int, int]
"""Rows and columns of patches."""


class Patches(NamedTuple):
    """Pixels of the patches of some images.

    Attributes:
        pixels: (T, P * P * C), image after image, each row by row; within a patch (row, column, channel).
        grids: Rows and columns of each image's patches.
    """

    pixels: Tensor
    grids: tuple[Grid, ...]


def patchify(images: Tensor | Sequence[Tensor], patch_size: int | tuple[int, int]) -> Patches:
    """Cuts images into patches of (height, width) pixels, or of squares.

    Args:
        images: (B, C, H, W), or B images (C, H, W) each of its own size.
        patch_size: Side of a patch, or its height and width.

    Raises:
        ValueError: For an image whose sides are not multiples of the patch's, or shorter than it; for no images.
    """
    height, width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    if not len(images):
        raise ValueError("there are no images: expected at least one")
    if isinstance(images, Tensor):
        if images.ndim != 4:
            raise ValueError(f"images are {tuple(images.shape)}: expected (B, C, H, W), or a list of (C, H, W)")
        grid = _grid(images[0], 0, height, width)
        cut = images.unflatten(3, (grid[1], width)).unflatten(2, (grid[0], height))
        return Patches(cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(0, 2), (grid,) * len(images))
    grids = tuple(_grid(image, index, height, width) for index, image in enumerate(images))
    cuts = [
        image.unflatten(2, (columns, width))
        .unflatten(1, (rows, height))
        .permute(1, 3, 2, 4, 0)
        .flatten(2)
        .flatten(0, 1)
        for image, (rows, columns) in zip(images, grids, strict=True)
    ]
    odd = next((index for index, cut in enumerate(cuts) if cut.shape[1] != cuts[0].shape[1]), None)
    if odd is not None:
        raise ValueError(f"image {odd} has {images[odd].shape[0]} channels, image 0 {images[0].shape[0]}: expected one")
    return Patches(torch.cat(cuts), grids)


def _grid(image: Tensor, index: int, height: int, width: int) -> Grid:
    if image.ndim != 3:
        raise ValueError(f"image {index} is {tuple(image.shape)}: expected (C, H, W)")
    rows, columns = image.shape[1] // height, image.shape[2] // width
    if not rows or not columns or image.shape[1:] != (rows * height, columns * width):
        size, patch = (f"{a}x{b}" for a, b in (tuple(image.shape[1:]), (height, width)))
        raise ValueError(
            f"image {index} is {size}: expected sides that are multiples of the patches' {patch}, as VisionTokenizer "
            "makes them"
        )
    return rows, columns


@dataclass(frozen=True)
class Packing:
    """Division of flat tokens among images.

    Attributes:
        counts: Patch tokens of each image.
        prefix: Tokens before each image's patches.
        grids: Rows and columns of each image's patches, where all are there; None once some were merged or dropped.
        sizes: How many patches each token stands for, (T,), once some were merged. None: one each.
    """

    counts: tuple[int, ...]
    prefix: int = 0
    grids: tuple[Grid, ...] | None = None
    sizes: Tensor | None = field(default=None, compare=False)

    @classmethod
    def of(cls, grids: Sequence[Grid], prefix: int = 0) -> Self:
        """The packing of whole grids.

        Raises:
            ValueError: For a grid without patches.
        """
        for index, (rows, columns) in enumerate(grids):
            if rows < 1 or columns < 1:
                raise ValueError(f"image {index} has {rows}x{columns} patches: expected at least one")
        return cls(tuple(rows * columns for rows, columns in grids), prefix, tuple(grids))

    def without_grids(self, counts: Sequence[int]) -> "Packing":
        """The packing of fewer patches of the same images."""
        return replace(self, counts=tuple(counts), grids=None, sizes=None)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each image."""
        return tuple(self.prefix + count for count in self.counts)

    @property
    def total(self) -> int:
        """Number T of tokens."""
        return sum(self.lengths)

    @property
    def starts(self) -> tuple[int, ...]:
        """Index of each image's first token."""
        return tuple(accumulate(self.lengths[:-1], initial=0))

    def check(self, tokens: Tensor) -> None:
        """Raises ValueError for tokens of another number."""
        if len(tokens) != self.total:
            raise ValueError(
                f"there are {len(tokens)} tokens for {len(self.counts)} images of {self.total} tokens in all: expected "
                "as many"
            )

    def owners(self, device: torch.device) -> Tensor:
        """Index of the image that each token belongs to, int64 (T,)."""
        lengths = torch.tensor(self.lengths)
        owners = torch.arange(len(self.lengths)).repeat_interleave(lengths, output_size=self.total)
        return owners.to(device, non_blocking=True)

    def patch_indices(self, device: torch.device) -> Tensor:
        """Indices of the tokens that stand for patches, int64 (T - B * prefix,)."""
        if not self.prefix:
            return torch.arange(self.total, device=device)
        counts = torch.tensor(self.counts)
        skipped = self.prefix * (1 + torch.arange(len(counts)).repeat_interleave(counts))
        return (torch.arange(int(counts.sum())) + skipped).to(device, non_blocking=True)

    def with_prefix(self, patches: Tensor, prefix: Tensor) -> Tensor:
        """Tokens (T, D) of patch tokens (T - B * prefix, D) and what comes before each image's, (prefix, D)."""
        if not self.prefix:
            return patches
        images = len(self.counts)
        first = torch.tensor(self.starts)[:, None] + torch.arange(self.prefix)
        order = torch.empty(self.total, dtype=torch.int64)
        order[first.flatten()] = torch.arange(images * self.prefix)
        order[self.patch_indices(order.device)] = torch.arange(len(patches)) + images * self.prefix
        every = torch.cat([prefix.to(patches.dtype).repeat(images, *[1] * (prefix.ndim - 1)), patches])
        return every[order.to(patches.device, non_blocking=True)]

    def without_prefix(self, tokens: Tensor) -> tuple[Tensor, "Packing"]:
        """Tokens (T - B * prefix, D) that stand for patches, and their packing, of tokens (T, D)."""
        if not self.prefix:
            return tokens, self
        if len(set(self.counts)) == 1:  # images of one size need no indices

            def kept(each: Tensor) -> Tensor:
                return each.unflatten(0, (len(self.counts), -1))[:, self.prefix :].flatten(0, 1)
        else:
            indices = self.patch_indices(tokens.device)

            def kept(each: Tensor) -> Tensor:
                return each[indices]

        sizes = None if self.sizes is None else kept(self.sizes)
        return kept(tokens), replace(self, prefix=0, sizes=sizes)

    def split(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Tokens of each image, (lengths[i], D)."""
        return tokens.split(self.lengths)

    def mean(self, tokens: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean of each image's patch tokens (B, D), in float32 at least.

        Args:
            tokens: (T, D).
            weights: Of each token, (T,): how many patches it stands for. None: all alike.
        """
        kept, owners = self.patch_indices(tokens.device), self.owners(tokens.device)
        if self.prefix:
            tokens, owners = tokens[kept], owners[kept]
        tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        if weights is None:
            weights = tokens.new_ones(len(tokens))
        elif self.prefix:
            weights = weights[kept]
        sums = tokens.new_zeros(len(self.counts), tokens.shape[1]).index_add(0, owners, tokens * weights[:, None])
        return sums / weights.new_zeros(len(self.counts)).index_add(0, owners, weights)[:, None]
