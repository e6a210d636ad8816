"""AP against answers worked by hand and against pycocotools; images that come twice, and processes that got none."""

import contextlib
import copy
import gc
import io
import logging
import pickle
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import DataLoader

from zoo.metrics.average_precision import CocoAveragePrecision

BOX, ELSEWHERE = (10, 10, 50, 50), (100, 100, 140, 140)  # medium, as COCO has it
TEN = [(20 * index, 0, 20 * index + 10, 10) for index in range(10)]  # ten boxes beside each other


def found(*rows: tuple) -> dict[str, Tensor]:
    """Rows of a box, its score and, unless it is 0, its label."""
    return {
        "boxes": torch.tensor([row[0] for row in rows], dtype=torch.float32).reshape(-1, 4),
        "scores": torch.tensor([row[1] for row in rows], dtype=torch.float32),
        "labels": torch.tensor([row[2] if len(row) > 2 else 0 for row in rows], dtype=torch.int64),
    }


def there(*rows: tuple, **more) -> dict:
    """Boxes, each with the label 0."""
    boxes = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.int64)} | more


def crowds(*flags: int) -> dict[str, Tensor]:
    return {"iscrowd": torch.tensor(flags, dtype=torch.bool)}


def scores(detections: list[dict], targets: list[dict], **options) -> dict[str, float]:
    metric = CocoAveragePrecision(**options)
    metric.update(detections, targets)
    return {name: value.item() for name, value in metric.compute().items()}


# Worked by hand.

WORKED = {
    "found": ([found((BOX, 0.9))], [there(BOX)], {"ap": 1, "ap50": 1, "ap75": 1, "ar1": 1, "ar100": 1}),
    "wrong above right": ([found((ELSEWHERE, 0.9), (BOX, 0.8))], [there(BOX)], {"ap": 0.5, "ar1": 0, "ar10": 1}),
    # Up to recall .5, 51 points, precision is 1; at the other 50 it is 2/3.
    "right, wrong, right": (
        [found((TEN[0], 0.9), (ELSEWHERE, 0.8), (TEN[1], 0.7))],
        [there(TEN[0], TEN[1])],
        {"ap": (51 + 50 * 2 / 3) / 101, "ar1": 0.5, "ar10": 1},
    ),
    # Up to recall .3, 31 points, precision is 1; from there on what it is at the end is its highest, 10/11.
    "the ninth is wrong": (
        [found(*[(box, 0.9) for box in TEN[:3]], (ELSEWHERE, 0.8), *[(box, 0.7) for box in TEN[3:]])],
        [there(*TEN)],
        {"ap": (31 + 70 * 10 / 11) / 101},
    ),
    "again, with a lower score": ([found((BOX, 0.9), (BOX, 0.8))], [there(BOX)], {"ap": 1}),
    "again, above the only other": (
        [found((TEN[0], 0.9), (TEN[0], 0.8), (TEN[1], 0.7))],
        [there(TEN[0], TEN[1])],
        {"ap": (51 + 50 * 2 / 3) / 101},
    ),
    "equal scores, the wrong one first": ([found((ELSEWHERE, 0.9), (BOX, 0.9))], [there(BOX)], {"ap": 0.5}),
    "equal scores, the right one first": ([found((BOX, 0.9), (ELSEWHERE, 0.9))], [there(BOX)], {"ap": 1}),
    "equal scores in two images, the ids say which is first": (
        [found((BOX, 0.9)), found((ELSEWHERE, 0.9))],
        [there(BOX, image_id=2), there(image_id=1)],
        {"ap": 0.5},
    ),
    "in an image without anything": ([found((ELSEWHERE, 0.9)), found((BOX, 0.8))], [there(), there(BOX)], {"ap": 0.5}),
    "nothing found": ([found()], [there(BOX)], {"ap": 0, "ap50": 0, "ar100": 0, "ap_medium": 0, "ap_small": -1}),
    "nothing there": ([found((BOX, 0.9))], [there()], {"ap": -1, "ap_medium": -1, "ar100": -1}),
    "nothing at all": ([found()], [there()], {"ap": -1, "ar1": -1}),
    # .6 is reached: 6/10 is the same number in float64, which float32's .6000000238 would not be.
    "an IoU of .6": ([found(((0, 0, 10, 6), 0.9))], [there((0, 0, 10, 10))], {"ap": 0.3, "ap50": 1, "ap75": 0}),
    "a class that is only found": ([found((BOX, 0.9), (BOX, 0.95, 7))], [there(BOX)], {"ap": 1}),
    "a crowd": (
        [found((ELSEWHERE, 0.9), (ELSEWHERE, 0.8), (BOX, 0.7))],
        [there(BOX, ELSEWHERE) | crowds(0, 1)],
        {"ap": 1, "ar100": 1},
    ),
    # By IoU, 16 of 10,000, it would be wrong.
    "a corner of a crowd": (
        [found(((0, 0, 4, 4), 0.9), (BOX, 0.7))],
        [there(BOX, (0, 0, 100, 100)) | crowds(0, 1)],
        {"ap": 1},
    ),
    "only a crowd": ([found((BOX, 0.9))], [there(BOX) | crowds(1)], {"ap": -1}),
    "32² is small and medium": (
        [found(((0, 0, 32, 32), 0.9))],
        [there((0, 0, 32, 32))],
        {"ap_small": 1, "ap_medium": 1, "ap_large": -1},
    ),
    # Its width is below 32 by less than float32 can tell.
    "a little less than 32²": (
        [found(((2**-21, 0, 32, 32), 0.9))],
        [there((2**-21, 0, 32, 32))],
        {"ap_small": 1, "ap_medium": -1},
    ),
    "the area is that of the segmentation": (
        [found((BOX, 0.9))],
        [there(BOX, area=torch.tensor([1000.0]))],
        {"ap_small": 1, "ap_medium": -1},
    ),
    # Small: a wrong one of medium size is left out, and so is what matches medium ground truth.
    "sizes of what is found": (
        [found((ELSEWHERE, 0.9), (BOX, 0.8), (TEN[0], 0.7))],
        [there(TEN[0], BOX)],
        {"ap_small": 1, "ap_medium": 0.5, "ap": 2 / 3},
    ),
}


