"""Weights for FPNDetector: torchvision's detectors give the same here, and backbones come from everywhere."""

from collections import OrderedDict
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from lightning.pytorch import Trainer
from scipy.optimize import linear_sum_assignment
from timm.layers import resample_abs_pos_embed
from timm.models import register_model
from timm.models._registry import generate_default_cfgs
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.detection import (
    FCOS,
    FCOS_ResNet50_FPN_Weights,
    RetinaNet,
    fcos_resnet50_fpn,
    retinanet_resnet50_fpn,
    retinanet_resnet50_fpn_v2,
)
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from zoo import FasterRCNN, FPNDetector, MAEPretrainer, ViTClassifier, weights
from zoo.callbacks import ExportBackbone
from zoo.detection import FPN
from zoo.detection.layouts import DetectorLayout, of_coco
from zoo.weights.layouts import translate

COCO_NAMES = FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # 91, by category id
USED = [number for number, name in enumerate(COCO_NAMES) if name not in ("__background__", "N/A")]
BUILDERS = {"v1": retinanet_resnet50_fpn, "v2": retinanet_resnet50_fpn_v2, "fcos": fcos_resnet50_fpn}
# How each is built here, so that it does as there.
ALIKE: dict[str, dict[str, Any]] = {
    "v1": {"head": "retinanet", "score_threshold": 0.05, "nms_threshold": 0.5, "max_detections": 300},
    "v2": {
        "head": "retinanet",
        "head_norm": "group",
        "extra_from": "backbone",
        "box_loss": "giou",
        "score_threshold": 0.05,
        "nms_threshold": 0.5,
        "max_detections": 300,
    },
    "fcos": {"head": "fcos", "score_threshold": 0.2, "nms_threshold": 0.6, "max_detections": 100, "weighted": False},
}


def torchvisions(kind: str, num_classes: int, name: str = "resnet18", channels: int = 64, norm: Any = None) -> Any:
    """One of torchvision's detectors on a small network, with weights by which it detects many things."""
    body = torchvision.models.get_model(name, weights=None, norm_layer=norm)
    widths = [body.fc.in_features // 4, body.fc.in_features // 2, body.fc.in_features]
    layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
    extra = LastLevelP6P7(widths[-1] if kind == "v2" else channels, channels)
    backbone = BackboneWithFPN(body, layers, widths, channels, extra)
    sizes = {"min_size": 128, "max_size": 160}
    if kind == "fcos":
        model = FCOS(backbone, num_classes, head=FCOSHead(channels, 1, num_classes), **sizes)
    else:
        group = partial(nn.GroupNorm, 32) if kind == "v2" else None
        model = RetinaNet(
            backbone, num_classes, head=RetinaNetHead(channels, 9, num_classes, norm_layer=group), **sizes
        )
        model.head.regression_head._loss_type = "giou" if kind == "v2" else "l1"
    randomize(model, kind)
    return model.eval()


@torch.no_grad()
def randomize(model: Any, kind: str) -> None:
    """No bias stays zero, no norm the identity; and outputs vary about as a trained network's do."""
    randomize_norms(model)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and (".conv." in name or "fpn" in name):
            nn.init.normal_(parameter, std=0.1)
    for tower in (model.head.classification_head, model.head.regression_head):
        for layer in tower.conv.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
    images, _ = model.transform([torch.rand(3, 128, 128)])
    model.eval()
    features = list(model.backbone(images.tensors).values())
    classes, boxes = model.head.classification_head, model.head.regression_head
    scale(classes.cls_logits, classes.conv, features, -4.0, 1.5)
    scale(boxes.bbox_reg, boxes.conv, features, *((2.0, 1.5) if kind == "fcos" else (0.0, 0.3)))
    if kind == "fcos":
        scale(boxes.bbox_ctrness, boxes.conv, features, 1.0, 1.0)


@torch.no_grad()
def randomize_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)


def scale(output: nn.Conv2d, tower: nn.Module, features: list[Tensor], mean: float, deviation: float) -> None:
    """Gives an output such weights that its values have about this mean and deviation over all levels."""
    assert output.bias is not None
    nn.init.zeros_(output.bias)
    values = torch.cat([output(tower(level)).flatten() for level in features])
    output.weight.mul_(deviation / values.std())
    nn.init.normal_(output.bias, mean=mean - float(values.mean() * deviation / values.std()), std=0.1)


@cache
def state_of(kind: str, num_classes: int) -> dict[str, Tensor]:
    torch.manual_seed(5)
    return dict(torchvisions(kind, num_classes).state_dict())


