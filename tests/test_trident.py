"""TridentNet: its branches against plain dilated convolutions, on timm's networks, and as a detector that learns."""

import copy
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from test_fpn_detector import pictures
from torch import Tensor, nn
from torchvision.models import resnet50

from zoo import FPNDetector
from zoo.common.cost import Blueprint
from zoo.detection import pad_targets
from zoo.detection.maps import Maps, create_pyramid_backbone
from zoo.detection.scale.stage import dilate
from zoo.detection.scale.trident import RANGES, SWAPPED, Branches, TridentConv2d, branch_out, original_scales

SMALL = {"backbone": "test_byobnet", "num_classes": 3, "channels": 16, "head_depth": 1, "image_size": 64}
FITTING = [(0, 16), (8, 32), (24, None)]
"""Valid ranges for objects of images of 64 pixels."""


def small(**options: Any) -> FPNDetector:
    torch.manual_seed(0)
    return FPNDetector(**SMALL | {"trident": True, "valid_ranges": FITTING, "neck": "single"} | options)


def random_norms(network: nn.Module) -> nn.Module:
    """Gives BatchNorms statistics and weights as after training; timm begins with zeros behind each unit."""
    torch.manual_seed(1)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            for each in (part.weight, part.running_var):
                nn.init.uniform_(each, 0.5, 1.5)
            for each in (part.bias, part.running_mean):
                nn.init.uniform_(each, -0.5, 0.5)
    return network


def branched(network: nn.Module, dilations=(1, 2, 3), branch: int | None = None) -> nn.Module:
    branch_out(Branches(network, dilations, RANGES, {"branch": branch}))
    return network


def narrow(**options: Any) -> Any:
    """A ResNet-50 with few channels."""
    return random_norms(timm.create_model("resnet50d", channels=(8, 8, 16, 16), stem_width=8, num_classes=0, **options))


# Parity.


class Three(nn.Module):
    """Plain convolutions of dilations 1, 2 and 3 on the three parts of a batch."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = x.chunk(3)
        return torch.cat(
            [
                F.conv2d(first, self.weight, padding=1),
                F.conv2d(second, self.weight, padding=2, dilation=2),
                F.conv2d(third, self.weight, padding=3, dilation=3),
            ]
        )


@pytest.fixture(scope="module")
def stages() -> tuple[nn.Module, nn.Module, Tensor]:
    """A ResNet-50's third stage, timm's with branches and torchvision's, of the same weights, and what enters it."""
    network = random_norms(timm.create_model("resnet50", num_classes=0))
    theirs = resnet50(weights=None).layer3
    theirs.load_state_dict(network.layer3.state_dict())
    keys = list(network.state_dict())
    branched(network)
    assert list(network.state_dict()) == keys
    x = torch.randn(2, 512, 16, 18, generator=torch.Generator().manual_seed(0))
    return network.eval(), theirs.eval(), x


