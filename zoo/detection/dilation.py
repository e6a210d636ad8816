"""Pilot study of TridentNet: AP by object size against the dilation of a stage, ``zoo dilation-study``.

Li et al. 2019, arXiv 1901.01892, section 3 and table 1. Theirs starts from ImageNet's weights, ours as the recipe says.
"""

from collections.abc import Iterable, Sequence
from statistics import mean

from zoo.common.study import Page, Recipe, spread, spread_text

AP = "test/ap"


def study(recipe: Recipe, dilations: Sequence[int] = (1, 2, 3)) -> Page:
    """Trains and tests a detector with each dilation of its backbone's stage of stride 16.

    Args:
        recipe: The detector's, which has ``dilations``.
        dilations: Which, each once.

    Returns:
        Average precision by object size: a table with a line a dilation, and a plot with a series a size.

    Raises:
        ValueError: For a model without ``dilations``, or with a branch for each; for a dilation below 1 or given twice.
    """
    if "dilations" not in recipe.model:
        raise ValueError("the recipe's model has no dilations: take a recipe of FPNDetector or FasterRCNN")
    if recipe.model.get("trident"):
        raise ValueError("the recipe's model has a branch for each dilation already: add --model.trident false")
    if min(dilations) < 1 or len(set(dilations)) < len(dilations):
        raise ValueError(f"dilations are {', '.join(map(str, dilations))}: expected numbers from 1 on, each once")
    results = recipe.train({f"dilation{each}": [f"--model.dilations=[{each}]"] for each in dilations}, AP)
    found = dict(zip(dilations, results.values(), strict=True))
    sizes = sizes_of(found[dilations[0]])
    titles = "dilation", "AP", *sizes.values(), "AP of each seed", "seconds"
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for dilation, metrics in found.items():
        cells = [spread_text(metrics[name], 1, scale=100) for name in (AP, *sizes)]
        each = ", ".join(f"{100 * value:.1f}" for value in metrics[AP])
        lines.append(f"| {dilation} | {' | '.join(cells)} | {each} | {mean(metrics['seconds']):.0f} |")
    series = {
        title: [(dilation, *spread([100 * value for value in metrics[name]])) for dilation, metrics in found.items()]
        for name, title in sizes.items()
    }
    return Page(lines, series, "dilation of the stage of stride 16", "AP")


def sizes_of(metrics: Iterable[str]) -> dict[str, str]:
    """Titles of the metrics that are average precision at a range of sizes: ``8 to 16`` of ``test/ap_8_16``."""
    names = [name for name in metrics if name.startswith(f"{AP}_") and not name.startswith(f"{AP}_by_class/")]
    return {name: name.removeprefix(f"{AP}_").replace("_", " to ") for name in names}
