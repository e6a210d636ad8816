"""Cells, assignment, losses, pyramid and head of the detector, against torchvision, loops, closed forms and by hand."""

import math
import statistics
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import ops, tv_tensors
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead, _default_anchorgen

from zoo.detection import (
    BACKGROUND,
    FPN,
    IGNORE,
    Cells,
    DenseHead,
    SimpleFeaturePyramid,
    SingleLevel,
    Targets,
    assign,
    assign_atss,
    assign_fcos,
    assign_retinanet,
    centerness_of,
    dense_loss,
    focal_loss,
    giou_loss,
    make_cells,
    pad_targets,
)
from zoo.detection.assign import pairwise_iou
from zoo.detection.cells import ATSS_WEIGHTS, MAX_LOG_RATIO, decode_deltas, decode_distances, encode_deltas
from zoo.detection.losses import decode, softplus

HEADS = ("fcos", "atss", "retinanet")
STRIDES = (8, 16, 32, 64, 128)
CLASSES = 7


def shapes_of(height: int, width: int) -> list[tuple[int, int]]:
    return [(math.ceil(height / stride), math.ceil(width / stride)) for stride in STRIDES]


def cells_of(head: str, height: int, width: int, anchors: str = "centered") -> Cells:
    return make_cells(head, shapes_of(height, width), STRIDES, (height, width), anchors)


def objects(counts, height: int, width: int, seed: int = 0, whole: bool = False) -> list[dict[str, Tensor]]:
    """Boxes with sides from 6 pixels up, anywhere in the image; ``whole`` ones have whole coordinates, which tie."""
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for count in counts:
        sides = (torch.rand(count, 2, generator=generator) * 3 + 1.8).exp()
        corner = torch.rand(count, 2, generator=generator) * (torch.tensor([width, height]) - sides).clamp(min=1)
        boxes = torch.cat([corner, corner + sides], 1)
        labels = torch.randint(CLASSES, (count,), generator=generator)
        targets.append({"boxes": boxes.round() if whole else boxes, "labels": labels})
    return targets


def outputs_of(head: str, cells: Cells, images: int, seed: int = 0) -> list[Tensor]:
    """Raw predictions such as a head could make: logits, boxes and centerness, or none for RetinaNet."""
    generator = torch.Generator().manual_seed(seed)
    count = len(cells.anchors)
    logits = torch.randn(images, count, CLASSES, generator=generator) - 2
    boxes = torch.randn(images, count, 4, generator=generator)
    boxes = boxes.abs() + 0.1 if head == "fcos" else 0.3 * boxes
    outputs = (
        [logits, boxes] if head == "retinanet" else [logits, boxes, torch.randn(images, count, generator=generator)]
    )
    return [each.requires_grad_() for each in outputs]


def total_loss(head: str, outputs: list[Tensor], cells: Cells, targets: Targets, **options) -> Tensor:
    logits, boxes, *centerness = outputs
    match = assign(head, cells, targets)
    sums = dense_loss(head, logits, boxes, centerness[0] if centerness else None, match, cells, targets, **options)
    return (sums.classification + sums.box + sums.centerness).sum() / sums.positives.sum().clamp(min=1)


def gradients(head: str, cells: Cells, targets: Targets, **options) -> list[Tensor]:
    """The loss of fixed outputs, and its gradients."""
    outputs = outputs_of(head, cells, len(targets.boxes))
    loss = total_loss(head, outputs, cells, targets, **options)
    loss.backward()
    return [loss.detach(), *(each.grad for each in outputs)]


# Cells and anchors.


def test_centred_points_and_anchors_by_hand():
    cells = make_cells("fcos", [(1, 2), (1, 1)], (8, 16), (8, 16))
    assert cells.anchors.tolist() == [[0, 0, 8, 8], [8, 0, 16, 8], [0, 0, 16, 16]]
    assert cells.centers.tolist() == [[4, 4], [12, 4], [8, 8]]
    assert cells.ranges.tolist() == [[0, 64], [0, 64], [64, math.inf]]
    assert cells.counts == (2, 1)
    assert make_cells("atss", [(2, 1)], [8], (16, 8)).anchors.tolist() == [[-28, -28, 36, 36], [-28, -20, 36, 44]]


def test_retinanets_nine_anchors_have_three_scales_of_three_shapes_around_the_cells_centre():
    anchors = make_cells("retinanet", [(2, 3)], [8], (16, 24)).anchors.view(2, 3, 9, 4)
    centres = (anchors[..., :2] + anchors[..., 2:]) / 2
    expected = torch.tensor([[[4.0, 4], [12, 4], [20, 4]], [[4, 12], [12, 12], [20, 12]]])
    torch.testing.assert_close(centres, expected[:, :, None].expand(2, 3, 9, 2))
    width, height = (anchors[1, 2, :, 2:] - anchors[1, 2, :, :2]).unbind(1)
    torch.testing.assert_close((width * height).sqrt(), torch.tensor([32.0, 32 * 2 ** (1 / 3), 32 * 2 ** (2 / 3)] * 3))
    torch.testing.assert_close(height / width, torch.tensor([0.5, 1.0, 2.0]).repeat_interleave(3))


