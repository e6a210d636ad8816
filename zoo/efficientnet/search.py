"""Search for the rule's coefficients, and comparison of the rule: ``zoo scaling-search`` and ``scaling-compare``.

Both train many small networks by one recipe, each some seeds. ``commands.py`` declares them.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from zoo.common.study import Page, Train, spread, spread_text
from zoo.efficientnet.scaling import CompoundScaling

EQUAL = 0.8  # of the budget: less is not called equal cost


def candidates(step: float = 0.1, target: float = 2.0) -> list[tuple[float, float, float]]:
    """Coefficients (alpha, beta, gamma), at least 1 each, with alpha · beta² · gamma² = ``target``.

    Beta and gamma are multiples of ``step`` above 1, and alpha is what the constraint leaves for it.

    Raises:
        ValueError: For a step below 0.01, or one that leaves one candidate only.
    """
    if not step >= 0.01:  # it may be no number; 0.01 makes a thousand candidates
        raise ValueError(f"step is {step}: expected at least 0.01")
    count = math.floor((math.sqrt(target) - 1) / step + 1e-9)
    values = [1 + step * index for index in range(count + 1)]
    found = [(target / (beta * gamma) ** 2, beta, gamma) for beta in values for gamma in values]
    found = [(max(alpha, 1.0), beta, gamma) for alpha, beta, gamma in found if alpha > 1 - 1e-9]
    if len(found) < 2:
        raise ValueError(f"step is {step}: expected at most {math.sqrt(target) - 1:.3f}")
    return found


def search(base: CompoundScaling, train: Train, num_classes: int = 1000, step: float = 0.1) -> Page:
    """The paper's first step (section 3.3): phi 1, twice the cost, and a small grid of coefficients; the best are kept.

    Args:
        base: The network that is to be scaled; its own coefficients do not matter.
        train: Trains them.
        num_classes: Of the data, for counting what the networks cost.
        step: See :func:`candidates`.

    Returns:
        A table, the most accurate on the validation data first, and the winner's coefficients.
    """
    tried = {
        f"alpha{alpha:.4g}_beta{beta:.4g}_gamma{gamma:.4g}": _rescaled(base, alpha, beta, gamma)
        for alpha, beta, gamma in candidates(step)
    }
    networks = {name: (scaling, 1.0) for name, scaling in tried.items()}
    results = train(_variants(networks), "val/acc")
    order = sorted(tried, key=lambda name: (-mean(results[name]["val/acc"]), mean(results[name]["val/loss"])))
    lines = ["| alpha | beta | gamma | pixels | parameters | MACs | validation accuracy | validation loss |"]
    lines += ["|---" * 8 + "|"]
    for name in order:
        scaling, cost = tried[name], tried[name].count(1, num_classes=num_classes)
        lines.append(
            f"| {scaling.alpha:.4g} | {scaling.beta:.4g} | {scaling.gamma:.4g} | {scaling.side(1)} | "
            f"{cost.parameters:,} | {cost.macs:,} | {_percent(results[name]['val/acc'])} | "
            f"{mean(results[name]['val/loss']):.4f} |"
        )
    best = tried[order[0]]
    lines += ["", f"best: --model.alpha {best.alpha:.4g} --model.beta {best.beta:.4g} --model.gamma {best.gamma:.4g}"]
    by_gamma: dict[str, list[tuple[float, float, float]]] = {}
    for name, scaling in tried.items():
        series = by_gamma.setdefault(f"gamma {scaling.gamma:.4g}", [])
        series.append(_point(scaling.beta, results[name]["val/acc"]))
    return Page(lines, by_gamma, "beta; alpha is what is left of alpha · beta² · gamma² = 2", "validation accuracy, %")


def compare(
    base: CompoundScaling, train: Train, num_classes: int = 1000, multiples: Sequence[float] = (2, 4, 8)
) -> Page:
    """Scaling by width, by depth, by resolution and by all three, at equal cost: figure 8 of the paper.

    Args:
        base: The network that is scaled, and the coefficients of the compound.
        train: Trains them.
        num_classes: Of the data, for counting what the networks cost.
        multiples: Budgets, in multiples of the base's multiply-accumulates. The largest network within each counts.

    Raises:
        ValueError: For a multiple that is not above 1, or too small for one of the ways to make a network within it.
    """
    if min(multiples) <= 1:
        raise ValueError(f"multiples are {', '.join(f'{each:g}' for each in multiples)}: expected all above 1")
    ways = {
        "width": _rescaled(base, 1.0, math.sqrt(2), 1.0),
        "depth": _rescaled(base, 2.0, 1.0, 1.0),
        "resolution": _rescaled(base, 1.0, 1.0, math.sqrt(2)),
        "compound": base,
    }
    networks, unit, unequal = {"base": (base, 0.0)}, base.count(0, num_classes=num_classes).macs, []
    for multiple in multiples:
        for way, scaling in ways.items():
            phi = scaling.for_macs(multiple * unit, num_classes=num_classes)
            networks[f"{way}_x{multiple:g}"] = scaling, phi
            share = scaling.count(phi, num_classes=num_classes).macs / (multiple * unit)
            unequal += [f"{way} x{multiple:g} {share:.0%}"] if share < EQUAL else []
    # Channels come in eights, blocks and pixels of the last feature map in ones: small networks grow in leaps.
    note = (
        f"not at equal cost, as the next larger network is beyond the budget: {', '.join(unequal)}" if unequal else ""
    )
    if note:
        print(note, flush=True)  # before hours of training
    results = train(_variants(networks), "test/acc")
    columns = "scaled by", "budget", "depth", "width", "pixels", "parameters", "MACs", "test accuracy", "each seed"
    lines = [f"| {' | '.join(columns)} | test loss |", "|---" * 10 + "|"]
    series: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
    for name, (scaling, phi) in networks.items():
        way, _, budget = name.partition("_")
        scale, cost, accuracies = (
            scaling.at(phi),
            scaling.count(phi, num_classes=num_classes),
            results[name]["test/acc"],
        )
        lines.append(
            f"| {way} | {budget} | {scale.depth:.2f} | {scale.width:.2f} | {scaling.side(phi)} | {cost.parameters:,} | "
            f"{cost.macs:,} | {_percent(accuracies)} | {', '.join(f'{100 * value:.2f}' for value in accuracies)} | "
            f"{mean(results[name]['test/loss']):.4f} |"
        )
        for points in series.values() if way == "base" else [series[way]]:
            points.append(_point(cost.macs / 1e6, accuracies))
    lines += ["", note] if note else []
    return Page(lines, series, "million multiply-accumulates an image", "test accuracy, %", log_x=True)


def base_of(arguments: Mapping[str, Any]) -> CompoundScaling:
    """The network that an :class:`EfficientNetClassifier` with all these arguments has, as something to scale further.

    Raises:
        ValueError: For a published variant, which the rule does not scale, and images that are not square.
    """
    if arguments["variant"] is not None:
        raise ValueError(
            f"variant {arguments['variant']} is a network of the table: scale phi, or depth and width, instead"
        )
    names = ("alpha", "beta", "gamma", "family", "depth", "width", "stem_stride", "in_channels")
    rule = CompoundScaling(**{name: arguments[name] for name in names})
    phi, size = float(arguments["phi"] or 0), arguments["image_size"]
    if isinstance(size, Sequence):
        raise ValueError(f"image_size is {size}: the images that are scaled are square, give one side")
    rule.check(phi, size)
    size = rule.side(phi) if size is None else size
    return _rescaled(rule, rule.alpha, rule.beta, rule.gamma, phi, size)


def _rescaled(
    base: CompoundScaling, alpha: float, beta: float, gamma: float, phi: float = 0.0, image_size: int | None = None
) -> CompoundScaling:
    """The base at a phi as a base of its own, scaled by other coefficients."""
    scale = base.at(phi)
    size = base.image_size if image_size is None else image_size
    depth, width = base.depth * scale.depth, base.width * scale.width
    return CompoundScaling(alpha, beta, gamma, base.family, depth, width, size, base.stem_stride, base.in_channels)


def _variants(networks: Mapping[str, tuple[CompoundScaling, float]]) -> dict[str, list[str]]:
    """Options of ``zoo fit`` that make each network."""
    variants = {}
    for name, (scaling, phi) in networks.items():
        scaling.check(phi)
        scale, side = scaling.at(phi), scaling.side(phi)
        depth, width = scaling.depth * scale.depth, scaling.width * scale.width
        network = ["--model.phi", "0", "--model.depth", repr(depth), "--model.width", repr(width)]
        variants[name] = [*network, "--model.image_size", str(side), "--data.image_size", str(side)]
    return variants


def _point(x: float, values: Sequence[float]) -> tuple[float, float, float]:
    """Point of the plot, in percent."""
    middle, deviation = spread(values)
    return x, 100 * middle, 100 * deviation


def _percent(values: Sequence[float]) -> str:
    return f"{spread_text(values, 2, scale=100)} %"
