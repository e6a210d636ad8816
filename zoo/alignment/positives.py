"""Positives of a batch beyond the pairs themselves: texts that describe several of its images."""

from typing import Literal

import torch
from torch import Tensor

from zoo.common.captions import CaptionBatch

Positives = Literal["paired", "equal", "entailed"]
Keys = tuple[Tensor, Tensor]
LARGEST = 2**63 - 1
"""The largest integer of 64 bits, with which "and" takes the sign away."""


def positive_keys(positives: Positives, batch: CaptionBatch, tokens: Tensor) -> tuple[Keys, ...]:
    """Alternatives of keys by which a contrastive loss finds positives.

    Text j is a positive of image i if for one alternative all its keys (B, K) agree with those of the image; a key of
    -1 of a text says nothing.

    Args:
        positives: "paired": the pairs alone. "equal": texts of equal tokens, and texts of the same image where the
            batch knows its ``image_ids``. "entailed": texts whose ``claims`` agree with the ``facts`` of the image.
        batch: Images and one caption of each.
        tokens: (B, L) int64, of the captions.

    Raises:
        ValueError: For "entailed" and a batch without facts and claims.
    """
    if positives == "paired":
        return ()
    if positives == "entailed":
        if batch.facts is None or batch.claims is None:
            raise ValueError(
                "positives 'entailed' needs facts of images and claims of captions: the batch has not both"
            )
        return ((batch.facts, batch.claims),)
    hashes = token_hash(tokens)[:, None]
    if batch.image_ids is None:
        return ((hashes, hashes),)
    ids = (batch.image_ids & LARGEST)[:, None]  # an id of -1 is one like others, and no key that says nothing
    return (hashes, hashes), (ids, ids)


def token_hash(tokens: Tensor) -> Tensor:
    """Hashes (N,) int64 in [0, 2^63) of rows of tokens (N, L), computed where they are.

    Equal rows have equal hashes. Two others agree by chance alone, once in 2^63: each token with its position is mixed
    by splitmix64 (Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators"), and the sum once more.
    """
    position = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.int64)
    return _mixed(_mixed(tokens.long() + (position << 32)).sum(1)) & LARGEST


def _mixed(value: Tensor) -> Tensor:
    """The 64 bits of integers mixed by the finalizer of splitmix64; products wrap around."""
    value = value + _signed(0x9E3779B97F4A7C15)
    value = (value ^ _shifted(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shifted(value, 27)) * _signed(0x94D049BB133111EB)
    return value ^ _shifted(value, 31)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Bits shifted to the right, with zeros from the left: torch's own shift keeps the sign."""
    return (value >> bits) & (2 ** (64 - bits) - 1)


def _signed(constant: int) -> int:
    return constant - 2**64
