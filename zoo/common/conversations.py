"""Reading batches of images and conversations: ``(images, conversations)``, or a dict of both.

Conversations are one entry a sample, which has none, one or several of the batch's images, in order. A prompt holds
:data:`IMAGE_PLACE` once for each. Nothing here writes into a batch, and nothing waits for a device.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from zoo.common import batch as batches

IMAGE_PLACE = "<image>"
"""Mark in a prompt where an image stands."""

CONVERSATION_KEYS = ("conversations", "conversation", "messages", "texts")
TURN_KEYS = ("turns", "conversations", "conversation", "messages")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Roles of messages as others write them, and what they are here."""


class ConversationBatch(NamedTuple):
    """Conversations of B samples, and their images, N of them.

    Attributes:
        images: Float (N, C, H, W), N possibly 0; or a list of N images (C, h, w) of several sizes.
        turns: Of each sample (prompt, answer), one or more, in order.
        counts: Images of each sample, whose sum is N: the first ``counts[0]`` images are the first sample's, and so on.
        kinds: Kind of question of each sample. None: not known.
        subsets: Part of the evaluation set that each belongs to. None: not known.
        choices: Possible answers of each sample, the right one among them; None for one that has none. None: not known.
        names: Name of each sample. None: not known of all.
    """

    images: Tensor | list[Tensor]
    turns: list[list[tuple[str, str]]]
    counts: list[int]
    kinds: list[str] | None = None
    subsets: list[int] | None = None
    choices: list[list[str] | None] | None = None
    names: list[str] | None = None


def has_conversations(batch: Any) -> bool:
    """Tells whether a batch carries a list beside its images, as conversations are."""
    try:
        return bool(_entries(batch))
    except ValueError:
        return False


def read(batch: Any, answered: bool = True) -> ConversationBatch:
    """Images and conversations of a batch.

    Args:
        batch: ``(images, conversations)``, or a mapping with images by a name of :mod:`zoo.common.batch` and
            conversations by one of :data:`CONVERSATION_KEYS`. An entry is a dict of ``turns``, pairs of a prompt and an
            answer, and ``images``, how many it has (without it, as many as its prompts have places), and maybe
            ``kind``, ``subset``, ``choices`` and ``name``. In place of ``turns`` it may have ``prompt`` and ``answer``,
            or messages (``conversations``, ``messages``), and it may be a list of such pairs or messages alone.
            Messages are LLaVA's ``{"from": "human", "value": ...}`` or ``{"role": "user", "content": ...}``, whose
            content may be in parts; one of the system goes in front of the first prompt, on a line of its own.
        answered: Whether the last prompt has to have an answer. If not, one that is missing is "", for prediction.

    Raises:
        ValueError: If there are no conversations, or one without an answer, with an empty one, with turns that do not
            alternate, or with places that are not as many as its images or stand in an answer; if the images are not as
            many as the conversations'. The error names the sample.
    """
    images, entries = _images(batch), _entries(batch)
    parts = [_entry(entry, index, answered) for index, entry in enumerate(entries)]
    counts = [part["images"] for part in parts]
    if sum(counts) != len(images):
        some = ", ".join(map(str, counts[:8])) + ", ..." * (len(counts) > 8)
        raise ValueError(
            f"the conversations have {sum(counts)} images together ({some}), and the batch has {len(images)}: expected "
            f"as many; a prompt holds {IMAGE_PLACE} where each image of its sample stands"
        )
    known: dict[str, Any] = {name: _values(parts, key) for key, name in _KNOWN.items()}
    names = [part["name"] for part in parts]
    known["names"] = None if None in names else names
    choices = [part.get("choices") for part in parts]
    known["choices"] = None if all(each is None for each in choices) else choices
    return ConversationBatch(images, [part["turns"] for part in parts], counts, **known)


_KNOWN = {"kind": "kinds", "subset": "subsets"}
"""Keys of an entry that all entries of a batch have or none, and what they are called in a batch."""


def _images(batch: Any) -> Tensor | list[Tensor]:
    """The images, of which there may be none at all."""
    batch = batches.by_name(batch)
    found = None
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in batches.IMAGE_KEYS if key in batch), None)
    elif isinstance(batch, list | tuple) and batch:
        found = batch[0]
    return [] if isinstance(found, list | tuple) and not found else batches.images_of_any_size(batch)


def _entries(batch: Any) -> Sequence[Any]:
    """The part of a batch where conversations are expected, one entry a sample."""
    found, got = None, f"a {type(batch).__name__}"
    batch = batches.by_name(batch)
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in CONVERSATION_KEYS if key in batch), None)
        got = f"the keys {sorted(map(str, batch))}"
    elif isinstance(batch, list | tuple) and len(batch) > 1:
        found = batch[1]
        got = f"a {type(found).__name__} beside the images"
    if not isinstance(found, list | tuple) or not found:
        raise ValueError(
            f"expected (images, conversations), got {got}: this module learns from conversations, a list with an entry "
            "for each sample"
        )
    return found


