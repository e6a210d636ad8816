"""Objects out of a valid range of sizes: neither learned nor background, in assignment, losses and batches."""

import math
import random
import re
import sys
from functools import partial

import numpy as np
import pytest
import torch
from test_detection_parts import (
    CLASSES,
    HEADS,
    IMPROPER,
    NeverWaits,
    cells_of,
    gradients,
    objects,
    outputs_of,
    total_loss,
)
from test_fpn_detector import QUIET, SMALL, Gradients, Pyramid, collate, samples
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader
from torchvision import ops

from datamodules.detection import DetectionDataModule
from datamodules.reading.shape_images import ShapeSettings
from datamodules.shapes import ShapeSamples
from datamodules.transforms.scales import ranges_of
from zoo import FPNDetector
from zoo._lightning import Trainer
from zoo.common.batch import images_and_targets
from zoo.detection import BACKGROUND, IGNORE, Cells, assign, make_cells, pad_targets
from zoo.detection.scale.ranges import check_valid_ranges, within

SIZE = (192, 160)


def ranged(counts, seed: int = 0, crowd: bool = False) -> list[dict[str, Tensor]]:
    """Images with objects of which about half are out of the range, and of the others one in four is a crowd."""
    generator = torch.Generator().manual_seed(seed)
    images = objects(counts, *SIZE, seed)
    for image in images:
        count = len(image["labels"])
        image["in_range"] = torch.rand(count, generator=generator) < 0.5
        if crowd:
            image["iscrowd"] = torch.rand(count, generator=generator) < 0.25
    return images


def without(image: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[int]]:
    """An image as if there were no objects out of the range, and which of its objects that leaves."""
    crowd = image.get("iscrowd", torch.zeros_like(image["in_range"]))
    kept = image["in_range"] | crowd
    return {key: value[kept] for key, value in image.items() if key != "in_range"}, kept.nonzero().flatten().tolist()


def theirs_by_loop(head: str, cells: Cells, image: dict[str, Tensor]) -> list[bool]:
    """Which cells an object out of the range takes out of the background, object by object and cell by cell."""
    theirs = [False] * len(cells.anchors)
    crowd = image.get("iscrowd", torch.zeros_like(image["in_range"]))
    for box in image["boxes"][~image["in_range"] & ~crowd]:
        if head != "fcos":
            iou = ops.box_iou(box[None], cells.anchors)[0].tolist()
            theirs = [before or overlap > 0.3 for before, overlap in zip(theirs, iou, strict=True)]
            continue
        x1, y1, x2, y2 = box.tolist()
        rows = zip(cells.centers.tolist(), cells.sides.tolist(), cells.ranges.tolist(), strict=True)
        for i, ((x, y), stride, (low, high)) in enumerate(rows):
            sides = (x - x1, y - y1, x2 - x, y2 - y)
            near = abs(x - (x1 + x2) / 2) < 1.5 * stride and abs(y - (y1 + y2) / 2) < 1.5 * stride
            theirs[i] |= min(sides) > 0 and near and low <= max(sides) <= high
    return theirs


