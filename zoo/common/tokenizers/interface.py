"""Protocol of tokenisers, batches of tokens, and what a tower needs of a tokeniser."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Tokenizer(Protocol):
    """A two-way map between texts and lists of token ids.

    Attributes:
        vocab_size: Every id is below it.
        pad_id: Id that fills short texts up; None if there is none.
        pad_reserved: No text has ``pad_id`` among its own tokens, so that padding can be told from text.
        start_id: Id that every text begins with, or None.
        end_id: Id that every text ends with, or None.
        mask_id: Id for words that a network has to guess, or None.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def pad_id(self) -> int | None: ...
    @property
    def pad_reserved(self) -> bool: ...
    @property
    def start_id(self) -> int | None: ...
    @property
    def end_id(self) -> int | None: ...
    @property
    def mask_id(self) -> int | None: ...

    def encode(self, text: str) -> list[int]:
        """All ids of a text, with those of start and end. Raises ValueError for a text that cannot be encoded."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special ones. Raises ValueError for an id that there is not."""

    def state(self) -> dict[str, Any]:
        """All that it takes to make it again, as plain data for a checkpoint."""

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The tokeniser that a state was made by."""


@runtime_checkable
class HasUnknown(Protocol):
    """A tokeniser with a token for what it does not know; None where it knows everything."""

    unknown_id: int | None


@runtime_checkable
class FitsTokenizer(Protocol):
    """A text tower that was made for certain tokens, and pools and masks by those of the tokeniser it is used with."""

    def fit_tokenizer(self, tokenizer: Tokenizer, context_length: int) -> None:
        """Takes its special tokens. It raises ValueError for more tokens, or more positions, than the tower has."""


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], context_length: int) -> tuple[Tensor, int]:
    """Token ids (N, context_length) of texts, int64, and the number of texts that were cut to fit.

    Short texts are filled up with the pad token. Of long ones the first tokens stay, and the end token if there is one.

    Raises:
        ValueError: For a single string, a text that is no string or has no tokens, a tokeniser without pad token, or a
            context that holds no token beside start and end.
    """
    if isinstance(texts, str):
        raise ValueError("texts is one string: expected a sequence of them")
    end = [] if tokenizer.end_id is None else [tokenizer.end_id]
    special = len(end) + (tokenizer.start_id is not None)
    if context_length <= special:
        raise ValueError(f"context_length is {context_length}: expected more than the {special} of start and end")
    if tokenizer.pad_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no pad token to fill short texts up with")
    rows, cut = [], 0
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"text {number} is of type {type(text).__name__}: expected a string")
        try:
            ids = tokenizer.encode(text)
        except ValueError as error:
            raise ValueError(f"text {number}: {error}") from error
        if not ids:
            raise ValueError(f"text {number}, {text!r}, has no tokens")
        if len(ids) > context_length:
            ids = ids[: context_length - len(end)] + end
            cut += 1
        rows.append(ids + [tokenizer.pad_id] * (context_length - len(ids)))
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), context_length), cut


def words_of(tokenizer: Tokenizer) -> Tensor:
    """Ids (W,) int64 that texts are made of: none that is special, and none that stands for nothing."""
    special = {tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id, tokenizer.mask_id}
    return torch.tensor([i for i in range(tokenizer.vocab_size) if i not in special and _stands(tokenizer, i)])


def _stands(tokenizer: Tokenizer, number: int) -> bool:
    try:
        tokenizer.decode([number])
    except ValueError:
        return False
    return True


def check_special(tokenizer: Tokenizer, pool: str, mask_padding: bool = False) -> None:
    """Raises ValueError for a tokeniser that lacks a special token which a text tower needs.

    CLIP's own fills up with 0, which is "!", and others with the end token: good for a tower that reads at the first
    end token or the last position, and not for one that has to tell padding from text.

    Args:
        tokenizer: Tokeniser.
        pool: Position that the tower reads its features at; see ``pool`` of ``zoo.alignment.text.TextTransformer``.
        mask_padding: The tower hides padding from its attention.
    """
    name = type(tokenizer).__name__
    if tokenizer.pad_id is None:
        raise ValueError(f"{name} has no pad token, which short texts are filled up with")
    if pool == "end" and tokenizer.end_id is None:
        raise ValueError(f"{name} puts no end token behind a text, which pool='end' reads at: use 'mean' or 'last'")
    if (mask_padding or pool == "mean") and not tokenizer.pad_reserved:
        why = "mask_padding" if mask_padding else "pool='mean'"
        raise ValueError(
            f"{name} fills short texts up with token {tokenizer.pad_id}, which texts have as well, so that {why} "
            "cannot tell them apart: use pool='end' or 'last' without mask_padding"
        )
