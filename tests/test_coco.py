"""COCO files: read, refused, and written. Every file is made here."""

import gc
import json
import os
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import CocoDetectionDataModule, ShapesDetectionDataModule
from datamodules._lightning import LightningModule, Trainer
from datamodules.coco import export_coco
from datamodules.reading.annotations import Annotations, read
from datamodules.reading.images import UnreadableImageError

CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}, {"id": 7, "name": "train"}]


def picture(path: Path, width: int = 60, height: int = 40, mode: str = "RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (width, height)).save(path, **options)
    return path


def image(number: int, name: str | None = None, width: int = 60, height: int = 40) -> dict:
    return {"id": number, "file_name": name or f"{number}.png", "width": width, "height": height}


def box(number: int, image_id: int, category: int = 3, bbox=(10, 5, 20, 10), **more) -> dict:
    return {"id": number, "image_id": image_id, "category_id": category, "bbox": list(bbox), **more}


def content(images=None, annotations=None, categories=None) -> dict:
    """Three images; the first has a car and a dog, the second nothing, the third a crowd of cars."""
    return {
        "images": [image(11), image(12), image(13)] if images is None else images,
        "annotations": [box(3, 13, iscrowd=1), box(1, 11, area=77.5), box(2, 11, 18, (0, 0, 60, 40))]
        if annotations is None
        else annotations,
        "categories": CATEGORIES if categories is None else categories,
    }


def written(path: Path, what) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(what if isinstance(what, str) else json.dumps(what))
    return path


def dataset(root: Path, split: str = "train", what: dict | None = None) -> Path:
    """COCO's own layout: annotations/instances_train2017.json and train2017/*.png."""
    what = what or content()
    written(root / "annotations" / f"instances_{split}2017.json", what)
    for entry in what["images"]:
        path = root / f"{split}2017" / entry["file_name"]
        if not path.exists():
            picture(path, entry.get("width", 60), entry.get("height", 40))
    return root


def module(root: Path, **options) -> CocoDetectionDataModule:
    small = {"batch_size": 2, "num_workers": 0, "image_size": None, "max_size": None, "hflip": 0.0}
    return CocoDetectionDataModule(str(root), **small | options)


def targets(data: CocoDetectionDataModule, split: str = "val") -> list[dict]:
    samples = data.samples(split)
    return [samples[index][1] for index in range(len(samples))]


class Still(LightningModule):
    """Takes any batch, learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[int] = []

    def training_step(self, batch, batch_idx):
        self.seen += [target["image_id"] for target in batch[1]]
        return self.weight * batch[0].mean()

    def validation_step(self, batch, batch_idx):
        assert batch[0].dtype == torch.float32

    predict_step = test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(**options) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return Trainer(accelerator="cpu", **{"max_epochs": 1} | quiet | options)


# What is read.


def test_boxes_labels_and_the_rest_as_the_file_says(tmp_path):
    data = module(dataset(dataset(tmp_path), "val"))
    assert (data.classes, data.category_ids, data.num_classes) == (["car", "train", "dog"], [3, 7, 18], 3)
    assert data.size_ranges is None
    first, empty, crowd = targets(data)
    assert first["boxes"].tolist() == [[10, 5, 30, 15], [0, 0, 60, 40]]
    assert first["labels"].tolist() == [0, 2]
    assert first["iscrowd"].tolist() == [False, False]
    assert first["area"].tolist() == [77.5, 2400]  # of the segmentation where it is given, of the box where it is not
    assert (first["image_id"], first["size"], first["orig_size"]) == (11, (40, 60), (40, 60))
    assert crowd["iscrowd"].tolist() == [True]
    for key, dtype in (("boxes", "float32"), ("labels", "int64"), ("iscrowd", "bool"), ("area", "float32")):
        assert empty[key].dtype == first[key].dtype == getattr(torch, dtype)
        assert empty[key].shape == ((0, 4) if key == "boxes" else (0,))


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_train2017.json", "images/train2017"),
        ("annotations/train.json", "train"),
        ("annotations/train.json", "images"),
        ("train/_annotations.coco.json", "train"),
        ("train/annotations.json", "train/images"),
        ("train.json", "train"),
        ("train.json", "images"),
        ("train.json", "."),
    ],
)
def test_usual_layouts_are_found(tmp_path, file, folder):
    written(tmp_path / file, content([image(1)], []))
    picture(tmp_path / folder / "1.png")
    data = module(tmp_path, val_annotations=file)
    assert len(data.samples("val")) == 1
    assert data.samples("train") is None  # what is given is all there is
    assert module(tmp_path).files == {"train": tmp_path / file}


def test_files_and_folders_can_be_given(tmp_path):
    written(tmp_path / "a" / "mine.json", content([image(1, "deep/1.png")], [box(1, 1)]))
    picture(tmp_path / "b" / "deep" / "1.png")
    data = module(tmp_path, train_annotations="a/mine.json", train_images="b")
    elsewhere = module(Path("."), train_annotations=str(tmp_path / "a/mine.json"), train_images=str(tmp_path / "b"))
    assert len(targets(data, "train")) == len(targets(elsewhere, "train")) == 1
    with pytest.raises(
        FileNotFoundError, match=r"deep/1.png, the first image of .*mine.json, is in none of .*set train_i"
    ):
        module(tmp_path, train_annotations="a/mine.json").samples("train")
    with pytest.raises(FileNotFoundError, match=r"c: no such folder; train_images has to be one"):
        module(tmp_path, train_annotations="a/mine.json", train_images="c").samples("train")


def test_two_files_for_one_split_have_to_be_told_apart(tmp_path):
    dataset(tmp_path)
    written(tmp_path / "annotations" / "instances_train2014.json", content())
    with pytest.raises(ValueError, match=r"train2014.json and .*train2017.json: say which is train_annotations"):
        module(tmp_path)


def test_a_root_without_annotations_says_what_was_looked_for(tmp_path):
    picture(tmp_path / "cat" / "1.png")
    with pytest.raises(
        FileNotFoundError, match=r"looked for annotations/instances_train\*.json, .* it holds 1 folder.s. .cat"
    ):
        module(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere has no annotations: .*; there is no such folder"):
        module(tmp_path / "nowhere")


def test_some_categories_can_be_chosen(tmp_path):
    data = module(dataset(dataset(tmp_path), "val"), category_ids=[18, 3])
    assert (data.classes, data.category_ids) == (["car", "dog"], [3, 18])
    assert targets(data)[0]["labels"].tolist() == [0, 1]
    only = module(tmp_path, category_ids=[18])
    assert [target["labels"].tolist() for target in targets(only)] == [[0], [], []]
    assert [len(target["boxes"]) for target in targets(only)] == [1, 0, 0]
    with pytest.raises(ValueError, match=r"category_ids has \[5\]: .* has 3 \(car\), 7 \(train\), 18 \(dog\)"):
        module(tmp_path, category_ids=[3, 5])
    with pytest.raises(ValueError, match="category_ids is empty"):
        module(tmp_path, category_ids=[])
    with pytest.raises(ValueError, match=r"has no boxes of train to train on: set category_ids to others, or to null"):
        module(tmp_path, category_ids=[7]).samples("train")


def test_images_without_boxes_are_kept_unless_training_drops_them(tmp_path):
    dataset(dataset(tmp_path), "val")
    assert [t["image_id"] for t in targets(module(tmp_path), "train")] == [11, 12, 13]
    data = module(tmp_path, keep_empty=False)
    (kept,) = targets(data, "train")  # a crowd alone is nothing to find either
    assert (kept["image_id"], kept["labels"].tolist()) == (11, [0, 2])
    assert [t["image_id"] for t in targets(data, "val")] == [11, 12, 13]


def test_only_some_images_keep_their_own_boxes(tmp_path):
    annotations = [box(n, image_id, bbox=(n, 1, 5, 5)) for n, image_id in enumerate([4, 2, 4, 1, 4])]
    file = written(tmp_path / "a.json", content([image(n) for n in range(1, 6)], annotations))
    some = read(file).not_empty()
    assert some.image_ids.tolist() == [1, 2, 4]
    assert some.names.tolist() == ["1.png", "2.png", "4.png"]
    assert some.offsets.tolist() == [0, 1, 2, 5]
    assert some.boxes[:, 0].tolist() == [3, 1, 0, 2, 4]


# Boxes that are no boxes.


def test_boxes_without_extent_are_dropped_counted_and_named_once(tmp_path):
    images = [image(n) for n in range(1, 9)]
    odd = [(5, 5, 0, 9), (5, 5, 9, 0), (5, 5, -3, 9), (5, 5, float("nan"), 4), (float("inf"), 5, 3, 4), (5, 5, -1, -1)]
    bad = [box(n, n, bbox=bbox) for n, bbox in enumerate(odd, start=1)]
    good = [box(100, 1), box(101, 8)]
    dataset(dataset(tmp_path, "train", content(images, bad + good)), "val", content(images, good))
    with pytest.warns(UserWarning, match="boxes") as caught:
        data = module(tmp_path)
    (said,) = (str(warning.message) for warning in caught if "boxes that are left out" in str(warning.message))
    assert "6 without width or height, or not finite, in 1.png, 2.png, 3.png, 4.png, 5.png, ..." in said
    assert "instances_train2017.json" in said
    assert [len(target["boxes"]) for target in targets(data, "train")] == [1, 0, 0, 0, 0, 0, 0, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        targets(data, "val")


def test_boxes_partly_outside_are_clamped_and_dropped_below_a_pixel(tmp_path):
    boxes = [(-10, -10, 30, 20), (50, 30, 100, 100), (59.5, 0, 40, 40), (200, 0, 10, 10), (10, 10, 0.5, 0.25)]
    dataset(tmp_path, "val", content([image(1)], [box(n, 1, bbox=bbox, area=n + 1) for n, bbox in enumerate(boxes)]))
    with pytest.warns(UserWarning, match=r"left out: 2 outside their image, in 1.png"):
        (target,) = targets(module(tmp_path))
    assert target["boxes"].tolist() == [[0, 0, 20, 10], [50, 30, 60, 40], [10, 10, 10.5, 10.25]]
    assert target["area"].tolist() == [1, 2, 5]  # small ones inside stay: evaluation counts them


def test_annotations_of_images_that_are_not_listed(tmp_path):
    file = written(
        tmp_path / "a.json",
        content([image(1)], [box(1, 1), box(2, 99, bbox=(90, 90, 5, 5)), box(3, 98, bbox=(1, 1, 0, 0))]),
    )
    with pytest.warns(
        UserWarning, match=r"a.json has boxes that are left out: 2 of images that the file does not list"
    ):
        assert len(read(file).boxes) == 1
    written(file, content([image(1)], [box(1, 98), box(2, 99)]))
    with pytest.raises(ValueError, match=r"no annotation belongs to one of the images: the first has image_id 98"):
        read(file)


# Files that are no COCO files.

EXPECTED = r": expected a COCO file, \{\"images\": \[...\], \"annotations\": \[...\], \"categories\": \[...\]\}"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("", r"a.json is empty" + EXPECTED),
        ('{"images": [{"id": 1, "fi', r"a.json is truncated, or no JSON at all \(.* column .*\)" + EXPECTED),
        ("not json", r"a.json is truncated, or no JSON at all"),
        (
            [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}],
            r"a.json is a results file, a list of 1 detections" + EXPECTED,
        ),
        ([1, 2], r"a.json is a list of 2" + EXPECTED),
        ("7", r"a.json holds int" + EXPECTED),
        ({"info": {}, "images": []}, r"a.json has no annotations and no categories, but info, images" + EXPECTED),
        ({}, r"a.json has no images and no annotations and no categories, but nothing"),
        (content() | {"images": {"1": 2}}, r"a.json: images is no list of objects"),
        (content() | {"annotations": [1]}, r"a.json: annotations is no list of objects"),
        (content(images=[]), r"a.json has no images: its list is empty"),
        (content(categories=[]), r"a.json has no categories: its list is empty"),
        (content(images=[{"id": 1}]), r"image 1 has no file_name: expected a text"),
        (content(images=[{"file_name": "1.png"}]), r"image number 0 has no id: expected an integer"),
        (content(images=[image("one")]), r"image number 0 has the id 'one': expected an integer"),
        (content(images=[image(1), image(2), image(1)]), r"1 ids of images come more than once: 1"),
        (content(categories=[{"id": 1}]), r"category 1 has no name: expected a text"),
        (content(categories=[*CATEGORIES, CATEGORIES[0]]), r"1 ids of categories come more than once: 18"),
        (
            content(annotations=[box(5, 11), box(6, 11), box(5, 12), box(6, 12), box(7, 12)]),
            r"2 ids of annotations come more than once: 5, 6",
        ),
        (
            content(annotations=[box(5, 11), box(42, 11, 90)]),
            r"1 annotations have a category_id that is not in categories, the first 42 with 90; there is 3, 7, 18",
        ),
        (content(annotations=[box(5, 11, "car")]), r"annotation 5 has the category_id 'car': expected an integer"),
        (content(annotations=[{"id": 5, "category_id": 3, "bbox": [1, 1, 2, 2]}]), r"annotation 5 has no image_id"),
        (
            content(annotations=[box(5, 11, bbox=(1, 2, 3))]),
            r"annotation 5 has the bbox \[1, 2, 3\]: expected 4 numbers, x, y, width, height",
        ),
        (content(annotations=[box(5, 11, bbox=(1, 2, 3, "x"))]), r"annotation 5 has the bbox .*expected 4 numbers"),
        (
            content(annotations=[{"image_id": 11, "category_id": 3}]),
            r"none of its 1 annotations has a bbox, the first is number 0",
        ),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, what, message):
    written(tmp_path / "a.json", what)
    with pytest.raises(ValueError, match=message) as caught:
        module(tmp_path, train_annotations="a.json")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "a.json") in str(caught.value)


def test_missing_annotation_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a.json: no such file; expected a COCO file"):
        module(tmp_path, train_annotations="a.json")
    with pytest.raises(ValueError, match=r"is a folder: expected a COCO file"):
        module(tmp_path.parent, train_annotations=tmp_path.name)


def test_annotation_ids_iscrowd_area_and_sizes_may_be_missing(tmp_path):
    bare = {"image_id": 1, "category_id": 3, "bbox": [1.5, 2, 3, 4]}
    null = {**bare, "id": None, "area": None, "iscrowd": None}
    del null["id"]
    dataset(tmp_path, "train", content([{"id": 1, "file_name": "1.png"}], [bare, null]))
    data = module(tmp_path, group_by_aspect=False)
    (target,) = targets(data, "train")
    assert target["area"].tolist() == [12, 12]
    assert target["iscrowd"].tolist() == [False, False]
    with pytest.raises(ValueError, match=r"group_by_aspect: the training data does not say the sizes"):
        module(tmp_path, batch_size=1).train_dataloader()


def test_what_files_say_about_categories_has_to_agree(tmp_path):
    dataset(tmp_path)
    other = [{"id": 3, "name": "cat"}, *CATEGORIES[::2]]
    dataset(tmp_path, "val", content(categories=other))
    with pytest.raises(ValueError, match=r"instances_val2017.json: category 3 is cat, but is car in .*train2017.json"):
        module(tmp_path).samples("val")
    more = [*CATEGORIES, {"id": 44, "name": "bottle"}]
    dataset(tmp_path, "val", content(categories=more, annotations=[box(1, 11, 44)]))
    with pytest.raises(ValueError, match=r"category 44 is bottle, but is missing in .*train2017.json"):
        module(tmp_path).samples("val")
    dataset(tmp_path, "val", content(categories=more))  # one that no box has does no harm, nor one that is not there
    assert targets(module(tmp_path))[0]["labels"].tolist() == [0, 2]
    dataset(tmp_path, "val", content(categories=CATEGORIES[:2]))
    assert targets(module(tmp_path))[0]["labels"].tolist() == [0, 2]


# Images.


def test_missing_images_are_named_before_anything_starts(tmp_path):
    what = content([image(n) for n in range(1, 9)], [box(1, 1)])
    dataset(tmp_path, "train", what)
    for number in range(2, 9):
        (tmp_path / "train2017" / f"{number}.png").unlink()
    data = module(tmp_path)
    message = r"7 of 8 images of .*_train2017.json are not in .*train2017: 2.png, 3.png, 4.png, 5.png, 6.png, \.\.\.$"
    with pytest.raises(FileNotFoundError, match=message):
        data.setup("fit")
    with pytest.raises(FileNotFoundError, match=message):
        trainer().fit(Still(), datamodule=data)


def test_swapped_folders_are_recognised(tmp_path):
    dataset(tmp_path, "train", content([image(1)], [box(1, 1)]))
    dataset(tmp_path, "val", content([image(2)], [box(1, 2)]))
    files = {f"{split}_annotations": f"annotations/instances_{split}2017.json" for split in ("train", "val")}
    data = module(tmp_path, **files, train_images="val2017", val_images="train2017")
    with pytest.raises(FileNotFoundError, match=r"1.png is in .*train2017, which is given as val_images$"):
        data.setup("fit")


def test_names_with_a_folder_too_many(tmp_path):
    dataset(tmp_path, "train", content([image(1, "images/1.png")], [box(1, 1)]))
    picture(tmp_path / "flat" / "1.png")
    file = "annotations/instances_train2017.json"
    with pytest.raises(FileNotFoundError, match=r"1.png is there without its folder: set train_images"):
        module(tmp_path, train_annotations=file, train_images="flat").samples("train")


def test_one_file_for_two_splits_is_said(tmp_path):
    dataset(tmp_path)
    file = "annotations/instances_train2017.json"
    data = module(tmp_path, train_annotations=file, val_annotations=file)
    with pytest.warns(UserWarning, match=r"train and val have one file, .*: validation is on training images"):
        data.setup("fit")


def turned(path: Path, width: int, height: int) -> Path:
    """A file of width x height that its EXIF orientation turns by a quarter."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(path, width, height, exif=exif)


def test_images_are_upright_as_their_boxes(tmp_path):
    turned(tmp_path / "val2017" / "1.png", 40, 60)
    dataset(tmp_path, "val", content([image(1, width=60, height=40)], [box(1, 1)]))
    samples = module(tmp_path).samples("val")
    assert samples[0][0].shape == (3, 40, 60)


def test_sizes_that_disagree_are_said(tmp_path):
    turned(tmp_path / "val2017" / "1.png", 60, 40)
    picture(tmp_path / "val2017" / "2.png", 120, 80)
    dataset(tmp_path, "val", content([image(1), image(2), image(3)], [box(1, 1)]))
    samples = module(tmp_path).samples("val")
    with pytest.raises(
        UnreadableImageError, match=r"1.png is 40x60 pixels, but 60x40 in .*: its sides are swapped, .*EXIF"
    ):
        samples[0]
    with pytest.raises(UnreadableImageError, match=r"2.png is 120x80 pixels, but 60x40 in .*another size of it"):
        samples[1]
    assert samples[2][0].shape == (3, 40, 60)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "RGBA", "I;16", "CMYK"])