@pytest.mark.parametrize(("detections", "targets", "expected"), WORKED.values(), ids=WORKED)
def test_answers_worked_by_hand(detections, targets, expected):
    result = scores(detections, targets)
    assert {name: result[name] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_the_limit_is_for_an_image_and_class():
    """Two are kept: the right one is third of its class, or third of all classes but first of its own."""
    same = found((ELSEWHERE, 0.9), (TEN[0], 0.8), (BOX, 0.7))
    other = found((ELSEWHERE, 0.9, 1), (TEN[0], 0.8, 1), (BOX, 0.7))
    options = {"max_detections": (2, 1), "size_ranges": {}}
    assert scores([same], [there(BOX)], **options) == {"ap": 0, "ap50": 0, "ap75": 0, "ar1": 0, "ar2": 0}
    assert scores([other], [there(BOX)], **options) == {"ap": 1, "ap50": 1, "ap75": 1, "ar1": 1, "ar2": 1}


def test_ap_goes_by_the_largest_limit_whichever_it_is():
    """pycocotools has -1 for AP when 100 is not among them."""
    many = found(*[(ELSEWHERE, 0.9)] * 100, (BOX, 0.8))
    assert scores([many], [there(BOX)])["ap"] == 0
    assert scores([many], [there(BOX)], max_detections=[101])["ap"] == pytest.approx(1 / 101)


def test_size_ranges_of_ones_own():
    ranges = {"tiny": (0, 100), "up": [100, 1600], "all": (0, float("inf")), "huge": (1e6, 1e7)}
    result = scores([found((TEN[0], 0.9))], [there(TEN[0], BOX)], size_ranges=ranges)
    assert {name: value for name, value in result.items() if name[:3] in ("ap_", "ar_")} == pytest.approx(
        {"ap_tiny": 1, "ap_up": 51 / 101, "ap_all": 51 / 101, "ap_huge": -1}
        | {"ar_tiny": 1, "ar_up": 0.5, "ar_all": 0.5, "ar_huge": -1}
    )


def test_by_class_name():
    metric = CocoAveragePrecision(classes=["cat", "dog", "emu"])
    with pytest.raises(RuntimeError, match=r"call compute\(\) first"):
        metric.per_class()
    target = {"boxes": torch.tensor([BOX, ELSEWHERE]).float(), "labels": torch.tensor([0, 2])}
    metric.update([found((BOX, 0.9), (ELSEWHERE, 0.9, 1))], [target])
    assert metric.compute()["ap"] == 0.5
    assert metric.per_class() == {"cat": 1.0, "dog": -1.0, "emu": 0.0}
    metric.reset()
    assert metric.per_class() == {"cat": 1.0, "dog": -1.0, "emu": 0.0}
    metric.update([found((BOX, 0.9))], [there()])
    metric.compute()
    assert metric.per_class() == {"cat": -1.0, "dog": -1.0, "emu": -1.0}


def test_labels_are_names_where_there_are_no_others():
    metric = CocoAveragePrecision()
    metric.update([found((BOX, 0.9), (ELSEWHERE, 0.9, 11), (ELSEWHERE, 0.9, 2))], [there(BOX)])
    metric.compute()
    assert list(metric.per_class().items()) == [("0", 1.0), ("2", -1.0), ("11", -1.0)]


# pycocotools.


def random_set(seed: int, images: int = 30, classes: int = 4) -> tuple[list[dict], list[dict]]:
    """Crowds, equal scores, areas that are not the box's, degenerate boxes, images without either, ids in disorder."""
    rng = np.random.default_rng(seed)
    detections, targets = [], []
    grid = 1.0 if seed % 2 else 1 / 64  # whole pixels have equal IoUs
    ids = rng.permutation(10 * images)[:images] + (2**53 if seed == 3 else 0)  # float64 takes 2^53 + 1 for 2^53
    for image_id in ids:
        n, m = rng.poisson(5) * rng.integers(0, 2), rng.poisson(12) * rng.integers(0, 4)
        true = rng.uniform(0, 200, (n, 4))
        true[:, 2:] = true[:, :2] + rng.choice([12, 32, 60, 140], (n, 2)) * rng.uniform(0.5, 1, (n, 2))
        boxes = rng.uniform(0, 300, (m, 4))  # half of them have no inside
        near = min(m, 3 * n)
        boxes[:near] = np.repeat(true, 3, axis=0)[:near] + rng.normal(0, 3, (near, 4))
        labels = rng.integers(0, classes, n)
        of_found = rng.integers(0, classes + 1, m)  # one more class, never there
        of_found[:near] = np.where(rng.random(near) < 0.8, np.repeat(labels, 3)[:near], of_found[:near])
        true, boxes = np.round(true / grid) * grid, np.round(boxes / grid) * grid
        area = (true[:, 2:] - true[:, :2]).prod(1) * rng.choice([0.4, 0.8, 1.0], n)
        detections.append(
            {
                "boxes": torch.tensor(boxes, dtype=torch.float32),
                "scores": torch.tensor(np.round(rng.random(m), 1 if seed < 4 else 6), dtype=torch.float32),
                "labels": torch.tensor(of_found),
            }
        )
        targets.append(
            {
                "boxes": torch.tensor(true, dtype=torch.float32),
                "labels": torch.tensor(labels),
                "iscrowd": torch.tensor(rng.random(n) < 0.15),
                "area": torch.tensor(area, dtype=torch.float32),
                "image_id": int(image_id),
            }
        )
    return detections, targets


def by_pycocotools(
    detections: list[dict], targets: list[dict], ranges: dict[str, tuple[float, float]], maxima: list[int]
) -> tuple[dict[str, float], dict[str, float], np.ndarray]:
    """The same scores, AP by label, and its own twelve figures where it has them."""
    coco, cocoeval = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")

    def rows(images: list[dict], **columns: str) -> list[dict]:
        out = []
        for image, target in zip(images, targets, strict=True):
            boxes = image["boxes"].double().numpy()
            boxes[:, 2:] -= boxes[:, :2]
            for index, box in enumerate(boxes.tolist()):
                row = {name: image[key][index].item() for name, key in columns.items()}
                out.append({"id": len(out) + 1, "image_id": target["image_id"], "bbox": box} | row)
        return out

    truth = coco.COCO()
    truth.dataset = {
        "images": [{"id": target["image_id"]} for target in targets],
        "categories": [{"id": index} for index in range(5)],
        "annotations": rows(targets, category_id="labels", area="area", iscrowd="iscrowd"),
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        results = truth.loadRes(rows(detections, category_id="labels", score="scores"))
        evaluation = cocoeval.COCOeval(truth, results, "bbox")
        evaluation.params.maxDets = maxima
        evaluation.params.areaRng = [[0, 1e10], *map(list, ranges.values())]
        evaluation.params.areaRngLbl = ["all", *ranges]
        evaluation.evaluate()
        evaluation.accumulate()
        with contextlib.suppress(Exception):  # which it has for COCO's limits and sizes only
            evaluation.summarize()
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]

    def mean(values: np.ndarray) -> float:
        return values[values > -1].mean() if (values > -1).any() else -1.0

    expected = {"ap": mean(precision[..., 0, -1])}
    expected |= {"ap50": mean(precision[0, ..., 0, -1]), "ap75": mean(precision[5, ..., 0, -1])}
    expected |= {f"ap_{name}": mean(precision[..., index, -1]) for index, name in enumerate(ranges, start=1)}
    expected |= {f"ar{limit}": mean(recall[..., 0, index]) for index, limit in enumerate(maxima)}
    expected |= {f"ar_{name}": mean(recall[..., index, -1]) for index, name in enumerate(ranges, start=1)}
    by_label = {str(index): mean(precision[:, :, index, 0, -1]) for index in range(5)}
    return expected, by_label, evaluation.stats


COCO_SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}