@pytest.mark.parametrize("size", [(192, 160), (200, 333), (97, 131), (800, 1344), (33, 64)])
def test_in_torchvisions_mode_anchors_are_exactly_torchvisions(size):
    features = [torch.zeros(1, 1, *shape) for shape in shapes_of(*size)]
    images = ImageList(torch.zeros(1, 3, *size), [size])
    points = AnchorGenerator(tuple((stride,) for stride in STRIDES), ((1.0,),) * 5)
    for head, generator in (("fcos", points), ("retinanet", _default_anchorgen())):
        (expected,) = generator(images, features)
        assert torch.equal(cells_of(head, *size, "torchvision").anchors, expected)
        assert not torch.equal(cells_of(head, *size).anchors, expected)


@pytest.mark.parametrize("head", HEADS)
def test_anchors_are_float32_whatever_the_default(head):
    """Lightning's bf16-true makes bfloat16 the default type of new tensors."""
    expected = cells_of(head, 96, 128)
    torch.set_default_dtype(torch.bfloat16)
    found = cells_of(head, 96, 128)
    assert found.anchors.dtype == found.ranges.dtype == torch.float32
    assert torch.equal(found.anchors, expected.anchors)
    assert torch.equal(found.ranges, expected.ranges)


def test_unknown_choices_of_cells():
    with pytest.raises(ValueError, match="unknown anchors 'centred': expected one of centered, torchvision"):
        make_cells("fcos", [(1, 1)], [8], (8, 8), "centred")
    with pytest.raises(ValueError, match="unknown head 'yolo': expected one of fcos, atss, retinanet"):
        make_cells("yolo", [(1, 1)], [8], (8, 8))


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), ATSS_WEIGHTS])
def test_deltas_decode_to_what_was_encoded(weights):
    anchors = cells_of("retinanet", 64, 64).anchors.double()
    boxes = objects([len(anchors)], 64, 64)[0]["boxes"].double()
    deltas = encode_deltas(boxes, anchors, weights)
    torch.testing.assert_close(decode_deltas(deltas, anchors, weights), boxes)


def test_deltas_and_distances_by_hand():
    anchor = torch.tensor([10.0, 20, 30, 60])  # centre (20, 40), 20 by 40
    box = torch.tensor([20.0, 40, 60, 60])  # centre (40, 50), 40 by 20
    log = math.log(2)
    assert encode_deltas(box, anchor, (1.0, 2.0, 3.0, 4.0)).tolist() == pytest.approx([1, 0.5, 3 * log, -4 * log])
    huge = decode_deltas(torch.tensor([0.0, 0, 99, 99]), anchor, (1.0, 1.0, 1.0, 1.0))
    assert (huge[2:] - huge[:2]).tolist() == pytest.approx([20 * 62.5, 40 * 62.5])
    assert math.log(62.5) == MAX_LOG_RATIO
    point = torch.tensor([16.0, 16, 24, 24])  # (20, 20), stride 8
    assert decode_distances(torch.tensor([1.0, 0.5, 0, 2]), point).tolist() == [12, 16, 20, 36]
    assert torch.equal(decode("fcos", torch.ones(4), point), decode_distances(torch.ones(4), point))
    assert torch.equal(decode("atss", torch.ones(4), point), decode_deltas(torch.ones(4), point, (10, 10, 5, 5)))
    assert torch.equal(decode("retinanet", torch.ones(4), point), decode_deltas(torch.ones(4), point, (1, 1, 1, 1)))


# Targets of one shape.


