"""Generation token by token, greedily or by sampling, and likelihoods of given answers.

Sampling from the ``top_k`` likeliest tokens is Fan et al.'s (2018, arXiv 1805.04833, section 5.1), from the fewest that
make up a probability of ``top_p`` Holtzman et al.'s (2020, arXiv 1904.09751, section 3.1: nucleus sampling). Where both
are given, ``top_k`` comes first, and ``top_p`` is of what is left.

A language model with dropout must be in evaluation mode.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.common.ranges import check_above, check_ranges
from zoo.vision_language.language_model import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel,
    embeddings: Tensor,
    real: Tensor,
    *,
    end_id: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    forbidden: Tensor | None = None,
    cache: bool = True,
) -> Tensor:
    """Tokens that go on from prompts, (B, at most max_new_tokens) int64, filled up with ``end_id``.

    It stops as soon as all rows have ended. Rows of unequal length are padded on the left, and each is written as it
    would be alone: positions begin at 0 with its first real token.

    Args:
        model: Language model.
        embeddings: Prompts (B, L, W).
        real: (B, L) bool, false for padding, which stands on the left.
        end_id: Token that ends a row.
        max_new_tokens: Most tokens that are written.
        temperature: What logits are divided by before one token is drawn. 0: the likeliest is taken.
        top_k: Draws from so many of the likeliest alone.
        top_p: Draws from the fewest likely ones that make up such a probability alone, in (0, 1].
        generator: Of random numbers, on the device. None: torch's.
        forbidden: (V,) bool, true for tokens that are never written.
        cache: Keep keys and values of what was read. False: each step reads all again, which gives the same.

    Raises:
        ValueError: For other shapes, padding elsewhere, a row without tokens, options out of range, ``top_k`` or
            ``top_p`` where nothing is drawn, no token that is allowed, and prompts that leave less of the context.
    """
    _check_options(temperature, top_k, top_p, forbidden)
    check_ranges(max_new_tokens=(max_new_tokens, 1, None), end_id=(end_id, 0, model.vocab_size))
    _check_prompts(model, embeddings, real, max_new_tokens)
    batch, length = real.shape
    padded = not bool(real.all())
    # Rows without padding need neither a mask nor positions.
    seen = torch.cat([real, real.new_ones(batch, max_new_tokens)], 1) if padded else None
    positions = (seen.cumsum(1) - 1).clamp(min=0) if seen is not None else None
    held = model.create_cache(batch, length + max_new_tokens - 1) if cache else None
    ended = torch.zeros(batch, dtype=torch.bool, device=embeddings.device)
    tokens: list[Tensor] = []
    given, end = embeddings, length
    while True:
        start = end - given.shape[1]
        hidden = model(
            given,
            positions=None if positions is None else positions[:, start:end],
            seen=None if seen is None else seen[:, :end],
            cache=held,
        )[:, -1]
        chosen = next_tokens(model.logits(hidden), temperature, top_k, top_p, generator, forbidden)
        tokens.append(torch.where(ended, end_id, chosen))
        ended = ended | (chosen == end_id)
        if len(tokens) == max_new_tokens or bool(ended.all()):
            return torch.stack(tokens, dim=1)
        new = model.embed(tokens[-1][:, None])
        given, end = new if cache else torch.cat([given, new.to(given.dtype)], dim=1), end + 1


def next_tokens(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    forbidden: Tensor | None = None,
) -> Tensor:
    """One token of each row, int64 (B,), from logits (B, V), in float32: see :func:`generate`."""
    logits = logits.float()
    if forbidden is not None:
        logits = logits.masked_fill(forbidden, -torch.inf)
    if not temperature:
        return logits.argmax(1)
    likely = limited((logits - logits.amax(1, keepdim=True)) / temperature, top_k, top_p).softmax(1)
    return torch.multinomial(likely, 1, generator=generator).squeeze(1)


def limited(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Logits (B, V) with minus infinity for all tokens but those that may be drawn.

    Args:
        logits: (B, V).
        top_k: How many of the likeliest; of equal ones, those of lower numbers. None, or more than V: all.
        top_p: Probability that the likeliest ones make up, of which the fewest are kept, one at least. None: 1.
    """
    if top_k is None and top_p is None:
        return logits
    ordered, order = logits.sort(dim=1, descending=True, stable=True)
    if top_k is not None:
        ordered[:, top_k:] = -torch.inf
    if top_p is not None:
        likely = ordered.softmax(1)
        ordered = ordered.masked_fill(likely.cumsum(1) - likely >= top_p, -torch.inf)
    return torch.empty_like(logits).scatter_(1, order, ordered)


