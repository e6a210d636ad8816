"""Plots: a few lines with error bars, dots by column, tiles in one scale of colours."""

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path

from zoo.common.inspection import Dots, Tiles

OUTSIDE = 6  # more series than this have their legend beside the plot: inside it would cover them


def lines(
    path: Path,
    series: Mapping[str, Sequence[tuple[float, float, float]]],
    x_label: str,
    y_label: str,
    log_x: bool = False,
    ticks: Sequence[str] = (),
) -> None:
    """Draws each series as a line through its points with error bars.

    Args:
        path: Of the picture; the ending says its format.
        series: By what the legend calls it, points (x, y, error).
        x_label, y_label: With units.
        log_x: Whether x is drawn on a logarithmic scale.
        ticks: Names of x = 0, 1 and so on, where they are no numbers.
    """
    from matplotlib.figure import Figure  # here: it takes a third of a second to import
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for (name, points), marker in zip(series.items(), "osD^vPX*" * len(series), strict=False):
        x, y, error = zip(*sorted(points), strict=True)
        axes.errorbar(x, y, error, marker=marker, markersize=5, capsize=3, linewidth=1.4, label=name)
    if log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))  # 2, and not 2 x 10^0
        axes.xaxis.set_minor_formatter(NullFormatter())
    if ticks:
        axes.set_xticks(range(len(ticks)), ticks, rotation=30, ha="right")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    if len(series) > OUTSIDE:
        figure.legend(loc="outside right center", fontsize="small")
    else:
        axes.legend()
    figure.savefig(path, dpi=120)


def dots(path: Path, drawn: Dots) -> None:
    """Draws dots above 1, 2 and so on, with a line through the means of each column."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    points = [(x, y) for x, column in enumerate(drawn.columns, 1) for y in column if isfinite(y)]
    means = {x: [y for place, y in points if place == x] for x, _ in points}
    axes.scatter([x for x, _ in points], [y for _, y in points], s=22, alpha=0.6, label=drawn.dot)
    axes.plot(list(means), [sum(ys) / len(ys) for ys in means.values()], linewidth=1.4, color="C1", label="mean")
    level, name = drawn.level
    axes.axhline(level, linestyle="--", linewidth=1, color="grey", label=name)
    axes.set_xlabel(drawn.x_label)
    axes.set_ylabel(drawn.y_label)
    axes.set_ylim(0, 1.08 * max([level, *(y for _, y in points)]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def tiles(path: Path, drawn: Tiles) -> None:
    """Draws maps beside and below each other, with a bar of the colours."""
    import numpy as np
    from matplotlib.figure import Figure

    rows, columns, height, width = drawn.values.shape
    gap = max(1, round(0.1 * max(height, width)))
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap), np.nan)
    for (row, column), _ in np.ndenumerate(canvas[:: height + gap, :: width + gap]):
        top, left = row * (height + gap), column * (width + gap)
        canvas[top : top + height, left : left + width] = drawn.values[row, column].numpy()
    side = max(5.6, max(canvas.shape) / 90)  # inches: each value has a pixel at least
    figure = Figure(figsize=(side * 1.15, side), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(canvas, cmap="viridis", vmin=drawn.low, vmax=drawn.high, interpolation="nearest")
    for axis, count, step, size in (
        (axes.xaxis, columns, width + gap, width),
        (axes.yaxis, rows, height + gap, height),
    ):
        every = -(-count // 16)  # numbers that have room
        places = range(0, count, every)
        axis.set_ticks([place * step + (size - 1) / 2 for place in places], [str(place + 1) for place in places])
        axis.set_tick_params(length=0)
    for edge in axes.spines.values():
        edge.set_visible(False)
    axes.set_xlabel(drawn.x_label)
    axes.set_ylabel(drawn.y_label)
    figure.colorbar(shown, ax=axes, label=drawn.label, shrink=0.8)
    figure.savefig(path, dpi=120)