@pytest.mark.parametrize(("most", "slots"), [(0, 8), (1, 8), (8, 8), (9, 16), (64, 64), (65, 128)])
def test_slots_are_the_smallest_power_of_two_from_8_that_holds_all(most, slots):
    targets = pad_targets(objects([0, most, most // 2], 100, 100))
    assert targets.boxes.shape == (3, slots, 4)
    assert targets.labels.shape == targets.valid.shape == (3, slots)
    assert targets.valid.sum(1).tolist() == [0, most, most // 2]
    assert targets.crowd is None
    assert (targets.boxes[~targets.valid] == 0).all()


def test_targets_keep_their_values_whatever_their_type():
    boxes = torch.tensor([[1.5, 2, 30, 40], [0, 0, 5, 5]])
    wrapped = tv_tensors.BoundingBoxes(boxes.double(), format="XYXY", canvas_size=(50, 50))
    targets = pad_targets(
        [
            {"boxes": wrapped, "labels": torch.tensor([3, 1], dtype=torch.int32), "iscrowd": torch.tensor([0, 1])},
            {"boxes": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)},  # no crowd, and no second dimension
        ]
    )
    assert type(targets.boxes) is Tensor
    assert targets.boxes.dtype == torch.float32
    assert torch.equal(targets.boxes[0, :2], boxes)
    assert targets.labels[0].tolist() == [3, 1] + [0] * 6
    assert targets.valid[0].tolist() == [True] + [False] * 7
    assert targets.crowd[0].tolist() == [False, True] + [False] * 6


IMPROPER = torch.tensor(
    [
        [20.0, 20, 20, 40],  # no width
        [20, 40, 40, 40],  # no height
        [40, 20, 20, 40],  # inside out
        [math.nan, 0, 30, 30],
        [0, 0, 30, math.nan],
        [0, 0, math.inf, 30],
        [-math.inf, -math.inf, math.inf, math.inf],
        [0, 0, 0, 0],
    ]
)


@pytest.mark.parametrize("crowd", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_boxes_that_are_none_change_nothing(head, crowd):
    cells = cells_of(head, 96, 64)
    good = objects([3, 0, 5], 96, 64)
    bad = [
        {
            "boxes": torch.cat([IMPROPER, each["boxes"]]),
            "labels": torch.cat([torch.arange(8) % CLASSES, each["labels"]]),
            "iscrowd": torch.cat([torch.full((8,), crowd), torch.zeros(len(each["labels"]), dtype=torch.bool)]),
        }
        for each in good
    ]
    expected, found = (gradients(head, cells, pad_targets(each)) for each in (good, bad))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(each.isfinite().all() for each in found)


def test_negative_labels_and_boxes_beyond_the_image_teach_nothing():
    cells = cells_of("retinanet", 64, 64)
    good = {"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([2])}
    outside = {
        "boxes": torch.cat([good["boxes"], torch.tensor([[-500.0, -500, -400, -400], [9.0, 9, 50, 50]])]),
        "labels": torch.tensor([2, 1, -1]),
    }
    expected, found = (gradients("retinanet", cells, pad_targets([each])) for each in (good, outside))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("head", HEADS)
def test_empty_slots_change_nothing(head):
    cells = cells_of(head, 96, 64)
    images = objects([3, 0, 5], 96, 64)
    few = pad_targets([{**each, "iscrowd": each["labels"] == 1, "in_range": each["labels"] > 3} for each in images])
    assert few.crowd.any()
    assert few.unwanted.any()
    assert few.valid.any()
    many = Targets(*(F.pad(each, (0, 0) * (each.ndim - 2) + (0, 56)) for each in few))
    assert few.boxes.shape[1] == 8
    assert many.boxes.shape[1] == 64
    found, expected = gradients(head, cells, many), gradients(head, cells, few)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("head", HEADS)
def test_images_without_objects_have_a_finite_loss_of_the_background_alone(head):
    cells = cells_of(head, 64, 64)
    loss, *grads = gradients(head, cells, pad_targets(objects([0, 0], 64, 64)))
    logits = outputs_of(head, cells, 2)[0]
    torch.testing.assert_close(loss, ops.sigmoid_focal_loss(logits, torch.zeros_like(logits), reduction="sum").detach())
    assert grads[0].isfinite().all()
    assert grads[0].abs().sum() > 0
    assert all((each == 0).all() for each in grads[1:])


# Assignment: RetinaNet's is torchvision's.


class Recorded:
    """What torchvision's model hands to its head: each anchor's match."""

    def compute_loss(self, targets, outputs, anchors, matched_idxs):
        self.matched = torch.stack(matched_idxs)
        return super().compute_loss(targets, outputs, anchors, matched_idxs)


class RecordedRetinaNetHead(Recorded, RetinaNetHead):
    pass


class RecordedFCOSHead(Recorded, FCOSHead):
    pass


class NoBackbone(nn.Module):
    out_channels = 32


def torchvisions(head: str, size: tuple[int, int], targets: list[dict[str, Tensor]], box_loss: str = "l1"):
    """torchvision's losses of fixed outputs, its matches, and the outputs; their gradients are in them."""
    features = [torch.zeros(len(targets), 1, *shape) for shape in shapes_of(*size)]
    images = ImageList(torch.zeros(len(targets), 3, *size), [size] * len(targets))
    if head == "fcos":
        points = AnchorGenerator(tuple((stride,) for stride in STRIDES), ((1.0,),) * 5)
        model = FCOS(NoBackbone(), CLASSES, anchor_generator=points, head=RecordedFCOSHead(32, 1, CLASSES))
    else:
        own = RecordedRetinaNetHead(32, 9, CLASSES)
        model = RetinaNet(NoBackbone(), CLASSES, anchor_generator=_default_anchorgen(), head=own)
        own.regression_head._loss_type = box_loss
    anchors = model.anchor_generator(images, features)
    outputs = outputs_of(head, cells_of(head, *size, "torchvision"), len(targets))
    named = dict(zip(("cls_logits", "bbox_regression"), outputs, strict=False))
    if head == "fcos":
        named["bbox_ctrness"] = outputs[2][..., None]
        losses = model.compute_loss(targets, named, anchors, [math.prod(shape) for shape in shapes_of(*size)])
    else:
        losses = model.compute_loss(targets, named, anchors)
    sum(losses.values()).backward()
    return losses, model.head.matched, outputs


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_retinanets_assignment_is_identical_to_torchvisions(seed, whole):
    """Low-quality matches, ties, crowded images and empty ones included."""
    size = (192, 160)
    cells = cells_of("retinanet", *size, "torchvision")
    targets = objects([5, 0, 60, 1, 9], *size, seed, whole)
    for target in targets[:1]:  # the same object twice, and boxes that are anchors
        some = cells.anchors[torch.tensor([700, 2500])].clamp(min=0, max=160)
        target["boxes"] = torch.cat([target["boxes"], target["boxes"][:2], some])
        target["labels"] = torch.arange(9) % CLASSES
    _, expected, _ = torchvisions("retinanet", size, targets)
    match = assign("retinanet", cells, pad_targets(targets))
    assert torch.equal(match, expected)
    iou = torch.where(match >= 0, pairwise_iou(cells.anchors, pad_targets(targets).boxes).amax(1), 1)
    assert (iou < 0.4).any()  # low-quality matches
    assert (match == IGNORE).any()


def test_retinanets_assignment_by_hand():
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 4.5], [0, 0, 10, 3], [50, 50, 60, 60], [0, 0, 10, 5]])
    cells = Cells(anchors, torch.zeros(5, 2), (anchors,))
    boxes = torch.tensor([[[0.0, 0, 10, 10], [55, 55, 90, 90], [0, 0, 0, 0]]])
    match = assign_retinanet(cells, boxes, torch.tensor([[True, True, False]]))
    assert match.tolist() == [[0, IGNORE, BACKGROUND, 1, 0]]  # IoU 1, .45, .3, the second box's best, .5
    match = assign_retinanet(cells, boxes, torch.tensor([[True, True, False]]), positive=0.46, negative=0.2)
    assert match.tolist() == [[0, IGNORE, IGNORE, 1, 0]]


# FCOS's, by a loop over cells and boxes, and torchvision's.


def fcos_by_loop(cells: Cells, boxes: Tensor, radius: float) -> list[int]:
    found = []
    for (x, y), stride, (low, high) in zip(
        cells.centers.tolist(), cells.sides.tolist(), cells.ranges.tolist(), strict=True
    ):
        smallest, best = math.inf, BACKGROUND
        for number, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
            sides = (x - x1, y - y1, x2 - x, y2 - y)
            central = abs(x - (x1 + x2) / 2) < radius * stride and abs(y - (y1 + y2) / 2) < radius * stride
            area = (x2 - x1) * (y2 - y1)
            if min(sides) > 0 and low <= max(sides) <= high and central and area < smallest:
                smallest, best = area, number
        found.append(best)
    return found


@pytest.mark.parametrize("radius", [1.5, 0.7, 100.0])
def test_fcos_assigns_as_a_loop_over_cells_and_boxes(radius):
    size = (192, 160)
    cells = cells_of("fcos", *size)
    images = objects([6, 0, 40, 1], *size, seed=3)
    targets = pad_targets(images)
    match = assign_fcos(cells, targets.boxes, targets.valid, radius)
    assert match.tolist() == [fcos_by_loop(cells, image["boxes"], radius) for image in images]
    assert len((match[2] >= 0).nonzero()) > 20
    assert torch.equal(match, assign("fcos", cells, targets, center_radius=radius))


def test_fcos_by_hand():
    """Points at 4 + 8 i of the first level, whose distances go to 64, both bounds included."""
    cells = make_cells("fcos", [(2, 16), (1, 8)], (8, 16), (16, 128))
    boxes = torch.tensor([[[-60.0, 0, 68, 16], [56, 0, 64, 8], [56, 0, 64, 8]]])
    match = assign_fcos(cells, boxes, torch.ones(1, 3, dtype=torch.bool), radius=9.0)[0]
    rows = match[:32].view(2, 16)
    # The first box reaches from -60 to 68: at x = 4 both its sides are 64 away; any other point is too far from one.
    assert rows[:, 0].tolist() == [0, 0]
    assert rows[0, 7] == 1  # x = 60: the smaller box, and of two alike the first
    assert (rows[:, 1:7] == BACKGROUND).all()
    # The second level begins at 64: its points, at 8 + 16 i within the box, have all a side as far.
    assert match[32:].tolist() == [0, 0, 0, 0] + [BACKGROUND] * 4


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_fcos_breaks_ties_as_torchvision_in_its_mode(seed, whole):
    """Whose areas, compared in steps of 8 square pixels, tie more often; then the first box wins."""
    size = (192, 160)
    targets = objects([6, 0, 60, 1], *size, seed, whole)
    corner = torch.tensor([40.0, 40, 40, 40])
    near = torch.tensor([[0.0, 0, 50.1, 50], [0, 0, 50, 50], [0, 0, 49.95, 50], [0, 0, 40, 62.5]])
    targets[0]["boxes"] = torch.cat([targets[0]["boxes"], corner + near])
    targets[0]["labels"] = torch.arange(10) % CLASSES
    _, expected, _ = torchvisions("fcos", size, targets)
    cells, padded = cells_of("fcos", *size, "torchvision"), pad_targets(targets)
    assert torch.equal(assign("fcos", cells, padded, "torchvision"), expected)
    assert not torch.equal(assign("fcos", cells, padded), expected)


# ATSS's, by the algorithm of the paper, object by object.


def atss_by_loop(cells: Cells, boxes: Tensor, count: int) -> list[int]:
    """Algorithm 1 of Zhang et al. 2020, in its order; an anchor that was taken goes to the object of higher IoU."""
    owner = {}
    levels = [index.tolist() for index in torch.arange(len(cells.anchors)).split(list(cells.counts))]
    centers = cells.centers.tolist()
    for number, box in enumerate(boxes):
        x1, y1, x2, y2 = box.tolist()
        middle = ((x1 + x2) / 2, (y1 + y2) / 2)
        nearest = [sorted(level, key=lambda i: math.dist(centers[i], middle))[:count] for level in levels]
        chosen = [index for level in nearest for index in level]
        iou = ops.box_iou(box[None], cells.anchors)[0].tolist()
        threshold = statistics.mean(iou[i] for i in chosen) + statistics.stdev(iou[i] for i in chosen)
        for i in chosen:
            x, y = centers[i]
            if iou[i] >= threshold and x1 < x < x2 and y1 < y < y2 and iou[i] > owner.get(i, (0, 0))[0]:
                owner[i] = (iou[i], number)
    return [owner[i][1] if i in owner else BACKGROUND for i in range(len(centers))]


@pytest.mark.parametrize("size", [(192, 160), (64, 64)])  # the smaller has levels of 4, 1 and 1 cells
@pytest.mark.parametrize("count", [9, 3])
def test_atss_assigns_as_the_papers_algorithm(size, count):
    cells = cells_of("atss", *size)
    assert cells.counts[2:] == ((30, 9, 4) if size == (192, 160) else (4, 1, 1))
    images = objects([6, 0, 30, 1], *size, seed=5)
    targets = pad_targets(images)
    match = assign_atss(cells, targets.boxes, targets.valid, count)
    assert match.tolist() == [atss_by_loop(cells, image["boxes"], count) for image in images]
    # What the test is about takes place: an anchor is claimed by several objects.
    alone = [assign_atss(cells, box[None, None], torch.ones(1, 1, dtype=torch.bool), count) for box in targets.boxes[2]]
    assert ((torch.cat(alone[:30]) >= 0).sum(0) > 1).any()


def test_atss_by_hand():
    """Three candidates of IoU 1/4, 1/9 and 1/9: mean .157 and deviation .080, so that the best is positive.

    Of two, 1/4 and 1/9, neither reaches the mean plus the unbiased deviation: .181 and .098. The other would let one.
    """
    anchors = torch.tensor([[0.0, 0, 4, 4], [2, 0, 6, 4], [4, 0, 8, 4], [9, 0, 13, 4]])
    cells = Cells(anchors, torch.zeros(4, 2), (anchors,))
    valid = torch.ones(1, 1, dtype=torch.bool)
    box = torch.tensor([[[3.0, 1, 5, 3]]])
    assert assign_atss(cells, box, valid, 3).tolist() == [[BACKGROUND, 0, BACKGROUND, BACKGROUND]]
    assert assign_atss(cells, box, valid, 2).tolist() == [[BACKGROUND] * 4]


def test_an_anchor_of_atss_has_its_centre_inside_of_its_object():
    """Nine anchors in a row; the object overlaps the first two by about .2 each, far above the threshold."""
    corner = torch.arange(9.0)[:, None] * torch.tensor([4.0, 0, 4, 0])
    anchors = corner + torch.tensor([0.0, 0, 4, 4])
    cells = Cells(anchors, torch.zeros(9, 2), (anchors,))
    valid = torch.ones(1, 1, dtype=torch.bool)
    for left, right, expected in ((2.0, 6.0, []), (1.9, 6.0, [0]), (2.0, 6.1, [1]), (1.9, 6.1, [0, 1])):
        match = assign_atss(cells, torch.tensor([[[left, 1.0, right, 3.0]]]), valid)
        assert (match[0] == 0).nonzero().flatten().tolist() == expected


# Crowd regions.


def test_cells_mostly_inside_a_crowd_learn_nothing_but_objects_there_are_found():
    cells = make_cells("fcos", [(8, 8), (4, 4)], (8, 16), (64, 64))
    image = {
        "boxes": torch.tensor([[0.0, 0, 40, 64], [8, 8, 24, 24]]),
        "labels": torch.tensor([0, 1]),
        "iscrowd": torch.tensor([True, False]),
    }
    match = assign("fcos", cells, pad_targets([image]))[0]
    fine, coarse = match[:64].view(8, 8), match[64:].view(4, 4)
    assert (fine == 1).nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    assert (fine[:, 5:] == BACKGROUND).all()
    assert (fine[:, :5] == IGNORE).sum() == 40 - 4
    # Of the third column of cells 16 pixels wide exactly half lies inside: that is not mostly.
    assert coarse.tolist() == [[IGNORE, IGNORE, BACKGROUND, BACKGROUND]] * 4


@pytest.mark.parametrize("head", HEADS)
def test_a_crowd_takes_cells_out_of_the_classification_loss_alone(head):
    cells = cells_of(head, 96, 64)
    (alone,) = objects([4], 96, 64, seed=2)
    region = torch.tensor([[-300.0, -300, 400, 48]])
    crowded = {
        "boxes": torch.cat([alone["boxes"], region]),
        "labels": torch.cat([alone["labels"], torch.tensor([0])]),
        "iscrowd": torch.tensor([0, 0, 0, 0, 1]),
    }
    match, before = (assign(head, cells, pad_targets([each]))[0] for each in (crowded, alone))
    hidden = (match == IGNORE) & (before == BACKGROUND)
    assert hidden.any()
    assert torch.equal(match[~hidden], before[~hidden])
    _, logits, *others = gradients(head, cells, pad_targets([crowded]))
    _, expected, *unchanged = gradients(head, cells, pad_targets([alone]))
    assert (logits[0, hidden] == 0).all()
    assert torch.equal(logits[0, ~hidden], expected[0, ~hidden])
    assert all(torch.equal(a, b) for a, b in zip(others, unchanged, strict=True))


# Chunks, and half precision.


@pytest.mark.parametrize("head", HEADS)
def test_large_batches_are_matched_in_parts(head, monkeypatch):
    cells = cells_of(head, 96, 64)
    targets = pad_targets(objects([3, 0, 12, 5, 1], 96, 64))
    expected = assign(head, cells, targets)
    for images_at_once in (2, 0.1):
        monkeypatch.setattr(sys.modules[assign.__module__], "MAX_PAIRS", int(images_at_once * 16 * len(cells.anchors)))
        assert torch.equal(assign(head, cells, targets), expected)


@pytest.mark.parametrize("head", HEADS)
def test_assignment_and_losses_are_those_of_float32_under_autocast(head):
    cells = cells_of(head, 192, 160)
    targets = pad_targets(objects([5, 0, 30], 192, 160))
    expected = gradients(head, cells, targets)
    match = assign(head, cells, targets)
    with torch.autocast("cpu", torch.bfloat16):
        again = cells_of(head, 192, 160)
        assert torch.equal(again.anchors, cells.anchors)
        assert torch.equal(assign(head, again, targets), match)
        found = gradients(head, again, targets)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_torchvision_matches_other_anchors_in_bfloat16():
    """Why the above matters: torchvision's anchors are as exact as the maps. When this fails, it has learned."""
    size, matched = (320, 512), {}
    images = ImageList(torch.zeros(1, 3, *size), [size])
    boxes = objects([40], *size)[0]["boxes"]
    for dtype in (torch.float32, torch.bfloat16):
        features = [torch.zeros(1, 1, *shape, dtype=dtype) for shape in shapes_of(*size)]
        (anchors,) = _default_anchorgen()(images, features)
        model = RetinaNet(NoBackbone(), CLASSES, anchor_generator=_default_anchorgen())
        matched[dtype] = model.proposal_matcher(ops.box_iou(boxes, anchors.float()))
    differ = matched[torch.float32] != matched[torch.bfloat16]
    assert differ[matched[torch.float32] >= 0].float().mean() > 0.02


# Losses.


def test_focal_loss_is_torchvisions():
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(2, 300, CLASSES, generator=generator, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(CLASSES, (2, 300), generator=generator)
    positive = torch.rand(2, 300, generator=generator) < 0.3
    target = F.one_hot(labels, CLASSES).double() * positive[..., None]
    for alpha, gamma in ((0.25, 2.0), (0.6, 1.5), (0.5, 0.0)):
        expected = ops.sigmoid_focal_loss(logits, target, alpha=alpha, gamma=gamma).sum(-1)
        found = focal_loss(logits, labels, positive, alpha, gamma)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        grads = [torch.autograd.grad(each.sum(), logits)[0] for each in (found, expected)]
        torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-12)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)
    torch.testing.assert_close(found, cross_entropy / 2)  # gamma 0, alpha 1/2


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("size", [0.0, 100.0, 1e4])
@pytest.mark.parametrize("sign", [-1, 1])
def test_focal_loss_and_its_gradient_at_the_ends_and_in_the_middle(there, size, sign):
    """By hand, of one class: (1 - p)^2 times -log p of what is there, with p the probability of what is right."""
    logits = torch.tensor([[[sign * size]]], requires_grad=True)
    loss = focal_loss(logits, torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[there]]))
    loss.backward()
    weight, wrong = (0.25, sign < 0) if there else (0.75, sign > 0)
    if size == 0:
        value, slope = math.log(2) / 4, math.log(2) / 4 + 1 / 8
    else:
        value, slope = (size, 1.0) if wrong else (0.0, 0.0)
    assert loss.item() == pytest.approx(weight * value, rel=1e-6, abs=1e-30)
    assert logits.grad.item() == pytest.approx(weight * slope * (-1 if there else 1), rel=1e-6, abs=1e-30)


