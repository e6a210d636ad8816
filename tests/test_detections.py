"""What a detector's predictions become: a file that COCO's tools read, and pictures."""

import contextlib
import io
import json
import math
import re
from pathlib import Path

import faster_coco_eval
import numpy as np
import pycocotools.coco
import pycocotools.cocoeval
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch.utils.data import DataLoader, DistributedSampler

from datamodules import DigitsDataModule, ImageFolderDataModule
from zoo import FPNDetector, GaussianVAE, GumbelVAE, MAEPretrainer, ViTClassifier
from zoo.callbacks import SavePictures, WriteDetections, WritePredictions
from zoo.cli import main
from zoo.cli.outcome import metrics
from zoo.common import pictures
from zoo.metrics.average_precision import CocoAveragePrecision

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
CATEGORIES = [3, 7, 90]


def found(*rows, **more):
    """A prediction of an image, from rows of x1, y1, x2, y2, score, label."""
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 6)
    return {"boxes": table[:, :4].float(), "scores": table[:, 4].float(), "labels": table[:, 5].long(), **more}


class Finds(LightningModule):
    """Finds what it is told to: in an image of brightness n, the n-th of a list."""

    def __init__(self, answers) -> None:
        super().__init__()
        self.answers = answers

    def detect(self, images):
        return [dict(self.answers[round(number)]) for number in images.amax((1, 2, 3)).tolist()]

    def predict_step(self, batch, batch_idx):
        return self.detect(batch[0] if isinstance(batch, list | tuple) else batch)


