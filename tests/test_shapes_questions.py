"""Shapes with questions: every answer is true of its scene, the questions alone say little, and what is held out is."""

import re
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import ShapesQuestionsDataModule
from datamodules.loading.quotas import chances, dealt, drawn_shares, fit_weights
from datamodules.preprocessing import create
from datamodules.reading.colored_scenes import COLORS, PLACES, SHAPES, render, render_each
from datamodules.reading.scene_questions import KINDS, phrase, sums
from datamodules.shapes_captions import pairs
from zoo.common.conversations import read
from zoo.common.data_protocols import HasCaptions, HasImageShape, HasSubsets, StatesPreprocessing

FEW: dict[str, Any] = {"train_size": 420, "val_size": 35, "test_size": 210, "batch_size": 16}


def data(**options: Any) -> ShapesQuestionsDataModule:
    return ShapesQuestionsDataModule(**FEW | options)


@pytest.fixture(scope="module")
def usual() -> ShapesQuestionsDataModule:
    return data()


@pytest.fixture(scope="module")
def two() -> ShapesQuestionsDataModule:
    return data(images_per_sample=2, text_share=0.2)


def scenes_of(module: ShapesQuestionsDataModule, split: str) -> list[list[list[int]]]:
    """What the images of a split show, by index."""
    return [scene for part in module._shown(split)[0] for scene in part]


def entries(module: ShapesQuestionsDataModule, split: str) -> list[dict[str, Any]]:
    samples = module.samples(split)
    return [samples[index][1] for index in range(len(samples))]


def epoch(module: ShapesQuestionsDataModule, number: int = 0, count: int | None = None) -> list[tuple[int, Any]]:
    """Index and conversation of each sample of an epoch, in its order."""
    loader = module.train_dataloader()
    loader.sampler.set_epoch(number)
    found = []
    for batch, (_, said) in enumerate(loader):
        found += zip(loader.sampler.batch_indices(batch), said, strict=True)
    return found[:count]


# An evaluator of its own: words to objects, and objects to answers.

NAMES, TINTS = list(SHAPES), list(COLORS)
NUMBERS = ["zero", "one", "two", "three", "four"]
WHERE = {0: ("top", "left"), 1: ("top", "right"), 2: ("bottom", "left"), 3: ("bottom", "right")}


def seen(scene: list[list[int]]) -> list[dict[str, str]]:
    """A scene's objects in words."""
    return [
        {"shape": NAMES[s], "color": TINTS[c], "size": ("small", "large")[m], "row": WHERE[p][0], "column": WHERE[p][1]}
        for s, c, m, p in scene
    ]


def only(objects: list[dict[str, str]], **has: str) -> dict[str, str]:
    """The one object that has all of this; it is wrong to speak of "the" circle where there is another number."""
    (found,) = having(objects, **has)
    return found


def having(objects: list[dict[str, str]], **has: str) -> list[dict[str, str]]:
    return [each for each in objects if has.items() <= each.items()]


def singular(word: str) -> str:
    return next((name for name in SHAPES if word in (f"{name}s", f"{name}es")), word)


