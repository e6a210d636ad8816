"""A study: a command that trains a recipe in variants and compares them, as a technique declares it.

It does so in a file ``commands.py`` of its folder, which imports torch only inside of functions: ``COMMANDS`` is a list
of :class:`Study`, and of :class:`zoo.common.inspection.Inspection`. ``zoo.cli`` finds them, trains the variants,
continues what was interrupted, and writes the page.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Results = Mapping[str, Mapping[str, Sequence[float]]]
"""By variant and metric, one value for each seed."""
Train = Callable[[Mapping[str, Sequence[str]], str | None], Results]
"""Trains variants with all seeds. It takes the options of each, such as ``["--model.lr", "0.1"]``, by a name that makes
a good directory, and the metric that the runs are for, if it is one: a run that ends without it is a failure."""


class Recipe(NamedTuple):
    """Recipe of a study: model, data, Trainer, and how variants are trained."""

    model: Mapping[str, Any]  # the arguments of its constructor
    data: Any  # the data module
    trainer: Mapping[str, Any]  # settings of the Trainer
    out: Path  # the folder of the study; the run of a variant and a seed is in VARIANT_seedN
    train: Train


class Page(NamedTuple):
    """Results of a study: a table, and a plot."""

    lines: Sequence[str]  # a table in markdown, and what belongs to it
    series: Mapping[str, Sequence[tuple[float, float, float]]]  # of the plot: by its name, points (x, y, error)
    x_label: str  # with units
    y_label: str
    log_x: bool = False  # whether x is drawn on a logarithmic scale
    ticks: Sequence[str] = ()  # names of x = 0, 1 and so on, where they are no numbers


class Study(NamedTuple):
    """A command ``zoo NAME RECIPE``."""

    name: str
    summary: str  # its line in zoo --help
    text: str  # what its own help says that it does
    run: Callable[..., Page]  # of a Recipe and the values of its own options, by name
    does: str = ""  # in a verb and the class of the models it takes, "trains a GumbelVAE"; empty for all
    recipes: str = ""  # which recipes it takes, for its help
    sets: Sequence[str] = ()  # the arguments of the data that it sets
    seeds: int = 3  # runs of each variant, unless somebody says otherwise
    seeded: Sequence[str] = ("seed",)  # the arguments of the data, of those it has, that are the seed of a run
    options: Mapping[str, Mapping[str, Any]] = {}  # its own, --step by the name step: arguments of add_argument


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation; of one value 0."""
    from statistics import mean, stdev  # here: every command would wait for it

    return mean(values), stdev(values) if len(values) > 1 else 0.0


def spread_text(values: Sequence[float], digits: int, scale: float = 1.0) -> str:
    """``0.98 ± 0.01``, or of one value ``0.98``."""
    middle, deviation = spread(values)
    text = f"{scale * middle:.{digits}f}"
    return f"{text} ± {scale * deviation:.{digits}f}" if len(values) > 1 else text
