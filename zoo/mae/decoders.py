"""Decoders, which predict removed patches from encoded visible ones: the paper's, and CrossMAE's.

Both take what the encoder made of the visible patches and give predictions for patches that were removed; neither
computes what the loss does not read.
"""

import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from zoo.mae.patches import sincos_positions

Decoder = Literal["self", "cross"]


def create_decoder(decoder: Decoder, encoder: Any, dim: int, depth: int, heads: int) -> nn.Module:
    """The decoder by its name for an encoder, which is a plain ViT.

    Raises:
        ValueError: For an unknown name, and for heads that do not divide the width.
    """
    if decoder not in get_args(Decoder):
        raise ValueError(f"unknown decoder {decoder!r}: expected one of {', '.join(get_args(Decoder))}")
    if dim % heads:
        raise ValueError(f"decoder_dim is {dim}, decoder_heads {heads}: expected heads that divide the width")
    embed = encoder.patch_embed
    outputs = embed.proj.in_channels * math.prod(embed.patch_size)
    size = (encoder.embed_dim, dim, depth, heads, embed.grid_size, encoder.num_prefix_tokens, outputs)
    return SelfDecoder(*size) if decoder == "self" else CrossDecoder(*size, layers=len(encoder.blocks) + 1)


def predicted_patches(decoder: Decoder, patches: int, visible: int, predict_ratio: float | None) -> int:
    """The number of patches that a training step predicts: all removed ones, or a share of all patches.

    Raises:
        ValueError: For a share that the decoder "self" is given, or that is none or more than what is removed.
    """
    removed = patches - visible
    if decoder == "self":
        if predict_ratio is not None:
            raise ValueError("predict_ratio goes with decoder 'cross': 'self' predicts all removed patches at once")
        return removed
    wanted = round(patches * (0.25 if predict_ratio is None else predict_ratio))
    if not 0 < wanted <= removed and predict_ratio is not None:
        raise ValueError(
            f"predict_ratio {predict_ratio} is {wanted} of {patches} patches: expected at least one, and at "
            f"most the {removed} that are removed"
        )
    return min(max(1, wanted), removed)


