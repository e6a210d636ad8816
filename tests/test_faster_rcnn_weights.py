"""Weights for FasterRCNN: torchvision's detects the same here, and backbones go where their stages are."""

from collections import OrderedDict
from functools import cache
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from test_detection_weights import (
    USED,
    assert_the_same_detections,
    file_of,
    pictures,
    randomize_norms,
    same,
    scale,
    snapshot,
)
from torch import Tensor, nn
from torchvision.models.detection import faster_rcnn, fasterrcnn_resnet50_fpn, fasterrcnn_resnet50_fpn_v2
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from zoo import FasterRCNN, FPNDetector, weights
from zoo.detection.two_stage.layouts import TwoStageLayout
from zoo.weights.layouts import translate

WIDTH = 48
"""Of the layers of the box head."""
SECOND: dict[str, Any] = {"neck_norm": "batch", "rpn_depth": 2, "box_head": "conv"}
"""What torchvision's second version has otherwise."""
SMALL: dict[str, Any] = {"backbone": "test_resnet", "num_classes": 3, "channels": 16, "head_width": 8, "image_size": 64}


def torchvisions(num_classes: int, norm: Any = None, second: bool = False) -> Any:
    """torchvision's on a small network, with weights by which it detects many things; classes without background.

    The second version is put together as its builder does it.
    """
    body, channels = torchvision.models.resnet18(weights=None, norm_layer=norm), 32
    widths = [body.fc.in_features // 2**step for step in (3, 2, 1, 0)]
    layers = {f"layer{number + 1}": str(number) for number in range(4)}
    head: nn.Module = faster_rcnn.TwoMLPHead(channels * 7**2, WIDTH)
    if second:
        head = faster_rcnn.FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [WIDTH], nn.BatchNorm2d)
    model = faster_rcnn.FasterRCNN(
        BackboneWithFPN(body, layers, widths, channels, LastLevelMaxPool(), nn.BatchNorm2d if second else None),
        rpn_head=RPNHead(channels, 3, conv_depth=2 if second else 1),
        box_head=head,
        box_predictor=faster_rcnn.FastRCNNPredictor(WIDTH, 1 + num_classes),
        min_size=128,
        max_size=160,
    ).eval()
    randomize(model)
    return model