@pytest.mark.parametrize("seed", range(6))
def test_it_is_what_pycocotools_says(seed):
    detections, targets = random_set(seed)
    expected, by_label, stats = by_pycocotools(detections, targets, COCO_SIZES, [1, 10, 100])
    metric = CocoAveragePrecision(classes=[str(index) for index in range(5)])
    for start in range(0, len(targets), 7):
        metric.update(detections[start : start + 7], targets[start : start + 7])
    result = {name: value.item() for name, value in metric.compute().items()}
    assert result == pytest.approx(expected, abs=1e-12)
    assert list(result.values()) == pytest.approx(stats.tolist(), abs=1e-12)  # in its order
    assert metric.per_class() == pytest.approx(by_label, abs=1e-12)
    assert 0.01 < expected["ap"] < expected["ap50"] < 0.99


@pytest.mark.parametrize("maxima", [[1], [2, 5], [3, 20, 300]], ids=str)
def test_it_is_what_pycocotools_has_for_other_limits_and_sizes(maxima):
    detections, targets = random_set(6)
    ranges = {"a": (0, 700), "b": (500, 2000.5), "c": (1e9, 1e10)}
    expected, _, _ = by_pycocotools(detections, targets, ranges, maxima)
    assert scores(detections, targets, max_detections=maxima, size_ranges=ranges) == pytest.approx(expected, abs=1e-12)
    assert expected["ap_c"] == -1