@pytest.mark.parametrize("crowd", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_an_object_out_of_the_range_changes_the_background_alone(head, crowd):
    """Beside the objects of the range alone, and a loop: nobody else's match changes, nor what is ignored without."""
    cells, images = cells_of(head, *SIZE), ranged([6, 0, 40, 1, 9], crowd=crowd)
    found = assign(head, cells, pad_targets(images))
    for image, match in zip(images, found.tolist(), strict=True):
        alone, kept = without(image)
        (plain,) = assign(head, cells, pad_targets([alone])).tolist()
        theirs = theirs_by_loop(head, cells, image)
        expected = [
            kept[m] if m >= 0 else IGNORE if m == IGNORE or hidden else BACKGROUND
            for m, hidden in zip(plain, theirs, strict=True)
        ]
        assert match == expected
    changed = sum(sum(theirs_by_loop(head, cells, image)) for image in images)
    assert changed > 50


@pytest.mark.parametrize("head", HEADS)
def test_it_takes_cells_out_of_the_classification_loss_alone(head):
    cells, images = cells_of(head, *SIZE), ranged([5, 3])
    alone = [without(image)[0] for image in images]
    match, before = (assign(head, cells, pad_targets(each)) for each in (images, alone))
    hidden = (match == IGNORE) & (before == BACKGROUND)
    assert hidden.any()
    _, logits, *others = gradients(head, cells, pad_targets(images))
    _, expected, *unchanged = gradients(head, cells, pad_targets(alone))
    assert (logits[hidden] == 0).all()
    assert torch.equal(logits[~hidden], expected[~hidden])
    assert all(torch.equal(a, b) for a, b in zip(others, unchanged, strict=True))


@pytest.mark.parametrize("head", HEADS)
def test_images_with_nothing_in_the_range_teach_finite_losses_of_the_other_background(head):
    cells, images = cells_of(head, *SIZE), objects([4, 12], *SIZE)
    for image in images:
        image["in_range"] = torch.zeros_like(image["labels"], dtype=torch.bool)
    targets = pad_targets(images)
    assert not targets.valid.any()
    loss, logits, *others = gradients(head, cells, targets)
    ignored = assign(head, cells, targets) == IGNORE
    assert 0 < ignored.sum() < ignored.numel()
    raw = outputs_of(head, cells, 2)[0]
    each = ops.sigmoid_focal_loss(raw, torch.zeros_like(raw)).sum(-1).detach()
    torch.testing.assert_close(loss, each[~ignored].sum())
    assert logits.isfinite().all()
    assert all((gradient == 0).all() for gradient in others)


@pytest.mark.parametrize("head", HEADS)
def test_with_everything_in_the_range_nothing_changes(head):
    cells, plain = cells_of(head, *SIZE), objects([5, 0, 20], *SIZE)
    said = [{**image, "in_range": torch.ones_like(image["labels"])} for image in plain]
    expected, found = (gradients(head, cells, pad_targets(each)) for each in (plain, said))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# By hand.


def matched(head: str, anchors: list[list[float]], boxes: list[list[float]], in_range: list[bool]) -> list[int]:
    placed = torch.tensor(anchors)
    ranges = torch.tensor([0.0, math.inf]).expand(len(placed), 2)
    image = {"boxes": torch.tensor(boxes), "labels": torch.zeros(len(boxes), dtype=torch.int64), "in_range": in_range}
    return assign(head, Cells(placed, ranges, (placed,)), pad_targets([image]))[0].tolist()


def test_retinanet_by_hand():
    """IoUs with the large object: 1, .5, .3 exactly and .25; with the small one 0 but for the last."""
    anchors = [[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 3, 10], [0, 0, 5, 5], [20, 20, 24, 24]]
    anchors = [[float(side) for side in anchor] for anchor in anchors]
    boxes = [[0.0, 0, 10, 10], [20.0, 20, 24, 24]]
    assert matched("retinanet", anchors, boxes, [False, True]) == [IGNORE, IGNORE, BACKGROUND, BACKGROUND, 1]
    assert matched("retinanet", anchors, boxes, [True, False]) == [0, 0, BACKGROUND, BACKGROUND, IGNORE]
    assert matched("retinanet", anchors, boxes, [False, False]) == [IGNORE, IGNORE, BACKGROUND, BACKGROUND, IGNORE]
    # One object nearly inside of another: its anchor stays its own, though it overlaps the other by .64.
    assert matched("retinanet", [[0.0, 0, 8, 8]], [[0.0, 0, 10, 10], [0, 0, 8, 8]], [False, True]) == [1]


def test_atss_by_hand():
    """One object overlaps the anchors by 1/9, 1/4, 1/9 and 0, which gives it the second and is nowhere above .3.

    The other does so by 0, 1/15, 5/11 and 1/15, which gives it the third, and is above .3 there.
    """
    anchors = [[0.0, 0, 4, 4], [2, 0, 6, 4], [4, 0, 8, 4], [9, 0, 13, 4]]
    boxes = [[3.0, 1, 5, 3], [5.5, 0, 9.5, 4]]
    assert matched("atss", anchors, boxes, [True, True]) == [BACKGROUND, 0, 1, BACKGROUND]
    assert matched("atss", anchors, boxes, [True, False]) == [BACKGROUND, 0, IGNORE, BACKGROUND]
    assert matched("atss", anchors, boxes, [False, True]) == [BACKGROUND, BACKGROUND, 1, BACKGROUND]


def test_fcos_by_hand():
    """Points 8 apart; an object of 48 x 48 out of the range: of its 36 points, the 4 within 12 pixels of its centre."""
    cells = make_cells("fcos", [(8, 8)], (8,), (64, 64))
    image = {"boxes": torch.tensor([[0.0, 0, 48, 48]]), "labels": torch.tensor([0]), "in_range": [False]}
    match = assign("fcos", cells, pad_targets([image]))[0].view(8, 8)
    assert (match == IGNORE).nonzero().tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]
    assert (match == BACKGROUND).sum() == 60
    # A small object of the range in its middle keeps its one point, which the larger would lose to it as well.
    image = {
        "boxes": torch.tensor([[0.0, 0, 48, 48], [17, 17, 23, 23]]),
        "labels": torch.tensor([0, 1]),
        "in_range": [False, True],
    }
    match = assign("fcos", cells, pad_targets([image]))[0].view(8, 8)
    assert match[2, 2] == 1
    assert (match == IGNORE).nonzero().tolist() == [[2, 3], [3, 2], [3, 3]]
    # And a smaller one out of the range takes no point from a larger in it.
    image["in_range"] = [True, False]
    assert (assign("fcos", cells, pad_targets([image]))[0] == 0).sum() == 4
    # Its level counts: sides farther than 64 pixels are those of the next.
    two = make_cells("fcos", [(16, 16), (8, 8)], (8, 16), (128, 128))
    wide = {"boxes": torch.tensor([[0.0, 0, 128, 32]]), "labels": torch.tensor([0]), "in_range": [False]}
    fine, coarse = assign("fcos", two, pad_targets([wide]))[0].split(two.counts)
    assert (fine == IGNORE).sum() == 0
    assert (coarse == IGNORE).sum() == 4


