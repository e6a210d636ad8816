"""Conversations of your own: every form of a file, any number of images, what is held out, and faults by entry."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from datamodules import ConversationsDataModule
from datamodules.reading import conversations as reading
from datamodules.reading.images import UnreadableImageError
from zoo.common.conversations import read
from zoo.common.data_protocols import HasCaptions, HasImageShape, StatesPreprocessing

SMALL: dict[str, Any] = {"image_size": 8, "num_workers": 0, "batch_size": 4, "scale": None}
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:The number of training batches")


def picture(path: str, level: int, size: tuple[int, int] = (9, 12)) -> str:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(level).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return path


def llava(image: Any, *texts: str, **more: Any) -> dict[str, Any]:
    messages = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]
    return {**({} if image is None else {"image": image}), "conversations": messages, **more}


def write(name: str, entries: Any) -> str:
    text = "\n\n".join(map(json.dumps, entries)) if name.endswith(".jsonl") else json.dumps(entries)
    Path(name).write_text(text, encoding="utf-8")
    return name


def about_one(number: int, **more: Any) -> dict[str, Any]:
    return llava(f"{number:02}.png", f"<image>\nwhat is {number}?", f"it is {number}", id=number, **more)


def write_many(name: str, count: int, start: int = 0) -> str:
    """A file of ``count`` conversations about one image each, two about the first, one about two, and one without."""
    for number in range(start, start + count):
        picture(f"images/{number:02}.png", number)
    first, second = (f"{start + k:02}.png" for k in range(2))
    more = [
        llava(first, "what?", "that", "and <image>?", "this", id="again"),
        llava([first, second], "<image> or <image>?", "both", id="two"),
        llava(None, "say something", "something", id="text"),
    ]
    return write(name, [*(about_one(number) for number in range(start, start + count)), *more])


def module(*args: Any, **options: Any) -> ConversationsDataModule:
    return ConversationsDataModule(*args, **SMALL | {"root": "images"} | options)


def by_name(batches: Any) -> dict[str, tuple[list[list[int]], Any]]:
    """The pixels of each conversation's images, and its entry."""
    found = {}
    for images, said in batches:
        rest = list(images)
        for entry in said:
            own, rest = rest[: entry["images"]], rest[entry["images"] :]
            found[entry["name"]] = [image.flatten().tolist() for image in own], entry
        assert not rest
    return found


# Forms of a file.

TURNS = [["be brief\n<image> what?", "a cat"], ["sure?", "yes"]]
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "<image> what?"},
    {"role": "assistant", "content": "a cat"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "yes"},
]
SYSTEM = [
    {"from": "system", "value": "be brief"},
    *llava("", "<image> what?", "a cat", "sure?", "yes")["conversations"],
]
FORMS: dict[str, dict[str, Any]] = {
    "LLaVA": {"image": "a.png", "conversations": SYSTEM},
    "roles": {"images": ["a.png"], "messages": CHAT},
    "roles in LLaVA's": {"image": ["a.png"], "conversations": CHAT},
}


