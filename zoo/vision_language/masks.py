"""Positions and masks of a causal language model's calls: whole rows, packed ones, and rows padded on the left."""

import torch
import torch.nn.functional as F
from torch import Tensor


def counted(embeddings: Tensor, segments: Tensor | None, past: int) -> Tensor:
    """Positions (B or 1, L) of embeddings (B, L, W): from 0 on in each segment, or from ``past`` on in each row."""
    places = torch.arange(past, past + embeddings.shape[1], device=embeddings.device)[None]
    if segments is None:
        return places
    before = F.pad(segments[:, :-1], (1, 0), value=-1)
    return places - torch.where(segments != before, places, 0).cummax(1).values


def attention_mask(embeddings: Tensor, segments: Tensor | None, seen: Tensor | None, past: int) -> Tensor | None:
    """Mask of what each of L new tokens may read, of a cache and of the new ones: (B or 1, 1, L, past + L) bool.

    None where the new tokens see all before them and attention needs no mask: without a past, or one by one.

    Args:
        embeddings: (B, L, W), for their number and device.
        segments, seen: As of :meth:`zoo.vision_language.language_model.CausalTransformer.forward`.
        past: Tokens in the cache.
    """
    length = embeddings.shape[1]
    if segments is None and seen is None and (not past or length == 1):
        return None
    places = torch.arange(past + length, device=embeddings.device)
    own = places[past:, None]
    mask = places <= own
    if seen is not None:
        mask = mask & seen[:, None, None] | (places == own)
    if segments is not None:
        mask = mask & ((segments[:, None] == segments[:, :, None]) & (segments[:, None] != 0))[:, None]
        mask = mask | (places == own)  # attention to nothing at all is 0 / 0
    return mask if mask.ndim == 4 else mask[None, None]


def check_call(
    width: int,
    context_length: int,
    embeddings: Tensor,
    positions: Tensor | None,
    segments: Tensor | None,
    seen: Tensor | None,
    past: int | None,
) -> None:
    """Raises ValueError for a call that a language model cannot follow.

    Args:
        width, context_length: Of the model.
        embeddings, positions, segments, seen: As of
            :meth:`zoo.vision_language.language_model.CausalTransformer.forward`.
        past: Tokens in the cache. None: there is no cache.
    """
    if embeddings.ndim != 3 or embeddings.shape[2] != width:
        raise ValueError(f"embeddings are {tuple(embeddings.shape)}: expected (B, L, {width})")
    batch, length = embeddings.shape[:2]
    total = (past or 0) + length
    shapes = {"positions": (positions, length), "segments": (segments, length), "seen": (seen, total)}
    for name, (given, expected) in shapes.items():
        if given is not None and given.shape != (batch, expected):
            raise ValueError(f"{name} are {tuple(given.shape)} for {batch} rows: expected {(batch, expected)}")
    if segments is not None and (seen is not None or past is not None):
        raise ValueError("segments are for whole rows: leave out seen and cache")
    if positions is None and segments is None and total > context_length:
        raise ValueError(f"sequences of {total} tokens are longer than context_length, {context_length}")