# Targets.


def test_targets_say_who_is_unwanted():
    boxes = torch.tensor([[0.0, 0, 8, 8], [0, 0, 30, 30], [0, 0, 50, 50]])
    image = {
        "boxes": boxes,
        "labels": torch.tensor([1, 2, 3]),
        "iscrowd": torch.tensor([0, 0, 1]),
        "in_range": torch.tensor([True, False, False]),
    }
    none = {"boxes": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
    silent = {"boxes": boxes, "labels": torch.tensor([1, 2, 3])}
    targets = pad_targets([image, none, silent])
    assert targets.valid[:, :3].tolist() == [[True, False, False], [False] * 3, [True] * 3]
    assert targets.unwanted[:, :3].tolist() == [[False, True, False], [False] * 3, [False] * 3]
    assert targets.crowd[:, :3].tolist() == [[False, False, True], [False] * 3, [False] * 3]
    assert not targets.unwanted[:, 3:].any()
    assert targets.unwanted.dtype == torch.bool
    assert torch.equal(targets.boxes[0, :3], boxes)
    assert pad_targets([none, silent]).unwanted is None


@pytest.mark.parametrize("head", HEADS)
def test_boxes_that_are_none_are_not_unwanted_either(head):
    cells, good = cells_of(head, 96, 64), objects([3, 0, 5], 96, 64)
    bad = [
        {
            "boxes": torch.cat([IMPROPER, each["boxes"]]),
            "labels": torch.cat([torch.arange(8) % CLASSES, each["labels"]]),
            "in_range": torch.cat([torch.zeros(8, dtype=torch.bool), torch.ones(len(each["labels"])).bool()]),
        }
        for each in good
    ]
    expected, found = (gradients(head, cells, pad_targets(each)) for each in (good, bad))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


FORMS = {
    "bool": lambda flags: torch.tensor(flags),
    "uint8": lambda flags: torch.tensor(flags, dtype=torch.uint8),
    "int64": lambda flags: torch.tensor(flags, dtype=torch.int64),
    "float": lambda flags: torch.tensor(flags, dtype=torch.float32),
    "list": lambda flags: flags,
    "list of numbers": lambda flags: [int(flag) for flag in flags],
    "tuple": tuple,
    "array": np.array,
}


@pytest.mark.parametrize("key", ["in_range", "iscrowd"])
@pytest.mark.parametrize("form", FORMS)
def test_flags_come_in_every_form(form, key):
    image = {"boxes": torch.tensor([[0.0, 0, 8, 8], [0, 0, 30, 30]]), "labels": torch.tensor([1, 2])}
    batch = {"images": torch.zeros(2, 3, 64, 64), "targets": [image | {key: FORMS[form]([False, True])}, image]}
    _, read = images_and_targets(batch)
    found, expected = (
        pad_targets([{**target, key: flags} for target, flags in zip(read, rows, strict=True)])
        for rows in ([target.get(key) for target in read], (torch.tensor([False, True]), None))
    )
    for name in ("valid", "crowd", "unwanted"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None and b is None) or torch.equal(a, b)
    assert found.valid.sum() == 3


def test_flags_of_another_number_are_refused():
    image = {"boxes": torch.zeros(2, 4), "labels": torch.zeros(2).long(), "in_range": [True]}
    with pytest.raises(
        ValueError, match=r"in_range of sample 0 of the batch is a tensor of shape \(1,\): expected \(2"
    ):
        images_and_targets((torch.zeros(1, 3, 8, 8), [image]))


# Parts, graphs, waits.


@pytest.mark.parametrize("head", HEADS)
def test_large_batches_are_matched_in_parts(head, monkeypatch):
    cells, targets = cells_of(head, *SIZE), pad_targets(ranged([3, 0, 12, 5, 1], crowd=True))
    expected = assign(head, cells, targets)
    for images_at_once in (2, 0.1):
        monkeypatch.setattr(sys.modules[assign.__module__], "MAX_PAIRS", int(images_at_once * 16 * len(cells.anchors)))
        assert torch.equal(assign(head, cells, targets), expected)


@pytest.mark.parametrize("head", ["fcos", *(pytest.param(name, marks=pytest.mark.slow) for name in HEADS[1:])])
def test_with_and_without_a_range_there_are_two_graphs(head):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(partial(total_loss, head), fullgraph=True, backend=counter)
    cells = cells_of(head, 96, 64)
    outputs = outputs_of(head, cells, 3)
    for seed in range(3):
        plain = objects([3, 0, 5], 96, 64, seed)
        said = [{**image, "in_range": torch.arange(len(image["labels"])) % 2} for image in plain]
        for images in (plain, said):
            targets = pad_targets(images)
            torch.testing.assert_close(compiled(outputs, cells, targets), total_loss(head, outputs, cells, targets))
    assert counter.frame_count == 2


@pytest.mark.parametrize("head", HEADS)
def test_nothing_waits_for_the_device(head):
    cells, images = cells_of(head, *SIZE), ranged([3, 0, 12], crowd=True)
    outputs = outputs_of(head, cells, 3)
    with NeverWaits():
        total_loss(head, outputs, cells, pad_targets(images, torch.device("cpu"))).backward()
    assert all(each.grad.abs().sum() > 0 for each in outputs)


# Ranges.


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([(0, 40), (50, None)], "leave objects of 40 to 50 pixels to none of a0"),
        ([(50, None), (0, 20), (10, 40)], "leave objects of 40 to 50 pixels to none of a0"),
        ([(8, None)], "leave objects of 0 to 8 pixels to none of a0"),
        ([(0, 40), (30, 90)], "leave objects from 90 pixels on to none of a0"),
        ([(0, 100), (10, 20), (120, 130), (140, None)], "leave objects of 100 to 120 pixels to none of a0"),
        ([(40, 30), (0, None)], r"the valid range of a0 is \[40, 30\]: expected 0 <= low < high"),
        ([(0, None), (-1, 30)], r"the valid range of a1 is \[-1, 30\]: expected 0 <= low < high"),
        ([(0, None), (None, 30)], r"the valid range of a1 is \[None, 30\]"),
        ([(math.nan, None)], r"the valid range of a0 is \[nan, None\]"),
        ([(0, 1, 2)], r"the valid range of a0 is \[0, 1, 2\]"),
        ([()], r"the valid range of a0 is \[\]"),
    ],
    ids=str,
)
def test_ranges_that_leave_a_size_to_nobody_or_are_none(ranges, message):
    with pytest.raises(ValueError, match=message):
        check_valid_ranges(ranges, [f"a{i}" for i in range(len(ranges))])