@torch.no_grad()
def answer_log_likelihoods(model: LanguageModel, embeddings: Tensor, answers: Sequence[Sequence[int]]) -> Tensor:
    """Log-likelihoods of answers after one prompt, in nats, (A,) float32: sums over each one's tokens.

    The prompt is read once, and all answers together in a second pass.

    Args:
        model: Language model.
        embeddings: The prompt (1, L, W), without padding.
        answers: Tokens of each of A answers, with an end token where that is to count.

    Raises:
        ValueError: For another shape of the prompt; for no answers, one without tokens, or with others than the
            model's; where prompt and answer are longer than the context.
    """
    if embeddings.ndim != 3 or len(embeddings) != 1 or not embeddings.shape[1]:
        raise ValueError(f"the prompt is {tuple(embeddings.shape)}: expected (1, L, {model.width}), L at least 1")
    if not answers:
        raise ValueError("there are no answers: expected at least one")
    for index, answer in enumerate(answers):
        if not len(answer):
            raise ValueError(f"answer {index} has no tokens: expected at least one")
        check_ranges(**{f"answer {index}": (tuple(answer), 0, model.vocab_size)})
    longest = max(map(len, answers))
    padded = [[*answer, *[0] * (longest - len(answer))] for answer in answers]  # on the right, where nothing sees it
    tokens = torch.tensor(padded, device=embeddings.device)
    counts = torch.tensor([len(answer) for answer in answers], device=embeddings.device)
    cache = model.create_cache(1, embeddings.shape[1] + longest - 1)
    hidden = model(embeddings, cache=cache)[:, -1:].expand(len(answers), -1, -1)
    if longest > 1:
        own = cache.rows(torch.zeros(len(answers), dtype=torch.int64, device=embeddings.device))
        hidden = torch.cat([hidden, model(model.embed(tokens[:, :-1]), cache=own)], dim=1)
    logits = model.logits(hidden).float()
    likely = logits.gather(2, tokens[:, :, None]).squeeze(2) - logits.logsumexp(2)
    counted = torch.arange(longest, device=tokens.device) < counts[:, None]
    return torch.where(counted, likely, 0).sum(1)


def _check_options(temperature: float, top_k: int | None, top_p: float | None, forbidden: Tensor | None) -> None:
    check_ranges(temperature=(temperature, 0, None), top_k=(top_k, 1, None))
    check_above(top_p=(top_p, 0, 1))
    if not temperature and (top_k is not None or top_p is not None):
        raise ValueError("temperature is 0, which draws nothing: leave out top_k and top_p, or set temperature above 0")
    if forbidden is not None and bool(forbidden.all()):
        raise ValueError("forbidden names every token: at least one must be left to write")


def _check_prompts(model: LanguageModel, embeddings: Tensor, real: Tensor, new: int) -> None:
    if embeddings.ndim != 3 or real.shape != embeddings.shape[:2] or not real.numel():
        raise ValueError(
            f"embeddings are {tuple(embeddings.shape)}, real {tuple(real.shape)}: expected (B, L, W) and (B, L), of at "
            "least one row and token"
        )
    wrong = ~real[:, -1] | (real[:, :-1] & ~real[:, 1:]).any(1)
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        raise ValueError(f"prompt {row} ends in padding, or has it in between: pad on the left")
    total = real.shape[1] + new - 1  # what is written last is not read
    if total > model.context_length:
        raise ValueError(
            f"prompts of {real.shape[1]} tokens and {new} new ones need a context of {total}, and context_length is "
            f"{model.context_length}: write fewer, or shorten the prompts"
        )
