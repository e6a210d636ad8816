"""timm's blocks and attention pooling, run over flat tokens: each image, or window, by itself."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, apply_rot_embed_cat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.common.packed.attention import packed_attention, windows
from zoo.common.packed.packing import Packing


def run_blocks(
    blocks: Sequence[Any] | nn.ModuleList,
    tokens: Tensor,
    packing: Packing,
    turns: Tensor | None = None,
    window: int | None = None,
    global_blocks: Sequence[int] = (),
    recompute: bool = False,
) -> Tensor:
    """Blocks of timm's over flat tokens (T, D), which stay in their order.

    Args:
        blocks: ``timm.models.vision_transformer.Block``.
        tokens: (T, D).
        packing: Of the tokens, with grids where there are windows.
        turns: Sines and cosines of the tokens' rotations, (T, 2 * d). None: none.
        window: Side of the windows in patches. None: each image attends to itself in all blocks.
        global_blocks: Indices of those in which it does beside windows.
        recompute: Whether blocks are computed again in the backward pass.
    """
    order, lengths = None, packing.lengths
    if window is not None and packing.grids is not None:
        on_host, lengths = windows(packing.grids, window)
        order = on_host.to(tokens.device, non_blocking=True)
        tokens, turns = tokens[order], None if turns is None else turns[order]
    owners, images = packing.owners(tokens.device), len(packing.counts)  # windows stay with their image
    for index, block in enumerate(blocks):
        attended = packing.lengths if index in global_blocks else lengths
        if recompute:
            tokens = checkpoint(run_block, block, tokens, attended, owners, images, turns, use_reentrant=False)
        else:
            tokens = run_block(block, tokens, attended, owners, images, turns)
    return tokens if order is None else torch.empty_like(tokens).index_copy(0, order, tokens)


def run_block(
    block: Any,
    tokens: Tensor,
    lengths: Sequence[int],
    owners: Tensor,
    images: int,
    turns: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """A block of timm's over flat tokens (T, D).

    Args:
        block: ``timm.models.vision_transformer.Block``.
        tokens: (T, D).
        lengths: Tokens of each sequence that attends to itself.
        owners: Index of each token's image, (T,), for stochastic depth.
        images: How many images there are.
        turns: Sines and cosines of the tokens' rotations, (T, 2 * d). None: none.
        bias: What is added to the scores of each key, (T,).
    """
    attended = block.ls1(attend(block.attn, block.norm1(tokens), lengths, turns, bias))
    tokens = tokens + dropped(block.drop_path1, attended, owners, images)
    return tokens + dropped(block.drop_path2, block.ls2(block.mlp(block.norm2(tokens))), owners, images)


def attend(
    attn: Any, tokens: Tensor, lengths: Sequence[int], turns: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """timm's attention over flat tokens (T, D), each sequence by itself."""
    return joined(attn, *heads(attn, tokens), lengths, turns, bias)


def heads(attn: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (T, H, d) of timm's attention, not rotated."""
    query, key, value = attn.qkv(tokens).unflatten(1, (3, attn.num_heads, attn.head_dim)).unbind(1)
    return attn.q_norm(query), attn.k_norm(key), value


def joined(
    attn: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    turns: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Outcome (T, D) of timm's attention from its :func:`heads`, each sequence by itself."""
    if turns is not None:
        query, key = (apply_rot_embed_cat(each, turns[:, None], half=True) for each in (query, key))
    dropout = attn.attn_drop.p if attn.training else 0.0
    # Under autocast norms of queries and keys give float32, which kernels for all lengths do not take.
    query, key = query.to(value.dtype), key.to(value.dtype)
    found = packed_attention(query, key, value, lengths, bias=bias, dropout=dropout)
    projected: Tensor = attn.proj_drop(attn.proj(attn.norm(found.flatten(1))))
    return projected


def dropped(layer: nn.Module, branch: Tensor, owners: Tensor, images: int) -> Tensor:
    """A residual branch (T, D), left out for some of the images in training: stochastic depth (Huang et al. 2016)."""
    if not isinstance(layer, DropPath) or not layer.training or not layer.drop_prob:
        return branch
    keep = 1 - layer.drop_prob
    kept = branch.new_empty(images).bernoulli_(keep)
    if keep > 0 and layer.scale_by_keep:
        kept = kept / keep
    return branch * kept[owners, None]


def attention_pooled(pool: Any, tokens: Tensor, counts: Sequence[int], bias: Tensor | None = None) -> Tensor:
    """timm's attention pooling with one latent query, of the tokens (T, D) of each image: (B, D).

    ``bias`` (T,) is added to the scores of each token.
    """
    query = pool.q(pool.latent[0]).unflatten(1, (pool.num_heads, pool.head_dim))
    key, value = pool.kv(tokens).unflatten(1, (2, pool.num_heads, pool.head_dim)).unbind(1)
    query, key = pool.q_norm(query).expand(len(counts), -1, -1), pool.k_norm(key)
    ones = (1,) * len(counts)
    found = packed_attention(query.to(key.dtype), key, value.to(key.dtype), ones, counts, bias).flatten(1)
    found = pool.proj_drop(pool.proj(found))
    pooled: Tensor = found if pool.mlp is None else found + pool.mlp(pool.norm(found))
    return pooled