def test_softplus_is_torchs():
    x = torch.linspace(-40, 40, 4001, dtype=torch.float64).requires_grad_()
    torch.testing.assert_close(softplus(x), F.softplus(x, threshold=100), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(torch.autograd.grad(softplus(x).sum(), x)[0], x.sigmoid(), rtol=1e-12, atol=1e-15)
    single = x.detach().float()
    torch.testing.assert_close(softplus(single), F.softplus(single), rtol=1e-6, atol=1e-7)


def test_giou_loss_is_torchvisions():
    boxes, targets = (objects([500], 100, 100, seed)[0]["boxes"].double() for seed in (0, 1))
    boxes.requires_grad_()
    found, expected = giou_loss(boxes, targets), ops.generalized_box_iou_loss(boxes, targets)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(each.sum(), boxes)[0] for each in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("box", "target", "loss"),
    [
        ([0, 0, 1, 1], [0, 0, 1, 1], 0),
        ([0, 0, 1, 1], [2, 0, 3, 1], 1 + 1 / 3),  # nothing in common, a third of the hull empty
        ([0, 0, 2, 1], [1, 0, 3, 1], 1 - 1 / 3),
        ([0, 0, 4, 4], [1, 1, 3, 3], 1 - 1 / 4),
        ([0, 0, 1, 1], [1, 1, 2, 2], 1 + 1 / 2),
        ([1, 1, 1, 1], [0, 0, 2, 2], 1),  # a point
    ],
)
def test_giou_loss_by_hand(box, target, loss):
    found = giou_loss(torch.tensor(box, dtype=torch.float64), torch.tensor(target, dtype=torch.float64))
    assert found.item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(
    ("point", "centerness"), [((5, 5), 1), ((2, 5), 0.5), ((5, 8), 0.5), ((1, 1), 1 / 9), ((0, 5), 0), ((-1, 5), 0)]
)
def test_centerness_by_hand(point, centerness):
    box = torch.tensor([[[0.0, 0, 10, 10]]])
    assert centerness_of(box, torch.tensor([point], dtype=torch.float32)).item() == pytest.approx(centerness)


