"""Tokenisers out of files, and open_clip's: each behind a package that not everybody needs.

A special token that a caption spells out, as "</s>", is left out: to a tower it would be the end of the text.
"""

import json
import string
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Self

from zoo.common.tokenizers.plain import between, checked, to_utf8

SPECIAL = ("pad", "start", "end", "mask", "canonicalize")
"""Options of tokenisers out of files."""


class FileTokenizer(ABC):
    """A tokeniser out of a file, whose contents a checkpoint keeps.

    Args:
        contents: Of the file.
        pad, start, end, mask: Special tokens as they are spelled. None: the file's own, if it has one.
        canonicalize: Lower case, ``_`` as a space and no other ASCII punctuation, as SigLIP was trained.

    Raises:
        ValueError: If the file is of another kind, or has no such token.
        ImportError: Without the package that reads it.
    """

    kind: ClassVar[str]
    vocab_size: int

    def __init__(
        self,
        contents: Any,
        pad: str | None = None,
        start: str | None = None,
        end: str | None = None,
        mask: str | None = None,
        canonicalize: bool = False,
    ) -> None:
        self.contents, self.canonicalize = contents, canonicalize
        self.spelled = {"pad": pad, "start": start, "end": end, "mask": mask}
        ids = self._read(contents)
        for role, token in self.spelled.items():
            found = ids.get(role) if token is None else self._find(token)
            if token is not None and found is None:
                raise ValueError(f"{role} is {token!r}, which is no token of this tokeniser")
            ids[role] = found
        self.pad_id, self.start_id, self.end_id, self.mask_id = (ids[role] for role in self.spelled)
        self.unknown_id = unknown = ids.get("unknown")
        self.pad_reserved = self.pad_id not in (None, unknown, self.start_id, self.end_id)
        # CLIP's end token stands for what is unknown as well, of which a BPE of bytes has nothing.
        self._special = {self.start_id, self.end_id, self.mask_id} | ({self.pad_id} - {unknown})

    @classmethod
    @abstractmethod
    def from_file(cls, path: str | Path, **options: Any) -> Self:
        """The tokeniser of a file, with options as the class takes them."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, between start and end if there are any. Raises ValueError for half of a surrogate pair."""
        to_utf8(text)
        ids = self._encode(_canonical(text) if self.canonicalize else text)
        return between(self.start_id, [number for number in ids if number not in self._special], self.end_id)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, as far as the file can bring it back. Raises ValueError for an id out of range."""
        return self._decode([number for number in checked(ids, self.vocab_size) if number not in self._special])

    def state(self) -> dict[str, Any]:
        """The whole file and the options: who has them does not need the file."""
        return {"kind": self.kind, "contents": self.contents, **self.spelled, "canonicalize": self.canonicalize}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The tokeniser that a state was made by."""
        return cls(**{name: value for name, value in state.items() if name != "kind"})

    @abstractmethod
    def _read(self, contents: Any) -> dict[str, int | None]:
        """Reads a file's contents. Returns its own special ids by role, that of what is "unknown" among them."""

    @abstractmethod
    def _find(self, token: str) -> int | None: ...
    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...
    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...


