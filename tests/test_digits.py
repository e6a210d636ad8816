"""The bundled digits: a fixed split, real pixels, and a network that learns them."""

import hashlib
import time

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from datamodules import DigitsDataModule
from zoo.cli import outcome

BENCHMARK = "digits8x8-bin-v1"


def test_the_split_is_the_published_one():
    data = DigitsDataModule()
    indices = {split: data.indices(split) for split in ("train", "val", "test")}
    assert {split: len(found) for split, found in indices.items()} == {"train": 1077, "val": 180, "test": 540}
    assert sorted(np.concatenate(list(indices.values()))) == list(range(1797))
    checksum = hashlib.sha256(b"".join(indices[split].astype("<i8").tobytes() for split in ("train", "val", "test")))
    assert checksum.hexdigest()[:16] == "afb63045bfd1fe34"


def test_the_benchmarks_split_is_its_own():
    data = DigitsDataModule(split=BENCHMARK)
    indices = [data.indices(split) for split in ("train", "val", "test")]
    order = np.random.RandomState(0).permutation(1797)
    for found, part in zip(indices, (order[:1297], order[1297:1497], order[1497:]), strict=True):
        assert np.array_equal(found, np.sort(part))
    checksum = hashlib.sha256(np.concatenate(indices).astype("<i8").tobytes()).hexdigest()
    assert checksum == "a9aecc4680d83029a7e012170e71409e43171c879fcb45ae439d2aa7b42090ae"
    assert (
        hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()
        == "7f71e362ae545c7716e4551e170aec4c10bbf84b76a1c24b73b5646a79df4800"
    )
    assert [len(data.samples(split)) for split in ("train", "val", "test")] == [1297, 200, 300]
    assert np.array_equal(data.indices("test"), DigitsDataModule(split=BENCHMARK, seed=5).indices("test"))


def test_the_benchmarks_split_serves_few_labels_and_baselines_too():
    few = DigitsDataModule(split=BENCHMARK, labels_per_class=100)
    digits = load_digits()
    train, test = few.indices("train"), few.indices("test")
    assert np.bincount(digits.target[train]).tolist() == [100] * 10
    assert set(train) <= set(DigitsDataModule(split=BENCHMARK).indices("train"))
    nearest = train[((digits.data[test][:, None] - digits.data[train]) ** 2).sum(2).argmin(1)]
    expected = (digits.target[nearest] == digits.target[test]).mean()
    assert few.baselines()["1-nearest neighbour"] == pytest.approx(expected)


def test_impossible_splits_say_what_would_work():
    with pytest.raises(
        ValueError, match="unknown split 'official': expected one of stratified, digits8x8-bin-v1, random"
    ):
        DigitsDataModule(split="official")
    with pytest.raises(ValueError, match="split_seed is 3, but digits8x8-bin-v1 is one split: set split_seed to 0"):
        DigitsDataModule(split=BENCHMARK, split_seed=3)


def test_every_digit_has_its_share_of_every_split():
    data, labels = DigitsDataModule(), load_digits().target
    for split in ("train", "val", "test"):
        share = np.bincount(labels[data.indices(split)], minlength=10) / np.bincount(labels, minlength=10)
        assert np.ptp(share) < 0.02


def test_split_seed_changes_the_split_and_seed_does_not():
    base = DigitsDataModule().indices("test")
    assert np.array_equal(base, DigitsDataModule(seed=1).indices("test"))
    assert not np.array_equal(base, DigitsDataModule(split_seed=1).indices("test"))


def test_native_size_keeps_the_scanned_counts():
    data, digits = DigitsDataModule(), load_digits()
    samples = data.samples("test")
    for position, index in enumerate(data.indices("test")[:50]):
        image, label = samples[position]
        assert image.dtype == torch.uint8
        np.testing.assert_array_equal((image[0].numpy() / 255 * 16).round(), digits.images[index])
        assert label == digits.target[index]
        assert samples.names[position] == f"digits/{index}"


def test_image_size_resizes():
    assert DigitsDataModule(image_size=20).samples("val")[0][0].shape == (1, 20, 20)
    with pytest.raises(ValueError, match="image_size is 0"):
        DigitsDataModule(image_size=0)


def test_mean_and_std_are_the_training_pixels():
    data = DigitsDataModule()
    pixels = torch.stack([image for image, _ in data.samples("train")]).float() / 255
    assert data.mean[0] == pytest.approx(pixels.mean().item(), abs=1e-3)
    assert data.std[0] == pytest.approx(pixels.std().item(), abs=1e-3)