class Numbered(LightningDataModule):
    """A foreign data module: image n has brightness n."""

    def __init__(self, count, category_ids=None, padded="", batch_size=2) -> None:
        super().__init__()
        self.count, self.padded, self.batch_size = count, padded, batch_size
        if category_ids is not None:
            self.category_ids = category_ids

    def predict_dataloader(self):
        images = torch.arange(self.count).float()[:, None, None, None].expand(-1, 3, 4, 4)
        sampler: object = None
        if self.padded == "own":
            sampler = [*range(self.count), 0][self.trainer.global_rank :: self.trainer.world_size]
        elif self.padded:
            sampler = DistributedSampler(images, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(images, batch_size=self.batch_size, sampler=sampler)


def predict(folder: Path, module, data, *callbacks, **options):
    folder.mkdir(exist_ok=True)
    trainer = Trainer(default_root_dir=folder, callbacks=[WriteDetections(), *callbacks], **QUIET | options)
    trainer.predict(module, data, return_predictions=False)
    return json.loads((folder / "detections.json").read_text())


# The file.


def test_the_results_format(tmp_path):
    answers = [
        found((10, 20, 30.5, 60, 0.75, 2), (0.25, 0.5, 4, 4, 0.5, 0), image_id=139),
        found(image_id=285),
        found((1, 2, 3, 4, 0.125, 1), image_id=torch.tensor(7)),
    ]
    assert predict(tmp_path, Finds(answers), Numbered(3, CATEGORIES)) == [
        {"image_id": 139, "category_id": 90, "bbox": [10.0, 20.0, 20.5, 40.0], "score": 0.75},
        {"image_id": 139, "category_id": 3, "bbox": [0.25, 0.5, 3.75, 3.5], "score": 0.5},
        {"image_id": 7, "category_id": 7, "bbox": [1.0, 2.0, 2.0, 2.0], "score": 0.125},
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["detections.json"]


def test_without_ids_images_are_numbers_and_categories_labels(tmp_path):
    answers = [found((0, 0, 1, 1, 0.5, 5)), found(), found((0, 0, 2, 2, 0.25, 0))]
    assert predict(tmp_path, Finds(answers), Numbered(3)) == [
        {"image_id": 0, "category_id": 5, "bbox": [0.0, 0.0, 1.0, 1.0], "score": 0.5},
        {"image_id": 2, "category_id": 0, "bbox": [0.0, 0.0, 2.0, 2.0], "score": 0.25},
    ]
    bare = DataLoader(torch.zeros(1, 3, 4, 4))  # no data module at all
    assert [row["category_id"] for row in predict(tmp_path, Finds(answers), bare)] == [5]


def test_nothing_found_is_an_empty_list(tmp_path):
    assert predict(tmp_path, Finds([found()] * 5), Numbered(5, CATEGORIES)) == []


def test_any_two_float32_scores_stay_apart_and_equal_ones_equal(tmp_path):
    scores = torch.linspace(0.05, 1, 200)
    scores = torch.cat([scores, torch.nextafter(scores, torch.tensor(2.0)), scores])
    answer = {"boxes": torch.rand(600, 4), "scores": scores, "labels": torch.zeros(600, dtype=torch.int64)}
    answer["boxes"][:, 2:] += 1
    written = predict(tmp_path, Finds([answer]), Numbered(1))
    assert torch.equal(torch.tensor([row["score"] for row in written], dtype=torch.float32), scores)


def test_images_of_a_folder_are_known_by_their_file(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    names = ["a.png", "b, ä.png", "c.png"]
    for name in names:
        Image.fromarray(np.full((8, 8), 255, dtype=np.uint8)).save(root / name)
    (root / "b, ä.png").write_bytes(b"no image")
    data = ImageFolderDataModule(
        tmp_path / "none", predict_root=root, image_size=8, channels=1, batch_size=2, num_workers=0, on_error="skip",
        mean=(0.0,), std=(1.0,),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="1 of 3 images could not be read"):
        written = predict(tmp_path, Finds([found(), found((0, 0, 4, 4, 0.5, 0), (1, 1, 2, 2, 0.25, 1))]), data)
    assert [(row["image_id"], row["file_name"]) for row in written] == [(0, "a.png")] * 2 + [(2, "c.png")] * 2


def scenes(count: int):
    """Ground truth, as the metric takes it and as a COCO file, and detections of it, some of them wrong."""
    generator = torch.Generator().manual_seed(0)
    truth, answers, annotations = [], [], []
    for number in range(count):
        n = number % 5
        corners = 200 * torch.rand(n, 2, generator=generator)
        sides = 4 + 150 * torch.rand(n, 2, generator=generator) ** 2
        boxes = torch.cat([corners, corners + sides], dim=1).round(decimals=1)
        labels = torch.randint(3, (n,), generator=generator)
        crowd = torch.rand(n, generator=generator) < 0.15
        area = (sides.prod(1) * 0.7).round(decimals=2)
        image_id = 1000 - 7 * number
        truth.append({"boxes": boxes, "labels": labels, "iscrowd": crowd, "area": area, "image_id": image_id})
        for box, label, is_crowd, size in zip(
            boxes.double(), labels.tolist(), crowd.tolist(), area.tolist(), strict=True
        ):
            x1, y1, x2, y2 = box.tolist()
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, "category_id": CATEGORIES[label], "area": size}
                | {"iscrowd": int(is_crowd), "bbox": [x1, y1, x2 - x1, y2 - y1]}
            )
        near = torch.cat([boxes, boxes]) + 3 * torch.randn(2 * n, 4, generator=generator)
        near[:, 2:] = torch.maximum(near[:, 2:], near[:, :2] + 1)
        scores = (10 * torch.rand(2 * n, generator=generator)).round() / 10  # so that some are equal
        guessed = torch.where(torch.rand(2 * n, generator=generator) < 0.8, torch.cat([labels, labels]), 1)
        answers.append({"boxes": near, "scores": scores, "labels": guessed, "image_id": image_id})
    images = [{"id": target["image_id"], "width": 400, "height": 400, "file_name": "x.jpg"} for target in truth]
    categories = [{"id": category, "name": str(category)} for category in CATEGORIES]
    return truth, answers, {"images": images, "annotations": annotations, "categories": categories}


def test_cocos_tools_read_the_file_and_score_what_the_metric_scores(tmp_path):
    truth, answers, coco = scenes(40)
    predict(tmp_path, Finds(answers), Numbered(40, CATEGORIES, batch_size=7))
    (tmp_path / "truth.json").write_text(json.dumps(coco))
    metric = CocoAveragePrecision(classes=["a", "b", "c"])
    metric.update(answers, truth)
    ours = {name: value.item() for name, value in metric.compute().items()}
    assert 0.05 < ours["ap"] < 0.95
    with contextlib.redirect_stdout(io.StringIO()):
        there = pycocotools.coco.COCO(tmp_path / "truth.json")
        scored = pycocotools.cocoeval.COCOeval(there, there.loadRes(str(tmp_path / "detections.json")), "bbox")
        scored.evaluate(), scored.accumulate(), scored.summarize()
    names = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100"]
    names += ["ar_small", "ar_medium", "ar_large"]
    assert [ours[name] for name in names] == pytest.approx(scored.stats.tolist(), abs=1e-12)


def test_file_names_do_not_disturb_cocos_tools(tmp_path):
    _, answers, coco = scenes(6)
    written = predict(tmp_path, Finds(answers), Numbered(6, CATEGORIES))
    named = tmp_path / "named.json"
    named.write_text(json.dumps([row | {"file_name": "x.jpg"} for row in written]))
    (tmp_path / "truth.json").write_text(json.dumps(coco))
    for package in (pycocotools.coco, faster_coco_eval):
        with contextlib.redirect_stdout(io.StringIO()):
            read = package.COCO(str(tmp_path / "truth.json")).loadRes(str(named))
        assert [row["bbox"] for row in read.loadAnns(range(1, len(written) + 1))] == [row["bbox"] for row in written]


# Several processes, interrupted runs, repeated images.


def test_two_processes_write_what_one_writes(tmp_path):
    answers = [found((0, 0, 1, i, 0.5, i % 10)) for i in range(256)]

    class Counts(Finds):
        def detect(self, images):
            sums = (images.sum((1, 2, 3)).abs() * 1000).long() % 256
            return [dict(self.answers[number]) for number in sums.tolist()]

    alone = predict(tmp_path / "one", Counts(answers), DigitsDataModule(num_workers=0, batch_size=70))
    both = predict(
        tmp_path / "two", Counts(answers), DigitsDataModule(num_workers=0, batch_size=35),
        strategy="ddp_fork", devices=2,
    )  # fmt: skip
    assert both == alone
    assert [row["image_id"] for row in both] == list(range(540))
    assert [file.name for file in (tmp_path / "two").iterdir()] == ["detections.json"]


@pytest.mark.parametrize(("known", "padded"), [(True, "torch's"), (False, "torch's"), (True, "own")])
def test_an_image_that_fills_up_a_rank_is_written_once(tmp_path, known, padded):
    """Five images on two ranks are six, of which the last is the first again. By their ids, any sampler may do so."""
    answers = [found((0, 0, 1, 1 + i, 0.5, 0), **({"image_id": 50 - i} if known else {})) for i in range(5)]
    options = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": padded != "own"}
    written = predict(tmp_path, Finds(answers), Numbered(5, padded=padded), **options)
    assert [row["image_id"] for row in written] == ([50, 49, 48, 47, 46] if known else [0, 1, 2, 3, 4])
    assert [row["bbox"][3] for row in written] == [1, 2, 3, 4, 5]


class Classifies(LightningModule):
    def predict_step(self, batch, batch_idx):
        return batch[:, 0, 0, :2].softmax(1)


def test_rows_of_a_table_are_not_repeated_either(tmp_path):
    writer = WritePredictions()
    trainer = Trainer(default_root_dir=tmp_path, callbacks=[writer], strategy="ddp_fork", devices=2, **QUIET)
    trainer.predict(Classifies(), Numbered(5, padded="torch's"), return_predictions=False)
    rows = (tmp_path / "predictions.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("ids", [(0, 0, 1, 1), (7, 3, 7, 3), ("a", "a", "b", "c"), (5, 5, 5, 5)], ids=str)
def test_two_images_of_one_id_are_refused(tmp_path, ids, processes):
    if processes == 2 and len(set(ids)) == 3:
        pytest.skip("a sampler may have repeated one image")
    answers = [found((0, 0, 1, 1 + i, 0.5, 0), image_id=image_id) for i, image_id in enumerate(ids)]
    (tmp_path / "detections.json").write_text("[]")
    options = {"strategy": "ddp_fork", "devices": 2} if processes == 2 else {}
    with pytest.raises(Exception, match="both have the image_id|have the image_id of another, such as"):
        predict(tmp_path, Finds(answers), Numbered(4), **options)
    assert (tmp_path / "detections.json").read_text() == "[]"  # an older one stays


TEXTS = ["a.jpg", "42", "", 'größe\t\n"', "2024-05-01/0001"]


def test_ids_may_be_texts(tmp_path):
    answers = [found((0, 0, 1, 1 + i, 0.5, 0), image_id=text) for i, text in enumerate(TEXTS)]
    assert [row["image_id"] for row in predict(tmp_path, Finds(answers), Numbered(5))] == TEXTS


@pytest.mark.parametrize("image_id", [0.5, [1, 2], {"a": 1}, torch.zeros(2), (1, 2)], ids=str)
def test_other_ids_are_refused(tmp_path, image_id):
    answers = [found((0, 0, 1, 1, 0.5, 0), image_id=image_id)]
    with pytest.raises(ValueError, match="image 0 has the image_id .*: expected a whole number or a text") as raised:
        predict(tmp_path, Finds(answers), Numbered(1))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("first", [True, False])
def test_ids_of_some_images_alone_are_refused(tmp_path, first):
    """Their numbers could be the ids of others."""
    answers = [found(image_id=1), found()][:: 1 if first else -1]
    with pytest.raises(ValueError, match=r"image 1 has .*image_id, but others have .*: expected one of each image"):
        predict(tmp_path, Finds(answers), Numbered(2))


@pytest.mark.parametrize("image_id", ["a.jpg", 7, torch.tensor(7), None, ...], ids=str)
def test_a_detector_hands_on_the_id_that_the_data_has(image_id):
    about = {} if image_id is ... else {"image_id": image_id}
    detector = FPNDetector("test_resnet", num_classes=2, levels=(3, 4), channels=16, head_depth=1, image_size=32)
    (detection,) = detector.eval().predict_step((torch.zeros(1, 3, 32, 32), [about]), 0)
    expected = 7 if isinstance(image_id, torch.Tensor) else None if image_id is ... else image_id
    assert detection.get("image_id") == expected


class Watches(Callback):
    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.seen = sorted(file.name for file in Path(trainer.default_root_dir).iterdir())


def test_an_interrupted_run_leaves_no_file_and_an_older_one_as_it_was(tmp_path):
    class Breaks(Finds):
        def predict_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise ArithmeticError("on purpose")
            return super().predict_step(batch, batch_idx)

    answers = [found((0, 0, 1, 1 + i, 0.5, 0)) for i in range(6)]
    with pytest.raises(ArithmeticError):
        predict(tmp_path, Breaks(answers), Numbered(6), watches := Watches())
    (part,) = watches.seen  # it is written as they come, and the file not yet there
    assert re.fullmatch(r"\.detections\.json\.\w+\.rank0", part)
    assert list(tmp_path.iterdir()) == []
    assert len(predict(tmp_path, Finds(answers), Numbered(6))) == 6
    before = (tmp_path / "detections.json").read_bytes()
    with pytest.raises(ArithmeticError):
        predict(tmp_path, Breaks(answers), Numbered(6))
    assert (tmp_path / "detections.json").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["detections.json"]


# What cannot be written.


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([torch.zeros(2)], "Answers predicts a list of Tensor: expected for each image a dict of tensors boxes"),
        (torch.zeros(3, 2), r"Answers predicts a tensor of shape \(3, 2\): expected"),
        ({"boxes": 1}, "Answers predicts dict: expected"),
        ([found(), found() | {"boxes": torch.zeros(3, 5)}], r"a dict of boxes \(3, 5\), scores \(0,\), labels \(0,\)"),
        ([found() | {"scores": None}], r"boxes \(0, 4\), scores NoneType, labels \(0,\): expected"),
        ([found() | {"scores": torch.tensor(0.5)}], r"scores \(\), labels \(0,\): expected"),
        ([found()], "1 predictions for 3 images: expected one entry for each image"),
        (
            [found(), found((0, 0, 1, 1, 0.5, 3)), found()],
            "image digits/21: a detection has label 3: .* 3 category_ids, from 0",
        ),
        (
            [found((0, math.nan, 1, 1, 0.5, 1)), found(), found()],
            r"image digits/10: a detection is not finite: box \[0.0, nan",
        ),
        (
            [found((0, 0, 1, 1, math.inf, 1)), found(), found()],
            "image digits/10: a detection is not finite: .* score inf",
        ),
    ],
)
def test_what_is_no_detection_is_refused_in_one_line(tmp_path, answers, message):
    class Answers(LightningModule):
        def predict_step(self, batch, batch_idx):
            return answers

    data = DigitsDataModule(num_workers=0, batch_size=3)
    data.category_ids = CATEGORIES
    with pytest.raises(ValueError, match=message) as raised:
        predict(tmp_path, Answers(), data)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ids", [None, "the same", "others"])
