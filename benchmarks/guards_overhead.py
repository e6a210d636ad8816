"""What all guards together (``zoo.guards.guard``) cost a training step: the same fit with and without them.

    python benchmarks/guards_overhead.py                    # the table
    python benchmarks/guards_overhead.py --processes 2      # in two gloo processes (nccl with --device cuda)
    python benchmarks/guards_overhead.py --each             # and each guard by itself, at the smallest step

Each row is a network trained by the Trainer on batches that lie in memory, logging every 50 steps. Fits with and
without guards take turns, so that a busy moment of the machine hits both, and the first steps of each do not count. The
overhead is the median over pairs of neighbouring fits. A third fit, without guards again, shows what the same
measurement finds where there is nothing to find. All have a ModelCheckpoint, and no checkpoint is saved meanwhile.
"""

import argparse
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from side_by_side import where
from torch import Tensor, nn

from zoo import ViTClassifier
from zoo.callbacks import (
    ExactResume,
    FailTogether,
    KeepPreprocessing,
    NonFiniteGuard,
    OptimizerSettings,
    PreemptionGuard,
    Provenance,
    ResumePoint,
)
from zoo.common.log import StepLog
from zoo.guards import guard

DIGITS = Path(__file__).parents[1] / "configs" / "vit" / "digits.yaml"
EACH = (
    OptimizerSettings,
    NonFiniteGuard,
    Provenance,
    KeepPreprocessing,
    FailTogether,
    ExactResume,
    PreemptionGuard,
    ResumePoint,
)
WITHOUT, AGAIN, WITH = "without", "without, again", "with all guards"
Add = Callable[[Any], Any]


class Tiny(pl.LightningModule):
    """Costs next to nothing, so that the guards' own time shows."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 8))
        self.step_log = StepLog()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.net(batch).square().mean()
        self.step_log(self, {"train/loss": loss})
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Resident:
    """A loader that costs nothing: one batch, over and over."""

    def __init__(self, batch: Any, steps: int) -> None:
        self.batch, self.steps = batch, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.steps):
            yield self.batch


class Clock(Callback):
    """The time between the ends of two steps, in seconds a step: by the clock on the wall, and of the processor."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.notes: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in (self.first, self.last):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.notes.append((time.perf_counter(), time.process_time()))

    def per_step(self) -> tuple[float, float]:
        (wall, cpu), (wall_end, cpu_end) = self.notes
        return (wall_end - wall) / (self.last - self.first), (cpu_end - cpu) / (self.last - self.first)


def networks(device: str) -> dict[str, tuple[Callable[[], tuple[Any, Any]], float]]:
    """What is trained: a module and its batch, and about how many seconds a step takes, for as many as are needed."""

    def digits() -> tuple[Any, Any]:
        recipe = yaml.safe_load(DIGITS.read_text())
        size = recipe["data"]["init_args"]["batch_size"]
        model = recipe["model"]["init_args"]
        images = torch.randn(size, 1, model["image_size"], model["image_size"])
        return ViTClassifier(**model, num_classes=10), (images, torch.arange(size) % 10)

    def larger() -> tuple[Any, Any]:
        name, side, size = ("vit_base_patch16_224", 224, 64) if device == "cuda" else ("vit_tiny_patch16_224", 96, 8)
        model = ViTClassifier(name, num_classes=10, image_size=side, warmup_epochs=0)
        return model, (torch.randn(size, 3, side, side), torch.arange(size) % 10)

    return {
        "two layers of 32": (lambda: (Tiny(), torch.randn(8, 32)), 0.0006),
        "`vit/digits`, batch of 64": (digits, 0.02),
        f"{'ViT-B at 224 pixels, batch of 64' if device == 'cuda' else 'ViT-Ti at 96 pixels, batch of 8'}": (
            larger,
            0.1,
        ),
    }


def fit(make: Callable[[], tuple[Any, Any]], steps: int, device: str, add: Add) -> tuple[float, float]:
    pl.seed_everything(0, verbose=False)
    module, batch = make()
    warm_up = max(3, steps // 10)
    clock = Clock(warm_up, warm_up + steps)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = pl.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        max_epochs=1,
        logger=CSVLogger("."),
        callbacks=[clock, ModelCheckpoint(tempfile.mkdtemp(dir="."), every_n_train_steps=10**9)],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    add(trainer)
    trainer.callbacks.append(trainer.callbacks.pop(trainer.callbacks.index(clock)))  # a step ends behind the guards
    target = torch.device("cuda", trainer.local_rank) if device == "cuda" else torch.device("cpu")
    batch = tuple(part.to(target) for part in batch) if isinstance(batch, tuple) else batch.to(target)
    trainer.fit(module, Resident(batch, warm_up + steps + 1))
    return clock.per_step()


def measure(
    make: Callable[[], tuple[Any, Any]], steps: int, rounds: int, device: str, ways: dict[str, Add]
) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(rounds):
        turn = list(ways.items())
        for name, add in turn if number % 2 == 0 else reversed(turn):
            found[name].append(fit(make, steps, device, add))
    return found


def alone(kind: type[Callback]) -> Add:
    return lambda trainer: trainer.callbacks.append(kind())


def rows(title: str, found: dict[str, list[tuple[float, float]]]) -> Iterator[str]:
    """Rows of the table. Differences and ratios are medians over pairs of the same round."""
    for name, times in found.items():
        wall = [time for time, _ in times]
        cells = [title, name, f"{1e3 * statistics.median(wall):.3f}", f"{1e3 * min(wall):.3f} to {1e3 * max(wall):.3f}"]
        if name == WITHOUT:
            cells += ["", "", ""]
        else:
            for column in (0, 1):
                pairs = [(a[column], b[column]) for a, b in zip(times, found[WITHOUT], strict=True)]
                if column == 0:
                    cells.append(f"{1e6 * statistics.median(a - b for a, b in pairs):+.0f}")
                cells.append(f"{100 * (statistics.median(a / b for a, b in pairs) - 1):+.1f} %")
        yield f"| {' | '.join(cells)} |".replace("|  |", "| |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15, help="fits of each kind")
    parser.add_argument("--seconds", type=float, default=2.0, help="about how long each fit is measured")
    parser.add_argument("--only", nargs="+", default=[""], help="networks whose names hold one of these words")
    parser.add_argument("--each", action="store_true", help="each guard by itself as well, at the smallest network")
    arguments = parser.parse_args()
    if arguments.processes > 1 and "WORLD_SIZE" not in os.environ:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        sys.exit(subprocess.call([*launcher, f"--nproc-per-node={arguments.processes}", *sys.argv]))
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    speaks = os.environ.get("RANK", "0") == "0"
    if speaks:
        print(where(arguments.device, "torch", "lightning"), f"\ncommand: python {' '.join(sys.argv)}\n")
        print("| network | | ms a step | lowest to highest | µs more | time | processor time |")
        print("|---|---|---|---|---|---|---|", flush=True)
    nothing: Add = lambda trainer: trainer  # noqa: E731
    ways: dict[str, Add] = {WITHOUT: nothing, WITH: guard, AGAIN: nothing}
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        for title, (make, about) in networks(arguments.device).items():
            if not any(word in title for word in arguments.only):
                continue
            each = {kind.__name__: alone(kind) for kind in EACH} if arguments.each and about < 0.01 else {}
            steps = max(5, round(arguments.seconds / about))
            found = measure(make, steps, arguments.rounds, arguments.device, ways | each)
            if speaks:
                print(*rows(title, found), sep="\n", flush=True)


if __name__ == "__main__":
    main()
