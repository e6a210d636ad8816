"""``zoo sweep`` and the studies of techniques: a recipe trained in variants and seeds, a table and a plot of them."""

import re
from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zoo
from zoo.cli import plots
from zoo.cli.arguments import RECIPE, STRICT, Arguments, Asked, Command, Line, positive
from zoo.cli.mistakes import Mistake
from zoo.cli.sweep import sweep_seeds
from zoo.common.study import Page, Recipe, Results, Study

if TYPE_CHECKING:
    from zoo.cli.plan import Plan

TEXT = """\
Trains a recipe with each value of an option, or each combination of the values of several, and some seeds, and compares
the metrics: mean and standard deviation over the seeds. After each run it says how long the others will take. Run again
it continues: what is finished is kept."""
END = "Every other option is one of zoo fit, and goes to all runs: --trainer.max_epochs 20"
USAGE = "RECIPE [options of this command] [--option VALUE ...]"
VALUE = re.compile(r"(?:\[[^\]]*\]|\{[^}]*\}|[^,\[{])+")  # a comma inside of brackets is not between values

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)


def _arguments(name: str, text: str, seeds: int) -> Arguments:
    parser = Arguments(name, USAGE, text, END)
    told = f"where runs, table and plot go; run it again to continue (runs/{name})"
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=Path("runs", name), help=told)
    told = f"runs of each, with seeds from 0 ({seeds})"
    parser.add_argument("--seeds", metavar="N", type=positive, default=seeds, help=told)
    parser.add_argument("--jobs", metavar="N", type=positive, default=1, help="how many run at a time (1)")
    return parser


def _checked(asked: Asked, name: str, sets: Sequence[str] = (), does: str | None = None) -> "Plan":
    """The recipe, if it has the data and the model that the runs set options of."""
    plan = asked.plan()
    plan.count_classes()
    model, data = plan.config.model.class_path, plan.config.data
    if does is not None and plan.model_name != does.split()[-1]:
        raise Mistake(f"{name} {does}, but the recipe has {model}")
    if data is None:
        raise Mistake("--data is missing: name a recipe with -c (zoo list)")
    if missing := set(sets) - set(vars(data.init_args)):
        raise Mistake(f"{name} sets the data's {' and '.join(sets)}: {data.class_path} has no {min(missing)}")
    return plan


def _told(page: Page, out: Path) -> int:
    """Writes and prints what was found."""
    text = "\n".join(page.lines)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(f"{text}\n\ntable {out / 'table.md'}")
    if page.series:
        plots.lines(out / "plot.png", page.series, page.x_label, page.y_label, page.log_x, page.ticks)
        print(f"plot {out / 'plot.png'}")
    return 0


# Over the values of options.


def axis(text: str) -> tuple[str, list[str]]:
    """An option and its values, ``model.lr=0.1,0.3``; or options that change together, ``model.size,data.size=8``."""
    options, _, values = text.removeprefix("--").partition("=")
    found = [value.strip() for value in VALUE.findall(values)]
    if not all(options.split(",")) or not found or len(set(found)) < len(found):
        raise ArgumentTypeError(f"{text!r}: expected an option and its values, as in model.lr=0.1,0.3, each once")
    return options, found


def _options(options: str, value: str) -> list[str]:
    return [f"--{option}={value}" for option in options.split(",")]


def _sweep_arguments() -> Arguments:
    parser = _arguments("sweep", TEXT, seeds=3)
    told = (
        "an option of zoo fit and its values, or options that change together, as in model.image_size,data.image_size"
    )
    told += "=16,32; given several times, every combination is tried"
    parser.add_argument("--over", metavar="OPTION=A,B", type=axis, action="append", required=True, help=told)
    told = "what every run must have, and what is plotted if there is one --over (the first of test)"
    parser.add_argument("--metric", metavar="NAME", help=told)
    return parser