def answer(question: str, objects: list[dict[str, str]]) -> str:
    """The true answer, found in the scene by the words of the question alone."""

    def yes(true: bool) -> str:
        return "yes" if true else "no"

    if match := re.fullmatch(r"what (color|shape) is the object at the (top|bottom) (left|right)\?", question):
        return only(objects, row=match[2], column=match[3])[match[1]]
    if match := re.fullmatch(r"what color is the (\w+)\?", question):
        return only(objects, shape=match[1])["color"]
    if match := re.fullmatch(r"what shape is the (\w+) object\?", question):
        return only(objects, color=match[1])["shape"]
    if question == "how many objects are there?":
        return NUMBERS[len(objects)]
    if match := re.fullmatch(r"how many (\w+) objects are there\?", question):
        return NUMBERS[len(having(objects, color=match[1]))]
    if match := re.fullmatch(r"how many (\w+) are there\?", question):
        return NUMBERS[len(having(objects, shape=singular(match[1])))]
    if match := re.fullmatch(r"is there a (\w+) (\w+)\?", question):
        return yes(bool(having(objects, color=match[1], shape=match[2])))
    if match := re.fullmatch(r"are there more (\w+) than (\w+)\?", question):
        more, less = (len(having(objects, shape=singular(word))) for word in match.groups())
        assert more != less
        return yes(more > less)
    if match := re.fullmatch(r"is the (\w+) larger than the (\w+)\?", question):
        sizes = [only(objects, shape=word)["size"] for word in match.groups()]
        assert len({*sizes}) == 2
        return yes(sizes == ["large", "small"])
    if match := re.fullmatch(r"is the (\w+) (left of|right of|above|below) the (\w+)\?", question):
        a, b = only(objects, shape=match[1]), only(objects, shape=match[3])
        along = "column" if " of" in match[2] else "row"
        assert a[along] != b[along]
        return yes(a[along] == {"left of": "left", "right of": "right", "above": "top", "below": "bottom"}[match[2]])
    assert question == "describe the image."
    order = [(row, column) for row in ("top", "bottom") for column in ("left", "right")]
    told = sorted(objects, key=lambda each: order.index((each["row"], each["column"])))
    return " and ".join("a {size} {color} {shape} at the {row} {column}".format(**each) for each in told)


KIND_OF = {
    "what color": "color",
    "what shape": "shape",
    "how many": "count",
    "is there": "existence",
    "are there": "comparison",
    "describe the": "caption",
    "which image": "images",
}


def kind_of(question: str) -> str:
    if question.startswith("is the "):
        return "comparison" if "larger" in question else "relation"
    return KIND_OF[" ".join(question.split()[:2])]


def asked(entry: dict[str, Any]) -> tuple[str, str]:
    ((prompt, said),) = entry["turns"]
    return prompt.replace("<image> ", ""), said


def check(entry: dict[str, Any], scene: list[list[int]]) -> None:
    question, said = asked(entry)
    assert said == answer(question, seen(scene)), (question, seen(scene))
    assert entry["kind"] == kind_of(question)
    assert entry["turns"][0][0] == f"<image> {question}"
    assert (entry["kind"] == "caption") == ("choices" not in entry)
    assert said in entry.get("choices", [said])


# The answers.


def test_every_answer_of_evaluation_is_true_of_what_its_image_shows(usual):
    for split in ("val", "test"):
        found, shown = entries(usual, split), scenes_of(usual, split)
        assert len(found) == len(shown) == 2 * FEW[f"{split}_size"]
        for entry, scene in zip(found, shown, strict=True):
            check(entry, scene)
        assert {entry["kind"] for entry in found} == {*KINDS}


@pytest.mark.parametrize("number", [0, 3])
def test_every_answer_of_training_is_true_of_what_its_image_shows(usual, number):
    shown = scenes_of(usual, "train")
    found = epoch(usual, number)
    assert len(found) == 416
    for index, entry in found:
        check(entry, shown[index])
        assert entry["name"] == f"shapes/train/{index}"
        assert "subset" not in entry


@pytest.mark.parametrize("kind", KINDS)
def test_every_question_that_can_be_asked_is_answered_truly(usual, kind):
    unseen = {*pairs("hard", 1)}
    for scene in [*scenes_of(usual, "test")[::3], *scenes_of(usual, "train")[::9]]:
        for question in KINDS[kind](scene, unseen):
            assert question.answer == answer(question.prompt, seen(scene))
            assert question.cell.endswith(question.answer) or kind in ("count", "caption")


def test_a_scene_has_its_number_of_objects_each_in_a_place_of_its_own(usual):
    counts = Counter(map(len, scenes_of(usual, "train")))
    assert {*counts} == {1, 2, 3, 4}
    assert min(counts.values()) > 40
    for scene in scenes_of(usual, "test"):
        assert len({each[3] for each in scene}) == len(scene)
    assert {*map(len, scenes_of(data(objects=(2, 3)), "train"))} == {2, 3}


# Pixels.


