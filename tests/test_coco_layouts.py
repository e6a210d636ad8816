"""COCO data sets as programs export them: folders, names of files, sizes, classes, and splits of nothing."""

import itertools
import json
import logging
import unicodedata
from pathlib import Path

import pytest
import torch
from PIL import Image

from datamodules import CocoDetectionDataModule
from datamodules._lightning import LightningModule, Trainer
from datamodules.reading.images import UnreadableImageError

CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]


def picture(path: Path, width: int = 60, height: int = 40, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(path, **options)
    return path


def written(path: Path, names=("1.png",), categories=None, **more) -> Path:
    """An annotation file with a box for each image."""
    images = [{"id": n, "file_name": name, "width": 60, "height": 40} for n, name in enumerate(names)]
    boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": [5, 5, 20, 10], **more} for n in range(len(names))]
    path.parent.mkdir(parents=True, exist_ok=True)
    what = {"images": images, "annotations": boxes, "categories": categories or CATEGORIES}
    path.write_text(json.dumps(what))
    return path


def dataset(root: Path, *splits: str, **more) -> Path:
    for split in splits:
        written(root / split / "_annotations.coco.json", **more)
        picture(root / split / "1.png")
    return root


def module(root: Path, **options) -> CocoDetectionDataModule:
    small = {"batch_size": 1, "num_workers": 0, "image_size": None, "max_size": None, "hflip": 0.0}
    return CocoDetectionDataModule(str(root), **small | options)


class Still(LightningModule):
    """Takes any batch, learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return self.weight * batch[0].mean()

    def validation_step(self, batch, batch_idx):
        pass

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer() -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return Trainer(accelerator="cpu", max_epochs=1, **quiet)


# Folders.

SPELLINGS = {"train": ("train", "Train", "TRAIN", "training", "Training")}
SPELLINGS |= {"val": ("val", "Val", "valid", "Valid", "validation", "Validation", "eval", "Eval", "evaluation")}
SPELLINGS |= {"test": ("test", "Test", "testing", "TESTING")}
FILES = ("annotations/instances_{}.json", "annotations/{}.json", "{}/_annotations.coco.json", "{}.json")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(("split", "name"), [(split, name) for split, names in SPELLINGS.items() for name in names])
def test_splits_are_found_under_their_usual_names(tmp_path, file, split, name):
    path = written(tmp_path / file.format(name))
    picture(tmp_path / name / "1.png")
    data = module(tmp_path)
    assert data.files == {split: path}
    assert len(data.samples(split)) == 1


FOLDERS = ("images", "Images", "data", "Data", "images/Train", "Images/train", "Data/Train", "TRAIN", "train")


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("file", ["annotations/instances_Train.json", "Annotations/instances_train.json", "Train.json"])
def test_images_are_found_whatever_the_capitals(tmp_path, folder, file):
    written(tmp_path / file)
    picture(tmp_path / folder / "1.png")
    assert len(module(tmp_path).samples("train")) == 1


# Names of images.

NAMES = ["plain.png", "with space.png", "sub/é.png", "größe 100%.png", "日本/語.png", "a+b&c.png", "per%20cent.png"]
WAYS = {
    "as they are": lambda name: name,
    "backslashes": lambda name: name.replace("/", "\\"),
    "escapes": lambda name: name.replace("%", "%25").replace(" ", "%20").replace("é", "%C3%A9").replace("+", "%2B"),
    "composed": lambda name: unicodedata.normalize("NFC", name),
    "decomposed": lambda name: unicodedata.normalize("NFD", name),
    "backslashes, decomposed": lambda name: unicodedata.normalize("NFD", name.replace("/", "\\")),
}


@pytest.mark.parametrize(("on_disk", "in_json"), list(itertools.product(("composed", "decomposed"), WAYS)))
def test_images_are_found_however_their_names_are_written(tmp_path, on_disk, in_json):
    for number, name in enumerate(NAMES):
        path = picture(tmp_path / "train" / WAYS[on_disk](name), 60, 40)
        Image.new("RGB", (60, 40), (number, 0, 0)).save(path)
    written(tmp_path / "train.json", [WAYS[in_json](name) for name in NAMES])
    samples = module(tmp_path).samples("train")
    assert [int(samples[n][0][0, 0, 0]) for n in range(len(NAMES))] == list(range(len(NAMES)))


def test_a_file_of_exactly_the_name_comes_first(tmp_path):
    for level, name in enumerate(("a%20b.png", "a b.png")):
        Image.new("RGB", (60, 40), (level, 0, 0)).save(picture(tmp_path / "train" / name))
    written(tmp_path / "train.json", ["a%20b.png", "a b.png"])
    samples = module(tmp_path).samples("train")
    assert [int(samples[n][0].max()) for n in range(2)] == [0, 1]


def test_names_that_are_not_there_are_named_as_they_are_written(tmp_path):
    written(tmp_path / "train.json", ["a.png", "sub\\b.png"])
    picture(tmp_path / "train" / "a.png")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images of .*train.json are not in .*train: sub\\b.png$"):
        module(tmp_path).samples("train")
    picture(tmp_path / "train" / "b.png")
    with pytest.raises(FileNotFoundError, match=r"b.png is there without its folder"):
        module(tmp_path).samples("train")


# Sizes.


@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_swapped_sides_are_told_with_advice_for_either_cause(tmp_path, orientation):
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    turned = orientation in (6, 8)
    written(tmp_path / "train.json")
    picture(tmp_path / "train" / "1.png", *((60, 40) if turned else (40, 60)), exif=exif)
    with pytest.raises(UnreadableImageError, match="1.png is 40x60 pixels, but 60x40 in .* its sides are swapped") as e:
        module(tmp_path).samples("train")[0]
    assert ("exchange width and height in the annotations, and leave the image as it is" in str(e.value)) == turned
    assert ("no EXIF orientation says why" in str(e.value)) == (not turned)
    assert "\n" not in str(e.value)


# Classes.


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (("fish", "fish", "trap"), ["fish (0)", "fish (1)", "trap"]),
        (("fish", "trap", "fish"), ["fish (0)", "trap", "fish (2)"]),
        (("é", "e\u0301"), ["é (0)", "é (1)"]),
        (("e\u0301",), ["é"]),
    ],
)
def test_categories_of_one_name_are_told_apart(tmp_path, recwarn, names, classes):
    categories = [{"id": n, "name": name} for n, name in enumerate(names)]
    dataset(tmp_path, "train", "valid", categories=categories, category_id=0)
    data = module(tmp_path)
    assert data.classes == classes
    said = [warning for warning in recwarn if "several categories called" in str(warning.message)]
    assert len(said) == (len(names) > 1)
    trainer().fit(Still(), datamodule=data)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_unicode_forms_of_a_name_are_one_class(tmp_path, form):
    dataset(tmp_path, "train", categories=[{"id": 1, "name": "café"}])
    dataset(tmp_path, "valid", categories=[{"id": 1, "name": unicodedata.normalize(form, "café")}])
    assert len(module(tmp_path).samples("val")) == 1


# Splits of nothing.


@pytest.mark.parametrize("annotations", [[], None])
@pytest.mark.parametrize("categories", [CATEGORIES, []])
def test_a_test_split_of_no_images_is_none(tmp_path, annotations, categories):
    dataset(tmp_path, "train", "valid")
    what = {"images": [], "annotations": annotations, "categories": categories}
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "_annotations.coco.json").write_text(
        json.dumps({key: value for key, value in what.items() if value is not None})
    )
    data = module(tmp_path)
    trainer().fit(Still(), datamodule=data)
    assert data.samples("test") is None
    with pytest.raises(ValueError, match="CocoDetectionDataModule has no test samples"):
        trainer().test(Still(), datamodule=data)


@pytest.mark.parametrize("wrong", ["broken", "missing", "other"])
def test_a_test_split_is_looked_at_before_training(tmp_path, wrong):
    dataset(tmp_path, "train", "valid", "test")
    file = tmp_path / "test" / "_annotations.coco.json"
    if wrong == "broken":
        file.write_text("{")
    elif wrong == "missing":
        (tmp_path / "test" / "1.png").unlink()
    else:
        written(file, categories=[{"id": 1, "name": "cow"}])
    with pytest.raises((ValueError, FileNotFoundError), match="test/_annotations.coco.json"):
        trainer().fit(Still(), datamodule=module(tmp_path))


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("kind", ["crowds alone", "no boxes", "boxes"])
def test_an_evaluation_of_crowds_alone_is_told(tmp_path, recwarn, split, kind):
    dataset(tmp_path, "train", "val", "test")
    more = {"crowds alone": {"iscrowd": 1}, "no boxes": {"category_id": 2}, "boxes": {}}[kind]
    dataset(tmp_path, split, **more)
    module(tmp_path, category_ids=[1]).setup("fit")
    said = [str(warning.message) for warning in recwarn if "average precision" in str(warning.message)]
    assert len(said) == (kind != "boxes")
    assert all(f"has {kind} of cat: average precision of {split} is undefined" in line for line in said)


def test_what_was_taken_is_said_in_a_line(tmp_path, caplog):
    dataset(tmp_path, "Training", "eval")
    with caplog.at_level(logging.INFO):
        module(tmp_path).setup("fit")
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("data: ")]
    assert line == (
        f"data: train 1 images of {tmp_path}/Training/_annotations.coco.json, val 1 images of "
        f"{tmp_path}/eval/_annotations.coco.json, test none"
    )
