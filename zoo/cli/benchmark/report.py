"""Table and plot of a benchmark; comparison of two."""

import json
import statistics
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from zoo.cli.benchmark.cells import FAILED, NOT_HERE, SCHEMA
from zoo.cli.mistakes import Mistake

Row = Mapping[str, Any]
TITLES = ("images/s", "ms a step (p10 to p90)", "GiB", "MFU", "limit", "relative", "of `step`")


class Rate:
    """Images a second of a cell: the median of its runs, and how far the runs lie apart."""

    def __init__(self, row: Row) -> None:
        self.runs = [run["images_per_second"] for run in row["runs"]]
        self.median = statistics.median(self.runs)
        step = row["runs"][0]["step_ms"]
        # With one run, what is known of the spread is that of its steps.
        self.step_spread = (step["p90"] - step["p10"]) / step["median"]


def ratio(ours: Row, base: Row, paired: bool = True) -> tuple[float, float]:
    """Ratio of two cells' speeds, and the spread of that.

    Cells of one benchmark take turns, so that runs of the same round belong together: the ratio is the median over the
    rounds, the spread its range. Of two benchmarks every run is set against every other. With one run of each the
    spread is that of the steps, 10th to 90th percentile.

    Args:
        ours, base: The cells.
        paired: Whether they took turns.
    """
    a, b = Rate(ours), Rate(base)
    pairs = zip(a.runs, b.runs, strict=False) if paired else product(a.runs, b.runs)
    found = [x / y for x, y in pairs]
    middle = statistics.median(found)
    if len(found) > 1:
        return middle, max(found) - min(found)
    return middle, middle * (a.step_spread + b.step_spread) / 2


def ratio_text(ours: Row, base: Row, paired: bool = True) -> str:
    """A ratio, or that there is none to speak of: one that is smaller than its own spread is not printed."""
    middle, spread = ratio(ours, base, paired)
    if abs(middle - 1) <= spread:
        return f"within {100 * spread:.2g} %"
    return f"{middle:.3g}×"


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line a cell. An axis of one value has no column.

    "relative" is to the first row of the same mode, "of step" to the loop written by hand, where both were measured.
    """
    axes = _varying(rows)
    titles = ["mode", "who", *axes, *TITLES]
    lines = [titles, ["---"] * len(titles)]
    bases: dict[str, Row] = {}
    by_hand = {_key(row, "step"): row for row in rows if row["cell"]["mode"] == "step" and row["status"] == "ok"}
    for row in rows:
        cell = row["cell"]
        start = [cell["mode"], cell["peer"] or "zoo", *(cell["axes"].get(axis, "") for axis in axes)]
        if row["status"] != "ok":
            lines.append([*start, f"{row['status']}: {row['message']}", *[""] * 6])
            continue
        base = bases.setdefault(cell["mode"], row)
        step = by_hand.get(_key(row, "step")) if cell["mode"] in ("fit", "e2e") else None
        ratios = ["1" if base is row else ratio_text(row, base), "" if step is None else ratio_text(row, step)]
        lines.append([*start, *_figures(row), *ratios])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _varied(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Values of each axis."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        for axis, value in row["cell"]["axes"].items():
            found.setdefault(axis, {})[value] = None
    return {axis: list(values) for axis, values in found.items()}


def _varying(rows: Sequence[Row]) -> list[str]:
    """The axes that tell rows apart."""
    return [axis for axis, values in _varied(rows).items() if len(values) > 1]


def _figures(row: Row) -> list[str]:
    runs = row["runs"]
    middle = sorted(runs, key=lambda run: run["step_ms"]["median"])[len(runs) // 2]
    step = middle["step_ms"]
    times = f"{step['median']:.4g} ({step['p10']:.4g} to {step['p90']:.4g})"
    memory = max(max(run["memory_gib"].values()) for run in runs)
    limit = middle["limit"]
    if limit == "data" and "waiting" in middle:
        limit = f"data, {100 * middle['waiting']:.0f} % waiting"
    elif limit == "host":
        limit = f"host, {middle['issued_ms']:.3g} ms to issue"
    return [f"{Rate(row).median:.4g}", times, f"{memory:.2f}", utilisation(row), limit]


def utilisation(row: Row) -> str:
    """Model FLOP utilisation: counted operations against the dense peak of all devices. n/a where that is not known."""
    run = row["runs"][0]
    if run["device"] != "cuda" or not run.get("peak_flops") or not run.get("flops_per_image"):
        return "n/a"
    share = run["flops_per_image"] * Rate(row).median / (run["peak_flops"] * run["processes"])
    return f"{100 * share:.1f} %"


def notes(rows: Sequence[Row]) -> list[str]:
    """Notes on the table, each once: peers' differences, peaks, what could not be found out."""
    axes = _varying(rows)
    fixed = [f"{axis} {values[0]}" for axis, values in _varied(rows).items() if axis not in axes]
    found = [f"In all rows: {', '.join(fixed)}."] if fixed else []
    for row in rows:
        if shares := row["runs"][0].get("operations") if row["runs"] else None:
            found.append(f"Of the time of `{_title(row, axes)}`: {_shares(shares)}.")
    for row in rows:
        if row.get("differs"):
            found.append(f"{row['cell']['peer']}: {row['differs']}.")
        for run in row["runs"]:
            found += [f"Peak: {run['peak_source']}."] if run.get("peak_source") else []
            found += [f"{run['note']}."] if run.get("note") else []
            found += [f"Operations not counted: {run['uncounted']}."] if run.get("uncounted") else []
    return list(dict.fromkeys(found))


