"""Fewer tokens for a language model: 2x2 neighbours merged by an MLP, or attention to a budget of latents.

``PatchMerger``
    Channels of 2x2 neighbours are concatenated, row by row, and an MLP of two layers brings them to the language
    model's width. In Qwen2-VL (Wang et al. 2024, arXiv 2409.12191, section 2.1) each patch is normalised before it is
    concatenated, in InternVL (Chen et al. 2024, arXiv 2404.16821, section 3.1: pixel shuffle) its four together.
    Both concatenate channels alike. The order in which tokens come is another: row by row in InternVL, as in this
    package, and in 2x2 blocks, which lie row by row, in Qwen's towers. What is left lies row by row in both.
``Resampler``
    The perceiver resampler of Idefics2 (Laurençon et al. 2024, arXiv 2405.02246, section 3; after Flamingo, Alayrac et
    al. 2022, arXiv 2204.14198, section 2.1): latents attend to an image's tokens and to themselves.

Deviations: latents begin as small normal numbers, as Flamingo's, where transformers' Idefics2 begins with ones: latents
that are equal stay equal. Tokens that were merged before weigh by their sizes (:mod:`zoo.packed_vit.merging`).
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, get_args

import torch
from timm.layers import Mlp, RmsNorm, SwiGLU
from torch import Tensor, nn

from zoo.common.packed.attention import packed_attention
from zoo.common.packed.packing import Grid, Packing

Order = Literal["rows", "blocks"]
NORMS = {"layer": nn.LayerNorm, "rms": RmsNorm}


class PatchMerger(nn.Module):
    """Merges 2x2 neighbouring patches into one token: ``forward(tokens, packing)`` gives both for the merged.

    The defaults are Qwen2-VL's; Qwen2.5-VL has ``norm="rms"``. InternVL's projector has ``norm_each=False``,
    ``hidden_width=out_width`` and ``norm_eps=1e-5``.

    Args:
        width: Of the tokens.
        out_width: Of the merged tokens, the language model's.
        order: How an image's patches come: "rows", row by row, or "blocks", in 2x2 blocks as in Qwen's towers.
        norm: "layer" or "rms".
        norm_each: Whether each patch is normalised before it is concatenated, or its four together after it.
        norm_eps: Of the norm.
        hidden_width: Of the MLP. None: four times ``width``.

    Raises:
        ValueError: For an unknown order or norm.
    """

    def __init__(
        self,
        width: int,
        out_width: int,
        *,
        order: Order = "rows",
        norm: Literal["layer", "rms"] = "layer",
        norm_each: bool = True,
        norm_eps: float = 1e-6,
        hidden_width: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, choices in (("order", order, get_args(Order)), ("norm", norm, NORMS)):
            if value not in choices:
                raise ValueError(f"unknown {name} {value!r}: expected one of {', '.join(choices)}")
        self.order, self.norm_each = order, norm_each
        self.norm = NORMS[norm](width if norm_each else 4 * width, eps=norm_eps)
        self.mlp = Mlp(4 * width, 4 * width if hidden_width is None else hidden_width, out_width)

    def forward(self, tokens: Tensor, packing: Packing) -> tuple[Tensor, Packing]:
        """Merged tokens (T, out_width), row by row, and their packing.

        Class token and registers, which have no neighbours, are left out.

        Args:
            tokens: (T, width).
            packing: Of the tokens, with grids of even sides.

        Raises:
            ValueError: For an image with an odd side, for tokens of which some were merged or dropped, or are missing.
        """
        packing.check(tokens)
        grids = _even(packing)
        if packing.prefix or self.order == "rows":
            tokens = tokens[self._blocks(packing, grids, tokens.device)]
        if self.norm_each:
            tokens = self.norm(tokens)
        merged = tokens.unflatten(0, (-1, 4)).flatten(1)
        if not self.norm_each:
            merged = self.norm(merged)
        return self.mlp(merged), Packing.of([(rows // 2, columns // 2) for rows, columns in grids])

    def counts(self, packing: Packing) -> tuple[int, ...]:
        """Tokens that each image is going to have. Raises ValueError as the forward pass does."""
        return tuple(rows * columns // 4 for rows, columns in _even(packing))

    def _blocks(self, packing: Packing, grids: Sequence[Grid], device: torch.device) -> Tensor:
        """Indices of the patch tokens in the order of 2x2 blocks, int64."""
        parts = []
        for start, (rows, columns) in zip(packing.starts, grids, strict=True):
            places = torch.arange(rows * columns) + (start + packing.prefix)
            if self.order == "rows":
                places = places.view(rows // 2, 2, columns // 2, 2).transpose(1, 2).flatten()
            parts.append(places)
        return torch.cat(parts).to(device, non_blocking=True)

    def extra_repr(self) -> str:
        """Options that no part says."""
        return f"order={self.order}, norm_each={self.norm_each}"


def _even(packing: Packing) -> tuple[Grid, ...]:
    """Grids of images, all of even sides."""
    if packing.grids is None:
        raise ValueError(
            "some tokens were merged or dropped: 2x2 neighbours need whole grids; set merge and patch_drop to 0"
        )
    for index, (rows, columns) in enumerate(packing.grids):
        if rows % 2 or columns % 2:
            raise ValueError(
                f"image {index} has {rows}x{columns} patches: expected even numbers for 2x2 merging; give images "
                "sides that are multiples of two patches"
            )
    return packing.grids


class Resampler(nn.Module):
    """Idefics2's perceiver resampler: ``forward(tokens, packing)`` gives a fixed number of tokens of each image.

    Args:
        width: Of the tokens that it gives, the language model's.
        tokens: Tokens of each image, whatever its size.
        in_width: Of the tokens that it gets. Where it is given, a gated MLP brings them to ``width`` first, as
            Idefics2's modality projection does. None: ``width``, and no MLP.
        depth: Number of layers.
        heads: Attention heads.
        head_width: Channels of a head.
        key_heads: Heads of keys and values, each shared by ``heads / key_heads`` heads of queries.
        norm_eps: Of the norms.

    Raises:
        ValueError: For no tokens or layers, and for heads that key_heads do not divide.
    """

    def __init__(
        self,
        width: int,
        tokens: int = 64,
        *,
        in_width: int | None = None,
        depth: int = 3,
        heads: int = 16,
        head_width: int = 96,
        key_heads: int = 4,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        for name, value in (("tokens", tokens), ("depth", depth), ("key_heads", key_heads)):
            if value < 1:
                raise ValueError(f"{name} is {value}: expected at least 1")
        if heads < 1 or heads % key_heads:
            raise ValueError(f"heads is {heads} with key_heads {key_heads}: expected a multiple of it")
        self.projection = nn.Identity() if in_width is None else SwiGLU(in_width, 4 * width, width, bias=False)
        self.latents = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.layers = nn.ModuleList(ResamplerLayer(width, heads, head_width, key_heads, norm_eps) for _ in range(depth))
        self.norm = RmsNorm(width, eps=norm_eps)

    def forward(self, tokens: Tensor, packing: Packing) -> tuple[Tensor, Packing]:
        """Tokens (B * tokens, width), so many of each image, and their packing, without grids.

        Class token and registers are left out.

        Args:
            tokens: (T, in_width).
            packing: Of the tokens; some may have been merged or dropped.

        Raises:
            ValueError: For tokens of another number than the packing's.
        """
        packing.check(tokens)
        tokens, packing = packing.without_prefix(tokens)
        sizes = packing.sizes
        tokens = self.projection(tokens)
        images, each = len(packing.counts), len(self.latents)
        order = _with_latents(packing.counts, each).to(tokens.device, non_blocking=True)
        bias = None if sizes is None else torch.cat([sizes.log(), sizes.new_zeros(images * each)])[order]
        latents = self.latents.repeat(images, 1)
        for layer in self.layers:
            latents = layer(latents, tokens, order, packing.counts, bias)
        return self.norm(latents), Packing((each,) * images)

    def counts(self, packing: Packing) -> tuple[int, ...]:
        """Tokens that each image is going to have."""
        return (len(self.latents),) * len(packing.counts)


def _with_latents(counts: Sequence[int], each: int) -> Tensor:
    """Order that puts each image's latents, which lie behind all tokens, behind those of the image: int64, on a CPU."""
    parts = []
    for image, start in enumerate(accumulate(counts[:-1], initial=0)):
        parts += [torch.arange(counts[image]) + start, torch.arange(each) + (sum(counts) + image * each)]
    return torch.cat(parts)


