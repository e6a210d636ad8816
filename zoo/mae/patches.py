"""Images as patches: cutting, masking, positions, and what a decoder has to predict."""

import math
from fractions import Fraction

import torch
from torch import Tensor

EPS = 1e-6
"""Added to a patch's variance before it is divided by."""


def patchify(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Images (B, C, H, W) as patches (B, L, h*w*C) in raster order, the pixels of each in (row, column, channel) order.

    Args:
        images: Their sides are multiples of the patch's.
        patch_size: Height h and width w in pixels.
    """
    B, C, H, W = images.shape
    h, w = patch_size
    return images.reshape(B, C, H // h, h, W // w, w).permute(0, 2, 4, 3, 5, 1).reshape(B, -1, h * w * C)


def unpatchify(patches: Tensor, patch_size: tuple[int, int], grid_size: tuple[int, int]) -> Tensor:
    """The inverse of :func:`patchify`, for a grid of that many (rows, columns) of patches."""
    B = len(patches)
    (h, w), (rows, columns) = patch_size, grid_size
    images = patches.reshape(B, rows, columns, h, w, -1).permute(0, 5, 1, 3, 2, 4)
    return images.reshape(B, -1, rows * h, columns * w)


def sincos_positions(grid_size: tuple[int, int], width: int) -> Tensor:
    """Fixed position embeddings (L, width), float32: the first half says the column, the second the row.

    Each half is width/4 sines followed by as many cosines, of wavelengths from 2 pi to almost 10000 * 2 pi in geometric
    steps. Computed in float64. Other conventions (timm's, big_vision's) order or space them otherwise, and cannot take
    part in an exchange of weights.

    Raises:
        ValueError: If the width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sin-cos positions need a width that is a multiple of 4, not {width}")
    rows, columns = (torch.arange(size, dtype=torch.float64) for size in grid_size)
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in (x, y)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1).float()


def visible_patches(patches: int, mask_ratio: float) -> int:
    """The number of visible patches: floor(L * (1 - mask_ratio)), reckoned in decimals, so that 10 of 100 stay at 0.9.

    (The same expression in floating point leaves 9.)

    Raises:
        ValueError: If that is none of them, or all.
    """
    visible = math.floor(patches * (1 - Fraction(str(mask_ratio))))
    if not 0 < visible < patches:
        kept = "none" if visible <= 0 else "all"
        raise ValueError(
            f"mask_ratio {mask_ratio} leaves {kept} of {patches} patches: expected more than 0 and at most "
            f"{math.floor(1000 * (1 - 1 / patches)) / 1000}, so that some are seen and some are to be predicted"
        )
    return visible


def random_masking(noise: Tensor, visible: int) -> tuple[Tensor, Tensor]:
    """Random masking, least noise stays: indices of the visible (B, k) and of the removed patches (B, L - k), int64.

    Both come in the noise's order. A transformer does not mind, and a beginning of the removed ones is a random subset.
    """
    order = noise.argsort(dim=1)
    return order[:, :visible], order[:, visible:]


def take(tokens: Tensor, indices: Tensor) -> Tensor:
    """``tokens[b, indices[b]]`` for each image: (B, N, D) and (B, n) give (B, n, D)."""
    return tokens.gather(1, indices[:, :, None].expand(-1, -1, tokens.shape[2]))


def normalize_patches(patches: Tensor) -> Tensor:
    """Normalises each patch (..., pixels) to mean 0 and variance 1, in float32 (section 4.1: the better target)."""
    mean, std = _statistics(patches)
    return (patches.float() - mean) / std


def denormalize_patches(normalized: Tensor, patches: Tensor) -> Tensor:
    """Undoes :func:`normalize_patches` with mean and variance of the true patches, which a predictor does not know."""
    mean, std = _statistics(patches)
    return normalized.float() * std + mean


def _statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (..., 1) of each patch; the variance is the unbiased one."""
    variance, mean = torch.var_mean(patches.float(), dim=-1, keepdim=True)
    return mean, (variance + EPS).sqrt()