def test_an_image_shows_each_object_in_its_place_and_colour(usual):
    samples, shown = usual.samples("test"), scenes_of(usual, "test")
    right = []
    missing = torch.nn.functional.normalize(1 - torch.tensor(list(COLORS.values())))
    for index in range(0, len(shown), 5):
        pixels = samples.images[index].float() / 255
        for _, color, size, place in shown[index]:
            x, y = (int(value) for value in list(PLACES.values())[place])
            reach = 3 if size == 0 else 5
            near = pixels[:, y - reach : y + reach + 1, x - reach : x + reach + 1].flatten(1)
            strongest = near[:, (near.max(0).values - near.min(0).values).topk(6).indices].mean(1)
            found = (torch.nn.functional.normalize(1 - strongest, dim=0) @ missing.T).argmax()
            right.append(int(found) == color)
        for place in {*range(4)} - {each[3] for each in shown[index]}:
            x, y = (int(value) for value in list(PLACES.values())[place])
            assert pixels[:, y, x].max() - pixels[:, y, x].min() < 0.45  # grey, with its grain
    assert np.mean(right) > 0.93


def test_scenes_of_several_numbers_are_drawn_as_each_alone(usual):
    shown = scenes_of(usual, "test")[:40]
    numbers = torch.arange(7, 47)
    images = render_each(shown, 3, numbers)
    for index, scene in enumerate(shown):
        alone = render(torch.tensor([scene]), 3, numbers[index : index + 1], moved=1.5)
        assert torch.equal(images[index], alone[0])
    assert render_each([], 3, numbers[:0]).shape == (0, 3, 32, 32)


def test_images_are_functions_of_their_number_and_the_seed(usual):
    samples = usual.samples("test")
    again = data(seed=8, train_size=0, val_size=0)
    assert torch.equal(samples.images, again.samples("test").images)
    assert entries(usual, "test") == entries(again, "test")
    assert not torch.equal(samples.images, data(images_seed=1, train_size=0).samples("test").images)
    fewer, more = (data(train_size=size).samples("train").images for size in (40, 60))
    assert torch.equal(fewer, more[:40])
    assert not torch.equal(usual.samples("val").images[:30], samples.images[:30])
    shares = data(shares={"count": 9.0}, train_size=20)
    assert torch.equal(shares.samples("test").images, samples.images)  # of training alone


# What questions alone say.


def share(values: Any, of: Any) -> float:
    values = list(values)
    return values.count(of) / len(values)


def test_kinds_and_answers_come_in_their_shares_in_evaluation(usual):
    for subset in (0, 1):
        found = [entry for entry in entries(usual, "test") if entry["subset"] == subset]
        counts = Counter(entry["kind"] for entry in found)
        assert {*counts} == {*KINDS}
        assert max(counts.values()) - min(counts.values()) <= 4
        for kind in ("relation", "comparison", "existence"):
            said = [asked(entry)[1] for entry in found if entry["kind"] == kind]
            assert share(said, "yes") == pytest.approx(0.5, abs=0.04)
        for kind in ("color", "shape"):
            said = Counter(asked(entry)[1] for entry in found if entry["kind"] == kind)
            assert len(said) == 6
            assert max(said.values()) <= 8  # of 30
        said = Counter(asked(entry)[1] for entry in found if entry["kind"] == "count")
        assert {*said} == {*NUMBERS}
        assert max(said.values()) <= 9


@pytest.fixture(scope="module")
def many() -> list[tuple[int, Any]]:
    """Five epochs of training."""
    module = data()
    return [each for number in range(5) for each in epoch(module, number)]


def test_kinds_and_answers_come_in_their_shares_in_training(many):
    by_kind: dict[str, list[str]] = {}
    for _, entry in many:
        by_kind.setdefault(entry["kind"], []).append(asked(entry)[1])
    for kind, said in by_kind.items():
        assert len(said) / len(many) == pytest.approx(1 / 7, abs=0.03)
        if kind in ("relation", "comparison", "existence"):
            assert share(said, "yes") == pytest.approx(0.5, abs=0.1)
        elif kind != "caption":
            assert max(Counter(said).values()) / len(said) < 0.32


