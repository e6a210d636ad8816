"""The compound scaling rule: depth, width and resolution together, by one coefficient.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019, arXiv 1905.11946,
section 3.3. Nothing here needs torch, but for counting what a network really costs.
"""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from zoo.efficientnet.rounding import DIVISOR, NARROWEST

if TYPE_CHECKING:
    from zoo.common.cost import Cost

STRIDE = 32
"""Of every family: how many pixels of the image are one of the last feature map, along each side."""

STEP = 1000  # phi is found to a thousandth
# What can be counted within seconds: so many times the base's cost, and so many times the family's own depth.
MOST, DEEPEST = 1e6, 50.0
SHALLOWEST = 0.01  # times the family's own depth: no stage has a hundred blocks, so that each of them has one left


class Published(NamedTuple):
    """A network of the paper: multipliers of B0's width and depth, image side in pixels, dropout."""

    width: float
    depth: float
    image_size: int
    dropout: float


# The paper's code, not its formula: B3 and up are deeper, wider and larger than any one phi makes them.
PUBLISHED = {
    "b0": Published(1.0, 1.0, 224, 0.2),
    "b1": Published(1.0, 1.1, 240, 0.2),
    "b2": Published(1.1, 1.2, 260, 0.3),
    "b3": Published(1.2, 1.4, 300, 0.3),
    "b4": Published(1.4, 1.8, 380, 0.4),
    "b5": Published(1.6, 2.2, 456, 0.4),
    "b6": Published(1.8, 2.6, 528, 0.5),
    "b7": Published(2.0, 3.1, 600, 0.5),
}


class Scale(NamedTuple):
    """Multipliers of depth, width and the image's side."""

    depth: float
    width: float
    resolution: float

    @property
    def cost(self) -> float:
        """Operations relative to the base, before any rounding: depth · width² · resolution²."""
        return self.depth * self.width**2 * self.resolution**2


