"""Token merging (ToMe, Bolya et al. 2023, arXiv 2210.09461) among flat tokens, each image's by itself.

Between attention and MLP of each block the r most similar pairs of an image's patches become one token each (section
3). Bipartite soft matching: patches are put in two sets by turns, A and B; each of A draws an edge to the token of B
whose key is most alike by cosine, keys being the mean of the heads'; the r most similar edges are kept, and what they
tie together becomes its mean, weighted by how many patches each token stands for. Then come what is left of A and all
of B, one behind the other. Proportional attention (equation 1): log s is added to the scores of a key that stands for s
patches, as if they were still there.

Of each image at most half of its patches are merged in a block. Class token and registers never are, and nothing is
merged into them; the turns count them, so that with one class token the first patch is in B, as in the paper's code.

Rotations are refused: a merged token lies at no one place to be rotated by, and the paper, which adds positions once
before the first block, defines none. Windows are refused as well: merged tokens lie on no grid to be cut.

Beyond the paper: r may be a share of the patches that an image began with, so that images of all sizes are thinned
alike, and attention pooling is proportional too.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.common.packed.packing import Packing
from zoo.packed_vit.blocks import dropped, heads, joined


def check_merge(merge: int | float | None, rotary: bool, window: int | None) -> None:
    """Raises ValueError for an amount that is none, and for what tokens cannot be merged beside."""
    if not merge:
        return
    if merge < 0 or (isinstance(merge, float) and not merge < 1):
        raise ValueError(f"merge is {merge}: expected a number of tokens from 0, or a share of the patches below 1.0")
    if rotary:
        raise ValueError(
            f"merge is {merge} with rotary: a merged token lies at no one place to be rotated by; set rotary to false, "
            "or merge to 0"
        )
    if window is not None:
        raise ValueError(
            f"merge is {merge} with window {window}: merged tokens lie on no grid; set window to null, or merge to 0"
        )


def amounts(merge: int | float, began: Sequence[int], counts: Sequence[int]) -> tuple[int, ...]:
    """Numbers of tokens that are merged in a block, of each image.

    Args:
        merge: So many, or that share, below 1, of the patches that the image began with, rounded down.
        began: Patches of each image before the first block.
        counts: Of each now. At most half of them are merged.
    """
    # A share of a number may come out a hair below the whole number it is, as 0.29 * 100 does.
    wanted = (int(merge * count + 1e-6) if isinstance(merge, float) else merge for count in began)
    return tuple(min(number, count // 2) for number, count in zip(wanted, counts, strict=True))


@torch.no_grad()
def matched(keys: Tensor, packing: Packing, merged: Sequence[int]) -> Tensor:
    """Bipartite soft matching: where each token goes, int64 (T,), indices into what is left.

    Tokens that go to the same place are to become one. Of an image the tokens that stand for no patch come first, as
    they were, then what is left of A, then B. An image of which nothing is merged stays as it is.

    Args:
        keys: The mean of the heads' keys, (T, d).
        packing: Of the tokens.
        merged: Of each image, how many are merged, at most half of its patches.
    """
    keys = F.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1)
    left = packing.without_grids([count - number for count, number in zip(packing.counts, merged, strict=True)])
    alike: dict[tuple[int, int], list[int]] = {}
    for image, pair in enumerate(zip(packing.lengths, merged, strict=True)):
        alike.setdefault(pair, []).append(image)
    places = torch.empty(packing.total, dtype=torch.int64, device=keys.device)
    for (length, number), images in alike.items():
        rows = _on_device((packing.starts[image] for image in images), keys.device)
        rows = rows[:, None] + torch.arange(length, device=keys.device)
        starts = _on_device((left.starts[image] for image in images), keys.device)[:, None]
        places[rows] = starts + _matched(keys[rows], packing.prefix, number)
    return places


def _on_device(numbers: Iterable[int], device: torch.device) -> Tensor:
    return torch.tensor(tuple(numbers)).to(device, non_blocking=True)


def _matched(keys: Tensor, prefix: int, number: int) -> Tensor:
    """Places of the tokens of B images of the same length within what is left of each, int64 (B, L)."""
    images, length, _ = keys.shape
    places = torch.arange(length, device=keys.device).repeat(images, 1)
    if not number:
        return places
    first, second = prefix + prefix % 2, prefix + 1 - prefix % 2  # A: every second place of the image, B: the others
    similarity, nearest = (keys[:, first::2] @ keys[:, second::2].mT).max(dim=2)
    order = similarity.argsort(dim=1, descending=True, stable=True)
    stay = order.shape[1] - number
    staying = order[:, number:].sort(dim=1).values
    of_a = (stay + nearest).scatter(1, staying, torch.arange(stay, device=keys.device).expand(images, -1))
    places[:, first::2] = prefix + of_a
    places[:, second::2] = prefix + stay + torch.arange(places[0, second::2].numel(), device=keys.device)
    return places


def averaged(tokens: Tensor, sizes: Tensor | None, places: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Tokens (total, D), each the mean of those that go to its place, weighted by their sizes, and sizes (total,).

    Args:
        tokens: (T, D).
        sizes: How many patches each stands for, (T,). None: one each.
        places: Where each goes, (T,).
        total: Number of tokens that are left.
    """
    weighted = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    sizes = weighted.new_ones(len(tokens)) if sizes is None else sizes
    sums = weighted.new_zeros(total, tokens.shape[1]).index_add(0, places, weighted * sizes[:, None])
    summed = sizes.new_zeros(total).index_add(0, places, sizes)
    return (sums / summed[:, None]).to(tokens.dtype), summed


def run_merging(
    blocks: Iterable[Any], tokens: Tensor, packing: Packing, merge: int | float, recompute: bool = False
) -> tuple[Tensor, Packing]:
    """Runs timm's blocks over flat tokens and merges some in each of them.

    Args:
        blocks: ``timm.models.vision_transformer.Block``.
        tokens: (T, D).
        packing: Of the tokens.
        merge: Tokens that are merged in each block, or their share: see :func:`amounts`.
        recompute: Whether blocks are computed again in the backward pass.

    Returns:
        The tokens that are left, and their packing, with sizes.
    """
    began, sizes = packing.counts, packing.sizes
    for block in blocks:
        merged = amounts(merge, began, packing.counts)
        if recompute:
            tokens, sizes = checkpoint(_run_block, block, tokens, sizes, packing, merged, use_reentrant=False)
        else:
            tokens, sizes = _run_block(block, tokens, sizes, packing, merged)
        packing = _left(packing, merged)
    return tokens, replace(packing, sizes=sizes)


def _left(packing: Packing, merged: Sequence[int]) -> Packing:
    if not any(merged):
        return packing
    return packing.without_grids([count - number for count, number in zip(packing.counts, merged, strict=True)])


def _run_block(
    block: Any, tokens: Tensor, sizes: Tensor | None, packing: Packing, merged: Sequence[int]
) -> tuple[Tensor, Tensor | None]:
    images = len(packing.counts)
    query, key, value = heads(block.attn, block.norm1(tokens))
    bias = None if sizes is None else sizes.log()
    attended = block.ls1(joined(block.attn, query, key, value, packing.lengths, bias=bias))
    tokens = tokens + dropped(block.drop_path1, attended, packing.owners(tokens.device), images)
    if any(merged):
        places, packing = matched(key.mean(1), packing, merged), _left(packing, merged)
        tokens, sizes = averaged(tokens, sizes, places, packing.total)
    changed = block.ls2(block.mlp(block.norm2(tokens)))
    return tokens + dropped(block.drop_path2, changed, packing.owners(tokens.device), images), sizes
