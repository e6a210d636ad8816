"""StageBoxHead: the last stage of a backbone as the box head of a detector on one map."""

import copy

import pytest
import torch
from test_families import FAMILIES, STATED
from torch import nn

from zoo import FasterRCNN
from zoo.common.cost import Blueprint, count
from zoo.detection.maps import Maps, create_pyramid_backbone
from zoo.detection.two_stage.stage import StageBoxHead, last_stage

# Families of timm in which one module makes the map of stride 32 out of that of stride 16.
WITH_STAGE = {
    *("convnext", "cpubone", "csatv2", "cspnet", "cspnext", "davit", "dla", "edgenext", "efficientformer_v2"),
    *("efficientnet", "efficientvit_mit", "efficientvit_msra", "fasternet", "fastvit", "focalnet", "gcvit", "hgnet"),
    *("iformer", "inception_next", "lcnetv2", "lowformer", "maxxvit", "metaformer", "mobilenetv5", "nextvit", "pvt_v2"),
    *("rdnet", "regnet", "repvit", "res2net", "resnest", "resnet", "resnetv2", "senet", "shvit", "sknet", "starnet"),
    *("swiftformer", "swin_transformer_v2_cr", "tiny_vit", "tresnet", "vovnet"),
}
BEYOND = ("csatv2", "efficientvit_msra", "shvit")  # they have a map of stride 64, too
REFUSED = r"has no stage for box_head 'stage': expected one module .* as in resnet50; or take box_head 'mlp'$"


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    ["test_resnet", "test_convnext", "test_efficientnet", "dla46x_c", "regnetx_002", "starnet_s050"],
)
def test_the_stage_makes_the_backbones_last_map_and_leaves_it(name):
    torch.manual_seed(0)
    backbone = create_pyramid_backbone(name, 3, 96).eval()
    images = torch.randn(2, 3, 96, 96)
    fine, coarse = Maps(whole := copy.deepcopy(backbone), (4, 5))(whole, images)
    place, stage, channels = last_stage(backbone)
    before = set(backbone.state_dict())
    maps = Maps(backbone, (4, 4))
    assert torch.equal(maps(backbone, images)[0], fine)
    assert torch.equal(stage(fine), coarse)
    assert channels == coarse.shape[1]
    # It has left: the backbone's own tensors, the stage's and those behind it are apart, and all there were.
    assert stage not in set(backbone.modules())
    assert {f"{place}.{key}" for key in stage.state_dict()} <= maps.pruned
    assert maps.pruned | set(backbone.state_dict()) == before


@torch.no_grad()
def test_features_are_the_mean_of_what_the_stage_makes_of_each_region():
    torch.manual_seed(0)
    backbone = create_pyramid_backbone("test_resnet", 3, 64).eval()
    head = StageBoxHead(*last_stage(backbone))
    stage, channels = backbone.layer4, head.out_channels
    assert head.stage is stage
    regions = torch.randn(3, backbone.feature_info[3]["num_chs"], head.pool_size, head.pool_size)
    found = head(regions)
    assert found.shape == (3, channels) == (3, head.out_channels)
    for region, features in zip(regions, found, strict=True):
        torch.testing.assert_close(features, stage(region[None])[0].flatten(1).mean(1))
    assert set(head.state_dict()) == {f"stage.{key}" for key in backbone.layer4.state_dict()}


def test_finding_the_stage_changes_nothing_of_it():
    """It is tried out, and BatchNorm in training counts what it sees."""
    backbone = create_pyramid_backbone("test_resnet", 3, 64).train()
    before = copy.deepcopy(backbone.state_dict())
    _, stage, _ = last_stage(backbone)
    assert stage is backbone.layer4
    assert stage.training
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize("name", ["test_vit", "vgg11", "mobilenetv3_small_050", "swin_tiny_patch4_window7_224"])
def test_a_backbone_without_such_a_stage_is_refused_by_name(name):
    with torch.device("meta"), Blueprint():
        backbone = create_pyramid_backbone(name, 3, 224)
    with pytest.raises(ValueError, match=f"^{type(backbone).__name__} {REFUSED}"):
        last_stage(backbone)


def test_a_backbone_of_ones_own_is_refused_by_name():
    with pytest.raises(ValueError, match=f"^Sequential {REFUSED}"):
        last_stage(nn.Sequential(nn.Conv2d(3, 8, 3)))


