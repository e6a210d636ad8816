"""Tokenisers that need no files: bytes, and words counted in captions."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
        return between(self.start_id, [byte + 1 for byte in to_utf8(text)], self.end_id)

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
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """A tokeniser of bytes."""
        return cls()


class WordTokenizer:
    """Words counted in captions: short texts of a small vocabulary, as those of a data set or of templates.

    Ids: 0 pad, 1 unknown, 2 start, 3 end, 4 mask, from 5 on the words. A word is a run of letters, digits and marks of
    Unicode, in lower case and composed (NFC); a character of punctuation and a symbol are words of their own; spaces
    divide, and are not kept. Where a language puts no spaces, a whole clause is one word: use bytes for it.

    Args:
        vocab_size: Number of ids. A tower is built for it before captions are counted; what they do not fill stays
            unused.
        words: Those to know. Empty: :meth:`fit` counts them.

    Raises:
        ValueError: For a size that leaves no place for a word, more words than there is place for, or one twice.
    """

    pad_id = 0
    pad_reserved = True
    unknown_id = 1
    start_id = 2
    end_id = 3
    mask_id = 4

    def __init__(self, vocab_size: int = 8192, words: Sequence[str] = ()) -> None:
        if vocab_size < 6:
            raise ValueError(f"vocab_size is {vocab_size}: expected at least 6, of which 5 are special")
        if len(words) > vocab_size - 5:
            raise ValueError(f"{len(words)} words and 5 special tokens are more than vocab_size, {vocab_size}")
        self.vocab_size = vocab_size
        if len(set(words)) < len(words):
            raise ValueError(f"word {Counter(words).most_common(1)[0][0]!r} is there twice")
        self._know(words)

    def fit(self, captions: Iterable[str]) -> Self:
        """Takes the most frequent words of captions, those as frequent by spelling, in place of what it knew.

        Raises:
            ValueError: If there are none.
        """
        counts = Counter(word for caption in captions for word in split_words(caption))
        if not counts:
            raise ValueError("no words to know: the captions are empty")
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        self._know(ranked[: self.vocab_size - 5])
        return self

    def _know(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self._ids = {word: number for number, word in enumerate(words, start=5)}

    def encode(self, text: str) -> list[int]:
        """Ids of a text's words between start and end, and that of unknown ones.

        Raises:
            ValueError: Before there are words, or for half of a surrogate pair.
        """
        if not self.words:
            raise ValueError("WordTokenizer knows no words yet: fit it to captions")
        ids = [self._ids.get(word, self.unknown_id) for word in split_words(text)]
        return between(self.start_id, ids, self.end_id)

    def decode(self, ids: Iterable[int]) -> str:
        """The words of ids with a space between, "<unknown>" for those that it did not know.

        Raises:
            ValueError: For an id that stands for nothing.
        """
        ids = checked(ids, len(self.words) + 5)
        return " ".join("<unknown>" if i == 1 else self.words[i - 5] for i in ids if i == 1 or i > 4)

    def state(self) -> dict[str, Any]:
        """Words and vocabulary size."""
        return {"kind": "words", "vocab_size": self.vocab_size, "words": list(self.words)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The tokeniser that a state was made by."""
        return cls(state["vocab_size"], state["words"])


def split_words(text: str) -> list[str]:
    """Words of a text, as :class:`WordTokenizer` has them. Raises ValueError for half of a surrogate pair."""
    to_utf8(text)
    words: list[str] = []
    before = "space"
    for character in unicodedata.normalize("NFC", text.lower()):
        category = unicodedata.category(character)
        if category == "Cc" or category[0] == "Z":
            before = "space"
        elif category[0] in "PS":
            words.append(character)
            before = "symbol"
        elif before == "word" or (before == "symbol" and (category == "Cf" or category[0] == "M")):
            words[-1] += character  # marks and joiners belong to what they stand behind, an emoji for example
        else:
            words.append(character)
            before = "word"
    return words


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


def between(start: int | None, ids: list[int], end: int | None) -> list[int]:
    """Ids with those of start and end, as far as there are such."""
    return [*([] if start is None else [start]), *ids, *([] if end is None else [end])]