def test_each_of_several_loaders_has_a_file_of_its_own(tmp_path, ids):
    """Their images may have the same ids: two lists of one image each, whatever these are called."""

    class Takes(LightningModule):
        def predict_step(self, batch, batch_idx, dataloader_idx=0):
            box = torch.tensor([[0.0, 0, 1 + dataloader_idx, 2]])
            one = {"boxes": box, "scores": torch.tensor([0.5]), "labels": torch.tensor([0])}
            return [one if ids is None else one | {"image_id": 7 if ids == "the same" else 7 + dataloader_idx}]

    trainer = Trainer(default_root_dir=tmp_path, callbacks=[WriteDetections()], **QUIET)
    trainer.predict(Takes(), [DataLoader(torch.zeros(1, 3, 4, 4))] * 2, return_predictions=False)
    names = [f"detections_dataloader_idx_{loader}.json" for loader in range(2)]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    lists = [json.loads((tmp_path / name).read_text()) for name in names]
    assert [[found["bbox"] for found in each] for each in lists] == [[[0, 0, 1, 2]], [[0, 0, 2, 2]]]
    expected = {None: [0, 1], "the same": [7, 7], "others": [7, 8]}[ids]
    assert [found["image_id"] for each in lists for found in each] == expected


# Pictures with boxes.

