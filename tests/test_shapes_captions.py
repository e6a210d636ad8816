"""Shapes with captions: a picture shows what its caption says, what is held out is held out, and the control is one."""

import math
import re
from collections import Counter
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_shapes import inside_polygon
from torch.utils.data import DataLoader

from datamodules import ShapesCaptionsDataModule
from datamodules.preprocessing import create
from datamodules.reading.colored_scenes import COLORS, PLACES, SHAPES, SIZES, render
from datamodules.shapes_captions import WORDS, captions_of, pairs, scenes

FEW = {"train_size": 400, "val_size": 24, "test_size": 24, "batch_size": 16}


def data(**options) -> ShapesCaptionsDataModule:
    return ShapesCaptionsDataModule(**FEW | options)


@pytest.fixture(scope="module")
def usual() -> ShapesCaptionsDataModule:
    return data()


@pytest.fixture(scope="module")
def two() -> ShapesCaptionsDataModule:
    return data(objects=2)


def told(samples) -> list[dict]:
    return [samples[index][1] for index in range(len(samples))]


def all_scenes(objects: int = 1) -> torch.Tensor:
    return scenes("none", objects, 0)


# The pictures.

AREAS = {
    "circle": math.pi,
    "square": 4 * 0.88**2,
    "triangle": 0.9 / 0.87 * 1.8,
    "cross": 4 * (2 * 0.32 - 0.32**2),
    "ring": math.pi * (1 - 0.5**2),
    "diamond": 2 * 1.15**2,
}
CORNERS = {
    "square": [(0.88, 0.88), (0.88, -0.88), (-0.88, -0.88), (-0.88, 0.88)],
    "triangle": [(0, -1), (0.9 / 0.87, 0.8), (-0.9 / 0.87, 0.8)],
    "cross": [
        *[(0.32, 1), (0.32, 0.32), (1, 0.32), (1, -0.32), (0.32, -0.32), (0.32, -1)],
        *[(-0.32, -1), (-0.32, -0.32), (-1, -0.32), (-1, 0.32), (-0.32, 0.32), (-0.32, 1)],
    ],
    "diamond": [(0, 1.15), (1.15, 0), (0, -1.15), (-1.15, 0)],
}


@pytest.mark.parametrize("name", SHAPES)
def test_an_outline_is_that_of_its_name(name):
    step = 0.01
    u, v = np.meshgrid(*[np.arange(-1.5, 1.5, step) + step / 2] * 2)
    distance = SHAPES[name](torch.from_numpy(u), torch.from_numpy(v)).numpy()
    if name in CORNERS:
        expected = inside_polygon(np.array(CORNERS[name], dtype=float), u, v)
    else:
        expected = (np.hypot(u, v) < 1) & (np.hypot(u, v) > (0.5 if name == "ring" else -1))
    clear = np.abs(distance) > 1e-9
    assert np.array_equal(distance[clear] < 0, expected[clear])
    assert (distance < 0).sum() * step**2 == pytest.approx(AREAS[name], abs=0.02)
    slopes = np.hypot(*np.gradient(distance, step))[1:-1, 1:-1]
    assert slopes.max() < 1.02  # never more than the distance, by which edges are smoothed


