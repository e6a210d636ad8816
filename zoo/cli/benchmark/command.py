"""What ``zoo benchmark`` does: it checks what is asked, has it measured, and writes the table."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

from zoo.cli import recipes
from zoo.cli.benchmark import cells, peers, report
from zoo.cli.blueprint import Blueprint, read
from zoo.cli.mistakes import Mistake, did_you_mean
from zoo.cli.sweep import taking_runs_along

OWN = ("mode", "peers", "out", "repeats", "steps", "seconds", "limit")
FITS = ("seed_everything", "guards", "model", "data", "trainer")  # options of zoo fit without a dot, which all may have


def run(
    configs: list[str],
    options: list[str],
    strict: bool,
    packages: Iterable[ModuleType],
    *,
    out: Path | None,
    mode: Sequence[str],
    peers: Sequence[str] | None,
    repeats: int,
    steps: int,
    seconds: float,
    limit: float,
    **axes: Sequence[str] | None,
) -> tuple[str, list[str]]:
    """Measures every cell and returns what is printed, the table and where it is, and a line for each failure.

    Args:
        configs, options, strict, packages: Of the recipe; see :func:`zoo.cli.run.run`.
        out: The folder for JSON files, table and plot. None: a new one under runs/benchmark.
        mode: What is measured.
        peers: Who is measured as well: names, an empty list for all, None for nobody.
        repeats: Processes of each cell.
        steps, seconds, limit: See :class:`zoo.cli.benchmark.clock.Goal`.
        axes: By axis, its values, or None.

    Raises:
        Mistake: For what does not exist, what this recipe does not have, or a size that is none.
    """
    _check_names(mode, options)
    plan = read(configs, options, strict, packages)
    known, chosen = _options(plan), {axis: values for axis, values in axes.items() if values}
    for axis in chosen:
        if not known & set(cells.AXES[axis]):
            model = _class(plan.config.fit.model)
            raise Mistake(f"{model} has no {axis}: leave --{axis.replace('_', '-')} out")
    asked = cells.cells(mode, chosen, _peers(plan, peers, mode))
    for cell in {tuple(cells.options_of(cell, known)) for cell in asked}:  # what cannot be read is said at once
        _check_sizes(read(configs, [*options, *cell], strict, packages).config.fit)
    goal = {"steps": steps, "seconds": seconds, "limit": limit}
    shared = [*options, *(["--strict-imports"] if strict else [])]
    out = out or new_folder(configs[0])
    _check_empty(out, {cell.name for cell in asked}, configs)
    with taking_runs_along():
        rows = cells.run(asked, configs, shared, known, goal, repeats, out)
    return _written(rows, out), report.failures(rows)


def _check_names(modes: Sequence[str], options: Sequence[str]) -> None:
    for mode in modes:
        if mode not in cells.MODES:
            hint = did_you_mean(mode, cells.MODES) or f": expected {', '.join(cells.MODES)}"
            raise Mistake(f"unknown mode {mode!r}{hint}")
    axes = [axis.replace("_", "-") for axis in cells.AXES]
    for option in options:
        name = option.removeprefix("--").partition("=")[0]
        if name == "trainer.devices":  # a recipe's number is that of another machine, and not taken
            raise Mistake(f"{option}: here it is an axis, --devices")
        if option.startswith("--") and "." not in name and name not in FITS:
            hint = did_you_mean(name, [*axes, *OWN]) or f": the axes are {', '.join(axes)}"
            raise Mistake(f"unknown option {option}{hint}")


def _check_sizes(config: Any) -> None:
    """Nothing can be measured of batches without images; that there are none would be a figure."""
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


def _options(plan: Blueprint) -> set[str]:
    """Those of model, data and Trainer that a cell may set."""
    config = plan.config.fit
    parts = {"trainer": config.trainer, "model": config.model.init_args}
    if config.data is not None:
        parts["data"] = config.data.init_args
    return {f"--{part}.{name}" for part, settings in parts.items() for name in vars(settings)}


def _peers(plan: Blueprint, names: Sequence[str] | None, modes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """By peer, the modes it is measured in."""
    if names is None:
        return {}
    model, data = plan.config.fit.model, plan.config.fit.data
    technique, known = _class(model), peers.peers_of(model.class_path, data and data.class_path)
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known) or (f": there are {', '.join(known)}" if known else "; it has none")
            raise Mistake(f"{technique} has no peer {name!r}{hint}")
    found = {name: peer.modes for name, peer in known.items() if not names or name in names}
    if not any(set(modes) & set(peer) for peer in found.values()):
        raise Mistake(f"there is no peer of {technique} for --mode {' '.join(modes)}: leave --peers out")
    return found


def _class(part: Any) -> str:
    return str(part.class_path).split(".")[-1]


def new_folder(recipe: str) -> Path:
    """The first ``runs/benchmark/RECIPE/version_N`` that is not there yet, of a recipe's file."""
    name = next((name for name, file in recipes.recipes().items() if str(file) == recipe), Path(recipe).stem)
    versions = (Path("runs", "benchmark", name, f"version_{number}") for number in count())
    return next(folder for folder in versions if not folder.exists())


def _check_empty(out: Path, names: set[str], configs: list[str]) -> None:
    """Files of the same benchmark are measured anew; those of another would be lost, or be taken for a part of it."""
    for file in sorted(out.glob("*.json")):
        if file.stem not in names or json.loads(file.read_text(encoding="utf-8")).get("configs") != configs:
            raise Mistake(f"{out} holds {file.name} of another benchmark: name another --out, or remove it")


def _written(rows: Sequence[Mapping[str, Any]], out: Path) -> str:
    """The table in ``out/table.md`` and the plot beside it, if there is something to draw; what is printed of them."""
    text, picture = report.page(rows), out / "plot.png"
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    picture.unlink(missing_ok=True)  # it may be that of an earlier try
    drawn = f"\nplot {picture}" if report.plot(rows, picture) else ""
    return f"\n{text}\n\ntable {out / 'table.md'}{drawn}"