@dataclass(frozen=True)
class CompoundScaling:
    """Depth alpha^phi, width beta^phi, resolution gamma^phi: equations 2 and 3 of the paper.

    With alpha · beta² · gamma² near 2, each step of phi doubles the cost; the published coefficients make it 1.92.
    Alpha alone above 1 is scaling by depth, and so on::

        scaling = CompoundScaling()
        scaling.at(1)                                        # Scale(depth=1.2, width=1.1, resolution=1.15)
        scaling.for_macs(200e6)                              # -1.706: 184 million, at 176 pixels
        scaling.for_macs(200e6, image_size=96)               # 2.223: images stay at 96 pixels
        print(scaling.table())

    Args:
        alpha, beta, gamma: At least 1 each, and not all 1.
        family: The network that is scaled: "efficientnet", "mobilenetv2" or "resnet50", as in the paper's table 3.
        depth, width: Multipliers of the family's own depth and width that phi starts from.
        image_size: Side in pixels that phi starts from.
        stem_stride: Stride of the first convolution: 2, or 1 for small images.
        in_channels: Channels of the images.

    Raises:
        ValueError: For values out of range and unknown families.
    """

    alpha: float = 1.2
    beta: float = 1.1
    gamma: float = 1.15
    family: str = "efficientnet"
    depth: float = 1.0
    width: float = 1.0
    image_size: int = 224
    stem_stride: int = 2
    in_channels: int = 3

    def __post_init__(self) -> None:
        coefficients = (self.alpha, self.beta, self.gamma)
        if not all(1 <= each < math.inf for each in coefficients) or max(coefficients) == 1:
            raise ValueError(f"alpha, beta, gamma are {coefficients}: expected at least 1 each, and not all 1")
        if self.family not in NARROWEST:
            raise ValueError(f"unknown family {self.family!r}: expected one of {', '.join(NARROWEST)}")
        if self.stem_stride not in (1, 2):
            raise ValueError(f"stem_stride is {self.stem_stride}: expected 1 or 2")
        if not all(0 < each < math.inf for each in (self.depth, self.width)):
            raise ValueError(f"depth and width are {self.depth} and {self.width}: expected positive multipliers")
        if self.depth > DEEPEST:
            raise ValueError(f"depth is {self.depth}: too many blocks to count, expected {DEEPEST:g} or less")
        if self.width * NARROWEST[self.family] < DIVISOR / 2:
            raise ValueError(
                f"width is {self.width}: a stage of {NARROWEST[self.family]} channels would vanish, the least is "
                f"{DIVISOR / 2 / NARROWEST[self.family]}"
            )
        check_resolution(self.image_size, self.stem_stride)

    def at(self, phi: float) -> Scale:
        """The multipliers of the base at any real phi."""
        return Scale(self.alpha**phi, self.beta**phi, self.gamma**phi)

    def cost(self, phi: float) -> float:
        """Operations relative to the base by the formula; :meth:`count` has what the rounded network costs."""
        return self.at(phi).cost

    def side(self, phi: float) -> int:
        """Side of the images in pixels."""
        return round(self.image_size * self.at(phi).resolution)

    def least(self, image_size: int | tuple[int, int] | None = None) -> float:
        """The smallest phi that makes a network.

        Below it a stage would round to no channels or, unless the image size is given, the images would be smaller than
        the network's total stride. Where only depth is scaled, all stages are down to one block.
        """
        return self._bound(image_size)[0]

    def _bound(self, image_size: int | tuple[int, int] | None) -> tuple[float, str]:
        """The smallest phi, and what goes wrong below it."""
        narrowest, stride = NARROWEST[self.family], total_stride(self.stem_stride)
        limits = [(self.beta, DIVISOR / 2 / (self.width * narrowest), f"a stage of {narrowest} channels would vanish")]
        if image_size is None:
            small = f"images would be smaller than the total stride, {stride} pixels"
            limits.append((self.gamma, stride / self.image_size, small))
        if all(factor == 1 for factor, *_ in limits):
            limits = [(self.alpha, min(SHALLOWEST / self.depth, 1.0), "every stage is down to one block")]
        phi, why = max((math.log(limit) / math.log(factor), why) for factor, limit, why in limits if factor > 1)
        return math.ceil(phi * STEP) / STEP, why

    @property
    def most(self) -> float:
        """The largest phi: above it a network is too large even to count."""
        phi = math.log(MOST) / math.log(self.cost(1))
        if self.alpha > 1:
            phi = min(phi, math.log(DEEPEST / self.depth) / math.log(self.alpha))
        return math.floor(phi * STEP) / STEP

    def check(self, phi: float, image_size: int | tuple[int, int] | None = None) -> None:
        """Raises ValueError for a phi or an image size that makes no network, with the nearest that does."""
        if image_size is not None:
            check_resolution(image_size, self.stem_stride)
        least, why = self._bound(image_size)
        if not phi >= least:  # it may be no number
            raise ValueError(f"phi is {phi}: {why}; the least phi is {least}")
        if phi > self.most:
            raise ValueError(f"phi is {phi}: the network would be too large to count; the largest phi is {self.most}")

    def count(self, phi: float, image_size: int | None = None, num_classes: int = 1000) -> "Cost":
        """Parameters and multiply-accumulates of the real network, rounded and with its head.

        Args:
            phi: Of the network.
            image_size: Side of the images in pixels. None: that of phi.
            num_classes: Outputs of the head.
        """
        self.check(phi, image_size)
        side, scale = self.side(phi) if image_size is None else image_size, self.at(phi)
        depth, width = self.depth * scale.depth, self.width * scale.width
        return _count(self.family, depth, width, side, self.stem_stride, self.in_channels, num_classes)

    def for_macs(self, budget: float, image_size: int | None = None, num_classes: int = 1000) -> float:
        """The largest phi, to a thousandth, whose network needs at most so many multiply-accumulates an image.

        Args:
            budget: As :meth:`count` counts.
            image_size: Side of the images in pixels, if it is given and not phi's to choose.
            num_classes: Outputs of the head.

        Raises:
            ValueError: If the least network needs more, or the largest one less.
        """
        least = self.least(image_size)
        return self._largest(lambda phi: self.count(phi, image_size, num_classes).macs, budget, "MACs", least)

    def for_params(self, budget: float, image_size: int | None = None, num_classes: int = 1000) -> float:
        """The largest phi for so many parameters, as :meth:`for_macs`; an image size only bounds phi from below."""
        if image_size is not None:
            check_resolution(image_size, self.stem_stride)
        side, least = total_stride(self.stem_stride), self.least(image_size)
        return self._largest(lambda phi: self.count(phi, side, num_classes).parameters, budget, "parameters", least)

    def _largest(self, measure: Callable[[float], int], budget: float, what: str, least: float) -> float:
        """Bisection over thousandths: the cost never falls as phi grows, but it grows in steps."""
        low, high = round(least * STEP), round(self.most * STEP)
        if not (cost := measure(least)) <= budget:
            raise ValueError(f"{budget:,.0f} {what} are too few: the least network, phi {least}, has {cost:,}")
        at, reach = min(max(0, low), high), STEP  # from the base outwards: a large network takes long to count
        while (cost := measure(at / STEP)) <= budget:
            if at == high:
                raise ValueError(
                    f"{budget:,.0f} {what} are too many: the largest network, phi {self.most}, has {cost:,}"
                )
            low, at, reach = at, min(at + reach, high), 2 * reach
        high = at
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if measure(middle / STEP) <= budget else (low, middle)
        return low / STEP

    def table(self, phis: Iterable[float] = range(8)) -> str:
        """Size and cost of each phi's network, as text: a markdown table."""
        counted = {phi: self.count(phi) for phi in phis}
        return _table("phi", [(f"{phi:g}", self.at(phi), self.side(phi), cost) for phi, cost in counted.items()])