def detector(kind: str, num_classes: int, name: str = "resnet18", channels: int = 64, **options: Any) -> FPNDetector:
    """In memory as torchvision's: with channels last a CPU rounds otherwise, BatchNorm in training most of all."""
    torch.manual_seed(9)
    alike = {**ALIKE[kind], "anchors": "torchvision", "channels": channels, "channels_last": False, **options}
    return FPNDetector(name, num_classes, image_size=64, **alike).eval()


def file_of(state: dict[str, Tensor], path: Path) -> str:
    torch.save(state, path)
    return str(path)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def pictures() -> list[Tensor]:
    """Images of odd and different sizes, with something coarse in them."""
    coarse = [torch.rand(1, 3, 5, 7), torch.rand(1, 3, 9, 4), torch.rand(1, 3, 3, 3)]
    sizes = [(97, 131), (90, 139), (128, 110)]
    pairs = zip(coarse, sizes, strict=True)
    return [nn.functional.interpolate(each, size=size, mode="bicubic")[0].clamp(0, 1) for each, size in pairs]


def assert_the_same_detections(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """As sets: which comes first of two whose scores agree to seven digits is a matter of rounding."""
    assert len(ours["boxes"]) == len(theirs["boxes"])
    apart = (ours["boxes"][:, None] - theirs["boxes"]).abs().amax(-1)
    alike = (apart < 1e-3) & ((ours["scores"][:, None] - theirs["scores"]).abs() < 1e-5)
    alike &= ours["labels"][:, None] == theirs["labels"]
    pairs = linear_sum_assignment(~alike.numpy())  # one to one: many boxes in the padding are clipped to the same line
    assert alike[pairs].all()


@torch.no_grad()
def assert_parity(ours: FPNDetector, theirs: Any, labels: list[int]) -> None:
    """Maps of all levels and detections, in pixels of the original images; ``labels``: what ours are there."""
    batch = pictures()
    padded, _ = theirs.transform(batch)
    pyramid = theirs.backbone(padded.tensors)
    for mine, level in zip(ours.neck(ours.maps(ours.backbone, padded.tensors)), pyramid.values(), strict=True):
        torch.testing.assert_close(mine, level, rtol=1e-5, atol=1e-5)
    maps, raw = ours(padded.tensors), theirs.head(list(pyramid.values()))
    torch.testing.assert_close(maps.logits, raw["cls_logits"][..., labels], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(maps.boxes, raw["bbox_regression"], rtol=1e-5, atol=1e-5)
    if maps.centerness is not None:
        torch.testing.assert_close(maps.centerness[..., None], raw["bbox_ctrness"], rtol=1e-5, atol=1e-5)
    originals = [(each.shape[1], each.shape[2]) for each in batch]
    expected = theirs(batch)
    for least in (50, 5):
        found = ours.detect(padded.tensors, padded.image_sizes, originals)
        for mine, reference in zip(found, expected, strict=True):
            sides = mine["boxes"][:, 2:] - mine["boxes"][:, :2]
            assert (sides.amin(1) > 1).sum() >= least
            assert (mine["scores"][:-1] >= mine["scores"][1:]).all()
            mine["labels"] = torch.tensor(labels)[mine["labels"]]
            # torchvision's also has the lines that boxes in the padding end as, and counts them among its best.
            area = (reference["boxes"][:, 2:] > reference["boxes"][:, :2]).all(1)
            reference = {name: values[area] for name, values in reference.items()}
            assert_the_same_detections({k: v[: int(area.sum())] for k, v in mine.items()}, reference)
        # Once more where it is the threshold and the number of candidates that decide.
        ours.hparams.score_threshold = theirs.score_thresh = min(float(each["scores"][:20][-1]) for each in expected)
        ours.hparams.top_candidates = theirs.topk_candidates = 40
        expected = theirs(batch)


# The pyramid.


@pytest.mark.parametrize("extra_from", ["output", "backbone"])
@pytest.mark.parametrize("size", [(64, 64), (96, 160), (75, 101), (33, 7)])
def test_a_pyramid_equals_torchvisions_exactly(extra_from, size):
    widths, channels = [8, 12, 20], 16
    theirs = FeaturePyramidNetwork(
        widths, channels, LastLevelP6P7(20 if extra_from == "backbone" else channels, channels)
    )
    ours = FPN([3, 4, 5], widths, channels, 7, extra_from)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
        pairs = [
            (mine, their[0])
            for mine, their in zip(
                [*ours.lateral, *ours.output], [*theirs.inner_blocks, *theirs.layer_blocks], strict=True
            )
        ]
        pairs += [(ours.get_submodule(name), theirs.extra_blocks.get_submodule(name)) for name in ("p6", "p7")]
        for mine, their in pairs:
            mine.load_state_dict(their.state_dict())
    # Networks round odd sizes up; some round them down.
    for rounding in (1, 0):
        sizes = [[max(1, (side + rounding * (2**level - 1)) // 2**level) for side in size] for level in (0, 1, 2)]
        maps = [torch.randn(2, width, *each) for width, each in zip(widths, sizes, strict=True)]
        expected = theirs(OrderedDict((str(i), each) for i, each in enumerate(maps)))
        found = ours(maps)
        assert len(found) == len(expected) == 5
        assert all(torch.equal(mine, their) for mine, their in zip(found, expected.values(), strict=True))


# Whole detectors.


@pytest.mark.parametrize("kind", ["v1", "v2", "fcos"])
def test_a_whole_detector_of_torchvision_detects_the_same_here(tmp_path, kind):
    theirs, ours = torchvisions(kind, 7), detector(kind, 7)
    report = weights.load(ours, file_of(theirs.state_dict(), tmp_path / "a.pth"))
    assert report.loaded == report.total == len(ours.state_dict())
    name = "FCOS" if kind == "fcos" else "RetinaNet"
    assert (
        str(report)
        == f"loaded {report.total} of {report.total} tensors from {tmp_path / 'a.pth'} (torchvision, {name})"
    )
    assert_parity(ours, theirs, list(range(7)))


@pytest.mark.parametrize("kind", ["v1", "v2", "fcos"])
def test_of_91_classes_the_80_of_coco_detect_the_same(tmp_path, kind):
    theirs, ours = torchvisions(kind, 91), detector(kind, 80)
    logits = theirs.head.classification_head.cls_logits
    with torch.no_grad():  # what trained weights have learned: nothing is ever of a class that is not used
        rows = logits.bias.view(-1, 91)
        rows[:, [number for number in range(91) if number not in USED]] = -50
    report = weights.load(ours, file_of(theirs.state_dict(), tmp_path / "a.pth"))
    assert report.resized == ("head.cls_out.weight", "head.cls_out.bias")
    assert report.left_out == report.fresh == ()
    assert_parity(ours, theirs, USED)


def test_the_file_of_torchvisions_first_retinanet_as_it_lies_on_disk(tmp_path):
    """ResNet-50, BatchNorm frozen and without epsilon, layers by their oldest names."""
    theirs = torchvisions("v1", 7, "resnet50", norm=FrozenBatchNorm2d)
    with torch.no_grad():  # variances so small that an epsilon of 1e-5 would be seen
        for module in theirs.backbone.body.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(3e-3)
            elif isinstance(module, FrozenBatchNorm2d):
                module.running_mean.mul_(3e-3)
                module.running_var.mul_(9e-6)
    torchvision.models.detection._utils.overwrite_eps(theirs, 0.0)  # as its builder does for its COCO weights
    path = file_of(oldest(theirs.state_dict()), tmp_path / "a.pth")
    plain = detector("v1", 7, "resnet50")
    report = weights.load(plain, path)
    assert report.fresh == ()
    assert str(report).endswith(
        "(torchvision, RetinaNet); to detect as there, build with freeze_norm=True, norm_eps=0.0"
    )
    ours = detector("v1", 7, "resnet50", freeze_norm=True, norm_eps=0.0, weights=path)
    assert weights.load(ours, path).advice == ""
    assert_parity(ours, theirs, list(range(7)))
    images = torch.rand(1, 3, 64, 64)
    assert (ours(images).logits - plain(images).logits).abs().max() > 0.1


def oldest(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of torchvision before 2022: convolutions and ReLUs of a tower counted alike, no ``.0`` in the pyramid."""
    renamed = {}
    for key, value in state.items():
        words = key.split(".")
        if words[0] == "head" and words[2] == "conv":
            words[3:5] = [str(2 * int(words[3]))]
        elif words[1] == "fpn" and words[2] != "extra_blocks":
            del words[4]
        renamed[".".join(words)] = value
    return renamed


def test_the_oldest_names_are_those_that_torchvision_itself_still_reads(tmp_path):
    theirs, again = torchvisions("v1", 7), torchvisions("v1", 7)
    names = oldest(theirs.state_dict())
    again.load_state_dict(names)  # a state dict without a version
    assert same(snapshot(again), snapshot(theirs))
    assert {"head.regression_head.conv.6.bias", "backbone.fpn.inner_blocks.2.weight"} <= names.keys()


@pytest.mark.parametrize("kind", ["v1", "v2", "fcos"])
@pytest.mark.parametrize("classes", [91, 80, 5])
def test_all_names_and_shapes_of_torchvisions_own_builders_are_known(kind, classes):
    with torch.device("meta"):
        theirs = BUILDERS[kind](weights=None, weights_backbone=None).state_dict()
        ours = FPNDetector("resnet50", classes, **ALIKE[kind], image_size=64).state_dict()
    found, state = translate(theirs, DetectorLayout())
    assert found == f"torchvision, {'FCOS' if kind == 'fcos' else 'RetinaNet'}"
    state |= of_coco(found, state, len(ours["head.cls_out.weight"]))
    differs = {name for name in ours | state if name not in state or ours[name].shape != state[name].shape}
    assert differs == ({"head.cls_out.weight", "head.cls_out.bias"} if classes == 5 else set())


# The losses.


@pytest.mark.parametrize("kind", ["v1", "v2", "fcos"])
def test_losses_and_gradients_of_all_parameters_are_torchvisions(tmp_path, kind):
    theirs = torchvisions(kind, 7).train()
    ours = detector(kind, 7, normalizer="batch" if kind == "fcos" else "image").train()
    weights.load(ours, file_of(theirs.state_dict(), tmp_path / "a.pth"))
    corners = [torch.tensor([[4.0, 9, 60, 50], [30, 30, 61, 90], [2, 2, 95, 96]]), torch.zeros(0, 4)]
    corners.append(torch.tensor([[1.0, 1, 12, 14], [20, 33, 50, 60.5]]))
    labels = [torch.tensor([1, 0, 6]), torch.zeros(0, dtype=torch.int64), torch.tensor([3, 3])]
    targets = [{"boxes": b, "labels": n} for b, n in zip(corners, labels, strict=True)]
    batch = pictures()
    padded, resized = theirs.transform(batch, targets)
    expected = theirs(batch, targets)
    found = ours.loss(ours(padded.tensors), resized)
    names = {"classification": "classification", "bbox_regression": "box", "bbox_ctrness": "centerness"}
    assert {names[name] for name in expected} == found.keys()
    for name, value in expected.items():
        assert value > 0
        torch.testing.assert_close(found[names[name]], value, rtol=1e-5, atol=0)
    torch.stack(list(expected.values())).sum().backward()
    torch.stack(list(found.values())).sum().backward()
    _, gradients = translate({name: each.grad for name, each in theirs.named_parameters()}, DetectorLayout())
    own = dict(ours.named_parameters())
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        if kind == "v2" and "_tower." in name and name.endswith("conv.bias"):
            continue  # there is none there
        largest = gradient.abs().max()
        assert largest > 0, name
        assert (own[name].grad - gradient).abs().max() < 1e-4 * largest, name


# Other classes.


@pytest.mark.parametrize("kind", ["v1", "fcos"])
def test_each_class_of_coco_comes_to_its_label(kind):
    """Label l is the l-th of COCO's category ids in ascending order, for each anchor of a cell."""
    anchors = 9 if kind == "v1" else 1
    assert len(USED) == 80
    assert {"person": 0, "bicycle": 1, "toothbrush": 79}.items() <= {
        COCO_NAMES[n]: i for i, n in enumerate(USED)
    }.items()
    numbers = torch.arange(91.0).repeat(anchors) + 100 * torch.arange(float(anchors)).repeat_interleave(91)
    state = {
        "head.cls_out.weight": numbers.view(-1, 1, 1, 1).expand(-1, 2, 3, 3),
        "head.cls_out.bias": numbers,
        "head.box_out.bias": torch.zeros(4 * anchors),
    }
    found = of_coco("torchvision, FCOS", state, 80 * anchors)
    expected = torch.tensor([100.0 * anchor + number for anchor in range(anchors) for number in USED])
    assert torch.equal(found["head.cls_out.bias"], expected)
    assert torch.equal(found["head.cls_out.weight"], expected.view(-1, 1, 1, 1).expand(-1, 2, 3, 3))
    assert of_coco("torchvision, FCOS", state, 91 * anchors) == {}
    assert of_coco("torchvision, FCOS", state, 5 * anchors) == {}
    assert of_coco("", state, 80 * anchors) == {}  # our own 91 classes are anybody's


@pytest.fixture
def coco(tmp_path) -> str:
    return file_of(state_of("fcos", 91), tmp_path / "coco.pth")


def test_for_classes_of_ones_own_only_the_outputs_by_class_begin_anew(coco):
    outputs = ("head.cls_out.weight", "head.cls_out.bias")
    ours = detector("fcos", 5)
    before = snapshot(ours)
    report = weights.load(ours, coco)
    assert report.left_out == report.fresh == outputs
    assert report.resized == ()
    assert report.loaded == report.total - 2
    tensors = "head.cls_out.weight, head.cls_out.bias"
    assert f"; unexpected keys: {tensors}; missing keys: {tensors}" in str(report)
    torch.testing.assert_close(ours.head.cls_out.bias.sigmoid(), torch.full((5,), 0.01))  # the prior of focal loss
    after = snapshot(ours)
    assert {name for name in after if torch.equal(after[name], before[name])} - {*outputs} == {
        name for name in after if name.endswith("num_batches_tracked")
    }


def test_a_detector_of_91_classes_takes_them_as_they_are(coco):
    ours = detector("fcos", 91)
    assert weights.load(ours, coco).resized == ()
    assert torch.equal(ours.head.cls_out.bias, state_of("fcos", 91)["head.classification_head.cls_logits.bias"])


@pytest.mark.parametrize("prefix", ["module.", "model.", "model._orig_mod."])
def test_wrappers_around_torchvisions_names(tmp_path, coco, prefix):
    wrapped = file_of({prefix + name: value for name, value in state_of("fcos", 91).items()}, tmp_path / "a.pth")
    plain, again = detector("fcos", 80), detector("fcos", 80)
    weights.load(plain, coco)
    report = weights.load(again, wrapped)
    assert report.loaded == report.total
    assert same(snapshot(again), snapshot(plain))


def test_what_torchvision_does_otherwise_is_said_as_far_as_the_detector_was_not_built_so(tmp_path, coco):
    def said(**options: Any) -> str:
        return weights.load(FPNDetector("resnet18", channels=64, image_size=64, **options), coco).advice

    assert said() == "to detect as there, build with anchors=torchvision, score_threshold=0.2"
    assert said(anchors="torchvision", nms_threshold=0.5) == (
        "to detect as there, build with score_threshold=0.2, nms_threshold=0.6"
    )
    assert said(anchors="torchvision", score_threshold=0.2) == ""
    # A classifier on the same backbone detects nothing.
    bare = timm.create_model("resnet18", num_classes=0)
    assert weights.load(bare, coco).advice == ""


def test_without_counters_of_batches_a_file_is_whole(tmp_path, coco):
    """As frozen BatchNorm leaves them out."""
    state = {name: value for name, value in state_of("fcos", 91).items() if not name.endswith("num_batches_tracked")}
    report = weights.load(detector("fcos", 80), file_of(state, tmp_path / "a.pth"))
    assert report.fresh == report.left_out == ()


def test_norm_eps_is_the_epsilon_of_all_batch_norms_of_the_backbone():
    def epsilons(**options: Any) -> set[float]:
        backbone = detector("fcos", 3, **options).backbone
        return {module.eps for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)}

    assert epsilons() == {1e-5}
    assert epsilons(norm_eps=1e-3) == {1e-3}
    assert epsilons(norm_eps=0.0, freeze_norm=True) == {0.0}
    for wrong, freeze in ((-1e-3, True), (0.0, False)):  # torch trains with no epsilon of 0
        with pytest.raises(ValueError, match=f"norm_eps is {wrong}: expected more than 0, or 0 with freeze_norm"):
            detector("fcos", 3, norm_eps=wrong, freeze_norm=freeze)


# What does not fit.


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        (
            "fcos",
            {"head": "retinanet"},
            "head is fcos there and retinanet here, head_norm is group there and none here; "
            "build with head='fcos', head_norm='group', or start from the backbone alone",
        ),
        (
            "v2",
            {"head": "retinanet"},
            "head_norm is group there and none here, extra_from is backbone there and output here; "
            "build with head_norm='group', extra_from='backbone', or",
        ),
        (
            "v2",
            {"head": "retinanet", "head_norm": "group"},
            "extra_from is backbone there and output here; build with extra_from='backbone', or",
        ),
        (
            "v1",
            {"head": "retinanet", "extra_from": "backbone"},
            "extra_from is output there and backbone here; build with extra_from='output', or",
        ),
        ("v1", {"head": "fcos"}, "build with head='retinanet', head_norm='none', or"),
        ("v2", {"head": "fcos", "extra_from": "backbone"}, "build with head='retinanet', head_norm='group', or"),
        ("fcos", {"head": "atss"}, "head is fcos there and atss here; build with head='fcos'"),
        ("fcos", {"channels": 32}, "channels is 64 there and 32 here; build with channels=64, or"),
        ("fcos", {"head_depth": 2}, "head_depth is 4 there and 2 here; build with head_depth=4, or"),
        ("fcos", {"neck": "single"}, "neck is fpn there and single here; build with neck='fpn', or"),
        (
            "fcos",
            {"levels": (2, 7)},
            "another neck than FPNDetector: neck.lateral.0.weight is (64, 128, 1, 1) there",
        ),
        (
            "fcos",
            {"levels": (3, 4)},
            "a larger network than FPNDetector: neck.lateral.2.weight, neck.lateral.2.bias",
        ),
        ("fcos", {"levels": (3, 8)}, "has another neck than FPNDetector: neck.p8.weight is missing there"),
        ("fcos", {"backbone": "resnet34"}, "of the encoder's 180 tensors are missing, backbone.layer1.* ("),
    ],
)
def test_another_detector_is_refused_in_one_line_that_says_what_to_build(tmp_path, source, options, said):
    path = file_of(state_of(source, 7), tmp_path / "a.pth")
    ours = FPNDetector(**{"backbone": "resnet18", "num_classes": 7, "channels": 64, "image_size": 64, **options})
    before = snapshot(ours)
    with pytest.raises(ValueError, match="^[^\n]+$") as caught:
        weights.load(ours, path)
    assert str(caught.value).startswith(path)
    assert said in str(caught.value)
    assert same(before, snapshot(ours))


@pytest.mark.parametrize("kind", ["v1", "v2", "fcos"])
@pytest.mark.parametrize("side", ["classification", "regression"])
def test_half_a_head_is_refused(tmp_path, kind, side):
    first = "conv.0.1.bias" if kind == "v2" else "conv.0.0.bias" if kind == "v1" else "conv.0.bias"
    state = dict(state_of(kind, 7))
    del state[f"head.{side}_head.{first}"]
    tower = {"classification": "cls_tower", "regression": "box_tower"}[side]
    name = rf"head\.{tower}\.0\.{'norm' if kind == 'v2' else 'conv'}\.bias"
    with pytest.raises(ValueError, match=f"has another head than FPNDetector: {name} is missing there"):
        weights.load(detector(kind, 7), file_of(state, tmp_path / "a.pth"))


def test_outputs_by_class_that_somebody_deleted_begin_anew(tmp_path):
    state = {name: value for name, value in state_of("fcos", 91).items() if "cls_logits" not in name}
    report = weights.load(detector("fcos", 5), file_of(state, tmp_path / "b.pth"))
    assert report.fresh == ("head.cls_out.weight", "head.cls_out.bias")
    assert report.left_out == ()


def test_a_faster_r_cnn_is_no_dense_detector(tmp_path):
    with torch.device("meta"):
        theirs = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None)
    state = {name: torch.zeros(value.shape) for name, value in theirs.state_dict().items() if "fc6" not in name}
    with pytest.raises(ValueError, match=r"tensors are missing, .* it holds backbone\.body\.\* .*rpn"):
        weights.load(detector("fcos", 91), file_of(state, tmp_path / "a.pth"))


def test_coarser_levels_that_a_detector_does_not_have_are_left_out_and_named(coco):
    report = weights.load(detector("fcos", 91, levels=(3, 5)), coco)
    assert report.left_out == ("neck.p6.weight", "neck.p6.bias", "neck.p7.weight", "neck.p7.bias")
    assert report.fresh == ()


def test_a_longer_decoder_of_a_masked_autoencoder_is_not_loaded_by_half(tmp_path):
    def pretrainer(depth: int) -> MAEPretrainer:
        sizes = {"width": 16, "depth": 1, "heads": 1, "decoder_dim": 16, "decoder_heads": 1}
        return MAEPretrainer("vit_tiny_patch16_224", image_size=32, decoder_depth=depth, **sizes)

    weights.save(pretrainer(3), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"is of a larger network than MAEPretrainer: decoder\.\* \(12\)"):
        weights.load(pretrainer(2), tmp_path / "a.safetensors")


# Our own files, and backbones alone.

SMALL: dict[str, Any] = {"num_classes": 3, "channels": 16, "head_depth": 1, "image_size": 64}


def small(seed: int = 1, backbone: Any = "test_resnet", **options: Any) -> FPNDetector:
    torch.manual_seed(seed)
    return FPNDetector(backbone, **{**SMALL, **options})


def fit(module: Any, folder: Path, *callbacks: Any) -> Path:
    """Trains for one step on two images; returns the checkpoint."""
    images = torch.randn(2, 3, 32, 32)
    targets = [{"boxes": torch.tensor([[4.0, 4, 25, 28]]), "labels": torch.tensor([1])}] * 2
    batch = (images, targets) if isinstance(module, FPNDetector) else images
    trainer = Trainer(
        max_steps=1,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([batch], batch_size=None))
    trainer.save_checkpoint(folder / "run.ckpt")
    return folder / "run.ckpt"


def test_what_lies_channels_last_in_memory_is_saved(tmp_path):
    """As a detector's and an EfficientNet's convolutions do by default."""
    trained = small(1)
    assert not trained.backbone.conv1[0].weight.is_contiguous()
    weights.save(trained, tmp_path / "a.safetensors")
    weights.load(ours := small(2), tmp_path / "a.safetensors")
    assert same(snapshot(ours), snapshot(trained))
    assert not ours.backbone.conv1[0].weight.is_contiguous()


@pytest.mark.parametrize("head", ["fcos", "atss", "retinanet"])
def test_a_detectors_own_checkpoint(tmp_path, head):
    trained, ours = small(1, head=head), small(2, head=head)
    path = fit(trained, tmp_path)
    report = weights.load(ours, path)
    assert str(report) == f"loaded {report.total} of {report.total} tensors from {path}"
    assert same(snapshot(ours), snapshot(trained))
    # Written by a process that had wrapped and compiled it.
    state = {f"module._orig_mod.{name}": value for name, value in trained.state_dict().items()}
    weights.load(again := small(3, head=head), file_of(state, tmp_path / "a.pth"))
    assert same(snapshot(again), snapshot(trained))


def test_a_detectors_own_checkpoint_for_other_classes_and_for_another_head(tmp_path):
    path = str(tmp_path / "a.safetensors")
    weights.save(trained := small(1), path)
    report = weights.load(ours := small(2, num_classes=7), path)
    assert {*report.fresh} == {*report.left_out} == {"head.cls_out.weight", "head.cls_out.bias"}
    assert torch.equal(ours.head.box_out.weight, trained.head.box_out.weight)
    # ATSS has all tensors of FCOS with the same shapes, and means other things by them.
    with pytest.raises(ValueError, match="head is fcos there and atss here; build with head='fcos'"):
        small(2, head="atss", weights=path)
    # 720 outputs are 720 classes of FCOS or 80 of RetinaNet.
    weights.save(small(1, head="retinanet", num_classes=80), path)
    with pytest.raises(ValueError, match="head is retinanet there and fcos here"):
        small(2, num_classes=720, weights=path)


def test_weights_of_a_backbone_alone_leave_neck_and_head_fresh(tmp_path):
    theirs, ours = timm.create_model("test_resnet"), small()
    before = snapshot(ours)
    report = weights.load(ours, file_of(theirs.state_dict(), tmp_path / "a.pth"))
    assert report.left_out == ("fc.weight", "fc.bias")
    assert {name.split(".")[0] for name in report.fresh} == {"neck", "head"}
    assert report.advice == ""
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.backbone.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in snapshot(ours).items() if "backbone" not in name)


def test_torchvisions_resnet_for_classification_as_a_backbone(tmp_path):
    theirs = torchvision.models.resnet18(weights=None)
    randomize_norms(theirs)
    report = weights.load(ours := small(1, "resnet18").eval(), file_of(theirs.state_dict(), tmp_path / "a.pth"))
    assert report.left_out == ("fc.weight", "fc.bias")
    images = torch.randn(2, 3, 64, 96)
    features = theirs.eval().conv1(images).to(memory_format=torch.contiguous_format)
    for name in ("bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        features = theirs.get_submodule(name)(features)
    torch.testing.assert_close(ours.maps(ours.backbone, images)[-1], features, rtol=1e-4, atol=1e-4)


@register_model
def zoo_test_resnet(pretrained: bool = False, **options: Any) -> nn.Module:
    return timm.models.resnet._create_resnet(
        "zoo_test_resnet", pretrained, block=timm.models.resnet.BasicBlock, layers=(1, 1, 1, 1), **options
    )


def test_a_tag_of_timm(tmp_path):
    path = str(tmp_path / "a.pth")
    settings = {"num_classes": 5, "input_size": (3, 64, 64), "first_conv": "conv1", "classifier": "fc"}
    configs = generate_default_cfgs({"zoo_test_resnet.here": {"file": path, **settings}})
    timm.models._registry._model_default_cfgs["zoo_test_resnet"] = configs["zoo_test_resnet"]
    timm.models._registry._model_pretrained_cfgs["zoo_test_resnet.here"] = configs["zoo_test_resnet"].default
    timm.models._registry._model_has_pretrained.add("zoo_test_resnet.here")
    theirs = timm.create_model("zoo_test_resnet.here")
    file_of(theirs.state_dict(), Path(path))
    ours = small(1, timm.create_model("zoo_test_resnet.here"), weights="zoo_test_resnet.here")
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.backbone.state_dict().items())


@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet", "test_resnet"])
def test_stages_behind_the_last_level_are_gone_and_left_out(tmp_path, name):
    theirs = timm.create_model(name)
    ours = small(1, name, neck="single")
    report = weights.load(ours, file_of(theirs.state_dict(), tmp_path / "a.pth"))
    assert set(report.left_out) == theirs.state_dict().keys() - ours.backbone.state_dict().keys()
    assert report.loaded == len(ours.backbone.state_dict()) < len(theirs.state_dict())
    assert {part.split(".")[0] for part in report.fresh} == {"neck", "head"}


def test_a_larger_network_is_refused_even_if_stages_are_gone(tmp_path):
    deeper = timm.create_model("test_convnext", depths=(1, 2, 6, 2))
    with pytest.raises(ValueError, match=r"is of a larger network than FPNDetector: stages\.\* \(18\)"):
        weights.load(small(1, "test_convnext", neck="single"), file_of(deeper.state_dict(), tmp_path / "a.pth"))


@pytest.mark.parametrize("builder", ["retinanet_resnet50_fpn", "fcos_resnet50_fpn", "fasterrcnn_resnet50_fpn"])
def test_the_backbone_of_torchvisions_detectors_goes_into_whatever_has_it(builder, tmp_path):
    """A classifier knows nothing of detectors, nor a detector of those of another kind; their ResNet is the same."""
    theirs = getattr(torchvision.models.detection, builder)(weights=None, weights_backbone=None).state_dict()
    path = file_of(theirs, tmp_path / "a.pth")
    ours = [ViTClassifier("resnet50", num_classes=3), timm.create_model("resnet50", num_classes=0)]
    other = FPNDetector if builder.startswith("faster") else FasterRCNN
    ours += [other("resnet50", num_classes=3, channels=16)]
    for module in ours:
        weights.load(module, path)
        kernels = getattr(module, "backbone", module).layer4[2].conv3.weight
        assert torch.equal(kernels, theirs["backbone.body.layer4.2.conv3.weight"])


def test_a_pretrained_masked_autoencoder_as_the_backbone_of_a_detector(tmp_path):
    """Its checkpoint, and the encoder that ExportBackbone writes; positions are interpolated."""
    pretrained = MAEPretrainer("vit_tiny_patch16_224", image_size=32, decoder_dim=16, decoder_depth=1, decoder_heads=1)
    checkpoint = fit(pretrained, tmp_path, ExportBackbone())
    theirs = pretrained.backbone.state_dict()
    detectors = []
    for source in (checkpoint, tmp_path / "encoder.safetensors"):
        ours = small(1, "vit_tiny_patch16_224", image_size=(64, 96))
        report = weights.load(ours, source)
        assert report.resized == ("backbone.pos_embed",)
        assert {name.split(".")[0] for name in report.fresh} == {"neck", "head"}
        beside = {name.removeprefix("backbone.").split(".")[0] for name in report.left_out}
        assert beside == {"norm", "decoder"} if source == checkpoint else {"norm"}
        detectors.append(ours)
    first, second = detectors
    assert same(snapshot(first), snapshot(second))
    for name, value in first.backbone.state_dict().items():
        expected = theirs[name] if name != "pos_embed" else resample_abs_pos_embed(theirs[name], [4, 6])
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
    assert len(first.detect(torch.randn(2, 3, 64, 96))) == 2


def test_a_detector_on_a_vision_transformer_for_another_image_size(tmp_path):
    trained = small(1, "vit_tiny_patch16_224", image_size=64)
    weights.save(trained, tmp_path / "a.safetensors")
    report = weights.load(ours := small(2, "vit_tiny_patch16_224", image_size=(96, 128)), tmp_path / "a.safetensors")
    assert report.resized == ("backbone.pos_embed",)
    assert report.fresh == report.left_out == ()
    expected = resample_abs_pos_embed(trained.backbone.pos_embed, [6, 8])
    torch.testing.assert_close(ours.backbone.pos_embed, expected)
    assert torch.equal(ours.neck.lateral[0][0].weight, trained.neck.lateral[0][0].weight)
