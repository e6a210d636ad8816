"""The bundled digits: a fixed split, real pixels, and a network that learns them."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from datamodules import DigitsDataModule


def test_the_split_is_the_published_one():
    data = DigitsDataModule()
    indices = {split: data.indices(split) for split in ("train", "val", "test")}
    assert {split: len(found) for split, found in indices.items()} == {"train": 1077, "val": 180, "test": 540}
    assert sorted(np.concatenate(list(indices.values()))) == list(range(1797))
    checksum = hashlib.sha256(b"".join(indices[split].astype("<i8").tobytes() for split in ("train", "val", "test")))
    assert checksum.hexdigest()[:16] == "afb63045bfd1fe34"


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
