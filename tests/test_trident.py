"""TridentNet: its branches against plain dilated convolutions, on timm's networks, and as a detector that learns."""

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from test_detection_parts import NeverWaits
from test_fpn_detector import (
    QUIET,
    Gradients,
    TrainsOnWhatItValidates,
    fit,
    loader,
    pictures,
    same_detections,
    targets,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import ops
from torchvision.models import resnet50

from zoo import FasterRCNN, FPNDetector
from zoo._lightning import Trainer
from zoo.cli.continuing import differences
from zoo.common.cost import Blueprint, count
from zoo.detection import pad_targets
from zoo.detection.maps import Maps, create_pyramid_backbone
from zoo.detection.postprocessing import Candidates, in_range
from zoo.detection.scale.ranges import within
from zoo.detection.scale.stage import dilate
from zoo.detection.scale.trident import RANGES, SWAPPED, Branches, TridentConv2d, branch_out, original_scales
from zoo.detection.two_stage import detector, proposals
from zoo.serving.loading import restored

SMALL = {"backbone": "test_byobnet", "num_classes": 3, "channels": 16, "head_depth": 1, "image_size": 64}
FITTING = [(0, 16), (8, 32), (24, None)]
"""Valid ranges for objects of images of 64 pixels."""


def small(**options: Any) -> FPNDetector:
    torch.manual_seed(0)
    module = FPNDetector(**SMALL | {"trident": True, "valid_ranges": FITTING, "neck": "single"} | options)
    random_norms(module.backbone)
    with torch.no_grad():
        module.head.box_out.weight.mul_(30)  # boxes of many sizes
        module.head.cls_out.weight.mul_(30)
    return module


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


def narrow() -> Any:
    """A ResNet of bottlenecks with few channels and units."""
    options = {"channels": (8, 8, 16, 16), "stem_width": 8, "layers": (1, 1, 2, 1), "num_classes": 0}
    return random_norms(timm.create_model("resnet26d", **options))


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
}
"""Small networks by how many convolutions have branches."""
MORE = {
    "densenet121": 24,
    "res2next50": 15,
    "hgnetv2_b0": 6,
    "pvt_v2_b0": 2,  # attention, and convolutions of depth in its multilayer perceptrons
    "cs3darknet_focus_s": 4,
    "cspnext_tiny": 2,
    "davit_tiny": 12,
    "dla46x_c": 3,
    "dpn48b": 1,
    "edgenext_xx_small": 7,
    "efficientvim_m1": 6,
    "efficientvit_b0": 4,
    "efficientvit_m0": 6,
    "fasternet_t0": 8,
    "fastvit_t8": 8,
    "ghostnet_050": 2,
    "hardcorenas_b": 4,
    "iformer_t": 10,
    "inception_next_atto": 6,
    "lcnetv2_small": 6,
    "legacy_seresnet18": 3,
    "lowformer_b0": 3,
    "mobilevit_xxs": 2,
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
        (
            {"valid_ranges": [(0, 16), (24, 32), (30, None)]},
            "leave objects of 16 to 24 pixels to none of branch 0, branch 1",
        ),
        (
            {"valid_ranges": [(0, 16), (8, 32), (24, 60)]},
            "leave objects from 60 pixels on to none of branch 0, branch 1",
        ),
        ({"valid_ranges": [(0, 16), (32, 8), (24, None)]}, r"the valid range of branch 1 is \[32, 8\]: expected"),
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
    # The scale goes first: sizes do not tell what was cropped. Of half of 60 pixels, and of a quarter of 160.
    assert trained((30, 40), scale=0.5, **about) == [[30, 40], [30, 40], []]
    assert trained((30, 40), scale=torch.tensor(0.25), **about) == [[], [30, 40], [30, 40]]


@pytest.mark.parametrize("head", ["fcos", "atss", "retinanet"])
def test_losses_are_of_all_branches_each_with_its_own_objects(head):
    """The sums of a batch are those of three detectors, each with one dilation, that know which objects are theirs."""
    module = small(head=head, levels=(3, 5), neck="fpn").eval()
    images, about = pictures(4), targets()
    about[3] |= {"size": (64, 64), "orig_size": (128, 64)}
    found = module.loss_sums(module(images), about)
    assert found.positives.shape == (12,)
    scales = original_scales(about, (64, 64), "cpu")
    for branch, (low, high) in enumerate(FITTING):
        plain = small(head=head, levels=(3, 5), neck="fpn", trident=False, valid_ranges=None, dilations=[branch + 1])
        plain.load_state_dict(module.state_dict())
        own = [
            each | {"in_range": within(each["boxes"] * scale, low, high)}
            for each, scale in zip(about, scales, strict=True)
        ]
        expected = plain.eval().loss_sums(plain(images), own)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one[4 * branch : 4 * branch + 4], other, rtol=1e-4, atol=1e-5)
    assert found.positives.view(3, 4).sum(1).unique().numel() == 3  # not the same objects


