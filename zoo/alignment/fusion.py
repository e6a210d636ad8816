"""FusionTransformer: text tokens that attend to image tokens, on top of two towers.

The upper half of ALBEF's text encoder (Li et al. 2021, "Align before Fuse", arXiv 2107.07651, section 3.1), with two
deviations: blocks are pre-norm, as those of the towers are, so that they train without a warm-up of their own; and
image tokens are normalised once before all blocks, since maps of a convolutional network have no final norm.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.models import checkpoint, named_apply
from timm.models.vision_transformer import Block, init_weights_vit_timm
from torch import Tensor, nn

from zoo.alignment.caching import in_micro_batches
from zoo.alignment.towers import pooled, unit


class CrossAttention(nn.Module):
    """Multi-head attention from tokens to those of something else, whose keys and values may be used many times.

    Args:
        dim: Width of the tokens that attend.
        heads: Attention heads; they divide the width.
        context_dim: Width of the tokens that are attended to.
        dropout: Of the attention weights.
    """

    def __init__(self, dim: int, heads: int, context_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(context_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, keys_values: Tensor) -> Tensor:
        """Tokens (N, L, dim), and keys beside values (N, T, 2 * dim) as ``kv`` makes them; gives (N, L, dim)."""
        q = self.q(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = keys_values.unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.proj(attended.transpose(1, 2).flatten(2))


class FusionBlock(Block):
    """timm's pre-norm block with cross-attention between its two branches: ``norm_cross`` and ``cross_attn``."""

    entered = ("read",)  # for zoo.sharding

    def __init__(self, dim: int, heads: int, context_dim: int, mlp_ratio: float, dropout: float, norm: Any) -> None:
        super().__init__(dim, heads, mlp_ratio, qkv_bias=True, proj_drop=dropout, attn_drop=dropout, norm_layer=norm)
        self.norm_cross = norm(dim)
        self.cross_attn = CrossAttention(dim, heads, context_dim, dropout)

    def read(self, context: Tensor) -> Tensor:
        """Keys beside values (B, T, 2 * dim) of what is attended to, (B, T, context_dim)."""
        return self.cross_attn.kv(context)

    def forward(  # type: ignore[override]
        self, tokens: Tensor, keys_values: Tensor, owners: Tensor | None, mask: Tensor | None, causal: bool
    ) -> Tensor:
        if owners is not None:
            keys_values = keys_values.index_select(0, owners)
        tokens = tokens + self.attn(self.norm1(tokens), attn_mask=mask, is_causal=causal)
        tokens = tokens + self.cross_attn(self.norm_cross(tokens), keys_values)
        return tokens + self.mlp(self.norm2(tokens))