def test_images_of_any_kind_become_rgb(tmp_path, mode):
    name = "1.jpg" if mode == "CMYK" else "1.png"
    picture(tmp_path / "val2017" / name, mode=mode)
    dataset(tmp_path, "val", content([image(1, name)], []))
    pixels, _ = module(tmp_path).samples("val")[0]
    assert pixels.shape == (3, 40, 60)
    assert pixels.dtype == torch.uint8


def test_16_bit_images_are_scaled(tmp_path):
    path = tmp_path / "val2017" / "1.png"
    path.parent.mkdir()
    Image.fromarray(np.full((40, 60), 257 * 99, dtype=np.uint16)).save(path)
    pixels, _ = module(dataset(tmp_path, "val", content([image(1)], []))).samples("val")[0]
    assert pixels.unique().tolist() == [99]


def test_broken_images_stop_or_are_skipped(tmp_path):
    what = content([image(n) for n in range(1, 7)], [box(n, n) for n in range(1, 7)])
    dataset(dataset(tmp_path, "train", what), "val", what)
    (tmp_path / "train2017" / "3.png").write_bytes(b"")
    whole = (tmp_path / "val2017" / "5.png").read_bytes()
    (tmp_path / "val2017" / "5.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnreadableImageError, match=r"train2017/3.png cannot be read: it is empty"):
        trainer().fit(Still(), datamodule=module(tmp_path))
    still = Still()
    with pytest.warns(UserWarning, match="could not be read") as caught:
        trainer().fit(still, datamodule=module(tmp_path, on_error="skip"))
    said = {str(warning.message) for warning in caught if "could not be read" in str(warning.message)}
    assert said == {
        "1 of 6 images could not be read and were skipped: 3.png",
        "1 of 6 images could not be read and were skipped: 5.png",
    }
    assert len(still.seen) == 6  # another one in its place
    assert 3 not in still.seen
    with pytest.raises(ValueError, match="unknown on_error 'ignore': expected raise or skip"):
        module(tmp_path, on_error="ignore")


def test_training_over_every_kind_of_sample(tmp_path):
    """Crowds, no boxes, boxes outside, one pixel: none of them stops a training step."""
    images = [image(1), image(2), image(3, width=1, height=1), image(4, width=500, height=2), image(5)]
    annotations = [box(1, 1, iscrowd=1), box(2, 4, bbox=(-5, -5, 400, 50)), box(3, 5, bbox=(59, 39, 1, 1)), box(4, 1)]
    dataset(dataset(tmp_path, "train", content(images, annotations)), "val", content(images, annotations))
    data = module(
        tmp_path, image_size=32, max_size=64, hflip=0.5, scale_jitter=(0.5, 2.0), iou_crop=1.0, photometric=0.5
    )
    still = Still()
    trainer(max_epochs=10).fit(still, datamodule=data)
    assert set(still.seen) == {1, 2, 3, 4, 5}


# Prediction, and what a checkpoint keeps.


def test_a_folder_is_predicted_without_annotations(tmp_path):
    dataset(tmp_path)
    picture(tmp_path / "new" / "b" / "2.jpg", 30, 50)
    picture(tmp_path / "new" / "a.png", 64, 48)
    data = module(tmp_path, predict_root=str(tmp_path / "new"), image_size=24)
    images, targets = next(iter(data.predict_dataloader()))
    assert images.shape == (2, 3, 64, 32)
    assert targets == [
        {"image_id": 0, "orig_size": (48, 64), "size": (24, 32)},
        {"image_id": 1, "orig_size": (50, 30), "size": (40, 24)},
    ]
    assert data.samples("predict").names.tolist() == ["a.png", "b/2.jpg"]
    one = module(tmp_path, predict_root=str(tmp_path / "new" / "a.png"))
    assert one.samples("predict").names.tolist() == ["a.png"]
    trainer().predict(Still(), datamodule=data)


def test_test_images_without_annotations_are_predicted(tmp_path):
    what = content([image(7), image(5)])
    del what["annotations"]
    dataset(tmp_path)
    written(tmp_path / "test.json", what)
    for number in (5, 7):
        picture(tmp_path / "test" / f"{number}.png")
    data = module(tmp_path, train_annotations="annotations/instances_train2017.json", test_annotations="test.json")
    (_, found) = next(iter(data.predict_dataloader()))
    assert [target["image_id"] for target in found] == [7, 5]
    with pytest.raises(ValueError, match="test.json has no annotations, but images, categories"):
        module(tmp_path, val_annotations="test.json")


def test_prediction_away_from_the_data_takes_classes_from_the_checkpoint(tmp_path):
    home, away = tmp_path / "home", tmp_path / "away"
    data = module(dataset(dataset(home), "val"))
    run = trainer(enable_checkpointing=True, default_root_dir=home)
    run.fit(Still(), datamodule=data)
    run.save_checkpoint(home / "a.ckpt")
    picture(away / "1.png")
    predictor = module(away, predict_root=str(away))
    assert predictor.classes is None
    trainer().predict(Still(), datamodule=predictor, ckpt_path=home / "a.ckpt", weights_only=True)
    assert (predictor.classes, predictor.category_ids) == (["car", "train", "dog"], [3, 7, 18])
    other = module(home, category_ids=[3, 18])
    with pytest.raises(
        ValueError, match=r"3 classes are not this data's 2: label 1 is train \(category 7\) there and dog"
    ):
        trainer().validate(Still(), datamodule=other, ckpt_path=home / "a.ckpt", weights_only=True)


# Memory.


def reachable(thing) -> int:
    """Number of Python objects that can be reached from one, except modules, classes and functions."""
    skipped = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
    seen, waiting = set(), [thing]
    while waiting:
        found = waiting.pop()
        if id(found) not in seen and not isinstance(found, skipped):
            seen.add(id(found))
            waiting += gc.get_referents(found)
    return len(seen)


def test_no_python_object_is_held_for_an_image_or_a_box(tmp_path):
    """Each would be copied into every worker, by the counting of references to it."""
    counts = []
    for size in (2, 60):
        root = tmp_path / str(size)
        images = [image(n) for n in range(size)]
        data = module(dataset(root, "train", content(images, [box(n, n % size) for n in range(20 * size)])))
        batches = data.train_dataloader().dataset
        counts.append(reachable(batches))
        raw = batches.samples.raw
        assert raw.names.dtype.kind == "U"
        assert all(a.dtype != object for a in vars(raw.annotations).values() if isinstance(a, np.ndarray))
    assert counts[0] == counts[1]


# Export.


class Few:
    """Two samples by hand: boxes at places that binary fractions do not reach, a crowd, and an image without boxes."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int):
        noise = torch.randint(
            0, 256, (3, 20 + index, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(index)
        )
        if index == 1:
            return noise, {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "image_id": 901}
        return noise, {
            "boxes": torch.tensor([[0.1, 0.7, 29.9, 19.3], [3.3, 4.4, 13.13, 9.99]]),
            "labels": torch.tensor([1, 0]),
            "iscrowd": torch.tensor([False, True]),
            "area": torch.tensor([123.4, 5.6]),
            "image_id": 900,
        }


def assert_same_samples(first, second) -> None:
    assert len(first) == len(second)
    for index in range(len(first)):
        (image, target), (again, read_back) = first[index], second[index]
        assert torch.equal(image, again)
        for key in ("boxes", "labels", "iscrowd", "area"):
            if key in target:
                assert torch.equal(target[key], read_back[key]), key
                assert target[key].dtype == read_back[key].dtype
        assert read_back["image_id"] == target.get("image_id", index)


def test_exported_samples_are_read_back_as_they_were(tmp_path):
    path = export_coco(Few(), "val", tmp_path / "val")
    assert path == tmp_path / "val" / "annotations.json"
    data = module(tmp_path)
    assert (data.classes, data.category_ids) == (["0", "1"], [0, 1])
    assert_same_samples(Few(), data.raw_samples("val"))


def test_exported_shapes_are_read_back_as_they_were(tmp_path):
    shapes = ShapesDetectionDataModule(image_size=64, train_size=6, val_size=4, batch_size=2)
    export_coco(shapes, "train", tmp_path / "train")
    export_coco(shapes, "val", tmp_path / "val")
    data = module(tmp_path, mean=shapes.mean, std=shapes.std, group_by_aspect=False)
    assert data.classes == shapes.classes
    for split in ("train", "val"):
        assert_same_samples(shapes.raw_samples(split), data.raw_samples(split))
    for (images, made), (again, read_back) in zip(shapes.train_dataloader(), data.train_dataloader(), strict=True):
        assert torch.equal(images, again)  # the same order too
        assert [t["boxes"].tolist() for t in made] == [t["boxes"].tolist() for t in read_back]


def test_exporting_a_coco_split_keeps_its_category_ids(tmp_path):
    data = module(dataset(tmp_path / "first", "val"))
    export_coco(data, "val", tmp_path / "second" / "val")
    again = module(tmp_path / "second")
    assert (again.classes, again.category_ids) == (data.classes, data.category_ids)
    assert_same_samples(data.raw_samples("val"), again.raw_samples("val"))


def test_what_cannot_be_exported_is_said(tmp_path):
    data = module(dataset(tmp_path), predict_root=str(tmp_path / "train2017"))
    with pytest.raises(ValueError, match="CocoDetectionDataModule has no test samples to export: name another split"):
        export_coco(data, "test", tmp_path / "out")
    with pytest.raises(ValueError, match="sample 0 cannot be exported: expected .image, target. with boxes"):
        export_coco(data, "predict", tmp_path / "out")
    twins = [(torch.zeros(3, 4, 4, dtype=torch.uint8), Few()[1][1])] * 2
    with pytest.raises(ValueError, match="two samples have the image_id 901: a COCO file needs one for each"):
        export_coco(twins, "val", tmp_path / "out")


def test_pycocotools_reads_what_is_exported(tmp_path):
    tools = pytest.importorskip("pycocotools.coco")
    coco = tools.COCO(os.fspath(export_coco(Few(), "val", tmp_path)))
    assert coco.getImgIds() == [900, 901]
    assert [annotation["category_id"] for annotation in coco.loadAnns(coco.getAnnIds(900))] == [1, 0]
    assert isinstance(read(tmp_path / "annotations.json"), Annotations)
