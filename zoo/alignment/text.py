"""Text tower: a pre-norm transformer over tokens, which pools one vector out of a text."""

from functools import partial
from typing import Any, Literal, cast

import torch
from timm.layers import get_act_layer
from timm.models import checkpoint
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from zoo.common.ranges import check_above, check_choices, check_ranges

Pool = Literal["end", "mean", "last", "first"]
Act = Literal["gelu", "quick_gelu", "gelu_tanh"]


class PoolsTexts:
    """Mixin of a text tower with features of every position, of which it pools one vector.

    Attributes:
        pool: Where.
        pad_id: Token that a short text is filled up with.
        end_id: Token that ends a text.
    """

    pool: Pool
    pad_id: int
    end_id: int | None
    hidden: Any

    def forward(self, tokens: Tensor) -> Tensor:
        """Features (N, W) of texts, without projection.

        With ``pool="end"`` those of a text without an end token are NaN: it has no such position, and looking for it
        must not wait for the device.

        Args:
            tokens: (N, L), as of :meth:`hidden`.

        Raises:
            ValueError: As :meth:`hidden`.
        """
        return self.pooled(self.hidden(tokens), tokens)

    def pooled(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Features (N, W) of texts, of those of their positions (N, L, W) and their tokens (N, L)."""
        if self.pool == "first":
            return hidden[:, 0]
        if self.pool == "last":
            return hidden[:, -1]
        if self.pool == "mean":
            text = (tokens != self.pad_id).unsqueeze(2)
            total = torch.where(text, hidden, 0).sum(1, dtype=torch.promote_types(hidden.dtype, torch.float32))
            return (total / text.sum(1).clamp(min=1)).to(hidden.dtype)
        ends = torch.eq(tokens, cast(int, self.end_id))
        first = ends.int().argmax(1)
        features = hidden.gather(1, first[:, None, None].expand(-1, 1, hidden.shape[2])).squeeze(1)
        return torch.where(ends.any(1, keepdim=True), features, torch.nan)


class TextTransformer(PoolsTexts, nn.Module):
    """Text transformer of CLIP (Radford et al. 2021) and SigLIP (Zhai et al. 2023), with timm's parameter names.

    CLIP's is ``act="quick_gelu"`` with the other defaults. SigLIP's is ``pool="last"``, ``causal=False``,
    ``act="gelu_tanh"``, ``norm_eps=1e-6``: it reads the last of 64 positions, padding or not.

    Args:
        vocab_size: Number of tokens.
        width: Width W of the embeddings.
        depth: Number of blocks.
        heads: Attention heads of a block.
        context_length: Most tokens that a text may have; shorter ones take the first positions.
        pool: Position that the features are read at: the first "end" token, the "last" position, the "first" one, or
            the "mean" of all that are not padding.
        causal: Each token sees those before it alone.
        mask_padding: No token sees padding. Behind a causal mask this changes nothing up to the end of the text.
        act: Activation: "gelu", "quick_gelu" (OpenAI's weights) or "gelu_tanh".
        mlp_width: Hidden width of the MLPs. None: four times ``width``.
        norm_eps: Epsilon of LayerNorm.
        dropout: Dropout of attention weights, inside the MLPs and behind both branches, as in
            ``torch.nn.TransformerEncoderLayer``.
        pad_id: Token that a short text is filled up with.
        end_id: Token that ends a text, for ``pool="end"``.

    Attributes:
        num_features: W.

    Raises:
        ValueError: For an unknown choice, with the choices; for numbers out of range, or heads that do not divide the
            width; for ``pool="end"`` without ``end_id``; for ``pool="first"`` with ``causal``, which reads one token.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int = 512,
        depth: int = 12,
        heads: int = 8,
        context_length: int = 77,
        pool: Pool = "end",
        causal: bool = True,
        mask_padding: bool = False,
        act: Act = "gelu",
        mlp_width: int | None = None,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        pad_id: int = 0,
        end_id: int | None = None,
    ) -> None:
        super().__init__()
        check_choices(pool=(pool, Pool), act=(act, Act))
        check_ranges(vocab_size=(vocab_size, 1, None), width=(width, 1, None), mlp_width=(mlp_width, 1, None))
        check_ranges(depth=(depth, 1, None), heads=(heads, 1, None), context_length=(context_length, 1, None))
        check_ranges(dropout=(dropout, 0, 1), pad_id=(pad_id, 0, vocab_size), end_id=(end_id, 0, vocab_size))
        check_above(norm_eps=(norm_eps, 0, 1))
        if width % heads:
            raise ValueError(f"heads is {heads}, which does not divide the width {width}")
        if pool == "end" and end_id is None:
            raise ValueError("pool='end' reads at the end token: set end_id, or pool to 'mean'")
        if pool == "first" and causal:
            raise ValueError("pool='first' reads a token that sees no other if causal: set causal=False")
        self.num_features = width
        self.vocab_size, self.context_length = vocab_size, context_length
        self.pool, self.causal, self.mask_padding = pool, causal, mask_padding
        self.pad_id, self.end_id = pad_id, end_id
        self.grad_checkpointing = False
        self.token_embed = nn.Embedding(vocab_size, width)
        self.pos_embed = nn.Parameter(torch.empty(1, context_length, width))
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                mlp_ratio=((mlp_width or 4 * width) + 0.5) / width,  # of which timm cuts the fraction off
                qkv_bias=True,
                proj_drop=dropout,
                attn_drop=dropout,
                act_layer=get_act_layer(act),
                norm_layer=cast(Any, partial(nn.LayerNorm, eps=norm_eps)),
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """CLIP's initial weights: the deeper the network, the smaller what a block adds. Biases are zero."""
        width, depth = self.num_features, len(self.blocks)
        nn.init.normal_(self.token_embed.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.01)
        residual = width**-0.5 * (2 * depth) ** -0.5
        stds = {"qkv": width**-0.5, "proj": residual, "fc1": (2 * width) ** -0.5, "fc2": residual}
        for name, layer in self.blocks.named_modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=stds[name.rpartition(".")[2]])
                nn.init.zeros_(layer.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Has the backward pass recompute the blocks: less memory, about a third more time."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Layers by their parameters' names, as timm's networks state them."""
        last = r"^norm" if coarse else (r"^norm", (99999,))
        blocks = r"^blocks\.(\d+)"
        return {"stem": r"^token_embed|^pos_embed", "blocks": blocks if coarse else [(blocks, None), last]}

    def hidden(self, tokens: Tensor) -> Tensor:
        """Features (N, L, W) of every position, behind the last norm.

        Those of padding are defined, and mean nothing.

        Args:
            tokens: (N, L) integers below ``vocab_size``, L at most ``context_length``. A text begins at position 0.

        Raises:
            ValueError: For another shape, or more tokens than there are positions.
        """
        if tokens.ndim != 2:
            raise ValueError(f"tokens have the shape {tuple(tokens.shape)}: expected (N, L)")
        length = tokens.shape[1]
        if length > self.context_length:
            raise ValueError(f"texts of {length} tokens are longer than context_length, {self.context_length}")
        mask = self._mask(tokens) if self.mask_padding else None
        x = self.token_embed(tokens) + self.pos_embed[:, :length]
        for block in self.blocks:
            run = partial(checkpoint, block) if self.grad_checkpointing and self.training else block
            x = run(x, attn_mask=mask, is_causal=self.causal and mask is None)
        return self.norm(x)

    def _mask(self, tokens: Tensor) -> Tensor:
        """Positions that each may see, (N, 1, 1 or L, L), True where it may."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        # Position 0 is seen in every case: attention to nothing at all is 0 / 0.
        seen = ((tokens != self.pad_id) | (positions == 0))[:, None, None]
        return seen & (positions <= positions[:, None]) if self.causal else seen
