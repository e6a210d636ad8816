"""Gated cross-attention: text tokens of a frozen language model that read image tokens, between its own blocks.

GATED XATTN-DENSE of Flamingo (Alayrac et al. 2022, arXiv 2204.14198, section 2.2 and figure 4): cross-attention and an
MLP, each behind a norm and with a gate, the tanh of a number that begins at 0. A language model with such blocks in it
is, at first, exactly what it was.

A token that has no image to read gets nothing from the attention; the MLP changes it as it does all tokens, as in the
paper.

Image tokens are read as they are: those of a resampler or a vision tower come from behind a norm.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import Mlp, RmsNorm, SwiGLU
from torch import Tensor, nn

from zoo.common.ranges import check_above, check_choices, check_ranges

Norm = Literal["layer", "rms"]
GatedMLP = Literal["squared_relu", "swiglu"]
Reads = Literal["last", "before", "all"]
NORMS: dict[str, Any] = {"layer": nn.LayerNorm, "rms": RmsNorm}


class SquaredReLU(nn.Module):
    """The square of what is above 0: the activation of Flamingo's blocks."""

    def forward(self, values: Tensor) -> Tensor:
        return F.relu(values).square()


def image_mask(begins: Tensor, owners: Tensor, reads: Reads = "last") -> Tensor:
    """Mask (B, L, T) of the image tokens that each text token reads (Flamingo, section 2.3).

    Args:
        begins: (B, L), true for a text token that stands for an image, such as its placeholder, and reads it already.
        owners: (B, T) int64, which of its sample's images each image token belongs to, from 0 on; -1 for padding.
        reads: "last": the last image before a token, as in Flamingo. "before": all images before it. "all": all images
            of its sample, those that come later, too.

    Raises:
        ValueError: For an unknown choice.
    """
    check_choices(reads=(reads, Reads))
    last, images = begins.long().cumsum(1)[:, :, None] - 1, owners[:, None, :]
    if reads == "last":
        return (images == last) & (images >= 0)
    mask = images >= 0
    return mask & (images <= last) if reads == "before" else mask.expand(-1, begins.shape[1], -1)


class GatedCrossAttentionBlock(nn.Module):
    """Flamingo's gated block: ``forward(tokens, context, mask)`` gives tokens that have read image tokens.

    The defaults are Flamingo's. Idefics has ``norm="rms"``, ``mlp="swiglu"``.

    Args:
        width: Of the text tokens.
        context_width: Of the image tokens.
        heads: Attention heads.
        head_width: Channels of a head. None: ``width / heads``.
        mlp_width: Of the MLP's hidden layer. None: four times ``width``.
        norm: "layer" or "rms".
        mlp: "squared_relu", two layers, or "swiglu", three.
        norm_eps: Of the norms.

    Raises:
        ValueError: For an unknown choice, for sizes below 1, and for heads that do not divide the width.
    """

    def __init__(
        self,
        width: int,
        context_width: int,
        heads: int = 8,
        *,
        head_width: int | None = None,
        mlp_width: int | None = None,
        norm: Norm = "layer",
        mlp: GatedMLP = "squared_relu",
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        check_choices(norm=(norm, Norm), mlp=(mlp, GatedMLP))
        sizes: dict[str, int | None] = {"width": width, "context_width": context_width, "heads": heads}
        sizes |= {"head_width": head_width, "mlp_width": mlp_width}
        check_ranges(**{name: (size, 1, None) for name, size in sizes.items()})
        check_above(norm_eps=(norm_eps, 0, 1))
        if head_width is None:
            if width % heads:
                raise ValueError(f"heads is {heads}, which does not divide the width {width}: set head_width")
            head_width = width // heads
        hidden = 4 * width if mlp_width is None else mlp_width
        inner = heads * head_width
        self.heads = heads
        self.norm, self.mlp_norm = NORMS[norm](width, eps=norm_eps), NORMS[norm](width, eps=norm_eps)
        self.query = nn.Linear(width, inner, bias=False)
        self.key, self.value = (nn.Linear(context_width, inner, bias=False) for _ in range(2))
        self.proj = nn.Linear(inner, width, bias=False)
        self.mlp = (
            Mlp(width, hidden, act_layer=SquaredReLU, bias=False)
            if mlp == "squared_relu"
            else SwiGLU(width, hidden, bias=False)
        )
        self.gate, self.mlp_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))  # FSDP2 splits no scalars

    def forward(self, tokens: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Text tokens (B, L, width) that have read image tokens.

        Args:
            tokens: (B, L, width).
            context: Image tokens (B, T, context_width), padded; T may be 0, for texts without images.
            mask: (B, L, T), true where a text token reads an image token: see :func:`image_mask`. None: everywhere.
        """
        tokens = tokens + self.gate.tanh().to(tokens.dtype) * self._read(self.norm(tokens), context, mask)
        return tokens + self.mlp_gate.tanh().to(tokens.dtype) * self.mlp(self.mlp_norm(tokens))

    def _read(self, tokens: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        if not context.shape[1]:  # a padding token that nobody reads: all parameters keep a gradient, which is 0
            context = context.new_zeros(len(context), 1, context.shape[2])
            mask = torch.zeros(*tokens.shape[:2], 1, dtype=torch.bool, device=tokens.device)
        query, key, value = (
            layer(each).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, each in ((self.query, tokens), (self.key, context), (self.value, context))
        )
        if mask is None:
            found = F.scaled_dot_product_attention(query, key, value)
            return self.proj(found.transpose(1, 2).flatten(2))
        reads = mask.any(dim=2, keepdim=True)
        # A row without any key would be a softmax over nothing: it reads all, and what it found is left out.
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=(mask | ~reads)[:, None])
        return self.proj(found.transpose(1, 2).flatten(2)).masked_fill(~reads, 0)
