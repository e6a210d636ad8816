"""AP by object size of the ways to detect at many scales, on rendered shapes: the recipes detection/shapes_*.

    python benchmarks/detection_scale.py --out runs/detection_scale --jobs 2
    python benchmarks/detection_scale.py --rows one_level pyramid --splits all    # a part of it
    python benchmarks/detection_scale.py --rows shapes shapes_single --splits all    # detection/shapes, a longer recipe

Each run is a fresh process of the real command line, on one thread. All are tested on the same images, which none sees
in training, and all have had 5,000 steps: detectors that share the base's layers begin with its weights of 2,500 steps,
as TridentNet begins with trained weights, and learn for as many more; others learn from scratch for 5,000. A row that
differs at test alone tests another row's checkpoint. The split ``held_out`` has no objects of a band of sizes in
training.

--out holds one json for each finished run: a second call continues, with checkpoints that are gone made again where
they are needed, and refuses what was run with other settings. A run that fails is named at the end, and costs no other
but those that need its checkpoint. ``table.md`` there, mean ± standard deviation over the seeds, and a plot for each
split are made anew after each run. Seconds are the processor's, in steps of training and in steps of test: without
rendering, start-up, and what other programs took. Options that are not the script's are handed to every run.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import yaml
from lightning.pytorch import Callback

from zoo.callbacks.run_directory import run_directory
from zoo.cli import plots
from zoo.cli.mistakes import MARK, Mistake
from zoo.cli.outcome import numbers
from zoo.cli.recipes import recipes
from zoo.cli.sweep import apart, logged_to, taking_runs_along, write_json
from zoo.common.study import spread, spread_text

Results = Mapping["Run", Mapping[str, float]]


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        title: What the table calls it.
        recipe: What is trained, or tested.
        of: The row whose checkpoint is tested. None: it is trained.
        after: The row whose weights training begins with. None: it begins from scratch.
        options: More of the command line.
    """

    title: str
    recipe: str
    of: str | None = None
    after: str | None = None
    options: Sequence[str] = ()

    @property
    def needs(self) -> str | None:
        """The row whose checkpoint it needs."""
        return self.of or self.after


SINGLE = ["--model.neck=single", "--model.levels=[4,4]"]
ONE_BRANCH = ["--model.branch=1"]
TWICE = ["--trainer.max_epochs=8", "--trainer.check_val_every_n_epoch=8"]
ROWS = {
    "start": Row("one level, half of the training", "detection/shapes_one_level"),
    "one_level": Row("one level, stride 16", "detection/shapes_one_level", after="start"),
    "pyramid": Row("feature pyramid, strides 8 to 32", "detection/shapes_pyramid", options=TWICE),
    "image_pyramid": Row("one level, image pyramid at test", "detection/shapes_image_pyramid", of="one_level"),
    "tiles": Row("one level, tiles and whole image at test", "detection/shapes_tiles", of="one_level"),
    "multi_scale": Row("one level, multi-scale training", "detection/shapes_multi_scale", after="start"),
    "multi_scale_pyramid": Row("the same, image pyramid at test", "detection/shapes_image_pyramid", of="multi_scale"),
    "snip": Row("one level, SNIP, image pyramid at test", "detection/shapes_snip", after="start"),
    "trident": Row("Trident, all branches", "detection/shapes_trident", after="start"),
    "trident_one_branch": Row("Trident, the middle branch", "detection/shapes_trident", "trident", options=ONE_BRANCH),
    "trident_fast": Row("Trident Fast, as released", "detection/shapes_trident_fast", after="start"),
    "trident_scratch": Row("Trident from scratch, half of the training", "detection/shapes_trident"),
    "faster_rcnn": Row("one level, Faster R-CNN", "detection/shapes_faster_rcnn", options=TWICE),
    "shapes": Row("detection/shapes: strides 8 to 32", "detection/shapes"),
    "shapes_single": Row("detection/shapes, one level", "detection/shapes", options=SINGLE),
}
ASKED_FOR = ("shapes", "shapes_single")  # by --rows alone: another backbone, and twice as long
SPLITS = {"all": [], "held_out": ["--data.held_out=[32,64]"]}
TITLES = {"all": "All sizes in training", "held_out": "Sizes of 32 to 64 pixels held out of training"}