@torch.no_grad()
def randomize(model: Any) -> None:
    """No bias stays zero, no norm the identity; and outputs vary about as a trained network's do."""
    randomize_norms(model)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and "body" not in name:
            nn.init.normal_(parameter, std=0.1)
    rpn, heads = model.rpn.head, model.roi_heads
    for layer in (*rpn.conv.modules(), *heads.box_head.modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
    images, _ = model.transform(pictures())
    features = maps_of(model, images.tensors)
    scale(rpn.cls_logits, rpn.conv, list(features.values()), 0.0, 2.0)
    scale(rpn.bbox_pred, rpn.conv, list(features.values()), 0.0, 0.3)
    regions, _ = model.rpn(images, features)
    hidden = heads.box_head(heads.box_roi_pool(features, regions, images.image_sizes))
    for layer, deviation in ((heads.box_predictor.cls_score, 2.0), (heads.box_predictor.bbox_pred, 0.5)):
        values = layer(hidden)
        factor = deviation / values.std(0)  # each output varies over the regions, around about 0
        layer.weight.mul_(factor[:, None])
        layer.bias.sub_(values.mean(0)).mul_(factor).add_(torch.randn_like(layer.bias), alpha=0.1)


def maps_of(model: Any, images: Tensor) -> dict[str, Tensor]:
    maps = model.backbone(images)
    return {"0": maps} if isinstance(maps, Tensor) else maps


@cache
def of_seven(second: bool = False) -> Any:
    """torchvision's of seven classes, for all tests that leave it as it is."""
    torch.manual_seed(5)
    return torchvisions(7, second=second)


def state_of_seven(second: bool = False) -> dict[str, Tensor]:
    return dict(of_seven(second).state_dict())


def detector(num_classes: int, name: str = "resnet18", **options: Any) -> FasterRCNN:
    torch.manual_seed(9)
    alike = {"anchors": "torchvision", "channels": 32, "head_width": WIDTH, "image_size": 64, "channels_last": False}
    return FasterRCNN(name, num_classes, **alike | options).eval()


@torch.no_grad()
def assert_parity(ours: FasterRCNN, theirs: Any, labels: list[int]) -> None:
    """Maps of all levels and detections, in pixels of the original images; ``labels``: what ours are there."""
    batch = pictures()
    padded, _ = theirs.transform(batch)
    features = maps_of(theirs, padded.tensors)
    maps = ours(padded.tensors)
    for mine, level in zip(maps.features, features.values(), strict=True):
        torch.testing.assert_close(mine, level, rtol=1e-5, atol=1e-5)
    originals = [(each.shape[1], each.shape[2]) for each in batch]
    expected = theirs(batch)
    found = ours.detect(maps, padded.image_sizes, originals)
    for mine, reference in zip(found, expected, strict=True):
        assert len(mine["boxes"]) >= 30
        assert mine["labels"].unique().numel() > 3
        mine["labels"] = torch.tensor(labels)[mine["labels"]]
        # torchvision leaves out what is less than a hundredth of a pixel wide or high, and has others in its place.
        large = (mine["boxes"][:, 2:] - mine["boxes"][:, :2] >= 1e-2).all(1)
        mine, count = {name: values[large] for name, values in mine.items()}, int(large.sum())
        assert_the_same_detections(mine, {name: values[:count] for name, values in reference.items()})


# Whole detectors.


@pytest.mark.parametrize("second", [False, True])
def test_a_whole_detector_of_torchvision_detects_the_same_here(second, tmp_path):
    theirs, ours = of_seven(second), detector(7, **SECOND if second else {})
    path = file_of(theirs.state_dict(), tmp_path / "a.pth")
    report = weights.load(ours, path)
    count = len(ours.state_dict())
    assert str(report) == f"loaded {count} of {count} tensors from {path} (torchvision, Faster R-CNN)"
    assert_parity(ours, theirs, list(range(1, 8)))


def test_of_91_classes_the_80_of_coco_detect_the_same(tmp_path):
    torch.manual_seed(5)
    theirs, ours = torchvisions(90), detector(80)
    with torch.no_grad():  # what trained weights have learned: nothing is ever of a class that is not used
        unused = [number for number in range(1, 91) if number not in USED]
        theirs.roi_heads.box_predictor.cls_score.bias[unused] = -50
    report = weights.load(ours, file_of(theirs.state_dict(), tmp_path / "a.pth"))
    assert report.resized == ("cls_out.weight", "cls_out.bias", "box_out.weight", "box_out.bias")
    assert report.left_out == report.fresh == ()
    assert_parity(ours, theirs, USED)


def test_the_file_of_torchvisions_first_as_it_lies_on_disk(tmp_path):
    """BatchNorm frozen and without epsilon, layers by their oldest names."""
    torch.manual_seed(5)
    theirs = torchvisions(7, norm=FrozenBatchNorm2d)
    with torch.no_grad():  # variances so small that an epsilon of 1e-5 would be seen
        for module in theirs.backbone.body.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(3e-3)
            elif isinstance(module, FrozenBatchNorm2d):
                module.running_mean.mul_(3e-3)
                module.running_var.mul_(9e-6)
    torchvision.models.detection._utils.overwrite_eps(theirs, 0.0)  # as its builder does for its COCO weights
    path = file_of(oldest(theirs.state_dict()), tmp_path / "a.pth")
    report = weights.load(plain := detector(7), path)
    assert report.fresh == report.left_out == ()
    said = "(torchvision, Faster R-CNN); to detect as there, build with freeze_norm=True, norm_eps=0.0"
    assert str(report).endswith(said)
    ours = detector(7, freeze_norm=True, norm_eps=0.0, weights=path)
    assert weights.load(ours, path).advice == ""
    assert_parity(ours, theirs, list(range(1, 8)))
    images = torch.rand(1, 3, 64, 64)
    assert (ours(images).objectness - plain(images).objectness).abs().max() > 0.1


def oldest(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of torchvision before 2022: no ".0.0" in the layer of the proposals, no ".0" in the pyramid."""
    renamed = {}
    for key, value in state.items():
        words = key.split(".")
        if words[:3] == ["rpn", "head", "conv"]:
            del words[3:5]
        elif words[1] == "fpn":
            del words[4]
        renamed[".".join(words)] = value
    return renamed


def test_the_oldest_names_are_those_that_torchvision_itself_still_reads():
    theirs, again = of_seven(), torchvisions(7)
    names = oldest(theirs.state_dict())
    again.load_state_dict(names)  # a state dict without a version
    assert same(snapshot(again), snapshot(theirs))
    assert {"rpn.head.conv.bias", "backbone.fpn.inner_blocks.3.weight"} <= names.keys()


@pytest.mark.parametrize(
    ("builder", "options", "classes"),
    [*((fasterrcnn_resnet50_fpn, {}, classes) for classes in (90, 80, 5)), (fasterrcnn_resnet50_fpn_v2, SECOND, 80)],
)
def test_all_names_and_shapes_of_torchvisions_own_builders_are_known(builder, options, classes):
    with torch.device("meta"):
        theirs = builder(weights=None, weights_backbone=None).state_dict()
        module = FasterRCNN("resnet50", classes, image_size=64, **options)
    ours, layout = module.state_dict(), TwoStageLayout()
    kind, state = translate(theirs, layout)
    assert kind == "torchvision, Faster R-CNN"
    state |= layout.resized(kind, state, ours)
    differs = {name for name in ours | state if name not in state or ours[name].shape != state[name].shape}
    by_class = {f"{layer}.{kind}" for layer in ("cls_out", "box_out") for kind in ("weight", "bias")}
    assert differs == (by_class if classes == 5 else set())


# Classes.


def test_each_class_of_coco_comes_to_its_label_and_background_is_last():
    """Label l is the l-th of COCO's category ids in ascending order."""
    state = {
        "roi_heads.box_predictor.cls_score.bias": torch.arange(91.0),
        "module.roi_heads.box_predictor.cls_score.weight": torch.arange(91.0)[:, None].expand(-1, 2),
        "roi_heads.box_predictor.bbox_pred.bias": torch.arange(364.0),
        "rpn.head.cls_logits.bias": torch.arange(3.0),
        "rpn.head.bbox_pred.bias": torch.arange(12.0),
    }
    layout = TwoStageLayout()
    kind, named = translate(state, layout)
    assert named["cls_out.bias"].tolist() == [*range(1, 91), 0]
    assert named["box_out.bias"].tolist() == [*range(4, 364)]
    assert named["rpn.cls_out.bias"].tolist() == [0, 1, 2]
    assert named["rpn.box_out.bias"].tolist() == [*range(12)]
    found = layout.resized(kind, named, {"cls_out.bias": torch.zeros(81)})
    assert found["cls_out.bias"].tolist() == [*USED, 0]
    assert found["module.cls_out.weight"].tolist() == [[number, number] for number in [*USED, 0]]
    assert found["box_out.bias"].tolist() == [4 * number + side for number in USED for side in range(4)]
    assert layout.resized(kind, named, {"cls_out.bias": torch.zeros(91)}) == {}
    assert layout.resized("", named, {"cls_out.bias": torch.zeros(81)}) == {}  # our own 90 classes are anybody's


def test_for_classes_of_ones_own_only_the_outputs_by_class_begin_anew(tmp_path):
    outputs = ("cls_out.weight", "cls_out.bias", "box_out.weight", "box_out.bias")
    ours = detector(5)
    before = snapshot(ours)
    report = weights.load(ours, file_of(state_of_seven(), tmp_path / "a.pth"))
    assert report.left_out == report.fresh == outputs
    assert report.resized == ()
    assert report.advice == ""
    after = snapshot(ours)
    assert {name for name in after if torch.equal(after[name], before[name])} - {*outputs} == {
        name for name in after if name.endswith("num_batches_tracked")
    }


def test_what_torchvision_does_otherwise_is_said_as_far_as_the_detector_was_not_built_so(tmp_path):
    path, ours = file_of(state_of_seven(), tmp_path / "a.pth"), detector(7)
    built = dict(ours.hparams)

    def said(**options: Any) -> str:
        ours.hparams.update(built | options)
        return weights.load(ours, path).advice

    assert said() == ""
    assert said(anchors="centered", nms_threshold=0.6) == (
        "to detect as there, build with anchors=torchvision, nms_threshold=0.5"
    )
    assert said(post_nms_top_k=(500, 300)) == "to detect as there, build with post_nms_top_k=(2000, 1000)"


# What does not fit.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"neck": "single"}, "of another detector than this: neck is fpn there and single here; build with neck='fpn'"),
        (
            {"channels": 16},
            "channels is 32 there and 16 here; build with channels=32, or start from the backbone alone",
        ),
        ({"class_agnostic": True}, "class_agnostic is False there and True here; build with class_agnostic=False, or"),
        (
            {"head_width": 8},
            "has another box_head than FasterRCNN: box_head.fc1.weight is (48, 1568) there and (8, 1568)",
        ),
        (
            {"neck_norm": "batch", "rpn_depth": 3},
            "neck_norm is none there and batch here, rpn_depth is 1 there and 3 here; build with neck_norm='none', "
            "rpn_depth=1, or start from the backbone alone",
        ),
        ({"levels": (3, 6)}, "a larger network than FasterRCNN: neck.lateral.3.weight"),
        ({"name": "resnet34"}, "of the encoder's 180 tensors are missing, backbone.layer1.* ("),
    ],
)
def test_another_detector_is_refused_in_one_line_that_says_what_to_build(tmp_path, options, said):
    assert_refused(detector(7, **options), file_of(state_of_seven(), tmp_path / "a.pth"), said)