def test_half_of_the_answers_no_are_to_pairs_whose_parts_are_both_there(usual, many):
    shown = scenes_of(usual, "train")
    hard = []
    for index, entry in many:
        question, said = asked(entry)
        if entry["kind"] == "existence" and said == "no":
            tint, name = re.findall(r"(\w+) (\w+)\?", question)[0]
            hard.append(bool(having(seen(shown[index]), color=tint)) and bool(having(seen(shown[index]), shape=name)))
    assert np.mean(hard) == pytest.approx(0.5, abs=0.15)


def test_what_sees_nothing_is_told_by_kind_and_by_text(usual):
    for subset in (0, 1, None):
        priors = usual.priors(subset)
        assert {*priors} == {*KINDS}
        for kind in ("relation", "comparison", "existence"):
            assert priors[kind]["constant"] == pytest.approx(0.5, abs=0.03)
            assert priors[kind]["text"] == pytest.approx(0.5, abs=0.25)
        assert priors["color"]["constant"] < 0.3
    found = [asked(entry) for entry in entries(usual, "test") if entry["kind"] == "color" and entry["subset"] == 0]
    assert usual.priors(0)["color"]["constant"] == Counter(said for _, said in found).most_common(1)[0][1] / len(found)
    # A shape of an unseen pair never has that colour in training, by which alone it would be found out; a place may.
    found = [asked(entry) for entry in entries(usual, "test") if entry["kind"] == "color" and entry["subset"] == 1]
    by_place = Counter((prompt, said) for prompt, said in found if "object at the" in prompt)
    most = {prompt: max(n for (other, _), n in by_place.items() if other == prompt) for prompt, _ in by_place}
    assert 0 < by_place.total() < len(found)
    assert usual.priors(1)["color"]["text"] <= sum(most.values()) / len(found)


def test_of_a_text_in_training_no_answer_is_much_likelier_than_others():
    module = data(train_size=1200, held_out="none", val_size=0, test_size=0)
    (asker,) = module._asked("train")
    answers: dict[tuple[str, str], Counter[str]] = {}
    for index, row in enumerate(asker.chances.tolist()):
        for (kind, cell), chance in zip(asker.sorts, row, strict=True):
            some = asker.cells_of(index, kind)[cell] if chance else []
            for question in some:
                answers.setdefault((kind, question.prompt), Counter())[question.answer] += chance / len(some)
    expected = {"color": 1 / 6, "shape": 1 / 6, "count": 1 / 5, "relation": 0.5, "comparison": 0.5, "existence": 0.5}
    for kind, chance in expected.items():
        of_kind = [each for (other, _), each in answers.items() if other == kind]
        best = sum(max(each.values()) for each in of_kind) / sum(sum(each.values()) for each in of_kind)
        assert chance <= best < chance + 0.08, kind


def test_a_text_says_as_much_as_is_told_of_it():
    """One scene in which no answer is open: what a text says in training is all that there is to know."""
    module = data(kinds=["count"], objects=(4, 4), held_out="none", test_size=90)
    texts = [asked(entry) for entry in entries(module, "test")]
    prior = module.priors()["count"]
    assert share([said for _, said in texts], "four") <= prior["constant"]
    assert all(said == "four" for question, said in texts if question == "how many objects are there?")
    likeliest = module._likeliest()
    assert likeliest["how many objects are there?"] == "four"
    assert prior["text"] == np.mean([likeliest[question] == said for question, said in texts])
    with pytest.raises(ValueError, match="test_size is 0: expected test images, for which priors are"):
        data(test_size=0).priors()


