"""Class counts of the training data, and the balanced order: its shares, its samples, and that it is one function."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image

from datamodules import DigitsDataModule, ImageFolderDataModule, ShapesDetectionDataModule
from datamodules._lightning import LightningDataModule, LightningModule, Trainer
from datamodules.base import ImageDataModule
from datamodules.loading.balance import BalancedEpochs
from datamodules.loading.labels import counts_of
from datamodules.loading.order import BatchOrder, mix
from zoo.common.protocols import CountsLabels


def folders(root: Path, **classes: int) -> Path:
    """A folder for each class, of as many images as it says."""
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (8, 8), number).save(root / name / f"{number}.png")
    return root


class Tagged(ImageDataModule):
    """A project's own data, with labels as it has them."""

    def __init__(self, labels, classes=None, **options) -> None:
        super().__init__(mean=(0.0,), std=(1.0,), num_workers=0, **options)
        self.given, self.classes = labels, classes

    def samples(self, split):
        return TaggedSamples(self.given) if split == "train" else None


class TaggedSamples:
    random = False

    def __init__(self, labels) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return 4 if self.labels is None else len(self.labels)

    def __getitem__(self, index: int):
        return torch.full((1, 2, 2), index % 256, dtype=torch.uint8), self.labels[index]


# Class counts.


@pytest.mark.parametrize("options", [{}, {"labels_per_class": 7}, {"split": "digits8x8-bin-v1"}], ids=str)
def test_digits_are_counted_as_they_are_trained_on(options):
    data = DigitsDataModule(**options)
    samples = data.samples("train")
    counts = data.class_counts()
    assert counts == np.bincount([samples[i][1] for i in range(len(samples))]).tolist()
    assert (len(counts), sum(counts), data.sample_count()) == (10, len(samples), len(samples))
    assert isinstance(data, CountsLabels)


@pytest.mark.parametrize("cache", [None, "ram"])
def test_folders_are_counted_without_what_is_held_out_and_without_a_cache_being_made(tmp_path, cache):
    root = folders(tmp_path, ant=20, bee=5, cat=1)
    data = ImageFolderDataModule(str(root), 8, cache=cache, cache_size=8)
    assert data.class_counts() == [16, 3, 1]
    assert data.sample_count() == 20
    assert all(samples.store is None for samples in data._samples.values())
    samples = data.samples("train")
    assert data.class_counts() == np.bincount([samples[i][1] for i in range(len(samples))]).tolist()


def test_classes_without_samples_count_none():
    assert Tagged([0, 2, 2], ["a", "b", "c", "d"]).class_counts() == [1, 0, 2, 0]
    assert Tagged(torch.tensor([0, 2, 2])).class_counts() == [1, 0, 2]


def test_several_labels_are_counted_by_their_positives():
    data = Tagged(torch.tensor([[1, 0, 1], [1, 0, 0]]), ["a", "b", "c"])
    assert (data.class_counts(), data.sample_count()) == ([2, 0, 1], 2)


@pytest.mark.parametrize(("labels", "said"), [([0, 1, 3], "from 0 to 3"), ([-1, 0], "from -1 to 0")])
def test_labels_out_of_range_are_refused(labels, said):
    with pytest.raises(ValueError, match=f"labels run {said}: expected numbers from 0 to 2"):
        Tagged(labels, ["a", "b", "c"]).class_counts()
    assert counts_of(np.array([], dtype=int), 2) == [0, 0]


def test_data_without_labels_says_so_in_a_line(tmp_path):
    for number in range(4):
        Image.new("L", (8, 8)).save(tmp_path / f"{number}.png")
    for data in (ImageFolderDataModule(str(tmp_path), 8), ShapesDetectionDataModule()):
        with pytest.raises(
            ValueError, match=f"^{type(data).__name__} cannot count or balance classes, for .*: expected .*$"
        ) as error:
            data.class_counts()
        assert "\n" not in str(error.value)


# Shares of classes, and of the samples in them.


def labels_with(counts: list[int]) -> np.ndarray:
    """Labels of which each occurs so often, in no order."""
    return np.random.default_rng(len(counts)).permutation(np.repeat(np.arange(len(counts)), counts))


COUNTS = {
    "1 to 1000": [1000, 1],
    "one class": [17],
    "alike": [8, 8, 8],
    "of one sample": [1, 1, 1],
    "long tail": [500, 250, 120, 60, 30, 15, 7, 3, 1],
    "one empty": [40, 0, 10],
    "primes": [2, 3, 5, 7, 11, 13],
    "many": [1 + number % 7 for number in range(200)],
}
BALANCES = [0.01, 0.5, 0.8, 1.0]


