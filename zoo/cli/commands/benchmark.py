"""``zoo benchmark``: what is asked is checked, measured and written as a table; and ``zoo benchmark compare``."""

import json
import re
import sys
from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli import recipes
from zoo.cli.arguments import RECIPE, STRICT, Arguments, Asked, Command, Line, percent, positive, seconds
from zoo.cli.benchmark import cells
from zoo.cli.mistakes import Mistake, did_you_mean
from zoo.cli.sweep import taking_runs_along

if TYPE_CHECKING:
    from zoo.cli.plan import Plan

FITS = ("seed_everything", "guards", "model", "data", "trainer")  # options of zoo fit without a dot, which all may have

TEXT = """\
Measures a recipe in a fresh process for every combination of the axes: images a second, the time of a step, memory, the
share of the device's peak, and what limits it. Writes a JSON file a cell, a table and a plot."""
END = """\
Every other option is one of zoo fit, and goes to all cells. The status is 1 if a cell failed or ran out of memory, or
if none could be measured; a device or a peer's package that is not here is a row, and no failure."""
COMPARE = """\
Sets two benchmarks side by side. The status is 1 if a cell has become slower by more than --max-regression and its
spread, or is missing or failed in AFTER."""
ON_OFF = "false true"
VALUES = {"precision": "32-true bf16-mixed", "compile": ON_OFF, "channels_last": ON_OFF, "grad_checkpointing": ON_OFF}
VALUES |= {"batch_size": "64 256", "image_size": "160 224", "num_workers": "0 4", "accelerator": "cpu gpu"}
VALUES |= {"devices": "1 2", "strategy": "ddp"}
"""By axis, values for the help."""


def _arguments() -> Arguments:
    parser = Arguments("benchmark", "RECIPE ... [axes and options of this command] [--option VALUE ...]", TEXT, END)
    own = parser.add_argument_group("options")
    modes = "; ".join(f"{name}: {text}" for name, text in cells.MODES.items())
    own.add_argument("--mode", metavar="MODE", nargs="+", default=["step"], help=f"{modes} (step)")
    told = "others that do the same, in the same run; without names all there are"
    own.add_argument("--peers", metavar="NAME", nargs="*", help=told)
    told = "where files, table and plot go (runs/benchmark/RECIPE/version_N)"
    own.add_argument("--out", metavar="FOLDER", type=Path, help=told)
    told = "processes for each cell, which take turns (3)"
    own.add_argument("--repeats", metavar="N", type=positive, default=3, help=told)
    own.add_argument("--steps", metavar="N", type=positive, default=50, help="so many steps are measured at least (50)")
    told = "and for so long (5)"
    own.add_argument("--seconds", metavar="S", type=partial(seconds, zero=True), default=5.0, help=told)
    own.add_argument("--limit", metavar="S", type=seconds, default=60.0, help="but no longer than this (60)")
    own.add_argument("--cell", metavar="FILE", nargs=3, type=Path, help=SUPPRESS)  # to be the process of one
    axes = parser.add_argument_group("axes, each with one value or several")
    for axis, options in cells.AXES.items():
        name, told = axis.replace("_", "-"), f"{' and '.join(options)}, as in {VALUES[axis]}"
        axes.add_argument(f"--{name}", metavar="X", nargs="+", help=told)
        if name != axis:  # as the option is spelled
            axes.add_argument(f"--{axis}", dest=axis, nargs="+", default=SUPPRESS, help=SUPPRESS)
    return parser


def _run(line: Line) -> int:
    """Measures every cell; or is the process of one. 1 if a cell failed."""
    from zoo.cli.benchmark import report

    asked = Asked.by(line, _arguments(), recipe_required="--cell" not in line.options)
    own, files = asked.own, asked.files
    if own["cell"] is not None:
        from zoo.cli.benchmark import process

        asking, found, runs = own["cell"]
        process.answer(asking, found, runs, line.strict)
        return 0
    _check_names(own, asked.options)
    plan = asked.plan()
    known, chosen = _options(plan), {axis: own[axis] for axis in cells.AXES if own[axis]}
    for axis in chosen:
        if not known & set(cells.AXES[axis]):
            raise Mistake(f"{plan.model_name} has no {axis}: leave --{axis.replace('_', '-')} out")
    measured = cells.cells(own["mode"], chosen, _peers(plan, own["peers"], own["mode"]))
    for cell in {tuple(cells.options_of(cell, known)) for cell in measured}:  # what cannot be read is said at once
        _check_sizes(asked.plan(*cell).config)
    out = own["out"] or new_folder(files[0])
    _check_empty(out, {cell.name for cell in measured}, files)
    goal = {name: own[name] for name in ("steps", "seconds", "limit")}
    with taking_runs_along():
        rows = cells.run(measured, files, asked.shared(), known, goal, own["repeats"], out)
    print(_written(rows, out))
    return _told("not measured", report.failures(rows))


