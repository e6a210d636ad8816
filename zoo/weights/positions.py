"""Position embeddings and tables of relative positions, from the source's grid of patches to the module's."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed, resample_abs_pos_embed_nhwc
from torch import Tensor

from zoo.weights.stated import Size, Stated

# Tokens before the patches, in the order that timm's networks have them, and what a person calls them.
TOKENS = {"cls_token": "class token", "dist_token": "distillation token", "reg_token": "register token"}
TABLE = "relative_position_bias_table"
SAY = "write it with zoo.weights.save, or put 'hyper_parameters': {'image_size': [H, W]} beside the weights in the file"


@dataclass(frozen=True)
class Grid:
    """Rows and columns of a source's patches, and what had to be assumed to know them."""

    size: Size
    assumed: str = ""


def find_grid(encoder: Any, theirs: Mapping[str, Tensor], stated: Stated) -> Grid | None:
    """The grid that a source's positions are of; None if nothing depends on one, or the encoder has none.

    It is what the source says; or else that of the images which timm's network of the encoder's name was trained on; or
    else a square, or the encoder's own. What the number of positions rules out is passed over.

    Args:
        encoder: The network to fill.
        theirs: The source's tensors, by the names that they have in the encoder.
        stated: What the source says.

    Raises:
        ValueError: If it cannot be known.
    """
    own = grid_of(encoder)
    ways = _ways(encoder, theirs, own) if own else []
    if own is None or not ways:
        return None
    kernels = theirs.get("patch_embed.proj.weight")
    kernel = (kernels.shape[2], kernels.shape[3]) if kernels is not None and kernels.ndim == 4 else None
    said = list(stated.grids(kernel))
    for grid in said:
        if any(way.fits(grid) for way in ways):
            return Grid(grid)
    # Sizes that stand alone may mean anything, and a network that was given as an object may have had another.
    of_network = stated.grid or ((stated.heads or stated.backbone) and stated.image)
    if said and of_network and "." not in (stated.backbone or ""):
        raise ValueError(f"says that its patches are {_by(said[0])}, which is not the number of its positions")
    config = getattr(encoder, "pretrained_cfg", None) or {}
    if config.get("input_size") and kernel:
        height, width = config["input_size"][-2:]
        grid = height // kernel[0], width // kernel[1]
        if any(way.fits(grid) for way in ways):
            return Grid(grid, "" if grid == own else _assumed(grid, "that of its network's own images"))
    for way in ways:
        square, alike = way.multiple((1, 1)), way.multiple((own[0] // math.gcd(*own), own[1] // math.gcd(*own)))
        if square and alike in (None, square):
            return Grid(square, "" if square == own else _assumed(square, "a square"))
        if way.fits(own) and not square:
            return Grid(own, _assumed(own, "as here"))
        if square and alike:
            either = f"{_by(square)} or {_by(alike)}"
            raise ValueError(f"does not say what grid its patches make, {either}, and here it is {_by(own)}: {SAY}")
    raise ValueError(f"does not say what grid its patches make, not a square, and here it is {_by(own)}: {SAY}")


def adapt(name: str, owner: Any, value: Tensor, target: Tensor, grid: Grid | None) -> Tensor | None:
    """Positions in the shape that the module has them in; None if they cannot be, or are of a kind not known.

    Positions (1, N, D) are resampled as timm does. The tokens before the patches keep theirs, as far as they are there;
    of what is here alone they are zero. Tables of relative positions are resampled by the offsets of rows and columns
    as BEiT's authors do it, which keeps near offsets as they are; the entries of the class token stay.

    Args:
        name: In the module.
        owner: The module that has it as its attribute.
        value, target: Here and there.
        grid: Of the source.
    """
    leaf = name.rpartition(".")[2]
    if leaf == TABLE and value.ndim == target.ndim:
        return _adapt_table(owner, value, target, grid)
    if value.ndim == target.ndim == 4:
        if value.shape[3] == target.shape[3] and value.shape[1] != target.shape[1]:
            return resample_abs_pos_embed_nhwc(value.float(), list(target.shape[1:3]))
        if value.shape[1] == target.shape[1]:
            resized = F.interpolate(value.float(), size=target.shape[2:], mode="bicubic", antialias=True)
            return value if value.shape == target.shape else resized
    own = grid_of(owner)
    if value.ndim != 3 or target.ndim != 3 or value.shape[-1] != target.shape[-1] or grid is None or own is None:
        return value if value.shape == target.shape else None
    had, has = value.shape[1] - math.prod(grid.size), target.shape[1] - math.prod(own)
    if had < 0 or has < 0:
        return None
    if grid.size == own and had == has:
        return value
    patches = resample_abs_pos_embed(value[:, had:].float(), list(own), list(grid.size), num_prefix_tokens=0)
    first = value[:, : min(had, has)].float()
    return torch.cat([F.pad(first, (0, 0, 0, has - first.shape[1])), patches], dim=1)


def fold(theirs: Mapping[str, Tensor], target: Tensor, encoder: Any, grid: Grid | None) -> dict[str, Tensor]:
    """Tokens with the positions that they have in a source added, where the encoder adds none: the same inputs."""
    positions, own = theirs.get("pos_embed"), grid_of(encoder)
    if positions is None or grid is None or own is None or positions.ndim != 3 or target.ndim != 3:
        return {}
    had, has = positions.shape[1] - math.prod(grid.size), target.shape[1] - math.prod(own)
    folded, start = {}, 0
    for token in TOKENS:
        if token not in theirs:
            continue
        count = theirs[token].shape[1]
        if has <= start and start + count <= had:
            folded[token] = theirs[token].float() + positions[:, start : start + count].float()
        start += count
    return folded


def grid_of(owner: Any) -> Size | None:
    """Rows and columns of the patches of an encoder, or of a decoder; None of a network without."""
    grid = getattr(getattr(owner, "patch_embed", owner), "grid_size", None)
    return tuple(grid) if isinstance(grid, list | tuple) and len(grid) == 2 else None


@dataclass(frozen=True)
class Way:
    """A meaning that a source's numbers may have.

    Attributes:
        patches: Positions of patches; None if it has none.
        table: Entries of a table of relative positions for offsets; None if it has none.
    """

    patches: int | None
    table: int | None

    def fits(self, grid: Size) -> bool:
        """True if a grid has as many positions and offsets."""
        return self.patches in (None, math.prod(grid)) and self.table in (None, offsets(grid))

    def multiple(self, shape: Size) -> Size | None:
        """The grid of a shape, k times as many rows and columns, that fits."""
        most = math.isqrt(max(self.patches or 0, self.table or 0))
        return next((grid for k in range(1, most + 1) if self.fits(grid := (k * shape[0], k * shape[1]))), None)


def _ways(encoder: Any, theirs: Mapping[str, Tensor], own: Size) -> list[Way]:
    """Meanings of what a source has of a grid, the likeliest first; nothing, if nothing depends on a grid.

    Some networks give the tokens before the patches no positions. It is likely that both do as the encoder does.
    """
    table = None
    for name, value in theirs.items():
        if name.endswith(TABLE) and value.ndim == 2:
            owner = encoder.get_submodule(name.rpartition(".")[0])
            if tuple(getattr(owner, "window_size", None) or ()) == own:
                table = len(value) - (len(getattr(owner, TABLE)) - offsets(own))
                break
    positions = theirs.get("pos_embed")
    if positions is None or positions.ndim != 3:
        return [Way(None, table)] if table is not None else []
    lengths = [theirs[token].shape[1] for token in TOKENS if token in theirs]
    before = sorted(accumulate(lengths, initial=0), reverse=encoder.pos_embed.shape[1] > math.prod(own))
    return [Way(positions.shape[1] - tokens, table) for tokens in before]


def offsets(grid: Size) -> int:
    """Number of offsets between the patches of a grid, of all rows and columns."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1)


def _adapt_table(owner: Any, value: Tensor, target: Tensor, grid: Grid | None) -> Tensor | None:
    """A table (offsets + extra, heads), or (heads, rows, columns), for another window of patches."""
    window = getattr(owner, "window_size", None)
    if window is None:
        return value if value.shape == target.shape else None
    new = window[0], window[1]
    if value.ndim == 3:
        shape = value.shape[0], 2 * new[0] - 1, 2 * new[1] - 1
        if value.shape == target.shape or shape != tuple(target.shape):
            return value if value.shape == target.shape else None
        old = (value.shape[1] + 1) // 2, (value.shape[2] + 1) // 2
        return _resample_offsets(value.float(), old, new)
    extra = len(target) - offsets(new)
    if value.ndim != 2 or value.shape[1] != target.shape[1] or extra < 0:
        return None
    if grid is not None and offsets(grid.size) == len(value) - extra:
        old = grid.size
    elif value.shape == target.shape:  # a window of patches within the grid
        return value
    else:
        side = math.isqrt(max(0, len(value) - extra))
        if side * side != len(value) - extra or not side % 2:
            return None
        old = (side + 1) // 2, (side + 1) // 2
    if old == new:
        return value
    maps = value[: len(value) - extra].float().T.unflatten(1, (2 * old[0] - 1, 2 * old[1] - 1))
    return torch.cat([_resample_offsets(maps, old, new).flatten(1).T, value[len(value) - extra :].float()])


def _resample_offsets(maps: Tensor, old: Size, new: Size) -> Tensor:
    """Maps (heads, 2 rows - 1, 2 columns - 1) of what each offset is worth, for another grid; linear between offsets.

    BEiT (Bao et al. 2022), its released code; timm does the same, for square grids.
    """
    rows, columns = (_weights(before, after) for before, after in zip(old, new, strict=True))
    return rows @ maps @ columns.T


def _weights(old: int, new: int) -> Tensor:
    """A matrix (2 new - 1, 2 old - 1) that interpolates between offsets whose distances grow geometrically.

    So neighbours stay neighbours, and the farthest offsets become the farthest. The ratio is sought as BEiT seeks it.
    """
    low, high, ratio = 1.01, 1.5, 1.0
    while high - low > 1e-6:
        ratio = (low + high) / 2
        reached = (ratio ** (old - 1) - 1) / (ratio - 1)
        low, high = (low, ratio) if reached > new - 1 else (ratio, high)
    far = (ratio ** torch.arange(old - 1, dtype=torch.float64)).cumsum(0)
    given = torch.cat([-far.flip(0), far.new_zeros(1), far])
    wanted = torch.arange(1 - new, new, dtype=torch.float64).clamp(given[0], given[-1])
    weights = torch.zeros(len(wanted), len(given), dtype=torch.float64)
    if old == 1:
        return torch.ones_like(weights).float()
    right = torch.searchsorted(given, wanted).clamp(1, len(given) - 1)
    share = (wanted - given[right - 1]) / (given[right] - given[right - 1])
    index = torch.arange(len(wanted))
    weights[index, right], weights[index, right - 1] = share, 1 - share
    return weights.float()


def _by(grid: Size) -> str:
    return f"{grid[0]}x{grid[1]}"


def _assumed(grid: Size, why: str) -> str:
    return f"positions taken as a grid of {_by(grid)}, {why}, for the source does not say"
