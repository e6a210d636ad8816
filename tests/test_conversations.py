"""Conversations in batches: every form that is read, what is refused, and samples of any number of images."""

import re
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.base import ImageDataModule
from datamodules.loading.any_size import FlatImages
from datamodules.loading.conversations import Conversed, collate
from zoo.common import conversations
from zoo.common.conversations import IMAGE_PLACE, ConversationBatch, has_conversations, read

TWO = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
TURNS = [("<image> what is this?", "a cat"), ("what color?", "red")]


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


LLAVA = [human("<image> what is this?"), gpt("a cat"), human("what color?"), gpt("red")]
CHAT = [user("<image> what is this?"), assistant("a cat"), user("what color?"), assistant("red")]
PARTS = [
    user([{"type": "image"}, {"type": "text", "text": "what is this?"}]),
    assistant([{"type": "text", "text": "a cat"}]),
    *CHAT[2:],
]
FORMS: dict[str, Any] = {
    "turns": {"turns": [list(pair) for pair in TURNS], "images": 1},
    "turns without a count": {"turns": TURNS},
    "pairs": [list(pair) for pair in TURNS],
    "LLaVA": LLAVA,
    "LLaVA in a dict": {"id": "a", "image": "a.jpg", "conversations": LLAVA},
    "roles": CHAT,
    "roles in a dict": {"messages": CHAT, "images": ["a.jpg"]},
    "parts": PARTS,
    "an image's address as a part": [
        user([{"type": "image_url", "image_url": "x"}, *PARTS[0]["content"][1:]]),
        *CHAT[1:],
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_conversation_is_read_alike(form):
    found = read((TWO, [FORMS[form], {"prompt": "<image> and this?", "answer": "a dog"}]))
    assert found.turns == [TURNS, [("<image> and this?", "a dog")]]
    assert found.counts == [1, 1]
    assert found.images is TWO
    assert found.kinds is found.subsets is found.choices is None
    assert found.names is None


class Named(NamedTuple):
    pixel_values: Tensor
    messages: list[Any]


@pytest.mark.parametrize("key", conversations.CONVERSATION_KEYS)
def test_a_batch_may_be_a_dict_or_a_named_tuple(key):
    for images in ("image", "images", "pixel_values"):
        assert read({images: TWO, key: [LLAVA, CHAT]}).turns == [TURNS, TURNS]
    assert read(Named(TWO, [LLAVA, CHAT])).counts == [1, 1]


def test_what_is_known_of_samples_goes_along():
    entry = {"turns": TURNS[1:], "images": 0, "kind": "color", "subset": 1, "choices": ["red", "blue"], "name": "x/7"}
    other = {"turns": TURNS[:1], "images": 1, "kind": "caption", "subset": 0, "name": "x/8"}
    found = read((TWO[:1], [entry, other]))
    assert found == ConversationBatch(
        found.images,
        [TURNS[1:], TURNS[:1]],
        [0, 1],
        ["color", "caption"],
        [1, 0],
        [["red", "blue"], None],
        ["x/7", "x/8"],
    )
    assert read((TWO, [{"id": 3, "conversations": LLAVA}, {"id": 4, "conversations": LLAVA}])).names == ["3", "4"]


def test_a_system_message_goes_in_front_of_the_first_prompt():
    for role in ({"from": "system", "value": "be brief"}, {"role": "system", "content": "be brief"}):
        (turns,) = read((TWO[:1], [[role, *LLAVA]])).turns
        assert turns == [("be brief\n<image> what is this?", "a cat"), TURNS[1]]


def test_samples_have_any_number_of_images_together_as_many_as_the_batch():
    several = {"turns": [["<image> <image> same?", "no"], ["and <image>?", "yes"]]}
    five = torch.zeros(4, 3, 4, 4)
    assert read((five, [LLAVA, {"turns": [["hi", "ho"]]}, several])).counts == [1, 0, 3]
    images = [torch.zeros(3, 4, 8), torch.zeros(3, 8, 4)]
    found = read((images, [LLAVA, LLAVA]))
    assert all(a is b for a, b in zip(found.images, images, strict=True))
    for none in (torch.zeros(0, 3, 4, 4), []):
        found = read((none, [[["hi", "ho"]]]))
        assert len(found.images) == 0
        assert found.counts == [0]


def test_an_empty_prompt_is_one():
    assert read((TWO[:0], [{"prompt": "", "answer": "once upon a time"}])).turns == [[("", "once upon a time")]]


def test_for_prediction_the_last_answer_may_be_missing():
    entries = [LLAVA[:3], [list(TURNS[0]), ["what color?", ""]], {"turns": [["<image> what?", ""]], "images": 1}]
    with pytest.raises(
        ValueError, match="conversation 0 of the batch has no answer, in turn 1: leave out such samples"
    ):
        read((TWO[:1], entries[:1]))
    found = read((torch.zeros(3, 3, 4, 4), entries), answered=False)
    assert [turns[-1][1] for turns in found.turns] == ["", "", ""]
    with pytest.raises(ValueError, match="has an empty answer, in turn 0"):
        read((TWO[:1], [[["<image> a?", ""], ["b?", "c"]]]), answered=False)


FAULTS: dict[str, tuple[Any, str]] = {
    "no turns": ([], "conversation 1 of the batch has no answer: expected at least one turn"),
    "no answer": ([human("what?")], "conversation 1 of the batch has no answer, in turn 0: leave out such samples"),
    "an answer that is missing": ({"prompt": "what?"}, "conversation 1 of the batch has no answer, in turn 0"),
    "an empty answer": ({"prompt": "a?", "answer": "  "}, "conversation 1 of the batch has an empty answer, in turn 0"),
    "no text": (
        {"prompt": "a?", "answer": None},
        "turn 0 of conversation 1 of the batch is ['a?', None]: expected a pr",
    ),
    "two prompts": (
        [human("a?"), human("b?"), gpt("c")],
        "message 1 of conversation 1 of the batch is the user's, where the assistant's is expected: prompts and",
    ),
    "an answer first": ([gpt("c"), human("a?")], "message 0 of conversation 1 of the batch is the assistant's, where"),
    "a late system": (
        [human("a?"), gpt("b"), {"role": "system", "content": "c"}],
        "message 2 of conversation 1 of the batch is the system's, where the user's is expected",
    ),
    "an unknown role": (
        [{"role": "tool", "content": "a"}],
        "message 0 of conversation 1 of the batch is of 'tool': expe",
    ),
    "no content": (
        [{"role": "user"}],
        "message 0 of conversation 1 of the batch is no text (a dict of role): expected",
    ),
    "no place": (
        {"turns": [["what?", "a cat"]], "images": 1, "name": "x/7"},
        "conversation 1 of the batch (x/7) has 1 images and no place for one: expected <image> for each in its prompts",
    ),
    "more places": (
        {"turns": [["<image> <image> what?", "a cat"]], "images": 1},
        "conversation 1 of the batch has 1 images and 2 places (<image>) in its prompts: expected as many",
    ),
    "fewer places": (
        {"turns": [["<image> what?", "a cat"]], "images": 2},
        "conversation 1 of the batch has 2 images and 1 places (<image>)",
    ),
    "a place in an answer": (
        {"turns": [["<image> what?", "this <image>"]]},
        "conversation 1 of the batch has <image> in an answer, in turn 0: expected it in prompts alone",
    ),
    "a count that is none": (
        {"turns": TURNS, "images": "1"},
        "conversation 1 of the batch has '1' as images: expected h",
    ),
    "no pair": (
        [["a", "b", "c"]],
        "turn 0 of conversation 1 of the batch is ['a', 'b', 'c']: expected a prompt and an",
    ),
    "a text": (
        "hello",
        "conversation 1 of the batch is a str: expected turns, messages, or a prompt and an answer",
    ),
    "other keys": ({"text": "hello"}, "conversation 1 of the batch is a dict of text: expected turns, messages"),
    "no choice": (
        {"turns": TURNS, "choices": ["blue"]},
        "conversation 1 of the batch has an answer that is not among its",
    ),
    "choices of another form": (
        {"turns": TURNS, "choices": "red"},
        "conversation 1 of the batch has 'red' as choices: ",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_a_conversation_is_said_of_it(fault):
    entry, message = FAULTS[fault]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        read((TWO, [LLAVA, entry]))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (TWO, "expected (images, conversations), got a Tensor: this module learns from conversations"),
        ((TWO, torch.zeros(2)), "expected (images, conversations), got a Tensor beside the images"),
        ({"image": TWO}, "expected (images, conversations), got the keys ['image']"),
        ((TWO, []), "expected (images, conversations), got a list beside the images"),
        (
            (TWO, [LLAVA]),
            "the conversations have 1 images together (1), and the batch has 2: expected as many; a prompt",
        ),
        ((TWO, [[["a?", "b"]], [["a?", "b"]]]), "the conversations have 0 images together (0, 0), and the batch has 2"),
        ((TWO.to(torch.uint8), [LLAVA, LLAVA]), "the images are torch.uint8: normalised floats are expected"),
        (
            (TWO, [LLAVA, {"turns": TURNS, "kind": "color"}]),
            "conversation 0 of the batch has no kind, and others have: expected it of all or none",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_batch_of_another_form_is_refused(batch, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        read(batch)


def test_a_batch_tells_whether_it_has_conversations():
    assert has_conversations((TWO, [LLAVA, LLAVA]))
    assert not has_conversations(TWO)
    assert not has_conversations((TWO, torch.zeros(2)))


def test_nothing_is_written_into_a_batch():
    entry = {"turns": [["<image> what?", "a cat"]]}
    read((TWO[:1], [entry]))
    assert entry == {"turns": [["<image> what?", "a cat"]]}


# Collation and the hop to the device.


def image(value: int, height: int = 4, width: int = 4) -> Tensor:
    return torch.full((3, height, width), value, dtype=torch.uint8)


def said(count: int) -> dict[str, Any]:
    return {"turns": [["<image> " * count + "what?", "a cat"]]}


def test_images_of_all_samples_lie_one_after_another():
    samples = [
        (image(1), said(1)),
        (torch.stack([image(2), image(3)]), said(2)),
        (torch.empty(0, 3, 4, 4, dtype=torch.uint8), said(0)),
        ([image(4), image(5), image(6)], said(3)),
        ([], said(0)),
    ]
    images, entries = collate(samples)
    assert images[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert images.dtype == torch.uint8
    assert [entry["images"] for entry in entries] == [1, 2, 0, 3, 0]
    assert "images" not in samples[0][1]
    assert read((images.float(), entries)).counts == [1, 2, 0, 3, 0]


def test_images_of_several_sizes_come_flat():
    samples = [(image(1, 2, 6), said(1)), ([], said(0)), ([image(2, 4, 4), image(3, 2, 2)], said(2))]
    images, _ = collate(samples)
    assert isinstance(images, FlatImages)
    assert [each.shape for each in images] == [(3, 2, 6), (3, 4, 4), (3, 2, 2)]
    alike, _ = collate([(image(1), said(1))] * 2, flat=True)
    assert isinstance(alike, FlatImages)


def test_other_samples_are_put_together_as_ever():
    assert collate([torch.zeros(3, 2, 2)] * 2).shape == (2, 3, 2, 2)
    images, labels = collate([(torch.zeros(3, 2, 2), 1)] * 2)
    assert (images.shape, labels.tolist()) == ((2, 3, 2, 2), [1, 1])


class Talks(Conversed, ImageDataModule):
    """A data module of samples that are given; ``image_shape`` as told."""

    in_memory = True

    def __init__(self, samples: list[Any], **options: Any) -> None:
        super().__init__(mean=(0.5,), std=(0.5,), **options)
        self.given = samples

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 3, 4, 4

    def samples(self, split: Any) -> Any:
        return self.given


EVERYTHING: dict[str, Any] = {"hflip": 0.5, "degrees": 9.0, "translate": 0.1, "zoom": 0.1, "shear": 2.0, "erase": 0.5}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("options", [{}, EVERYTHING, {"binarize": "threshold"}], ids=["plain", "augmented", "binary"])
@pytest.mark.parametrize("empty", [[], torch.empty(0, 3, 4, 4, dtype=torch.uint8)], ids=["list", "tensor"])
def test_a_batch_without_any_image_comes_through(flat, options, empty):
    data = Talks([(empty, said(0))] * 4, batch_size=2, **options)
    data.any_size = flat
    loop = SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(ready=0)))
    plugin = SimpleNamespace(convert_input=lambda images: images)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=0,
        world_size=1,
        num_devices=1,
        ckpt_path=None,
        training=True,
        current_epoch=0,
        fit_loop=SimpleNamespace(epoch_loop=loop),
        precision_plugin=plugin,
    )
    for batch in data.train_dataloader():
        moved = data.transfer_batch_to_device(batch, torch.device("cpu"), 0)
        images, entries = data.on_after_batch_transfer(moved, 0)
        assert entries is batch[1]
        assert (images == []) if flat else (images.shape == (0, 3, 4, 4) and images.dtype == torch.float32)
        found = read((images, entries))
        assert (len(found.images), found.counts) == (0, [0, 0])


@pytest.mark.parametrize("sizes", [[(4, 4), (4, 4)], [(4, 4), (2, 6)]], ids=["one size", "several"])
def test_the_hop_moves_and_normalises_images_alone(sizes):
    data = Talks([([image(255, *size)], said(1)) for size in sizes], batch_size=2, drop_last=False)
    (batch,) = data.val_dataloader()
    assert data.transfer_batch_to_device(batch, torch.device("meta"), 0)[1] is batch[1]
    images, entries = data.on_after_batch_transfer(batch, 0)
    assert entries is batch[1]
    for each, size in zip(images, sizes, strict=True):
        assert torch.equal(each, torch.ones(3, *size))
    assert read((images, entries)).counts == [1, 1]


def test_workers_hand_over_batches_with_any_number_of_images():
    samples = [(image(1), said(1)), ([], said(0)), ([image(2), image(3)], said(2)), ([], said(0))]
    alone, helped = (list(Talks(samples, batch_size=1, num_workers=n).val_dataloader()) for n in (0, 1))
    assert isinstance(Talks(samples).val_dataloader(), DataLoader)
    assert [len(images) for images, _ in helped] == [1, 0, 2, 0]
    for (images, entries), (others, told) in zip(alone, helped, strict=True):
        assert torch.equal(images, others)
        assert entries == told
    assert IMAGE_PLACE in helped[0][1][0]["turns"][0][0]