GREY = torch.tensor([128 / 255] * 3)
NONE = found()


def ramp(*size) -> torch.Tensor:
    """An image whose darkest and brightest pixel are its first two, and which is grey else."""
    image = torch.full((1, 3, *size), 0.5)
    image[..., 0, 0], image[..., 0, 1] = 0.0, 1.0
    return image


def changed(image, before) -> list[int]:
    """Left, top, right, bottom of what differs, in whole pixels, the last of each excluded."""
    rows, columns = (image - before).abs().amax(0).gt(0.02).nonzero().unbind(1)
    return [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]


def test_a_box_is_where_it_belongs_on_an_enlarged_image():
    images = ramp(64, 64)
    (plain,) = pictures.boxed(images, [NONE])
    assert plain.shape == (3, 256, 256)
    (drawn,) = pictures.boxed(images, [found((10, 20, 30, 40, 0.9, 1))], classes=["a", "b"])
    left, top, right, bottom = changed(drawn, plain)
    assert (left, right, bottom) == (40, 120, 160)
    assert 60 < top < 80  # the label is above the box
    color = drawn[:, 158, 60]
    for y, x in ((81, 60), (159, 60), (100, 41), (100, 119)):
        assert torch.equal(drawn[:, y, x], color), (y, x)
    assert torch.equal(drawn[:, 100:150, 50:110], plain[:, 100:150, 50:110])  # the object is not covered
    assert drawn.min() >= 0
    assert drawn.max() <= 1


