"""Token sequences of conversations: where images stand, which tokens are learned, padding and packing.

The one place where targets are shifted and rows are filled up. A conversation is

    start, prompt, answer, end, prompt, answer, end, ...

with the tokens of an image wherever its ``<image>`` stands in a prompt. Answers and the end behind each are learned,
each token at the place of the one before it; prompts, images and padding are not (Liu et al. 2023, "Visual Instruction
Tuning", arXiv 2304.08485, equation 3). All of this is done with numbers on the host: nothing waits for a device.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.common.batch import to_device
from zoo.common.conversations import IMAGE_PLACE
from zoo.common.tokenizers import HasUnknown, Tokenizer

PLACE = -1
"""Number of an image token within a row of token ids."""
MULTIPLE = 8
"""Rows are as long as a multiple of this, so that compiled code sees few lengths."""

Turns = Sequence[tuple[str, str]]


class Tokens(NamedTuple):
    """Tokens of one conversation.

    Attributes:
        ids: Token ids, :data:`PLACE` for each image token.
        learned: Whether each is the token of an answer, or the end behind one.
    """

    ids: list[int]
    learned: list[bool]


class Rows(NamedTuple):
    """Sequences of a batch as rows of tokens, (R, L) of them; what each is good for, by numbers of places in R * L.

    Attributes:
        tokens: (R, L) int64; at the places of image tokens, and of padding, a token that is overwritten or not read.
        positions: (R, L) int64, the position of each token in its sequence. None: rows are sequences, from 0 on.
        segments: (R, L) int64, the sequence of each token within its row from 1 on, 0 for padding. None: one a row.
        places: (T,) int64, where image tokens go, in the order of the batch's images.
        read: (A,) int64, where a token is predicted: the place before that of each learned token.
        targets: (A,) int64, the tokens that are predicted there.
        owners: (A,) int64, the sample of each.
        samples: How many samples there are.
        kept: (T,) int64, which of the batch's image tokens go there, where some samples were cut. None: all.
        cut: (C,) int64, the samples that were cut. None: none.
    """

    tokens: Tensor
    positions: Tensor | None
    segments: Tensor | None
    places: Tensor
    read: Tensor
    targets: Tensor
    owners: Tensor
    samples: int
    kept: Tensor | None = None
    cut: Tensor | None = None

    def to(self, device: torch.device) -> "Rows":
        """The same rows on a device."""
        moved: Any = [to_device(each, device) if isinstance(each, Tensor) else each for each in self]
        return Rows(*moved)


class Format(NamedTuple):
    """Text around prompts, answers and images, as the language model was trained with.

    Attributes:
        turn: Text of a turn before its answer, with a place {} for the prompt: "USER: {} ASSISTANT: " in LLaVA-1.5.
        system: Text before the first turn.
        before_image: Text before each image, "<|vision_start|>" in Qwen-VL.
        behind_image: Text behind each image.
    """

    turn: str = "{} "
    system: str = ""
    before_image: str = ""
    behind_image: str = ""

    def prompt(self, prompt: str, first: bool) -> str:
        """The text of a turn before its answer."""
        image = f"{self.before_image}{IMAGE_PLACE}{self.behind_image}"
        return (self.system if first else "") + self.turn.replace("{}", prompt.replace(IMAGE_PLACE, image))


def check_format(layout: Format, tokenizer: Tokenizer) -> None:
    """Raises ValueError for a turn without a place for the prompt, and for tokens around images that there are not."""
    if layout.turn.count("{}") != 1:
        raise ValueError(f"turn is {layout.turn!r}: expected one place {{}} for the prompt")
    if IMAGE_PLACE in layout.turn + layout.system:
        raise ValueError(f"{IMAGE_PLACE} stands in turn or system: expected it in prompts alone")
    unknown = tokenizer.unknown_id if isinstance(tokenizer, HasUnknown) else None
    for name, text in (("before_image", layout.before_image), ("behind_image", layout.behind_image)):
        if text and len(ids := inner_ids(tokenizer, text)) != 1:
            raise ValueError(
                f"{name} is {text!r}, {len(ids)} tokens of {type(tokenizer).__name__}: expected one, or no text"
            )
        if text and ids[0] == unknown:
            raise ValueError(f"{name} is {text!r}, a token that {type(tokenizer).__name__} does not have")


def inner_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text without those of start and end."""
    if not text:
        return []
    ids = tokenizer.encode(text)
    if ids and ids[0] == tokenizer.start_id:
        ids = ids[1:]
    if ids and ids[-1] == tokenizer.end_id:
        ids = ids[:-1]
    return ids


