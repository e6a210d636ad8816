"""Rows of digits: what is written is what is answered, no test digit is seen in training, and lengths held out are."""

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from datamodules import DigitRowsDataModule, DigitsDataModule
from datamodules.digit_samples import WORDS, scanned
from datamodules.loading.any_size import FlatImages
from datamodules.preprocessing import create
from zoo.common.conversations import read
from zoo.common.data_protocols import HasCaptions, HasImageShape, HasSubsets, StatesPreprocessing

FEW: dict[str, Any] = {"train_size": 60, "val_size": 10, "test_size": 20, "batch_size": 10}


def rows(**options: Any) -> DigitRowsDataModule:
    return DigitRowsDataModule(**FEW | options)


def scan_numbers(data: DigitRowsDataModule, image: torch.Tensor) -> list[set[int]]:
    """Which of the 1,797 digits stand in an image, one after the other; a scan may be there twice."""
    side = data.digit_size
    every, _ = data._digits
    by_pixels: dict[bytes, set[int]] = {}
    for number, digit in enumerate(every):
        by_pixels.setdefault(digit.numpy().tobytes(), set()).add(number)
    columns = image[0].sum(0).nonzero().flatten()
    for start in range(side):  # of the first digit, whose own edge may be black
        first = int(columns[0]) - start
        cut = [image[:, :, left : left + side].contiguous() for left in range(first, int(columns[-1]) + 1, side)]
        if first >= 0 and all(part.numpy().tobytes() in by_pixels for part in cut):
            return [by_pixels[part.numpy().tobytes()] for part in cut]
    raise AssertionError("no digits")


@pytest.mark.parametrize("any_size", [False, True])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_row_shows_the_digits_of_its_answer_which_are_of_its_split(split, any_size):
    data = rows(any_size=any_size)
    samples, labels = data.samples(split), scanned()[1]
    own = {*DigitsDataModule().indices(split).tolist()}
    torch.manual_seed(0)
    for index in range(0, len(samples), 3):
        image, said = samples[index]
        numbers = scan_numbers(data, image)
        ((prompt, answer),) = said["turns"]
        assert prompt == "<image> which digits, from left to right?"
        assert answer.split() == [WORDS[labels[min(each)]] for each in numbers]
        assert all(each & own for each in numbers)
        assert said["kind"] == f"{WORDS[len(numbers)]} digit{'s' if len(numbers) > 1 else ''}"
        assert image.shape == (1, 16, 16 * (len(numbers) if any_size else 5))
        assert said["name"] == f"rows/{split}/{index}"
        assert ("subset" in said) == (split != "train")


def test_digits_of_splits_are_apart():
    data = DigitRowsDataModule(train_size=1, val_size=1, test_size=1)
    shown = {split: {d.numpy().tobytes() for d in data.samples(split).digits} for split in ("train", "val", "test")}
    assert [len(data.samples(split).digits) for split in shown] == [1077, 180, 540]
    assert not shown["train"] & shown["test"]
    assert not shown["train"] & shown["val"]
    other = DigitRowsDataModule(split="random", split_seed=3).samples("test")
    assert len(other.digits) == 400


def test_lengths_come_equally_often_and_those_held_out_in_evaluation_alone():
    data = rows(unseen_lengths=[2, 4], test_size=30)
    assert data.subsets == ("seen", "unseen")
    assert Counter(data.samples("train").lengths) == {1: 20, 3: 20, 5: 20}
    test = data.samples("test")
    found = Counter((said["subset"], said["kind"]) for _, said in test)
    seen = {(0, kind): 10 for kind in ("one digit", "three digits", "five digits")}
    assert found == seen | {(1, "two digits"): 15, (1, "four digits"): 15}
    plain = rows(test_size=30)
    assert plain.subsets == ("seen",)
    assert {said["subset"] for _, said in plain.samples("test")} == {0}
    assert {*Counter(rows(lengths=(2, 3)).samples("train").lengths)} == {2, 3}