def test_large_images_are_reduced_and_boxes_with_them():
    images = ramp(512, 1024)
    images[..., :4, :4] = 0.0  # which an average leaves dark
    images[..., :4, 4:8] = 1.0
    (plain,), (drawn,) = (pictures.boxed(images, [f]) for f in (NONE, found((400, 200, 600, 300, 0.9, 1))))
    assert plain.shape == (3, 256, 512)
    left, _, right, bottom = changed(drawn, plain)
    assert (left, right, bottom) == (200, 300, 150)


def test_classes_have_colours_and_low_scores_are_left_out():
    images = ramp(64, 64)

    def color(label, score=0.9, **options):
        (drawn,) = pictures.boxed(images, [found((10, 20, 30, 40, score, label))], **options)
        return drawn[:, 159, 60]

    colors = [tuple(color(label).tolist()) for label in range(12)]
    assert len(set(colors)) == 12
    assert torch.allclose(color(0, score=0.29), GREY, atol=0.01)
    assert not torch.allclose(color(0, score=0.29, threshold=0.2), GREY, atol=0.01)
    # The better of two is on top, in whatever order they come.
    for rows in (
        [(10, 20, 30, 40, 0.9, 0), (10, 20, 30, 40, 0.8, 1)],
        [(10, 20, 30, 40, 0.8, 1), (10, 20, 30, 40, 0.9, 0)],
    ):
        (drawn,) = pictures.boxed(images, [found(*rows)])
        assert tuple(drawn[:, 159, 60].tolist()) == colors[0]