@pytest.mark.parametrize("ending", ["json", "jsonl"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(form, ending):
    picture("a.png", 1)
    entries = [
        FORMS[form],
        {"image": "a.png", "prompt": "<image>", "answer": "é"},
        {"prompt": "hi", "answer": "ho", "id": 7},
    ]
    found = reading.read(Path(write(f"some.{ending}", entries)))
    places = (1, 2) if ending == "json" else (1, 3)
    assert [found.of(index) for index in range(3)] == [
        {"turns": TURNS, "name": f"some.{ending}/{places[0]}"},
        {"turns": [["<image>", "é"]], "name": f"some.{ending}/{places[1]}"},
        {"turns": [["hi", "ho"]], "name": "7"},
    ]
    assert [found.images_of(index).tolist() for index in range(3)] == [[0], [0], []]
    assert found.files.tolist() == ["a.png"]


def test_what_else_is_known_goes_along():
    picture("a.png", 1)
    entries = [about_one(1, kind="number", subset=1, choices=["it is 1", "it is 2"]) | {"image": "a.png"}]
    data = ConversationsDataModule(test=write("some.json", entries), **SMALL)
    ((_, (entry,)),) = data.test_dataloader()
    assert {key: entry[key] for key in ("kind", "subset", "choices", "images", "name")} == {
        "kind": "number",
        "subset": 1,
        "choices": ["it is 1", "it is 2"],
        "images": 1,
        "name": "1",
    }


def test_one_image_is_one_however_it_is_spelt(tmp_path):
    picture("images/a.png", 1)
    spelt = ["a.png", "./a.png", f"{tmp_path}/images/a.png", ".\\a.png"]
    entries = [llava(name, "<image>", "a cat") for name in spelt]
    found = reading.read(Path(write("some.json", entries)), Path("images"))
    assert len(found.files) == 1
    assert len({*found.groups.tolist()}) == 1


# Samples and batches.


@pytest.fixture
def many() -> str:
    return write_many("train.json", 12)


def test_batches_hold_the_images_of_their_conversations_in_order(many):
    data = module(many, many, many)
    found = by_name(data.test_dataloader())
    assert len(found) == 15
    for name, (images, entry) in found.items():
        expected = [int(name)] if name.isdigit() else {"again": [0], "two": [0, 1], "text": []}[name]
        assert entry["images"] == len(expected)
        for image, number in zip(images, expected, strict=True):
            with Image.open(f"images/{number:02}.png") as file:
                assert data.eval_transform(file.convert("RGB")).flatten().tolist() == image
    batch = next(iter(data.train_dataloader()))
    made = read(data.on_after_batch_transfer(batch, 0))
    assert made.images.dtype == torch.float32
    assert len(made.turns) == 4
    for protocol in (HasCaptions, HasImageShape, StatesPreprocessing):
        assert isinstance(data, protocol)


def test_batches_without_an_image_come_through():
    path = write("texts.json", [llava(None, "say", str(number)) for number in range(6)])
    for options in ({}, {"token_budget": 2, "patch_size": 4}):
        data = ConversationsDataModule(path, val_fraction=0, test_fraction=0, **SMALL | options)
        for batch in data.train_dataloader():
            images, said = data.on_after_batch_transfer(batch, 0)
            assert len(images) == 0
            assert len(said) == (2 if options else 4)


def test_texts_for_fitting_have_no_places(many):
    texts = module(many, many, val_fraction=0).captions()
    assert texts[:2] == ["what is 0?", "it is 0"]
    assert "or  ?" in texts or "or" in " ".join(texts)
    assert not [text for text in texts if "<image>" in text]
    assert module(many, many).sample_count() == 15
    with pytest.raises(ValueError, match="has no train, and so no texts to fit to: set it to a file"):
        module(test=many).captions()


def test_held_out_conversations_share_no_image_with_training(many):
    def parts(**options: Any) -> list[set[str]]:
        data = module(many, val_fraction=0.25, test_fraction=0.25, **options)
        files = [data.samples(split) for split in ("train", "val", "test")]
        images = [{*each.files.names.tolist()} for each in files]
        assert not images[0] & images[1]
        assert not (images[0] | images[1]) & images[2]
        assert sum(map(len, images)) == 12
        return [{*each.names.tolist()} for each in files]

    found = parts()
    assert sum(map(len, found)) == 15
    assert all(len(each) >= 3 for each in found)
    assert parts() == found != parts(split_seed=1)
    together = next(each for each in found if "two" in each)
    assert {"0", "1", "again"} <= together
    given = module(many, write_many("val.json", 3, 20))
    assert len(given.samples("train")) == 15
    assert given.samples("test") is None


def test_images_of_any_size_fit_the_budget():
    sizes = [(8, 8), (8, 24), (16, 16), (24, 8), (32, 8), (8, 16)]
    for number, size in enumerate(sizes):
        picture(f"images/{number}.png", number, size)
    entries = [llava(f"{k}.png", "<image>", str(k), id=k) for k in range(6)]
    entries += [llava(["0.png", "3.png"], "<image> <image>", "two", id="two"), llava(None, "a", "b", id="text")]
    path = write("some.json", entries)
    data = module(path, path, path, token_budget=16, patch_size=4, image_size=224)
    assert data.image_shape is None
    batches = list(data.test_dataloader())
    found = by_name(batches)
    assert {*found} == {*"012345", "two", "text"}
    for images, said in batches:
        assert (
            sum(image.shape[1] * image.shape[2] for image in images) // 16 + sum(not entry["images"] for entry in said)
            <= 16
        )
    for images, said in (data.on_after_batch_transfer(batch, 0) for batch in batches):
        assert read((images, said)).counts == [entry["images"] for entry in said]
    shapes = {int(said[0]["name"]): images[0].shape[1:] for images, said in batches if said[0]["name"].isdigit()}
    assert all(tuple(shape) == sizes[number] for number, shape in shapes.items())
    drawn = module(path, val_fraction=0, test_fraction=0, token_budget=16, patch_size=4, tokens=(2, 6))
    samples, none = drawn.samples("train"), np.zeros(8, dtype=np.int64)
    counts = np.array([samples.sizing.tokens(samples, epoch, none, np.arange(8)) for epoch in range(30)])
    assert 1 <= counts[:, :6].min() < counts[:, :6].max() <= 6
    assert 2 <= counts[:, 6].min() < counts[:, 6].max() <= 12
    assert {*counts[:, 7]} == {1}
    for epoch in range(4):
        plans = samples.sizing.plans(samples, [(epoch, 0, index) for index in range(8)])
        for index, plan in enumerate(plans):
            images, _ = samples.sizing.made(samples, index, plan)
            found = sum(image.shape[1] * image.shape[2] for image in images) // 16
            assert found == (counts[epoch, index] if index < 7 else 0)
    assert any(len({tuple(grid) for grid in samples.sizing.plans(samples, [(e, 0, 6)])[0][1]}) == 2 for e in range(9))
    with pytest.raises(ValueError, match=r"has 1\d tokens \(and 4 more\): expected 1 to 9, the token_budget"):
        module(path, token_budget=9, patch_size=4, val_fraction=0, test_fraction=0).train_dataloader()


def test_workers_and_ranks_change_nothing(many):
    options = {"val_fraction": 0, "test_fraction": 0, "scale": (0.3, 1.0)}
    alone, helped = (by_name(module(many, num_workers=n, **options).train_dataloader()) for n in (0, 2))
    assert alone == helped
    assert alone != by_name(module(many, seed=1, **options).train_dataloader())


class TalkWatcher(LightningModule):
    """Trains nothing, and keeps the names of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.given: list[str] = []

    def training_step(self, batch, batch_idx):
        found = read(batch)
        self.given += found.names
        return self.weight * sum(image.sum() for image in found.images) * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: ConversationsDataModule) -> list[str]:
    quiet: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "enable_checkpointing": False, "limit_val_batches": 0}
    watcher = TalkWatcher()
    Trainer(max_epochs=1, **quiet).fit(watcher, datamodule=data)
    return watcher.given


@pytest.mark.parametrize("options", [{}, {"token_budget": 24, "patch_size": 4}], ids=["one size", "any size"])
def test_an_image_that_cannot_be_read_is_skipped_and_told(many, options):
    Path("images/01.png").write_bytes(Path("images/01.png").read_bytes()[:60])
    more = {"val_fraction": 0, "test_fraction": 0, "drop_last": False, **options}
    if "token_budget" in options:
        more.pop("drop_last")
    with pytest.warns(UserWarning, match=r"1 of 12 images could not be read and were skipped: 01\.png"):
        given = fit(module(many, on_error="skip", **more))
    assert not {"1", "two"} & {*given}
    assert len(given) > 10
    with pytest.raises(UnreadableImageError, match=r"01\.png"):
        fit(module(many, on_error="raise", **more))


def test_what_stands_in_for_an_unreadable_conversation_fits_its_budget():
    for number, size in enumerate([(8, 8), (8, 8), (32, 32)]):
        picture(f"images/{number}.png", number, size)
    entries = [llava(f"{k}.png", "<image>", str(k), id=k) for k in range(3)]
    entries += [llava(["2.png", "2.png"], "<image> <image>", "a", id="two"), llava(None, "a", "b", id="text")]
    data = module(
        write("a.json", entries), val_fraction=0, test_fraction=0, token_budget=200, patch_size=4, on_error="skip"
    )
    samples = data.samples("train")
    for plan, number, expected in (
        ((0, [[2, 2]]), 2, [4]),
        ((0, [[2, 2]]), 3, [1, 1]),
        ((0, [[2, 2]]), 4, []),
        ((0, [[2, 2]]), 0, [4]),
    ):
        images, _ = samples.sizing.made(samples, number, plan)
        assert [image.shape[1] * image.shape[2] // 16 for image in images] == expected
    assert samples.sizing.made(samples, 3, (0, [[1, 1]])) is None  # two images in place of one patch
    assert samples.sizing.made(samples, 0, (4, [])) is None


def test_small_copies_are_kept_and_stages_change_the_size(many):
    plain = by_name(module(many, many).val_dataloader())
    data = module(many, many, cache="ram", cache_size=16)
    assert by_name(data.val_dataloader()).keys() == plain.keys()
    assert data.samples("train").files.store is not None
    assert by_name(data.train_dataloader()).keys() <= plain.keys()
    staged = module(many, val_fraction=0, test_fraction=0)
    staged.train_in_stages({1: {"image_size": 16}})
    dataset = staged.train_dataloader().dataset
    for epoch, side in ((0, 8), (1, 16)):
        ((images, said),) = dataset[[(epoch, 0, 3)]]
        assert [image.shape for image in images] == [(3, side, side)]
        assert said["name"] == "3"


def test_predictions_need_no_answer(many):
    entries = [llava("00.png", "<image> what?"), llava("01.png", "<image> a?", "b", "c?", id="x")]
    data = module(predict=write("ask.json", entries))
    (batch,) = data.predict_dataloader()
    found = read(data.on_after_batch_transfer(batch, 0), answered=False)
    assert found.turns == [[("<image> what?", "")], [("<image> a?", "b"), ("c?", "")]]
    assert found.names == ["ask.json/1", "x"]
    bare = module(predict_root="images")
    assert next(iter(bare.predict_dataloader())).shape == (4, 3, 8, 8)
    budget = module(predict_root="images", token_budget=40, patch_size=4)
    assert all(image.shape[0] == 3 for batch in budget.predict_dataloader() for image in batch)
    with pytest.raises(ValueError, match=r"predict is ask.json and predict_root images: set one of them"):
        module(predict="ask.json", predict_root="images")
    tested = module(test=many)
    assert by_name(tested.predict_dataloader()).keys() == by_name(tested.test_dataloader()).keys()


def test_shared_images_are_told(many):
    with pytest.warns(UserWarning, match=r"12 images of val are training images as well, .*00\.png the first"):
        module(many, many).setup("fit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(many, write_many("val.json", 3, 20)).setup("fit")


# What is wrong, by file and entry.

OK = llava("a.png", "<image> what?", "a cat")
FAULTS: dict[str, tuple[Any, str, str]] = {
    "no answer": (llava("a.png", "<image>"), "ValueError", "no answer (expected one for each prompt), turn 1"),
    "an empty answer": (
        llava("a.png", "<image>", " "),
        "ValueError",
        "no answer (expected one for each prompt), turn 1",
    ),
    "no messages": (
        llava("a.png"),
        "ValueError",
        "no conversations, messages, or prompt and answer, but image, conversa",
    ),
    "the system alone": ({"conversations": SYSTEM[:1]}, "ValueError", "no answer (expected one for each prompt)"),
    "an answer first": (
        {"conversations": llava(None, "a", "b", "c")["conversations"][1:]},
        "ValueError",
        "prompts and answers that do not alternate, a prompt first, message 1",
    ),
    "two prompts": (
        {"conversations": [*llava(None, "a")["conversations"], *llava(None, "a", "b")["conversations"]]},
        "ValueError",
        "prompts and answers that do not alternate, a prompt first, message 2",
    ),
    "an unknown role": (
        {"messages": [{"role": "tool", "content": "a"}]},
        "ValueError",
        "a message of none of human, user,",
    ),
    "a number as text": ({"prompt": 3, "answer": "a"}, "ValueError", "a message that is no text, 3"),
    "no place": (
        llava("a.png", "what?", "a cat"),
        "ValueError",
        "images and their places in prompts that are not as many (expected <image> once for each), 1 and 0",
    ),
    "no image": (
        llava(None, "<image> what?", "a cat"),
        "ValueError",
        "images and their places in prompts that are not as many (expected <image> once for each), 0 and 1",
    ),
    "a place in an answer": (
        llava(None, "what?", "<image>"),
        "ValueError",
        "<image> in an answer (expected in prompts alone), turn 1",
    ),
    "an image that is not there": (llava("b.png", "<image>", "a"), "FileNotFoundError", "no such image in ., b.png"),
    "an image that is no path": (
        llava(3, "<image>", "a"),
        "ValueError",
        "an image that is no path, [3]".replace("[3]", "3"),
    ),
    "no object": ("hello", "ValueError", "no object, 'hello'"),
    "other choices": (
        OK | {"choices": ["a dog"]},
        "ValueError",
        "choices that are no texts with the answer among them",
    ),
    "a kind of no text": (OK | {"kind": 3}, "ValueError", "a kind that is no str, 3"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_what_is_wrong_with_an_entry_is_said_with_its_file_and_place(fault, ending):
    entry, error, message = FAULTS[fault]
    picture("a.png", 1)
    path = write(f"some.{ending}", [OK, entry, OK])
    where = f"some.{ending}, " + ("entry 2" if ending == "json" else "line 3")
    with pytest.raises((ValueError, FileNotFoundError), match="^" + re.escape(f"{where}: {message}")) as caught:
        ConversationsDataModule(path, **SMALL).setup("fit")
    assert caught.type.__name__ == error
    assert str(caught.value).endswith("on_error skip would leave out such")
    with pytest.warns(UserWarning, match="^" + re.escape(f"{where}: {message}") + ".*: left out$"):
        samples = ConversationsDataModule(path, path, path, on_error="skip", **SMALL).samples("test")
    assert len(samples) == 2


def test_a_kind_is_of_all_entries_or_none():
    picture("a.png", 1)
    path = Path(write("some.json", [OK | {"kind": "x"}, OK, OK | {"kind": "y"}]))
    with pytest.raises(ValueError, match=r"^some\.json, entry 2: no kind, which others have"):
        reading.read(path)
    with pytest.warns(UserWarning, match=r"^some\.json, entry 2: no kind, which others have: left out"):
        assert len(reading.read(path, on_error="skip")) == 2


FILES: dict[str, tuple[str, str | None, str]] = {
    "none": ("some.json", None, "some.json: no such file; expected a list (.json) or lines (.jsonl) of"),
    "empty": ("some.json", "", "some.json is empty: expected a list (.json)"),
    "empty lines": ("some.jsonl", "\n\n", "some.jsonl has no conversations: expected a list"),
    "an empty list": ("some.json", "[]", "some.json has no conversations: expected a list"),
    "no list": ("some.json", '{"a": 1}', "some.json holds a dict, no list: expected a list (.json)"),
    "cut": ("some.json", '[{"a": 1}', "some.json is truncated, or no JSON at all"),
    "a line cut": ("some.jsonl", '{"prompt": "a", "answer": "b"}\n{"a', "some.jsonl, line 2: no JSON"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_form_is_refused(name):
    path, content, message = FILES[name]
    if content is not None:
        Path(path).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match="^" + re.escape(message)):
        ConversationsDataModule(path, **SMALL).setup("fit")


def test_sources_and_folders_that_are_missing_are_named(many):
    with pytest.raises(
        ValueError, match="there is no train, val, test, predict or predict_root: expected at least one"
    ):
        ConversationsDataModule()
    with pytest.raises(FileNotFoundError, match=r"^nowhere: no such folder, for the images of train\.json"):
        module(many, root="nowhere").setup("fit")
    with pytest.raises(ValueError, match="unknown encoding 'utf-9'"):
        module(many, encoding="utf-9")
    with pytest.raises(ValueError, match="unknown on_error 'ignore': expected raise or skip"):
        module(many, on_error="ignore")
