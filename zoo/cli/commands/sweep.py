"""``zoo sweep`` and the studies of techniques: a recipe trained in variants and seeds, a table and a plot of them."""

import re
from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path

from zoo.cli import names, plots
from zoo.cli.arguments import RECIPE, STRICT, Arguments, Asked, Command, Line, positive
from zoo.cli.mistakes import Mistake
from zoo.cli.sweep import sweep_seeds
from zoo.common.study import Page, Recipe, Results, Study, spread, spread_text

END = "Every other option is one of zoo fit, and goes to all runs: --trainer.max_epochs 20"
VALUE = re.compile(r"(?:\[[^\]]*\]|\{[^}]*\}|[^,\[{])+")  # a comma inside of brackets is not between values
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)


def command_of(study: Study) -> Command:
    """The command that a study is."""
    passed_on = ((RECIPE[0], f"{study.recipes}; -c RECIPE as well") if study.recipes else RECIPE, STRICT)
    return Command(study.name, study.summary, partial(_arguments, study), partial(_run, study), passed_on)


def _arguments(study: Study) -> Arguments:
    parser = Arguments(study.name, "RECIPE [options of this command] [--option VALUE ...]", study.text, END)
    told = f"where runs, table and plot go; run it again to continue (runs/{study.name})"
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=Path("runs", study.name), help=told)
    told = f"runs of each, with seeds from 0 ({study.seeds})"
    parser.add_argument("--seeds", metavar="N", type=positive, default=study.seeds, help=told)
    parser.add_argument("--jobs", metavar="N", type=positive, default=1, help="how many run at a time (1)")
    for name, settings in study.options.items():
        parser.add_argument(f"--{name}", **settings)
    return parser


def _run(study: Study, line: Line) -> int:
    """Checks the recipe, lets the study have its variants trained, and writes what it has found."""
    asked = Asked.by(line, _arguments(study))
    if "over" in asked.own:
        asked.own["over"] = [(understood(options, asked), values) for options, values in asked.own["over"]]
    plan = asked.plan()
    plan.count_classes()
    config = plan.config
    if study.does and plan.model_name != study.does.split()[-1]:
        raise Mistake(f"{study.name} {study.does}, but the recipe has {config.model.class_path}: name another")
    if config.data is None:
        raise Mistake("--data is missing: name a recipe with -c (zoo list)")
    settable = config.data.as_dict().get("init_args", {})
    if missing := set(study.sets) - set(settable):
        what = f"the data's {' and '.join(study.sets)}"
        raise Mistake(f"{study.name} sets {what}: {config.data.class_path} has no {min(missing)}")
    out, seeds, jobs = (asked.own.pop(name) for name in ("out", "seeds", "jobs"))

    def train(variants: Mapping[str, Sequence[str]], needs: str | None) -> Results:
        read: set[str] = set()
        for options in variants.values():  # what cannot be read is said before anything runs
            if not read.issuperset(options):
                asked.plan(*options)
                read.update(options)
        own_seeds = [name for name in study.seeded if name in settable]
        return sweep_seeds(asked.files, asked.shared(), variants, seeds, out, jobs, needs, own_seeds)

    recipe = Recipe(config.model.as_dict().get("init_args", {}), plan.data(), config.trainer, out, train)
    page = study.run(recipe, **asked.own)
    text = "\n".join(page.lines)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(f"{text}\n\ntable {out / 'table.md'}")
    if page.series:
        plots.lines(out / "plot.png", page.series, page.x_label, page.y_label, page.log_x, page.ticks)
        print(f"plot {out / 'plot.png'}")
    return 0


# The study of whatever options.


def axis(text: str) -> tuple[str, list[str]]:
    """An option and its values, ``model.lr=0.1,0.3``; or options that change together, ``model.size,data.size=8``."""
    options, _, values = text.removeprefix("--").partition("=")
    found = [value.strip() for value in VALUE.findall(values)]
    if not all(options.split(",")) or not found or len(set(found)) < len(found):
        raise ArgumentTypeError(f"{text!r}: expected an option and its values, as in model.lr=0.1,0.3, each once")
    return options, found


def understood(options: str, asked: Asked) -> str:
    """The options of an axis as LightningCLI knows them."""
    typed = [*asked.options, *(f"--{option}=" for option in options.split(","))]
    meant = names.understood(typed, asked.files, "fit")[len(asked.options) :]
    return ",".join(option.removeprefix("--").removesuffix("=") for option in meant)


def _sweep(recipe: Recipe, over: Sequence[tuple[str, list[str]]], metric: str | None) -> Page:
    axes, variants = dict(over), {}
    if len(axes) < len(over) or not axes.keys().isdisjoint(("seed_everything", "data.seed")):
        raise Mistake("argument --over: each option once, and seeds are --seeds N")
    for values in product(*axes.values()):
        pairs = list(zip(axes, values, strict=True))
        name = "-".join(f"{options}={value}" for options, value in pairs).replace("/", "_")
        variants[name] = [f"--{option}={value}" for options, value in pairs for option in options.split(",")]
    return _page(axes, recipe.train(variants, metric), metric)


def _page(axes: Mapping[str, Sequence[str]], results: Results, metric: str | None) -> Page:
    """A line a variant, a column a metric that all have; plotted over an option, if there is one only."""
    first, *others = results.values()
    metrics = [name for name in first if all(name in other for other in others) and "/ap_by_class/" not in name]
    metric = metric or next((name for name in metrics if name.startswith("test/")), metrics[0])
    lines = [f"| {' | '.join([*axes, *metrics])} |", "|---" * (len(axes) + len(metrics)) + "|"]
    for values, found in zip(product(*axes.values()), results.values(), strict=True):
        lines.append(f"| {' | '.join([*values, *(spread_text(found[name], 4) for name in metrics)])} |")
    if len(axes) > 1:
        return Page(lines, {}, "", "")
    ((options, ticks),) = axes.items()
    numbers = all(NUMBER.fullmatch(tick) for tick in ticks)
    places = [float(tick) if numbers else float(place) for place, tick in enumerate(ticks)]
    points = [(x, *spread(found[metric])) for x, found in zip(places, results.values(), strict=True)]
    return Page(lines, {metric: points}, options, metric, ticks=() if numbers else ticks)


OVER = (
    "an option of zoo fit and its values, or options that change together, as in model.image_size,data.image_size=16,32"
)
OVER += "; given several times, every combination is tried"
METRIC = "what every run must have, and what is plotted if there is one --over (the first of test)"
SWEEP = Study(
    "sweep",
    "train a recipe with several values of an option, and compare",
    """\
Trains a recipe with each value of an option, or each combination of the values of several, and some seeds, and
compares the metrics: mean and standard deviation over the seeds. After each run it says how long the others will take.
Run again it continues: what is finished is kept.""",
    run=_sweep,
    options={
        "over": {"metavar": "OPTION=A,B", "type": axis, "action": "append", "required": True, "help": OVER},
        "metric": {"metavar": "NAME", "help": METRIC},
    },
)