def test_name_and_score_are_written():
    drawn = [
        pictures.boxed(ramp(64, 64), [found((10, 20, 30, 40, score, label))], classes=classes)
        for score, label, classes in ((0.9, 0, ["ring", "disc"]), (0.8, 0, ["ring", "disc"]), (0.9, 0, ["star"]))
    ]
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    known = pictures.boxed(ramp(64, 64), [found((10, 20, 30, 40, 0.9, 7))], classes=["7"] * 8)
    assert torch.equal(known, pictures.boxed(ramp(64, 64), [found((10, 20, 30, 40, 0.9, 7))]))


def test_ground_truth_is_dashed_and_white_or_grey_where_it_is_ignored():
    target = {"boxes": torch.tensor([[10.0, 20, 30, 40]]), "labels": torch.tensor([0])}
    (drawn,) = pictures.boxed(ramp(64, 64), [NONE], [target], ["disc"])
    edge = drawn[:, 80, 40:120]
    white = (edge == 1).all(0)
    assert 0.3 < white.float().mean() < 0.7
    assert torch.allclose(edge[:, ~white], GREY[:, None], atol=0.01)
    (ignored,) = pictures.boxed(ramp(64, 64), [NONE], [target | {"iscrowd": torch.tensor([True])}], ["disc"])
    assert not (ignored[:, 80, 40:120] == 1).any()


@pytest.mark.parametrize(
    "box", [(0, 0, 64, 64), (-9, -5, 5, 5), (60, 60, 99, 99), (30, 30, 30, 30), (1e9, 0, 2e9, 9), (math.nan, 0, 5, 5)]
)
def test_no_box_stops_a_run(box):
    target = {"boxes": torch.tensor([box]), "labels": torch.tensor([2])}
    (drawn,) = pictures.boxed(ramp(64, 64), [found((*box, 0.9, 2))], [target], ["a", "b", "a long name of a class"])
    assert drawn.isfinite().all()


