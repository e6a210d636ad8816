"""Plots of a few lines with error bars."""

from collections.abc import Mapping, Sequence
from pathlib import Path

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