def test_neither_the_order_of_images_nor_how_they_are_batched_matters():
    detections, targets = random_set(1)
    metric = CocoAveragePrecision()
    for index in torch.randperm(len(targets)).tolist():
        metric(detections[index : index + 1], targets[index : index + 1])
    assert {name: value.item() for name, value in metric.compute().items()} == scores(detections, targets)


# As a Metric.


def test_half_precision_is_taken_exactly():
    detections, targets = random_set(4)
    half = [image | {"boxes": image["boxes"].bfloat16(), "scores": image["scores"].half()} for image in detections]
    full = [image | {"boxes": image["boxes"].double(), "scores": image["scores"].double()} for image in half]
    assert scores(half, targets) == scores(full, targets)
    assert scores(half, targets) != scores(detections, targets)  # which rounding has changed


def test_what_was_given_may_change_afterwards():
    metric, image = CocoAveragePrecision(), found((BOX, 0.9))
    metric.update([image], [there(BOX)])
    image["boxes"].zero_()
    assert metric.compute()["ap"] == 1


def test_forward_counts_a_batch_once_and_returns_nothing():
    metric = CocoAveragePrecision()
    assert metric([found((ELSEWHERE, 0.9))], [there()]) is None
    assert metric([found((BOX, 0.8))], [there(BOX)]) is None
    assert metric.compute()["ap"] == 0.5


