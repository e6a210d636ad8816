"""Retrieval between images and texts: against the whole matrix in numpy, against answers worked by hand, in parts."""

import math
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.metrics.retrieval import CrossModalRecall

KS = (1, 5, 10)


def data(images: int = 40, captions: int = 5, width: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Images with several captions each in the order of nothing; some without, and captions of no image here."""
    generator = torch.Generator().manual_seed(seed)
    image_ids = 7 * torch.randperm(images, generator=generator) - 50
    owners = torch.arange(images - 3).repeat_interleave(captions)  # the last three have no caption
    owners = owners[torch.randperm(len(owners), generator=generator)]
    pixels = torch.randn(images, width, generator=generator)
    texts = pixels[owners] + 2.0 * torch.randn(len(owners), width, generator=generator)
    text_ids = image_ids[owners]
    text_ids[-4:] = 1000  # of an image that is not here
    subsets = torch.arange(images) % 3 - 1
    return {"images": pixels, "image_ids": image_ids, "texts": texts, "text_ids": text_ids, "subsets": subsets}


def with_keys(given: dict[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
    """The data with equal texts, those of one key."""
    firsts = [keys.tolist().index(key) for key in keys.tolist()]
    return given | {"texts": given["texts"][firsts], "text_keys": keys}


def reference(images, image_ids, texts, text_ids, subsets=None, text_keys=None) -> dict[str, float]:
    """All similarities at once, and one query after the other."""
    images, texts = (np.asarray(each.double()) for each in (images, texts))
    images, texts = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (images, texts))
    keys = list(range(len(texts))) if text_keys is None else text_keys.tolist()
    firsts = [keys.index(key) for key in dict.fromkeys(keys)]
    right = np.array(
        [
            [any(text_ids[j] == image_id for j in range(len(texts)) if keys[j] == keys[first]) for first in firsts]
            for image_id in image_ids
        ]
    )
    similar = images @ texts[firsts].T
    parts = {"": np.full(len(images), True)}
    for number in [] if subsets is None else sorted(set(subsets.tolist()) - {-1}):
        parts[f"_{number}"] = np.asarray(subsets == number)
    scores = {}
    for suffix, part in parts.items():
        of_part = right[part].any(0)  # the texts of these images
        for name, s, r, queries in (("i2t", similar, right, part), ("t2i", similar.T, right.T, of_part)):
            ranks = [
                1 + sum(s[q][~r[q]] >= s[q][r[q]].max() - 1e-9) for q in range(len(s)) if queries[q] and r[q].any()
            ]
            scores |= {f"{name}_r{k}{suffix}": np.mean(np.array(ranks) <= k) for k in KS}
            scores[f"{name}_rank{suffix}"] = np.median(ranks)
    return scores


def measured(given: dict[str, Tensor], sizes: tuple[int, ...] = (), **options) -> dict[str, float]:
    """The metric's results of data in one batch, or in batches of so many images and all texts of their ids."""
    metric = CrossModalRecall(KS, **options)
    if not sizes:
        metric.update(**given)
    for part in torch.arange(len(given["images"])).split(sizes) if sizes else ():
        metric.update(**batch_of(given, part))
    return {name: value.item() for name, value in metric.compute().items()}


def batch_of(given: dict[str, Tensor], part: Tensor) -> dict[str, Tensor]:
    """Some of the images, and the texts of their ids; with the first image also the texts of no image."""
    own = torch.isin(given["text_ids"], given["image_ids"][part])
    if 0 in part:
        own |= ~torch.isin(given["text_ids"], given["image_ids"])
    return {name: each[own if name.startswith("text") else part] for name, each in given.items()}


GIVEN = {
    "five captions an image": data(),
    "one caption an image": data(images=23, captions=1, seed=1),
    "images that share their captions": data(seed=2) | {"image_ids": torch.arange(40) // 4 * 7 - 50},
    "equal captions": with_keys(data(seed=3), torch.arange(185) % 31),
    "one image": {name: each[:1] for name, each in data(seed=4).items() if name != "texts"}
    | {"texts": torch.randn(3, 8), "text_ids": data(seed=4)["image_ids"][[0, 0, 1]]},
}


@pytest.mark.parametrize("name", GIVEN)
def test_it_is_what_the_whole_matrix_says(name):
    assert measured(GIVEN[name]) == pytest.approx(reference(**GIVEN[name]), rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("name", GIVEN)
def test_batches_and_chunks_change_nothing(name):
    whole = measured(GIVEN[name])
    count = len(GIVEN[name]["images"])
    for chunk in (1, 100, 1000):
        assert measured(GIVEN[name], chunk=chunk) == pytest.approx(whole, rel=1e-6, nan_ok=True)
    if count > 1:
        assert measured(GIVEN[name], (8, 0, count - 8)) == pytest.approx(whole, rel=1e-6, nan_ok=True)


def test_answers_worked_by_hand():
    """Two images at 0 and 90 degrees; captions at 10 and 80 degrees of the first, at 60 degrees of the second."""
    angles = torch.deg2rad(torch.tensor([0.0, 90.0, 10.0, 80.0, 60.0]))
    images, texts = torch.stack([angles.cos(), angles.sin()], 1).split([2, 3])
    metric = CrossModalRecall((1, 2), subsets=["seen", "unseen"])
    metric.update(images, torch.tensor([5, 9]), 3 * texts, torch.tensor([5, 5, 9]), torch.tensor([0, 1]))
    # The first image finds its caption at 10 degrees; before the second's comes that at 80 degrees of the first. The
    # caption at 80 degrees is nearer to the second image, and right for the first.
    expected = {"i2t_r1": 1 / 2, "i2t_r2": 1, "i2t_rank": 1.5, "t2i_r1": 2 / 3, "t2i_r2": 1, "t2i_rank": 1}
    expected |= {"i2t_r1_seen": 1, "i2t_r2_seen": 1, "i2t_rank_seen": 1}
    expected |= {"t2i_r1_seen": 1 / 2, "t2i_r2_seen": 1, "t2i_rank_seen": 1.5}
    expected |= {"i2t_r1_unseen": 0, "i2t_r2_unseen": 1, "i2t_rank_unseen": 2}
    expected |= {"t2i_r1_unseen": 1, "t2i_r2_unseen": 1, "t2i_rank_unseen": 1}
    found = metric.compute()
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected)
    assert {value.dtype for value in found.values()} == {torch.float32}


def test_an_image_is_found_by_each_of_its_captions():
    """An evaluation in pairs takes four of five captions for wrong: it finds a fifth of what is found here."""
    pixels = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    owners = torch.arange(20).repeat_interleave(5)
    texts = pixels[owners] + 0.5 * torch.randn(100, 64, generator=torch.Generator().manual_seed(1))
    many = {"images": pixels, "image_ids": torch.arange(20), "texts": texts, "text_ids": owners}
    pairs = {"images": pixels[owners], "image_ids": torch.arange(100), "texts": texts, "text_ids": torch.arange(100)}
    assert measured(many)["i2t_r1"] == 1
    assert measured(pairs)["i2t_r1"] == pytest.approx(1 / 5)


# What is alike.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_that_embeds_everything_alike_finds_nothing(dtype):
    """Ties count against: products of equal vectors that differ in their last bit are ties."""
    one = torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    images, texts = (one.expand(count, -1).to(dtype) for count in (61, 173))
    given = {"images": images, "image_ids": torch.arange(61), "texts": texts, "text_ids": torch.arange(173) % 61}
    found = measured(given)
    assert [found[name] for name in ("i2t_r1", "i2t_r10", "t2i_r1", "t2i_r10")] == [0, 0, 0, 0]
    assert found["t2i_rank"] == 61
    assert found["i2t_rank"] == 1 + 173 - 3


def test_equal_captions_of_several_images_are_one_by_their_keys():
    """Without keys, the caption that two images share counts against both."""
    images, texts = torch.eye(4)[:3], torch.eye(4)[[0, 0, 2]]
    images[1] = images[0]
    ids = torch.arange(3)
    given = {"images": images, "image_ids": ids, "texts": texts, "text_ids": ids}
    assert measured(given)["i2t_r1"] == measured(given)["t2i_r1"] == pytest.approx(1 / 3)
    keyed = measured(given | {"text_keys": torch.tensor([8, 8, -2])})
    assert keyed["i2t_r1"] == keyed["t2i_r1"] == 1


@pytest.mark.parametrize("broken", ["images", "texts"])
def test_embeddings_that_are_no_numbers_find_nothing(broken):
    given = {
        "images": torch.eye(12),
        "image_ids": torch.arange(12),
        "texts": torch.eye(12),
        "text_ids": torch.arange(12),
    }
    found = measured(given | {broken: torch.full((12, 12), math.nan)})
    assert [found[name] for name in ("i2t_r1", "i2t_r10", "t2i_r1", "t2i_r10")] == [0, 0, 0, 0]
    assert found["i2t_rank"] == found["t2i_rank"] == 12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_precision_is_compared_in_full(dtype):
    """In bfloat16, cosines of 1 and 0.999 would be a tie; they are those of the vectors as they came."""
    given = {name: each.to(dtype) if each.is_floating_point() else each for name, each in data(seed=5).items()}
    with torch.autocast("cpu", torch.bfloat16):
        found = measured(given)
    assert found == pytest.approx(reference(**given), rel=1e-6)


def test_a_metric_made_narrow_stays_wide():
    metric = CrossModalRecall().to(torch.bfloat16)
    metric.update(**data())
    metric.to(torch.bfloat16)
    assert {name: value.item() for name, value in metric.compute().items()} == measured(data())


# Memory.


class Largest(TorchDispatchMode):
    """Watches how many elements the largest tensor has that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, tuple | list) else [found]:
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.numel())
        return found


@pytest.mark.parametrize("shared", [False, True], ids=["one image a caption", "many to many"])
def test_the_matrix_of_all_similarities_is_never_there(shared):
    given = data(images=400, captions=5, width=4)
    if shared:  # all images of ten groups have all texts of these
        given |= {"image_ids": torch.arange(400) % 10, "text_ids": torch.arange(1985) % 10}
    metric = CrossModalRecall(chunk=20_000)
    with Largest() as largest:
        metric.update(**given)
        found = metric.compute()
    assert largest.elements <= 20_000 < 400 * 1985
    assert {name: value.item() for name, value in found.items()} == measured(given)


# Several processes.


def process(rank: int, folder: Path, parts: list[Tensor]) -> None:
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=len(parts))
    found = {}
    for name in SHARED:
        metric = CrossModalRecall(KS)
        for part in parts[rank].split(9) if len(parts[rank]) else ():
            metric.update(**batch_of(SHARED[name], part))
        found[name] = {key: value.item() for key, value in metric.compute().items()}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


SHARED = {
    "without keys": data(seed=6),
    "with keys": with_keys(data(seed=6), data(seed=6)["text_ids"] + torch.arange(185) % 2),
}


@pytest.mark.parametrize("first", [17, 0], ids=["both", "one has seen nothing"])
@pytest.mark.filterwarnings("ignore:.*before the ``update`` method")
def test_two_processes_say_what_one_says(tmp_path, first):
    parts = list(torch.arange(40).split([first, 40 - first]))
    torch.multiprocessing.start_processes(process, (tmp_path, parts), nprocs=2, start_method="fork")
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, given in SHARED.items():
            assert found[name] == pytest.approx(measured(given), rel=1e-6)


# Edges, and what is refused.


@pytest.mark.filterwarnings("ignore:.*before the ``update`` method")
def test_without_queries_there_is_no_score():
    metric = CrossModalRecall()
    assert all(value.isnan() for value in metric.compute().values())
    metric.update(torch.randn(3, 4), torch.arange(3), torch.randn(2, 4), torch.tensor([7, 8]))
    assert all(value.isnan() for value in metric.compute().values())
    metric.update(torch.randn(1, 4), torch.tensor([7]), torch.empty(0, 4), torch.empty(0, dtype=torch.int64))
    assert not any(value.isnan() for value in metric.compute().values())
    metric.reset()
    metric.update(torch.empty(0, 4), torch.empty(0, dtype=torch.int64), torch.randn(2, 4), torch.tensor([7, 8]))
    assert all(value.isnan() for value in metric.compute().values())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": torch.randn(40)}, r"images are \(40,\), texts \(185, 8\): expected embeddings"),
        ({"texts": torch.randn(185, 9)}, r"images are \(40, 8\), texts \(185, 9\): expected embeddings"),
        ({"image_ids": torch.arange(39)}, r"image_ids are \(39,\) torch.int64 for 40 embeddings"),
        ({"text_ids": torch.zeros(185)}, r"text_ids are \(185,\) torch.float32 for 185 embeddings"),
        ({"subsets": torch.zeros(185, dtype=torch.int64)}, r"subsets are \(185,\) torch.int64 for 40 embeddings"),
        ({"text_keys": torch.zeros(185, 1, dtype=torch.int64)}, r"text_keys are \(185, 1\) torch.int64 for 185"),
    ],
)
def test_what_does_not_go_together_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        CrossModalRecall().update(**data() | changed)


@pytest.mark.parametrize("options", [{"ks": ()}, {"ks": (0, 1)}, {"chunk": 0}])
def test_wrong_choices(options):
    with pytest.raises(ValueError, match="expected whole numbers from 1"):
        CrossModalRecall(**options)


def test_keys_of_some_texts_are_refused():
    metric = CrossModalRecall()
    metric.update(**data())
    metric.update(**data(), text_keys=torch.arange(185))
    with pytest.raises(ValueError, match="there are text_keys of 185 of 370 texts: expected all of them, or none"):
        metric.compute()
