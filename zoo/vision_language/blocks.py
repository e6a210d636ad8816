"""Pre-norm block of a causal language model: attention with rotations, and a gated MLP, Llama's."""

import torch
import torch.nn.functional as F
from timm.layers import SwiGLU, apply_rot_embed_cat
from torch import Tensor, nn

from zoo.vision_language.cache import KeyValueCache


class CausalBlock(nn.Module):
    """A block: causal attention and a gated MLP, each behind RMSNorm and added to what it reads.

    Args:
        width, heads, key_heads, mlp_width, norm_eps, dropout: As of
            :class:`zoo.vision_language.language_model.CausalTransformer`.
    """

    def __init__(self, width: int, heads: int, key_heads: int, mlp_width: int, norm_eps: float, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=norm_eps)
        self.attn = CausalAttention(width, heads, key_heads, dropout)
        self.norm2 = nn.RMSNorm(width, eps=norm_eps)
        self.mlp = SwiGLU(width, mlp_width, bias=False, drop=dropout)

    def forward(
        self, x: Tensor, turns: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None, index: int = 0
    ) -> Tensor:
        """Tokens (B, L, W) of tokens (B, L, W), see :class:`CausalAttention`."""
        x = x + self.attn(self.norm1(x), turns, mask, cache, index)
        return x + self.mlp(self.norm2(x))


class CausalAttention(nn.Module):
    """Causal attention with rotated queries and keys.

    Args:
        width, heads, key_heads, dropout: As of :class:`zoo.vision_language.language_model.CausalTransformer`.
    """

    def __init__(self, width: int, heads: int, key_heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.key_heads, self.head_width = heads, key_heads, width // heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, key_heads * self.head_width, bias=False)
        self.v = nn.Linear(width, key_heads * self.head_width, bias=False)
        self.attn_drop = nn.Dropout(dropout)
        self.proj = nn.Linear(width, width, bias=False)
        self.proj_drop = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, turns: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None, index: int = 0
    ) -> Tensor:
        """Outcome of attention for each token, (B, L, W).

        Args:
            x: (B, L, W).
            turns: Of :func:`rotations`.
            mask: Of :func:`zoo.vision_language.masks.attention_mask`. None: all tokens up to each one.
            cache: What holds the tokens before, and takes these.
            index: Of the layer in the cache.
        """
        query, key, value = (
            layer(x).unflatten(2, (-1, self.head_width)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        query, key = (apply_rot_embed_cat(each, turns, half=True) for each in (query, key))
        if cache is not None:
            key, value = cache.append(index, key, value)
        shared = self.heads // self.key_heads
        if shared > 1 and mask is not None:  # kernels that take a mask on a GPU take no groups
            key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
        found = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            # Without a cache whatever the length, which compiled code takes for a symbol.
            is_causal=mask is None and (cache is None or query.shape[2] > 1),
            enable_gqa=key.shape[1] != self.heads,
        )
        projected: Tensor = self.proj_drop(self.proj(found.transpose(1, 2).flatten(2)))
        return projected


def rotations(positions: Tensor, head_width: int, theta: float) -> Tensor:
    """Sines and cosines (B, 1, L, 2 d) of positions (B, L), as timm's functions take them; float32 in all precisions.

    They are computed in each call: a buffer would be rounded where a module is converted to half precision.
    """
    channels = torch.arange(0, head_width, 2, dtype=torch.float32, device=positions.device)
    angles = positions[:, None, :, None].float() / theta ** (channels / head_width)
    sine, cosine = angles.sin(), angles.cos()
    return torch.cat([sine, sine, cosine, cosine], dim=-1)  # Llama turns channel i with channel i + d / 2