def assert_refused(ours: FasterRCNN, path: str, said: str) -> None:
    """In one line, and nothing has changed."""
    before = snapshot(ours)
    with pytest.raises(ValueError, match="^[^\n]+$") as caught:
        weights.load(ours, path)
    assert str(caught.value).startswith(path)
    assert said in str(caught.value)
    assert same(before, snapshot(ours))


def test_torchvisions_second_version_is_refused_by_the_first_with_what_to_build(tmp_path):
    path = file_of(state_of_seven(second=True), tmp_path / "a.pth")
    said = "; build with neck_norm='batch', rpn_depth=2, box_head='conv', or start from the backbone alone"
    assert_refused(detector(7), path, said)
    assert_refused(detector(7, head_width=8, **SECOND), path, "box_head.fc1.weight is (48, 1568) there and (8, 1568)")


def test_torchvisions_on_mobilenet_is_refused_by_name(tmp_path):
    with torch.device("meta"):
        build = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
        theirs = build(weights=None, weights_backbone=None).state_dict()
    path = file_of({name: torch.zeros(()).expand(value.shape) for name, value in theirs.items()}, tmp_path / "a.pth")
    said = "torchvision's Faster R-CNN on MobileNetV3, with maps and anchors of its own, is not built here: take faste"
    assert_refused(small(), path, f"{path}: {said}")