@pytest.mark.slow
@pytest.mark.skipif(not STATED, reason="what families there are, and of which modules, is of the newest timm")
def test_every_family_of_timm_has_such_a_stage_or_is_refused():
    for family, name in FAMILIES.items():
        with torch.device("meta"), Blueprint():
            backbone = create_pyramid_backbone(name, 3, 224)
        if family in WITH_STAGE:
            assert last_stage(backbone)[2] == backbone.feature_info[-1]["num_chs"] or family in BEYOND, family
        else:
            with pytest.raises(ValueError, match=f"^{type(backbone).__name__} {REFUSED}"):
                last_stage(backbone)


# In a detector.

ON_ONE_MAP = {
    "backbone": "test_resnet",
    "num_classes": 3,
    "neck": "none",
    "box_head": "stage",
    "channels": 16,
    "image_size": 64,
    "pre_nms_top_k": (100, 60),
    "post_nms_top_k": (50, 20),
    "region_samples": 16,
}


def detector(**options) -> FasterRCNN:
    torch.manual_seed(0)
    return FasterRCNN(**ON_ONE_MAP | options)


def test_both_stages_read_the_backbones_map_and_everything_learns():
    module = detector(class_agnostic=True)
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    maps = module(images)
    assert [tuple(each.shape) for each in maps.features] == [(2, 192, 4, 6)]
    assert torch.equal(maps.features[0], module.maps(module.backbone, images)[0])
    assert maps.objectness.shape == (2, 15 * 4 * 6)  # five sizes, three ratios
    losses = module.loss(maps, module.random_targets(images, torch.Generator().manual_seed(2)))
    torch.stack(list(losses.values())).sum().backward()
    assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []
    assert module.box_out.out_features == 4
    whole = detector(box_head="mlp", neck="fpn", levels=(2, 5)).backbone.state_dict()
    split = {*module.backbone.state_dict(), *(f"layer4.{name}" for name in module.box_head.stage.state_dict())}
    assert split == set(whole)


def test_batch_norm_of_the_stage_is_frozen_with_the_backbones():
    module = detector(freeze_norm=True, norm_eps=1e-3).train()
    norms = [each for each in module.modules() if isinstance(each, nn.BatchNorm2d)]
    assert any(each in norms for each in module.box_head.modules())
    assert {each.eps for each in norms} == {1e-3}
    assert not any(each.training or each.weight.requires_grad for each in norms)
    before = {name: value.clone() for name, value in module.state_dict().items() if "running" in name}
    images = torch.randn(2, 3, 64, 96)
    module.loss(module(images), module.random_targets(images, torch.Generator().manual_seed(2)))
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())
    learns = detector().train()
    assert all(each.training for each in learns.modules() if isinstance(each, nn.BatchNorm2d))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"neck": "fpn"},
            r"box_head 'stage' .* neck is 'fpn', levels are \[2, 6\]: take neck='none' and levels",
        ),
        (
            {"levels": (3, 3)},
            r"neck is 'none', levels are \[3, 3\]: take neck='none' and levels \[4, 4\], or box",
        ),
        ({"levels": (3, 4), "box_head": "mlp"}, r"levels are \[3, 4\]: expected one level, such as \[4, 4\]"),
        ({"backbone": "test_vit"}, "VisionTransformer has no stage for box_head 'stage'"),
        ({"neck": "bifpn"}, "unknown neck 'bifpn': expected one of fpn, single, none"),
        ({"box_head": "c5"}, "unknown box_head 'c5': expected one of mlp, conv, stage"),
    ],
)
def test_what_does_not_go_together_is_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        detector(**options)
    assert "\n" not in str(error.value)


def test_its_cost_counts_the_stage_for_each_region():
    def macs(**options) -> int:
        with torch.device("meta"), Blueprint():
            module = detector(**options)
        return count(module.eval(), module.input_shape).macs

    few, many = (macs(post_nms_top_k=(50, regions)) for regions in (10, 30))
    _, stage, channels = last_stage(create_pyramid_backbone("test_resnet", 3, 64))
    stage.input_shape = (192, 14, 14)
    of_a_region = count(stage.eval(), stage.input_shape).macs + channels * (4 + 4 * 3)
    assert many - few == 20 * of_a_region