def test_box_loss_is_a_mean_weighted_by_centerness():
    """Two cells of one object, by hand: the weights are the targets of the centerness, or all one."""
    cells = make_cells("fcos", [(1, 2)], [8], (8, 16))
    targets = pad_targets([{"boxes": torch.tensor([[0.0, 0, 12, 8]]), "labels": torch.tensor([1])}])
    match = assign("fcos", cells, targets, center_radius=9)
    assert match.tolist() == [[0, BACKGROUND]]  # the second's centre lies on the border
    targets = pad_targets([{"boxes": torch.tensor([[0.0, 0, 16, 8]]), "labels": torch.tensor([1])}])
    match = assign("fcos", cells, targets)
    assert match.tolist() == [[0, 0]]
    boxes = torch.full((1, 2, 4), 0.5)  # each predicts its own square, half of the object: IoU 1/2, GIoU 1/2
    boxes[0, 1, 0] = 1.5  # the second predicts the object
    outputs = (torch.zeros(1, 2, 3), boxes, torch.zeros(1, 2))
    root = math.sqrt(4 / 12)  # both lie a quarter from one end
    for weighted, weight in ((True, root), (False, 1.0)):
        sums = dense_loss("fcos", *outputs, match, cells, targets, weighted=weighted)
        assert sums.box.item() == pytest.approx(weight * 0.5, abs=1e-5)
        assert sums.box_weight.item() == pytest.approx(2 * weight)
        assert sums.positives.item() == 2
        assert sums.centerness.item() == pytest.approx(2 * math.log(2))
        assert sums.classification.item() == pytest.approx(2 * (2 * 0.75 + 0.25) * math.log(2) / 4)


