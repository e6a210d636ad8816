"""Tokenisers by name, by path, or out of a checkpoint."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from zoo.common.tokenizers.files import SPECIAL, HuggingFaceTokenizer, OpenClipTokenizer, SentencePieceTokenizer
from zoo.common.tokenizers.interface import Tokenizer
from zoo.common.tokenizers.plain import ByteTokenizer, WordTokenizer

NAMES: dict[str, Any] = {"bytes": ByteTokenizer, "words": WordTokenizer, "open_clip": OpenClipTokenizer}
FILES: dict[str, Any] = {".json": HuggingFaceTokenizer, ".model": SentencePieceTokenizer}
KINDS: dict[str, Any] = NAMES | {each.kind: each for each in FILES.values()}
OPTIONS = {"words": ("vocab_size",), ".json": SPECIAL, ".model": SPECIAL}


def create_tokenizer(
    source: str | Path | Mapping[str, Any] | Tokenizer, vocab_size: int | None = None, **options: Any
) -> Tokenizer:
    """The tokeniser of a name, a path or a state.

    Args:
        source: "bytes", "words" or "open_clip"; the path of a ``tokenizer.json``, of a SentencePiece ``.model`` or of a
            folder with one of them, as a model's folder of Hugging Face's is; a tokeniser's ``state()``; or a
            tokeniser, which is returned as it is. A model's name on a hub is no path: nothing is downloaded.
        vocab_size: Number of ids of "words". None: as it is.
        options: For files, those of :class:`zoo.common.tokenizers.files.FileTokenizer`. None: as it is.

    Raises:
        ValueError: For a name that is none and a path where nothing lies, for a folder or file of another kind, and for
            options that this tokeniser does not take.
        ImportError: Without the package that it needs.
    """
    options = {name: value for name, value in {"vocab_size": vocab_size, **options}.items() if value is not None}
    create: Any
    if isinstance(source, str | Path):
        path = None if source in NAMES else _file(Path(source))
        accepted = OPTIONS.get(path.suffix if path else str(source), ())
        create = partial(FILES[path.suffix].from_file, path) if path else NAMES[str(source)]
        said = str(source)
    elif isinstance(source, Mapping):
        if source.get("kind") not in KINDS:
            raise ValueError(f"a tokeniser of the kind {source.get('kind')!r}: expected one of {', '.join(KINDS)}")
        create, accepted, said = partial(KINDS[source["kind"]].from_state, source), (), "of a state"
    else:
        create, accepted, said = (lambda: source), (), "of its own"
    if wrong := [name for name in options if name not in accepted]:
        expected = f"it takes {', '.join(accepted)}" if accepted else "it takes no options"
        raise ValueError(f"tokenizer {said} does not take {', '.join(wrong)}: {expected}")
    return cast(Tokenizer, create(**options))


def _file(path: Path) -> Path:
    """The file that a path leads to."""
    if path.is_dir():
        models = sorted(path.glob("*.model"))
        if (path / "tokenizer.json").is_file():
            return path / "tokenizer.json"
        if len(models) != 1:
            raise ValueError(f"{path} has no tokenizer.json, and {len(models)} files *.model: expected one of these")
        return models[0]
    if not path.is_file():
        raise ValueError(
            f"no tokeniser {str(path)!r}: expected {', '.join(NAMES)} or a path; names on a hub are not downloaded"
        )
    if path.suffix not in FILES:
        raise ValueError(f"{path} is no tokeniser: expected a tokenizer.json or a SentencePiece *.model")
    return path