@pytest.mark.parametrize(
    "ranges", [[(0, None)], [(90, None), (0, 90)], [(0, 90), (30, 160), (90, None)], [(0, math.inf)]]
)
def test_ranges_that_cover_all_sizes(ranges):
    check_valid_ranges(ranges, [f"a{i}" for i in range(len(ranges))])
    with pytest.raises(ValueError, match=f"valid_ranges are {len(ranges)} for one, two, three, four: expected one for"):
        check_valid_ranges(ranges, ["one", "two", "three", "four"])


def test_detectors_and_data_refuse_the_same_ranges():
    """Each has a check of its own, since neither package knows the other."""
    lows, highs, refused = (
        (0, 0.0, 0, 8, 20, 20, 20.5, 64, None, -1),
        (8, 20, 20, 64, None, None, math.inf, math.nan),
        0,
    )
    draw, count = random.Random(0), 400
    for _ in range(count):
        ranges = [(draw.choice(lows), draw.choice(highs)) for _ in range(draw.randint(1, 3))]
        ranges += [(0, 20), (20, None)] if draw.random() < 0.3 else []
        names = [str(number) for number in range(len(ranges))]
        found = []
        for check in (partial(check_valid_ranges, ranges, names), partial(ranges_of, ranges, range(len(ranges)))):
            try:
                check()
                found.append("")
            except ValueError as error:
                found.append(re.sub(r"short side |, or null.*| to none of .*", "", str(error)))
        assert found[0] == found[1]
        refused += bool(found[0])
    assert 40 < refused < count - 40


