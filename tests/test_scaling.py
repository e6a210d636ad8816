"""Compound scaling: the paper's rule and its table, and phi for a budget, counted on real networks."""

import re
from fractions import Fraction
from functools import cache

import pytest
import timm
import torch
from timm.models._efficientnet_builder import round_channels
from torch.utils.flop_counter import FlopCounterMode

from zoo.common.cost import count
from zoo.efficientnet import (
    PUBLISHED,
    CompoundScaling,
    EfficientNetClassifier,
    create_network,
    published_table,
    round_filters,
    round_repeats,
)

# Parameters, multiply-accumulates in units of 10^9, blocks.
NETWORKS = {
    "b0": (5_288_548, 0.386, 16),
    "b1": (7_794_184, 0.687, 23),
    "b2": (9_109_994, 0.994, 23),
    "b3": (12_233_232, 1.827, 26),
    "b4": (19_341_616, 4.394, 32),
    "b5": (30_389_784, 10.266, 39),
    "b6": (43_040_704, 19.068, 45),
    "b7": (66_347_960, 37.746, 55),
}
B0_MACS = 385_814_752
SMALL = {"depth": 0.25, "width": 0.25, "image_size": 32}  # seven blocks: counted in no time


@cache
def peer(name: str, side: int) -> tuple[int, int]:
    """Parameters and multiply-accumulates of timm's own network, counted here."""
    with torch.device("meta"):
        model, images = timm.create_model(name).eval(), torch.zeros(1, 3, side, side)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2


@cache
def network(family: str = "efficientnet", depth: float = 1.0, width: float = 1.0):
    with torch.device("meta"):
        return create_network(family, depth, width)


def stages(model) -> list[tuple[int, int]]:
    """Blocks and channels of each stage."""
    found = []
    for stage in model.stages if hasattr(model, "stages") else model.blocks:
        convolutions = [layer for layer in stage[-1].modules() if isinstance(layer, torch.nn.Conv2d)]
        found.append((len(stage), convolutions[-1].out_channels))
    return found


