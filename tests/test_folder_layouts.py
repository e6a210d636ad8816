"""Folders of images as people name and nest them: what is taken, as what, and what is said about the rest."""

import logging
import unicodedata
import warnings
from pathlib import Path

import pytest
from PIL import Image

from datamodules import ImageFolderDataModule

SPELLINGS = {"train": ("train", "Train", "TRAIN", "training", "Training")}
SPELLINGS |= {"val": ("val", "Valid", "validation", "eval", "Eval", "Evaluation")}
SPELLINGS |= {"test": ("test", "Test", "testing", "Testing")}


def tree(root: Path, *files: str) -> Path:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (12, 12)).save(path)
    return root


def module(root: Path, **options) -> ImageFolderDataModule:
    return ImageFolderDataModule(str(root), image_size=12, num_workers=0, batch_size=1, **options)


def said(data: ImageFolderDataModule, caplog, stage: str = "fit") -> str:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        data.setup(stage)
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("data: ")]
    assert "\n" not in line
    return line.removeprefix(f"data: {data.root}: ")


@pytest.mark.parametrize("train", SPELLINGS["train"])
@pytest.mark.parametrize(("split", "name"), [(s, name) for s in ("val", "test") for name in SPELLINGS[s]])
@pytest.mark.parametrize("labelled", [True, False])
def test_splits_are_recognised_under_their_usual_names(tmp_path, caplog, train, split, name, labelled):
    deep = "cat/" if labelled else ""
    tree(tmp_path, f"{train}/{deep}1.png", f"{train}/{deep}2.png", f"{name}/{deep}3.png")
    data = module(tmp_path)
    assert data.classes == (["cat"] if labelled else None)
    assert list(data.samples(split).names) == [f"{name}/{deep}3.png"]
    assert f"{split} 1 images ({name})" in said(data, caplog)


@pytest.mark.parametrize("names", [("train_set", "test_set"), ("train2017", "val2017"), ("Train-data", "holdout")])
def test_splits_under_names_of_their_own_are_told(tmp_path, names):
    tree(tmp_path, *[f"{name}/cat/1.png" for name in names])
    with pytest.warns(
        UserWarning, match=f"{', '.join(sorted(names))} are taken for classes: if they are splits, call them tr"
    ):
        assert module(tmp_path).classes == sorted(names)


@pytest.mark.parametrize("names", [("trains", "planes"), ("valley", "hill"), ("cat", "dog"), ("testudo", "cat")])
def test_classes_that_begin_alike_are_classes(tmp_path, names):
    tree(tmp_path, *[f"{name}/1.png" for name in names])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module(tmp_path).classes == sorted(names)


@pytest.mark.parametrize("splits", [("train", "test"), ("Training", "Testing"), ("train",), ("valid", "test")])
def test_splits_one_folder_too_deep_are_named(tmp_path, splits):
    tree(tmp_path, *[f"pets/{split}/{name}/1.png" for split in splits for name in ("cat", "dog")])
    with pytest.raises(ValueError, match=r"holds one folder, pets, and the splits lie in it .*set root to .*/pets$"):
        module(tmp_path)
    assert module(tmp_path / "pets").classes == ["cat", "dog"]


@pytest.mark.parametrize("start", ["", "train/", "Training/"])
def test_classes_one_folder_too_deep_are_named(tmp_path, start):
    tree(tmp_path, f"{start}images/cat/1.png", f"{start}images/dog/1.png")
    with pytest.warns(UserWarning, match=r"one folder, images, .* 2 folders are the classes \(cat, dog\)"):
        assert module(tmp_path).classes == ["images"]


def test_one_class_is_one_class(tmp_path):
    tree(tmp_path, "cat/1.png", "cat/more/2.png", "cat/other/3.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module(tmp_path).classes == ["cat"]


def test_what_was_taken_and_left_out_is_said(tmp_path, caplog):
    train = [f"train/{name}/{n}.png" for name in ("cat", "dog") for n in range(10)]
    tree(tmp_path, *train, "extra/cat/1.png", "dev/dog/1.png", "stray.png")
    assert said(module(tmp_path), caplog) == (
        "train 16 images (train), val 2 images (held out of train), test 2 images (held out of train); 2 classes; left "
        "out: dev/, extra/, stray.png"
    )
    tree(tmp_path, "eval/cat/1.png")
    assert said(module(tmp_path), caplog).startswith("train 20 images (train), val 1 images (eval), test none; 2 class")
    assert said(module(tmp_path), caplog, "validate").startswith("val 1 images (eval); 2 classes")
    flat = tree(tmp_path / "flat", *[f"{name}/{n}.png" for name in "ab" for n in range(10)])
    assert said(module(flat), caplog).startswith("train 16 images (in class folders), val 2 images (held out of train)")
    bare = tree(tmp_path / "bare", *[f"{n}.png" for n in range(10)])
    assert said(module(bare), caplog).startswith("train 8 images (without class folders), val 1 images (held out of")


@pytest.mark.parametrize("inside", [None, "cat", "cat/deep", "notes.txt"])
@pytest.mark.parametrize("name", ["test", "Testing"])
def test_an_empty_test_folder_is_none(tmp_path, caplog, inside, name):
    tree(tmp_path, *[f"{split}/{animal}/1.png" for split in ("train", "val") for animal in ("cat", "dog")])
    (tmp_path / name).mkdir()
    if inside == "notes.txt":
        (tmp_path / name / inside).touch()
    elif inside:
        (tmp_path / name / inside).mkdir(parents=True)
    data = module(tmp_path)
    assert data.samples("test") is None
    assert data.samples("predict") is None
    assert said(data, caplog) == f"train 2 images (train), val 2 images (val), test none; 2 classes; left out: {name}/"


def test_a_test_folder_is_looked_at_before_training(tmp_path):
    tree(tmp_path, "train/cat/1.png", "train/dog/1.png", "val/cat/1.png", "test/cat/1.png")
    (tmp_path / "test" / "dog").mkdir()
    with pytest.raises(ValueError, match="class folder .*test/dog holds no images"):
        module(tmp_path).setup("fit")


@pytest.mark.parametrize("train", ["NFC", "NFD"])
@pytest.mark.parametrize("val", ["NFC", "NFD"])
def test_unicode_forms_of_a_class_are_one_class(tmp_path, train, val):
    first, second = (unicodedata.normalize(form, "café") for form in (train, val))
    tree(tmp_path, f"train/{first}/1.png", "train/tea/1.png", f"val/{second}/1.png")
    data = module(tmp_path)
    assert data.classes == ["café", "tea"]
    assert data.samples("val")[0][1] == 0
    tree(tmp_path, f"train/{second}/2.png")  # two folders of one name, if the forms differ
    assert [label for _, label in map(module(tmp_path).samples("train").__getitem__, range(3))] == [0, 0, 1]
