"""Class counts of the training data, and the balanced order that follows from them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import DigitsDataModule, ImageFolderDataModule, ShapesDetectionDataModule
from datamodules.base import ImageDataModule
from datamodules.loading.labels import counts_of
from zoo.common.classes import label_counts
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
        return len(self.labels)

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
    assert label_counts(data) == (counts, len(samples))


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
    assert label_counts(data) == ([2, 0, 1], 2)


@pytest.mark.parametrize(("labels", "said"), [([0, 1, 3], "from 0 to 3"), ([-1, 0], "from -1 to 0")])
def test_labels_out_of_range_are_refused(labels, said):
    with pytest.raises(ValueError, match=f"labels run {said}: expected numbers from 0 to 2"):
        Tagged(labels, ["a", "b", "c"]).class_counts()
    assert counts_of(np.array([], dtype=int), 2) == [0, 0]


def test_data_without_labels_says_so_in_a_line(tmp_path):
    for number in range(4):
        Image.new("L", (8, 8)).save(tmp_path / f"{number}.png")
    for data in (ImageFolderDataModule(str(tmp_path), 8), ShapesDetectionDataModule()):
        with pytest.raises(ValueError, match=f"^{type(data).__name__} cannot count or balance classes: .*$") as error:
            label_counts(data)
        assert "\n" not in str(error.value)


def test_data_that_counts_nothing_is_named():
    assert not isinstance(object(), CountsLabels)
    for data, name in ((object(), "object"), (None, "no data module")):
        with pytest.raises(ValueError, match=rf"^{name} counts no classes: expected one with class_counts\(\) and"):
            label_counts(data)