def test_evaluation_is_the_same_in_every_run_and_training_is_drawn_anew():
    first, again, other = (rows(rows_seed=seed).samples("test") for seed in (0, 0, 1))
    for (image, said), (same, told) in zip(first, again, strict=True):
        assert torch.equal(image, same)
        assert said == told
    assert [said for _, said in first] != [said for _, said in other]
    assert [said for _, said in first][:10] != [said for _, said in rows().samples("val")]
    longer = rows(test_size=40).samples("test")
    assert [said for _, said in longer][:20] == [said for _, said in first]
    loader = rows().train_dataloader()
    epochs = []
    for epoch in (0, 0, 1):
        loader.sampler.set_epoch(epoch)
        epochs.append([entry["turns"] for _, said in loader for entry in said])
    assert epochs[0] == epochs[1] != epochs[2]


def test_a_row_lies_anywhere_on_its_canvas():
    lefts = [int(image[0].sum(0).nonzero()[0]) for image, said in rows(lengths=(1, 5), test_size=200).samples("test")]
    assert len({*lefts[::5]}) > 20  # of those of one digit
    assert max(lefts[4::5]) < 8  # of five, which fill it


@pytest.mark.parametrize("any_size", [False, True])
def test_batches_are_read_and_workers_change_nothing(any_size):
    alone, helped = (list(rows(any_size=any_size, num_workers=count).train_dataloader()) for count in (0, 2))
    data = rows(any_size=any_size)
    for (images, said), (others, told) in zip(alone, helped, strict=True):
        assert said == told
        assert all(torch.equal(a, b) for a, b in zip(images, others, strict=True))
        assert isinstance(images, FlatImages) == any_size
        found = read(data.on_after_batch_transfer((images, said), 0))
        assert found.counts == [1] * 10
        assert {*found.kinds} <= {"one digit", "two digits", "three digits", "four digits", "five digits"}
        if any_size:
            assert [image.shape[2] // 16 for image in found.images] == [
                len(answer.split()) for ((_, answer),) in found.turns
            ]
        else:
            assert found.images.shape == (10, 1, 16, 80)
            torch.testing.assert_close(found.images, (images / 255 - 0.306) / 0.376)


def test_it_is_what_modules_ask_of_data():
    data = rows()
    for protocol in (HasCaptions, HasImageShape, HasSubsets, StatesPreprocessing):
        assert isinstance(data, protocol)
    assert data.image_shape == (1, 16, 80)
    assert rows(any_size=True, digit_size=8).image_shape is None
    assert rows(lengths=(1, 3), digit_size=8).image_shape == (1, 8, 24)
    spoken = {
        word for split in ("train", "test") for _, said in data.samples(split) for word in said["turns"][0][1].split()
    }
    assert spoken <= {*data.captions()}
    assert data.sample_count() == 60
    assert rows(val_size=0).val_dataloader() == []
    for options in ({}, {"any_size": True}):
        made = rows(**options)
        image = made.samples("test")[4][0]
        stated = create(made.preprocessing())
        found = stated.to_float(stated.collate([stated.read(image)]))[0]
        torch.testing.assert_close(found, made.on_after_batch_transfer(image[None], 0)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"digit_size": 0}, "digit_size is 0: expected at least 1"),
        ({"lengths": (0, 3)}, "lengths is (0, 3): expected two, 1 <= low <= high <= 9"),
        ({"lengths": (1, 10)}, "lengths is (1, 10): expected two"),
        ({"unseen_lengths": [6]}, "unseen_lengths is [6]: expected some of 1 to 5, and not all"),
        ({"lengths": (2, 2), "unseen_lengths": [2]}, "unseen_lengths is [2]: expected some of 2 to 2, and not all"),
        ({"split": "some"}, "unknown split 'some': expected one of stratified"),
        ({"split": "digits8x8-bin-v1", "split_seed": 1}, "split_seed is 1, but digits8x8-bin-v1 is one split"),
        ({"test_size": -1}, "test_size is -1: expected 0 to "),
        ({"rows_seed": -1}, "rows_seed is -1: expected 0 or more"),
        ({"hflip": 0.1}, "hflip is 0.1: expected 0, since digits are read from left to right"),
    ],
    ids=str,
)
def test_rows_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rows(**options)


def test_the_pixels_of_rows_are_of_the_digits_mean():
    images = [image for image, _ in rows(any_size=True, digit_size=8).samples("test")]
    pixels = torch.cat([image.flatten() for image in images]).numpy() / 255
    assert np.mean(pixels) == pytest.approx(0.306, abs=0.02)
    assert np.std(pixels) == pytest.approx(0.376, abs=0.02)