class FusionTransformer(nn.Module):
    """Transformer over text tokens, each block of which attends to image tokens.

    One set of weights reads a caption in both directions, to match it or to fill in words, and from left to right, to
    write it: only the mask of its self-attention differs (Dong et al. 2019, "UniLM").

    Args:
        width: Width of the text tokens.
        image_width: Width of the image tokens.
        depth: Number of blocks.
        heads: Attention heads of a block; they divide the width.
        mlp_ratio: Width of a block's hidden layer, in widths.
        dropout: In attention and MLP.
        norm_eps: Epsilon of LayerNorm.

    Raises:
        ValueError: For heads that do not divide the width.
    """

    def __init__(
        self,
        width: int,
        image_width: int,
        depth: int = 6,
        heads: int = 8,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"fusion_heads is {heads}, which does not divide the width of the text tower, {width}")
        norm = partial(nn.LayerNorm, eps=norm_eps)
        self.grad_checkpointing = False
        self.norm_images = norm(image_width)
        self.blocks = nn.ModuleList(
            [FusionBlock(width, heads, image_width, mlp_ratio, dropout, norm) for _ in range(depth)]
        )
        self.norm = norm(width)
        named_apply(init_weights_vit_timm, self)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Has the backward pass recompute the blocks' activations."""
        self.grad_checkpointing = enable

    def read(self, images: Tensor) -> list[Tensor]:
        """Keys beside values of image tokens (B, T, image_width), for each block (B, T, 2 * width).

        They do not depend on the text: an image that is fused with several captions is read once.
        """
        images = self.norm_images(images)
        return [block.read(images) for block in self.blocks]  # type: ignore[operator]

    def forward(
        self,
        texts: Tensor,
        keys_values: Sequence[Tensor],
        real: Tensor | None = None,
        owners: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Fused text tokens (N, L, width), after the final norm.

        Args:
            texts: Text tokens (N, L, width).
            keys_values: Of images, as :meth:`read` gives them, (B, T, 2 * width).
            real: (N, L), true for tokens that may be attended to: no padding. At least one of each text. None: all.
            owners: (N,) int64, the image of each text. None: each has its own, in the same order.
            causal: Whether each token attends to itself and those before it alone. Padding at the end is then never
                attended to, and ``real`` not read.
        """
        mask = None if real is None or causal else real[:, None, None, :]
        for block, read in zip(self.blocks, keys_values, strict=True):
            run = partial(checkpoint, block) if self.grad_checkpointing and self.training else block
            texts = run(texts, read, owners, mask, causal)
        return self.norm(texts)


def image_tokens(features: Tensor, width: int, backbone: nn.Module) -> Tensor:
    """Image tokens (B, T, D) of what a timm network's ``forward_features`` gives; maps row by row.

    Args:
        features: Tokens (B, T, D), class token and registers included, or maps (B, D, H, W) or (B, H, W, D).
        width: D.
        backbone: Whose they are, for the error.

    Raises:
        ValueError: For features that are neither.
    """
    if isinstance(features, Tensor):
        if features.ndim == 3 and features.shape[2] == width:
            return features
        if features.ndim == 4 and features.shape[1] == width:
            return features.flatten(2).transpose(1, 2)
        if features.ndim == 4 and features.shape[3] == width:
            return features.flatten(1, 2)
    got = str(tuple(features.shape)) if isinstance(features, Tensor) else f"a {type(features).__name__}"
    raise ValueError(
        f"forward_features of {type(backbone).__name__} gives {got}: the fusion attends to tokens (B, T, {width}) or "
        f"maps (B, {width}, H, W), choose another image_backbone"
    )


def image_features(parts: Any, images: Tensor, micro_batch: int | None = None) -> tuple[Tensor, Tensor]:
    """Image tokens (B, T, D) of images (B, C, H, W), and embeddings (B, E), out of one pass.

    Args:
        parts: A module with a timm network as ``backbone``, and its ``image_projection``.
        images: Normalised floats.
        micro_batch: Images that the tower takes at a time: see :mod:`zoo.alignment.caching`. None: all.

    Raises:
        ValueError: As :func:`image_tokens`; for features that are not pooled.
    """
    features = _encoded(parts.backbone.forward_features, images, micro_batch)
    tokens = image_tokens(features, parts.backbone.num_features, parts.backbone)
    embedded = pooled(parts.backbone.forward_head(features), parts.backbone, len(images), "image")
    return tokens, unit(parts.image_projection(embedded))


def text_features(parts: Any, tokens: Tensor, micro_batch: int | None = None) -> tuple[Tensor, Tensor]:
    """Text tokens (N, L, W) of tokens (N, L), and embeddings (N, E), out of one pass.

    Args:
        parts: A module with a :class:`zoo.alignment.text.TextTransformer` as ``text``, and its ``text_projection``.
        tokens: int64.
        micro_batch: Texts that the tower takes at a time. None: all.
    """
    hidden = _encoded(parts.text.hidden, tokens, micro_batch)
    return hidden, unit(parts.text_projection(parts.text.pooled(hidden, tokens)))


def _encoded(encoder: Any, inputs: Tensor, micro_batch: int | None) -> Tensor:
    return encoder(inputs) if micro_batch is None else in_micro_batches(encoder, inputs, micro_batch)