def test_fcos_losses_and_gradients_are_torchvisions():
    size = (192, 160)
    targets = objects([5, 0, 9, 30], *size)
    losses, expected, theirs = torchvisions("fcos", size, targets)
    cells, padded = cells_of("fcos", *size, "torchvision"), pad_targets(targets)
    ours = [each.detach().clone().requires_grad_() for each in theirs]
    match = assign("fcos", cells, padded, "torchvision")
    sums = dense_loss("fcos", *ours, match, cells, padded, weighted=False)
    count = sums.positives.sum()
    assert count == (expected >= 0).sum() > 100
    found = [each.sum() / count for each in (sums.classification, sums.box, sums.centerness)]
    names = ("classification", "bbox_regression", "bbox_ctrness")
    torch.testing.assert_close(found, [losses[name] for name in names], rtol=1e-5, atol=0)
    sum(found).backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-8)
        assert other.grad.abs().max() > 1e-4


@pytest.mark.parametrize("box_loss", ["l1", "giou"])
def test_retinanet_losses_and_gradients_are_torchvisions(box_loss):
    """torchvision's second version takes GIoU."""
    size = (192, 160)
    targets = objects([5, 0, 9, 30], *size)
    losses, expected, theirs = torchvisions("retinanet", size, targets, box_loss)
    cells, padded = cells_of("retinanet", *size, "torchvision"), pad_targets(targets)
    ours = [each.detach().clone().requires_grad_() for each in theirs]
    sums = dense_loss("retinanet", *ours, None, expected, cells, padded, box_loss)
    found = [(each / sums.positives.clamp(min=1)).mean() for each in (sums.classification, sums.box)]
    torch.testing.assert_close(
        found, [losses[name] for name in ("classification", "bbox_regression")], rtol=1e-5, atol=0
    )
    sum(found).backward()
    for one, other in zip(ours, theirs, strict=True):
        # The image without objects has gradients of up to 0.1: float32 has steps of 1e-8 there.
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-8)
        assert other.grad.abs().max() > 1e-4


