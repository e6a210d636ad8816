"""QueryTransformer: BLIP-2's, learned queries that attend to each other and to an image's tokens.

The querying transformer of BLIP-2 (Li et al. 2023, arXiv 2301.12597, section 3.1) as its second stage uses it, for
images alone: layers of BERT, each norm behind its sum, in every second of which the queries attend to the image.

Deviations: the half of it that reads text, with which the paper's first stage trains it, is not there. Nothing is
dropped out, where the paper trains with BERT's 0.1. Tokens that were merged before weigh by their sizes.
"""

from collections.abc import Sequence

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from zoo.common.packed.attention import packed_attention
from zoo.common.packed.packing import Packing
from zoo.common.ranges import check_above, check_ranges


def heads_of(width: int) -> int:
    """The largest number of heads that divide a width into 64 channels or more each; 1 for a smaller width."""
    return next(heads for heads in range(max(1, width // 64), 0, -1) if width % heads == 0)


class Attention(nn.Module):
    """Multi-head attention of queries to keys of the same image: ``proj`` of what is found, without the residual.

    Args:
        width: Of what attends.
        context_width: Of what is attended to.
        heads: Attention heads; they divide ``width``.
    """

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key, self.value = nn.Linear(context_width, width), nn.Linear(context_width, width)
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        tokens: Tensor,
        context: Tensor,
        lengths: Sequence[int],
        context_lengths: Sequence[int],
        bias: Tensor | None = None,
    ) -> Tensor:
        """Sums (T, width) of what tokens (T, width) find in their image's context (S, context_width).

        Args:
            tokens: (T, width).
            context: (S, context_width).
            lengths: Tokens of each image.
            context_lengths: Of its context.
            bias: What is added to the scores of each of the context, (S,).
        """
        query, key, value = (
            layer(each).unflatten(1, (self.heads, -1))
            for layer, each in ((self.query, tokens), (self.key, context), (self.value, context))
        )
        return self.proj(packed_attention(query, key, value, lengths, context_lengths, bias).flatten(1))


class QueryLayer(nn.Module):
    """A layer: queries attend to each other, to the image where ``crosses``, then an MLP changes each.

    Args:
        width: Of the queries.
        context_width: Of the image's tokens.
        heads: Attention heads.
        mlp_width: Of the MLP's hidden layer.
        norm_eps: Of the norms.
        crosses: Whether queries attend to the image.
    """

    def __init__(
        self, width: int, context_width: int, heads: int, mlp_width: int, norm_eps: float, crosses: bool
    ) -> None:
        super().__init__()
        self.attention, self.attention_norm = Attention(width, width, heads), nn.LayerNorm(width, eps=norm_eps)
        self.cross = Attention(width, context_width, heads) if crosses else None
        self.cross_norm = nn.LayerNorm(width, eps=norm_eps) if crosses else None
        self.mlp, self.mlp_norm = Mlp(width, mlp_width), nn.LayerNorm(width, eps=norm_eps)

    def forward(
        self, queries: Tensor, tokens: Tensor, each: int, counts: Sequence[int], bias: Tensor | None = None
    ) -> Tensor:
        """Queries (B * N, width) that have read each other and the tokens (T, context_width) of their image.

        Args:
            queries: (B * N, width).
            tokens: (T, context_width).
            each: N.
            counts: Tokens of each of the B images.
            bias: What is added to the scores of each of them, (T,).
        """
        lengths = (each,) * len(counts)
        queries = self.attention_norm(queries + self.attention(queries, queries, lengths, lengths))
        if self.cross is not None and self.cross_norm is not None:
            queries = self.cross_norm(queries + self.cross(queries, tokens, lengths, counts, bias))
        return self.mlp_norm(queries + self.mlp(queries))


class QueryTransformer(nn.Module):
    """BLIP-2's query transformer: ``forward(tokens, packing)`` gives a fixed number of tokens of each image.

    BLIP-2 has 32 queries, 12 layers of 768 channels, 12 heads and MLPs of 3072, with cross-attention in every second
    layer, beginning with the first.

    Args:
        in_width: Of the tokens that it gets.
        out_width: Of the tokens that it gives, the language model's, to which a linear layer brings the queries.
        tokens: Queries, the tokens of each image, whatever its size.
        width: Of the queries. None: ``out_width``.
        depth: Number of layers.
        heads: Attention heads; they divide ``width``. None: one for each 64 channels, as BLIP-2's, or the next fewer
            that divide.
        mlp_width: Of the MLPs' hidden layers. None: four times ``width``.
        cross_every: Queries attend to the image in layers 0, ``cross_every``, twice that, and so on.
        norm_eps: Of the norms, BERT's.

    Raises:
        ValueError: For sizes below 1, and for heads that do not divide the width.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        *,
        tokens: int = 32,
        width: int | None = None,
        depth: int = 6,
        heads: int | None = None,
        mlp_width: int | None = None,
        cross_every: int = 2,
        norm_eps: float = 1e-12,
    ) -> None:
        super().__init__()
        width = out_width if width is None else width
        sizes = {"tokens": tokens, "width": width, "depth": depth, "heads": heads, "mlp_width": mlp_width}
        check_ranges(**{name: (size, 1, None) for name, size in (sizes | {"cross_every": cross_every}).items()})
        check_above(norm_eps=(norm_eps, 0, 1))
        heads = heads_of(width) if heads is None else heads
        if width % heads:
            raise ValueError(f"heads is {heads}, which does not divide the width of the queries, {width}")
        mlp_width = 4 * width if mlp_width is None else mlp_width
        self.queries = nn.Parameter(torch.empty(tokens, width))
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.layers = nn.ModuleList(
            QueryLayer(width, in_width, heads, mlp_width, norm_eps, index % cross_every == 0) for index in range(depth)
        )
        self.proj = nn.Linear(width, out_width)
        self._initialise()

    def _initialise(self) -> None:
        """Normal weights of BERT's 0.02, of queries, too, which equal ones would stay equal; no biases."""
        nn.init.normal_(self.queries, std=0.02)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)

    def read(self, tokens: Tensor, packing: Packing) -> tuple[Tensor, Packing]:
        """Queries (B * N, width) behind the last layer, before the linear one, and their packing."""
        packing.check(tokens)
        tokens, packing = packing.without_prefix(tokens)
        images, each = len(packing.counts), len(self.queries)
        bias = None if packing.sizes is None else packing.sizes.log()
        queries = self.norm(self.queries.repeat(images, 1))
        for layer in self.layers:
            queries = layer(queries, tokens, each, packing.counts, bias)
        return queries, Packing((each,) * images)

    def forward(self, tokens: Tensor, packing: Packing) -> tuple[Tensor, Packing]:
        """Tokens (B * N, out_width), N of each image, and their packing, without grids.

        Class token and registers are left out.

        Args:
            tokens: (T, in_width).
            packing: Of the tokens; some may have been merged or dropped.

        Raises:
            ValueError: For tokens of another number than the packing's.
        """
        queries, packing = self.read(tokens, packing)
        return self.proj(queries), packing

    def counts(self, packing: Packing) -> tuple[int, ...]:
        """Tokens that each image is going to have."""
        return (len(self.queries),) * len(packing.counts)