def _sweep(line: Line) -> int:
    asked = Asked.by(line, _sweep_arguments())
    axes, out, metric = dict(asked.own["over"]), asked.own["out"], asked.own["metric"]
    if len(axes) < len(asked.own["over"]) or not axes.keys().isdisjoint(("seed_everything", "data.seed")):
        raise Mistake("argument --over: each option once, and seeds are --seeds N")
    data = _checked(asked, "sweep").config.data
    for options, values in axes.items():
        for value in values:  # what cannot be read is said before anything runs
            asked.plan(*_options(options, value))
    variants = {}
    for values in product(*axes.values()):
        pairs = list(zip(axes, values, strict=True))
        name = "-".join(f"{options}={value}" for options, value in pairs).replace("/", "_")
        variants[name] = [option for pair in pairs for option in _options(*pair)]
    seeds, jobs, seeded = asked.own["seeds"], asked.own["jobs"], "seed" in vars(data.init_args)
    results = sweep_seeds(asked.files, asked.shared(), variants, seeds, out, jobs, metric, seeded)
    return _told(_page(axes, results, metric), out)


def _page(axes: Mapping[str, Sequence[str]], results: Results, metric: str | None) -> Page:
    """A line a variant, a column a metric that all have; plotted over an option, if there is one only."""
    first, *others = results.values()
    metrics = [name for name in first if all(name in other for other in others) and "/ap_by_class/" not in name]
    metric = metric or next((name for name in metrics if name.startswith("test/")), metrics[0])
    lines = [f"| {' | '.join([*axes, *metrics])} |", "|---" * (len(axes) + len(metrics)) + "|"]
    for values, found in zip(product(*axes.values()), results.values(), strict=True):
        lines.append(f"| {' | '.join([*values, *(_cell(found[name]) for name in metrics)])} |")
    if len(axes) > 1:
        return Page(lines, {}, "", "")
    ((options, ticks),) = axes.items()
    numbers = all(NUMBER.fullmatch(tick) for tick in ticks)
    places = [float(tick) if numbers else float(place) for place, tick in enumerate(ticks)]
    points = [(x, *_spread(found[metric])) for x, found in zip(places, results.values(), strict=True)]
    return Page(lines, {metric: points}, options, metric, ticks=() if numbers else ticks)


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation."""
    from statistics import mean, stdev  # here: every command would wait for it

    return mean(values), stdev(values) if len(values) > 1 else 0.0


def _cell(values: Sequence[float]) -> str:
    middle, spread = _spread(values)
    return f"{middle:.4f} ± {spread:.4f}" if len(values) > 1 else f"{middle:.4f}"


COMMAND = Command(
    "sweep",
    "train a recipe with several values of an option, and compare",
    _sweep_arguments,
    _sweep,
    (RECIPE, STRICT),
)


# As techniques declare them.


def _study_arguments(study: Study) -> Arguments:
    parser = _arguments(study.name, study.text, study.seeds)
    for name, settings in study.options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **settings)
    return parser


def _study(study: Study, line: Line) -> int:
    asked = Asked.by(line, _study_arguments(study))
    plan = _checked(asked, study.name, study.sets, study.does)
    own: dict[str, Any] = dict(asked.own)
    out, seeds, jobs = (own.pop(name) for name in ("out", "seeds", "jobs"))

    def train(variants: Any, needs: str) -> Results:
        return sweep_seeds(asked.files, asked.shared(), variants, seeds, out, jobs, needs)

    config = plan.config
    recipe = Recipe(config.model.init_args.as_dict(), plan.data(), config.trainer, out, train)
    return _told(study.run(recipe, **own), out)


def of_techniques() -> list[Command]:
    """The studies in techniques' files ``commands.py``, which are read by themselves: their packages import torch."""
    found: list[Study] = []
    for technique in dict.fromkeys(zoo._EXPORTS.values()):
        file = Path(zoo.__file__).parent / technique / "commands.py"
        spec = spec_from_file_location(f"zoo.{technique}.commands", file) if file.is_file() else None
        if spec is not None and spec.loader is not None:
            module = module_from_spec(spec)
            spec.loader.exec_module(module)
            found += module.COMMANDS
    return [
        Command(
            study.name,
            study.summary,
            partial(_study_arguments, study),
            partial(_study, study),
            ((RECIPE[0], f"{study.recipes}; -c RECIPE as well"), STRICT),
        )
        for study in found
    ]