def test_few_labels_are_as_many_of_each_digit_out_of_the_training_images():
    data = DigitsDataModule()
    few = [DigitsDataModule(labels_per_class=5, labels_seed=seed) for seed in (0, 0, 1)]
    labels = data._arrays[1].numpy()
    for one in few:
        assert np.bincount(labels[one.indices("train")]).tolist() == [5] * 10
        assert set(one.indices("train")) <= set(data.indices("train"))
        assert np.array_equal(one.indices("test"), data.indices("test"))
        assert np.array_equal(one.indices("val"), data.indices("val"))
    assert np.array_equal(few[0].indices("train"), few[1].indices("train"))
    assert not np.array_equal(few[0].indices("train"), few[2].indices("train"))
    found = few[0].baselines()
    pixels, test = load_digits().data, data.indices("test")
    known = few[0].indices("train")
    nearest = known[((pixels[test][:, None] - pixels[known]) ** 2).sum(2).argmin(1)]
    assert found["1-nearest neighbour"] == pytest.approx((labels[nearest] == labels[test]).mean())
    assert 0.8 < found["RBF-kernel SVM"] < 0.95
    with pytest.raises(ValueError, match="labels_per_class is 0: expected 1 to 100"):
        DigitsDataModule(labels_per_class=0)


def test_the_support_vector_machine_is_the_published_one():
    assert DigitsDataModule().baselines() == {"RBF-kernel SVM": pytest.approx(0.9944, abs=1e-4)}


def test_batches_are_images_and_labels():
    data = DigitsDataModule(batch_size=100, num_workers=0)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (100, 1, 8, 8)
    assert labels.shape == (100,)
    assert data.num_classes == 10


def test_a_folder_can_be_predicted(tmp_path):
    Image.new("RGB", (40, 30), "white").save(tmp_path / "mine.png")
    data = DigitsDataModule(image_size=16, predict_root=str(tmp_path), num_workers=0)
    (batch,) = list(data.predict_dataloader())
    assert batch.shape == (1, 1, 16, 16)
    assert batch.float().mean() == 255
    assert len(DigitsDataModule(num_workers=0).predict_dataloader().dataset) == 540


# As binary images.


def test_the_threshold_is_eight_counts_of_ink():
    data = DigitsDataModule(split=BENCHMARK, binarize="threshold", mean=(0.0,), std=(1.0,), num_workers=0)
    counts, everything = load_digits().images, []
    for split in ("train", "val", "test"):
        samples = data.samples(split)
        images = torch.stack([samples[index][0] for index in range(len(samples))])
        binary = data.on_after_batch_transfer(images, 0)
        assert np.array_equal(binary[:, 0].numpy(), counts[data.indices(split)] >= 8)
        everything.append(binary.flatten(1))
    assert torch.cat(everything).mean().item() == pytest.approx(0.323, abs=5e-4)
    assert len(torch.cat(everything).unique(dim=0)) == 1750


def test_the_density_to_beat_is_the_published_one():
    """A figure measured elsewhere."""
    data = DigitsDataModule(split=BENCHMARK, binarize="threshold")
    found = data.nats()
    assert found == {"independent pixels": pytest.approx(-25.20, abs=0.01)}
    binary = load_digits().images.reshape(-1, 64) >= 8
    train, test = binary[data.indices("train")], binary[data.indices("test")]
    frequency = (train.sum(0) + 1) / (len(train) + 2)
    expected = np.log(np.where(test, frequency, 1 - frequency)).sum(1).mean()
    assert found["independent pixels"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, "image_size is 8 and binarize None"),
        ({"binarize": "draw"}, "image_size is 8 and binarize draw"),
        ({"binarize": "threshold", "image_size": 16}, "image_size is 16 and binarize threshold"),
    ],
)
def test_other_images_have_no_figures_in_nats(options, found):
    with pytest.raises(ValueError, match=f"8x8 images of 0 and 1 only, but {found}: set them to 8 and threshold"):
        DigitsDataModule(**options).nats()


def test_what_a_fit_prints_to_compare_with_costs_at_most_a_second():
    started = time.process_time()
    classifies = outcome.baselines(DigitsDataModule(labels_per_class=5), {"test/acc": 0.5})
    models = outcome.baselines(DigitsDataModule(binarize="threshold", jitter=0.2), {"test/elbo": -18.0})
    assert time.process_time() - started < 1
    assert [line.split(" on the same split ")[0] for line in (*classifies, *models)] == [
        "1-nearest neighbour",
        "RBF-kernel SVM",
        "independent pixels",
    ]


