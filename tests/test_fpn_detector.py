"""FPNDetector as a LightningModule: every argument, other people's backbones and batches, evaluation, and learning."""

import copy
import inspect
import math
import pickle
from functools import partial, partialmethod
from typing import Any

import pytest
import timm
import torch
from lightning.pytorch.plugins import TorchSyncBatchNorm
from test_detection_parts import NeverWaits
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader
from torchvision import ops

from datamodules import ShapesDetectionDataModule
from zoo import FPNDetector
from zoo._lightning import Callback, Trainer
from zoo.common.cost import Blueprint, count
from zoo.detection import DenseMaps, SimpleFeaturePyramid, SingleLevel, assign, pad_targets
from zoo.detection.postprocessing import non_maximum_suppression, to_original
from zoo.metrics.average_precision import CocoAveragePrecision

HEADS = ("fcos", "atss", "retinanet")
SMALL = {"backbone": "test_resnet", "num_classes": 3, "channels": 16, "head_depth": 1, "image_size": 64}
QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}


def small(**options) -> FPNDetector:
    torch.manual_seed(0)
    return FPNDetector(**SMALL | options)


def on_meta(**options) -> FPNDetector:
    with torch.device("meta"), Blueprint():
        return FPNDetector(**SMALL | options)


def pictures(size: int, side: int = 64, seed: int = 0, channels: int = 3) -> Tensor:
    return torch.randn(size, channels, side, side, generator=torch.Generator().manual_seed(seed))


def targets(counts=(3, 0, 1, 6), side: int = 64, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number, several in enumerate(counts):
        sides = 8 + torch.rand(several, 2, generator=generator) * side / 2
        corner = torch.rand(several, 2, generator=generator) * (side - sides)
        labels = torch.randint(3, (several,), generator=generator)
        found.append({"boxes": torch.cat([corner, corner + sides], 1), "labels": labels, "image_id": number})
    return found


def samples(counts=(3, 0, 1, 6), side: int = 64) -> list[tuple[Tensor, dict[str, Any]]]:
    return list(zip(pictures(len(counts), side), targets(counts, side), strict=True))


def collate(batch: list[tuple[Tensor, dict[str, Any]]]) -> tuple[Tensor, list[dict[str, Any]]]:
    images, about = zip(*batch, strict=True)
    return torch.stack(images), list(about)


def loader(counts=(3, 0, 1, 6), batch_size: int = 2, **options) -> DataLoader:
    return DataLoader(samples(counts), batch_size, collate_fn=collate, **options)


def fit(module: FPNDetector, data: DataLoader | None = None, ckpt_path=None, **options) -> Trainer:
    trainer = Trainer(**QUIET | {"max_epochs": 1, "limit_val_batches": 0} | options)
    trainer.fit(module, data or loader(), ckpt_path=ckpt_path)
    return trainer


def some_maps(module: FPNDetector, size: int = 4, side: int = 64) -> DenseMaps:
    """Raw predictions as they could be after training, of the shapes that the module's have."""
    with torch.no_grad():
        maps = module(pictures(size, side))
    generator = torch.Generator().manual_seed(5)
    draw = partial(torch.randn, generator=generator)
    boxes = draw(maps.boxes.shape)
    boxes = boxes.abs() + 0.5 if module.hparams.head == "fcos" else 0.5 * boxes
    centerness = None if maps.centerness is None else draw(maps.centerness.shape)
    return maps._replace(logits=draw(maps.logits.shape) - 1, boxes=boxes, centerness=centerness)


def same_detections(found, expected) -> bool:
    return len(found) == len(expected) and all(
        torch.equal(one[key], other[key])
        for one, other in zip(found, expected, strict=True)
        for key in ("boxes", "scores", "labels")
    )


# Backbones.


@pytest.mark.parametrize(
    ("name", "size", "strides", "shapes"),
    [
        ("resnet50", (75, 101), (8, 16, 32, 64, 128), [(10, 13), (5, 7), (3, 4), (2, 2), (1, 1)]),
        ("convnext_atto", (75, 101), (8, 16, 32, 64, 128), [(9, 12), (4, 6), (2, 3), (1, 2), (1, 1)]),  # rounds down
        ("swin_tiny_patch4_window7_224", (96, 160), (8, 16, 32, 64, 128), [(12, 20), (6, 10), (3, 5), (2, 3), (1, 2)]),
        ("pvt_v2_b0", (75, 101), (8, 16, 32, 64, 128), [(10, 13), (5, 7), (3, 4), (2, 2), (1, 1)]),
        ("mobilenetv3_small_100", (75, 101), (8, 16, 32, 64, 128), [(10, 13), (5, 7), (3, 4), (2, 2), (1, 1)]),
        ("vit_tiny_patch16_224", (75, 101), (8, 16, 32, 64, 128), [(10, 14), (5, 7), (3, 4), (2, 2), (1, 1)]),
        ("flexivit_small", (75, 101), (8, 16, 32, 64, 128), [(10, 14), (5, 7), (3, 4), (2, 2), (1, 1)]),
        ("vit_small_patch14_dinov2", (75, 101), (7, 14, 28, 56, 112), [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)]),
    ],
)
def test_levels_are_found_by_their_stride_in_images_of_any_size(name, size, strides, shapes):
    module = on_meta(backbone=name, image_size=56 if "patch14" in name else 64)
    assert module.strides == strides
    maps = module(torch.zeros(2, 3, *size, device="meta"))
    assert list(maps.shapes) == shapes
    cells = sum(rows * columns for rows, columns in shapes)
    assert (maps.logits.shape, maps.boxes.shape) == ((2, cells, 3), (2, cells, 4))
    assert maps.image_size == size
    assert isinstance(module.neck, SimpleFeaturePyramid) == ("vit" in name)