def published_table() -> str:
    """Size and cost of the paper's networks, as text: a markdown table."""
    base = CompoundScaling()
    rows = []
    for name, network in PUBLISHED.items():
        scale = Scale(network.depth, network.width, network.image_size / base.image_size)
        cost = _count(base.family, network.depth, network.width, network.image_size, base.stem_stride, 3, 1000)
        rows.append((name, scale, network.image_size, cost))
    return _table("variant", rows)


def check_resolution(image_size: int | tuple[int, int], stem_stride: int = 2) -> None:
    """Raises ValueError for images of which the last feature map would be less than a pixel."""
    stride, least = total_stride(stem_stride), image_size if isinstance(image_size, int) else min(image_size)
    if least < stride:
        smaller = f", or {total_stride(1)} with stem_stride 1" if stem_stride == 2 else ""
        raise ValueError(f"image_size is {image_size}: less than the total stride, expected at least {stride}{smaller}")


def total_stride(stem_stride: int) -> int:
    return STRIDE // 2 * stem_stride


@functools.lru_cache(maxsize=1024)
def _count(
    family: str, depth: float, width: float, image_size: int, stem_stride: int, in_channels: int, num_classes: int
) -> "Cost":
    import torch

    from zoo.common.cost import Blueprint, count
    from zoo.efficientnet.networks import create_network

    with torch.device("meta"), Blueprint():
        network = create_network(family, depth, width, in_channels=in_channels, stem_stride=stem_stride)
        network = torch.nn.Sequential(network, torch.nn.Linear(network.num_features, num_classes))
    return count(network, (in_channels, image_size, image_size))


def _table(title: str, rows: Iterable[tuple[str, Scale, int, "Cost"]]) -> str:
    lines = [f"| {title} | depth | width | pixels | formula's cost | parameters | MACs |", "|---" * 7 + "|"]
    for name, scale, side, cost in rows:
        lines.append(
            f"| {name} | {scale.depth:.3g} | {scale.width:.3g} | {side} | {scale.cost:.3g} | {cost.parameters:,} | "
            f"{cost.macs:,} |"
        )
    return "\n".join(lines)