def test_weights_give_every_sort_its_share_where_samples_let_them():
    rng = np.random.default_rng(0)
    allowed = rng.random((400, 6)) < [0.9, 0.5, 0.3, 0.9, 0.2, 0.9]
    allowed[:, 0] |= ~allowed.any(1)
    targets, groups = np.array([0.2, 0.2, 0.1, 0.2, 0.1, 0.2]), np.array([0, 0, 1, 1, 2, 2])
    weights = fit_weights(allowed, targets, groups)
    assert drawn_shares(allowed, weights) == pytest.approx(targets, abs=1e-4)
    sorts = dealt(chances(allowed, weights))
    assert all(allowed[row, sort] for row, sort in enumerate(sorts))
    for end in (100, 250, 400):
        expected = chances(allowed, weights)[:end].sum(0)
        assert np.abs(np.bincount(sorts[:end], minlength=6) - expected).max() < 4
    allowed[:, 4] = False  # a sort that never is: the other of its group takes its share
    found = drawn_shares(allowed, fit_weights(allowed, targets, groups))
    assert found == pytest.approx([0.2, 0.2, 0.1, 0.2, 0, 0.3], abs=1e-4)
    allowed[:390, 2] = False  # of one that is too rare all there is, and its group still has its share
    found = drawn_shares(allowed, fit_weights(allowed, targets, groups))
    assert found[2] == pytest.approx(allowed[:, 2].mean(), abs=1e-3)
    assert found[2] + found[3] == pytest.approx(0.3, abs=1e-4)
    assert found[[0, 1, 5]] == pytest.approx([0.2, 0.2, 0.3], abs=0.02)


# Options.


def test_kinds_and_their_shares_are_as_asked_for():
    module = data(kinds=["relation", "color", "caption"], shares={"relation": 8.0, "caption": 0.0})
    counts = Counter(entry["kind"] for number in range(3) for _, entry in epoch(module, number))
    total = sum(counts.values())
    assert {*counts} == {"relation", "color"}
    assert counts["relation"] / total == pytest.approx(8 / 9, abs=0.04)
    tested = Counter(entry["kind"] for entry in entries(module, "test"))
    assert {*tested} == {"relation", "color", "caption"}
    assert max(tested.values()) - min(tested.values()) <= 4


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_may_be_asked_alone(kind):
    module = data(kinds=[kind], train_size=64, test_size=30, val_size=0)
    for index, entry in epoch(module):
        assert entry["kind"] == kind
        check(entry, scenes_of(module, "train")[index])
    assert {*module.priors()} == {kind}


def test_a_share_of_training_is_text_alone(two):
    found = [entry for number in range(3) for _, entry in epoch(two, number)]
    texts = [entry for entry in found if entry["images"] == 0]
    assert len(texts) / len(found) == pytest.approx(0.2, abs=0.04)
    for entry in texts:
        assert entry["kind"] == "text"
        question, said = asked(entry)
        a, way, b = re.fullmatch(r"what is (\w+) (plus|minus) (\w+)\?", question).groups()
        values = dict(zip(entry["choices"], range(9), strict=True))
        assert values[said] == (values[a] + values[b] if way == "plus" else values[a] - values[b])
        assert "<image>" not in entry["turns"][0][0]
    assert len({asked(entry)[0] for entry in texts}) > 30 <= len(sums())
    assert not [entry for entry in entries(two, "test") if entry["kind"] == "text"]


