"""Tokenisers that need no files: bytes, and words counted in captions."""

from collections.abc import Iterable
from typing import Any, Self


class ByteTokenizer:
    """Bytes of UTF-8: no files, every language, nothing unknown.

    Ids: 0 pad, 1 to 256 the bytes, 257 start, 258 end, 259 mask. A letter of English is one token, of other alphabets
    two, a Chinese character three, an emoji four and more.
    """

    vocab_size = 260
    pad_id = 0
    pad_reserved = True
    start_id = 257
    end_id = 258
    mask_id = 259

    def encode(self, text: str) -> list[int]:
        """Ids of a text's bytes between start and end.

        Raises:
            ValueError: For half of a surrogate pair, which has no bytes.
        """
        return [self.start_id, *(byte + 1 for byte in to_utf8(text)), self.end_id]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; for bytes that are no UTF-8, as of a character that was cut, the replacement character.

        Raises:
            ValueError: For an id out of range.
        """
        ids = checked(ids, self.vocab_size)
        return bytes(number - 1 for number in ids if 1 <= number <= 256).decode("utf-8", errors="replace")

    def state(self) -> dict[str, Any]:
        """The kind alone: there is nothing to keep."""
        return {"kind": "bytes"}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """A tokeniser of bytes."""
        return cls()


def to_utf8(text: str) -> bytes:
    """Bytes of a text. Raises ValueError for half of a surrogate pair, as a wrong decoder leaves it behind."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} is {text[error.start]!r}, half of a surrogate pair: read the text as UTF-8"
        ) from None


def checked(ids: Iterable[int], vocab_size: int) -> list[int]:
    """Ids as a list. Raises ValueError for one out of range."""
    ids = [int(number) for number in ids]
    if wrong := [number for number in ids if not 0 <= number < vocab_size]:
        raise ValueError(f"id {wrong[0]} is out of range: this tokeniser has {vocab_size}")
    return ids
