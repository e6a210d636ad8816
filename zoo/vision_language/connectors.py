"""Connectors: image tokens of a vision tower as tokens of a language model's width, by kind and plain options.

Every connector is called as ``connector(tokens, packing)``, with tokens (T, in_width) of images of any grids, and gives
tokens (T', out_width) and their packing. Class token and registers are left out. ``connector.counts(packing)`` says how
many tokens each image is going to have, from numbers on the host alone, and raises what the forward pass would.

``linear``
    One linear layer, the first LLaVA's (Liu et al. 2023, arXiv 2304.08485, section 4.1).
``mlp``
    Linear layers with GELU between them: two in LLaVA-1.5 (Liu et al. 2023, arXiv 2310.03744, section 3).
``merge``
    2x2 neighbours by a norm and an MLP: :class:`zoo.common.packed.compression.PatchMerger`, as Qwen2-VL's by default.
``resampler``
    Latents that attend to an image's tokens and to themselves: :class:`zoo.common.packed.compression.Resampler`.
    Idefics2 has 64 latents, 3 layers, 16 heads of 96 channels and 4 key heads; Qwen-VL (Bai et al. 2023, arXiv
    2308.12966, section 2.1) has 256 queries and a single layer of cross-attention alone, which also has positions.
``query``
    Queries that attend to each other and to the image: :class:`zoo.vision_language.query_transformer.QueryTransformer`,
    BLIP-2's.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any, Literal

from torch import Tensor, nn

from zoo.common.packed.compression import Order, PatchMerger, Resampler
from zoo.common.packed.packing import Packing
from zoo.common.ranges import check_above, check_ranges
from zoo.vision_language.query_transformer import QueryTransformer, heads_of

Kind = Literal["linear", "mlp", "merge", "resampler", "query"]


class TokenMLP(nn.Module):
    """An MLP over each token, all hidden layers of the width that it gives: LLaVA's projector at a depth of 2.

    Args:
        in_width: Of the tokens that it gets.
        out_width: Of the tokens that it gives, the language model's.
        depth: Number of linear layers.

    Raises:
        ValueError: For a depth below 1.
    """

    def __init__(self, in_width: int, out_width: int, *, depth: int = 2) -> None:
        super().__init__()
        check_ranges(depth=(depth, 1, None))
        layers: list[nn.Module] = [nn.Linear(in_width, out_width)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(out_width, out_width)]
        self.layers = nn.Sequential(*layers)

    def forward(self, tokens: Tensor, packing: Packing) -> tuple[Tensor, Packing]:
        """Tokens (T - B * prefix, out_width) of tokens (T, in_width), and their packing."""
        packing.check(tokens)
        tokens, packing = packing.without_prefix(tokens)
        return self.layers(tokens), packing

    def counts(self, packing: Packing) -> tuple[int, ...]:
        """Tokens that each image is going to have."""
        return packing.counts


Connector = TokenMLP | PatchMerger | Resampler | QueryTransformer


def _linear(in_width: int, out_width: int) -> Connector:
    return TokenMLP(in_width, out_width, depth=1)


def _merge(
    in_width: int,
    out_width: int,
    *,
    order: Order = "rows",
    norm: Literal["layer", "rms"] = "layer",
    norm_each: bool = True,
    norm_eps: float = 1e-6,
    hidden_width: int | None = None,
) -> Connector:
    check_ranges(hidden_width=(hidden_width, 1, None))
    check_above(norm_eps=(norm_eps, 0, 1))
    return PatchMerger(
        in_width, out_width, order=order, norm=norm, norm_each=norm_each, norm_eps=norm_eps, hidden_width=hidden_width
    )


def _resampler(
    in_width: int,
    out_width: int,
    *,
    tokens: int = 64,
    depth: int = 3,
    heads: int | None = None,
    head_width: int | None = None,
    key_heads: int | None = None,
    norm_eps: float = 1e-6,
) -> Connector:
    check_ranges(heads=(heads, 1, None), head_width=(head_width, 1, None))
    check_above(norm_eps=(norm_eps, 0, 1))
    heads = heads_of(out_width) if heads is None else heads
    return Resampler(
        out_width,
        tokens,
        in_width=in_width,
        depth=depth,
        heads=heads,
        head_width=max(1, out_width // heads) if head_width is None else head_width,
        key_heads=heads if key_heads is None else key_heads,
        norm_eps=norm_eps,
    )


KINDS: dict[str, Callable[..., Connector]] = {
    "linear": _linear,
    "mlp": TokenMLP,
    "merge": _merge,
    "resampler": _resampler,
    "query": QueryTransformer,
}


def options_of(kind: str) -> tuple[str, ...]:
    """Names of the options that a kind of connector has.

    Raises:
        ValueError: For an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown connector {kind!r}: expected one of {', '.join(KINDS)}")
    parameters = signature(KINDS[kind]).parameters.values()
    return tuple(each.name for each in parameters if each.kind is each.KEYWORD_ONLY)


def create_connector(kind: str, in_width: int, out_width: int, **options: Any) -> Connector:
    """A connector of a kind. Options that are None are left to it.

    Args:
        kind: "linear", "mlp", "merge", "resampler" or "query".
        in_width: Of the vision tower's tokens.
        out_width: Of the language model's.
        options: By kind.

            linear: none.

            mlp: ``depth`` (2).

            merge: ``order``, ``norm``, ``norm_each``, ``norm_eps``, ``hidden_width``: see
            :class:`zoo.common.packed.compression.PatchMerger`.

            resampler: ``tokens`` (64), ``depth`` (3), ``heads`` (one for each 64 channels of ``out_width``),
            ``head_width`` (``out_width / heads``), ``key_heads`` (``heads``), ``norm_eps`` (1e-6).

            query: ``tokens`` (32), ``depth`` (6), ``heads``, ``mlp_width``, ``cross_every`` (2), ``width``
            (``out_width``), ``norm_eps`` (1e-12): see
            :class:`zoo.vision_language.query_transformer.QueryTransformer`.

    Raises:
        ValueError: For an unknown kind, for an option that the kind does not have, or out of its range; for widths
            below 1.
    """
    known = options_of(kind)
    options = {name: value for name, value in options.items() if value is not None}
    unknown = [name for name in options if name not in known]
    if unknown:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise ValueError(f"connector {kind!r} has no option {', '.join(unknown)}: {has}")
    check_ranges(in_width=(in_width, 1, None), out_width=(out_width, 1, None))
    return KINDS[kind](in_width, out_width, **options)