class ResamplerLayer(nn.Module):
    """A layer of the resampler: latents attend to tokens and to themselves, then a gated MLP changes each.

    Args:
        width: Of latents and tokens.
        heads: Attention heads.
        head_width: Channels of a head.
        key_heads: Heads of keys and values.
        norm_eps: Of the norms.
    """

    def __init__(self, width: int, heads: int, head_width: int, key_heads: int, norm_eps: float) -> None:
        super().__init__()
        self.heads, self.key_heads = heads, key_heads
        self.latents_norm, self.tokens_norm = RmsNorm(width, eps=norm_eps), RmsNorm(width, eps=norm_eps)
        self.query = nn.Linear(width, heads * head_width, bias=False)
        self.key = nn.Linear(width, key_heads * head_width, bias=False)
        self.value = nn.Linear(width, key_heads * head_width, bias=False)
        self.proj = nn.Linear(heads * head_width, width, bias=False)
        self.mlp_norm = RmsNorm(width, eps=norm_eps)
        self.mlp = SwiGLU(width, 4 * width, bias=False)

    def forward(
        self, latents: Tensor, tokens: Tensor, order: Tensor, counts: Sequence[int], bias: Tensor | None = None
    ) -> Tensor:
        """Latents (B * N, width) that have read the tokens (T, width) of their image.

        Args:
            latents: (B * N, width).
            tokens: (T, width).
            order: Indices that bring tokens and latents, one behind the other, image by image: (T + B * N,).
            counts: Tokens of each of the B images.
            bias: What is added to the scores of each of them, in this order: (T + B * N,).
        """
        each = len(latents) // len(counts)
        normed = self.latents_norm(latents)
        read = torch.cat([self.tokens_norm(tokens), normed])[order]
        shared = self.heads // self.key_heads
        key, value = (
            layer(read).unflatten(1, (self.key_heads, -1)).repeat_interleave(shared, dim=1)
            for layer in (self.key, self.value)
        )
        query = self.query(normed).unflatten(1, (self.heads, -1))
        lengths = [count + each for count in counts]
        found = packed_attention(query, key, value, (each,) * len(counts), lengths, bias)
        latents = latents + self.proj(found.flatten(1))
        return latents + self.mlp(self.mlp_norm(latents))