def looked_at(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Colour (N,), place (N,) and area in pixels (N,) of the only object of images (N, 3, 32, 32), on a grey ground."""
    images = images.float() / 255
    raised = images - images.flatten(2).median(2).values[:, :, None, None]  # most of an image is ground
    strongest = raised.square().sum(1).flatten(1).topk(12).indices
    color = raised.flatten(2).take_along_dim(strongest[:, None], 2).mean(2)
    covered = (raised * color[:, :, None, None]).sum(1) / color.square().sum(1)[:, None, None]
    inside, whole = covered > 0.5, covered > 0.85
    count = inside.sum((1, 2))
    means = (images * whole[:, None]).sum((2, 3)) / whole.sum((1, 2))[:, None]
    missing = 1 - torch.tensor(list(COLORS.values()))  # of white, of which a pale colour has more
    color = (F.normalize(1 - means) @ F.normalize(missing).T).argmax(1)
    y, x = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(32) + 0.5, indexing="ij")
    center = torch.stack([(axis * inside).sum((1, 2)) / count for axis in (x, y)], dim=1)
    place = torch.cdist(center, torch.tensor(list(PLACES.values()))).argmin(1)
    return color, place, count


def test_every_composition_shows_its_colour_place_and_size():
    every = all_scenes()
    assert len({*map(tuple, every[:, 0].tolist())}) == len(every) == 6 * 6 * 2 * 4
    for seed in (0, 1):
        shape, color, size, place = every[:, 0].T
        found_color, found_place, area = looked_at(render(every, seed, torch.arange(len(every))))
        assert torch.equal(found_color, color)
        assert torch.equal(found_place, place)
        radius = (area / torch.tensor([AREAS[name] for name in SHAPES])[shape]).sqrt()
        assert torch.equal((radius > 4.4).long(), size)
        exact = torch.tensor(list(SIZES.values()))[size]
        assert (radius / exact - 1).abs().max() < 0.15 + 0.1  # as they are scaled, and for pixels
        assert (radius / exact).mean() == pytest.approx(1, abs=0.02)


def test_pixels_are_a_function_of_scene_seed_and_number(usual):
    every = all_scenes(2)[::5000]
    numbers = torch.arange(40, 40 + len(every))
    images = render(every, 3, numbers)
    alone = torch.cat([render(every[i : i + 1], 3, numbers[i : i + 1]) for i in range(len(every))])
    assert torch.equal(images, alone)
    assert not torch.equal(images, render(every, 4, numbers))
    assert len(torch.unique(render(every[:1].expand(9, -1, -1), 3, torch.arange(9)), dim=0)) == 9
    samples = usual.samples("train")
    assert torch.equal(samples.images[:50], data(train_size=50, seed=8).samples("train").images)
    assert torch.equal(samples.told[:50], data(train_size=50, seed=8).samples("train").told)
    assert not torch.equal(samples.images, data(images_seed=1).samples("train").images)
    assert not torch.equal(samples.images[:24], usual.samples("val").images[:24])
    assert not torch.equal(usual.samples("test").images, usual.samples("val").images)


def test_a_larger_image_shows_the_same_scene():
    every = all_scenes()[::7]
    small, large = (render(every, 0, torch.arange(len(every)), size).float() / 255 for size in (32, 64))
    difference = torch.nn.functional.avg_pool2d(large, 2) - small
    assert difference.mean((1, 2, 3)).abs().max() < 0.01
    assert difference.abs().mean() < 0.07  # the background's noise is another


# What is held out.


@pytest.mark.parametrize(("held_out", "count"), [("hard", 12), ("easy", 6), ("none", 0)])
@pytest.mark.parametrize("objects", [1, 2])
def test_pairs_held_out_never_come_in_training_and_all_parts_of_them_do(held_out, count, objects):
    module = data(held_out=held_out, objects=objects, train_size=800)
    unseen = {*pairs(held_out, 1)}
    assert len(unseen) == count
    assert len({*pairs(held_out, 0), *unseen}) == len(pairs(held_out, 0)) + count == 36
    shown = {tuple(each[:2]) for scene in module.samples("train").told.tolist() for each in scene}
    assert not shown & unseen
    assert {s for s, _ in shown} == {c for _, c in shown} == {*range(6)}
    words = {" ".join((WORDS["color"][c], WORDS["shape"][s])) for s, c in unseen}
    assert not words & {*re.findall("|".join(words) or "$", " ".join(module.captions()))}
    assert module.subsets == (("seen", "unseen") if count else ("seen",))
    for split, size in (("val", 24), ("test", 24)):
        found = told(module.samples(split))
        assert Counter(entry["subset"] for entry in found) == dict.fromkeys(range(len(module.subsets)), size)
        for entry, scene in zip(found, module.samples(split).told.tolist(), strict=True):
            assert entry["subset"] == any(tuple(each[:2]) in unseen for each in scene)


def test_scenes_of_a_subset_come_equally_often():
    module = data(train_size=24 * 8 * 2, test_size=12 * 8, val_size=24 * 8)
    counts = Counter(map(str, module.samples("train").told.tolist()))
    assert len(counts) == 192
    assert {*counts.values()} == {2}
    of_unseen = Counter(entry["label"] for entry in told(module.samples("test")) if entry["subset"] == 1)
    assert len(of_unseen) == 12
    assert {*of_unseen.values()} == {8}
    assert module.class_counts() == [0 if count == 0 else 16 for count in module.class_counts()]
    assert sum(module.class_counts()) == 384
    order = [entry["label"] for entry in told(module.samples("val"))[:24]]
    assert order != sorted(order)  # else a batch of evaluation would hold scenes alike
    apart = data(train_size=192 * 8).samples("train").labels[::192]
    assert len({*apart}) > 4  # so that pictures, which are chosen at even distances, are not of one scene


def test_two_objects_differ_in_shape_colour_and_place():
    for subset in (0, 1):
        first, second = scenes("hard", 2, subset).unbind(1)
        assert (first[:, [0, 1, 3]] != second[:, [0, 1, 3]]).all()
        assert len(torch.unique(scenes("hard", 2, subset), dim=0)) == len(first)


# What captions say.

KINDS = {word: kind for kind, words in WORDS.items() for phrase in words for word in phrase.split()}


def words_of(caption: str) -> set[str]:
    return {word for word in re.findall(r"\w+", caption) if word in KINDS}


def test_a_caption_is_true_of_an_image_exactly_when_facts_entail_its_claims():
    """By the words, of each caption of each scene, against every scene."""
    every = all_scenes().tolist()
    bit = {word: 1 << place for place, word in enumerate(KINDS)}
    spoken = [" ".join(words[value] for words, value in zip(WORDS.values(), scene[0], strict=True)) for scene in every]
    shown = np.array([sum(bit[word] for word in text.split()) for text in spoken])
    facts = torch.tensor([scene[0] for scene in every])
    known = {caption: claims for scene in every for caption, claims in captions_of(scene)}
    assert len(known) == 4 * 288 + 2 * 36
    for caption, claims in known.items():
        says = torch.tensor(claims)
        entailed = ((says == facts) | (says == -1)).all(1).numpy()
        said = sum(bit[word] for word in words_of(caption))
        assert np.array_equal(entailed, (said & shown) == said), caption
        assert entailed.sum() == math.prod(
            len(words) for words, claim in zip(WORDS.values(), claims, strict=True) if claim < 0
        )


def named_pairs(caption: str) -> set[str]:
    return {*re.findall(f"(?:{'|'.join(COLORS)}) (?:{'|'.join(SHAPES)})", caption)}


def test_captions_of_two_objects_claim_their_pairs_in_either_order():
    every = all_scenes(2)[::48].tolist()  # each two pairs once
    known = [entry for scene in every[::37] for entry in captions_of(scene)]
    assert {len(named_pairs(caption)) for caption, _ in known} == {2}
    for (a, claims), (b, others) in product(known, repeat=2):
        assert (claims == others) == (named_pairs(a) == named_pairs(b))
    assert {*map(len, (captions_of(scene) for scene in every))} == {8}
    assert len({caption for caption, _ in captions_of(every[0])}) == 8


def test_a_swapped_caption_has_the_same_words_and_is_false(two):
    for entry in told(two.samples("test")):
        (caption,), (swapped,) = entry["captions"], entry["swapped"]
        assert sorted(caption.split()) == sorted(swapped.split())
        assert not named_pairs(caption) & named_pairs(swapped)
        assert "label" not in entry
    assert "swapped" not in two.samples("train")[0][1]


def test_samples_say_what_is_drawn(usual):
    samples = usual.samples("test")
    color, place, _ = looked_at(samples.images)
    for index, entry in enumerate(told(samples)):
        (caption,) = entry["captions"]
        assert [entry["facts"]] == entry["claims"]
        assert usual.classes[entry["label"]] in caption
        assert caption.endswith(WORDS["place"][place[index]])
        assert f" {WORDS['color'][color[index]]} " in caption
    by_id = {}
    for entry in told(samples):
        assert by_id.setdefault(entry["image_id"], entry["captions"]) == entry["captions"]
    assert len(by_id) == len({entry["captions"][0] for entry in told(samples)})


def test_training_draws_one_of_all_captions_anew_in_each_epoch(usual):
    def epoch(number: int, **options) -> list[str]:
        loader = data(**options).train_dataloader()
        loader.sampler.set_epoch(number)
        return [caption for _, entries in loader for entry in entries for caption in entry["captions"]]

    first = epoch(0)
    assert len(first) == 400
    assert first == epoch(0)
    assert first != epoch(1)
    assert first != epoch(0, seed=1)
    assert {*first} <= {*usual.captions()}
    kinds = Counter(len(words_of(caption)) for caption in first)  # a place has two words
    for words, share in ((5, 2 / 3), (2, 1 / 3)):
        assert kinds[words] / len(first) == pytest.approx(share, abs=0.1)
    assert {"facts", "claims", "captions"} == usual.samples("train")[0][1].keys()
    assert {word for caption in usual.captions() for word in words_of(caption)} == KINDS.keys()


# The control.


@pytest.mark.parametrize("objects", [1, 2])
def test_shuffled_captions_say_nothing_of_their_images(objects):
    kept, control = (data(shuffled=shuffled, objects=objects, train_size=2400) for shuffled in (False, True))
    images, other = kept.samples("train"), control.samples("train")
    assert torch.equal(images.images, other.images)
    same = (images.told == other.told).float().mean((0, 1))
    chance = torch.tensor([1 / len(words) for words in WORDS.values()])
    assert (same - chance).abs().max() < 0.04
    assert len({*map(str, other.told.tolist())}) > 150
    of_first = (images.told == images.told[0]).all((1, 2))
    if objects == 1:  # not one scene for another, which could be learned as well
        assert len({*map(str, other.told[of_first].tolist())}) > 5
    for index in range(50):  # what is said is of one piece
        entry = other[index][1]
        assert (entry["captions"][0], entry["claims"][0]) in captions_of(other.told[index].tolist())
        assert all(claim in (-1, fact) for fact, claim in zip(entry["facts"], entry["claims"][0], strict=True))
    for split in ("val", "test"):
        assert torch.equal(kept.samples(split).images, control.samples(split).images)
        assert told(kept.samples(split)) == told(control.samples(split))


# Loaders.


def batches(module: ShapesCaptionsDataModule, rank: int = 0, world_size: int = 1, epoch: int = 0, **options) -> list:
    module = data(**options) if options else module
    module.trainer = SimpleNamespace(
        global_rank=rank, world_size=world_size, num_devices=1, ckpt_path=None, overfit_batches=0, training=True
    )
    loader = module.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def flat(found: list) -> list[tuple[bytes, str]]:
    return [
        (image.numpy().tobytes(), str(entry))
        for images, entries in found
        for image, entry in zip(images, entries, strict=True)
    ]


def test_workers_and_ranks_change_nothing(usual):
    alone = batches(usual, batch_size=16)
    assert alone[0][0].shape == (16, 3, 32, 32)
    assert alone[0][0].dtype == torch.uint8
    assert flat(batches(usual, num_workers=1)) == flat(alone)
    ranks = [batches(usual, rank, 2, batch_size=8) for rank in (0, 1)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert sorted(flat([whole])) == sorted(flat(parts))


def test_an_epoch_is_continued_where_it_ended(usual):
    module = data()
    module.trainer = SimpleNamespace(
        global_rank=0, world_size=1, num_devices=1, ckpt_path="some.ckpt", overfit_batches=0
    )
    whole = flat(list(module.train_dataloader()))
    module._position = module.train_dataloader().sampler.position(0, 5)
    assert flat(list(module.train_dataloader())) == whole[5 * 16 :]


def test_images_become_normalised_floats_and_captions_stay(usual):
    images, entries = next(iter(usual.val_dataloader()))
    changed, same = usual.on_after_batch_transfer((images, entries), 0)
    assert same == entries
    expected = (images / 255 - 0.25) / 0.15
    torch.testing.assert_close(changed, expected)
    pixels = usual.samples("train").images / 255
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx(usual.mean, abs=0.01)
    assert pixels.std((0, 2, 3)).tolist() == pytest.approx(usual.std, abs=0.01)


def test_images_of_ones_own_are_predicted(tmp_path):
    Image.new("RGB", (50, 40), (200, 30, 40)).save(tmp_path / "red.png")
    module = data(predict_root=str(tmp_path))
    (batch,) = module.predict_dataloader()
    assert batch.shape == (1, 3, 32, 32)
    stated = create(module.preprocessing())
    read = stated.to_float(stated.collate([stated.read(tmp_path / "red.png")]))
    torch.testing.assert_close(module.on_after_batch_transfer(batch, 0), read)
    images, entries = next(iter(data().predict_dataloader()))
    assert len(images) == len(entries) == 16


def test_a_split_may_be_empty():
    module = data(val_size=0)
    assert module.samples("val") is None
    assert module.val_dataloader() == []
    assert isinstance(module.test_dataloader(), DataLoader)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": "some"}, "unknown held_out 'some': expected one of hard, easy, none"),
        ({"objects": 3}, "objects is 3: expected 1 or 2"),
        ({"hflip": 0.5}, "hflip is 0.5: expected 0, since captions say left and right"),
        ({"image_size": 0}, "image_size is 0: expected at least 1"),
        ({"test_size": -1}, "test_size is -1: expected 0 to "),
        ({"images_seed": -1}, "images_seed is -1: expected 0 or more"),
    ],
)
def test_what_cannot_be_is_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        data(**options)


def test_two_objects_may_be_flipped():
    assert data(objects=2, hflip=0.5).hflip == 0.5