def test_jitter_is_of_training_alone_and_new_in_every_epoch():
    options = {"split": "digits8x8-bin-v1", "binarize": "threshold", "mean": (0.0,), "std": (1.0,), "drop_last": False}
    data, plain = (DigitsDataModule(batch_size=1297, jitter=jitter, **options) for jitter in (0.15, 0.0))
    seen: list[torch.Tensor] = []

    class Looks(LightningModule):
        def training_step(self, batch, batch_idx):
            seen.append(batch[0])

        def validation_step(self, batch, batch_idx):
            seen.append(batch[0])

        def configure_optimizers(self):
            return None

    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    for one, epochs in ((data, 2), (plain, 1)):
        Trainer(accelerator="cpu", max_epochs=epochs, num_sanity_val_steps=0, **quiet).fit(Looks(), datamodule=one)
    first, val, second, val_again, without, val_plain = seen
    assert first.unique().tolist() == [0.0, 1.0]
    moved = (first != without).float().mean()
    assert 0.01 < moved < 0.1
    assert not torch.equal(first.sum(0), second.sum(0))
    assert torch.equal(val, val_again)
    assert torch.equal(val, val_plain)


@pytest.mark.parametrize(("jitter", "binarize"), [(-0.1, "threshold"), (0.1, "draw"), (0.1, None)])
def test_jitter_goes_with_a_threshold(jitter, binarize):
    with pytest.raises(
        ValueError, match=f"jitter is {jitter} with binarize {binarize}: expected 0, or more with thres"
    ):
        DigitsDataModule(jitter=jitter, binarize=binarize)


# Several labels, noise and random splits.


def test_the_random_split_is_a_permutation_by_its_seed():
    for seed in (0, 3):
        data = DigitsDataModule(split="random", split_seed=seed)
        order = np.random.RandomState(seed).permutation(1797)
        for split, part in zip(("train", "val", "test"), np.split(order, [1097, 1397]), strict=True):
            assert np.array_equal(data.indices(split), np.sort(part))


def test_listed_digits_are_labels_of_their_own():
    data, plain = DigitsDataModule(labels=[8, 5, 9]), DigitsDataModule()
    assert (data.classes, data.num_classes) == (["8", "5", "9"], 3)
    for split in ("train", "val", "test"):
        for (image, several), (same, digit) in zip(data.samples(split), plain.samples(split), strict=True):
            assert torch.equal(image, same)
            assert several.tolist() == [int(digit == one) for one in (8, 5, 9)]
    images, labels = next(iter(DigitsDataModule(labels=[8, 5, 9], num_workers=0, batch_size=4).train_dataloader()))
    assert (images.shape, labels.shape, labels.dtype) == ((4, 1, 8, 8), (4, 3), torch.int64)
    assert data.class_counts() == [plain.class_counts()[digit] for digit in (8, 5, 9)]
    assert data.sample_count() == 1077


