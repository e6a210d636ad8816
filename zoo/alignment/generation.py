"""Beam search: captions word by word, from whatever gives the logits of the next one."""

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def beam_search(
    next_logits: Callable[[Tensor], Tensor],
    count: int,
    start_id: int,
    end_id: int,
    max_length: int,
    beams: int = 1,
    forbidden: Tensor | None = None,
) -> Tensor:
    """Token sequences of high probability, the best of each beam; with one beam, greedily.

    The best is the most probable of those that are found, without a penalty for its length. It stops as soon as all
    have ended.

    Args:
        next_logits: From tokens (count * beams, t), those of a beam side by side, to logits (count * beams, V).
        count: How many sequences.
        start_id, end_id: Tokens that each begins and ends with.
        max_length: Most tokens of a sequence, start and end included; one that has not ended by then is cut.
        beams: How many candidates are kept of each.
        forbidden: (V,) bool, true for tokens that are never written, on the device. None: none, on the CPU.

    Returns:
        Tokens (count, at most max_length), int64, filled up with end tokens.

    Raises:
        ValueError: For fewer than two tokens or one beam.
    """
    if max_length < 2 or beams < 1:
        raise ValueError(f"max_length is {max_length}, beams {beams}: expected at least 2 and 1")
    device = None if forbidden is None else forbidden.device
    tokens = torch.full((count, beams, 1), start_id, dtype=torch.int64, device=device)
    scores = torch.full((count, beams), -torch.inf, dtype=torch.float32, device=device)
    scores[:, 0] = 0  # the beams of a sequence are still the same: one counts
    ended = torch.zeros(count, beams, dtype=torch.bool, device=device)
    while tokens.shape[2] < max_length and not ended.all():
        logits = next_logits(tokens.flatten(0, 1)).float()
        if forbidden is not None:
            logits = logits.masked_fill(forbidden, -torch.inf)
        likely = logits.log_softmax(1).unflatten(0, (count, beams))
        # What has ended goes on with end tokens alone, at no cost.
        only_end = torch.full_like(likely[:1, :1], -torch.inf)
        only_end[..., end_id] = 0
        likely = torch.where(ended[:, :, None], only_end, likely)
        scores, best = (scores[:, :, None] + likely).flatten(1).topk(beams)
        beam, word = best // likely.shape[2], best % likely.shape[2]
        tokens = tokens.gather(1, beam[:, :, None].expand_as(tokens))
        tokens = torch.cat([tokens, word[:, :, None]], dim=2)
        ended = ended.gather(1, beam) | (word == end_id)
    return tokens[:, 0]  # topk sorts
