"""Causal language model: pre-norm blocks with rotations, RMSNorm and SwiGLU, as Llama has them.

Llama (Touvron et al. 2023, arXiv 2302.13971, section 2.2) puts together RMSNorm before each branch (Zhang and Sennrich
2019, arXiv 1910.07467), SwiGLU (Shazeer 2020, arXiv 2002.05202) and rotations of queries and keys (Su et al. 2021,
arXiv 2104.09864); queries may share keys and values in groups (Ainslie et al. 2023, arXiv 2305.13245). With the same
weights it computes the same: see :mod:`zoo.vision_language.layouts`.

Deviations: initial weights are normal with a deviation of 1 / sqrt(width), and 1 / sqrt(2 depth) of it where a branch
ends, so that the sum of all branches does not grow with the depth (Radford et al. 2019, "GPT-2", section 2.3). GPT-2's
0.02 is that of a width of 2,500: at a width of 128 attention begins so flat with it that looking up what stands beside
a word is not learned in thousands of steps. Input and
output embeddings are tied (Press and Wolf 2017, arXiv 1608.05859), as is usual for small models; Llama's are not.
"""

from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from timm.models import checkpoint
from torch import Tensor, nn

from zoo.common.ranges import check_above, check_ranges
from zoo.vision_language.blocks import CausalBlock, rotations
from zoo.vision_language.cache import KeyValueCache, check_room
from zoo.vision_language.masks import attention_mask, check_call, counted


@runtime_checkable
class LanguageModel(Protocol):
    """Causal language model over embeddings, which may be those of its tokens or of anything else.

    Attributes:
        width: Width W of embeddings.
        vocab_size: Number V of tokens.
        context_length: Most tokens of a sequence.
    """

    width: int
    vocab_size: int
    context_length: int

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings (..., W) of tokens (...)."""
        ...

    def __call__(
        self,
        embeddings: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        seen: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Hidden states (B, L, width of the output) behind the last norm: see :meth:`CausalTransformer.forward`."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of the token that comes next, of hidden states, of whichever positions."""
        ...

    def create_cache(self, batch: int, capacity: int) -> Any:
        """An empty :class:`zoo.vision_language.cache.Cache` for so many rows, and so many tokens in each."""
        ...


