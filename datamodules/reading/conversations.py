"""Conversations about images of your own, read and checked once, and kept in arrays: ``read(source)``.

A source is a ``.json`` file that is a list of objects, or a ``.jsonl`` file with one in each line. An object is one of

- LLaVA's, ``{"id": ..., "image": "a.jpg", "conversations": [{"from": "human", "value": "<image> what is this?"},
  {"from": "gpt", "value": "a cat"}]}``; ``image`` (or ``images``) is a path, a list of several, or not there at all;
- the same with ``messages``, ``{"role": "user", "content": ...}`` and ``{"role": "assistant", "content": ...}``;
- ``{"image": "a.jpg", "prompt": "<image> what is this?", "answer": "a cat"}``.

A message of the system may come first. Prompts hold ``<image>`` once for each image. An object may besides have a
``kind`` of question, ``choices`` of answers, and ``subset``, the number of the part that it belongs to.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.reading import coco_layout
from datamodules.reading.caption_rows import Rows
from datamodules.reading.caption_tables import lines
from datamodules.reading.captions import Texts
from datamodules.reading.coco_json import parsed
from datamodules.reading.files import OnError

IMAGE_PLACE = "<image>"
"""Mark in a prompt where an image stands."""
EXPECTED = (
    'expected a list (.json) or lines (.jsonl) of {"image": "a.jpg", "conversations": [{"from": "human", "value": '
    '"<image> ..."}, {"from": "gpt", "value": "..."}]}'
)
ROLES = {"human": 0, "user": 0, "gpt": 1, "assistant": 1}
"""Place in a turn of what each role says."""


class FaultyEntryError(ValueError):
    """An entry that is no conversation: what is wrong with it, and what was found."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind)
        self.kind, self.detail = kind, detail


@dataclass(frozen=True)
class Conversations:
    """N conversations and their M images: those of number i are ``owned`` from ``starts[i]`` to ``stops[i]``.

    ``files`` (M,) str, relative to ``folder``; ``owned`` indices of these; ``names`` (N,) str; ``groups`` (N,) int64,
    the same for conversations that share an image; ``texts`` is JSON of what is said, from ``order`` (N,).
    """

    source: Path
    folder: Path
    files: np.ndarray
    owned: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    names: np.ndarray
    groups: np.ndarray
    order: np.ndarray
    texts: Texts

    def __len__(self) -> int:
        return len(self.names)

    def of(self, index: int) -> dict[str, Any]:
        """Content of one: ``{"turns": [[prompt, answer], ...], "name": ...}``, and what else its object has."""
        said: dict[str, Any] = json.loads(self.texts[int(self.order[index])])
        return said | {"name": str(self.names[index])}

    def images_of(self, index: int) -> np.ndarray:
        """Indices of a conversation's images."""
        return self.owned[int(self.starts[index]) : int(self.stops[index])]

    def part(self, rows: np.ndarray) -> tuple["Conversations", np.ndarray]:
        """Conversations of some rows, with their images alone, and the indices of these among all."""
        owned = np.concatenate([self.images_of(row) for row in rows.tolist()] or [self.owned[:0]])
        chosen, renumbered = np.unique(owned, return_inverse=True)
        stops = np.cumsum(self.stops[rows] - self.starts[rows])
        each = {name: getattr(self, name)[rows] for name in ("names", "groups", "order")}
        starts = stops - (self.stops[rows] - self.starts[rows])
        files = self.files[chosen]
        return replace(self, files=files, owned=renumbered.astype(np.int64), starts=starts, stops=stops, **each), chosen


def read(
    source: Path,
    folder: Path | None = None,
    encoding: str = "utf-8",
    on_error: OnError = "raise",
    answered: bool = True,
) -> Conversations:
    """Reads a source and finds its images.

    Args:
        source: A file: see the top of this file.
        folder: Folder that names of images are relative to. None: that of the file.
        encoding: Encoding of lines that do not begin with a byte order mark; JSON files are UTF-8.
        on_error: What happens to objects that are no conversation, or whose images are not there. "raise" stops and
            names the first; "skip" leaves them out, with a warning of each kind.
        answered: Whether the last prompt needs an answer. Otherwise one that is missing is empty.

    Raises:
        FileNotFoundError: If the source is missing, its folder, or an image.
        ValueError: If it is of another form, or has no conversations. One line says what is wrong and where.
    """
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder, for the images of {source}")
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file; {EXPECTED}")
    by_line = source.suffix.lower() == ".jsonl"
    rows = Rows(source, [folder or source.parent], where="line {}" if by_line else "entry {}")
    entries = list(_lines(source, encoding) if by_line else _entries(source))
    found = []
    for place, entry in entries:
        try:
            found.append((place, *told(entry, answered)))
        except FaultyEntryError as fault:
            rows.fault(fault.kind, rows.where.format(place), fault.detail)
    for key in ("kind", "subset"):
        if any(key in said for _, said, _ in found):
            for place, said, _ in found:
                if key not in said:
                    rows.fault(f"no {key}, which others have", rows.where.format(place))
            found = [each for each in found if key in each[1]]
    return _packed(rows, found, on_error)