def test_more_can_come_after_a_computation_and_nothing_is_left_by_a_reset():
    metric = CocoAveragePrecision()
    metric.update([found((BOX, 0.8))], [there(BOX)])
    assert metric.compute()["ap"] == 1
    metric.update([found((ELSEWHERE, 0.9))], [there()])
    assert metric.compute()["ap"] == 0.5
    metric.reset()
    metric.update([found((BOX, 0.8))], [there(BOX)])
    assert metric.compute()["ap"] == 1


def test_no_images():
    metric = CocoAveragePrecision()
    metric.update([], [])
    assert {value.item() for value in metric.compute().values()} == {-1}
    assert metric.per_class() == {}
    with pytest.warns(UserWarning, match="before the ``update`` method"):  # torchmetrics'
        result = CocoAveragePrecision(classes=["cat"]).compute()
    assert {value.item() for value in result.values()} == {-1}


def test_it_is_copied_and_pickled_with_its_images_and_puts_nothing_into_a_checkpoint():
    module = nn.ModuleDict({"metric": CocoAveragePrecision(classes=["cat"])})
    module["metric"].update([found((ELSEWHERE, 0.9), (BOX, 0.8))], [there(BOX)])
    assert module.state_dict() == {}
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.half()):
        result = other["metric"].compute()
        assert result["ap"] == 0.5
        assert {value.dtype for value in result.values()} == {torch.float64}


@pytest.mark.gpu
def test_on_an_accelerator():
    device = torch.accelerator.current_accelerator()
    detections, targets = random_set(2)
    moved = apply_to_collection((detections, targets), Tensor, Tensor.to, device)
    metric = CocoAveragePrecision().to(device)
    metric.update(*moved)
    result = metric.compute()
    assert {value.device.type for value in result.values()} == {device.type}
    assert {name: value.item() for name, value in result.items()} == pytest.approx(scores(detections, targets))


def test_nothing_is_printed_or_logged(capfd, caplog):
    with caplog.at_level(logging.DEBUG):
        scores(*random_set(0), size_ranges={"some": (5, 6)})
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


@pytest.mark.parametrize("enabled", [True, False])
def test_collecting_garbage_goes_on_as_before(enabled):
    (gc.enable if enabled else gc.disable)()
    try:
        scores([found((BOX, 0.9))], [there(BOX)])
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


# Images that come more than once.


def test_an_image_counts_once():
    images = [found((ELSEWHERE, 0.9)), found((BOX, 0.8))], [there(image_id=5), there(BOX, image_id=torch.tensor([3]))]
    twice = [part * 2 for part in images]
    assert scores(*images)["ap"] == scores(*twice)["ap"] == 0.5
    nameless = [{"boxes": image["boxes"], "labels": image["labels"]} for image in twice[1]]
    assert scores(twice[0], nameless)["ap"] == 0.5  # two of four are right
    assert scores([*images[0], images[0][0]], [*images[1], there()])["ap"] == pytest.approx(1 / 3)