def small(seed: int = 1, **options: Any) -> FasterRCNN:
    torch.manual_seed(seed)
    return FasterRCNN(**SMALL | options)


def dense(**options: Any) -> FPNDetector:
    return FPNDetector("test_resnet", 3, channels=16, head_depth=1, image_size=64, **options)


def test_a_dense_detector_is_refused_and_so_is_this_one_by_it(tmp_path):
    weights.save(dense(), tmp_path / "dense.safetensors")
    weights.save(small(), tmp_path / "two_stage.safetensors")
    with pytest.raises(ValueError, match="is of a dense detector: build zoo.FPNDetector, or start from the backbone"):
        weights.load(small(), tmp_path / "dense.safetensors")
    with pytest.raises(ValueError, match="is of a two-stage detector: build zoo.FasterRCNN, or start from the backb"):
        weights.load(dense(), tmp_path / "two_stage.safetensors")


# Our own files, and backbones alone.


def test_a_detectors_own_file(tmp_path):
    weights.save(trained := small(1), tmp_path / "a.safetensors")
    report = weights.load(ours := small(2), tmp_path / "a.safetensors")
    assert report.loaded == report.total == len(ours.state_dict())
    assert same(snapshot(ours), snapshot(trained))
    report = weights.load(ours := small(2, num_classes=7), tmp_path / "a.safetensors")
    assert {*report.fresh} == {f"{layer}.{kind}" for layer in ("cls_out", "box_out") for kind in ("weight", "bias")}
    assert torch.equal(ours.box_head.fc1.weight, trained.box_head.fc1.weight)


def test_weights_of_a_backbone_alone_leave_the_rest_fresh(tmp_path):
    theirs, ours = timm.create_model("test_resnet"), small()
    before = snapshot(ours)
    report = weights.load(ours, file_of(theirs.state_dict(), tmp_path / "a.pth"))
    assert {name.split(".")[0] for name in report.fresh} == {"neck", "rpn", "box_head", "cls_out", "box_out"}
    after = snapshot(ours)
    assert all(torch.equal(after[name], before[name]) for name in report.fresh)
    assert all(
        torch.equal(after[f"backbone.{name}"], value) for name, value in theirs.state_dict().items() if "fc" not in name
    )


# On one map, with the backbone's last stage as box head.

ON_ONE_MAP: dict[str, Any] = {"neck": "none", "box_head": "stage"}


def on_one_map(seed: int = 1, **options: Any) -> FasterRCNN:
    return small(seed, **ON_ONE_MAP | options)