def prompt_ids(tokenizer: Tokenizer, text: str, image_tokens: Sequence[int]) -> list[int]:
    """Ids of a prompt, with as many :data:`PLACE` for each ``<image>`` as its image has tokens.

    Args:
        tokenizer: Tokeniser.
        text: Of the prompt, with as many places as there are images.
        image_tokens: Number of tokens of each image.
    """
    first, *others = text.split(IMAGE_PLACE)
    ids = inner_ids(tokenizer, first)
    for count, part in zip(image_tokens, others, strict=True):
        ids += [PLACE] * count + inner_ids(tokenizer, part)
    return ids


def sequence(
    tokenizer: Tokenizer, turns: Turns, image_tokens: Sequence[int], layout: Format, asked: bool = False
) -> Tokens:
    """Tokens of a conversation.

    Args:
        tokenizer: Tokeniser with an end token.
        turns: Prompts and answers.
        image_tokens: Number of tokens of each of its images, in the order of their places.
        layout: Text around them.
        asked: Leave out the last answer.
    """
    start = [] if tokenizer.start_id is None else [tokenizer.start_id]
    ids, learned, left = list(start), [False] * len(start), list(image_tokens)
    for number, (prompt, answer) in enumerate(turns):
        here, left = left[: prompt.count(IMAGE_PLACE)], left[prompt.count(IMAGE_PLACE) :]
        question = prompt_ids(tokenizer, layout.prompt(prompt, not number), here)
        end = [] if tokenizer.end_id is None else [tokenizer.end_id]
        said = [] if asked and number + 1 == len(turns) else inner_ids(tokenizer, answer) + end
        ids += question + said
        learned += [False] * len(question) + [True] * len(said)
    return Tokens(ids, learned)


def with_images(words: Tensor, places: Tensor, features: Tensor) -> Tensor:
    """Embeddings (R, L, W) of tokens, with those of images (T, W) at places (T,), numbers within R * L."""
    return words.flatten(0, 1).index_copy(0, places, features.to(words.dtype)).view_as(words)


def cut(made: Tokens, length: int) -> Tokens:
    """The first tokens of a sequence."""
    return Tokens(made.ids[:length], made.learned[:length])


def lay_out(made: Sequence[Tokens], pad_id: int, row_length: int | None = None, most: int | None = None) -> Rows:
    """Rows of sequences: one each, filled up on the right; or packed, first fit, into rows of at most ``row_length``.

    Args:
        made: Sequences, in the order of the samples; those of images that were cut have fewer places than tokens.
        pad_id: Token that rows are filled up with.
        row_length: Most tokens of a row of several sequences. None: each has a row of its own.
        most: How far such rows are filled up at most, where they are not longer themselves. None: no limit.

    Returns:
        On the CPU.
    """
    rows = [[index] for index in range(len(made))] if row_length is None else first_fit(made, row_length)
    lengths = [sum(len(made[index].ids) for index in row) for row in rows]
    length = -(-max(lengths) // MULTIPLE) * MULTIPLE
    limit = most if row_length is None else row_length
    if limit is not None:
        length = min(length, max(limit, *lengths))
    tokens, positions, segments = [], [], []
    starts = [0] * len(made)
    for number, row in enumerate(rows):
        at = number * length
        for index, offset in zip(row, accumulate((len(made[i].ids) for i in row[:-1]), initial=0), strict=True):
            starts[index] = at + offset
        filled = length - lengths[number]
        tokens.append([max(i, 0) for index in row for i in made[index].ids] + [pad_id] * filled)
        positions.append([place for index in row for place in range(len(made[index].ids))] + [0] * filled)
        segments.append([n for n, index in enumerate(row, 1) for _ in made[index].ids] + [0] * filled)
    places, read, targets, owners = [], [], [], []
    for index, (ids, learned) in enumerate(made):
        places += [starts[index] + place for place, token in enumerate(ids) if token == PLACE]
        answered = [place for place, said in enumerate(learned) if said and place]
        read += [starts[index] + place - 1 for place in answered]
        targets += [ids[place] for place in answered]
        owners += [index] * len(answered)
    packed = row_length is not None

    def whole(values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64)

    return Rows(
        tokens=whole(tokens),
        positions=whole(positions) if packed else None,
        segments=whole(segments) if packed else None,
        places=whole(places),
        read=whole(read),
        targets=whole(targets),
        owners=whole(owners),
        samples=len(made),
    )


def first_fit(made: Sequence[Tokens], row_length: int) -> list[list[int]]:
    """Indices of the sequences of each row: each goes into the first row that it fits in."""
    rows: list[list[int]] = []
    left: list[int] = []
    for index, (ids, _) in enumerate(made):
        fits = next((row for row, room in enumerate(left) if room >= len(ids)), None)
        if fits is None:
            rows.append([index])
            left.append(row_length - len(ids))
        else:
            rows[fits].append(index)
            left[fits] -= len(ids)
    return rows