def test_two_images_are_compared(two):
    shown = scenes_of(two, "test")
    images = two.samples("test").images
    place = {image.numpy().tobytes(): index for index, image in enumerate(images)}
    assert len(place) == len(images)
    compared = Counter()
    for index, entry in enumerate(entries(two, "test")):
        if entry["kind"] == "images":
            pair, _ = two.samples("test")[index]
            of = [place[image.numpy().tobytes()] for image in pair]
            assert index in of
            first, second = (len(shown[each]) for each in of)
            assert entry["turns"][0][0] == ("<image> <image> which image has more objects, the first or the second?")
            assert asked(entry)[1] == ("first" if first > second else "second")
            assert first != second
            assert len({each // FEW["test_size"] for each in of}) == 1  # of the same subset
            compared[asked(entry)[1]] += 1
    assert compared["first"] + compared["second"] == pytest.approx(420 / 8, abs=3)
    assert abs(compared["first"] - compared["second"]) <= 3
    found = {entry["kind"]: entry["images"] for _, entry in epoch(two)}
    assert found == dict.fromkeys(KINDS, 1) | {"images": 2, "text": 0}


def test_shuffled_answers_are_those_of_other_scenes():
    kept, control = (data(shuffled=shuffled, kinds=["count", "existence"]) for shuffled in (False, True))
    assert torch.equal(kept.samples("train").images, control.samples("train").images)
    shown = scenes_of(control, "train")
    true = [asked(entry)[1] == answer(asked(entry)[0], seen(shown[index])) for index, entry in epoch(control)]
    assert 0.2 < np.mean(true) < 0.65  # as often as by chance
    assert all(asked(entry)[1] == answer(asked(entry)[0], seen(shown[index])) for index, entry in epoch(kept))
    for split in ("val", "test"):
        assert entries(kept, split) == entries(control, split)


# What is held out.


@pytest.mark.parametrize(("held_out", "count"), [("hard", 12), ("easy", 6), ("none", 0)])
def test_pairs_held_out_are_neither_shown_nor_asked_about_in_training(held_out, count):
    module = data(held_out=held_out, val_size=0, test_size=60)
    unseen = {*pairs(held_out, 1)}
    assert len(unseen) == count
    shown = {(s, c) for scene in scenes_of(module, "train") for s, c, *_ in scene}
    assert not shown & unseen
    assert {s for s, _ in shown} == {c for _, c in shown} == {*range(6)}
    words = {f"{TINTS[c]} {NAMES[s]}" for s, c in unseen}
    said = " ".join(text for _, entry in epoch(module) for pair in entry["turns"] for text in pair)
    pattern = "|".join(words) or "$."
    assert not re.findall(pattern, said)
    assert not re.findall(pattern, " ".join(module.captions()))
    assert tuple(module.subsets) == (("seen", "unseen") if count else ("seen",))
    found = entries(module, "test")
    assert Counter(entry["subset"] for entry in found) == dict.fromkeys(range(len(module.subsets)), 60)
    for entry, scene in zip(found, scenes_of(module, "test"), strict=True):
        strange = [each for each in scene if (each[0], each[1]) in unseen]
        assert bool(strange) == entry["subset"]
        if strange:
            about(entry, seen(scene), seen(strange), words)


def about(entry: dict[str, Any], scene: list[Any], strange: list[dict[str, str]], words: set[str]) -> None:
    """Checks that a question about an image with an unseen pair is about it, where its kind lets it."""
    question, said = asked(entry)
    shapes, colors = {each["shape"] for each in strange}, {each["color"] for each in strange}
    if place := re.search(r"object at the (\w+) (\w+)\?", question):
        assert having(strange, row=place[1], column=place[2])
        return
    mentioned = {singular(word.strip("?")) for word in question.split()}
    if entry["kind"] in ("color", "relation", "comparison"):
        assert mentioned & shapes
    elif entry["kind"] == "shape":
        assert mentioned & colors
    elif entry["kind"] == "existence":
        assert {*re.findall(r"a (\w+ \w+)\?", question)} <= words
    elif entry["kind"] == "count" and said != "zero" and question != "how many objects are there?":
        assert mentioned & (shapes | colors)


# The loader.


def batches(module: ShapesQuestionsDataModule, rank: int = 0, world_size: int = 1, number: int = 0) -> list[Any]:
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank, world_size=world_size, num_devices=1, ckpt_path=None, overfit_batches=0, training=True
    )
    loader = module.train_dataloader()
    loader.sampler.set_epoch(number)
    return list(loader)


def same(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) and said == told for (a, said), (b, told) in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("options", [{}, {"images_per_sample": 2, "text_share": 0.3}], ids=["plain", "any number"])
def test_workers_seeds_and_epochs(options):
    small = {"train_size": 64, "val_size": 0, "test_size": 0, **options}
    alone = batches(data(**small))
    assert same(alone, batches(data(**small)))
    assert same(alone, batches(data(num_workers=2, **small)))
    assert not same(alone, batches(data(**small), number=1))
    assert not same(alone, batches(data(seed=1, **small)))
    parts = [batches(data(**small | {"batch_size": 8}), rank, 2) for rank in (0, 1)]
    for (_, whole), *halves in zip(alone, *parts, strict=True):
        assert sorted(map(str, whole)) == sorted(str(entry) for _, half in halves for entry in half)


def test_questions_about_an_image_change_from_epoch_to_epoch(usual):
    drawn: dict[int, set[str]] = {}
    for number in range(5):
        for index, entry in epoch(usual, number):
            drawn.setdefault(index, set()).add(asked(entry)[0])
    assert np.mean([len(questions) for questions in drawn.values()]) > 3.5


def test_an_epoch_goes_on_where_it_ended():
    module = data(train_size=160, text_share=0.1)
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=0, world_size=1, num_devices=1, ckpt_path="some.ckpt", overfit_batches=0
    )
    whole = list(module.train_dataloader())
    module._position = module.train_dataloader().sampler.position(0, 4)
    assert same(list(module.train_dataloader()), whole[4:])


