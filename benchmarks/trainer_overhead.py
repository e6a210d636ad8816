"""What Trainer.fit costs a step over a hand-written loop of the same model, and what five logged values cost.

    python benchmarks/trainer_overhead.py            # the table
    python benchmarks/trainer_overhead.py --each     # and each default callback by itself

Every row trains the same small network on the same batches with the same optimizer and schedule. Logger and callbacks
are those of configs/defaults.yaml, guards those of zoo/guards.py: with both, and without the
idle profiler (zoo/cli/profiler.py), it is what ``zoo fit`` runs. Rows take turns, so that a busy moment of the machine
hits all of them alike.
"""

import argparse
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import chdir
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from torch import Tensor, nn

from zoo.cli.profiler import unprofiled
from zoo.common import optim
from zoo.common.log import StepLog
from zoo.guards import guard

DEFAULTS = Path(__file__).parents[1] / "configs" / "defaults.yaml"
NAMES = ("train/loss", "train/a", "train/b", "train/c", "train/d")
WARM_UP = 200  # steps before the clock starts
Times = tuple[float, float, float]


class Small(pl.LightningModule):
    """A network that costs next to nothing, so that the host's work shows. ``values``: how five values are logged."""

    def __init__(self, values: str, steps: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 8))
        self.values, self.steps = values, steps
        self.step_log = StepLog()
        self.clock: list[tuple[float, float]] = []
        self.logged = 0.0  # seconds in the step log

    def loss(self, batch: Tensor) -> Tensor:
        return self.net(batch).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if self.values == "StepLog":
            values, start = dict.fromkeys(NAMES, loss.detach()), time.perf_counter()
            self.step_log(self, values, prog_bar=NAMES[:1])
            self.logged += time.perf_counter() - start if batch_idx >= WARM_UP else 0.0
        elif self.values == "self.log":
            self.log(NAMES[0], loss, prog_bar=True)
            self.log_dict(dict.fromkeys(NAMES[1:], loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer()
        return optim.lightning_schedule(self, optimizer, warmup_epochs=0.1)

    def optimizer(self) -> torch.optim.Optimizer:
        return optim.create_optimizer(self, "adamw", 1e-3, 0.05)

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        if batch_idx == WARM_UP:
            self.note()

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        if batch_idx == self.steps - 1:
            self.note()

    def note(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.clock.append((time.perf_counter(), time.process_time()))

    def per_step(self) -> Times:
        """Microseconds a step: by the clock on the wall, of processor time, and in the step log."""
        (wall, cpu), (wall_end, cpu_end) = self.clock
        steps = self.steps - WARM_UP
        return (wall_end - wall) / steps * 1e6, (cpu_end - cpu) / steps * 1e6, self.logged / steps * 1e6


def hand_written(steps: int, device: torch.device) -> Times:
    module = Small("none", steps).to(device)
    optimizer = module.optimizer()
    schedule = optim.warmup_cosine(optimizer, steps // 10, steps)
    for index, batch in enumerate(Batches(steps)):
        module.on_train_batch_start(batch, index)
        loss = module.loss(batch.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        module.on_train_batch_end(loss, batch, index)
    return module.per_step()


def fit(
    steps: int,
    accelerator: str,
    values: str,
    settings: list[dict[str, Any]],
    logger: dict[str, Any] | None,
    guarded: bool,
) -> Times:
    module = Small(values, steps)
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=1,
        max_epochs=1,
        logger=build(logger, pl.loggers) if logger else False,
        callbacks=[build(setting, pl.callbacks) for setting in settings],
        enable_progress_bar=any(setting["class_path"].endswith("ProgressBar") for setting in settings),
        enable_checkpointing=any(setting["class_path"].endswith("ModelCheckpoint") for setting in settings),
        enable_model_summary=False,
    )
    (guard(unprofiled(trainer)) if guarded else trainer).fit(module, Batches(steps))
    return module.per_step()


class Batches:
    """A loader that costs nothing: the same batch over and over; a list would be several loaders to Lightning."""

    def __init__(self, steps: int) -> None:
        self.batches = [torch.ones(8, 32)] * steps

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


def build(setting: dict[str, Any], home: Any) -> Any:
    """The object that a class_path and its init_args describe; names without a dot are Lightning's."""
    module, _, name = setting["class_path"].rpartition(".")
    return getattr(import_module(module) if module else home, name)(**setting.get("init_args", {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="steps of a run, of which the first 200 do not count")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each row")
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--each", action="store_true", help="measure each default callback by itself as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    trainer = yaml.safe_load(DEFAULTS.read_text())["trainer"]
    callbacks, logger = trainer["callbacks"], trainer["logger"]
    logger["init_args"]["name"] = "overhead"
    steps, device = arguments.steps, torch.device("cuda" if arguments.accelerator == "gpu" else "cpu")

    def run(
        values: str, settings: list[dict[str, Any]], logger: Any = logger, guarded: bool = False
    ) -> Callable[[], Times]:
        return lambda: fit(steps, arguments.accelerator, values, settings, logger, guarded)

    hand, bare, plain, none, gated, every = (
        "hand-written loop",
        "Trainer, no logger, no callbacks",
        "Trainer, default callbacks",
        "Trainer, default callbacks and guards",
        "... and five values through StepLog",
        "... and five values through self.log",
    )
    rows: dict[str, Callable[[], Times]] = {
        hand: lambda: hand_written(steps, device),
        bare: run("none", [], None),
        plain: run("none", callbacks),
        none: run("none", callbacks, guarded=True),
        gated: run("StepLog", callbacks, guarded=True),
        every: run("self.log", callbacks, guarded=True),
    }
    if arguments.each:
        rows["logger alone"] = run("none", [])
        for setting in callbacks:
            rows[f"logger and {setting['class_path'].rpartition('.')[2]}"] = run("none", [setting])

    results: dict[str, list[Times]] = {name: [] for name in rows}
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        for _ in range(arguments.repeats):
            for name, row in rows.items():
                results[name].append(row())
    report(results, hand)
    for name in (gated, every):
        print(f"{name.removeprefix('... and ')}: {over(results, name, none)} µs a step")
    print(f"Trainer.fit over the loop, with callbacks, guards and five values: {over(results, gated, hand)} µs a step")
    logging_alone = statistics.median(times[2] for times in results[gated])
    print(f"of that, in the call that takes note of the five values: {logging_alone:.0f} µs a step")
    more = statistics.median(a[0] - b[0] for a, b in zip(results[gated], results[hand], strict=True)) / 1e3
    print(f"which leaves {50 / (50 + more):.1%} of a loop whose steps take 50 ms")


def over(results: dict[str, list[Times]], name: str, base: str) -> str:
    """What a row takes longer than another: median over the rounds, and between the fastest run of each, in µs."""
    rounds = zip(results[name], results[base], strict=True)
    fastest = min(results[name])[0] - min(results[base])[0]
    return f"{statistics.median(a[0] - b[0] for a, b in rounds):+.0f} ({fastest:+.0f})"


def report(results: dict[str, list[Times]], base: str) -> None:
    """Prints a table: medians over the rounds, and their range. On a busy machine the fastest runs say more."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} x {platform.machine()}"
    print(f"Python {platform.python_version()}, torch {torch.__version__}, lightning {pl.__version__}, {where}")
    print(f"command: python {' '.join(sys.argv)}\n")
    print("| | µs a step | lowest to highest | processor time | over the loop (fastest runs) |")
    print("|---|---|---|---|---|")
    for name, runs in results.items():
        wall, cpu = ([run[column] for run in runs] for column in (0, 1))
        span = f"{min(wall):.0f} to {max(wall):.0f}"
        more = "" if name == base else over(results, name, base)
        print(f"| {name} | {statistics.median(wall):.0f} | {span} | {statistics.median(cpu):.0f} | {more} |")
    print()


if __name__ == "__main__":
    main()