class HuggingFaceTokenizer(FileTokenizer):
    """Tokeniser of a ``tokenizer.json``, BPE, Unigram, WordPiece or others, by the ``tokenizers`` package.

    Its own start and end are those that the file puts around a text, and its own pad token is the one that it fills up
    with, if it does. :meth:`from_file` asks the files beside it for pad and mask. The arguments are
    :class:`FileTokenizer`'s.
    """

    kind = "hugging_face"

    def _read(self, contents: str) -> dict[str, int | None]:
        package = _package("tokenizers", "text")
        try:
            self._tokenizer = package.Tokenizer.from_str(contents)
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(f"not the contents of a tokenizer.json: {str(error).splitlines()[0]}") from error
        padding, vocabulary = self._tokenizer.padding, self._tokenizer.get_vocab()
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocab_size = max(vocabulary.values()) + 1
        model = json.loads(contents)["model"]
        self._end_of_word = model.get("end_of_word_suffix") or ""
        unknown = model["unk_id"] if "unk_id" in model else vocabulary.get(model.get("unk_token"))
        # What is put around a text shows around one that has tokens, of which the vocabulary has examples.
        for text in chain("a", vocabulary):
            probe = self._tokenizer.encode(text)
            if inside := [place for place, special in enumerate(probe.special_tokens_mask) if not special]:
                before, after = probe.ids[: inside[0]], probe.ids[inside[-1] + 1 :]
                if len(before) > 1 or len(after) > 1:
                    raise ValueError(f"tokenizer.json puts {before} before a text and {after} behind it: not one token")
                break
        else:
            raise ValueError("tokenizer.json has special tokens alone")
        return {
            "unknown": unknown,
            "pad": padding["pad_id"] if padding else None,
            "start": before[0] if before else None,
            "end": after[0] if after else None,
        }

    @classmethod
    def from_file(cls, path: str | Path, **options: Any) -> Self:
        """The tokeniser of a ``tokenizer.json``; the files of transformers beside it name pad and mask."""
        path = Path(path)
        said: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (beside := path.with_name(name)).is_file():
                said |= json.loads(beside.read_text(encoding="utf-8"))
        for role in ("pad", "mask"):
            token = said.get(f"{role}_token")
            options[role] = options.get(role) or (token["content"] if isinstance(token, dict) else token)
        return cls(path.read_text(encoding="utf-8"), **options)

    def _find(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _decode(self, ids: list[int]) -> str:
        text = str(self._tokenizer.decode(ids))
        return text.replace(self._end_of_word, " ").strip() if self._end_of_word else text  # as transformers has to do


class SentencePieceTokenizer(FileTokenizer):
    """Tokeniser of a SentencePiece ``.model``, BPE or Unigram, by the ``sentencepiece`` package.

    Such a file does not say what stands around a text. As T5 and SigLIP have it, its own end token stands behind, and
    nothing before. SigLIP's own are ``pad="</s>", canonicalize=True``. The arguments are
    :class:`FileTokenizer`'s.
    """

    kind = "sentencepiece"

    def _read(self, contents: bytes) -> dict[str, int | None]:
        package = _package("sentencepiece", "text")
        try:
            self._processor = package.SentencePieceProcessor(model_proto=contents)
        except Exception as error:  # the package raises nothing narrower
            raise ValueError("not the contents of a SentencePiece model") from error
        self.vocab_size = int(self._processor.vocab_size())
        own = {"unknown": "unk_id", "pad": "pad_id", "end": "eos_id"}
        return {role: number for role, of in own.items() if (number := getattr(self._processor, of)()) >= 0}

    @classmethod
    def from_file(cls, path: str | Path, **options: Any) -> Self:
        """The tokeniser of a ``.model``."""
        return cls(Path(path).read_bytes(), **options)

    def _find(self, token: str) -> int | None:
        found = int(self._processor.piece_to_id(token))  # that of what is unknown, if there is none
        return found if self._processor.id_to_piece(found) == token else None

    def _encode(self, text: str) -> list[int]:
        return list(self._processor.encode(text))

    def _decode(self, ids: list[int]) -> str:
        return str(self._processor.decode(ids))


class OpenClipTokenizer:
    """CLIP's BPE of 49,408 tokens in lower case, by the ``open_clip_torch`` package, which has its file.

    It fills up with 0, which is "!" as well: a tower on it reads at the first end token.

    Raises:
        ImportError: Without the package.
    """

    pad_id = 0
    pad_reserved = False
    mask_id = None

    def __init__(self) -> None:
        self._tokenizer = _package("open_clip.tokenizer", "open_clip").SimpleTokenizer()
        self.vocab_size = int(self._tokenizer.vocab_size)
        self.start_id = int(self._tokenizer.sot_token_id)
        self.end_id = int(self._tokenizer.eot_token_id)

    def encode(self, text: str) -> list[int]:
        """Ids of a text between start and end. Raises ValueError for half of a surrogate pair."""
        to_utf8(text)
        special = (self.start_id, self.end_id)
        return between(self.start_id, [i for i in self._tokenizer.encode(text) if i not in special], self.end_id)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids up to the first end token, in lower case, with a space behind each word.

        Raises:
            ValueError: For an id out of range.
        """
        ids = checked(ids, self.vocab_size)
        ids = ids[: ids.index(self.end_id)] if self.end_id in ids else ids
        return str(self._tokenizer.decode([i for i in ids if i != self.start_id])).strip()

    def state(self) -> dict[str, Any]:
        """The kind alone: the package has the file."""
        return {"kind": "open_clip"}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """CLIP's tokeniser."""
        return cls()


def _package(name: str, extra: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"this tokeniser cannot be had here ({error}): pip install 'vision-zoo[{extra}]'") from error


def _canonical(text: str) -> str:
    plain = text.replace("_", " ").translate(str.maketrans("", "", string.punctuation))
    return " ".join(plain.lower().split())