class CausalTransformer(nn.Module):
    """Causal transformer over embeddings, Llama's.

    Args:
        vocab_size: Number V of tokens.
        width: Width W of the embeddings.
        depth: Number of blocks.
        heads: Attention heads of a block.
        key_heads: Heads of keys and values, each shared by ``heads / key_heads`` heads of queries. None: ``heads``.
        mlp_width: Hidden width of the gated MLPs. None: 8/3 of ``width``, rounded up to a multiple of 8, which takes as
            many weights as an MLP without gate of four times ``width``.
        context_length: Most tokens of a sequence.
        rope_theta: Base of the rotations: channel pair i of a head of d channels turns by
            ``position * rope_theta ** (-2 i / d)``.
        norm_eps: Epsilon of RMSNorm.
        dropout: Dropout of attention weights, inside the MLPs and behind both branches.
        tied: Whether the output weights are those of the embeddings.

    Attributes:
        token_embed: Embeddings of the tokens.
        blocks: Blocks.
        norm: Last norm.
        head: Output weights, None where they are tied.

    Raises:
        ValueError: For numbers out of range; heads that do not divide the width, or leave an odd number of channels to
            each; ``key_heads`` that do not divide ``heads``.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int = 256,
        depth: int = 4,
        heads: int = 4,
        key_heads: int | None = None,
        mlp_width: int | None = None,
        context_length: int = 1024,
        rope_theta: float = 10000.0,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        tied: bool = True,
    ) -> None:
        super().__init__()
        check_ranges(vocab_size=(vocab_size, 1, None), width=(width, 1, None), depth=(depth, 1, None))
        check_ranges(heads=(heads, 1, None), key_heads=(key_heads, 1, None), mlp_width=(mlp_width, 1, None))
        check_ranges(context_length=(context_length, 1, None), dropout=(dropout, 0, 1))
        check_above(norm_eps=(norm_eps, 0, 1), rope_theta=(rope_theta, 0, float("inf")))
        if width % heads:
            raise ValueError(f"heads is {heads}, which does not divide the width {width}")
        if width // heads % 2:
            raise ValueError(
                f"heads have {width // heads} channels ({width} / {heads}): rotations turn pairs, expected even"
            )
        key_heads = heads if key_heads is None else key_heads
        if heads % key_heads:
            raise ValueError(f"key_heads is {key_heads}, which does not divide heads, {heads}")
        if mlp_width is None:
            mlp_width = -(-width * 8 // 24) * 8
        self.width, self.vocab_size, self.context_length = width, vocab_size, context_length
        self.head_width, self.rope_theta = width // heads, rope_theta
        self.grad_checkpointing = False
        self.token_embed = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(
            CausalBlock(width, heads, key_heads, mlp_width, norm_eps, dropout) for _ in range(depth)
        )
        self.norm = nn.RMSNorm(width, eps=norm_eps)
        self.head = None if tied else nn.Linear(width, vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Sets initial weights: the deeper the network, the smaller what a block adds. Norms begin with ones."""
        inner = self.width**-0.5
        residual = inner * (2 * len(self.blocks)) ** -0.5
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear | nn.Embedding):
                nn.init.normal_(layer.weight, std=residual if name.endswith((".attn.proj", ".mlp.fc2")) else inner)
            elif isinstance(layer, nn.RMSNorm):
                nn.init.ones_(layer.weight)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings (..., W) of tokens (...), integers below ``vocab_size``."""
        embeddings: Tensor = self.token_embed(tokens)
        return embeddings

    def forward(
        self,
        embeddings: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        seen: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Hidden states (B, L, W) behind the last norm; each token has read itself and those before it.

        Without ``segments`` and ``seen``, attention needs no mask: padding on the right is seen by no token before it,
        and what stands at padding means nothing.

        Args:
            embeddings: (B, L, W).
            positions: (B, L) int64, what the rotations see. None: 0, 1, ... in each segment; without segments, from the
                cache's length on.
            segments: (B, L) integers, for several sequences in a row: each token reads those of its own segment alone.
                A segment lies in one piece, and has at most ``context_length`` tokens, which whoever packs sees to:
                looking for it here would wait for the device. 0 is padding, of which each reads itself. None: a row is
                one sequence.
            seen: (B, S) bool, for rows that are padded on the left: which of S tokens, those in the cache and the L
                new ones, may be read. A token may always read itself.
            cache: Of :meth:`create_cache`: what it holds comes before the new tokens, which it then holds as well.

        Raises:
            ValueError: For other shapes, segments together with a cache or ``seen``, a sequence beyond
                ``context_length`` where positions are counted here, and a full cache.
        """
        past = 0 if cache is None else cache.length
        limits = self.width, self.context_length
        check_call(*limits, embeddings, positions, segments, seen, None if cache is None else past)
        if cache is not None:
            check_room(cache, *embeddings.shape[:2])
        if positions is None:
            positions = counted(embeddings, segments, past)
        mask = attention_mask(embeddings, segments, seen, past)
        turns = rotations(positions, self.head_width, self.rope_theta)
        x = embeddings
        recompute = self.grad_checkpointing and self.training and cache is None
        for index, block in enumerate(self.blocks):
            run = partial(checkpoint, block) if recompute else block
            x = run(x, turns, mask, cache, index)
        if cache is not None:
            cache.advance(embeddings.shape[1])
        hidden: Tensor = self.norm(x)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of the token that comes next, of hidden states (..., W), of whichever positions."""
        return F.linear(hidden, self.token_embed.weight if self.head is None else self.head.weight)

    def create_cache(self, batch: int, capacity: int) -> KeyValueCache:
        """An empty cache for so many rows, and so many tokens in each.

        Raises:
            ValueError: For none.
        """
        return KeyValueCache(len(self.blocks), batch, capacity)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Has the backward pass recompute the blocks: less memory, about a third more time."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Layers by their parameters' names, as timm's networks state them."""
        last = r"^norm|^head" if coarse else (r"^norm|^head", (99999,))
        blocks = r"^blocks\.(\d+)"
        return {"stem": r"^token_embed", "blocks": blocks if coarse else [(blocks, None), last]}