@torch.no_grad()
def test_three_branches_of_a_resnet_50_are_convolutions_of_dilation_1_2_and_3(stages):
    network, theirs, x = stages
    found = network.layer3(x)
    assert [isinstance(unit.conv2, TridentConv2d) for unit in network.layer3] == [False, True, True, True, True, True]
    reference = copy.deepcopy(theirs)
    for unit in reference[1:]:
        unit.conv2 = Three(unit.conv2.weight)
    assert torch.equal(found, reference(torch.cat([x, x, x])))
    for branch, dilation in zip(found.chunk(3), (1, 2, 3), strict=True):
        for unit in theirs[1:]:
            unit.conv2.dilation = unit.conv2.padding = (dilation, dilation)
        expected = theirs(x)
        torch.testing.assert_close(branch, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
    assert not torch.equal(found[:2], found[2:4])


@torch.no_grad()
@pytest.mark.parametrize("branch", [0, 1, 2])
def test_a_branch_alone_is_the_network_with_its_dilation(stages, branch):
    network, theirs, x = stages
    every = network.layer3(x).chunk(3)[branch]
    alone = copy.deepcopy(network)
    alone.layer3[0].trident.options["branch"] = branch
    for unit in theirs[1:]:
        unit.conv2.dilation = unit.conv2.padding = (branch + 1, branch + 1)
    found = alone.layer3(x)
    assert torch.equal(found, theirs(x))  # of dilation 1: the network without branches
    torch.testing.assert_close(found, every, rtol=1e-6, atol=1e-6 * every.abs().max().item())


# Networks of timm.

SWAPS = {
    "resnet10t": 1,
    "resnet18d": 3,
    "resnet50": 5,
    "resnetblur50": 6,  # the first unit's stride is a pooling
    "mobilenetv3_small_100": 2,
    "convnext_atto": 6,
    "regnety_002": 3,
    "efficientnet_lite0": 3,
    "resnetv2_50x1_bit": 5,  # StdConv2d
    "test_nfnet": 1,  # ScaledStdConv2d
    "test_byobnet": 1,
    "test_convnext": 4,
    "test_convnext2": 1,
    "test_convnext3": 1,
    "test_mambaout": 3,
    "vgg11_bn": 2,
    "densenet121": 24,
    "res2next50": 15,
    "hgnetv2_b0": 6,
    "pvt_v2_b0": 2,  # attention, and convolutions of depth in its multilayer perceptrons
}
"""Small networks by how many convolutions have branches."""
MORE = {
    "csatv2": 6,
    "cs3darknet_focus_s": 4,
    "cspnext_tiny": 2,
    "davit_tiny": 12,
    "dla46x_c": 3,
    "dpn48b": 1,
    "edgenext_xx_small": 7,
    "efficientformerv2_s0": 8,
    "efficientvim_m1": 6,
    "efficientvit_b0": 4,
    "efficientvit_m0": 6,
    "fasternet_t0": 8,
    "fastvit_t8": 8,
    "focalnet_tiny_srf": 12,
    "gcvit_xxtiny": 2,
    "ghostnet_050": 2,
    "hardcorenas_b": 4,
    "iformer_t": 10,
    "inception_next_atto": 6,
    "lcnetv2_small": 6,
    "legacy_seresnet18": 3,
    "lowformer_b0": 3,
    "mobilevit_xxs": 2,
    "nest_tiny": 1,
    "nextvit_small": 10,
    "rdnet_tiny": 3,
    "regnetx_002": 3,
    "repghostnet_050": 2,
    "repvit_m1": 15,
    "resnest14d": 1,
    "resnetv2_18": 3,
    "rexnet_100": 1,
    "shvit_s1": 2,
    "skresnet18": 3,
    "starnet_s050": 6,
    "swiftformer_xs": 6,
    "tiny_vit_5m_224": 6,
    "tresnet_m": 11,
    "ese_vovnet19b_slim_dw": 3,
    "xception41p": 1,
}
REFUSED = {
    "test_resnet": "ResNet has nothing to dilate in its stage of stride 16, whose convolutions are 1x1 of stride 1",
    "test_efficientnet": "EfficientNet has nothing to dilate in its stage of stride 16, whose convolutions are",
    "test_maxvit": "MaxxVit has nothing to dilate in its stage of stride 16, whose convolutions are",
    "test_vit": "VisionTransformer has nothing to dilate in its stage of stride 16, whose convolutions are none",
    "inception_v4": "InceptionV4 has nothing to dilate in its stage of stride 16, whose convolutions are .*1x7",
    "swin_tiny_patch4_window7_224": "SwinTransformer has nothing to dilate in its stage of stride 16",
    "legacy_xception": "Xception does not say which of its modules gives its map of stride 16: expected a network of",
}
"""By name what is said of networks without such convolutions, or without such a stage."""


def on_meta(name: str, levels: tuple[int, int] = (3, 5)) -> tuple[Any, Maps]:
    with torch.device("meta"), Blueprint():
        backbone = create_pyramid_backbone(name, 3, 64)
        return backbone, Maps(backbone, levels)


@torch.no_grad()
@pytest.mark.parametrize("name", [*SWAPS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_branches_on_networks_of_timm(name):
    backbone, maps = on_meta(name, (4, 4))
    keys, parameters = list(backbone.state_dict()), sum(each.numel() for each in backbone.parameters())
    branched(backbone.eval())
    swapped = [part for part in backbone.modules() if isinstance(part, TridentConv2d)]
    assert len(swapped) == (SWAPS | MORE)[name]
    assert list(backbone.state_dict()) == keys
    assert sum(each.numel() for each in backbone.parameters()) == parameters
    with torch.device("meta"), Blueprint():
        (found,) = maps(backbone, torch.zeros(2, 3, 64, 64))
        backbone.apply(lambda part: None)
        swapped[0].trident.options["branch"] = 1
        (alone,) = maps(backbone, torch.zeros(2, 3, 64, 64))
    assert found.shape == (6, *alone.shape[1:])
    assert alone.shape[0] == 2


@pytest.mark.parametrize("name", REFUSED)
def test_networks_with_nothing_to_swap_are_refused_by_name(name):
    backbone, _ = on_meta(name, (4, 4))
    for change in (branched, partial(dilate, dilation=2)):
        with pytest.raises(ValueError, match=f"^{REFUSED[name]}"):
            change(backbone)


EXACT = (
    "test_byobnet",
    "test_convnext",
    "test_nfnet",
    "test_mambaout",
    "resnetv2_18",
    "tf_mobilenetv3_small_minimal_100",
)


@torch.no_grad()
@pytest.mark.parametrize("name", EXACT)
def test_slices_of_branches_are_branches_alone_and_stages_dilated(name):
    """Of networks with convolutions of every class. The first is the network as it was."""
    torch.manual_seed(0)
    plain = random_norms(timm.create_model(name, num_classes=0)).double().eval()
    for each in plain.parameters():
        if each.abs().max() < 1e-3:  # the last factor of a unit, which would hide all differences
            nn.init.uniform_(each, 0.5, 1.5)
    maps, images = Maps(plain, (4, 4)), pictures(2).double()
    network = branched(copy.deepcopy(plain))
    branches = maps(network, images)[0].chunk(3)
    torch.testing.assert_close(branches[0], maps(plain, images)[0], rtol=1e-9, atol=1e-9)
    for branch, found in enumerate(branches):
        alone, dilated = copy.deepcopy(network), copy.deepcopy(plain)
        next(part for part in alone.modules() if isinstance(part, TridentConv2d)).trident.options["branch"] = branch
        torch.testing.assert_close(maps(alone, images)[0], found, rtol=1e-9, atol=1e-9)
        dilate(dilated, branch + 1)
        torch.testing.assert_close(maps(dilated, images)[0], found, rtol=1e-9, atol=1e-9)
    assert (branches[0] - branches[1]).abs().max() > 1e-3


class Staged(nn.Module):
    """Somebody else's backbone, which says what timm's networks say; without convolutions of stride 1 but one."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 8, stride=8)
        self.stage = nn.Sequential(nn.Conv2d(4, 4, 2, stride=2), nn.ReLU(), conv)
        self.feature_info = [{"num_chs": 4, "reduction": 2**n, "module": m} for n, m in ((3, "stem"), (4, "stage"))]

    def forward_intermediates(self, images: Tensor, indices: list[int], **options: Any) -> list[Tensor]:
        finer = self.stem(images)
        coarser = self.stage(finer)
        return [(finer, coarser)[index] for index in indices]


@torch.no_grad()
@pytest.mark.parametrize("kind", SWAPPED)
@pytest.mark.parametrize("groups", [1, 4])
def test_every_class_of_convolutions_gives_what_it_gave_with_other_dilations(kind, groups):
    torch.manual_seed(0)
    conv = kind(4, 4, 5, padding=2, groups=groups, bias=True)
    backbone = Staged(conv).eval()
    x = torch.randn(2, 4, 24, 20)
    expected = []
    for dilation in (1, 2, 4):
        dilated = copy.deepcopy(backbone)
        dilate(dilated, dilation)
        expected.append(dilated.stage(x))
    found = branched(backbone, (1, 2, 4)).stage(x)
    assert type(conv) is SWAPPED[kind]
    assert isinstance(conv, TridentConv2d)
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-6)


def test_a_convolution_of_another_class_is_refused():
    class Own(nn.Conv2d):
        pass

    with pytest.raises(
        ValueError, match="^Staged has a Own in its stage of stride 16, which cannot have branches: only "
    ):
        branched(Staged(Own(4, 4, 3, padding=1)))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 2, "padding": 1},
        {"kernel_size": (3, 5), "padding": (1, 2)},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": 3, "padding": 0},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    ],
)
def test_convolutions_that_dilations_do_not_fit(options):
    with pytest.raises(ValueError, match=r"Staged has nothing to dilate .* convolutions are .*2x2 of stride 2"):
        branched(Staged(nn.Conv2d(4, 4, **options)))


# Arguments.


def test_defaults_are_the_papers():
    module = small(valid_ranges=None)
    assert module.trident.dilations == (1, 2, 3)
    assert module.trident.ranges == ((0, 90), (30, 160), (90, None))
    assert FPNDetector(**SMALL).trident is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dilations": [0, 2]}, r"dilations are \[0, 2\]: expected whole numbers of at least 1"),
        ({"dilations": [1, 2.5]}, r"dilations are \[1, 2.5\]: expected whole numbers of at least 1"),
        ({"dilations": [-1, 2, 3]}, r"dilations are \[-1, 2, 3\]: expected whole numbers of at least 1"),
        ({"dilations": [2]}, r"dilations are \[2\]: expected one for each of two or more branches"),
        ({"dilations": []}, r"dilations are \[\]: expected one for each of two or more branches"),
        (
            {"dilations": [1, 2], "valid_ranges": None},
            "valid_ranges are missing: the paper's are of 3 branches, and here",
        ),
        ({"dilations": [1, 2]}, "valid_ranges are 3 for branch 0, branch 1: expected one for each"),
        ({"valid_ranges": [(0, 16), (24, 32), (30, None)]}, "leave objects of 16 to 24 pixels to nobody"),
        ({"valid_ranges": [(0, 16), (8, 32), (24, 60)]}, "leave objects from 60 pixels on to nobody"),
        ({"valid_ranges": [(0, 16), (32, 8), (24, None)]}, r"valid range \[32, 8\] of branch 1: expected"),
        ({"scale_aware": False}, "valid_ranges are of no use without scale_aware, where all branches are of all sizes"),
        ({"branch": 3}, "branch is 3: expected 0 to 2, or null for all branches"),
        ({"branch": -1}, "branch is -1: expected 0 to 2, or null for all branches"),
        ({"levels": (2, 3), "neck": "fpn"}, "levels end at 3: dilations are of the stage that gives level 4"),
        ({"backbone": "test_resnet"}, "ResNet has nothing to dilate in its stage of stride 16"),
        ({"backbone": "test_vit"}, "VisionTransformer has nothing to dilate in its stage of stride 16"),
        ({"trident": False}, r"valid_ranges is \[.*\]: without trident there are no branches"),
        ({"trident": False, "valid_ranges": None, "branch": 1}, "branch is 1: without trident there are no branches"),
        ({"trident": False, "valid_ranges": None, "scale_aware": False}, "scale_aware is False: without trident there"),
        ({"trident": False, "valid_ranges": None, "dilations": [1, 2]}, "without trident a stage has one, such as"),
        ({"trident": False, "valid_ranges": None, "dilations": []}, "without trident a stage has one, such as"),
    ],
)
def test_arguments_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_a_stage_that_gets_several_maps_is_refused_by_the_backbones_name():
    module = small(backbone="selecsls42")
    with pytest.raises(ValueError, match="^SelecSls hands its stage of stride 16 several maps at once: it cannot have"):
        module(pictures(1))


def test_maps_that_are_not_of_the_branches_are_refused():
    branches = Branches(nn.Identity(), (1, 2, 3), None, {"branch": None})
    maps = [torch.zeros(2, 1, 4, 4), torch.zeros(6, 1, 2, 2), torch.zeros(6, 1, 1, 1)]
    assert [len(each) for each in branches.repeated(maps, (3, 4, 5), 2)] == [6, 6, 6]
    with pytest.raises(ValueError, match="^Identity gives 2 maps of stride 16 for 2 images in 3 branches: it does not"):
        branches.repeated([maps[0], maps[0], maps[2]], (3, 4, 5), 2)


# Which object trains which branch.


def squares(*sides: float) -> Tensor:
    return torch.tensor([[10.0, 10.0, 10.0 + side, 10.0 + side] for side in sides]).reshape(-1, 4)


def trained(sides: tuple[float, ...], ranges: Any = RANGES, **about: Any) -> list[list[float]]:
    """The sides of the objects, of an image with one of each, that each branch learns."""
    target = {"boxes": squares(*sides), "labels": torch.zeros(len(sides), dtype=torch.int64), **about}
    branches = Branches(nn.Identity(), (1, 2, 3), ranges, {"branch": None})
    scales = original_scales([target], (200, 200), "cpu")
    found = branches.targets(pad_targets([target]), scales, (0, 1, 2))
    assert found.boxes.shape[0] == 3
    if ranges is not None:
        assert found.unwanted is not None
        objects = pad_targets([target]).valid.expand(3, -1)
        assert torch.equal(found.valid ^ found.unwanted, objects)  # each object is one or the other
    return [[side for side, valid in zip(sides, row, strict=False) if valid] for row in found.valid.tolist()]


def test_which_object_trains_which_branch_of_the_papers():
    """Ranges 0 to 90, 30 to 160 and from 90 on, ends included: two branches learn 30 to 90, and 90 to 160."""
    assert trained((5, 29.9, 30, 60, 90, 90.1, 120, 160, 160.1, 190)) == [
        [5, 29.9, 30, 60, 90],
        [30, 60, 90, 90.1, 120, 160],
        [90, 90.1, 120, 160, 160.1, 190],
    ]
    assert trained((5, 60, 190), None) == [[5, 60, 190]] * 3


@pytest.mark.parametrize("kind", [tuple, torch.tensor])
def test_sizes_are_those_in_the_original_image(kind):
    """An object of 40 pixels in an image that was twice and three times as large: of 98 pixels in area."""
    about = {"size": kind((100, 50)), "orig_size": kind((200, 150))}
    assert trained((10, 36, 40), **about) == [[10, 36], [36, 40], [40]]
    assert trained((45,), orig_size=kind((400, 400))) == [[45], [45], [45]]  # without a size: of the images given