class Attention(nn.Module):
    """Multi-head attention in one fused kernel, by the parameter names of timm's.

    Args:
        dim: Width of queries and output.
        heads: Divides the width.
        context_dim: Width of what keys and values are projected from, for cross-attention. None: self-attention, whose
            three projections are one matrix.
    """

    def __init__(self, dim: int, heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.dim, self.heads = dim, heads
        if context_dim is None:
            self.qkv = nn.Linear(dim, 3 * dim)
        else:
            self.q, self.kv = nn.Linear(dim, dim), nn.Linear(context_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, query: Tensor, key_value: Tensor) -> Tensor:
        """Projected queries (B, n, dim), keys beside values (B, m, 2 * dim); gives (B, n, dim)."""
        q = query.unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = key_value.unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SelfBlock(nn.Module):
    """A transformer block, pre-norm, with parts that can be left out where nothing reads them."""

    entered = ("project",)  # for zoo.sharding

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def project(self, tokens: Tensor) -> Tensor:
        """Queries, keys and values of tokens (..., dim): (..., 3 * dim)."""
        return self.attn.qkv(self.norm1(tokens))

    def forward(self, tokens: Tensor, start: int = 0, projected: Tensor | None = None) -> Tensor:
        """Tokens (B, N, dim) from ``start`` on; those before are attended to, and not computed any further.

        Args:
            tokens: The input.
            start: The first token that somebody reads.
            projected: What :meth:`project` gives, where it is known already.
        """
        dim = self.attn.dim
        if projected is not None:
            query, key_value = projected[:, start:, :dim], projected[:, :, dim:]
        elif start:
            normed, weight, bias = self.norm1(tokens), self.attn.qkv.weight, self.attn.qkv.bias
            query = F.linear(normed[:, start:], weight[:dim], bias[:dim])
            key_value = F.linear(normed, weight[dim:], bias[dim:])
        else:
            query, key_value = self.project(tokens).split([dim, 2 * dim], dim=2)
        tokens = tokens[:, start:] + self.attn(query, key_value)
        return tokens + self.mlp(self.norm2(tokens))


class SelfDecoder(nn.Module):
    """The paper's decoder: a small transformer over visible tokens and mask tokens, each with its position.

    Tokens stay in the order of the mask, visible ones first, which makes "removed only" a slice.

    Args:
        width: Width of the encoder.
        dim, depth, heads: Size of the decoder.
        grid_size: Rows and columns of patches.
        prefix: Number of class and register tokens.
        outputs: Values to predict for a patch.
    """

    def __init__(
        self, width: int, dim: int, depth: int, heads: int, grid_size: tuple[int, int], prefix: int, outputs: int
    ) -> None:
        super().__init__()
        self.grid_size, self.prefix = grid_size, prefix
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        positions = torch.cat([torch.zeros(prefix, dim), sincos_positions(grid_size, dim)])
        self.pos_embed = nn.Parameter(positions[None].to(self.mask_token.dtype), requires_grad=False)
        self.blocks: Any = nn.ModuleList([SelfBlock(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, outputs)

    def forward(self, features: list[Tensor], visible: Tensor, removed: Tensor) -> Tensor:
        """Predictions (B, R, outputs) for the removed patches.

        Args:
            features: Of the encoder, the last one counts: (B, prefix + V, width).
            visible, removed: Indices (B, V) and (B, R).
        """
        return self._decode(features[-1], visible, removed, start=self.prefix + visible.shape[1])

    def everywhere(self, features: list[Tensor], visible: Tensor, removed: Tensor) -> Tensor:
        """Predictions (B, V + R, outputs) for the visible patches, then the removed, as in the paper."""
        return self._decode(features[-1], visible, removed, start=self.prefix)

    def _decode(self, encoded: Tensor, visible: Tensor, removed: Tensor, start: int) -> Tensor:
        first_ones, positions = self.pos_embed[:, : self.prefix], self.pos_embed[0, self.prefix :]
        shown = torch.cat([first_ones.expand(len(visible), -1, -1), positions[visible]], dim=1)
        tokens = self.embed(encoded) + shown
        # Before the first attention a mask token is nothing but its position, the same in every image.
        masked = self.mask_token[0] + positions
        first, last = self.blocks[0], len(self.blocks) - 1
        projected = torch.cat([first.project(tokens), F.embedding(removed, first.project(masked))], dim=1)
        tokens = torch.cat([tokens, F.embedding(removed, masked)], dim=1)
        for index, block in enumerate(self.blocks):
            tokens = block(tokens, start if index == last else 0, projected if index == 0 else None)
        return self.head(self.norm(tokens))


class CrossBlock(nn.Module):
    """A cross-attention block: queries attend to the encoder's features, never to each other."""

    def __init__(self, dim: int, heads: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm_context = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(dim, heads, context_dim=width)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        query, key_value = self.attn.q(self.norm1(queries)), self.attn.kv(self.norm_context(context))
        queries = queries + self.attn(query, key_value)
        return queries + self.mlp(self.norm2(queries))


class CrossDecoder(nn.Module):
    """CrossMAE's decoder: each patch is predicted by itself, from its position and the visible patches.

    Fu et al., "Rethinking Patch Dependence for Masked Autoencoders", TMLR 2025, arXiv 2401.14391. As no prediction
    depends on another, any subset can be predicted at its share of the cost. Each block reads a mix of the encoder's
    layers of its own, with learned weights ("inter-block attention").

    Args:
        width, dim, depth, heads, grid_size, prefix, outputs: As of :class:`SelfDecoder`.
        layers: How many features the encoder gives: its embeddings and the output of every block.
    """

    def __init__(
        self,
        width: int,
        dim: int,
        depth: int,
        heads: int,
        grid_size: tuple[int, int],
        prefix: int,
        outputs: int,
        layers: int,
    ) -> None:
        super().__init__()
        self.grid_size, self.prefix = grid_size, 0  # no token but the patches' has a position here
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        positions = sincos_positions(grid_size, dim)[None].to(self.mask_token.dtype)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.mix = nn.Parameter(torch.randn(depth, layers) / layers**0.5)
        self.blocks = nn.ModuleList([CrossBlock(dim, heads, width) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, outputs)

    def forward(self, features: list[Tensor], visible: Tensor, removed: Tensor) -> Tensor:
        """Predictions (B, R, outputs) for the removed patches, or some of them.

        Args:
            features: Of all layers, each (B, prefix + V, width).
            visible: Not read: the features know where they come from.
            removed: Indices (B, R).
        """
        queries = self.mask_token + self.pos_embed[0][removed]
        stacked = torch.stack(features)
        contexts = (self.mix.to(stacked.dtype) @ stacked.flatten(1)).unflatten(1, stacked.shape[1:])
        for block, context in zip(self.blocks, contexts, strict=True):
            queries = block(queries, context)
        return self.head(self.norm(queries))

    def everywhere(self, features: list[Tensor], visible: Tensor, removed: Tensor) -> Tensor:
        """Predictions (B, V + R, outputs) as of queries at all patches; training asks for removed ones."""
        return self(features, visible, torch.cat([visible, removed], dim=1))
