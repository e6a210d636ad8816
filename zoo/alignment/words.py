"""Words of captions: which tokens are some, how they are masked, and the losses of guessing them.

Nothing in a training step waits for the device: shapes are those of the batch, whatever is drawn.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MASK = "[MASK]"
"""Place of a token to fill in, in a text: of a word, or with bytes of a byte."""
IGNORED = -100
"""Target that cross_entropy does not count, its default."""


def masked_tokens(tokenizer: Any, texts: Sequence[str], context_length: int) -> Tensor:
    """Token ids (N, context_length) of texts with :data:`MASK` in them, int64, those of a mask for each.

    Raises:
        ValueError: For a text without a mask, or with more tokens than that.
    """
    around, mask = {tokenizer.start_id, tokenizer.end_id}, [tokenizer.mask_id]
    rows = []
    for number, text in enumerate(texts):
        if MASK not in text:
            raise ValueError(f"text {number}, {text!r}, has no {MASK} to fill in")
        first, *others = ([i for i in tokenizer.encode(part) if i not in around] for part in text.split(MASK))
        words = [*first, *(i for part in others for i in mask + part)]
        row = [i for i in (tokenizer.start_id, *words, tokenizer.end_id) if i is not None]
        if len(row) > context_length:
            raise ValueError(f"text {number} has {len(row)} tokens: expected at most {context_length}, context_length")
        rows.append(row + [tokenizer.pad_id] * (context_length - len(row)))
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), context_length)


def real_tokens(tokens: Tensor, pad_id: int, end_id: int | None) -> Tensor:
    """Mask (N, L), true where tokens (N, L) are no padding: up to the first end token, if the tokeniser has one.

    By the end token, since some tokenisers pad with a token that is also a word, or with the end token itself. The
    first token is taken for real in every case: attention to nothing at all is 0 / 0.
    """
    if end_id is None:
        real = tokens != pad_id
        real[:, 0] = True
        return real
    ends = (tokens == end_id).to(torch.int32)
    return ends.cumsum(1) - ends == 0


def mask_words(
    tokens: Tensor,
    maskable: Tensor,
    mask_id: int,
    words: Tensor,
    rate: float = 0.15,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens with some hidden: of those, 80 % by the mask token, 10 % by a random word, 10 % left as they are.

    Devlin et al. 2019, "BERT", section 3.1, each token by itself.

    Args:
        tokens: (N, L) int64.
        maskable: (N, L) bool: words, neither padding nor special tokens.
        mask_id: The mask token.
        words: (W,) int64, the tokens that a random word is drawn of.
        rate: Share of the maskable tokens to hide.
        generator: On the device of the tokens. None: torch's.

    Returns:
        Tokens (N, L) to be read, and (N, L) bool, true for those to be predicted.
    """

    def uniform() -> Tensor:
        return torch.rand(tokens.shape, dtype=torch.float32, device=tokens.device, generator=generator)

    chosen = maskable & (uniform() < rate)
    kind = uniform()
    drawn = torch.randint(len(words), tokens.shape, device=tokens.device, generator=generator)
    hidden = torch.where(kind < 0.8, mask_id, torch.where(kind < 0.9, words[drawn], tokens))
    return torch.where(chosen, hidden, tokens), chosen


def word_loss(logits: Tensor, tokens: Tensor, counted: Tensor) -> Tensor:
    """Mean cross-entropy in nats over the counted tokens, float32; 0 if none is counted.

    Args:
        logits: (N, L, V).
        tokens: (N, L) int64, the right ones.
        counted: (N, L) bool.
    """
    targets = tokens.masked_fill(~counted, IGNORED).flatten()
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction="sum")
    return total / counted.sum().clamp(min=1)


def caption_loss(logits: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each caption's next token, its end token included, float32.

    The one place that shifts: logits at position i are of token i + 1. The first token is given.

    Args:
        logits: (N, L, V), or (N, L - 1, V) without those of the last position, which no token follows.
        tokens: (N, L) int64.
        real: (N, L) bool, false for padding, which is not counted.
    """
    return word_loss(logits[:, : tokens.shape[1] - 1], tokens[:, 1:], real[:, 1:])


def soft_word_loss(logits: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Mean cross-entropy in nats to a teacher's probabilities over the counted tokens, float32; 0 if none is.

    Args:
        logits, targets: (N, L, V), logits both.
        counted: (N, L) bool.
    """
    losses = -(targets.float().softmax(2) * logits.float().log_softmax(2)).sum(2)
    return (losses * counted).sum() / counted.sum().clamp(min=1)