def test_of_an_image_that_comes_twice_the_first_counts():
    assert scores([found((BOX, 0.9)), found()], [there(BOX, image_id=1)] * 2)["ap"] == 1
    assert scores([found(), found((BOX, 0.9))], [there(BOX, image_id=1)] * 2)["ap"] == 0


def test_an_id_for_all_images_is_a_mistake():
    with pytest.raises(ValueError, match=r"image_id 0 stands for images of different ground truth, labels \[0\] and "):
        scores([found(), found()], [there(BOX, image_id=0), there(BOX, BOX, image_id=0)])


@pytest.mark.parametrize("moved", [(1, 0, 0, 0), (0, 0, 5, 5), (3, 3, 3, 3)])
def test_an_id_of_two_images_is_a_mistake_also_where_their_labels_are_equal(moved):
    other = tuple(a + b for a, b in zip(BOX, moved, strict=True))
    with pytest.raises(ValueError, match="image_id 4 stands for images of different ground truth, boxes "):
        scores([found(), found()], [there(BOX, image_id=4), there(other, image_id=4)])


def process(rank: int, folder: Path, shares: list[list[int]], detections: list[dict], targets: list[dict]) -> None:
    """Computes twice, the first time without its last image: of two processes one may have nothing new since."""
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", store, timedelta(seconds=30), rank=rank, world_size=len(shares))
    metric = CocoAveragePrecision()
    try:
        for part in (shares[rank][:-1], shares[rank][-1:]):
            for index in part:
                metric.update([detections[index]], [targets[index]])
            result = {name: value.item() for name, value in metric.compute().items()} | metric.per_class()
    except ValueError as error:
        result = str(error)
    torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()


def processes(folder: Path, shares: list[list[int]], detections: list[dict], targets: list[dict]) -> list:
    arguments = (folder, shares, detections, targets)
    torch.multiprocessing.start_processes(process, arguments, nprocs=len(shares), start_method="fork")
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(shares))]


@pytest.mark.parametrize(
    "shares", [([*range(0, 30, 2), 0, 2], list(range(1, 30, 2))), ([], range(30)), (range(30), [])], ids=str
)
@pytest.mark.filterwarnings("ignore:.*before the ``update`` method")
def test_two_processes_say_what_one_says_however_many_images_each_has(tmp_path, shares):
    detections, targets = random_set(0)
    alone = CocoAveragePrecision()
    alone.update(detections, targets)
    expected = {name: value.item() for name, value in alone.compute().items()} | alone.per_class()
    assert processes(tmp_path, [list(share) for share in shares], detections, targets) == [expected] * 2


def test_a_mistake_is_raised_by_all_processes(tmp_path):
    first, second = processes(tmp_path, [[0], [1]], [found()] * 2, [there(BOX, image_id=4), there(image_id=4)])
    assert first == second
    assert "image_id 4 stands for images of different ground truth" in first


class Detector(LightningModule):
    """What it detects is in its data."""

    def __init__(self) -> None:
        super().__init__()
        self.metric, self.layer = CocoAveragePrecision(), nn.Linear(1, 1)

    def validation_step(self, batch, batch_idx):
        self.metric.update([image for image, _ in batch], [target for _, target in batch])

    def on_validation_epoch_end(self):
        self.log_dict({f"val/{name}": value for name, value in self.metric.compute().items()})
        self.metric.reset()


@pytest.mark.parametrize(("named", "expected"), [(True, 2 / 3), (False, 0.5)])
def test_in_lightning_a_padding_sampler_changes_nothing_if_images_have_ids(tmp_path, named, expected):
    """Three images on two processes: the sampler repeats the first, whose wrong detection then counts twice."""
    images = [
        (found((ELSEWHERE, 0.9)), there()),
        (found((BOX, 0.8)), there(BOX)),
        (found((BOX, 0.7)), there(BOX)),
    ]
    for index, (_, target) in enumerate(images):
        if named:
            target["image_id"] = index
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    (result,) = trainer.validate(Detector(), DataLoader(images, batch_size=1, collate_fn=list), verbose=False)
    assert result["val/ap"] == pytest.approx(expected)