def test_one_channel_and_none_found():
    drawn = pictures.boxed(torch.rand(2, 1, 16, 16), [NONE, found((1, 1, 5, 5, 0.5, 0))])
    assert drawn.shape == (2, 3, 256, 256)
    assert torch.equal(drawn[0][0], drawn[0][1])


# Pictures of what is predicted.

SMALL = {"image_size": 8, "patch_size": 4, "in_channels": 1}
SMALL |= {"width": 16, "depth": 1, "heads": 2}


@pytest.mark.parametrize("kind", ["classifier", "pretrainer"])
def test_classifiers_and_pretrainers_draw_at_predict(tmp_path, kind):
    if kind == "classifier":
        module, name = ViTClassifier("vit_tiny_patch16_224", num_classes=10, **SMALL), "predictions"
    else:
        decoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
        module, name = MAEPretrainer("vit_tiny_patch16_224", **SMALL, **decoder), "reconstruction"
    saves = SavePictures(max_images=4)
    trainer = Trainer(default_root_dir=tmp_path, callbacks=[saves], limit_predict_batches=2, **QUIET)
    trainer.predict(module, DigitsDataModule(num_workers=0), return_predictions=False)
    assert f"predict_{name}.png" in [file.name for file in (tmp_path / "images").iterdir()]
    assert saves.last_path == tmp_path / "images" / f"predict_{name}.png"
    assert not [file for file in (tmp_path / "images").iterdir() if not file.name.startswith("predict_")]


class Draws(Finds):
    def __init__(self) -> None:
        super().__init__([])
        self.drawn = []

    def predict_step(self, batch, batch_idx):
        return None

    def pictures(self, batch):
        self.drawn.append(batch)
        return {"detections": torch.zeros(1, 3, 4, 4)}


TARGETS = [found() for _ in range(5)]


@pytest.mark.parametrize(
    "collated",
    [
        (torch.rand(5, 3, 4, 4), TARGETS),
        (list(torch.rand(5, 3, 4, 4)), TARGETS),
        (tuple(torch.rand(5, 3, 4, 4)), tuple(TARGETS)),
        {"images": torch.rand(5, 3, 4, 4), "targets": TARGETS},
        {"images": list(torch.rand(5, 3, 4, 4)), "targets": TARGETS},
    ],
)
def test_some_images_of_a_batch_with_targets_are_drawn(tmp_path, collated):
    module = Draws()
    loader = DataLoader(range(5), batch_size=5, collate_fn=lambda _: collated)
    trainer = Trainer(default_root_dir=tmp_path, callbacks=[SavePictures(max_images=2)], **QUIET)
    trainer.predict(module, loader, return_predictions=False)
    (batch,) = module.drawn
    images, targets = batch.values() if isinstance(batch, dict) else batch
    assert len(images) == len(targets) == 2
    assert images[0].shape == (3, 4, 4)


# The detector itself.


def test_images_to_predict_need_no_boxes_for_the_detector_to_know_the_original_ones_pixels():
    sizes = {"channels": 16, "head_depth": 1, "levels": (3, 5), "image_size": 64}
    module = FPNDetector("test_resnet", num_classes=2, score_threshold=0.0, **sizes).eval()
    images = torch.rand(2, 3, 64, 64)
    about = [{"size": (64, 64), "orig_size": (128, 320), "image_id": 9}, {"size": (64, 64), "orig_size": (64, 64)}]
    with torch.no_grad():
        resized, same = module.predict_step((images, about), 0)
        expected = module.predict_step(images, 0)
    assert resized["image_id"] == 9
    assert "image_id" not in same
    assert len(expected[0]["boxes"]) > 10
    torch.testing.assert_close(resized["boxes"], expected[0]["boxes"] * torch.tensor([5.0, 2.0, 5.0, 2.0]))
    torch.testing.assert_close(same["boxes"], expected[1]["boxes"])
    assert module.pictures((images, about))["detections"].shape == (2, 3, 256, 256)