def torchvisions_on_one_map(num_classes: int) -> Any:
    """As one builds it of torchvision's parts: a ResNet's layer4 as head, on what its layer3 gives."""
    resnet = torchvision.models.resnet18(weights=None)
    stage = nn.Sequential(resnet.layer4, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    body = nn.Sequential(OrderedDict(list(resnet.named_children())[:7]))
    body.out_channels = 256
    model = faster_rcnn.FasterRCNN(
        body,
        rpn_anchor_generator=faster_rcnn.AnchorGenerator(((32, 64, 128, 256, 512),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 14, 2),
        box_head=stage,
        box_predictor=faster_rcnn.FastRCNNPredictor(512, 1 + num_classes),
        rpn_post_nms_top_n_test=30,
        min_size=64,
        max_size=80,
    ).eval()
    randomize(model)
    return model


def test_torchvisions_on_one_map_detects_the_same_here(tmp_path):
    torch.manual_seed(5)
    theirs = torchvisions_on_one_map(7)
    state = {
        name.replace("roi_heads.box_head.0.", "backbone.layer4."): value for name, value in theirs.state_dict().items()
    }
    ours = detector(7, channels=256, post_nms_top_k=(2000, 30), **ON_ONE_MAP)
    report = weights.load(ours, file_of(state, tmp_path / "a.pth"))
    assert report.loaded == report.total == len(ours.state_dict())
    assert_parity(ours, theirs, list(range(1, 8)))


@pytest.mark.parametrize("counters", [True, False])
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_weights_of_a_whole_backbone_reach_the_stage_that_is_the_box_head(tmp_path, name, counters):
    """Also without counters of batches, as frozen BatchNorm leaves them out."""
    torch.manual_seed(3)
    theirs = timm.create_model(name, num_classes=5)
    state = {key: value for key, value in theirs.state_dict().items() if counters or "num_batches" not in key}
    ours = on_one_map(backbone=name)
    stage = {"test_resnet": "layer4.", "test_convnext": "stages.3."}[name]
    report = weights.load(ours, file_of(state, tmp_path / "a.pth"))
    assert {key.split(".")[0] for key in report.fresh} == {"rpn", "cls_out", "box_out"}
    found = ours.state_dict()
    for key, value in state.items():
        inside = f"box_head.stage.{key.removeprefix(stage)}" if key.startswith(stage) else f"backbone.{key}"
        assert torch.equal(found[inside], value) if inside in found else key in report.left_out
    assert all(key.startswith(("fc.", "head.")) for key in report.left_out)


def test_the_file_of_a_detector_on_one_map(tmp_path):
    weights.save(trained := on_one_map(1), tmp_path / "a.safetensors")
    report = weights.load(ours := on_one_map(2), tmp_path / "a.safetensors")
    assert report.loaded == report.total == len(ours.state_dict())
    assert same(snapshot(ours), snapshot(trained))


def test_weights_without_the_stage_that_is_the_box_head_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    weights.save(dense(neck="single"), path)
    state = {key.removeprefix("backbone."): value for key, value in load_file(path).items() if "backbone" in key}
    ours = on_one_map()
    before = snapshot(ours)
    with pytest.raises(ValueError, match="lacks layer4, the stage of the backbone that is the box head: take weights"):
        weights.load(ours, file_of(state, tmp_path / "b.pth"))
    weights.save(small(neck="none"), path)
    with pytest.raises(ValueError, match="box_head is mlp there and stage here; build with box_head='mlp', or start"):
        weights.load(ours, path)
    assert same(before, snapshot(ours))


# The same by torchvision, to measure against.


def test_the_peer_is_as_large_and_learns_from_the_same_batch():
    with torch.device("meta"):
        ours = FasterRCNN("resnet18", 3, image_size=64)
        second = FasterRCNN("resnet18", 3, image_size=64, **SECOND)
        single = FasterRCNN("resnet18", 3, neck="single", image_size=64)
    background = 4 * (1024 + 1)  # which has a box there
    with torch.device("meta"):
        network, _ = second.peers["torchvision"].build(second, {})
    assert parameters(network) == parameters(second) + background
    network, loss = ours.peers["torchvision"].build(ours, {})
    assert parameters(network) == parameters(ours) + background
    images = torch.rand(1, 3, 48, 64)
    targets = ours.random_targets(images, torch.Generator().manual_seed(0))
    labels = targets[0]["labels"].clone()
    assert loss(network, (images, targets)).isfinite()
    assert torch.equal(targets[0]["labels"], labels)
    with pytest.raises(
        ValueError, match="torchvision has no Faster R-CNN but on a feature pyramid: compare with --mod"
    ):
        single.peers["torchvision"].build(single, {})


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