class Run(NamedTuple):
    """A row, trained on a split with a seed."""

    row: str
    split: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.row}_{self.split}_seed{self.seed}"

    @property
    def base(self) -> "Run | None":
        """The run whose checkpoint it needs."""
        base = ROWS[self.row].needs
        return None if base is None else self._replace(row=base)

    def checkpoint(self, out: Path) -> Path:
        """What it leaves to those that need it."""
        return out / "runs" / self.name / "checkpoints" / "last.ckpt"

    def settings(self, options: Sequence[str]) -> dict[str, Any]:
        """Plain data on all that its metrics depend on."""
        row, seeds = ROWS[self.row], [f"--seed_everything={self.seed}", f"--data.seed={self.seed}"]
        return {
            "recipe": yaml.safe_load(recipes()[row.recipe].read_text(encoding="utf-8")),
            "options": [*SPLITS[self.split], *seeds, *row.options, *options],
            "base": None if self.base is None else self.base.settings(options),
        }


class Measure(Callback):
    """Writes a run's metrics, and the processor's seconds in steps of each stage, to measured.json in its folder."""

    def __init__(self) -> None:
        self.seconds = {"train": 0.0, "test": 0.0}

    def on_train_batch_start(self, *_: Any) -> None:
        self.seconds["train"] -= time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds["train"] += time.process_time()

    def on_test_batch_start(self, *_: Any) -> None:
        self.seconds["test"] -= time.process_time()

    def on_test_batch_end(self, *_: Any) -> None:
        self.seconds["test"] += time.process_time()

    def on_test_end(self, trainer: Any, *_: Any) -> None:
        seconds = {f"{stage}/seconds": value for stage, value in self.seconds.items()}
        write_json(run_directory(trainer) / "measured.json", numbers(trainer.callback_metrics) | seconds)


def measured(run: Run, options: Sequence[str], out: Path) -> dict[str, float]:
    """Metrics of a run, which is trained and tested in a process of its own, or tested alone.

    Raises:
        Mistake: If it fails.
    """
    row = ROWS[run.row]
    command = [sys.executable, "-m", "zoo", "test" if row.of else "fit", "-c", row.recipe]
    command += run.settings(options)["options"]
    if run.base:
        command += ["--ckpt_path" if row.of else "--model.weights", str(run.base.checkpoint(out))]
    command += [f"--trainer.callbacks+={Path(__file__).stem}.Measure", "--trainer.enable_progress_bar=false"]
    paths = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    folder, log = out / "runs" / run.name, out / f"{run.name}.log"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
    if status := apart([*command, *logged_to(folder.parent, run.name)], log, environment):
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1].removeprefix(MARK) if lines and status > 0 else f"exit status {status}"
        raise Mistake(f"{last}; all that it said is in {log}")
    metrics: dict[str, float] = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
    return metrics


def finished(runs: Iterable[Run], options: Sequence[str], out: Path) -> dict[Run, dict[str, float]]:
    """Metrics of the runs that are there.

    Raises:
        Mistake: For one that was made with other settings.
    """
    found = {}
    for run in runs:
        file = out / f"{run.name}.json"
        if not file.exists():
            continue
        saved = json.loads(file.read_text(encoding="utf-8"))
        if saved["settings"] != run.settings(options):
            raise Mistake(f"{file} is of other settings than {run.row} has now: remove it, or choose another --out")
        found[run] = saved["metrics"]
    return found


def left(runs: Sequence[Run], results: Results, out: Path) -> list[Run]:
    """Runs of a group that are to be made: without metrics, or without a checkpoint that one of these needs."""
    needed: set[Run | None] = set()
    for run in reversed(runs):  # none needs one that follows it
        if (run not in results or run in needed) and run.base and not run.base.checkpoint(out).exists():
            needed.add(run.base)
    return [run for run in runs if run not in results or run in needed]


def in_turn(runs: Sequence[Run], options: Sequence[str], out: Path) -> tuple[dict[Run, dict[str, float]], list[str]]:
    """Metrics of runs that follow each other, since some need the checkpoints of others, and what failed."""
    found: dict[Run, dict[str, float]] = {}
    failed = {}
    for run in runs:
        if run.base in failed:
            failed[run] = f"{run.name}: not run, as {run.base.name} failed"
            continue
        try:
            metrics = measured(run, options, out)
        except (Mistake, OSError) as error:
            failed[run] = f"{run.name}: {error}"
            continue
        write_json(out / f"{run.name}.json", {"settings": run.settings(options), "metrics": metrics})
        found[run] = metrics
        print(f"{run.name}: AP {100 * metrics['test/ap']:.2f}", file=sys.stderr, flush=True)
    return found, list(failed.values())