HAS = {
    "prime": lambda digit: digit > 1 and all(digit % factor for factor in range(2, digit)),
    "multiple of 3": lambda digit: digit % 3 == 0,
    "square": lambda digit: digit in {root * root for root in range(4)},
    "power of 2": lambda digit: digit in {2**exponent for exponent in range(4)},
    "triangular": lambda digit: digit in {n * (n + 1) // 2 for n in range(5)},
    "at least 7": lambda digit: digit >= 7,
}


def test_attributes_overlap_and_each_digit_has_some():
    data, plain = DigitsDataModule(labels="attributes"), DigitsDataModule()
    assert data.classes == list(HAS)
    seen = {}
    for (_, labels), (_, digit) in zip(data.samples("test"), plain.samples("test"), strict=True):
        assert labels.tolist() == [int(has(digit)) for has in HAS.values()]
        seen[digit] = int(labels.sum())
    assert (min(seen.values()), max(seen.values()), len(seen)) == (1, 3, 10)
    assert all(0.25 < count / 1077 < 0.45 for count in data.class_counts())


def test_noise_belongs_to_a_digit_whatever_the_split_the_epoch_and_the_size():
    options = {"noise": 0.6, "split": "random"}
    noise = 0.6 * np.random.default_rng(0).standard_normal((1797, 1, 8, 8))
    expected = torch.from_numpy(load_digits().images[:, None] / 16 + noise).float()
    for seed in (0, 1):
        data = DigitsDataModule(split_seed=seed, **options)
        for split in ("train", "val", "test"):
            images = torch.stack([image for image, _ in data.samples(split)])
            assert torch.equal(images, expected[data.indices(split)])
    assert not torch.equal(DigitsDataModule(noise_seed=1, **options).samples("val")[0][0], data.samples("val")[0][0])
    large, small = DigitsDataModule(image_size=16, **options), DigitsDataModule(**options)
    small.train_in_stages({0: {"image_size": 16}})
    staged = small.train_dataloader().dataset
    for epoch in range(2):
        assert torch.equal(staged[[(epoch, 0, 5)]][0][0], large.samples("train")[5][0])


def test_noisy_images_are_augmented_and_normalised_like_others(tmp_path):
    data = DigitsDataModule(noise=0.6, mean=(0.5,), std=(2.0,), num_workers=0, batch_size=8, drop_last=False)
    batch = images, labels = next(iter(data.val_dataloader()))
    before = images.clone()
    made, same = data.on_after_batch_transfer(batch, 0)
    torch.testing.assert_close(made, (images - 0.5) / 2)
    assert torch.equal(images, before)
    assert torch.equal(labels, same)
    Image.new("L", (8, 8), 255).save(tmp_path / "white.png")
    clean = DigitsDataModule(noise=0.6, mean=(0.5,), std=(2.0,), num_workers=0, predict_root=str(tmp_path))
    (white,) = clean.predict_dataloader()
    assert clean.on_after_batch_transfer(white, 0).unique().tolist() == [0.25]
    seen = []

    class Looks(LightningModule):
        def training_step(self, batch, batch_idx):
            seen.append(batch[0])

        def configure_optimizers(self):
            return None

    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    for options in ({}, {"hflip": 1.0}):
        one = DigitsDataModule(noise=0.6, batch_size=1077, **options)
        Trainer(accelerator="cpu", max_epochs=1, limit_val_batches=0, **quiet).fit(Looks(), datamodule=one)
    assert torch.equal(seen[0].flip(-1), seen[1])


def test_without_noise_or_several_labels_nothing_is_another():
    plain = DigitsDataModule(noise=0.0, noise_seed=5, labels="digit").samples("train")
    assert plain[0][0].dtype == torch.uint8
    assert all(type(label) is int for _, label in plain)


def test_baselines_are_of_the_labels_and_the_noise_at_hand():
    noise, clean, digits = 0.6, load_digits().data, load_digits().target
    noisy = clean + 16 * noise * np.random.default_rng(0).standard_normal((1797, 64))
    for labels in ([8, 5], "digit"):
        data = DigitsDataModule(labels=labels, noise=noise)
        train, test = data.indices("train"), data.indices("test")
        machine = SVC(C=10, gamma=0.001 * clean.var() / (clean.var() + (16 * noise) ** 2))
        wanted = [digits] if labels == "digit" else [digits == digit for digit in labels]
        found = [machine.fit(noisy[train], each[train]).score(noisy[test], each[test]) for each in wanted]
        assert data.baselines() == {"RBF-kernel SVM": pytest.approx(np.mean(found), abs=2e-3)}
    assert 0.5 < found[0] < 0.8  # of ten digits, which is hard, but no guess


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"labels": "digits"}, "labels is 'digits': expected digit, attributes, captions, or a list of different"),
        ({"labels": []}, r"labels is \[\]: expected digit"),
        ({"labels": [1, 10]}, r"labels is \[1, 10\]: expected digit"),
        ({"labels": [1, 1]}, r"labels is \[1, 1\]: expected digit"),
        ({"noise": -0.1}, "noise is -0.1: expected 0 or more, as a share of white"),
        ({"noise": float("nan")}, "noise is nan: expected 0 or more"),
        ({"noise": 0.5, "binarize": "draw"}, "noise is 0.5 with binarize draw: expected 0, or no binarize"),
    ],
)
def test_labels_and_noise_out_of_range_say_what_would_work(options, said):
    with pytest.raises(ValueError, match=said) as error:
        DigitsDataModule(**options)
    assert "\n" not in str(error.value)


def test_several_labels_and_noise_can_be_had_from_the_command_line():
    parser = ArgumentParser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    given = ["--data=datamodules.DigitsDataModule", "--data.labels=[8,5]", "--data.noise=0.6", "--data.split=random"]
    held = parser.parse_args(given).data.init_args
    assert (held.labels, held.noise, held.split) == ([8, 5], 0.6, "random")
    assert parser.parse_args([given[0], "--data.labels=attributes"]).data.init_args.labels == "attributes"