def test_objects_that_a_data_set_leaves_out_are_learned_by_no_branch():
    target = {"boxes": squares(20, 20), "labels": torch.tensor([0, 1]), "in_range": torch.tensor([True, False])}
    branches = Branches(nn.Identity(), (1, 2, 3), RANGES, {"branch": None})
    found = branches.targets(pad_targets([target]), torch.ones(1), (0, 1, 2))
    assert found.valid[:, :2].tolist() == [[True, False], [False, False], [False, False]]
    assert found.unwanted[:, :2].tolist() == [[False, True], [True, True], [True, True]]


@pytest.mark.parametrize(
    "sizes", [{}, {"size": (64, 60), "orig_size": (640, 600)}, {"orig_size": torch.tensor([9, 9])}]
)
def test_a_training_step_waits_for_nothing(sizes):
    module = small()
    images, about = pictures(4), [each | sizes for each in targets()]
    module.cells(module(images))  # once for each size of images
    with NeverWaits():
        losses = module.loss(module(images), about)
        torch.stack(list(losses.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


# What is detected.


def candidates(*sides: float) -> Candidates:
    """Candidates of one image, the same of each of three branches, apart from each other and of falling scores."""
    boxes = squares(*sides) + 400 * torch.arange(len(sides))[:, None]
    scores = torch.linspace(0.9, 0.5, len(sides))
    one = boxes[None], scores[None], torch.zeros(1, len(sides), dtype=torch.int64)
    return Candidates(*(each.repeat(3, *[1] * (each.ndim - 1)) for each in one))


def kept(found: Candidates, sizes: Any, originals: Any = None) -> list[list[float]]:
    """Sides of what is left of the candidates of each branch, in pixels of the images."""
    left = in_range(found, sizes, originals)
    sides = (left.boxes[..., 2] - left.boxes[..., 0])[0].view(3, -1)
    return [
        [round(side, 1) for side, score in zip(*rows, strict=True) if score > 0]
        for rows in zip(sides.tolist(), left.scores[0].view(3, -1).tolist(), strict=True)
    ]


def test_what_a_branch_finds_out_of_its_range_is_dropped():
    branches = Branches(nn.Identity(), (1, 2, 3), RANGES, {"branch": None})
    found = branches.candidates(candidates(5, 30, 90, 91, 160, 200), (0, 1, 2))
    assert found.boxes.shape == (1, 18, 4)
    whole = [(4000, 4000)]
    assert kept(found, whole) == [[5, 30, 90], [30, 90, 91, 160], [90, 91, 160, 200]]
    # Twice as wide and half as high: the same areas. Twice as large on both axes: half of the sides.
    assert kept(found, whole, [(2000, 8000)]) == kept(found, whole)
    assert kept(found, whole, [(8000, 8000)]) == [[5, 30], [30], [90, 91, 160, 200]]
    # Boxes end with the image: of 200 pixels from 2010 on, 60 are left.
    assert kept(found, [(2070, 2070)])[0] == [5, 30, 90, 200]
    alone = Candidates(*(each[:1] for each in candidates(5, 30)[:3]))
    assert branches.candidates(alone, (1,)).ranges is None  # a branch alone is to find all sizes
    branches.ranges = None
    assert branches.candidates(candidates(5, 30), (0, 1, 2)).ranges is None


@torch.no_grad()
def test_detections_are_those_of_all_branches_in_their_ranges_after_one_nms():
    module = small(score_threshold=0.0, nms_threshold=0.3, max_detections=1000).eval()
    images, sizes, originals = pictures(3), [(64, 64), (48, 64), (64, 40)], [(64, 64), (96, 128), (64, 40)]
    found = module.detect(images, sizes, originals)
    parts = []
    for branch, (low, high) in enumerate(FITTING):
        module.hparams.branch, module.hparams.nms_threshold = branch, 1.0
        alone = module.detect(images, sizes, originals)
        masks = [within(each["boxes"], low, high) for each in alone]
        assert not all(mask.all() for mask in masks)
        parts.append([{k: v[mask] for k, v in each.items()} for each, mask in zip(alone, masks, strict=True)])
    for image, detections in enumerate(found):
        boxes, scores, labels = (torch.cat([p[image][key] for p in parts]) for key in ("boxes", "scores", "labels"))
        order = scores.argsort(descending=True, stable=True)
        boxes, scores, labels = boxes[order], scores[order], labels[order]
        chosen = ops.batched_nms(boxes, scores, labels, 0.3)
        assert 0 < len(chosen) < len(boxes)
        torch.testing.assert_close(detections["scores"], scores[chosen], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(detections["boxes"], boxes[chosen], rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_the_middle_branch_alone_is_a_network_without_branches():
    module = small(branch=1, scale_aware=False, valid_ranges=None)
    plain = small(trident=False, valid_ranges=None, dilations=[2])
    assert list(plain.state_dict()) == list(module.state_dict())
    plain.load_state_dict(module.state_dict())
    module.eval(), plain.eval()
    assert torch.equal(module(pictures(2)).logits, plain(pictures(2)).logits)
    assert same_detections(module.detect(pictures(2)), plain.detect(pictures(2)))
    operations = []
    for each in (module, plain):
        with Operations() as counted:
            each(pictures(2))
        operations.append(counted.names)
    assert operations[0] == operations[1]  # at its cost: nothing is repeated, cut or put together
    assert module.train()(pictures(2)).branches == (0, 1, 2)


class Operations(TorchDispatchMode):
    """The operations that are computed, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_exported_detections_and_maps_are_those_of_all_branches():
    module = small(score_threshold=0.0, max_detections=20).eval()
    images, sizes = pictures(2), [(64, 64), (40, 64)]
    found, expected = module.exported_detections(images, torch.tensor(sizes)), module.detect(images, sizes)
    for image, detections in enumerate(expected):
        count = int(found["count"][image])
        assert all(torch.equal(found[key][image, :count], detections[key]) for key in detections)
    maps = module(images)
    for name, value in module.exported_maps(images).items():
        assert torch.equal(torch.cat(value.chunk(3, 1)), getattr(maps, name))


def test_views_keep_the_ranges_of_branches():
    """Of an image shown twice as large, objects are as large as they are in the original."""
    module = small(score_threshold=0.0, nms_threshold=1.0, max_detections=10_000).eval()
    module.hparams.valid_ranges = None
    module.trident.ranges = ((0, 16), (1000, None), (1000, None))
    (found,) = module.detect(pictures(1), views=[{"scale": 2.0}])
    assert len(found["boxes"]) > 0
    assert within(found["boxes"], 0, 16.01).all()


def test_the_learned_weights_are_those_of_the_branches_together():
    """The gradient of the weights is the sum of those of three networks, each of one dilation."""
    conv = nn.Conv2d(4, 4, 3, padding=1).double()
    stage = branched(Staged(conv).double()).stage
    x = torch.randn(2, 4, 12, 12, dtype=torch.float64)
    stage(x).square().sum().backward()
    inside = stage[0].forward(x).relu()  # forward() alone repeats nothing
    expected = torch.zeros_like(conv.weight)
    for dilation in (1, 2, 3):
        weight = conv.weight.detach().clone().requires_grad_()
        F.conv2d(inside.detach(), weight, conv.bias, 1, dilation, dilation).square().sum().backward()
        expected += weight.grad
    torch.testing.assert_close(conv.weight.grad, expected)


def test_receptive_fields_are_those_of_the_closed_form():
    """Five 3x3 convolutions of dilation d see 1 + 10 d cells; the one of stride 2 before them doubles the steps."""
    network = timm.create_model("resnet50d", channels=(4, 4, 4, 4), stem_width=4, num_classes=0).double().eval()
    for each in network.layer3.parameters():
        nn.init.ones_(each) if each.ndim == 1 else nn.init.constant_(each, 0.1)  # nothing is cut off by a ReLU
    x = torch.ones(1, 16, 72, 72, dtype=torch.float64, requires_grad=True)
    found = branched(network).layer3(x)
    seen = []
    for branch in range(3):
        (gradient,) = torch.autograd.grad(found[branch, 0, 18, 18], x, retain_graph=True)
        rows = gradient[0].sum((0, 2)).nonzero()
        seen.append((rows.max() - rows.min() + 1).item())
    assert seen == [(1 + 2 * 5 * dilation - 1) * 2 + 3 for dilation in (1, 2, 3)] == [23, 43, 63]


# As a module of torch and Lightning.


def gradients(module: FPNDetector) -> dict[str, Tensor]:
    sum(module.loss(module(pictures(4)), targets()).values()).backward()
    return {name: each.grad for name, each in module.named_parameters()}


@pytest.mark.parametrize(
    ("name", "channels_last"),
    [("test_byobnet", True), ("test_convnext", True), ("test_nfnet", False), ("mobilenetv3_small_050", True)],
)
def test_recomputed_activations_give_the_same_gradients(name, channels_last):
    """timm calls the units of a stage one by one then, and not the stage."""
    options = {"backbone": name, "levels": (3, 5), "neck": "fpn", "freeze_norm": True, "channels_last": channels_last}
    plain, module = small(**options), small(**options, grad_checkpointing=True)
    module.load_state_dict(plain.state_dict())
    expected = gradients(plain)
    for name, gradient in gradients(module).items():
        if expected[name] is not None:
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_maps_keep_the_order_in_memory():
    found: list[Tensor] = []
    for channels_last in (True, False):
        module = small(channels_last=channels_last)
        (part,) = (part for part in module.backbone.modules() if isinstance(part, TridentConv2d))
        part.register_forward_hook(lambda _, inputs, output: found.extend((inputs[0], output)))
        module(pictures(2))
    in_order = [each.is_contiguous(memory_format=torch.channels_last) for each in found]
    assert in_order == [True, True, False, False]


def test_timms_lists_of_features_have_branches():
    network = random_norms(timm.create_model("test_byobnet"))
    features = timm.create_model("test_byobnet", features_only=True)
    features.load_state_dict(
        {k.replace("stages.", "stages_"): v for k, v in network.state_dict().items()}, strict=False
    )
    ours, theirs = (small(backbone=each).eval() for each in (network, features))
    theirs.neck, theirs.head = ours.neck, ours.head
    expected = ours(pictures(2)).logits
    assert expected.shape[0] == 6
    torch.testing.assert_close(theirs(pictures(2)).logits, expected)


def test_copies_have_branches_of_their_own():
    module = small().eval()
    expected = module(pictures(2)).logits
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(pictures(2)).logits, expected)
        twin.hparams.branch = 1
        assert twin(pictures(2)).branches == (1,)
        assert torch.equal(module(pictures(2)).logits, expected)
        assert twin.trident.backbone is twin.backbone


def test_a_frozen_norm_stays_frozen_and_all_branches_train_with_it():
    module = small(freeze_norm=True, branch=1)
    assert module(pictures(1)).branches == (0, 1, 2)
    assert not any(part.training for part in module.backbone.modules() if isinstance(part, nn.BatchNorm2d))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_compiled_loss_of_branches_is_one_graph_for_all_sizes():
    torch._dynamo.reset()
    plain, module = (small(backbone=Staged(nn.Conv2d(4, 4, 3, padding=1))) for _ in range(2))
    module.load_state_dict(plain.state_dict())
    counter = CompileCounterWithBackend("eager")
    module.compile(fullgraph=True, backend=counter)
    for images, height, width, most in ((2, 64, 96, 3), (3, 96, 64, 9), (2, 128, 64, 0), (4, 64, 64, 40)):
        maps = plain(pictures(images, 128)[:, :, :height, :width])
        true = [each | {"orig_size": (300, 200)} for each in targets([most, *[1] * (images - 1)])]
        expected = plain.loss(maps, true)
        for name, loss in module.loss(maps, true).items():
            torch.testing.assert_close(loss, expected[name], rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.timeout(600)
def test_compiled_features_are_one_graph_each_of_all_branches_and_of_one_alone():
    torch._dynamo.reset()
    module = small(backbone=Staged(nn.Conv2d(4, 4, 3, padding=1)), branch=1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled, found = torch.compile(module.features, fullgraph=True, backend=counter), []
    for features in (module.features, compiled):
        module.train().zero_grad()
        (maps,) = features(pictures(2))
        maps.square().sum().backward()
        gradients = [each.grad for each in module.backbone.parameters()]
        found.append([maps, module.eval().features(pictures(2))[0], *gradients])
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected)
    assert [len(each) for each in found[1][:2]] == [6, 2]
    assert counter.frame_count == 1
    torch.testing.assert_close(compiled(pictures(2))[0], found[0][1])
    assert counter.frame_count == 2


@pytest.mark.slow
def test_two_processes_learn_as_one_with_all_of_their_objects():
    for processes in (2, 1):
        torch.manual_seed(0)
        module = Gradients(**SMALL, neck="single", trident=True, valid_ranges=FITTING, freeze_norm=True)
        several = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": True} if processes == 2 else {}
        options = {"max_steps": 1, "limit_val_batches": 0} | several
        Trainer(**QUIET | options).fit(module, loader((6, 1, 5, 0), batch_size=4 // processes))
    expected = torch.load("gradients_1_0.pt")
    for rank in range(2):
        for name, value in torch.load(f"gradients_2_{rank}.pt").items():
            if value is not None:
                torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)


# Checkpoints.


TWO = {"dilations": (1, 2), "valid_ranges": [(0, 32), (16, None)]}
PLAIN = {"trident": False, "valid_ranges": None}


def test_checkpoints_come_back_with_their_branches(tmp_path):
    module = small()
    fit(module).save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]["trident"] is True
    expected = module.eval().detect(pictures(2))
    again = FPNDetector.load_from_checkpoint(tmp_path / "a.ckpt").eval()
    content = torch.load(tmp_path / "a.ckpt", weights_only=True) | {"module": "zoo.FPNDetector"}
    torch.save(content, tmp_path / "b.ckpt")
    for each in (again, restored(tmp_path / "b.ckpt")):
        assert same_detections(each.detect(pictures(2)), expected)
    fast = FPNDetector.load_from_checkpoint(tmp_path / "a.ckpt", branch=1).eval()
    assert fast(pictures(2)).branches == (1,)
    for options, ours in ((TWO, r"2 branches of dilations \[1, 2\]"), (PLAIN, "no branches")):
        message = (
            rf"^the checkpoint is of a detector with 3 branches of dilations \[1, 2, 3\], and this one has {ours}$"
        )
        with pytest.raises(ValueError, match=message):
            fit(small(**options), ckpt_path=tmp_path / "a.ckpt")
        with pytest.raises(ValueError, match=message):
            restored(tmp_path / "a.ckpt", small(**options))
    fit(small(branch=1), ckpt_path=tmp_path / "a.ckpt", max_epochs=2)


@pytest.mark.parametrize(
    ("there", "here", "goes"),
    [
        ({"dilations": [1, 2, 3]}, {}, True),
        ({"dilations": [3, 2, 1]}, {}, False),
        (PLAIN, PLAIN, True),
        (PLAIN, {}, False),
        (PLAIN | {"dilations": [2]}, PLAIN, False),
        (PLAIN | {"dilations": [2]}, PLAIN | {"dilations": [2]}, True),
        (PLAIN | {"dilations": [2]}, PLAIN | {"dilations": [3]}, False),
        ({"branch": 1}, {"branch": 2}, True),
    ],
)
def test_checkpoints_of_other_dilations_are_refused(there, here, goes):
    content = {"hyper_parameters": dict(small(**there).hparams)}
    module = small(**here)
    if goes:
        module.on_load_checkpoint(content)
    else:
        with pytest.raises(ValueError, match="^the checkpoint is of a detector with .*, and this one has .*"):
            module.on_load_checkpoint(content)


def test_checkpoints_from_before_branches():
    old = dict(small(**PLAIN).hparams)
    for name in ("trident", "dilations", "scale_aware", "valid_ranges", "branch"):
        del old[name]
    small(**PLAIN).on_load_checkpoint({"hyper_parameters": old})
    small().on_load_checkpoint({"state_dict": {}})  # weights alone do not say
    with pytest.raises(ValueError, match="detector with no branches, and this one has 3 branches"):
        small().on_load_checkpoint({"hyper_parameters": old})


def test_another_branch_is_the_same_run_and_other_dilations_are_not():
    def settings(**options: Any) -> dict[str, Any]:
        return {"model": {"class_path": "zoo.FPNDetector", "init_args": {"trident": True} | options}, "data": None}

    now = settings(branch=1, dilations=[1, 2, 4])
    assert differences(now, settings(branch=None, dilations=[1, 2, 4])) == []
    assert differences(now, settings(branch=1)) == ["model.dilations is null there, [1, 2, 4] here"]


@pytest.mark.parametrize("branch", [None, pytest.param(1, marks=pytest.mark.slow)])
def test_it_learns_eight_images_by_heart(branch):
    data = TrainsOnWhatItValidates(
        preset="easy", image_size=64, train_size=8, val_size=8, test_size=8, batch_size=8, num_workers=0
    )
    options = {"optimizer": "adamw", "lr": 3e-3, "warmup_epochs": 5.0, "levels": (3, 5), "channels": 32, "neck": "fpn"}
    fast = {"scale_aware": False, "valid_ranges": None, "branch": 1} if branch else {}
    torch.manual_seed(0)
    module = FPNDetector(
        **SMALL | {"trident": True, "valid_ranges": FITTING} | options | fast | {"num_classes": data.num_classes}
    )
    trainer = Trainer(**QUIET, max_epochs=70, check_val_every_n_epoch=70, gradient_clip_val=10.0)
    trainer.fit(module, datamodule=data)
    assert trainer.callback_metrics["val/ap50"] > 0.95
    assert trainer.callback_metrics["val/loss"] < 1


# Two stages.


def two_stages(**options: Any) -> FasterRCNN:
    counts = {"pre_nms_top_k": (200, 100), "post_nms_top_k": (100, 50), "rpn_samples": 64, "region_samples": 32}
    shape = {"backbone": narrow(), "num_classes": 3, "channels": 16, "image_size": 64, "anchor_sizes": [8, 16, 32]}
    single = {"neck": "none", "box_head": "stage", "class_agnostic": True}  # as the paper
    torch.manual_seed(0)
    module = FasterRCNN(**counts | shape | single | {"trident": True, "valid_ranges": FITTING} | options)
    random_norms(module.backbone)
    random_norms(module.box_head)
    return module


def test_each_branch_of_two_stages_samples_and_learns_its_own_objects():
    module, images, about = two_stages().eval(), pictures(4), targets()
    maps = module(images)
    assert maps.branches == (0, 1, 2)
    found = module.loss_sums(maps, about)
    assert all(each.shape == (12,) for each in found)
    for branch, (low, high) in enumerate(FITTING):
        plain = two_stages(trident=False, valid_ranges=None, dilations=[branch + 1])
        plain.load_state_dict(module.state_dict())
        own = [each | {"in_range": within(each["boxes"], low, high)} for each in about]
        rows = slice(4 * branch, 4 * branch + 4)
        expected = plain.eval().loss_sums(plain(images), own)
        for name in ("rpn_objectness", "rpn_box", "anchors"):
            torch.testing.assert_close(getattr(found, name)[rows], getattr(expected, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_proposals_out_of_a_branchs_range_teach_the_second_stage_nothing(training, monkeypatch):
    module, seen = two_stages().train(training), []
    matched = detector.match_regions
    monkeypatch.setattr(detector, "match_regions", lambda found, *rest: (seen.append(found), matched(found, *rest))[1])
    about = [each | {"scale": 0.5} for each in targets()]
    module.loss(module(pictures(4)), about)
    (found,) = seen
    assert found.valid.view(3, -1).any(1).all()
    for (low, high), boxes, valid in zip(FITTING, found.boxes.chunk(3), found.valid.chunk(3), strict=True):
        assert within(2 * boxes[valid], low, high).all()


@torch.no_grad()
def test_detections_of_two_stages_are_those_of_all_branches_in_their_ranges():
    module = two_stages(score_threshold=0.0, nms_threshold=1.0, max_detections=10_000).eval()
    images, sizes = pictures(2), [(64, 64), (48, 64)]
    found, expected = module.detect(images, sizes), [[], []]
    for branch, (low, high) in enumerate(FITTING):
        plain = two_stages(
            score_threshold=0.0, nms_threshold=1.0, max_detections=10_000, **PLAIN | {"dilations": [branch + 1]}
        )
        plain.load_state_dict(module.state_dict())
        module.hparams.branch = branch
        alone = module.detect(images, sizes)
        assert same_detections(alone, plain.eval().detect(images, sizes))
        for of_image, each in zip(expected, alone, strict=True):
            of_image.append(each["scores"][within(each["boxes"], low, high)])
    module.hparams.branch = None
    for one, others in zip(found, expected, strict=True):
        torch.testing.assert_close(one["scores"], torch.cat(others).sort(descending=True)[0], rtol=1e-4, atol=1e-6)
    exported = module.exported_detections(images, torch.tensor(sizes))
    assert exported["count"].tolist() == [len(each["scores"]) for each in found]


def test_a_step_of_two_stages_with_branches_waits_for_nothing(monkeypatch):
    monkeypatch.setattr(proposals, "is_remote", lambda _: True)  # a CPU's NMS does not wait
    module = two_stages(freeze_norm=True)
    images, about = pictures(4), [each | {"scale": 0.5, "size": (64, 60)} for each in targets()]
    module.cells(module(images))
    with NeverWaits():
        losses = module.loss(module(images), about)
        torch.stack(list(losses.values())).sum().backward()
    assert all(each.grad is not None for each in module.parameters() if each.requires_grad)


# Cost.


@pytest.mark.parametrize("kind", [FPNDetector, FasterRCNN])
def test_a_branch_alone_costs_what_the_base_costs_and_its_training_what_all_branches_cost(kind):
    base = {"backbone": "test_byobnet", "num_classes": 3, "channels": 16, "neck": "single", "image_size": 64}
    found = []
    for options in ({}, {"trident": True, "branch": 1}, {"trident": True}):
        with torch.device("meta"), Blueprint():
            module = kind(**base, **options)
        found.append(count(module, (3, 64, 64)))
        assert module.hparams.branch == options.get("branch")
    plain, fast, every = found
    assert plain.parameters == fast.parameters == every.parameters
    assert plain.macs == fast.macs < every.macs < 3 * plain.macs
    assert plain.training_macs < fast.training_macs == every.training_macs