# One graph, and no waiting.


def parts_of_a_step(head: str, count: int = 3):
    cells = cells_of(head, 64, 64)
    targets = pad_targets([*objects([count, 0], 64, 64)])
    return outputs_of(head, cells, 2), cells, targets


@pytest.mark.parametrize("head", HEADS)
def test_assignment_and_loss_are_one_graph(head):
    torch._dynamo.reset()
    outputs, cells, targets = parts_of_a_step(head)
    explained = torch._dynamo.explain(partial(total_loss, head))(outputs, cells, targets)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


@pytest.mark.parametrize(
    ("head", "backend"),
    [*((head, "aot_eager") for head in HEADS), pytest.param("fcos", "inductor", marks=pytest.mark.slow)],
)
@pytest.mark.timeout(600)
def test_the_compiled_loss_is_the_same(head, backend):
    torch._dynamo.reset()
    outputs, cells, targets = parts_of_a_step(head)
    compiled = torch.compile(partial(total_loss, head), fullgraph=True, backend=backend)
    more_slots = [pad_targets(objects([0, 20], 64, 64))] if (head, backend) == ("fcos", "inductor") else []
    for each in (targets, *more_slots):
        expected = torch.autograd.grad(total_loss(head, outputs, cells, each), outputs)
        loss = compiled(outputs, cells, each)
        torch.testing.assert_close(loss, total_loss(head, outputs, cells, each), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.autograd.grad(loss, outputs), expected, rtol=1e-4, atol=1e-7)