# The command line.


@pytest.mark.parametrize(
    ("technique", "name", "value", "lines"),
    [
        (FPNDetector, "test/ap", 0.52345, ["test AP 52.3 %"]),
        (FPNDetector, "test/ap50", 1.0, ["test AP50 100.0 %"]),
        (FPNDetector, "test/ap_small", 0.0, ["test AP of small 0.0 %"]),
        (FPNDetector, "test/ap_8-16", -1.0, ["test AP of 8-16 undefined"]),
        (FPNDetector, "test/ar100", 0.6, ["test AR100 60.0 %"]),
        (FPNDetector, "test/ap_by_class/cat", 0.6, []),
        (FPNDetector, "test/loss", 1.5, ["test loss 1.5000"]),
        (FPNDetector, "test/acc", 0.5, ["test accuracy 50.00 %"]),
        (ViTClassifier, "test/ap", 0.52345, ["test average precision 0.5234"]),
        (ViTClassifier, "test/acc", 0.5, ["test accuracy 50.00 %"]),
        (ViTClassifier, "test/acc/dataloader_idx_1", 0.5, ["test acc/dataloader_idx_1 50.00 %"]),
        (MAEPretrainer, "test/acc_knn", 0.5, ["test accuracy of nearest neighbours 50.00 %"]),
        (MAEPretrainer, "test/loss_visible", 0.5, ["test loss of visible patches 0.5000"]),
        (GaussianVAE, "test/elbo", -91.5, ["test ELBO in nats -91.5000"]),
        (GumbelVAE, "test/active_latents", 7.0, ["test active latents 7.0000"]),
    ],
)
def test_figures_read_as_their_technique_words_them(technique, name, value, lines):
    assert metrics(technique, {name: value}) == lines


def test_a_detector_predicts_through_the_command_line(capsys):
    detector = ["--model=FPNDetector", "--model.backbone=test_resnet", "--model.channels=16"]
    detector += ["--model.head_depth=1", "--model.levels=[3,5]", "--model.image_size=64", "--model.score_threshold=0"]
    data = ["--data=datamodules.shapes.ShapesDetectionDataModule", "--data.image_size=64", "--data.num_workers=0"]
    data += ["--data.train_size=8", "--data.val_size=4", "--data.test_size=5", "--data.batch_size=4"]
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    quiet += ["--trainer.enable_model_summary=false"]
    fit = ["--trainer.max_epochs=1", "--trainer.log_every_n_steps=1"]
    assert main(["fit", *detector, *data, *quiet, *fit]) == 0
    said = capsys.readouterr().out.splitlines()
    figures = [line for line in said if line.startswith("test AP")]
    assert {" ".join(line.split()[:2]) for line in figures} >= {"test AP", "test AP50", "test AP75"}
    assert all(line.endswith((" %", " undefined")) for line in figures)
    run = Path("runs/FPNDetector/version_0")
    (checkpoint,) = (run / "checkpoints").glob("epoch*.ckpt")
    views = "--model.views=[{}, {scale: 2, flip: true, valid_range: [0, 32]}]"
    assert main(["predict", "-c", str(run / "config.yaml"), "--ckpt_path", str(checkpoint), views, *quiet]) == 0
    told = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines() if " runs/" in line)
    assert set(told) == {"detections", "pictures"}
    written = json.loads(Path(told["detections"]).read_text())
    assert len({row["image_id"] for row in written}) == 5
    assert {row["category_id"] for row in written} <= set(range(6))
    assert Path(told["pictures"]).name == "predict_detections.png"
    assert not list(Path("runs").rglob("*.csv"))