def _entry(entry: Any, index: int, answered: bool) -> dict[str, Any]:
    """An entry with its turns and its number of images, checked."""
    who = f"conversation {index} of the batch"
    if not isinstance(entry, Mapping | list | tuple):
        raise ValueError(f"{who} is a {type(entry).__name__}: expected turns, messages, or a prompt and an answer")
    part = dict(entry) if isinstance(entry, Mapping) else {"turns": entry}
    name = part.get("name", part.get("id"))
    who += "" if name is None else f" ({name})"
    turns = _turns(part, who, answered)
    places = sum(prompt.count(IMAGE_PLACE) for prompt, _ in turns)
    count = part.get("images", places)
    count = len(count) if isinstance(count, list | tuple) else count
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ValueError(f"{who} has {count!r:.40} as images: expected how many of the batch's images are its own")
    if count and not places:
        raise ValueError(
            f"{who} has {count} images and no place for one: expected {IMAGE_PLACE} for each in its prompts"
        )
    if count != places:
        raise ValueError(
            f"{who} has {count} images and {places} places ({IMAGE_PLACE}) in its prompts: expected as many"
        )
    choices = part.get("choices")
    if choices is not None and not (isinstance(choices, list) and all(isinstance(each, str) for each in choices)):
        raise ValueError(f"{who} has {choices!r:.40} as choices: expected a list of texts, the possible answers")
    if choices is not None and turns[-1][1] and turns[-1][1] not in choices:
        raise ValueError(f"{who} has an answer that is not among its choices, {turns[-1][1]!r:.40}: expected it there")
    return part | {"turns": turns, "images": count, "name": None if name is None else str(name)}


def _turns(part: Mapping[str, Any], who: str, answered: bool) -> list[tuple[str, str]]:
    """The turns of an entry, as pairs of texts."""
    found: Any = next((part[key] for key in TURN_KEYS if key in part), None)
    if found is None and "prompt" in part:
        found = [[part["prompt"], part.get("answer", "")]]
    if not isinstance(found, list | tuple):
        raise ValueError(f"{who} is {_keys(part)}: expected turns, messages, or a prompt and an answer")
    if found and all(isinstance(each, Mapping) for each in found):
        found = _paired(found, who)
    pairs = []
    for number, pair in enumerate(found):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(each, str) for each in pair)):
            raise ValueError(f"turn {number} of {who} is {pair!r:.60}: expected a prompt and an answer, two texts")
        prompt, answer = pair
        if not answer.strip() and (answered or number + 1 < len(found)):
            what = "an empty answer" if pair[1] or number + 1 < len(found) else "no answer"
            raise ValueError(f"{who} has {what}, in turn {number}: leave out such samples")
        if IMAGE_PLACE in answer:
            raise ValueError(f"{who} has {IMAGE_PLACE} in an answer, in turn {number}: expected it in prompts alone")
        pairs.append((prompt, answer))
    if not pairs:
        raise ValueError(f"{who} has no answer: expected at least one turn, a prompt and an answer")
    return pairs


def _paired(messages: Sequence[Mapping[str, Any]], who: str) -> list[list[str]]:
    """Turns of messages that alternate; the last one's answer may be missing, and is then empty."""
    said: list[tuple[str, str]] = []
    for number, message in enumerate(messages):
        role = message.get("role", message.get("from"))
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"message {number} of {who} is of {role!r:.40}: expected one of {', '.join(ROLES)}")
        said.append((ROLES[role], _content(message, f"message {number} of {who}")))
    systems = [text for role, text in said[:1] if role == "system"]
    said = said[len(systems) :]
    for number, (role, _) in enumerate(said):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            raise ValueError(
                f"message {number + len(systems)} of {who} is the {role}'s, where the {expected}'s is expected: "
                "prompts and answers have to alternate, a prompt first"
            )
    texts = [text for _, text in said]
    pairs = [
        [prompt, answer] for prompt, answer in zip(texts[0::2], [*texts[1::2], *[""] * (len(texts) % 2)], strict=True)
    ]
    if pairs and systems and systems[0]:
        pairs[0][0] = f"{systems[0]}\n{pairs[0][0]}"
    return pairs


def _content(message: Mapping[str, Any], who: str) -> str:
    """The text of a message, with a place for each image that its content has as a part."""
    found = message.get("content", message.get("value"))
    if isinstance(found, list) and all(isinstance(each, Mapping) for each in found):
        found = [IMAGE_PLACE if str(each.get("type")).startswith("image") else each.get("text") for each in found]
        found = " ".join(found) if all(isinstance(each, str) for each in found) else None
    if not isinstance(found, str):
        raise ValueError(f"{who} is no text ({_keys(message)}): expected a value or a content")
    return found


def _keys(found: Mapping[str, Any]) -> str:
    return f"a dict of {', '.join(map(str, found)) or 'nothing'}"


def _values(parts: Sequence[Mapping[str, Any]], key: str) -> list[Any] | None:
    """Values of all entries by a key; None if none has it."""
    lacking = [index for index, part in enumerate(parts) if part.get(key) is None]
    if len(lacking) == len(parts):
        return None
    if lacking:
        raise ValueError(
            f"conversation {lacking[0]} of the batch has no {key}, and others have: expected it of all or none"
        )
    return [part[key] for part in parts]
