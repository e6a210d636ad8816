"""Patch dropout: in training a share of each image's patches is left out, drawn anew in each pass.

FLIP leaves out half of the patches or three quarters (Li et al. 2023, arXiv 2212.00794, section 3), NaViT drops tokens
at a rate (Dehghani et al. 2023, arXiv 2307.06304, section 2.2), PatchDropout names it (Liu et al. 2022, arXiv
2208.07220). Patches have their positions by then; class token and registers stay.
"""

import torch
from timm.layers import PatchDropout, PatchDropoutWithIndices
from torch import Tensor, nn

from zoo.common.packed.packing import Packing


def own_drop(layer: nn.Module | None) -> float:
    """The share that a layer of timm's leaves out."""
    return layer.prob if isinstance(layer, PatchDropout | PatchDropoutWithIndices) else 0.0


def check_drop(patch_drop: float, window: int | None) -> None:
    """Raises ValueError for a share that is none, and beside windows."""
    if not 0 <= patch_drop < 1:
        raise ValueError(f"patch_drop is {patch_drop}: expected a share of the patches from 0 to below 1")
    if patch_drop and window is not None:
        raise ValueError(
            f"patch_drop is {patch_drop} with window {window}: how many patches a window keeps would hang on the draw; "
            "set window to null, or patch_drop to 0"
        )


def kept_tokens(packing: Packing, share: float, device: torch.device) -> tuple[Tensor, Packing]:
    """Draws which tokens stay: their indices in ascending order, int64, and their packing.

    Args:
        packing: Of all tokens.
        share: Of each image's patches that are left out, from 0 to below 1. What is kept is rounded down, to one patch
            at least.
        device: Where the tokens are, whose random numbers are drawn.
    """
    # A share of a number may come out a hair below the whole number it is, as 10 * (1 - 0.9) does.
    counts = [max(1, int(count * (1 - share) + 1e-6)) for count in packing.counts]
    patches = packing.patch_indices(device)
    owners = packing.owners(device)[patches]
    order = torch.rand(len(patches), device=device).argsort()
    order = order[owners[order].argsort(stable=True)]  # image by image again, shuffled within each
    drawn = torch.cat([torch.arange(kept) + start for kept, start in zip(counts, _starts(packing), strict=True)])
    first = torch.tensor(packing.starts)[:, None] + torch.arange(packing.prefix)
    kept = torch.cat([first.flatten().to(device), patches[order[drawn.to(device, non_blocking=True)]]])
    return kept.sort().values, packing.without_grids(counts)


def _starts(packing: Packing) -> list[int]:
    """Index of each image's first patch among all patches."""
    return [start - image * packing.prefix for image, start in enumerate(packing.starts)]