def _check_names(own: Mapping[str, Any], options: Sequence[str]) -> None:
    for mode in own["mode"]:
        if mode not in cells.MODES:
            hint = did_you_mean(mode, cells.MODES) or f": expected {', '.join(cells.MODES)}"
            raise Mistake(f"unknown mode {mode!r}{hint}")
    names, axes = ([name.replace("_", "-") for name in each] for each in (own, cells.AXES))
    for option in options:
        name = option.removeprefix("--").partition("=")[0]
        if name == "trainer.devices":  # a recipe's number is that of another machine, and not taken
            raise Mistake(f"{option}: here it is an axis, --devices")
        if option.startswith("--") and "." not in name and name not in FITS:
            hint = did_you_mean(name, names) or f": the axes are {', '.join(axes)}"
            raise Mistake(f"unknown option {option}{hint}")


def _check_sizes(config: Any) -> None:
    """Refuses batches without images, of which nothing can be measured but that there are none."""
    parts = {"trainer": config.trainer, "model": config.model.init_args, "data": config.data and config.data.init_args}
    for axis, least in cells.LEAST.items():
        for option in cells.AXES[axis]:
            part, name = option.removeprefix("--").split(".")
            value = (parts[part] or {}).get(name)
            if name == "devices" and isinstance(value, str):
                if not re.fullmatch(r"auto|-?\d+|[\d, ]+", value):
                    raise Mistake(f"{option} is {value}: expected a number, devices as in 0,1, or auto")
                value = int(value) if re.fullmatch(r"-?\d+", value) else None
            sides = value if isinstance(value, list | tuple) and name != "devices" else [value]  # there: their indices
            if any(isinstance(side, int) and side < least for side in sides):
                raise Mistake(f"{option} is {value}: expected at least {least}")


def _options(plan: "Plan") -> set[str]:
    """Arguments of model, data and Trainer that a cell may set."""
    config = plan.config
    parts = {"trainer": config.trainer, "model": config.model.init_args}
    if config.data is not None:
        parts["data"] = config.data.init_args
    return {f"--{part}.{name}" for part, settings in parts.items() for name in vars(settings)}


def _peers(plan: "Plan", names: Sequence[str] | None, modes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Modes that each peer is measured in."""
    if names is None:
        return {}
    from zoo.cli.benchmark import peers

    technique, known = plan.model_name, peers.peers_of(*plan.class_paths)
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known) or (f": there are {', '.join(known)}" if known else "; it has none")
            raise Mistake(f"{technique} has no peer {name!r}{hint}")
    found = {name: peer.modes for name, peer in known.items() if not names or name in names}
    if not any(set(modes) & set(peer) for peer in found.values()):
        raise Mistake(f"there is no peer of {technique} for --mode {' '.join(modes)}: leave --peers out")
    return found


def new_folder(recipe: str) -> Path:
    """The first ``runs/benchmark/RECIPE/version_N`` that is not there yet, of a recipe's file."""
    name = next((name for name, file in recipes.recipes().items() if str(file) == recipe), Path(recipe).stem)
    versions = (Path("runs", "benchmark", name, f"version_{number}") for number in count())
    return next(folder for folder in versions if not folder.exists())


def _check_empty(out: Path, names: set[str], configs: list[str]) -> None:
    """Refuses a folder with another benchmark's files, which would be lost, or be taken for a part of this one."""
    for file in sorted(out.glob("*.json")):
        if file.stem not in names or json.loads(file.read_text(encoding="utf-8")).get("configs") != configs:
            raise Mistake(f"{out} holds {file.name} of another benchmark: name another --out, or remove it")


def _written(rows: Sequence[Mapping[str, Any]], out: Path) -> str:
    """The table in ``out/table.md`` and the plot beside it, if there is something to draw; what is printed of them."""
    from zoo.cli.benchmark import report

    text, picture = report.page(rows), out / "plot.png"
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    picture.unlink(missing_ok=True)  # it may be that of an earlier try
    drawn = f"\nplot {picture}" if report.plot(rows, picture) else ""
    return f"\n{text}\n\ntable {out / 'table.md'}{drawn}"


def _compare_arguments() -> Arguments:
    parser = Arguments("benchmark compare", "BEFORE AFTER [--max-regression 5%]", COMPARE)
    for name in ("before", "after"):
        parser.add_argument(
            name, metavar=name.upper(), type=Path, help="a benchmark's folder, or one of its JSON files"
        )
    told = "the share by which a cell may be slower (5%%)"
    parser.add_argument("--max-regression", metavar="SHARE", type=percent, default=0.05, help=told)
    return parser


def _compare(line: Line) -> int:
    """Prints the table; 1 if something has become too slow, or is lost."""
    from zoo.cli.benchmark import report

    own = _compare_arguments().parse_args([*line.words, *line.options])
    text, slower, lost = report.compare(report.read(own.before), report.read(own.after), own.max_regression)
    print(text)
    return _told("slower than allowed", slower) | _told(f"not measured in {own.after}", lost)


def _told(what: str, lines: list[str]) -> int:
    """Names what went wrong, a line each; the exit status is 1 if something did."""
    for line in lines:
        print(f"zoo: {what}: {line}", file=sys.stderr)
    return 1 if lines else 0


COMMANDS = [
    Command(
        "benchmark",
        "how fast a recipe trains and predicts here, and beside others",
        _arguments,
        _run,
        (RECIPE, STRICT),
    ),
    Command("benchmark compare", "two benchmarks side by side", _compare_arguments, _compare),
]