def test_a_batch_is_read_and_normalised(usual):
    images, said = next(iter(usual.val_dataloader()))
    assert (images.shape, images.dtype) == ((14, 3, 32, 32), torch.uint8)
    found = read(usual.on_after_batch_transfer((images, said), 0))
    torch.testing.assert_close(found.images, (images / 255 - 0.3) / 0.21)
    assert found.kinds == [entry["kind"] for entry in said]
    assert found.names[:2] == ["shapes/val/0", "shapes/val/1"]
    assert found.subsets == [0] * 14
    assert found.counts == [1] * 14
    pixels = usual.samples("train").images / 255
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx(usual.mean, abs=0.02)
    assert pixels.std((0, 2, 3)).tolist() == pytest.approx(usual.std, abs=0.02)


def test_batches_of_any_number_of_images_are_read(two):
    for batch in two.train_dataloader():
        images, said = two.on_after_batch_transfer(batch, 0)
        assert len(images) == sum(read((images, said)).counts)


def test_all_words_of_training_are_there_for_fitting(two):
    words = {word for text in two.captions() for word in re.findall(r"[\w.?]+", text)}
    spoken = {
        text for number in range(3) for _, entry in epoch(two, number) for pair in entry["turns"] for text in pair
    }
    spoken |= {text for entry in entries(two, "test") for pair in entry["turns"] for text in pair}
    assert {word for text in spoken for word in re.findall(r"[\w.?]+", text.replace("<image>", ""))} <= words
    assert not [text for text in two.captions() if "<image>" in text]
    texts = {text.replace("<image> ", "") for _, entry in epoch(two) for text in asked(entry)[:1]}
    assert texts <= {*two.captions()}
    assert len({*two.captions()}) == len(two.captions()) > 400


def test_it_is_what_modules_ask_for(usual):
    for protocol in (HasCaptions, HasImageShape, HasSubsets, StatesPreprocessing):
        assert isinstance(usual, protocol)
    assert usual.image_shape == (3, 32, 32)
    assert usual.sample_count() == 420


