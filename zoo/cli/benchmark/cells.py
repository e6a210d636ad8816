"""The cells of a benchmark: what is varied, a process for each, and a JSON file of what it found."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from zoo.cli.mistakes import MARK
from zoo.cli.sweep import apart, write_json

SCHEMA = 1

# What becomes of a cell that is not "ok". What is not here is a matter of the machine, and no failure.
FAILED = ("failed", "out of memory")
NOT_HERE = ("no device", "not installed")

MODES = {
    "step": "forward, backward and optimizer in a loop written by hand, on a batch that stays on the device",
    "fit": "the same by Trainer.fit, with the recipe's callbacks and a logger",
    "data": "the loader alone",
    "e2e": "Trainer.fit on the recipe's data",
    "infer": "predict_step on a batch that stays on the device",
}

AXES = {
    "precision": ("--trainer.precision",),
    "compile": ("--model.compile",),
    "channels_last": ("--model.channels_last",),
    "grad_checkpointing": ("--model.grad_checkpointing",),
    "batch_size": ("--data.batch_size",),
    "image_size": ("--model.image_size", "--data.image_size"),
    "num_workers": ("--data.num_workers",),
    "accelerator": ("--trainer.accelerator",),
    "devices": ("--trainer.devices",),
    "strategy": ("--trainer.strategy",),
}
"""By what it is called, the options of ``zoo fit`` that an axis sets; those that model and data have not are left out.
A cell is thus a configuration of ``zoo fit``, and nothing else."""

LEAST = {"batch_size": 1, "image_size": 1, "num_workers": 0, "devices": 1}
"""The smallest values of axes that are sizes."""


class Cell(NamedTuple):
    """One thing that is measured.

    Attributes:
        mode: See ``MODES``.
        peer: Who is measured in the place of the zoo, or None.
        axes: By axis, the value it has here, as it was typed.
    """

    mode: str
    peer: str | None
    axes: dict[str, str]

    @property
    def name(self) -> str:
        """Name of its file."""
        values = [f"{axis}={value}" for axis, value in self.axes.items()]
        return "-".join([self.mode, *([self.peer] if self.peer else []), *values]).replace("/", "_")


def cells(modes: Sequence[str], axes: Mapping[str, Sequence[str]], peers: Mapping[str, Sequence[str]]) -> list[Cell]:
    """Every mode under every combination of the axes' values, the zoo first and its peers beside it.

    Args:
        modes: What is measured.
        axes: By axis, its values.
        peers: By peer, the modes it has.
    """
    found = []
    for mode in modes:
        for values in product(*axes.values()):
            here = dict(zip(axes, values, strict=True))
            found.append(Cell(mode, None, here))
            found += [Cell(mode, peer, here) for peer, known in peers.items() if mode in known]
    return found


def options_of(cell: Cell, known: Iterable[str]) -> list[str]:
    """The options of ``zoo fit`` that a cell is.

    Args:
        cell: What is measured.
        known: Options that model, data and Trainer have, ``--model.compile`` for example.
    """
    known = set(known)
    found = ["--trainer.devices", "1"] if "devices" not in cell.axes else []
    for axis, value in cell.axes.items():
        found += [part for option in AXES[axis] if option in known for part in (option, value)]
    return found


def run(
    cells: Sequence[Cell],
    configs: Sequence[str],
    options: Sequence[str],
    known: Iterable[str],
    goal: Mapping[str, float],
    repeats: int,
    out: Path,
) -> list[dict[str, Any]]:
    """Measures all cells, each in a fresh process, round after round, and writes ``out/CELL.json`` as it goes.

    Cells take turns, so that a busy moment of the machine hits all of them alike. A cell that fails is a row that says
    why: it is not tried again.

    Returns:
        What is in the files, in the order of the cells.
    """
    out.mkdir(parents=True, exist_ok=True)
    known = set(known)
    found: dict[str, dict[str, Any]] = {}
    for number in range(repeats):
        for cell in cells:
            before = found.get(cell.name)
            if before and before["status"] != "ok":
                continue
            setting = {
                "cell": cell._asdict(),
                "goal": dict(goal),
                "configs": list(configs),
                "options": [*options, *options_of(cell, known)],
            }
            new = _measured(setting, out / f"{cell.name}.log")
            runs = [*(before["runs"] if before else []), *([new.pop("found")] if "found" in new else [])]
            found[cell.name] = {"schema": SCHEMA, **setting, **new, "runs": runs}
            write_json(out / f"{cell.name}.json", found[cell.name])
            print(f"{number + 1} of {repeats}  {_line(cell, found[cell.name])}", flush=True)
    return [found[cell.name] for cell in cells]


def _line(cell: Cell, row: Mapping[str, Any]) -> str:
    said = row["message"] if row["status"] != "ok" else f"{row['runs'][-1]['images_per_second']:.4g} images/s"
    return f"{cell.name}: {said}"


def _measured(setting: Mapping[str, Any], log: Path) -> dict[str, Any]:
    """Row that the process of a cell has written; if there is none, what became of it."""
    import tempfile  # here: every command would wait for it

    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder, "cell.json"), Path(folder, "found.json")
        asked.write_text(json.dumps(setting), encoding="utf-8")
        strict = [option for option in setting["options"] if option == "--strict-imports"]
        arguments = ["benchmark", "--cell", str(asked), str(answer), folder, *strict]
        status = apart([sys.executable, "-m", "zoo", *arguments], log)
        if answer.exists():
            return json.loads(answer.read_text(encoding="utf-8"))
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if status == -9:
        return {"status": "out of memory", "message": "killed, as the system does when memory runs out"}
    last = lines[-1].removeprefix(MARK) if lines else ""
    return {"status": "failed", "message": f"exit status {status}: {last}; all that it said is in {log}"}
