"""FasterRCNN: its two stages against torchvision's, worked answers, every argument, evaluation, and learning."""

import copy
import inspect
import re
from typing import Any

import pytest
import torch
import torchvision
from test_detection_parts import NeverWaits
from test_fpn_detector import QUIET, Pyramid, Rates, collate, fit, loader, pictures, samples, targets
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RPNHead

from datamodules import ShapesDetectionDataModule
from zoo import FasterRCNN
from zoo._lightning import Trainer
from zoo.common.cost import Blueprint, count
from zoo.detection import BACKGROUND, IGNORE, assign, pad_targets
from zoo.detection.two_stage import proposals
from zoo.detection.two_stage.pooling import pool_regions
from zoo.detection.two_stage.proposals import anchor_sides, proposal_cells, suppress_in_rounds
from zoo.detection.two_stage.sampling import EMPTY, Samples, match_regions, priorities, sample
from zoo.metrics.average_precision import CocoAveragePrecision

SMALL = {
    "backbone": "test_resnet",
    "num_classes": 3,
    "channels": 16,
    "head_width": 32,
    "image_size": 64,
    "pre_nms_top_k": (200, 100),
    "post_nms_top_k": (100, 50),
    "rpn_samples": 64,
    "region_samples": 32,
}

CONVOLUTIONS: dict[str, Any] = {"neck_norm": "batch", "rpn_depth": 2, "box_head": "conv"}


def small(**options: Any) -> FasterRCNN:
    torch.manual_seed(0)
    return FasterRCNN(**SMALL | options)


# Beside torchvision's, with the same weights.

NAMES = (
    (r"^backbone\.body\.", "backbone."),
    (r"^backbone\.fpn\.inner_blocks\.(\d)\.0\.", r"neck.lateral.\1."),
    (r"^backbone\.fpn\.layer_blocks\.(\d)\.0\.", r"neck.output.\1."),
    (r"^backbone\.fpn\.inner_blocks\.(\d)\.1\.", r"neck.lateral.\1.norm."),
    (r"^backbone\.fpn\.layer_blocks\.(\d)\.1\.", r"neck.output.\1.norm."),
    (r"^rpn\.head\.conv\.0\.0\.", "rpn.conv."),
    (r"^rpn\.head\.conv\.1\.0\.", "rpn.conv2."),
    (r"^rpn\.head\.cls_logits\.", "rpn.cls_out."),
    (r"^rpn\.head\.bbox_pred\.", "rpn.box_out."),
    (r"^roi_heads\.box_head\.fc6\.", "box_head.fc1."),
    (r"^roi_heads\.box_head\.fc7\.", "box_head.fc2."),
    (r"^roi_heads\.box_head\.(\d)\.0\.", r"box_head.conv.\1."),
    (r"^roi_heads\.box_head\.(\d)\.1\.", r"box_head.conv.\1.norm."),
    (r"^roi_heads\.box_head\.5\.", "box_head.fc1."),
    (r"^roi_heads\.box_predictor\.cls_score\.", "cls_out."),
    (r"^roi_heads\.box_predictor\.bbox_pred\.", "box_out."),
)
CLASSES = 5


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of torchvision's by our names; there background is the first class, here the last."""
    found = {}
    for name, value in tensors.items():
        for there, here in NAMES:
            name = re.sub(there, here, name)
        if name.startswith("cls_out"):
            value = value.roll(-1, 0)
        if name.startswith("box_out"):
            value = value[4:]
        found[name] = value
    return found


@pytest.fixture(scope="module", params=[False, True], ids=["first", "second"])
def pair(request) -> tuple[FasterRCNN, Any]:
    """Ours and torchvision's, with the same weights and settings; also as its second version has neck and heads."""
    torch.manual_seed(0)
    norm, head = None, TwoMLPHead(32 * 7**2, 64)
    if request.param:
        norm, head = nn.BatchNorm2d, FastRCNNConvFCHead((32, 7, 7), [32] * 4, [64], nn.BatchNorm2d)
    resnet = torchvision.models.resnet18(weights=None, norm_layer=nn.BatchNorm2d)
    stages = {f"layer{number}": str(number - 1) for number in range(1, 5)}
    sides, top_k = (8, 16, 32, 64, 128), {"pre_nms_top_k": (600, 300), "post_nms_top_k": (500, 200)}
    theirs = TorchvisionFasterRCNN(
        BackboneWithFPN(resnet, stages, [64, 128, 256, 512], 32, norm_layer=norm),
        rpn_anchor_generator=AnchorGenerator(tuple((side,) for side in sides), ((0.5, 1.0, 2.0),) * len(sides)),
        rpn_head=RPNHead(32, 3, 2 if request.param else 1),
        box_head=head,
        box_predictor=FastRCNNPredictor(64, CLASSES + 1),
        rpn_pre_nms_top_n_train=600,
        rpn_pre_nms_top_n_test=300,
        rpn_post_nms_top_n_train=500,
        rpn_post_nms_top_n_test=200,
        rpn_batch_size_per_image=128,
        box_batch_size_per_image=64,
        box_score_thresh=0.15,
    )
    for layer in (theirs.rpn.head.cls_logits, theirs.rpn.head.bbox_pred, theirs.roi_heads.box_predictor.cls_score):
        nn.init.normal_(layer.weight, std=0.2)  # else all are nearly alike
    options = {"channels": 32, "head_width": 64, "image_size": 128, "rpn_samples": 128, "region_samples": 64} | top_k
    options |= CONVOLUTIONS if request.param else {}
    ours = FasterRCNN(
        "resnet18", CLASSES, 0.15, anchors="torchvision", anchor_sizes=sides, channels_last=False, **options
    )
    ours.load_state_dict(renamed(theirs.state_dict()))
    return ours, theirs