def _shares(found: Mapping[str, float]) -> str:
    """Shares of at least a twentieth, as in "convolutions 94 %, optimizer 5 %"."""
    return ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in found.items() if share >= 0.05)


def where(rows: Sequence[Row]) -> str:
    """Versions and machine that the first row was measured with; nothing, if none was."""
    made = next((row for row in rows if row["status"] == "ok"), rows[0])
    versions, hardware = made.get("versions", {}), made.get("hardware", {})
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return "; ".join(
        filter(None, [packages, ", ".join(str(value) for value in hardware.values() if value is not None)])
    )


def page(rows: Sequence[Row]) -> str:
    """The table, what has to be said of it, and where it was measured."""
    return "\n\n".join(filter(None, [table(rows), *notes(rows), where(rows)]))


def failures(rows: Sequence[Row]) -> list[str]:
    """The cells that failed, and why. What is not here is no failure, unless there is nothing else."""
    none = all(row["status"] != "ok" for row in rows)
    failed = [row for row in rows if row["status"] in FAILED or none]
    return [f"{_title(row)}: {row['status']}: {row['message']}" for row in failed]


def plot(rows: Sequence[Row], path: Path) -> bool:
    """Images a second of every cell that could be measured, the bars of a mode in a colour.

    Returns:
        Whether there was one, and a plot was drawn.
    """
    from matplotlib.figure import Figure  # here: it takes a third of a second to import

    good = [row for row in rows if row["status"] == "ok"]
    if not good:
        return False
    names = [_title(row, _varying(rows)) for row in good]
    rates = [Rate(row) for row in good]
    modes = list(dict.fromkeys(row["cell"]["mode"] for row in good))
    figure = Figure(figsize=(7.2, 1 + 0.35 * len(good)), layout="constrained")
    axes = figure.subplots()
    ends = [[rate.median - min(rate.runs) for rate in rates], [max(rate.runs) - rate.median for rate in rates]]
    colours = [f"C{modes.index(row['cell']['mode'])}" for row in good]
    axes.barh(range(len(good)), [rate.median for rate in rates], xerr=ends, color=colours, capsize=3)
    axes.set_yticks(range(len(good)), names)
    axes.invert_yaxis()
    figure.supxlabel("images/s, median and range of the runs", fontsize="medium")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
    return True


def _values(row: Row, axes: Sequence[str] | None = None) -> list[str]:
    """Values of these axes, or of all."""
    return [f"{axis} {value}" for axis, value in row["cell"]["axes"].items() if axes is None or axis in axes]


def read(place: Path) -> list[dict[str, Any]]:
    """The cells of a benchmark: a folder of them, or one file.

    Raises:
        Mistake: If there are none.
    """
    files = sorted(place.glob("*.json")) if place.is_dir() else [place]
    if not files or not all(file.is_file() for file in files):
        raise Mistake(f"{place}: expected a folder that zoo benchmark has written, or one of its JSON files")
    rows = []
    for file in files:
        try:
            row = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise Mistake(f"{file} is no JSON: {error}") from error
        if not isinstance(row, dict) or row.get("schema") != SCHEMA:
            raise Mistake(f"{file} is no cell of this version of zoo benchmark: measure it anew")
        rows.append(row)
    return rows


def compare(before: Sequence[Row], after: Sequence[Row], max_regression: float) -> tuple[str, list[str], list[str]]:
    """Two benchmarks side by side, by cell; and which of the first are too slow in the second, and which are lost.

    A cell is lost if it is missing in the second or could not be measured there, unless it is one whose device or
    package was not there for the first one either.

    Args:
        before, after: Their cells.
        max_regression: The share by which a cell may be slower, 0.05 for example; never less than the spread.
    """
    old, new = ({_key(row): row for row in rows} for rows in (before, after))
    lines = [["cell", "before, images/s", "after, images/s", "ratio"], ["---"] * 4]
    slower, lost = [], []
    for key, row in (new | {key: row for key, row in old.items() if key not in new}).items():
        name, base, now = _title(row), old.get(key), new.get(key)
        line = [name, _rate(base), _rate(now), ""]
        lines.append(line)
        if base is None:
            continue
        if now is None or now["status"] != "ok":
            if base["status"] not in NOT_HERE or (now is not None and now["status"] in FAILED):
                lost.append(f"{name}: " + ("missing" if now is None else f"{now['status']}: {now['message']}"))
        elif base["status"] == "ok":
            middle, spread = ratio(now, base, paired=False)
            line[3] = ratio_text(now, base, paired=False)
            if 1 - middle > max(max_regression, spread):
                slower.append(f"{name}: {100 * (1 - middle):.0f} % slower")
    return "\n".join(f"| {' | '.join(line)} |" for line in lines), slower, lost


def _key(row: Row, mode: str | None = None) -> str:
    """Identity of a cell, or of the same in another mode."""
    return json.dumps(row["cell"] | ({"mode": mode} if mode else {}), sort_keys=True)


def _title(row: Row, axes: Sequence[str] | None = None) -> str:
    return " ".join([row["cell"]["mode"], row["cell"]["peer"] or "zoo", *_values(row, axes)])


def _rate(row: Row | None) -> str:
    if row is None:
        return "not measured"
    return f"{Rate(row).median:.4g}" if row["status"] == "ok" else str(row["status"])