def test_sizes_are_roots_of_areas_both_ends_included():
    boxes = torch.tensor([[0.0, 0, 4, 9], [0, 0, 6, 6], [10, 10, 16, 17], [0, 0, 0, 9], [9, 9, 0, 0]])
    assert within(boxes, 6, None).tolist() == [True, True, True, False, False]
    assert within(boxes, 0, 6).tolist() == [True, True, False, True, True]
    assert within(boxes, 6, 6).tolist() == [True, True, False, False, False]
    low, high = torch.tensor([0.0, 7, 0, 0, 1]), torch.tensor([5, math.inf, math.inf, 0, 2])
    assert within(boxes, low, high).tolist() == [False, False, True, True, False]
    far = torch.tensor([[1000.0, 1000, 1003, 1003]], dtype=torch.float64)
    assert within(far, 3, 3).tolist() == [True]


# Training at many sizes.


class SquaresDataModule(DetectionDataModule):
    """Rendered shapes, with all options of a detection data module."""

    def raw_samples(self, split):
        return ShapeSamples(ShapeSettings(image_size=64, max_size=51.0), size=16) if split == "train" else None


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_compiled_detector_is_compiled_no_more_often_than_there_are_sizes():
    """The network; the loss is one graph for all of them. Nothing is compiled again for a size that was there."""
    torch._dynamo.reset()
    module = FPNDetector(Pyramid(), 6, neck="single", channels=16, head_depth=1, image_size=64)
    graphs: list[bool] = []

    def backend(graph, inputs):
        graphs.append(any("conv" in str(node.target) for node in graph.graph.nodes))
        return graph

    module.compile(fullgraph=True, backend=backend)
    seen: set[tuple[int, ...]] = set()
    ranges = {"valid_ranges": [(24, None), *[(0, None)] * 3, (0, 24)]}
    for options in (
        {"short_sides": [32, 64, 64, 64, 96]},
        {"short_sides": [56, 64, 72, 88, 96], "max_size": 96, "size_buckets": [(64, 64), (96, 96)]},
    ):
        data = SquaresDataModule(batch_size=2, num_workers=0, image_size=64, **options, **ranges)
        shapes = set()
        for epoch in range(2):
            loader = data.train_dataloader()
            loader.sampler.set_epoch(epoch)
            for batch in loader:
                images, targets = data.on_after_batch_transfer(batch, 0)
                before, shape = len(graphs), tuple(images.shape[2:])
                losses = module.loss(module(images), targets)
                assert all(loss.isfinite() for loss in losses.values())
                assert len(graphs) == before or shape not in seen
                seen.add(shape)
                shapes.add(shape)
        assert shapes == {(64, 64), (96, 96)} | (set() if "size_buckets" in options else {(32, 32)})
    assert graphs.count(False) == 1
    assert 1 <= graphs.count(True) <= 3