class NeverWaits(TorchDispatchMode):
    """Refuses what makes the host wait for a device: values read, shapes that depend on values, tensors of lists."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "lift_fresh", "unique", "is_nonzero")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
        if by_mask or name.startswith(self.FORBIDDEN):
            raise AssertionError(f"the host would wait for the device: {name}")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.masked_fill_(x > 0, 1)[x > 2],
        lambda x: x.new_tensor([1.0, 2.0]),
        lambda x: x.__setitem__(x > 0, x[:1]),
        lambda x: torch.where(x > 0)[0],
    ],
)
def test_what_waits_is_noticed(waits):
    with NeverWaits(), pytest.raises(AssertionError, match="the host would wait"):
        waits(torch.arange(3.0))


@pytest.mark.parametrize("anchors", ["centered", "torchvision"])
@pytest.mark.parametrize(
    ("head", "box_loss"),
    [("fcos", "giou"), ("atss", "giou"), ("atss", "l1"), ("retinanet", "l1"), ("retinanet", "giou")],
)
def test_padding_assignment_loss_and_gradients_never_wait_for_the_device(head, box_loss, anchors):
    cells = cells_of(head, 64, 64, anchors)
    images = [{**each, "iscrowd": torch.zeros(len(each["labels"]))} for each in objects([3, 0, 12], 64, 64)]
    outputs = outputs_of(head, cells, 3)
    with NeverWaits():
        targets = pad_targets(images, torch.device("cpu"))
        match = assign(head, cells, targets, anchors)
        logits, boxes, *centerness = outputs
        sums = dense_loss(head, logits, boxes, *(centerness or [None]), match, cells, targets, box_loss)
        (sums.classification + sums.box + sums.centerness).sum().backward()
    assert all(each.grad.abs().sum() > 0 for each in outputs)


# Pyramid and head.


def test_a_pyramid_of_more_and_of_fewer_levels():
    maps = [torch.randn(1, 4, 16, 16), torch.randn(1, 6, 8, 8)]
    assert [each.shape[3] for each in FPN((2, 3), (4, 6), 5, 3)(maps)] == [16, 8]
    assert [each.shape[3] for each in FPN((2, 3), (4, 6), 5, 6)(maps)] == [16, 8, 4, 2, 1]
    assert SingleLevel(4, 5)(maps[:1])[0].shape == (1, 5, 16, 16)


@pytest.mark.parametrize("levels", [(2, 7), (3, 6), (4, 4), (5, 8)])
def test_a_simple_pyramid_has_the_levels_of_its_strides(levels):
    pyramid = SimpleFeaturePyramid(8, 6, levels)
    found = pyramid([torch.randn(2, 8, 5, 7)])  # level 4
    up = {2: (20, 28), 3: (10, 14), 4: (5, 7), 5: (3, 4), 6: (2, 2), 7: (1, 1), 8: (1, 1)}
    assert [tuple(each.shape) for each in found] == [(2, 6, *up[level]) for level in range(levels[0], levels[1] + 1)]


@pytest.mark.parametrize("levels", [(1, 5), (6, 7)])
def test_a_simple_pyramid_starts_near_its_map(levels):
    with pytest.raises(
        ValueError, match=rf"levels are \[{levels[0]}, {levels[1]}\]: a simple feature pyramid starts at"
    ):
        SimpleFeaturePyramid(8, 6, levels)


def test_the_head_says_first_that_nothing_is_there_and_keeps_the_order_of_cells_and_anchors():
    head = DenseHead(16, CLASSES, 9, depth=2, norm="group", centerness=True, positive_boxes=False)
    maps = [torch.randn(2, 16, 3, 4), torch.randn(2, 16, 2, 1)]
    logits, boxes, centerness = head(maps)
    assert logits.shape == (2, 9 * 14, CLASSES)
    assert boxes.shape == (2, 9 * 14, 4)
    assert centerness.shape == (2, 9 * 14)
    torch.testing.assert_close(logits.sigmoid().mean(), torch.tensor(0.01), rtol=0.1, atol=0)
    # Row 1, column 2, of the first map; anchor 5.
    one = head.cls_out(head.cls_tower(maps[0]))[:, 5 * CLASSES : 6 * CLASSES, 1, 2]
    torch.testing.assert_close(logits[:, 9 * (4 + 2) + 5], one)
    torch.testing.assert_close(centerness[:, 9 * 12 + 9 + 3], head.ctr_out(head.box_tower(maps[1]))[:, 3, 1, 0])


@pytest.mark.parametrize(
    ("channels", "groups"), [(256, 32), (64, 32), (32, 16), (16, 8), (24, 4), (20, 2), (2, 1), (17, 1)]
)
def test_a_narrow_heads_group_norm_leaves_something_of_a_single_cell(channels, groups):
    head = DenseHead(channels, 2, 1, 1, "group", False, False)
    assert head.cls_tower[0].norm.num_groups == groups
    one, other = (head.cls_tower(torch.randn(1, channels, 1, 1)) for _ in range(2))
    assert not torch.allclose(one, other)


def test_the_heads_options():
    maps = [torch.randn(1, 8, 3, 3), torch.randn(1, 8, 2, 2)]
    plain = DenseHead(8, 2, 1, 1, "none", False, False, levels=2)
    _, boxes, none = plain(maps)
    assert none is None
    with torch.no_grad():
        plain.scales[1] = 3.0
    scaled = plain(maps)[1]
    torch.testing.assert_close(scaled, torch.cat([boxes[:, :9], 3 * boxes[:, 9:]], 1))
    positive = DenseHead(8, 2, 1, 1, "none", False, True)
    positive.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(positive(maps)[1], boxes.relu())
    assert isinstance(plain.cls_tower[0].norm, nn.Identity)