def groups(rows: Iterable[str], splits: Iterable[str], seeds: Iterable[int]) -> list[list[Run]]:
    """Runs by the checkpoint that they need, directly or not, which the first of each group leaves; seed after seed.

    A row that needs another's checkpoint brings that one along.
    """
    lines = {row: list(line_of(row)) for row in ROWS}
    chosen = {needed for row in rows for needed in lines[row]}
    found = []
    for split in splits:
        for seed in seeds:
            for first in (row for row in ROWS if row in chosen and ROWS[row].needs is None):
                following = [row for row in ROWS if row in chosen and lines[row][-1] == first]
                found.append([Run(row, split, seed) for row in following])
    return found


def line_of(row: str | None) -> Iterator[str]:
    """The row, the one whose checkpoint it needs, and so on."""
    while row is not None:
        yield row
        row = ROWS[row].needs


def sizes_of(results: Results) -> list[str]:
    """Names of the size ranges that AP is known for, smallest first."""
    first = next(iter(results.values()))
    return [name for name in first if name.startswith("test/ap_") and name.removeprefix("test/ap_")[0].isdigit()]


def in_words(name: str) -> str:
    """``8 to 16 px`` of ``test/ap_8_16``, ``AP50`` of ``test/ap50``."""
    metric = name.removeprefix("test/")
    return f"{metric.removeprefix('ap_').replace('_', ' to ')} px" if "_" in metric else metric.upper()


def table(results: Results, split: str) -> list[str]:
    """A line of markdown for each row: mean and standard deviation over the seeds, AP times 100."""
    columns = ["test/ap", "test/ap50", "test/ap75", *sizes_of(results)]
    titles = ["", *map(in_words, columns), "training s", "test s", "seeds"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row, found in by_row(results, split).items():
        cells = [spread_text([metrics[name] for metrics in found], 1, scale=100) for name in columns]
        seconds = [sum(results[run]["train/seconds"] for run in trained) for trained in trainings(results, row, split)]
        trained = "" if ROWS[row].of else f"{mean(seconds):.0f}"
        tested = f"{mean(metrics['test/seconds'] for metrics in found):.1f}"
        lines.append(f"| {' | '.join([ROWS[row].title, *cells, trained, tested, str(len(found))])} |")
    return lines


def trainings(results: Results, row: str, split: str) -> list[list[Run]]:
    """Runs that a row's weights have been trained in, for each seed."""
    runs = [run for run in results if (run.row, run.split) == (row, split)]
    return [[run._replace(row=each) for each in line_of(row)] for run in runs]


def by_row(results: Results, split: str) -> dict[str, list[Mapping[str, float]]]:
    """Metrics of each row that has some, one for each seed."""
    found = {row: [results[run] for run in results if (run.row, run.split) == (row, split)] for row in ROWS}
    return {row: metrics for row, metrics in found.items() if metrics}


def write_page(results: Results, out: Path) -> str:
    """Writes table.md, and plots of AP by size, and returns the tables."""
    lines = [
        f"Python {platform.python_version()}, torch {version('torch')}, timm {version('timm')}, "
        f"lightning {version('lightning')}, one CPU thread a run, no GPU"
    ]
    sizes = sizes_of(results)
    for split in SPLITS:
        rows = by_row(results, split)
        if not rows:
            continue
        lines += ["", f"{TITLES[split]}:", "", *table(results, split)]
        series = {}
        for row, found in rows.items():
            of_sizes = [spread([100 * metrics[name] for metrics in found]) for name in sizes]
            series[ROWS[row].title] = [(float(place), *point) for place, point in enumerate(of_sizes)]
        plots.lines(out / f"{split}.png", series, "object size", "AP", ticks=[in_words(name) for name in sizes])
    text = "\n".join(lines) + "\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs", "detection_scale"))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[row for row in ROWS if row not in ASKED_FOR])
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    arguments, options = parser.parse_known_args()
    out, failed = arguments.out, []
    work = groups(arguments.rows, arguments.splits, arguments.seeds)
    try:
        results = finished([run for group in work for run in group], options, out)
    except Mistake as error:
        parser.error(str(error))
    missing = [made for group in work if (made := left(group, results, out))]
    print(f"{sum(map(len, work))} runs, {len(results)} of them finished already", file=sys.stderr, flush=True)
    (out / "runs").mkdir(parents=True, exist_ok=True)
    with taking_runs_along(), ThreadPoolExecutor(arguments.jobs) as pool:
        try:
            for future in as_completed([pool.submit(in_turn, group, options, out) for group in missing]):
                found, told = future.result()
                results |= found
                failed += told
                if results:
                    write_page(results, out)  # also if the others are interrupted
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if results:
        print(write_page(results, out), end="")
    print(*failed, sep="\n", end="\n" if failed else "", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