def expected_shares(counts: list[int], balance: float, size: int) -> np.ndarray:
    weights = np.array([count ** (1 - balance) if count else 0.0 for count in counts])
    return size * weights / weights.sum()


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("name", COUNTS)
def test_every_epoch_has_the_shares_to_one_sample_and_a_hundred_have_them_to_three(name, balance):
    counts, epochs = COUNTS[name], 100
    labels = labels_with(counts)
    for repeats in (1, 3):
        order = BatchOrder(len(labels), 4, seed=3, shuffle=True, labels=labels, balance=balance, repeats=repeats)
        size = -(-len(labels) // repeats)
        shares = expected_shares(counts, balance, size)
        drawn = np.zeros(len(counts))
        for epoch in range(epochs):
            found = order.order(epoch)
            assert len(found) == len(labels)
            found = np.bincount(labels[found[::repeats]], minlength=len(counts))
            assert (np.abs(found - shares) < 1).all(), (epoch, found, shares)
            drawn += found
        assert (np.abs(drawn - epochs * shares) < 3).all()  # and not 10, as by chance


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("name", COUNTS)
def test_samples_of_a_class_come_alike_often_within_an_epoch_and_over_epochs(name, balance):
    labels = labels_with(COUNTS[name])
    order = BatchOrder(len(labels), 4, seed=5, shuffle=True, labels=labels, balance=balance)
    total = np.zeros(len(labels), dtype=int)
    for epoch in range(40):
        found = np.bincount(order.order(epoch), minlength=len(labels))
        total += found
        for seen in (found, total):
            assert all(np.ptp(seen[labels == label]) <= 1 for label in np.unique(labels))


def test_half_is_the_square_root():
    labels = np.repeat([0, 1, 2], [16, 4, 4])
    order = BatchOrder(24, 1, shuffle=True, labels=labels, balance=0.5)
    assert all(np.bincount(labels[order.order(epoch)]).tolist() == [12, 6, 6] for epoch in range(9))


def test_roundings_of_every_class_are_as_often_up_as_its_share_says():
    """Whatever the seed, so that no class is favoured over many short runs."""
    labels = labels_with(COUNTS["long tail"])
    shares = expected_shares(COUNTS["long tail"], 0.5, 50)
    drawn = [BalancedEpochs(labels, 0.5, 50, mix(seed)).drawn(1) for seed in range(4000)]
    assert np.abs(np.mean(drawn, axis=0) - shares).max() < 4 * 0.5 / 4000**0.5


def test_a_sample_that_comes_again_is_another_copy():
    labels = np.repeat([0, 1], [95, 5])
    for repeats in (1, 2):
        order = BatchOrder(100, 10, seed=1, shuffle=True, labels=labels, balance=1.0, repeats=repeats)
        keys = [key for batch in order for key in batch]
        assert len(keys) == len(set(keys)) == 100
        copies: dict[int, list[int]] = {}
        for _, copy, index in keys:
            copies.setdefault(index, []).append(copy)
        assert all(sorted(found) == list(range(len(found))) for found in copies.values())
        assert {len(copies[index]) for index in range(95, 100)} == {10}


# One function of seed and epoch.


def batches_of(size: int, world_size: int, batch_size: int = 4, **options: Any) -> list[list[list[Any]]]:
    """By rank, its batches."""
    ranks = (BatchOrder(size, batch_size, rank, world_size, shuffle=True, **options) for rank in range(world_size))
    return [[list(batch) for batch in rank] for rank in ranks]


def test_without_balance_the_order_is_what_it_was():
    labels = labels_with([30, 5])
    for repeats in (1, 3):
        for options in ({}, {"labels": labels, "balance": 0.0}):
            order = BatchOrder(35, 4, seed=9, shuffle=True, repeats=repeats, **options)
            for epoch in (0, 5):
                order.set_epoch(epoch)
                permutation = torch.randperm(35, generator=torch.Generator().manual_seed(mix(9, epoch))).tolist()
                keys = [(epoch, position % repeats, permutation[position // repeats]) for position in range(35)]
                assert [key for batch in order for key in batch] == keys


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("repeats", [1, 2])
def test_every_number_of_processes_shares_one_order(drop_last, repeats):
    labels = labels_with([70, 20, 6, 1])
    options: dict[str, Any] = {"labels": labels, "balance": 0.7, "seed": 4, "repeats": repeats}
    whole = BatchOrder(97, 97, shuffle=True, **options).order(0)
    for world_size in (1, 2, 3, 4):
        ranks = batches_of(97, world_size, drop_last=drop_last, **options)
        together = [
            batch[i][2]
            for number in range(len(ranks[0]))
            for i in range(len(ranks[0][number]))
            for batch in (rank[number] for rank in ranks)
            if i < len(batch)
        ]
        used = 97 // (4 * world_size) * 4 * world_size if drop_last else 97
        assert together == whole[:used].tolist()


@pytest.mark.parametrize("case", range(60))
def test_sizes_of_all_kinds_make_whole_epochs(case):
    """Shares, lengths, keys and the partition among processes, of sizes that nobody has thought of."""
    drawn = np.random.default_rng(case)
    counts = np.ceil(drawn.integers(1, 300) / np.arange(1, drawn.integers(2, 30)) ** drawn.uniform(0, 3)).astype(int)
    size, balance, repeats = int(counts.sum()), drawn.uniform(0.001, 1), int(drawn.integers(1, 4))
    batch_size, world_size, epoch = int(drawn.integers(1, 70)), int(drawn.integers(1, 5)), int(drawn.integers(0, 500))
    labels = labels_with(counts.tolist())
    options: dict[str, Any] = {"labels": labels, "balance": balance, "seed": case - 30, "repeats": repeats}
    ranks = [BatchOrder(size, batch_size, rank, world_size, shuffle=True, **options) for rank in range(world_size)]
    for rank in ranks:
        rank.set_epoch(epoch)
    keys = [key for rank in ranks for batch in rank for key in batch]
    assert len(keys) == len(set(keys)) == size
    assert Counter(index for *_, index in keys) == Counter(ranks[0].order(epoch).tolist())
    found = np.bincount(labels[ranks[0].order(epoch)[::repeats]], minlength=len(counts))
    shares = expected_shares(counts.tolist(), balance, -(-size // repeats))
    assert (np.abs(found - shares) < 1).all()


def test_an_epoch_is_the_same_whoever_asks_and_whatever_was_asked_before():
    labels = labels_with([70, 20, 6, 1])
    one, other = (BatchOrder(97, 8, shuffle=True, labels=labels, balance=1.0) for _ in range(2))
    late = one.order(50)
    assert np.array_equal(late, one.order(50))
    for epoch in (3, 0, 50):
        found = other.order(epoch)
        assert np.array_equal(found, one.order(epoch))
    assert not np.array_equal(one.order(0), one.order(1))
    assert not np.array_equal(
        one.order(0), BatchOrder(97, 8, seed=1, shuffle=True, labels=labels, balance=1.0).order(0)
    )


def test_it_is_shuffled():
    """Not class by class: neighbours are of one class as often as chance has it."""
    labels = labels_with([900, 90, 10])
    found = labels[BatchOrder(1000, 8, shuffle=True, labels=labels, balance=1.0).order(0)]
    assert np.mean(found[1:] == found[:-1]) == pytest.approx(1 / 3, abs=0.06)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_what_is_left_of_an_epoch_is_continued_from_every_batch_by_other_processes(after, drop_last):
    labels = labels_with([70, 20, 6, 1])
    options: dict[str, Any] = {"labels": labels, "balance": 0.7, "shuffle": True, "drop_last": drop_last}
    begun = BatchOrder(97, 5, 0, 2, **options)
    whole = BatchOrder(97, 97, **options).order(6).tolist()
    for batch in range(len(begun)):
        position = begun.position(6, batch)
        for batch_size in (3, 5):
            ranks = [BatchOrder(97, batch_size, rank, after, **options) for rank in range(after)]
            for rank in ranks:
                rank.resume(position)
            left = [
                keys
                for batches in zip(*ranks, strict=True)
                for i in range(batch_size)
                for keys in (batch[i] for batch in batches if i < len(batch))
            ]
            done = position["samples"]
            assert [index for _, _, index in left] == whole[done : done + len(left)]
            assert len(left) == (
                97 - done if not drop_last else (97 - done) // (batch_size * after) * batch_size * after
            )
            ranks[0].set_epoch(7)
            assert np.array_equal(ranks[0].order(7), BatchOrder(97, batch_size, 0, after, **options).order(7))


def test_another_balance_is_refused_in_the_middle_of_an_epoch_and_taken_at_its_end():
    labels = labels_with([70, 20])
    orders = {b: BatchOrder(90, 5, shuffle=True, labels=labels, balance=b) for b in (0.0, 1.0)}
    told = "in the middle of epoch 2, in an order with balance 1.0, but here it is 0.0: continue with the same balance"
    with pytest.raises(ValueError, match=told):
        orders[0.0].resume(orders[1.0].position(2, 3))
    old = {name: value for name, value in orders[0.0].position(2, 3).items() if name != "balance"}
    orders[0.0].resume(old)  # of a checkpoint before there was a balance
    with pytest.raises(ValueError, match="in an order with balance 0.0, but here it is 1.0"):
        orders[1.0].resume(old)
    orders[0.0].resume(orders[1.0].position(2, 0))


# Loaders and runs.


class Sees(LightningModule):
    """Keeps the images and labels of each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.images: list[torch.Tensor] = []
        self.labels: list[int] = []
        self.validated: list[int] = []

    def training_step(self, batch, batch_idx):
        self.images.append(batch[0])
        self.labels += batch[1].tolist()
        return self.weight * batch[0].float().mean()

    def validation_step(self, batch, batch_idx):
        self.validated += batch[1].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def seen(data: ImageDataModule, epochs: int = 1, **options: Any) -> Sees:
    module = Sees()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0}
    Trainer(accelerator="cpu", max_epochs=epochs, **quiet, **options).fit(module, datamodule=data)
    return module


@pytest.mark.parametrize("cache", [None, "ram"])
def test_a_folder_is_balanced_in_training_alone(tmp_path, cache):
    root = folders(tmp_path, ant=40, bee=10, cat=2)
    options: dict[str, Any] = {"batch_size": 5, "num_workers": 0, "drop_last": False, "cache": cache, "cache_size": 8}
    data = ImageFolderDataModule(str(root), 8, balance=1.0, val_fraction=0.2, test_fraction=0.0, **options)
    assert data.class_counts() == [32, 8, 1]
    module = seen(data, epochs=3)
    for epoch in np.split(np.array(module.labels), 3):
        assert np.abs(np.bincount(epoch) - 41 / 3).max() < 1
    assert Counter(module.validated) == Counter({0: 3 * 8, 1: 3 * 2, 2: 3 * 1})


@pytest.mark.parametrize("balance", BALANCES)
def test_of_several_labels_each_set_that_occurs_is_a_class(balance):
    sets = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 1], [1, 1, 1]])
    classes = labels_with([60, 25, 10, 2])
    options: dict[str, Any] = {"shuffle": True, "balance": balance}
    of_sets = BatchOrder(97, 8, labels=sets[classes], **options).order(3)
    shares = expected_shares([60, 25, 10, 2], balance, 97)
    assert (np.abs(np.bincount(classes[of_sets], minlength=4) - shares) < 1).all()
    # np.unique sorts rows as it sorts numbers, so that classes numbered by their sets come in the same order.
    assert np.array_equal(of_sets, BatchOrder(97, 8, labels=np.array([0, 2, 1, 3])[classes], **options).order(3))


def test_digits_with_several_labels_are_balanced_by_their_sets():
    data = DigitsDataModule(labels=[8, 5], balance=1.0, drop_last=False, num_workers=0)
    module = seen(data)
    found = np.array(module.labels)
    assert found.shape == (1077, 2)
    for a_set in ([0, 0], [1, 0], [0, 1]):
        assert abs((found == a_set).all(1).sum() - 359) < 1


def test_few_labels_and_stages_are_balanced_too():
    counts = DigitsDataModule(split="digits8x8-bin-v1").class_counts()
    assert np.ptp(counts) > 1
    data = DigitsDataModule(split="digits8x8-bin-v1", balance=1.0, drop_last=False, num_workers=0)
    data.train_in_stages({1: {"image_size": 12}})
    module = seen(data, epochs=2)
    for epoch in np.split(np.array(module.labels), 2):
        assert np.abs(np.bincount(epoch) - 129.7).max() < 1
    assert {images.shape[-1] for images in module.images} == {8, 12}
    few = seen(DigitsDataModule(labels_per_class=3, balance=0.5, batch_size=10, num_workers=0))
    assert Counter(few.labels) == Counter(dict.fromkeys(range(10), 3))


def test_workers_change_nothing_and_copies_are_augmented_apart(tmp_path):
    root = folders(tmp_path, ant=30, bee=2)
    noisy = np.random.default_rng(0).integers(0, 256, (2, 16, 16), dtype=np.uint8)
    for number, pixels in enumerate(noisy):
        Image.fromarray(pixels).save(root / "bee" / f"{number}.png")
    options: dict[str, Any] = {"val_fraction": 0.0, "test_fraction": 0.0, "batch_size": 8, "balance": 1.0}
    alone, helped = (seen(ImageFolderDataModule(str(root), 8, num_workers=w, **options), epochs=2) for w in (0, 2))
    assert alone.labels == helped.labels
    for ours, theirs in zip(alone.images, helped.images, strict=True):
        assert torch.equal(ours, theirs)
    images = torch.cat(alone.images)[: len(alone.labels) // 2]
    bees = images[torch.tensor(alone.labels[: len(images)]) == 1]
    assert len(bees) == 16
    assert len(bees.flatten(1).unique(dim=0)) == 16  # two images, each cropped anew eight times


def test_overfitting_batches_keeps_the_samples_in_their_order():
    labels = [0] * 20 + [1] * 4
    module = seen(Tagged(torch.tensor(labels), batch_size=4, balance=1.0), overfit_batches=2, limit_val_batches=0)
    assert module.labels == [0] * 8


# What is refused.


@pytest.mark.parametrize("balance", [-0.1, 1.5, float("nan")])
def test_balance_out_of_range_is_refused(tmp_path, balance):
    (tmp_path / "cat").mkdir()
    for make in (DigitsDataModule, lambda **options: ImageFolderDataModule(str(tmp_path), **options)):
        with pytest.raises(ValueError, match=f"^balance is {balance}: expected a number in \\[0, 1\\]$"):
            make(balance=balance)
    with pytest.raises(ValueError, match=f"^balance is {balance}: expected 0 "):
        BatchOrder(4, 2, shuffle=True, labels=np.zeros(4, dtype=int), balance=balance)


def test_data_without_labels_is_refused_before_training(tmp_path):
    for number in range(4):
        Image.new("L", (8, 8)).save(tmp_path / f"{number}.png")
    unlabelled = ImageFolderDataModule(str(tmp_path), 8, balance=1.0, num_workers=0, batch_size=1)
    for data, said in (
        (
            unlabelled,
            "ImageFolderDataModule cannot count or balance classes, for its training .* no labels: expected",
        ),
        (Tagged(None, balance=1.0), "Tagged cannot count or balance classes, for"),
    ):
        with pytest.raises(ValueError, match=f"^{said}") as error:
            data.train_dataloader()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"groups": np.zeros(4)}, "balance is 1.0: expected 0 where samples are grouped"),
        ({"labels": None}, "balance is 1.0: expected 0 for samples without labels"),
        ({"labels": np.zeros(3, dtype=int)}, "labels are 3 for 4 samples: expected one each"),
        ({"labels": np.zeros((3, 2), dtype=int)}, "labels are 3 for 4 samples: expected one each"),
    ],
    ids=lambda value: None,
)
def test_orders_that_cannot_be_balanced_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        BatchOrder(4, 2, shuffle=True, balance=1.0, **{"labels": np.zeros(4, dtype=int)} | options)


def test_detection_has_no_such_option():
    with pytest.raises(TypeError, match="unexpected keyword argument 'balance'"):
        ShapesDetectionDataModule(balance=1.0)


@pytest.mark.parametrize("name", ["DigitsDataModule", "ImageFolderDataModule", "TorchvisionDataModule"])
def test_it_can_be_had_from_the_command_line(name):
    parser = ArgumentParser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    given = [f"--data=datamodules.{name}", *(["--data.root=."] if name == "ImageFolderDataModule" else [])]
    assert parser.parse_args([*given, "--data.balance=1"]).data.init_args.balance == 1.0
    assert parser.parse_args(given).data.init_args.balance == 0.0


def test_the_table_of_costs_has_a_row_for_each_way(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import balanced_order

    monkeypatch.setattr(sys, "argv", ["balanced_order.py", "--samples=1200", "--classes=5", "--rounds=1", "--steps=2"])
    balanced_order.main()
    rows = capsys.readouterr().out.split("|---|")[-1].strip().splitlines()[-5:]
    assert [row.split("|")[1].strip().split(",")[-1].split()[-1] for row in rows] == [
        *("0", "0.5", "1", "RandomSampler", "WeightedRandomSampler"),
    ]
    assert all(float(cell) >= 0 for row in rows for cell in row.split("|")[2:-1] if cell.strip())