def test_maps_that_are_used_are_all_that_is_computed():
    """Weights without a gradient would stop training on several devices."""
    for options in ({"levels": (3, 4)}, {"neck": "single", "levels": (4, 4)}, {"backbone": "test_vit"}, {}):
        module = small(**options)
        sum(module.loss(module(pictures(4)), targets()).values()).backward()
        assert [name for name, p in module.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(("levels", "strides"), [((2, 5), (4, 8, 16, 32)), ((5, 5), (32,)), ((1, 3), (2, 4, 8))])
def test_other_levels(levels, strides):
    module = small(levels=levels)
    maps = module(pictures(1))
    assert module.strides == strides
    assert list(maps.shapes) == [(64 // stride, 64 // stride) for stride in strides]
    assert module.cells(maps).counts == tuple((64 // stride) ** 2 for stride in strides)


@pytest.mark.parametrize(("name", "levels"), [("test_resnet", None), ("test_resnet", (3, 3)), ("test_vit", None)])
def test_one_level_alone(name, levels):
    module = small(backbone=name, neck="single", levels=levels)
    stride = 8 if levels else 16
    assert isinstance(module.neck, SingleLevel)
    assert module.strides == (stride,)
    maps = module(pictures(1))
    assert maps.shapes == ((64 // stride, 64 // stride),)
    assert module.cells(maps).ranges.unique(dim=0).tolist() == [[0, math.inf]]  # objects of every size are its own


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": (6, 7)}, r"levels are \[6, 7\]: ResNet has no map of stride 64, only of 2, 4, 8, 16, 32"),
        ({"levels": (0, 3)}, r"levels are \[0, 3\]: expected the finest and the coarsest, such as \[3, 7\]"),
        ({"levels": (5, 3)}, r"levels are \[5, 3\]: expected the finest and the coarsest, such as \[3, 7\]"),
        ({"neck": "single", "levels": (3, 5)}, r"levels are \[3, 5\]: expected one level, such as \[4, 4\]"),
        ({"neck": "single", "backbone": "test_vit", "levels": (3, 3)}, r"the one map of test_vit is level 4"),
        ({"backbone": "test_vit", "levels": (6, 7)}, r"levels are \[6, 7\]: a simple feature pyramid starts at"),
        ({"backbone": "resnet51"}, "timm has no model 'resnet51': did you mean .*resnet50"),
        ({"backbone": nn.Conv2d(3, 4, 1)}, "Conv2d does not say what maps it gives: expected a network of timm, or a"),
        ({"backbone": "vit_small_patch14_dinov2"}, "image_size 64x64 is not divisible by the patch size 14x14"),
    ],
)
def test_backbones_and_levels_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        FPNDetector(**SMALL | options)


class Pyramid(nn.Module):
    """Somebody else's backbone."""

    strides, channels = [8, 16, 32], [4, 6, 8]

    def __init__(self, strides=None) -> None:
        super().__init__()
        self.strides = strides or self.strides
        # No 1x1 convolutions with strides: with so few channels oneDNN writes where it should not (its issue 6035).
        self.layers = nn.ModuleList(
            nn.Conv2d(3, width, stride, stride=stride)
            for width, stride in zip(self.channels, self.strides, strict=True)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        return [layer(images) for layer in self.layers]


def test_a_module_of_ones_own_states_strides_and_channels():
    module = small(backbone=Pyramid())
    assert module.strides == (8, 16, 32, 64, 128)
    assert module.hparams.backbone.endswith("Pyramid")
    maps = module(pictures(4))
    assert maps.shapes == ((8, 8), (4, 4), (2, 2), (1, 1), (1, 1))
    sum(module.loss(maps, targets()).values()).backward()
    assert all(layer.weight.grad.abs().sum() > 0 for layer in module.backbone.layers)
    with pytest.raises(ValueError, match="Pyramid has maps of strides 4, 16, 32: expected one of each level from 2 to"):
        small(backbone=Pyramid([4, 16, 32]), levels=(2, 6))
    with pytest.raises(ValueError, match="frozen_stages needs group_matcher"):
        small(backbone=Pyramid(), frozen_stages=1)


def test_timms_lists_of_features():
    """The same maps whichever way a network is asked for them, and a dictionary of maps is as good as a list."""
    features = timm.create_model("test_resnet", features_only=True)
    whole = timm.create_model("test_resnet")
    whole.load_state_dict(features.state_dict(), strict=False)
    ours, theirs = (small(backbone=each).eval() for each in (whole, features))
    theirs.load_state_dict({name: ours.state_dict()[name] for name in theirs.state_dict()})
    assert not hasattr(whole, "fc") or isinstance(whole.fc, nn.Identity)
    expected = ours(pictures(2))
    assert torch.equal(theirs(pictures(2)).logits, expected.logits)

    class Named(nn.Module):
        strides, channels = features.feature_info.reduction(), features.feature_info.channels()

        def __init__(self) -> None:
            super().__init__()
            self.network = features

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {f"C{index}": each for index, each in enumerate(self.network(images))}

    named = small(backbone=Named()).eval()
    named.neck, named.head = ours.neck, ours.head
    assert torch.equal(named(pictures(2)).logits, expected.logits)


def test_images_of_other_channels():
    assert small(in_channels=1)(pictures(1, channels=1)).logits.shape[2] == 3
    with pytest.raises(ValueError, match=r"images are \(1, 1, 64, 64\): expected \(B, 3, H, W\), by in_channels"):
        small()(pictures(1, channels=1))


# Every argument matters.


def shapes(**options) -> Any:
    return {name: tuple(value.shape) for name, value in small(**options).state_dict().items()}


def detections(**options) -> Any:
    module = small(**options).eval()
    return [(each["boxes"].tolist(), each["scores"].tolist()) for each in module.detect(some_maps(module))]


def losses(**options) -> Any:
    module = small(**options)
    return {name: value.item() for name, value in module.loss(some_maps(module), targets()).items()}


def trained(**options) -> Any:
    return [name for name, parameter in small(**options).named_parameters() if parameter.requires_grad]


class Rates(Callback):
    """Notes what each group of parameters is trained with, before each step."""

    def __init__(self) -> None:
        self.noted: list[Any] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        keys = ("lr", "weight_decay", "momentum", "betas")
        self.noted.append([type(optimizer).__name__] + [[g.get(key) for key in keys] for g in optimizer.param_groups])


def rates(**options) -> Any:
    noted = Rates()
    fit(small(**{"lr": 1e-3} | options), max_epochs=2, callbacks=[noted], detect_anomaly=False)
    return noted.noted


def layout(**options) -> Any:
    return small(**options).neck.output[0].weight.stride()


TWO: dict[str, Any] = {"views": [{}, {"scale": 0.5}]}
TILES = {"levels": (3, 4), "views": [{"tile": 32}]}
DILATABLE = {"backbone": "test_byobnet"}  # test_resnet has no convolution of stride 1 in its stage of stride 16
TRIDENT = DILATABLE | {"trident": True}
MATTERS = {
    "backbone": (shapes, {}, {"backbone": "test_convnext"}),
    "num_classes": (shapes, {}, {"num_classes": 4}),
    "head": (shapes, {"head": "fcos"}, {"head": "atss"}),
    "anchors": (lambda **options: some_cells(**options), {}, {"anchors": "torchvision"}),
    "score_threshold": (detections, {}, {"score_threshold": 0.5}),
    "nms_threshold": (detections, {}, {"nms_threshold": 0.2}),
    "max_detections": (detections, {}, {"max_detections": 7}),
    "weights": (lambda **options: values(**options), {}, {"weights": "somewhere.pth"}),
    "in_channels": (shapes, {}, {"in_channels": 1}),
    "image_size": (lambda **options: small(**options).input_shape, {}, {"image_size": (64, 96)}),
    "neck": (shapes, {"levels": (4, 4)}, {"levels": (4, 4), "neck": "single"}),
    "levels": (shapes, {}, {"levels": (3, 6)}),
    "channels": (shapes, {}, {"channels": 24}),
    "head_depth": (shapes, {}, {"head_depth": 2}),
    "head_norm": (shapes, {}, {"head_norm": "none"}),
    "extra_from": (shapes, {}, {"extra_from": "backbone"}),
    "box_loss": (losses, {"head": "atss"}, {"head": "atss", "box_loss": "l1"}),
    "weighted": (losses, {}, {"weighted": False}),
    "center_radius": (losses, {}, {"center_radius": 0.8}),
    "normalizer": (losses, {}, {"normalizer": "image"}),
    "top_candidates": (detections, {"max_detections": 500}, {"max_detections": 500, "top_candidates": 10}),
    "views": (lambda **options: viewed(**options), {}, TWO),
    "merge": (lambda **options: viewed(**options), TWO, TWO | {"merge": "weighted"}),
    "tiles_at_once": (lambda **options: passes(**options), TILES, TILES | {"tiles_at_once": 2}),
    "freeze_norm": (trained, {}, {"freeze_norm": True}),
    "norm_eps": (lambda **options: small(**options).backbone.bn1.eps, {}, {"norm_eps": 1e-3}),
    "frozen_stages": (trained, {}, {"frozen_stages": 2}),
    "grad_checkpointing": (lambda **options: recomputed(**options), {}, {"grad_checkpointing": True}),
    "trident": (lambda **options: small(**options)(pictures(1)).logits.shape, DILATABLE, TRIDENT),
    "dilations": (lambda **options: dilations(**options), DILATABLE, DILATABLE | {"dilations": [2]}),
    "scale_aware": (losses, TRIDENT, TRIDENT | {"scale_aware": False}),
    "valid_ranges": (losses, TRIDENT, TRIDENT | {"valid_ranges": [(0, 20), (10, 40), (30, None)]}),
    "branch": (detections, TRIDENT, TRIDENT | {"branch": 1}),
    "channels_last": (layout, {}, {"channels_last": False}),
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


def some_cells(**options) -> list[list[float]]:
    module = small(**options)
    return module.cells(module(pictures(1))).anchors.tolist()


def viewed(**options) -> Any:
    return [each["scores"].tolist() for each in small(**options).eval().detect(pictures(1))]


def passes(**options) -> list[int]:
    """Sizes of the batches that the network sees of one image."""
    module, seen = small(**options).eval(), []
    module.register_forward_hook(lambda _, images, maps: seen.append(len(images[0])))
    module.detect(pictures(1))
    return seen


def dilations(**options) -> list[Any]:
    return [part.dilation for part in small(**options).backbone.modules() if isinstance(part, nn.Conv2d)]


def values(**options) -> float:
    torch.save({name: value + 1 for name, value in small().state_dict().items()}, "somewhere.pth")
    return sum(value.sum().item() for value in small(**options).state_dict().values())


def recomputed(**options) -> int:
    """How often the first convolution of the last stage runs in a training step."""
    module, calls = small(**options), []
    module.backbone.layer4[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    sum(module.loss(module(pictures(4)), targets()).values()).backward()
    return len(calls)


def test_the_table_below_has_every_argument():
    assert set(MATTERS) == set(inspect.signature(FPNDetector).parameters)


MEASURED: dict[tuple[object, str], object] = {}


def measured(probe, options):
    """What a probe finds, each time; it is asked twice for all arguments that start from the same options."""
    key = probe, repr(options)
    if key not in MEASURED:
        MEASURED[key] = probe(**options)
        assert probe(**options) == MEASURED[key]
    return MEASURED[key]


@pytest.mark.parametrize("name", MATTERS)
def test_every_argument_matters(name):
    probe, options, changed = MATTERS[name]
    assert measured(probe, options) != probe(**changed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "yolo"}, "unknown head 'yolo': expected one of fcos, atss, retinanet"),
        ({"anchors": "centred"}, "unknown anchors 'centred': expected one of centered, torchvision"),
        ({"neck": "bifpn"}, "unknown neck 'bifpn': expected one of fpn, single"),
        ({"head_norm": "batch"}, "unknown head_norm 'batch': expected one of group, none"),
        ({"extra_from": "c5"}, "unknown extra_from 'c5': expected one of output, backbone"),
        ({"box_loss": "ciou"}, "unknown box_loss 'ciou': expected one of giou, l1"),
        ({"normalizer": "none"}, "unknown normalizer 'none': expected one of batch, image"),
        ({"schedule": "poly"}, "unknown schedule 'poly': expected one of cosine, steps"),
        ({"score_threshold": 1.5}, r"score_threshold is 1.5: expected a number in \[0, 1\]"),
        ({"nms_threshold": -0.1}, r"nms_threshold is -0.1: expected a number in \[0, 1\]"),
        ({"num_classes": 0}, "num_classes is 0: expected at least 1"),
        ({"max_detections": 0}, "max_detections is 0: expected at least 1"),
        ({"top_candidates": 0}, "top_candidates is 0: expected at least 1"),
        ({"channels": 0}, "channels is 0: expected at least 1"),
        ({"box_loss": "l1"}, "box_loss 'l1' is of deltas, and head 'fcos' predicts distances: take 'giou'"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0: expected more than 0, or 0 with freeze_norm"),
        ({"frozen_stages": 9}, "frozen_stages is 9: expected 0 to 4, of ResNet"),
        ({"frozen_stages": -1}, "frozen_stages is -1: expected 0 to 4, of ResNet"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adamv"}, "unknown optimizer 'adamv': did you mean adam"),
        ({"schedule": "steps", "min_lr": 1e-3}, "milestones go with neither a staircase nor min_lr"),
        ({"schedule": "steps", "milestones": ()}, r"milestones are \[\]: expected epochs above 0, ascending"),
        ({"warmup_epochs": -1.0}, "warmup_epochs is -1.0: expected at least 0"),
    ],
)
def test_wrong_training(options, message):
    with pytest.raises(ValueError, match=message):
        fit(small(**options))


def test_defaults_are_those_of_each_heads_paper():
    fcos, atss, retinanet = (small(head=head) for head in HEADS)
    assert [module.box_loss for module in (fcos, atss, retinanet)] == ["giou", "giou", "l1"]
    assert [module.head.scales is not None for module in (fcos, atss, retinanet)] == [False, True, False]
    assert [isinstance(m.head.cls_tower[0].norm, nn.GroupNorm) for m in (fcos, atss, retinanet)] == [True, True, False]
    assert [module.head.ctr_out is not None for module in (fcos, atss, retinanet)] == [True, True, False]
    assert retinanet.head.cls_out.out_channels == 9 * 3


def test_milestones_are_where_the_learning_rate_falls():
    found = [step[1][0] for step in rates(schedule="steps", milestones=(0.5, 1.5), lr=1.0, warmup_epochs=0)]
    assert found == pytest.approx([1, 0.1, 0.1, 0.01])  # two batches an epoch


# Frozen and synchronised BatchNorm, frozen stages.


def statistics(module: nn.Module) -> list[Tensor]:
    return [buffer.clone() for name, buffer in module.named_buffers() if "running" in name]


def test_frozen_batchnorm_keeps_statistics_and_weights():
    module = small(freeze_norm=True, lr=0.1)
    assert not any(part.training for part in module.backbone.modules() if isinstance(part, nn.BatchNorm2d))
    weights = {name: value.clone() for name, value in module.backbone.state_dict().items()}
    fit(module)
    assert module.train().training
    changed = {name for name, value in module.backbone.state_dict().items() if not torch.equal(value, weights[name])}
    assert "layer1.0.conv1.weight" in changed
    norms = {name for name, part in module.backbone.named_modules() if isinstance(part, nn.BatchNorm2d)}
    assert not {name.rpartition(".")[0] for name in changed} & norms
    thawed = small(lr=0.1)
    fit(thawed)
    assert not torch.equal(thawed.backbone.bn1.running_mean, weights["bn1.running_mean"])


@pytest.mark.parametrize("freeze_norm", [False, True])
def test_synchronised_batchnorm_keeps_activations_and_stays_frozen(freeze_norm):
    module = small(backbone="test_efficientnet", freeze_norm=freeze_norm)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_var, 0.5, 1.5)
            nn.init.uniform_(part.running_mean, -0.5, 0.5)
    expected = module.eval()(pictures(2)).logits
    synchronised = TorchSyncBatchNorm().apply(module)
    assert any(isinstance(part, nn.SyncBatchNorm) for part in synchronised.modules())
    assert torch.equal(synchronised.eval()(pictures(2)).logits, expected)
    before = statistics(synchronised)
    synchronised.train()(pictures(4))
    assert all(torch.equal(a, b) for a, b in zip(statistics(synchronised), before, strict=True)) == freeze_norm


def test_frozen_stages_are_not_trained():
    module = small(frozen_stages=2, lr=0.1)
    frozen = {name for name, parameter in module.backbone.named_parameters() if not parameter.requires_grad}
    assert {name.split(".")[0] for name in frozen} == {"conv1", "bn1", "layer1"}
    before = {name: value.clone() for name, value in module.state_dict().items()}
    fit(module)
    for name, value in module.backbone.named_parameters():
        assert torch.equal(value, before[f"backbone.{name}"]) == (name in frozen), name
    for name, value in module.backbone.named_buffers():  # statistics of BatchNorm
        is_frozen = name.split(".")[0] in ("conv1", "bn1", "layer1")
        assert torch.equal(value, before[f"backbone.{name}"]) == is_frozen, name


# Detections.


@pytest.mark.parametrize("head", HEADS)
def test_images_give_what_their_maps_give_best_first(head):
    module = small(head=head, score_threshold=0.0, max_detections=20).eval()
    found = module.detect(pictures(3))
    assert same_detections(found, module.detect(module(pictures(3))))
    for each in found:
        assert each["boxes"].shape == (20, 4)
        assert each["boxes"].dtype == each["scores"].dtype == torch.float32
        assert each["labels"].dtype == torch.int64
        assert each["scores"].diff().le(0).all()
        assert (each["boxes"] >= 0).all()
        assert (each["boxes"] <= 64).all()
        assert not each["boxes"].requires_grad


def test_nothing_found_has_the_shapes_of_nothing():
    module = small(score_threshold=1.0).eval()
    for found in module.detect(pictures(2), [(64, 64)] * 2, [(640, 480)] * 2):
        assert (found["boxes"].shape, found["scores"].shape, found["labels"].shape) == ((0, 4), (0,), (0,))
        assert (found["boxes"].dtype, found["scores"].dtype, found["labels"].dtype) == (
            torch.float32,
            torch.float32,
            torch.int64,
        )


def one_cell_each(module: FPNDetector, spots: list[tuple[int, int, float, float]]) -> DenseMaps:
    """Maps of a single image in which only some cells of the first level find anything: row, column, logits.

    The two numbers are the logits of class 1 and of the centerness. Boxes are squares of 16 pixels.
    """
    maps = module(pictures(1))
    maps.logits.fill_(-20), maps.centerness.fill_(20), maps.boxes.fill_(1.0)
    for row, column, logit, centerness in spots:
        maps.logits[0, 8 * row + column, 1] = logit
        maps.centerness[0, 8 * row + column] = centerness
    return maps


@torch.no_grad()
def test_a_detection_by_hand():
    module = small(score_threshold=0.3, nms_threshold=0.3).eval()
    logit = lambda p: math.log(p / (1 - p))  # noqa: E731
    # Neighbours overlap by a third. The product of class and centerness decides, and its root is compared and given.
    maps = one_cell_each(
        module, [(2, 2, logit(0.5), logit(0.5)), (2, 3, logit(0.9), logit(0.9)), (6, 1, logit(0.4), 20)]
    )
    (found,) = module.detect(maps)
    assert found["labels"].tolist() == [1, 1]
    assert found["scores"].tolist() == pytest.approx([0.9, math.sqrt(0.4)])
    assert found["boxes"].tolist() == [[20, 12, 36, 28], [4, 44, 20, 60]]
    module.hparams.nms_threshold = 0.34
    assert module.detect(maps)[0]["scores"].tolist() == pytest.approx([0.9, math.sqrt(0.4), 0.5])
    module.hparams.score_threshold = 0.51
    assert module.detect(maps)[0]["scores"].tolist() == pytest.approx([0.9, math.sqrt(0.4)])
    module.hparams.max_detections = 1
    assert module.detect(maps)[0]["scores"].tolist() == pytest.approx([0.9])


@torch.no_grad()
def test_boxes_end_with_the_image_and_come_back_in_its_original_pixels():
    module = small().eval()
    maps = one_cell_each(module, [(0, 0, 20, 20), (2, 5, 20, 20)])  # squares of 16 around (4, 4) and (44, 20)
    expected = [[0, 0, 12, 12], [36, 12, 52, 28]]
    (found,) = module.detect(maps)
    assert sorted(found["boxes"].tolist()) == expected
    (found,) = module.detect(maps, sizes=[(24, 48)])
    assert sorted(found["boxes"].tolist()) == [[0, 0, 12, 12], [36, 12, 48, 24]]
    (found,) = module.detect(maps, [(24, 48)], [(240, 96)])
    assert sorted(found["boxes"].tolist()) == [[0, 0, 24, 120], [72, 120, 96, 240]]
    (found,) = module.detect(maps, original_sizes=[(32, 128)])
    assert sorted(found["boxes"].tolist()) == [[0, 0, 24, 6], [72, 6, 104, 14]]
    batch = (pictures(1), [{"size": (24, 48), "orig_size": torch.tensor([240, 96]), "image_id": torch.tensor([7])}])
    module.forward = lambda images: maps
    (predicted,) = module.predict_step(batch, 0)
    assert sorted(predicted["boxes"].tolist()) == [[0, 0, 24, 120], [72, 120, 96, 240]]
    assert predicted["image_id"] == 7
    assert "image_id" not in module.predict_step(pictures(1), 0)[0]
    there_and_back = to_original(
        to_original(torch.tensor(expected).float(), (64, 48), (427, 640)), (427, 640), (64, 48)
    )
    torch.testing.assert_close(there_and_back, torch.tensor(expected).float())


@pytest.mark.parametrize("head", HEADS)
def test_detections_under_autocast_are_float32_boxes(head):
    """bfloat16 has steps of 4 pixels at 1,000: no box that comes out may lie on them alone."""
    module = small(head=head, score_threshold=0.0).eval()
    with torch.autocast("cpu", torch.bfloat16):
        maps = module(pictures(1))
        assert maps.logits.dtype == maps.boxes.dtype == torch.bfloat16
        (found,) = module.detect(maps, [(64, 64)], [(1333, 1333)])
    plain = maps._replace(logits=maps.logits.float(), boxes=maps.boxes.float())
    plain = plain._replace(centerness=None if maps.centerness is None else maps.centerness.float())
    assert same_detections([found], module.detect(plain, [(64, 64)], [(1333, 1333)]))
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    assert not torch.equal(found["boxes"], found["boxes"].bfloat16().float())


def test_suppression_keeps_80_classes_apart_at_1333_pixels_under_autocast():
    """Eighty objects, each found twice, and each with another class that was found in the same place."""
    corner = torch.rand(80, 2) * 1270
    boxes = torch.cat([corner, corner + 60], 1)
    again = boxes + torch.tensor([2.0, 0.0, 2.0, 0.0])
    everything = torch.cat([boxes, again, boxes])
    scores = torch.cat([torch.linspace(0.9, 0.8, 80), torch.linspace(0.7, 0.6, 80), torch.linspace(0.5, 0.4, 80)])
    labels = torch.arange(80)
    labels = torch.cat([labels, labels, (labels + 1) % 80])
    with torch.autocast("cpu", torch.bfloat16):
        found = non_maximum_suppression(everything, scores, labels, (1333, 1333), 0.05, 0.6, 1000)
    assert torch.equal(found["boxes"], torch.cat([boxes, boxes]))
    assert torch.equal(found["labels"], torch.cat([labels[:80], labels[160:]]))
    # Why: shifted by class in bfloat16, as torchvision would shift them, others would be left.
    shifted = everything.bfloat16() + (labels * 1334).bfloat16()[:, None]
    assert len(ops.nms(shifted.float(), scores, 0.6)) != 160


def test_few_candidates_a_level_are_the_best_of_each():
    module = small(top_candidates=1, score_threshold=0.0, nms_threshold=1.0).eval()
    maps = some_maps(module, 1)
    (found,) = module.detect(maps)
    scores = (maps.logits.sigmoid() * maps.centerness.sigmoid()[..., None]).sqrt()[0].amax(1)
    best = [level.max() for level in scores.split(list(module.cells(maps).counts))]
    assert found["scores"].tolist() == pytest.approx(sorted(map(float, best), reverse=True))


# Losses of the module.


@pytest.mark.parametrize("head", HEADS)
def test_losses_are_finite_and_the_parts_that_are_promised(head):
    module = small(head=head)
    found = module.loss(module(pictures(4)), targets())
    assert set(found) == {"classification", "box"} | ({"centerness"} if head != "retinanet" else set())
    assert all(value.shape == () and value.isfinite() and value > 0 for value in found.values())
    empty = module.loss(module(pictures(2)), targets((0, 0)))
    sum(empty.values()).backward()
    assert empty["box"] == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("head", HEADS)
def test_the_two_normalizers(head):
    """Of an image alone they are the same; of several, one divides sums, the other averages images."""
    batch, image = (small(head=head, normalizer=name) for name in ("batch", "image"))
    maps = some_maps(batch)
    sums = batch.loss_sums(maps, targets())
    assert sums.positives.tolist()[1] == 0
    assert sums.positives.unique().numel() == 4
    factor = 2 if head == "atss" else 1  # the weight of its box loss
    found = batch.loss(maps, targets())
    torch.testing.assert_close(found["classification"], sums.classification.sum() / sums.positives.sum())
    torch.testing.assert_close(found["box"], factor * sums.box.sum() / sums.box_weight.sum())
    found = image.loss(maps, targets())
    torch.testing.assert_close(found["classification"], (sums.classification / sums.positives.clamp(min=1)).mean())
    by_image = torch.where(sums.positives > 0, sums.box / sums.box_weight, 0.0)
    torch.testing.assert_close(found["box"], factor * by_image.mean())
    first = DenseMaps(
        maps.logits[:1], maps.boxes[:1], None if maps.centerness is None else maps.centerness[:1], *maps[3:]
    )
    torch.testing.assert_close(batch.loss(first, targets()[:1]), image.loss(first, targets()[:1]))


@pytest.mark.parametrize("head", HEADS)
def test_under_autocast_the_same_cells_learn_the_same_objects(head):
    module = small(head=head).eval()
    maps = module(pictures(4))
    with torch.autocast("cpu", torch.bfloat16):
        coarse = module(pictures(4))
        found = module.loss(coarse, targets())
        match = assign(head, module.cells(coarse), pad_targets(targets()))
    assert coarse.logits.dtype == torch.bfloat16
    assert torch.equal(match, assign(head, small(head=head).cells(maps), pad_targets(targets())))
    assert (match >= 0).any()
    assert all(value.dtype == torch.float32 and value.isfinite() for value in found.values())
    torch.testing.assert_close(found, module.loss(maps, targets()), rtol=0.05, atol=0)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_it_trains_in_bfloat16(precision):
    # Of 128 pixels: torch 2.14 leaves part of a weight's gradient as it finds it in memory, on a CPU in bfloat16, where
    # a 3x3 convolution of stride 2 gets a map one cell wide.
    data = DataLoader(samples((3, 0, 1, 6), side=128), 2, collate_fn=collate)
    module = small(head="retinanet", lr=1e-3)
    fit(module, data, precision=precision)
    assert all(value.isfinite().all() for value in module.state_dict().values())
    (cells,) = module._cells.values()
    assert torch.equal(cells.anchors, small(head="retinanet").cells(module.float()(pictures(2, 128))).anchors)


@pytest.mark.parametrize(
    ("head", "box_loss", "normalizer"),
    [("fcos", "giou", "batch"), ("atss", "l1", "image"), ("retinanet", "l1", "batch"), ("retinanet", "giou", "image")],
)
def test_a_training_step_waits_for_nothing(head, box_loss, normalizer):
    module = small(head=head, box_loss=box_loss, normalizer=normalizer)
    images, about = torch.rand(4, 3, 64, 64), targets((3, 0, 1, 6))
    module.cells(module(images))  # once for each size of images
    with NeverWaits():
        losses = module.loss(module(images), about)
        torch.stack(list(losses.values())).sum().backward()
        with pytest.raises(AssertionError, match="the host would wait"):
            losses["box"].item()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_labels_on_a_device_are_looked_at_in_the_first_batch_alone():
    images = torch.zeros(1, 3, 64, 64, device="meta")
    batch = images, [{"boxes": torch.zeros(2, 4, device="meta"), "labels": torch.zeros(2, device="meta").long()}]
    small()._checked(batch, 1)
    with pytest.raises(RuntimeError, match="meta tensors"):
        small()._checked(batch, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("head", HEADS)
def test_a_step_never_waits_for_the_gpu(head):
    module = small(head=head).cuda()
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


# Compiled.


def gradients(module: FPNDetector) -> dict[str, Tensor]:
    sum(module.loss(module(pictures(4)), targets()).values()).backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("head", ["fcos", "atss"])
def test_a_compiled_detector_is_one_graph_and_trains_the_same(head):
    torch._dynamo.reset()
    backbone = {} if head == "fcos" else {"backbone": Pyramid()}  # one compiled backbone will do, and takes seconds
    plain, module = (small(head=head, levels=(3, 5), **backbone) for _ in range(2))
    module.load_state_dict(plain.state_dict())
    keys = list(module.state_dict())
    module.compile(fullgraph=True, backend="aot_eager")
    assert list(module.state_dict()) == keys
    if head == "fcos":
        with torch.inference_mode():  # validation comes first
            module.eval().loss(module(pictures(4)), targets())
    expected, found = gradients(plain), gradients(module.train())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "head", ["fcos", *(pytest.param(name, marks=pytest.mark.slow) for name in ("atss", "retinanet"))]
)
def test_a_compiled_loss_is_one_graph_for_all_sizes(head):
    """Of images, of batches and of their numbers of objects; and it is as many times right."""
    torch._dynamo.reset()
    plain, module = (small(head=head, backbone=Pyramid(), levels=(3, 5)) for _ in range(2))
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
    assert counter.frame_count == 1


def test_a_copy_of_a_compiled_detector_runs_on_its_own_weights():
    """Lightning's copies would go on with the weights of the module that was compiled."""
    torch._dynamo.reset()
    module = small(backbone=Pyramid(), levels=(3, 3))
    module.compile(backend="eager")
    logits = module(pictures(2)).logits
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(twin(pictures(2)).logits, logits)
        with torch.no_grad():
            twin.head.cls_out.weight.zero_()
        assert twin(pictures(2)).logits.unique().numel() == 1
        assert twin.loss(twin(pictures(4)), targets())["classification"].isfinite()
    assert torch.equal(module(pictures(2)).logits, logits)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_compiled_detector_learns_as_another(monkeypatch):
    # The compiler of C++ would take most of a minute: what it makes of a loss is compared in test_detection_parts.py.
    monkeypatch.setattr(FPNDetector, "compile", partialmethod(FPNDetector.compile, backend="aot_eager"))
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module = small(backbone=Pyramid(), compile=compiled, lr=1e-3, levels=(3, 4))  # small: compiling takes long
        fit(module, max_epochs=2)
        found.append(module.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-5, msg=name)


# Evaluation.


class Validated(Callback):
    def __init__(self) -> None:
        self.calls = 0

    def setup(self, trainer, pl_module, stage) -> None:
        pl_module.head.register_forward_hook(lambda *_: setattr(self, "calls", self.calls + 1))


def evaluate(module: FPNDetector, batch_size: int, stage: str = "validate", callbacks=None) -> dict[str, float]:
    trainer = Trainer(**QUIET, callbacks=callbacks)
    (found,) = getattr(trainer, stage)(module, loader((3, 0, 1, 6, 2), batch_size), verbose=False)
    return found


@pytest.mark.parametrize("head", HEADS)
def test_one_pass_of_evaluation_gives_losses_and_ap_whatever_the_batch_size(head):
    module, calls = small(head=head, score_threshold=0.0), Validated()
    with torch.no_grad():
        module.head.cls_out.weight.mul_(20)  # else all scores are nearly alike
    found = evaluate(module, 2, callbacks=[calls])
    assert calls.calls == 3
    module.eval()
    images, about = collate(samples((3, 0, 1, 6, 2)))
    parts = module.loss(module(images), about)
    names = {"classification": "class", "box": "box", "centerness": "centerness"}
    for name, value in parts.items():
        assert found[f"val/loss_{names[name]}"] == pytest.approx(value.item(), rel=1e-5)
    assert found["val/loss"] == pytest.approx(sum(parts.values()).item(), rel=1e-5)
    metric = CocoAveragePrecision()
    metric.update(module.detect(images), about)
    scores = {name: value.item() for name, value in metric.compute().items()}
    assert {f"val/{name}": value for name, value in scores.items() if name.startswith("ap")}.items() <= found.items()
    assert {"val/ap", "val/ap50", "val/ap75", "val/ap_small"} <= found.keys()
    assert not any(name.startswith("val/ar") for name in found)
    alone = evaluate(module, 1)
    assert alone == pytest.approx(found, rel=1e-4, abs=1e-6)
    tested = evaluate(module, 5, "test")
    same = {name: tested[name.replace("val/", "test/")] for name in found}
    assert same == pytest.approx(found, rel=1e-4, abs=1e-6)
    assert {f"test/{name}": value for name, value in scores.items()}.items() <= tested.items()
    by_class = {name: value for name, value in tested.items() if name.startswith("test/ap_by_class/")}
    assert list(by_class) == ["test/ap_by_class/0", "test/ap_by_class/1", "test/ap_by_class/2"]
    assert sum(by_class.values()) / 3 == pytest.approx(tested["test/ap"])


def test_ap_is_of_original_pixels():
    """An object of 16 pixels in an image that was ten times as large is no small one."""
    module = small().eval()
    target = {"boxes": torch.tensor([[20.0, 12, 36, 28]]), "labels": torch.tensor([1])}
    with torch.no_grad():
        maps = one_cell_each(module, [(2, 3, 20, 20)])
    module.forward = lambda images: maps
    for original, size in (((64, 64), "small"), ((640, 640), "large"), (torch.tensor([160, 160]), "medium")):
        data = DataLoader([(pictures(1)[0], {**target, "orig_size": original})], 1, collate_fn=collate)
        (found,) = Trainer(**QUIET).validate(module, data, verbose=False)
        assert found["val/ap"] == 1
        assert {name for name in ("small", "medium", "large") if found[f"val/ap_{name}"] == 1} == {size}


def test_the_data_say_what_sizes_are_reported():
    data = ShapesDetectionDataModule(image_size=64, train_size=4, val_size=4, test_size=4, batch_size=2, num_workers=0)
    (found,) = Trainer(**QUIET).validate(small(num_classes=data.num_classes), datamodule=data, verbose=False)
    assert {f"val/ap_{name}" for name in data.size_ranges} <= found.keys()
    assert found["val/loss"] > 0


# Other people's batches.


def test_batches_of_torchvisions_references_and_dictionaries():
    module = small().eval()
    images, about = collate(samples())
    bare = [{"boxes": each["boxes"], "labels": each["labels"]} for each in about]
    forms = [
        (images, about),
        (images, bare),
        (tuple(images), tuple(bare)),  # torchvision's references
        [list(images), bare],
        {"pixel_values": images, "targets": bare},
        {"image": images, "target": [{**each, "image_id": torch.tensor([i])} for i, each in enumerate(bare)]},
    ]
    found = [module.training_step(form, 0) for form in forms]
    assert all(torch.equal(each, found[0]) for each in found)
    detections = module.detect(images)
    for form in forms:
        module.on_validation_epoch_start()
        module.validation_step(form, 0)
        assert module.val_losses.compute().box > 0
        assert same_detections(module.predict_step(form, 0), detections)
    assert same_detections(module.predict_step(images, 0), detections)


@pytest.mark.parametrize("step", ["training_step", "validation_step"])
@pytest.mark.parametrize(("label", "number"), [(3, 3), (-1, -1), (90, 90)])
def test_labels_out_of_range_are_named_with_their_sample(step, label, number):
    module = small()
    module.on_validation_epoch_start()
    images, about = collate(samples())
    about[3]["labels"] = torch.tensor([1, 2, label, 0, 0, 0])
    about[3]["image_id"] = 4711
    message = f"label {number} of sample 4711 is out of range: num_classes is 3, labels run from 0"
    with pytest.raises(ValueError, match=message):
        getattr(module, step)((images, about), 5)
    del about[3]["image_id"]
    with pytest.raises(ValueError, match=f"label {number} of sample 3 is out of range"):
        getattr(module, step)((images, about), 5)


def test_batches_without_targets_are_refused():
    with pytest.raises(ValueError, match=r"expected \(images, targets\), a dict of boxes and labels for each image"):
        small().training_step(pictures(2), 0)


def test_boxes_that_are_none_stop_no_training():
    bad = [[0.0, 0, 0, 0], [30, 30, 10, 10], [math.nan] * 4, [0, 0, math.inf, 9], [-50, -50, -9, -9], [5, 5, 40, 40]]
    images = pictures(2)
    about = [{"boxes": torch.tensor(bad), "labels": torch.zeros(6, dtype=torch.int64)}] * 2
    for head in HEADS:
        module = small(head=head, lr=0.01)
        fit(module, DataLoader([*zip(images, about, strict=True)], 2, collate_fn=collate))
        assert all(value.isfinite().all() for value in module.state_dict().values())


# Several processes.


class Gradients(FPNDetector):
    """Writes down the gradients of a step, on each rank."""

    def on_before_optimizer_step(self, optimizer) -> None:
        gradients = {name: parameter.grad for name, parameter in self.named_parameters()}
        torch.save(gradients, f"gradients_{self.trainer.world_size}_{self.global_rank}.pt")


@pytest.mark.parametrize(
    ("head", "normalizer", "counts"),
    [
        ("fcos", "batch", (6, 1, 5, 0)),
        ("atss", "batch", (4, 0, 3, 0)),  # one rank has no object at all
        ("retinanet", "image", (6, 1, 5, 0)),
    ],
)
def test_two_processes_with_unequal_objects_learn_as_one_with_all_of_them(head, normalizer, counts):
    options = {"max_steps": 1, "limit_val_batches": 0}
    for processes in (2, 1):
        torch.manual_seed(0)
        module = Gradients(**SMALL, head=head, normalizer=normalizer, freeze_norm=True)
        several = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": True} if processes == 2 else {}
        data = loader(counts, batch_size=4 // processes)  # ranks take every other image
        Trainer(**QUIET | options | several).fit(module, data)
    expected = torch.load("gradients_1_0.pt")
    for rank in range(2):
        found = torch.load(f"gradients_2_{rank}.pt")
        for name, value in expected.items():
            if value is not None:
                torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


# Checkpoints.


@pytest.mark.parametrize("head", HEADS)
def test_checkpoints_are_plain_data_and_come_back(tmp_path, head):
    module = small(head=head, levels=(3, 6), milestones=[8, 11], image_size=(64, 96))
    trainer = fit(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert "weights" not in saved["hyper_parameters"]
    again = FPNDetector.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True).eval()
    assert torch.equal(again(pictures(2)).logits, module.eval()(pictures(2)).logits)
    assert dict(again.hparams) == dict(module.hparams)
    assert list(saved["state_dict"]) == list(module.state_dict())


def test_a_run_that_is_continued_ends_like_one_that_never_stopped(tmp_path):
    whole = small(lr=1e-3)
    fit(whole, max_epochs=2)
    first = fit(small(lr=1e-3), max_epochs=2, limit_train_batches=2, callbacks=[StopsAfterAnEpoch()])
    first.save_checkpoint(tmp_path / "half.ckpt")
    rest = small(lr=1e-3)
    fit(rest, max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert all(torch.equal(value, rest.state_dict()[name]) for name, value in whole.state_dict().items())


class StopsAfterAnEpoch(Callback):
    def on_train_epoch_end(self, trainer, pl_module) -> None:
        trainer.should_stop = True


# Cost, pictures, and learning.


def test_what_it_costs_is_counted_at_its_image_size():
    costs = [count(on_meta(image_size=size), (3, size, size)) for size in (64, 128)]
    module = on_meta(image_size=(64, 128))
    assert module.input_shape == (3, 64, 128)
    assert costs[0].macs < count(module, module.input_shape).macs < costs[1].macs
    assert costs[0].parameters == sum(parameter.numel() for parameter in small().parameters())
    narrow, wide = (count(on_meta(head_depth=depth), (3, 64, 64)).macs for depth in (1, 2))
    cells = 64 + 16 + 4 + 1 + 1
    assert wide - narrow == 2 * 9 * 16 * 16 * cells  # one more convolution in each tower


def test_pictures_show_detections_and_what_is_there():
    module = small(score_threshold=0.0).eval()
    images, about = collate(samples((2, 0)))
    drawn = module.pictures((images, about))
    assert set(drawn) == {"detections"}
    assert drawn["detections"].shape[:2] == (2, 3)
    alone = module.pictures(images)["detections"]
    differs = (drawn["detections"] != alone).flatten(1).any(1)
    assert differs.tolist() == [True, False]  # only the first image has objects


class TrainsOnWhatItValidates(ShapesDetectionDataModule):
    def raw_samples(self, split):
        return super().raw_samples("train")


@pytest.mark.parametrize("head", ["fcos", *(pytest.param(head, marks=pytest.mark.slow) for head in HEADS[1:])])
def test_it_learns_eight_images_by_heart(head):
    data = TrainsOnWhatItValidates(
        preset="easy", image_size=64, train_size=8, val_size=8, test_size=8, batch_size=8, num_workers=0
    )
    options = {"optimizer": "adamw", "lr": 3e-3, "warmup_epochs": 5.0, "levels": (3, 5), "channels": 32}
    module = small(head=head, num_classes=data.num_classes, **options)
    trainer = Trainer(**QUIET, max_epochs=150, check_val_every_n_epoch=150, gradient_clip_val=10.0)
    trainer.fit(module, datamodule=data)
    assert trainer.callback_metrics["val/ap50"] > 0.95
    assert trainer.callback_metrics["val/loss"] < 1


@pytest.mark.parametrize("size", [(1, 1), (20, 30), (32, 32), (7, 64)])
def test_what_has_no_area_in_the_image_is_not_detected(size):
    """Boxes anywhere about an image and its padding; those beside the image would end as lines at its edge."""
    torch.manual_seed(0)
    low = torch.rand(4000, 2) * 200 - 60
    boxes = torch.cat([low, low + torch.rand(4000, 2) * 40], 1)
    boxes[:50, 2:] = boxes[:50, :2]  # points
    scores, labels = torch.rand(4000), torch.randint(0, 3, (4000,))
    found = non_maximum_suppression(boxes, scores, labels, size, 0.05, 1.0, 4000)
    meets = (boxes[:, 2:].minimum(torch.tensor(size[::-1])) > boxes[:, :2].clamp(min=0)).all(1)
    assert len(found["boxes"]) == (meets & (scores > 0.05)).sum() > 0
    assert (found["boxes"][:, 2:] > found["boxes"][:, :2]).all()


@pytest.mark.parametrize("objects", [90, 150, 300])
@pytest.mark.parametrize("most", [50, 100, 300])
def test_average_precision_counts_as_many_as_may_be_detected(objects, most):
    """So many objects of a class in an image, and as many right detections as the detector may give."""
    module = FPNDetector("test_resnet", num_classes=1, channels=16, head_depth=1, max_detections=most)
    metric = module._new_metric()
    low = torch.arange(objects)[:, None] * torch.tensor([[20.0, 0.0]])
    boxes, labels = torch.cat([low, low + 10], 1), torch.zeros(objects, dtype=torch.int64)
    given = min(objects, most)
    detections = {"boxes": boxes[:given], "scores": torch.linspace(1, 0.5, given), "labels": labels[:given]}
    metric.update([detections], [{"boxes": boxes, "labels": labels}])
    found = metric.compute()
    assert found["ap"] == pytest.approx(len([r for r in range(101) if r / 100 <= given / objects]) / 101, abs=1e-9)
    assert found["ar100"] == pytest.approx(min(given, 100) / objects)