@pytest.mark.parametrize("head", HEADS)
def test_a_detector_learns_nothing_from_what_is_out_of_the_range(head):
    """The same step as one on images without those objects, where nothing overlaps them; and no error in evaluation."""
    module = FPNDetector(Pyramid(), CLASSES, head, levels=(3, 4), channels=16, head_depth=1, image_size=64)
    maps = module(torch.rand(2, 3, 96, 96))
    near = {"boxes": torch.tensor([[10.0, 10, 70, 70]]), "labels": torch.tensor([1])}
    both = {
        "boxes": torch.cat([near["boxes"], torch.tensor([[500.0, 500, 520, 520]])]),
        "labels": torch.tensor([1, 2]),
        "in_range": [True, False],
    }
    expected, found = (module.loss(maps, [target, near]) for target in (near, both))
    for key, value in expected.items():
        assert torch.equal(found[key], value)
    none = module.loss(maps, [{**near, "in_range": [False]}] * 2)
    assert none["box"] == 0 < expected["box"]


def test_two_processes_with_unequal_ranges_learn_as_one_with_all_of_them():
    """One of them has nothing in the range: it is divided by what all of them find."""
    data = samples((4, 3, 2, 5))  # ranks take every other image
    for number, (_, target) in enumerate(data):
        target["in_range"] = [number % 2 == 0 and i % 2 == 0 for i in range(len(target["labels"]))]
    for processes in (2, 1):
        torch.manual_seed(0)
        module = Gradients(**SMALL, freeze_norm=True)
        several = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": True} if processes == 2 else {}
        loader = DataLoader(data, 4 // processes, collate_fn=collate)
        Trainer(**QUIET | {"max_steps": 1, "limit_val_batches": 0} | several).fit(module, loader)
    expected, *found = (torch.load(f"gradients_{name}.pt") for name in ("1_0", "2_0", "2_1"))
    for name, value in expected.items():
        for each in found if value is not None else ():
            torch.testing.assert_close(each[name], value, rtol=1e-4, atol=1e-6, msg=name)