def test_images_of_ones_own_come_for_prediction(tmp_path):
    Image.new("RGB", (50, 40), (200, 30, 40)).save(tmp_path / "red.png")
    module = data(predict_root=str(tmp_path))
    (batch,) = module.predict_dataloader()
    stated = create(module.preprocessing())
    made = stated.to_float(stated.collate([stated.read(tmp_path / "red.png")]))
    torch.testing.assert_close(module.on_after_batch_transfer(batch, 0), made)
    assert data(val_size=0).val_dataloader() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": "some"}, "unknown held_out 'some': expected one of hard, easy, none"),
        ({"objects": (0, 4)}, "objects is (0, 4): expected the fewest and the most, 1 <= low <= high <= 4"),
        ({"objects": (1, 5)}, "objects is (1, 5): expected"),
        ({"images_per_sample": 3}, "images_per_sample is 3: expected 1 or 2"),
        (
            {"images_per_sample": 2, "objects": (2, 2)},
            "images_per_sample is 2 with objects (2, 2): expected scenes that",
        ),
        ({"kinds": ["colour"]}, "unknown kinds colour: expected some of color, shape, count, relation"),
        (
            {"kinds": ["images"]},
            "unknown kinds images: expected some of color, shape, count, relation, comparison, exist",
        ),
        ({"kinds": []}, "kinds is []: expected at least one, and none twice"),
        ({"kinds": ["color", "color"]}, "kinds is ['color', 'color']: expected at least one, and none twice"),
        (
            {"kinds": ["relation"], "objects": (1, 1)},
            "kinds has relation with scenes of one object: expected objects of",
        ),
        ({"kinds": ["color"], "shares": {"shape": 1}}, "shares has 'shape': expected some of the kinds, color"),
        ({"shares": {"shape": -1}}, "shares has -1 for shape: expected a weight of 0 or more"),
        (
            {"kinds": ["color"], "shares": {"color": 0}},
            "shares are all 0: expected a weight above 0 for a kind at least",
        ),
        ({"text_share": 1.0}, "text_share is 1.0: expected a share in [0, 1)"),
        ({"image_size": 0}, "image_size is 0: expected at least 1"),
        ({"test_size": -1}, "test_size is -1: expected 0 to "),
        ({"images_seed": -1}, "images_seed is -1: expected 0 or more"),
        ({"hflip": 0.5}, "hflip is 0.5: expected 0, since caption says left and right"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        data(**options)


def test_two_images_that_cannot_differ_are_said():
    with pytest.raises(
        ValueError, match="^kinds are images, and of 1 images there is one of which none can be asked: "
    ):
        data(images_per_sample=2, kinds=["images"], train_size=1).samples("train")


def test_questions_that_do_not_say_left_and_right_may_be_flipped():
    assert data(kinds=["color", "count"], hflip=0.5).hflip == 0.5
    assert "relation" not in data(objects=(1, 1)).kinds


def test_scenes_in_words_say_what_the_images_show_in_an_order_of_chance():
    few = {"train_size": 40, "val_size": 20, "test_size": 0}
    shown, told = ShapesQuestionsDataModule(**few), ShapesQuestionsDataModule(**few, in_words=True)
    for split, count in (("train", 40), ("val", 20)):
        scenes = told.samples(split).askers[0].scenes
        for index in range(count):
            images, said = told.samples(split)[index]
            assert len(images) == 0
            words, _, asked = said["turns"][0][0].partition(". ")
            assert sorted(words.split(" and ")) == sorted(map(phrase, scenes[index]))
            if split == "val":  # where questions are fixed
                assert [f"<image> {asked}", said["turns"][0][1]] == shown.samples(split)[index][1]["turns"][0]
    scenes = told.samples("train").askers[0].scenes
    index = next(index for index, scene in enumerate(scenes) if len(scene) == 3)
    orders = {told.samples("train")[index][1]["turns"][0][0].partition(". ")[0] for _ in range(60)}
    assert len(orders) == 6
    assert {"top", "left"} <= {word for text in told.captions() for word in text.split()}


def test_several_questions_about_a_training_image_are_different_and_of_it_alone():
    module = ShapesQuestionsDataModule(train_size=60, val_size=4, test_size=0, turns=4, text_share=0.1)
    samples = module.samples("train")
    counts: Counter[int] = Counter()
    for index in range(60):
        turns = samples[index][1]["turns"]  # drawn anew each time
        counts[len(turns)] += 1
        prompts = [prompt.removeprefix("<image> ") for prompt, _ in turns]
        assert len({*prompts}) == len(prompts)
        if len(turns) > 1:
            assert [prompt.count("<image>") for prompt, _ in turns] == [1] + [0] * (len(turns) - 1)
        scene = samples.askers[0].scenes[index]
        possible = {(q.prompt, q.answer) for kind in KINDS.values() for q in kind(scene, samples.askers[0].unseen)}
        if len(turns) > 1:
            assert {(prompt.removeprefix("<image> "), answer) for prompt, answer in turns} <= possible
    assert counts[4] > 20
    assert all(len(module.samples("val")[index][1]["turns"]) == 1 for index in range(8))
    with pytest.raises(ValueError, match="turns is 0: expected at least 1"):
        ShapesQuestionsDataModule(turns=0)