def rows(table: str) -> list[list[str]]:
    """The cells of a markdown table, without its head."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


# The published networks, and the rule.


@pytest.mark.parametrize("variant", NETWORKS)
def test_published_networks_have_the_papers_size(variant):
    parameters, macs, blocks = NETWORKS[variant]
    with torch.device("meta"):
        model = EfficientNetClassifier(variant)
    found = count(model, model.input_shape)
    assert (found.parameters, found.macs) == peer(f"efficientnet_{variant}", PUBLISHED[variant].image_size)
    assert found.parameters == parameters
    assert round(found.macs / 1e9, 3) == macs
    assert variant != "b0" or found.macs == B0_MACS
    assert sum(depth for depth, _ in stages(model.backbone)) == blocks


@pytest.mark.parametrize(
    ("variant", "depths", "channels", "stem", "head"),
    [
        ("b1", [2, 3, 3, 4, 4, 5, 2], [16, 24, 40, 80, 112, 192, 320], 32, 1280),
        ("b4", [2, 4, 4, 6, 6, 8, 2], [24, 32, 56, 112, 160, 272, 448], 48, 1792),
        ("b7", [4, 7, 7, 10, 10, 13, 4], [32, 48, 80, 160, 224, 384, 640], 64, 2560),
    ],
)
def test_depths_and_channels_of_published_networks(variant, depths, channels, stem, head):
    width, depth, *_ = PUBLISHED[variant]
    model = network("efficientnet", depth, width)
    assert stages(model) == list(zip(depths, channels, strict=True))
    assert (model.conv_stem.out_channels, model.num_features) == (stem, head)


@pytest.mark.parametrize(
    ("phi", "parameters", "macs"),
    [
        (0.5, "8.44", "0.731"),
        (1, "9.11", "0.993"),
        (3, "16.35", "3.25"),
        (4, "25.9", "6.32"),
        (5, "33.7", "11.4"),
        (6, "45.5", "20.1"),
        (7, "68.7", "39.7"),
    ],
)
def test_networks_of_the_formula_are_not_the_published_ones(phi, parameters, macs):
    found = CompoundScaling().count(phi)
    for value, expected in ((found.parameters / 1e6, parameters), (found.macs / 1e9, macs)):
        assert f"{value:.{len(expected.split('.')[1])}f}" == expected
    assert all(found.macs != peer(f"efficientnet_{name}", PUBLISHED[name].image_size)[1] for name in NETWORKS)


def test_phi_zero_is_b0():
    assert CompoundScaling().count(0)[:2] == (NETWORKS["b0"][0], B0_MACS)


def test_the_rule_at_any_real_phi():
    scaling = CompoundScaling()
    assert scaling.at(0) == (1.0, 1.0, 1.0)
    assert scaling.at(1) == (1.2, 1.1, 1.15)
    assert scaling.at(2) == pytest.approx((1.44, 1.21, 1.3225))
    assert scaling.at(0.5) == pytest.approx((1.2**0.5, 1.1**0.5, 1.15**0.5))
    assert scaling.at(-1.5) == pytest.approx([1 / factor for factor in scaling.at(1.5)])
    assert CompoundScaling(2.0, 1.0, 1.0).at(3) == (8.0, 1.0, 1.0)
    assert [CompoundScaling(image_size=100, gamma=1.15).side(phi) for phi in (-1, 0, 1, 2)] == [87, 100, 115, 132]


def test_cost_is_depth_times_width_and_resolution_squared():
    scaling = CompoundScaling()
    assert scaling.cost(0) == 1.0
    assert scaling.cost(1) == pytest.approx(1.2 * 1.1**2 * 1.15**2)
    assert scaling.cost(1) == pytest.approx(1.92, abs=1e-3)  # the published coefficients miss 2
    assert scaling.cost(2.5) == pytest.approx(scaling.cost(1) ** 2.5)
    assert CompoundScaling(1.0, 2**0.5, 1.0).cost(3) == pytest.approx(8.0)


def test_rounding_as_tensorflows_code_has_it():
    """In exact arithmetic: the nearest multiple of 8, halves up, and never less than nine tenths of what was asked."""
    for filters in (8, 16, 24, 32, 40, 64, 80, 96, 112, 160, 192, 320, 1280, 2048):
        for width in (numerator / 64 for numerator in range(8, 64 * 5)):
            exact = filters * Fraction(width)
            expected = max(8 * ((exact + 4) // 8), 8)
            expected += 8 if expected < exact * Fraction(9, 10) else 0
            assert round_filters(filters, width) == expected == round_channels(filters, width, 8)
    for repeats in range(1, 7):
        for depth in (numerator / 64 for numerator in range(1, 64 * 5)):
            assert round_repeats(repeats, depth) == -(-(repeats * Fraction(depth)) // 1) >= 1
    assert round_filters(32, 1.8) == 56
    assert round_repeats(4, 2.6) == 11


def test_more_width_or_depth_is_never_less_of_it():
    """What finding phi by bisection rests on."""
    widths = [numerator / 1000 for numerator in range(100, 4000)]
    for filters in (16, 24, 40, 112):
        found = [round_filters(filters, width) for width in widths]
        assert found == sorted(found)


# Families.


@pytest.mark.parametrize(("family", "name"), [("resnet50", "resnet50"), ("mobilenetv2", "mobilenetv2_100")])
def test_other_families_start_from_timms_networks(family, name):
    assert CompoundScaling(family=family).count(0)[:2] == peer(name, 224)


@pytest.mark.parametrize(("name", "width"), [("mobilenetv2_050", 0.5), ("mobilenetv2_140", 1.4)])
def test_mobilenet_at_other_widths_is_timms(name, width):
    assert CompoundScaling(family="mobilenetv2", width=width).count(0)[:2] == peer(name, 224)


def test_resnet_scales_stages_stem_and_bottlenecks():
    model = network("resnet50", 1.3, 2.0)
    assert stages(model) == [(4, 512), (6, 1024), (8, 2048), (4, 4096)]
    assert model.stem.conv1.conv.out_channels == 128
    assert [stage[0].conv2_kxk.conv.out_channels for stage in model.stages] == [128, 256, 512, 1024]
    assert stages(network("resnet50", 0.3, 0.125)) == [(1, 32), (2, 64), (2, 128), (1, 256)]


def test_mobilenet_scales_stages_and_keeps_its_last_layer_wide():
    assert stages(network("mobilenetv2", 2.0, 0.5)) == [(2, 8), (4, 16), (6, 16), (8, 32), (6, 48), (6, 80), (2, 160)]
    assert [network("mobilenetv2", 1.0, width).num_features for width in (0.5, 1.0, 2.0)] == [1280, 1280, 2560]
    assert network("efficientnet", 1.0, 0.5).num_features == 640


def test_what_a_count_depends_on():
    base = CompoundScaling()
    assert CompoundScaling(stem_stride=1, image_size=112).count(0)[:2] == base.count(0)[:2]
    grey = CompoundScaling(in_channels=1).count(0)
    assert grey.macs == B0_MACS - 2 * 32 * 9 * 112**2
    assert grey.parameters == NETWORKS["b0"][0] - 2 * 32 * 9
    ten = base.count(0, num_classes=10)
    assert (B0_MACS - ten.macs, NETWORKS["b0"][0] - ten.parameters) == (990 * 1280, 990 * 1281)
    assert base.count(1, image_size=224).parameters == base.count(1).parameters
    assert base.count(1, image_size=224).macs < base.count(1).macs


# Phi for a budget.


def assert_largest(cost_at, phi, budget):
    """Bought at phi, and not to be had at the next thousandth."""
    assert cost_at(phi) <= budget < cost_at(round(phi + 0.001, 3))
    assert phi == round(phi, 3)


def test_the_best_balanced_network_for_images_of_a_given_size():
    scaling = CompoundScaling()
    phi = scaling.for_macs(200e6, image_size=96)
    assert_largest(lambda phi: scaling.count(phi, 96).macs, phi, 200e6)
    model = EfficientNetClassifier(phi=phi, image_size=96)
    assert count(model, (3, 96, 96))[:2] == scaling.count(phi, 96)[:2]


@pytest.mark.parametrize(
    ("family", "times"),
    [("efficientnet", 0.7), ("efficientnet", 1), ("efficientnet", 3.3), ("mobilenetv2", 0.7), ("resnet50", 3.3)],
)
def test_phi_for_macs(family, times):
    scaling = CompoundScaling(family=family, depth=0.25, width=0.5, image_size=64)
    budget = times * scaling.count(0, num_classes=10).macs
    phi = scaling.for_macs(budget, num_classes=10)
    assert_largest(lambda phi: scaling.count(phi, num_classes=10).macs, phi, budget)
    assert (phi >= 0) == (times >= 1)


def test_phi_for_parameters():
    scaling = CompoundScaling(**SMALL | {"width": 0.5})
    budget = 1.5 * scaling.count(0).parameters
    phi = scaling.for_params(budget)
    assert_largest(lambda phi: scaling.count(phi).parameters, phi, budget)


def test_phi_for_parameters_makes_a_network_that_can_be_built():
    """Images given, phi may be smaller than the resolution of its own would let it be."""
    scaling = CompoundScaling(depth=0.25, image_size=40)
    least, deeper = scaling.least(), scaling.least(40)
    assert deeper < least < 0
    few = scaling.count(least - 1, image_size=40).parameters
    assert few < scaling.count(least).parameters
    with pytest.raises(ValueError, match=f"the least network, phi {least}"):
        scaling.for_params(few)
    assert deeper <= scaling.for_params(few, image_size=40) < least


@pytest.mark.parametrize("coefficients", [(2.0, 1.0, 1.0), (1.0, 2**0.5, 1.0), (1.0, 1.0, 2**0.5)])
def test_one_dimension_alone(coefficients):
    scaling = CompoundScaling(*coefficients, **SMALL)
    base = scaling.count(0)
    phi = scaling.for_macs(1.8 * base.macs)
    assert_largest(lambda phi: scaling.count(phi).macs, phi, 1.8 * base.macs)
    assert (scaling.count(phi).parameters == base.parameters) == (coefficients[2] > 1)


# Tables.


def test_table_of_the_rule():
    scaling = CompoundScaling(family="mobilenetv2", image_size=192)
    cells = rows(scaling.table([-2, 0.5]))
    for (phi, depth, width, side, cost, parameters, macs), value in zip(cells, (-2, 0.5), strict=True):
        scale, found = scaling.at(value), scaling.count(value)
        assert (float(phi), int(side)) == (value, scaling.side(value))
        assert [float(depth), float(width)] == pytest.approx([scale.depth, scale.width], rel=5e-3)
        assert float(cost) == pytest.approx(scaling.cost(value), rel=5e-3)
        assert (int(parameters.replace(",", "")), int(macs.replace(",", ""))) == found[:2]


def test_table_of_the_paper():
    table = published_table()
    cells = rows(table)
    assert [row[0] for row in cells] == list(NETWORKS)
    for name, depth, width, side, cost, parameters, macs in cells:
        network = PUBLISHED[name]
        assert (float(depth), float(width), int(side)) == (network.depth, network.width, network.image_size)
        expected = network.depth * network.width**2 * (network.image_size / 224) ** 2
        assert float(cost) == pytest.approx(expected, rel=5e-3)
        counted = int(parameters.replace(",", "")), int(macs.replace(",", ""))
        assert counted == peer(f"efficientnet_{name}", network.image_size)
    assert len({line.count("|") for line in table.splitlines()}) == 1


# Wrong inputs.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.9}, r"alpha, beta, gamma are \(0.9, 1.1, 1.15\): expected at least 1 each, and not all 1"),
        ({"alpha": 1, "beta": 1, "gamma": 1}, "expected at least 1 each, and not all 1"),
        ({"family": "vgg"}, "unknown family 'vgg': expected one of efficientnet, mobilenetv2, resnet50"),
        ({"stem_stride": 3}, "stem_stride is 3: expected 1 or 2"),
        ({"depth": 51.0}, "depth is 51.0: too many blocks to count, expected 50 or less"),
        ({"depth": 0.0}, "depth and width are 0.0 and 1.0: expected positive multipliers"),
        ({"depth": float("inf")}, "depth and width are inf and 1.0: expected positive multipliers"),
        ({"beta": float("nan")}, r"alpha, beta, gamma are \(1.2, nan, 1.15\): expected at least 1 each"),
        ({"width": 0.2}, "width is 0.2: a stage of 16 channels would vanish, the least is 0.25"),
        ({"width": 0.05, "family": "resnet50"}, "a stage of 64 channels would vanish, the least is 0.0625"),
        ({"image_size": 31}, "less than the total stride, expected at least 32, or 16 with stem_stride 1"),
        ({"image_size": 15, "stem_stride": 1}, "image_size is 15: less than the total stride, expected at least 16$"),
    ],
)  # fmt: skip
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        CompoundScaling(**arguments)


@pytest.mark.parametrize(
    ("arguments", "image_size", "why"),
    [
        ({}, None, "images would be smaller than the total stride, 32 pixels"),
        ({"stem_stride": 1}, None, "a stage of 16 channels would vanish"),
        ({}, 96, "a stage of 16 channels would vanish"),
        ({"family": "resnet50", "width": 0.1}, None, "a stage of 64 channels would vanish"),
        ({"alpha": 2.0, "beta": 1.0, "gamma": 1.0}, None, "every stage is down to one block"),
        ({"beta": 1.0, "gamma": 1.0, "depth": 0.001}, None, "every stage is down to one block"),
    ],
)
def test_a_phi_too_small_names_the_least_one(arguments, image_size, why):
    scaling = CompoundScaling(**arguments)
    least = scaling.least(image_size)
    with pytest.raises(ValueError, match=f"^phi is -99: {why}; the least phi is ([-.\\d]+)$") as caught:
        scaling.check(-99, image_size)
    assert float(re.search(r"[-.\d]+$", str(caught.value))[0]) == least <= 0
    assert scaling.count(least, image_size).macs > 0
    with pytest.raises(ValueError, match="the least phi is"):
        scaling.count(round(least - 0.001, 3), image_size)
    scale = scaling.at(least)
    assert scaling.width * scale.width * {"resnet50": 64}.get(scaling.family, 16) >= 4
    assert image_size is not None or scaling.side(least) >= 16 * scaling.stem_stride


def test_nothing_is_counted_on_images_below_the_total_stride():
    with pytest.raises(ValueError, match="image_size is 8: less than the total stride, expected at least 32"):
        CompoundScaling().count(0, image_size=8)


def test_a_phi_too_large_names_the_largest_one():
    scaling = CompoundScaling()
    with pytest.raises(ValueError, match=f"phi is 1000: .* the largest phi is {scaling.most}"):
        scaling.table([1000])
    assert scaling.cost(scaling.most) <= 1e6 < scaling.cost(scaling.most + 0.001)
    deep = CompoundScaling(2.0, 1.0, 1.0, depth=0.5)
    assert 0.5 * deep.at(deep.most).depth <= 50 < 0.5 * deep.at(deep.most + 0.001).depth
    for phi in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match=f"phi is {phi}: "):
            scaling.check(phi)


@pytest.mark.parametrize("image_size", [None, 48])
@pytest.mark.parametrize("what", ["macs", "params"])
def test_budgets_that_cannot_be_met_name_the_network_that_is_nearest(what, image_size):
    scaling = CompoundScaling(1.0, 1.1, 2.0, **SMALL | {"width": 0.3})
    find = getattr(scaling, f"for_{what}")
    for budget in (1, 0, -5, float("nan")):
        with pytest.raises(ValueError, match=r"are too few: the least network, phi ([-.\d]+), has ([\d,]+)$") as few:
            find(budget, image_size)
    phi, least = re.search(r"phi ([-.\d]+), has ([\d,]+)$", str(few.value)).groups()
    assert float(phi) == scaling.least(image_size)
    assert find(int(least.replace(",", "")), image_size) >= float(phi)
    with pytest.raises(ValueError, match="are too few"):
        find(int(least.replace(",", "")) - 1, image_size)
    with pytest.raises(ValueError, match=f"too many: the largest network, phi {scaling.most}, has [\\d,]+$"):
        find(1e40, image_size)


@pytest.mark.parametrize("what", ["macs", "params"])
def test_images_below_the_total_stride(what):
    with pytest.raises(ValueError, match="image_size is 16: less than the total stride, expected at least 32"):
        getattr(CompoundScaling(), f"for_{what}")(1e9, image_size=16)