class Notes:
    """torchvision's sampler, which writes down the numbers of what it has sampled of each image."""

    def __init__(self, sampler: Any) -> None:
        self.sampler, self.noted = sampler, []

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        positive, negative = self.sampler(labels)
        self.noted = [torch.where((one | other) > 0)[0] for one, other in zip(positive, negative, strict=True)]
        return positive, negative


def padded(images: int, height: int, width: int, sizes: list[tuple[int, int]]) -> Tensor:
    found = torch.zeros(images, 3, height, width)
    for image, picture, (rows, columns) in zip(found, pictures(images, max(height, width)), sizes, strict=True):
        image[:, :rows, :columns] = picture[:, :rows, :columns]
    return found


@pytest.mark.parametrize(
    ("height", "width", "sizes"),
    [(128, 128, [(128, 128), (128, 128)]), (128, 160, [(101, 160), (128, 90)]), (97, 131, [(97, 131), (97, 131)])],
)
def test_losses_and_gradients_are_torchvisions_for_the_same_samples(pair, height, width, sizes, monkeypatch):
    ours, theirs = (each.train() for each in pair)
    images, about = padded(2, height, width, sizes), targets((5, 2), 90)
    about = [{**each, "size": size} for each, size in zip(about, sizes, strict=True)]
    there = [{"boxes": each["boxes"], "labels": each["labels"] + 1} for each in about]
    rpn, roi = Notes(theirs.rpn.fg_bg_sampler), Notes(theirs.roi_heads.fg_bg_sampler)
    monkeypatch.setattr(theirs.rpn, "fg_bg_sampler", rpn)
    monkeypatch.setattr(theirs.roi_heads, "fg_bg_sampler", roi)
    features = theirs.backbone(images)
    proposed, losses = theirs.rpn(ImageList(images, sizes), features, there)
    losses |= theirs.roi_heads(features, proposed, sizes, there)[1]
    sum(losses.values()).backward()

    maps = ours(images)
    found = ours.proposals(maps, sizes)
    regions = []
    for index, each, boxes in zip(roi.noted, proposed, found.boxes, strict=True):
        # Where scores are alike but for rounding, proposals change places.
        distance, same = (each[:, None] - boxes).abs().amax(2).min(1)
        number = torch.cat([same, len(boxes) + torch.arange(8)])[index]
        assert (distance[index[index < len(each)]] < 1e-4).all()
        regions.append(number)
    pad = lambda rows: nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=EMPTY)  # noqa: E731
    of_ours = ours.loss(maps, about, Samples(pad(rpn.noted), pad(regions)))
    sum(of_ours.values()).backward()
    names = {
        "rpn_objectness": "loss_objectness",
        "rpn_box": "loss_rpn_box_reg",
        "classification": "loss_classifier",
        "box": "loss_box_reg",
    }
    for name, value in of_ours.items():
        torch.testing.assert_close(value, losses[names[name]], rtol=1e-6, atol=1e-6)
        assert value > 0
    gradients = renamed({name: parameter.grad for name, parameter in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=name)
    for each in pair:
        each.zero_grad()


@pytest.mark.parametrize(
    ("height", "width", "sizes"),
    [(128, 128, [(128, 128), (128, 128)]), (97, 131, [(97, 131), (97, 131)]), (128, 160, [(101, 160), (128, 90)])],
)
def test_detections_are_torchvisions(pair, height, width, sizes):
    ours, theirs = (each.eval() for each in pair)
    images = padded(2, height, width, sizes)
    with torch.no_grad():
        features = theirs.backbone(images)
        proposed, _ = theirs.rpn(ImageList(images, sizes), features)
        expected, _ = theirs.roi_heads(features, proposed, sizes)
    for found, wanted in zip(ours.detect(images, sizes), expected, strict=True):
        assert len(found["boxes"]) == len(wanted["boxes"]) > 10
        order, other = (each.argsort(stable=True) for each in (found["scores"], wanted["scores"]))
        torch.testing.assert_close(found["scores"][order], wanted["scores"][other], rtol=0, atol=1e-5)
        distance = (found["boxes"][:, None] - wanted["boxes"][None]).abs().amax(2)
        same = found["labels"][:, None] == wanted["labels"][None] - 1
        assert (torch.where(same, distance, torch.inf).amin(1) < 1e-3).all()
        assert (torch.where(same, distance, torch.inf).amin(0) < 1e-3).all()


# Proposals.


def clustered(images: int, count: int, seed: int) -> Tensor:
    """Boxes (images, count, 4), best first, a few of which are near each of a few places."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.rand(images, 8, 2, generator=generator) * 100
    place = torch.randint(8, (images, count), generator=generator)
    centers = centers.gather(1, place[..., None].expand(-1, -1, 2))
    centers = centers + 4 * torch.randn(images, count, 2, generator=generator)
    half = 10 + 4 * torch.rand(images, count, 2, generator=generator)
    return torch.cat([centers - half, centers + half], 2)


@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_nms_in_rounds_is_nms(threshold):
    boxes = clustered(3, 200, 0)
    scores, among = torch.linspace(1, 0, 200).expand(3, 200), torch.rand(3, 200) < 0.9
    expected = torch.zeros_like(among)
    for kept, own, each in zip(expected, boxes, among, strict=True):
        numbers = each.nonzero()[:, 0]
        kept[numbers[torchvision.ops.nms(own[numbers], scores[0, numbers], threshold)]] = True
    assert torch.equal(suppress_in_rounds(boxes, among, threshold), expected)
    by_rounds = [suppress_in_rounds(boxes, among, threshold, rounds) for rounds in range(12)]
    assert all((each >= expected).all() for each in by_rounds[::2])  # too many
    assert all((each <= expected).all() for each in by_rounds[1::2])  # too few
    assert torch.equal(by_rounds[0], among)
    assert torch.equal(by_rounds[-1], expected)


def test_a_chain_of_overlaps_takes_a_round_for_each():
    """Each box overlaps the next: every second one is left, and the last is decided last."""
    left = torch.arange(9.0)[:, None] * torch.tensor([2.0, 0.0])
    boxes, among = torch.cat([left, left + 10], 1)[None], torch.ones(1, 9, dtype=torch.bool)
    kept = [True, False] * 4 + [True]
    assert suppress_in_rounds(boxes, among, 0.5)[0].tolist() == kept
    assert suppress_in_rounds(boxes, among, 0.5, 8)[0].tolist() == kept
    assert suppress_in_rounds(boxes, among, 0.5, 7)[0].tolist() == [*kept[:-1], False]


def test_where_nobody_may_wait_proposals_are_the_same(monkeypatch):
    module = small()
    maps = module(pictures(2))
    expected = module.proposals(maps, waits=False)
    monkeypatch.setattr(proposals, "is_remote", lambda _: True)
    found = module.proposals(maps, waits=False)
    assert torch.equal(found.boxes, expected.boxes)
    assert torch.equal(found.scores, expected.scores)


def test_proposals_are_as_many_in_every_batch_and_end_with_their_image():
    module = small(post_nms_top_k=(300, 300)).eval()
    maps = module(pictures(2))
    whole, ended = module.proposals(maps), module.proposals(maps, [(64, 64), (20, 40)])
    assert whole.boxes.shape == ended.boxes.shape == (2, 263, 4)  # no more: 100 of a level at most
    assert torch.equal(whole.boxes[0], ended.boxes[0])
    assert (ended.boxes[1] <= torch.tensor([40.0, 20, 40, 20])).all()
    assert ended.valid[1].sum() < whole.valid[1].sum()
    for each in (whole, ended):
        assert (each.boxes[~each.valid] == 0).all()
        sides = each.boxes[..., 2:] - each.boxes[..., :2]
        assert (sides[each.valid] >= 1e-3).all()
        assert (each.scores.diff() <= 0).logical_or(~each.valid[:, 1:]).all()


def test_deltas_that_are_no_numbers_are_no_proposals():
    module = small().eval()
    maps = module(pictures(2))
    boxes = maps.boxes.clone()
    boxes[0] = torch.nan
    found = module.proposals(maps._replace(boxes=boxes))
    assert not found.valid[0].any()
    assert found.boxes.isfinite().all()
    empty, other = module.detect(maps._replace(boxes=boxes))
    assert len(empty["boxes"]) == 0 < len(other["boxes"])


@pytest.mark.parametrize(("height", "width"), [(128, 128), (97, 131)])
def test_anchors_are_torchvisions(height, width):
    sides = ((8, 16, 32), (40,), (64,))
    shapes = [(-(-height // stride), -(-width // stride)) for stride in (4, 8, 16)]
    generator = AnchorGenerator(((8, 16, 32),), ((0.5, 1.0, 2.0),))
    images = ImageList(torch.zeros(1, 3, height, width), [(height, width)])
    (expected,) = generator(images, [torch.zeros(1, 1, *shapes[0])])
    cells = proposal_cells(sides, shapes, (4, 8, 16), (height, width), "torchvision")
    assert torch.equal(cells.levels[0], expected)
    assert cells.counts == tuple(
        3 * len(each) * rows * columns for each, (rows, columns) in zip(sides, shapes, strict=True)
    )
    centered = proposal_cells(sides, shapes, (4, 8, 16), (height, width))
    assert centered.centers[0].tolist() == [2, 2]
    sizes = (centered.anchors[:, 2:] - centered.anchors[:, :2]).prod(1).sqrt()
    assert sizes[:3].tolist() == pytest.approx([8, 16, 32])


def test_anchors_by_level():
    assert anchor_sides(None, (4, 8, 16)) == [[32], [64], [128]]
    assert anchor_sides(None, (16,)) == [[32, 64, 128, 256, 512]]
    assert anchor_sides([8, 16], (16,)) == [[8, 16]]
    assert anchor_sides([8, 16], (4, 8)) == [[8], [16]]


# Regions.


@pytest.mark.parametrize("strides", [(4, 8, 16, 32), (8, 16), (16,)])
def test_regions_are_pooled_as_by_torchvision(strides):
    generator = torch.Generator().manual_seed(0)
    features = [torch.rand(2, 3, 256 // stride, 320 // stride, generator=generator) for stride in strides]
    corner = torch.rand(2, 30, 2, generator=generator) * 200
    boxes = torch.cat([corner, corner + 2 ** (8 * torch.rand(2, 30, 2, generator=generator))], 2)
    boxes[0, :2] = torch.tensor([[0.0, 0, 0, 0], [0, 0, 112, 112]])  # nothing, and just as large as a bound
    pool = torchvision.ops.MultiScaleRoIAlign([str(i) for i in range(len(strides))], 7, 2)
    expected = pool(dict(zip("0123", features, strict=False)), list(boxes), [(256, 320)] * 2)
    torch.testing.assert_close(pool_regions(features, boxes, strides, aligned=False), expected)
    assert not torch.equal(pool_regions(features, boxes, strides), expected)
    coarse = pool_regions([each.bfloat16() for each in features], boxes, strides, aligned=False)
    assert coarse.dtype == torch.bfloat16
    torch.testing.assert_close(coarse.float(), expected, rtol=0.02, atol=0.01)


def some_match(positive: int, background: int, ignored: int) -> Tensor:
    match = torch.tensor([0] * positive + [BACKGROUND] * background + [IGNORE] * ignored)
    return match[torch.randperm(len(match))]


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ((50, 50, 10), (4, 12)),  # a quarter of sixteen
        ((2, 50, 10), (2, 14)),
        ((50, 3, 10), (4, 3)),
        ((0, 5, 3), (0, 5)),
        ((0, 0, 9), (0, 0)),
        ((3, 0, 0), (3, 0)),
    ],
)
def test_samples_are_balanced_and_empty_where_there_are_no_more(there, expected):
    torch.manual_seed(0)
    match = torch.stack([some_match(*there) for _ in range(3)])
    chosen = sample(match, torch.rand(match.shape), 16, 0.25)
    assert chosen.shape == (3, 16)
    for numbers, of_image in zip(chosen, match, strict=True):
        own = numbers[numbers != EMPTY]
        assert len(own.unique()) == len(own) == sum(expected)
        assert (of_image[own] >= 0).sum() == expected[0]
        assert (of_image[own] == BACKGROUND).sum() == expected[1]


def test_every_anchor_is_sampled_alike():
    torch.manual_seed(0)
    match = torch.tensor([0] * 4 + [BACKGROUND] * 12).expand(4000, 16)
    chosen = sample(match, torch.rand(4000, 16), 8, 0.25)
    share = torch.zeros(4000, 16).scatter(1, chosen, 1).mean(0)
    torch.testing.assert_close(share, torch.tensor([0.5] * 16), rtol=0, atol=0.05)


def test_without_chance_an_images_samples_do_not_depend_on_the_others():
    few, many = priorities(torch.zeros(1, 4), 100, False), priorities(torch.zeros(3, 4), 150, False)
    assert torch.equal(few.expand(3, -1), many[:, :100])
    assert many[0].unique().numel() == 150
    assert priorities(torch.zeros(1), 300_000, False).add(1).unique().numel() == 300_000
    torch.manual_seed(0)
    drawn = priorities(torch.zeros(3, 4), 100, True)
    assert drawn.unique(dim=0).shape == drawn.shape
    assert drawn.dtype == few.dtype == torch.float32


def about(boxes: list[list[float]], **flags: Any) -> Any:
    return pad_targets([{"boxes": torch.tensor(boxes), "labels": torch.zeros(len(boxes), dtype=torch.int64)} | flags])


@pytest.mark.parametrize("with_targets", [True, False])
def test_regions_belong_to_what_they_overlap_most(with_targets):
    objects = about([[0.0, 0, 10, 10], [20, 20, 40, 40]])
    boxes = torch.tensor([[[0.0, 0, 10, 20], [0, 0, 9, 10], [20, 20, 40, 31], [50, 50, 60, 60], [0, 0, 0, 0]]])
    proposed = proposals.Proposals(boxes, torch.tensor([[5.0, 4, 3, 2, -torch.inf]]))
    regions = match_regions(proposed, objects, with_targets)
    assert regions.match[0, :5].tolist() == [0, 0, 1, BACKGROUND, IGNORE]
    if with_targets:
        assert regions.match[0, 5:].tolist() == [0, 1] + [IGNORE] * 6
        assert torch.equal(regions.boxes[:, 5:], objects.boxes)
    else:
        assert torch.equal(regions.boxes, boxes)


def test_regions_in_crowds_and_near_what_nobody_wants_are_no_background():
    boxes = torch.tensor([[[0.0, 0, 20, 20], [0, 0, 70, 70], [100, 100, 120, 120], [100, 100, 140, 120]]])
    proposed = proposals.Proposals(boxes, torch.zeros(1, 4))
    objects = [[0.0, 0, 40, 40], [100, 100, 120, 120]]
    crowd = about(objects, iscrowd=torch.tensor([True, False]))
    assert match_regions(proposed, crowd, False).match[0].tolist() == [IGNORE, BACKGROUND, 1, 1]
    unwanted = about(objects, in_range=torch.tensor([True, False]))
    assert match_regions(proposed, unwanted, True).match[0, :4].tolist() == [BACKGROUND, BACKGROUND, IGNORE, IGNORE]
    cells = small().cells(small()(pictures(1)))
    here = [[0.0, 0, 32, 32]]
    matches = [
        assign("rpn", cells, about(here, in_range=torch.tensor([inside])), parts=1)[0] for inside in (True, False)
    ]
    assert (matches[0] >= 0).any()
    assert (matches[1] < 0).all()
    assert (matches[1][matches[0] >= 0] == IGNORE).all()


# Every argument matters.


def shapes(**options: Any) -> Any:
    return {name: tuple(value.shape) for name, value in small(**options).state_dict().items()}


def detections(**options: Any) -> Any:
    module = small(**{"score_threshold": 0.0} | options).eval()
    return [(each["boxes"].tolist(), each["scores"].tolist()) for each in module.detect(pictures(2))]


def losses(**options: Any) -> Any:
    module = small(**options)
    torch.manual_seed(1)
    return {name: value.item() for name, value in module.loss(module(pictures(4)), targets()).items()}


def trained(**options: Any) -> Any:
    return [name for name, parameter in small(**options).named_parameters() if parameter.requires_grad]


def proposed(**options: Any) -> Any:
    module = small(**options)
    return [module.train(mode).proposals(module(pictures(1))).scores.shape for mode in (True, False)]


def rates(**options: Any) -> Any:
    noted = Rates()
    fit(small(**{"lr": 1e-3} | options), max_epochs=2, callbacks=[noted])
    return noted.noted


def values(**options: Any) -> float:
    torch.save({name: value + 1 for name, value in small().state_dict().items()}, "somewhere.pth")
    return sum(value.sum().item() for value in small(**options).state_dict().values())


def recomputed(**options: Any) -> int:
    """How often the first convolution of the last stage runs in a training step."""
    module, calls = small(**options), []
    module.backbone.layer4[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    sum(module.loss(module(pictures(4)), targets()).values()).backward()
    return len(calls)


ONE_MAP = {"backbone": "resnet18", "neck": "none"}
DILATABLE = {"backbone": "test_byobnet", "neck": "single"}
BRANCHES = DILATABLE | {"trident": True}
MATTERS = {
    "backbone": (shapes, {}, {"backbone": "test_convnext"}),
    "num_classes": (shapes, {}, {"num_classes": 4}),
    "score_threshold": (detections, {}, {"score_threshold": 0.3}),
    "nms_threshold": (detections, {}, {"nms_threshold": 0.2}),
    "max_detections": (detections, {}, {"max_detections": 7}),
    "weights": (values, {}, {"weights": "somewhere.pth"}),
    "in_channels": (shapes, {}, {"in_channels": 1}),
    "image_size": (lambda **options: small(**options).input_shape, {}, {"image_size": (64, 96)}),
    "neck": (shapes, {"levels": (4, 4)}, {"levels": (4, 4), "neck": "single"}),
    "levels": (shapes, {}, {"levels": (3, 4)}),
    "channels": (shapes, {}, {"channels": 24}),
    "neck_norm": (shapes, {}, {"neck_norm": "batch"}),
    "rpn_depth": (shapes, {}, {"rpn_depth": 2}),
    "box_head": (shapes, ONE_MAP, ONE_MAP | {"box_head": "stage"}),
    "head_width": (shapes, {}, {"head_width": 24}),
    "class_agnostic": (shapes, {}, {"class_agnostic": True}),
    "anchors": (losses, {}, {"anchors": "torchvision"}),
    "anchor_sizes": (losses, {}, {"anchor_sizes": [8, 16, 32, 64, 128]}),
    "box_loss": (losses, {}, {"box_loss": "l1"}),
    "pre_nms_top_k": (proposed, {}, {"pre_nms_top_k": (20, 10)}),
    "post_nms_top_k": (proposed, {}, {"post_nms_top_k": (20, 10)}),
    "proposal_nms": (losses, {}, {"proposal_nms": 0.3}),
    "rpn_samples": (losses, {}, {"rpn_samples": 32}),
    "rpn_positive": (losses, {}, {"rpn_positive": 0.02}),
    "region_samples": (losses, {}, {"region_samples": 16}),
    "region_positive": (losses, {}, {"region_positive": 0.05}),
    "learn_targets": (losses, {}, {"learn_targets": False}),
    "views": (detections, {}, {"views": [{"scale": 2}]}),
    "merge": (detections, {}, {"merge": "soft_nms"}),
    "tiles_at_once": (lambda **options: tiles(**options), {}, {"tiles_at_once": 1}),
    "trident": (lambda **options: small(**options)(pictures(1)).boxes.shape, DILATABLE, BRANCHES),
    "dilations": (lambda **options: dilations(**options), DILATABLE, DILATABLE | {"dilations": [2]}),
    "scale_aware": (losses, BRANCHES, BRANCHES | {"scale_aware": False}),
    "valid_ranges": (losses, BRANCHES, BRANCHES | {"valid_ranges": [(0, 20), (10, 40), (30, None)]}),
    "branch": (lambda **options: small(**options).eval()(pictures(1)).boxes.shape, BRANCHES, BRANCHES | {"branch": 1}),
    "freeze_norm": (trained, {}, {"freeze_norm": True}),
    "norm_eps": (lambda **options: small(**options).backbone.bn1.eps, {}, {"norm_eps": 1e-3}),
    "frozen_stages": (trained, {}, {"frozen_stages": 2}),
    "grad_checkpointing": (recomputed, {}, {"grad_checkpointing": True}),
    "channels_last": (
        lambda **options: small(**options).neck.output[0].weight.stride(),
        {},
        {"channels_last": False},
    ),
    "optimizer": (rates, {}, {"optimizer": "adamw"}),
    "lr": (rates, {}, {"lr": 2e-3}),
    "weight_decay": (rates, {}, {"weight_decay": 1e-3}),
    "momentum": (rates, {}, {"momentum": 0.8}),
    "betas": (rates, {"optimizer": "adamw"}, {"optimizer": "adamw", "betas": (0.8, 0.9)}),
    "layer_decay": (rates, {}, {"layer_decay": 0.7}),
    "schedule": (rates, {}, {"schedule": "steps"}),
    "milestones": (rates, {"schedule": "steps"}, {"schedule": "steps", "milestones": (1,)}),
    "warmup_epochs": (rates, {}, {"warmup_epochs": 0.5}),
    "min_lr": (rates, {}, {"min_lr": 5e-4}),
    "compile": (lambda **options: small(**options)._compiled_call_impl is None, {}, {"compile": True}),
}


def dilations(**options: Any) -> list[tuple[int, int]]:
    return [part.dilation for part in small(**options).backbone.modules() if isinstance(part, nn.Conv2d)]


def tiles(**options: Any) -> int:
    """Number of batches that tiles of an image are looked at in."""
    module, calls = small(views=[{"tile": 32, "scale": 2, "overlap": 0.0}], **options).eval(), []
    module.rpn.register_forward_hook(lambda *_: calls.append(1))
    module.detect(pictures(1))
    return len(calls)


def test_the_table_has_every_argument():
    assert set(MATTERS) == set(inspect.signature(FasterRCNN).parameters)


FOUND: dict[tuple[object, str], object] = {}


def found_before(probe, options):
    """What a probe finds, each time; it is asked twice for all arguments that start from the same options."""
    key = probe, repr(options)
    if key not in FOUND:
        FOUND[key] = probe(**options)
        assert probe(**options) == FOUND[key]
    return FOUND[key]


@pytest.mark.parametrize("name", MATTERS)
def test_every_argument_of_two_stages_matters(name):
    probe, options, changed = MATTERS[name]
    assert found_before(probe, options) != probe(**changed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchors": "centred"}, "unknown anchors 'centred': expected one of centered, torchvision"),
        ({"box_head": "cascade"}, "unknown box_head 'cascade': expected one of mlp, conv, stage"),
        ({"neck_norm": "group"}, "unknown neck_norm 'group': expected one of none, batch"),
        (
            {"neck_norm": "batch", "neck": "single"},
            "neck_norm is 'batch', with neck 'single': take neck_norm='none', or neck='fpn' on several maps",
        ),
        (
            {"neck_norm": "batch", "backbone": "test_vit", "levels": (3, 5)},
            "neck_norm is 'batch', with a plain ViT's pyramid, which has layer norms: take neck_norm='none'",
        ),
        ({"rpn_depth": 0}, "rpn_depth is 0: expected at least 1"),
        ({"box_loss": "giou"}, "unknown box_loss 'giou': expected one of smooth_l1, l1"),
        ({"proposal_nms": 1.5}, r"proposal_nms is 1.5: expected a number in \[0, 1\]"),
        ({"rpn_positive": -0.5}, r"rpn_positive is -0.5: expected a number in \[0, 1\]"),
        ({"region_samples": 0}, "region_samples is 0: expected at least 1"),
        ({"pre_nms_top_k": (0, 5)}, r"pre_nms_top_k is \(0, 5\): expected at least 1"),
        ({"anchor_sizes": [8, 16]}, r"anchor_sizes are \[8, 16\]: expected 5, one for each level"),
        ({"anchor_sizes": []}, r"anchor_sizes are \[\]: expected sides in pixels, finite numbers above 0"),
        ({"anchor_sizes": [8, 16, 0, 3, 5]}, r"anchor_sizes are .*: expected sides in pixels, finite numbers above 0"),
        ({"levels": (6, 7)}, r"levels are \[6, 7\]: ResNet has no map of stride 64"),
    ],
)
def test_wrong_arguments_of_two_stages(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


# The module.


def test_losses_are_finite_and_the_parts_that_are_promised():
    module = small()
    found = module.loss(module(pictures(4)), targets())
    assert set(found) == {"rpn_objectness", "rpn_box", "classification", "box"}
    assert all(value.shape == () and value.isfinite() and value > 0 for value in found.values())
    sum(found.values()).backward()
    assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []


def test_norms_of_neck_and_box_head_are_trained_though_the_backbones_are_frozen():
    module = small(freeze_norm=True, **CONVOLUTIONS)
    norms = {name: each for name, each in module.named_modules() if isinstance(each, nn.BatchNorm2d)}
    own = {f"neck.{part}.{n}.norm" for part in ("lateral", "output") for n in range(4)}
    own |= {f"box_head.conv.{n}.norm" for n in range(4)}
    for mode in (True, False, True):
        module.train(mode)
        assert {name for name, norm in norms.items() if norm.weight.requires_grad} == own
        assert {name for name, norm in norms.items() if norm.training} == (own if mode else set())
    sum(module.loss(module(pictures(4)), targets()).values()).backward()
    assert all(norms[name].num_batches_tracked == 1 and norms[name].weight.grad.any() for name in own)
    assert {name for name in norms if norms[name].running_mean.any()} == own


def test_images_without_objects_are_background():
    module = small()
    found = module.loss(module(pictures(2)), targets((0, 0)))
    sum(found.values()).backward()
    assert found["box"] == found["rpn_box"] == 0
    assert min(found["classification"], found["rpn_objectness"]) > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_without_proposals_objects_alone_are_learned():
    """And of neither there is nothing to learn in the second stage."""
    module = small()
    maps = module(pictures(2))
    maps = maps._replace(boxes=torch.full_like(maps.boxes, torch.nan))
    sums = module.loss_sums(maps, targets((3, 0)))
    assert sums.regions.tolist() == [3, 0]
    assert sums.classification[0] > 0 == sums.classification[1]
    module = small(learn_targets=False)
    found = module.loss(maps, targets((3, 0)))
    assert found["classification"] == found["box"] == 0


def test_boxes_that_are_none_stop_no_training():
    bad = [[0.0, 0, 0, 0], [30, 30, 10, 10], [torch.nan] * 4, [0, 0, torch.inf, 9], [-50, -50, -9, -9], [5, 5, 40, 40]]
    about = [{"boxes": torch.tensor(bad), "labels": torch.zeros(6, dtype=torch.int64)}] * 2
    module = small(lr=0.01)
    fit(module, DataLoader([*zip(pictures(2), about, strict=True)], 2, collate_fn=collate))
    assert all(value.isfinite().all() for value in module.state_dict().values())


@pytest.mark.parametrize("step", ["training_step", "validation_step"])
@pytest.mark.parametrize(("label", "number"), [(3, 3), (-1, -1)])
def test_labels_out_of_range_are_named_with_their_sample(step, label, number):
    module = small()
    module.on_validation_epoch_start()
    images, about = collate(samples())
    about[3]["labels"] = torch.tensor([1, 2, label, 0, 0, 0])
    message = f"label {number} of sample 3 is out of range: num_classes is 3, labels run from 0"
    with pytest.raises(ValueError, match=message):
        getattr(module, step)((images, about), 5)


@pytest.mark.parametrize("size", [None, (48, 60)])
@pytest.mark.parametrize(
    "options", [{}, {"class_agnostic": True, "box_loss": "l1", "learn_targets": False} | CONVOLUTIONS]
)
def test_a_training_step_waits_for_nothing(options, size, monkeypatch):
    monkeypatch.setattr(proposals, "is_remote", lambda _: True)  # a CPU's NMS does not wait
    module = small(**options)
    images, about = torch.rand(4, 3, 64, 64), targets((3, 0, 1, 6))
    about = about if size is None else [each | {"size": size} for each in about]
    module.cells(module(images))  # once for each size of images
    with NeverWaits():
        found = module.loss(module(images), about)
        torch.stack(list(found.values())).sum().backward()
        with pytest.raises(AssertionError, match="the host would wait"):
            found["box"].item()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.gpu
def test_a_step_never_waits_for_the_gpu():
    module = small().cuda()
    about = [{k: v.cuda() if isinstance(v, Tensor) else v for k, v in each.items()} for each in targets()]
    images = pictures(4).cuda()
    module.training_step((images, about), 1).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            loss = module.training_step((images, about), 1)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


def test_under_autocast_the_same_objects_are_learned():
    module = small().eval()
    maps = module(pictures(4))
    with torch.autocast("cpu", torch.bfloat16):
        coarse = module(pictures(4))
        found, detected = module.loss(coarse, targets()), module.detect(coarse)
    assert coarse.objectness.dtype == torch.bfloat16
    assert all(value.dtype == torch.float32 and value.isfinite() for value in found.values())
    torch.testing.assert_close(found, module.loss(maps, targets()), rtol=0.3, atol=0.01)
    assert all(each["boxes"].dtype == each["scores"].dtype == torch.float32 for each in detected)


def test_it_trains_in_bfloat16():
    module = small(lr=1e-3)
    fit(module, DataLoader(samples((3, 0, 1, 6), side=128), 2, collate_fn=collate), precision="bf16-true")
    assert all(value.isfinite().all() for value in module.state_dict().values())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_losses_are_one_graph_each_for_all_sizes():
    """Of images, of batches and of their numbers of objects; and they are as many times right."""
    torch._dynamo.reset()
    plain, module = (small(backbone=Pyramid(), levels=(3, 5)).eval() for _ in range(2))
    module.load_state_dict(plain.state_dict())
    counter = CompileCounterWithBackend("eager")
    module.compile(fullgraph=True, backend=counter)
    sizes = ((2, 64, 96, 3), (3, 96, 64, 9), (2, 128, 64, 0), (4, 160, 192, 40), (2, 64, 64, 17), (3, 64, 96, 1))
    for images, height, width, most in sizes:
        maps = plain(torch.rand(images, 3, height, width, generator=torch.Generator().manual_seed(height)))
        true = targets([most, *[1] * (images - 1)], min(height, width))
        expected = plain.loss(maps, true)
        for name, loss in module.loss(maps, true).items():
            torch.testing.assert_close(loss, expected[name], rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 2


def test_a_copy_of_a_compiled_detector_runs_on_its_own_weights():
    torch._dynamo.reset()
    module = small(backbone=Pyramid(), levels=(3, 3), neck="single").eval()
    module.compile(backend="eager")
    objectness = module(pictures(2)).objectness
    twin = copy.deepcopy(module)
    torch.testing.assert_close(twin(pictures(2)).objectness, objectness)
    with torch.no_grad():
        twin.rpn.cls_out.weight.zero_()
    assert twin(pictures(2)).objectness.unique().numel() == 1
    assert twin.loss(twin(pictures(4)), targets())["classification"].isfinite()
    assert torch.equal(module(pictures(2)).objectness, objectness)


def evaluate(module: FasterRCNN, batch_size: int, stage: str = "validate") -> dict[str, float]:
    (found,) = getattr(Trainer(**QUIET), stage)(module, loader((3, 0, 1, 6, 20), batch_size), verbose=False)
    return found


def test_one_pass_of_evaluation_gives_losses_and_ap_whatever_the_batch_size():
    module = small(score_threshold=0.0)
    with torch.no_grad():
        module.cls_out.weight.mul_(100)  # else all scores are nearly alike
    found = evaluate(module, 2)
    module.eval()
    images, about = collate(samples((3, 0, 1, 6, 20)))
    parts = module.loss(module(images), about)
    names = {"classification": "class", "box": "box", "rpn_objectness": "rpn_objectness", "rpn_box": "rpn_box"}
    for name, value in parts.items():
        assert found[f"val/loss_{names[name]}"] == pytest.approx(value.item(), rel=1e-5)
    assert found["val/loss"] == pytest.approx(sum(parts.values()).item(), rel=1e-5)
    metric = CocoAveragePrecision()
    metric.update(module.detect(images), about)
    scores = {name: value.item() for name, value in metric.compute().items()}
    assert {f"val/{name}": value for name, value in scores.items() if name.startswith("ap")}.items() <= found.items()
    assert evaluate(module, 1) == pytest.approx(found, rel=1e-4, abs=1e-6)
    tested = evaluate(module, 5, "test")
    assert {name: tested[name.replace("val/", "test/")] for name in found} == pytest.approx(found, rel=1e-4, abs=1e-6)


class RegionGradients(FasterRCNN):
    """Writes down the gradients of a step, on each rank."""

    def on_before_optimizer_step(self, optimizer) -> None:
        gradients = {name: parameter.grad for name, parameter in self.named_parameters()}
        torch.save(gradients, f"region_gradients_{self.trainer.world_size}_{self.global_rank}.pt")


def test_two_processes_with_unequal_objects_learn_as_one_with_all_of_them():
    everything = {"rpn_samples": 4000, "region_samples": 800, "region_positive": 0.5}  # else each draws its own
    for processes in (2, 1):
        torch.manual_seed(0)
        module = RegionGradients(**SMALL | everything, freeze_norm=True)
        several = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": True} if processes == 2 else {}
        data = loader((6, 1, 5, 0), batch_size=4 // processes)  # ranks take every other image
        Trainer(**QUIET | {"max_steps": 1, "limit_val_batches": 0} | several).fit(module, data)
    expected = torch.load("region_gradients_1_0.pt")
    for rank in range(2):
        found = torch.load(f"region_gradients_2_{rank}.pt")
        for name, value in expected.items():
            if value is not None:
                torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_checkpoints_are_plain_data_and_come_back(tmp_path):
    module = small(levels=(3, 6), anchor_sizes=[8, 16, 32, 64], milestones=[8, 11], image_size=(64, 96))
    fit(module).save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert "weights" not in saved["hyper_parameters"]
    again = FasterRCNN.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True).eval()
    for one, other in zip(again.detect(pictures(2)), module.eval().detect(pictures(2)), strict=True):
        assert torch.equal(one["boxes"], other["boxes"])
    assert dict(again.hparams) == dict(module.hparams)


@torch.no_grad()
def test_detections_are_best_first_in_the_image_and_in_original_pixels():
    module = small(score_threshold=0.0, max_detections=20).eval()
    (found,) = module.detect(pictures(1), [(48, 64)])
    assert found["boxes"].shape == (20, 4)
    assert found["labels"].dtype == torch.int64
    assert found["scores"].diff().le(0).all()
    assert (found["boxes"] <= torch.tensor([64, 48, 64, 48])).all()
    (larger,) = module.detect(pictures(1), [(48, 64)], [(480, 320)])
    torch.testing.assert_close(larger["boxes"], found["boxes"] * torch.tensor([5, 10, 5, 10]))
    module.hparams.score_threshold = 1.0
    (nothing,) = module.detect(pictures(1))
    assert (nothing["boxes"].shape, nothing["scores"].shape, nothing["labels"].shape) == ((0, 4), (0,), (0,))


def test_what_it_costs_is_both_stages():
    with torch.device("meta"), Blueprint():
        few, more = (FasterRCNN(**SMALL | {"post_nms_top_k": (100, k), "region_samples": 16}) for k in (10, 30))
    costs = [count(module, module.input_shape) for module in (few, more)]
    head = 16 * 49 * 32 + 32 * 32 + 32 * (4 + 12)  # of a region
    assert costs[1].macs - costs[0].macs == 20 * head
    assert costs[0].training_macs - costs[0].macs == 6 * head
    assert costs[0].parameters == sum(parameter.numel() for parameter in small().parameters())


def test_pictures_show_detections_and_what_is_there():
    module = small(score_threshold=0.0).eval()
    drawn = module.pictures(collate(samples((2, 0))))
    assert drawn["detections"].shape[:2] == (2, 3)


class TrainsOnWhatItDetects(ShapesDetectionDataModule):
    def raw_samples(self, split):
        return super().raw_samples("train")


@pytest.mark.slow
def test_it_learns_eight_images_by_heart():
    data = TrainsOnWhatItDetects(
        preset="easy", image_size=64, train_size=8, val_size=8, test_size=8, batch_size=8, num_workers=0
    )
    options = {"optimizer": "adamw", "lr": 3e-3, "warmup_epochs": 5.0, "levels": (3, 5), "channels": 32}
    sides = {"anchor_sizes": [12, 24, 48], "head_width": 64, "region_samples": 64}
    module = small(num_classes=data.num_classes, **options, **sides)
    trainer = Trainer(**QUIET, max_epochs=90, check_val_every_n_epoch=90, gradient_clip_val=10.0)
    trainer.fit(module, datamodule=data)
    assert trainer.callback_metrics["val/ap50"] > 0.95
