"""Positions of patches for grids of all sizes: tables that are interpolated or looked up, and rotations.

``learned``
    A table of one grid, interpolated to each image's (Dosovitskiy et al. 2021, section 3.2).
``absolute``
    A table of rows and one of columns, added, by the patch's row and column themselves (NaViT, Dehghani et al. 2023,
    arXiv 2307.06304, section 2.1: factorised, absolute).
``fractional``
    The same tables, by where the patch lies on the image's side: interpolated to as many rows and columns as there are
    (the same, factorised, fractional; as NaFlexViT has it).
``none``
    No table.

Rotations of queries and keys (Su et al. 2021, arXiv 2104.09864) come beside each of them: half of the channels turn
with the row, half with the column (Qwen2-VL, Wang et al. 2024, arXiv 2409.12191). They are timm's.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import RotaryEmbeddingCat
from torch import Tensor

from zoo.common.packed.packing import Grid

Position = Literal["learned", "absolute", "fractional", "none"]


def interpolated(table: Tensor, grids: Sequence[Grid], mode: str = "bicubic", preserve_aspect: bool = False) -> Tensor:
    """Positions (T, D) of all grids' patches, from a table (rows, columns, D), interpolated in float32.

    Args:
        table: (rows, columns, D).
        grids: Of the images.
        mode: "bicubic" or "bilinear", both with antialiasing.
        preserve_aspect: Whether the table is stretched alike along both axes, to the longer one, and cut.
    """
    image = table.permute(2, 0, 1)[None].float()

    def resized(grid: Grid) -> Tensor:
        size = (max(grid), max(grid)) if preserve_aspect else grid
        if size == table.shape[:2]:
            found = table[: grid[0], : grid[1]]
        else:
            found = F.interpolate(image, size, mode=mode, antialias=True)[0].permute(1, 2, 0)[: grid[0], : grid[1]]
        return found.flatten(0, 1).to(table.dtype)

    return _of_each(grids, resized)


def looked_up(rows: Tensor, columns: Tensor, grids: Sequence[Grid]) -> Tensor:
    """Positions (T, D) as the sum of a row's and a column's, from tables (N, D) of both.

    Raises:
        ValueError: For an image with more rows or columns than the tables have.
    """
    for index, grid in enumerate(grids):
        if grid[0] > len(rows) or grid[1] > len(columns):
            raise ValueError(
                f"image {index} has {grid[0]}x{grid[1]} patches, but absolute positions reach "
                f"{len(rows)}x{len(columns)}: make it smaller, or take fractional or rotary positions"
            )
    return _of_each(grids, lambda grid: _sums(rows[: grid[0]], columns[: grid[1]]))


def stretched(rows: Tensor, columns: Tensor, grids: Sequence[Grid], preserve_aspect: bool = False) -> Tensor:
    """Positions (T, D) as the sum of a row's and a column's, from tables (N, D) that are stretched to the grid.

    Args:
        rows: (N, D).
        columns: (N, D).
        grids: Of the images.
        preserve_aspect: Whether both are stretched to the longer side, and cut.
    """

    def resized(grid: Grid) -> Tensor:
        height, width = (max(grid), max(grid)) if preserve_aspect else grid
        return _sums(_stretched(rows, height)[: grid[0]], _stretched(columns, width)[: grid[1]])

    return _of_each(grids, resized)


def _stretched(table: Tensor, length: int) -> Tensor:
    if length == len(table):
        return table
    return F.interpolate(table.T[None].float(), length, mode="linear")[0].T.to(table.dtype)


def _sums(rows: Tensor, columns: Tensor) -> Tensor:
    return (rows[:, None] + columns).flatten(0, 1)


def rotations(rotary: RotaryEmbeddingCat, grids: Sequence[Grid]) -> Tensor:
    """Sines and cosines (T, 2 * d) of all grids' patches, float32, for heads of d channels.

    They depend on row and column alone, so that a score depends on the difference of two places.
    """
    most = max(rows for rows, _ in grids), max(columns for _, columns in grids)
    every = rotary.get_embed(list(most)).unflatten(0, most)
    return _of_each(grids, lambda grid: every[: grid[0], : grid[1]].flatten(0, 1))


def unturned(width: int, device: torch.device) -> Tensor:
    """Sines and cosines (1, 2 * d) that leave a token as it is, for those that stand for no patch."""
    return torch.cat([torch.zeros(1, width, device=device), torch.ones(1, width, device=device)], dim=1)


def _of_each(grids: Sequence[Grid], made: Callable[[Grid], Tensor]) -> Tensor:
    """Rows of each grid, one after another, made once of equal grids."""
    found = {grid: made(grid) for grid in dict.fromkeys(grids)}
    return torch.cat([found[grid] for grid in grids])