# What is wrong is said in one line.

RIGHT = found((BOX, 0.9), (BOX, 0.8))


@pytest.mark.parametrize(
    ("detection", "target", "message"),
    [
        ({}, {}, "detections[0] has no boxes and no scores and no labels: expected boxes, scores, labels"),
        (RIGHT, {"boxes": torch.zeros(0, 4)}, "targets[0] has no labels: expected boxes, labels, and if there are any"),
        (RIGHT | {"scores": [0.9, 0.8]}, there(), "detections[0]['scores'] is a list: expected a tensor"),
        (RIGHT | {"boxes": torch.zeros(4)}, there(), "detections[0]['boxes'] has shape (4,): expected (n, 4)"),
        (RIGHT | {"boxes": torch.tensor(1.0)}, there(), "detections[0]['boxes'] has shape (): expected (n, 4)"),
        (
            RIGHT,
            there() | {"boxes": torch.zeros(0)},
            "targets[0]['boxes'] has shape (0,): expected (n, 4), also",
        ),
        (RIGHT | {"scores": torch.zeros(3)}, there(), "detections[0]['scores'] has shape (3,): expected (2,), as many"),
        (RIGHT, there(BOX) | crowds(0, 0), "targets[0]['iscrowd'] has shape (2,): expected (1,), as many as boxes"),
        (RIGHT | {"labels": torch.zeros(2)}, there(), "detections[0]['labels'] is torch.float32: expected integers"),
        (RIGHT | {"scores": torch.tensor([0.1, torch.nan])}, there(), "detections[0]['scores'] holds NaN or infinity"),
        (RIGHT, there((0, 0, torch.inf, 1)), "targets[0]['boxes'] holds NaN or infinity: expected finite numbers"),
        (RIGHT, there(BOX, area=torch.tensor([torch.nan])), "targets[0]['area'] holds NaN or infinity"),
        (
            RIGHT | {"labels": torch.tensor([0, 3])},
            there(),
            "detections[0]['labels'] holds 3: labels run from 0, 3",
        ),
        (RIGHT, there(BOX) | {"labels": torch.tensor([-1])}, "targets[0]['labels'] holds -1: labels run from 0"),
        (RIGHT, there(image_id=1.5), "targets[0]['image_id'] is 1.5: expected a whole number or a text"),
        (RIGHT, there(image_id=("a", 1)), "targets[0]['image_id'] is ('a', 1): expected a whole number or a text"),
        (
            RIGHT,
            there() | {"boxes": torch.zeros(0, 4, device="meta")},
            "targets[0]['boxes'] is on meta and detections[0]['boxes'] on cpu: expected one device a batch",
        ),
    ],
    ids=str,
)
def test_wrong_input(detection, target, message):
    metric = CocoAveragePrecision(classes=["a", "b", "c"])
    with pytest.raises(ValueError) as error:  # noqa: PT011
        metric.update([detection], [target])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    metric.update([RIGHT], [there(BOX)])
    assert metric.compute()["ap"] == 1  # nothing of it was kept


def test_as_many_detections_as_targets():
    with pytest.raises(ValueError, match="2 detections for 1 targets: expected a dict for each image"):
        CocoAveragePrecision().update([RIGHT, RIGHT], [there()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size_ranges": {"a": (5, 1)}}, r"size range 'a' is \(5, 1\): expected a lowest and a highest area"),
        ({"size_ranges": {"a": (1,)}}, "size range 'a' is "),
        ({"size_ranges": {"a": (float("nan"), 1)}}, "size range 'a' is "),
        ({"classes": ["cat", "dog", "cat"]}, "each name may occur once"),
        ({"max_detections": ()}, r"max_detections is \(\): expected one or more positive whole numbers"),
        ({"max_detections": (0, 10)}, "max_detections is "),
        ({"max_detections": (1.5,)}, "max_detections is "),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        CocoAveragePrecision(**options)
