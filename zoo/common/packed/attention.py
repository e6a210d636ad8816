"""Attention among flat tokens, each image's by itself, without a mask.

On a GPU in half precision one kernel takes sequences of all lengths. Elsewhere images of equal length that lie beside
each other are one call, others a call each: a mask over all tokens costs the square of their number, and forbids the
kernels that make attention fast. Padding is neither computed nor stored.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    key_lengths: Sequence[int] | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention (T, H, d) of sequences that lie one after another.

    Args:
        query: (T, H, d).
        key: (S, H, d).
        value: (S, H, d).
        lengths: Queries of each sequence, T in all.
        key_lengths: Keys of each, S in all. None: as many.
        bias: What is added to the scores of each key, (S,). None: nothing.
        dropout: Probability of dropping an attention weight.
    """
    key_lengths = lengths if key_lengths is None else key_lengths
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and bias is None and not dropout:
        ends, key_ends = _ends(lengths, query.device), _ends(key_lengths, query.device)
        longest = max(lengths), max(key_lengths)
        return cast(Tensor, varlen_attn(query, key, value, ends, key_ends, *longest))
    parts = []
    for count, rows, keys, start, key_start in _alike(lengths, key_lengths):
        of_queries, of_keys = slice(start, start + count * rows), slice(key_start, key_start + count * keys)
        found = F.scaled_dot_product_attention(
            query[of_queries].unflatten(0, (count, rows)).transpose(1, 2),
            key[of_keys].unflatten(0, (count, keys)).transpose(1, 2),
            value[of_keys].unflatten(0, (count, keys)).transpose(1, 2),
            attn_mask=None if bias is None else bias[of_keys].to(query.dtype).view(count, 1, 1, keys),
            dropout_p=dropout,
        )
        parts.append(found.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _alike(lengths: Sequence[int], key_lengths: Sequence[int]) -> Iterator[tuple[int, int, int, int, int]]:
    """Runs of sequences of equal lengths: how many, their queries and keys, and where the first of both lie."""
    runs: list[tuple[int, int, int]] = []  # a loop, since torch.compile does not group sizes that it takes for symbols
    for rows, keys in zip(lengths, key_lengths, strict=True):
        if runs and runs[-1][1] == rows and runs[-1][2] == keys:
            runs[-1] = runs[-1][0] + 1, rows, keys
        else:
            runs.append((1, rows, keys))
    start = key_start = 0
    for count, rows, keys in runs:
        yield count, rows, keys, start, key_start
        start, key_start = start + count * rows, key_start + count * keys


def _ends(lengths: Sequence[int], device: torch.device) -> Tensor:
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return (ends.pin_memory() if device.type == "cuda" else ends).to(device, non_blocking=True)


def windows(grids: Sequence[tuple[int, int]], side: int) -> tuple[Tensor, tuple[int, ...]]:
    """Order of the tokens in which windows of ``side`` x ``side`` patches lie together, and the windows' lengths.

    Each grid is cut from its upper left corner on; windows at the lower and right border are smaller. Tokens stay with
    their image, in which windows of equal size follow each other.

    Returns:
        int64 (T,), for each place the index of the token that comes there; and the lengths, T in all.
    """
    order, lengths, start = [], [], 0
    for rows, columns in grids:
        indices = torch.arange(start, start + rows * columns).view(rows, columns)
        cut = [part for band in indices.split(side) for part in band.split(side, dim=1)]
        cut.sort(key=lambda part: (-part.shape[0], -part.shape[1]))
        order += [part.flatten() for part in cut]
        lengths += [part.numel() for part in cut]
        start += rows * columns
    return torch.cat(order), tuple(lengths)