def _lines(path: Path, encoding: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines(path, encoding), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: no JSON ({error})") from None


def _entries(path: Path) -> Iterator[tuple[int, Any]]:
    content = parsed(path, EXPECTED)
    if not isinstance(content, list):
        raise ValueError(f"{path} holds a {type(content).__name__}, no list: {EXPECTED}")
    yield from enumerate(content, 1)


def told(entry: Any, answered: bool = True) -> tuple[dict[str, Any], list[str]]:
    """Content of an object, with its ``turns``, and the names of its images.

    Raises:
        FaultyEntryError: If it is no conversation.
    """
    if not isinstance(entry, dict):
        raise FaultyEntryError("no object", f"{entry!r:.40}")
    images = entry.get("image", entry.get("images"))
    images = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise FaultyEntryError("an image that is no path", f"{images!r:.40}")
    turns = _turns(entry)
    for number, (_, answer) in enumerate(turns, 1):
        if not answer.strip() and (answered or number < len(turns)):
            raise FaultyEntryError("no answer (expected one for each prompt)", f"turn {number}")
        if IMAGE_PLACE in answer:
            raise FaultyEntryError(f"{IMAGE_PLACE} in an answer (expected in prompts alone)", f"turn {number}")
    places = sum(prompt.count(IMAGE_PLACE) for prompt, _ in turns)
    if places != len(images):
        raise FaultyEntryError(
            f"images and their places in prompts that are not as many (expected {IMAGE_PLACE} once for each)",
            f"{len(images)} and {places}",
        )
    said: dict[str, Any] = {"turns": turns}
    for key, kind in (("kind", str), ("subset", int), ("choices", list)):
        if entry.get(key) is not None:
            if not isinstance(entry[key], kind) or isinstance(entry[key], bool):
                raise FaultyEntryError(f"a {key} that is no {kind.__name__}", f"{entry[key]!r:.40}")
            said[key] = entry[key]
    answer, choices = turns[-1][1], said.get("choices")
    if choices is not None and (not all(isinstance(each, str) for each in choices) or answer not in ["", *choices]):
        raise FaultyEntryError("choices that are no texts with the answer among them", f"{choices!r:.40}")
    if "id" in entry:
        said["name"] = str(entry["id"])
    return said, images


def _turns(entry: dict[str, Any]) -> list[list[str]]:
    """Turns of an object as pairs of texts; an answer that is missing at the end is empty."""
    messages = next((entry[key] for key in ("conversations", "messages") if key in entry), None)
    if messages is None and "prompt" in entry:
        messages = [{"from": "human", "value": entry["prompt"]}, {"from": "gpt", "value": entry.get("answer", "")}]
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        has = ", ".join(map(str, entry)) or "nothing"
        raise FaultyEntryError("no conversations, messages, or prompt and answer", f"but {has}")
    said = [(each.get("from", each.get("role")), each.get("value", each.get("content"))) for each in messages]
    for role, text in said:
        if not isinstance(text, str):
            raise FaultyEntryError("a message that is no text", f"{text!r:.40}")
        if role not in (*ROLES, "system"):
            raise FaultyEntryError(f"a message of none of {', '.join(ROLES)}", f"{role!r:.40}")
    system = said.pop(0)[1] if said[0][0] == "system" else ""
    for number, (role, _) in enumerate(said):
        if ROLES.get(role) != number % 2:
            raise FaultyEntryError("prompts and answers that do not alternate, a prompt first", f"message {number + 1}")
    texts = [text for _, text in said] + [""] * (len(said) % 2)
    turns = [[prompt, answer] for prompt, answer in zip(texts[0::2], texts[1::2], strict=True)]
    if not turns:
        raise FaultyEntryError("no answer (expected one for each prompt)")
    turns[0][0] = f"{system}\n{turns[0][0]}" if system else turns[0][0]
    return turns


def _packed(rows: Rows, found: Sequence[tuple[int, dict[str, Any], list[str]]], on_error: OnError) -> Conversations:
    """The conversations whose images are there."""
    folder = rows.folders[0]
    names = list(dict.fromkeys(name for _, _, images in found for name in images))
    there, missing = coco_layout.find(folder, np.array(names, dtype=np.str_))
    lost = set(missing)
    files = dict(zip((name for name in names if name not in lost), there.tolist(), strict=True))
    number_of: dict[str, int] = {}
    spelt: list[str] = []
    kept, owned, counts, called, groups = [], [], [], [], _Groups()
    for place, said, images in found:
        if away := [name for name in images if name in lost]:
            rows.fault(f"no such image in {folder}", rows.where.format(place), away[0], FileNotFoundError)
            continue
        own = []
        for name in images:  # a file may be spelt in several ways, and must not become two images
            path = os.path.abspath(os.path.join(folder, files[name]))
            own.append(number_of.setdefault(path, len(number_of)))
            if own[-1] == len(spelt):
                spelt.append(files[name])
        called.append(said.pop("name", f"{rows.source.name}/{place}"))
        groups.add(own)
        owned += own
        counts.append(len(own))
        kept.append(json.dumps(said))
    rows.tell(on_error)
    if not kept:
        raise ValueError(f"{rows.source} has no conversations: {EXPECTED}")
    stops = np.cumsum(np.array(counts, dtype=np.int64))
    return Conversations(
        rows.source,
        folder,
        files=np.array(spelt, dtype=np.str_),
        owned=np.array(owned, dtype=np.int64),
        starts=stops - np.array(counts, dtype=np.int64),
        stops=stops,
        names=np.array(called, dtype=np.str_),
        groups=groups.numbers(),
        order=np.arange(len(kept)),
        texts=Texts(kept),
    )


class _Groups:
    """Groups of conversations that share images, be it by way of others."""

    def __init__(self) -> None:
        self.parents: list[int] = []
        self.of_image: dict[int, int] = {}

    def add(self, images: Sequence[int]) -> None:
        number = len(self.parents)
        self.parents.append(number)
        for image in images:
            first, own = self._first(self.of_image.setdefault(image, number)), self._first(number)
            self.parents[max(first, own)] = min(first, own)

    def _first(self, number: int) -> int:
        while self.parents[number] != number:
            self.parents[number] = number = self.parents[self.parents[number]]
        return number

    def numbers(self) -> np.ndarray:
        """The first conversation of each one's group."""
        return np.array([self._first(number) for number in range(len(self.parents))], dtype=np.int64)
