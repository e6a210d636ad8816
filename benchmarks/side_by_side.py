"""Training steps side by side: what the scripts that measure them share.

Rows take turns, so that a busy moment of the machine hits all of them alike; what is compared are medians.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Training(NamedTuple):
    """A module on the images' device, its loss on images, and what updates it."""

    module: nn.Module
    loss: Callable[[Tensor], Tensor]
    optimizer: Optimizer


class Row:
    """One way to train, and the times of its steps.

    Args:
        name: As the table has it.
        make: Builds module, loss and optimizer on a device.
        dtype: Of autocast; float32 is without, float16 with a gradient scaler.

    Attributes:
        clock: Seconds of what; ``time.process_time``, which other programs disturb less, is for CPUs alone.
    """

    clock: Callable[[], float] = staticmethod(time.perf_counter)

    def __init__(self, name: str, make: Callable[[torch.device], Training], dtype: torch.dtype = torch.float32) -> None:
        self.name, self.make, self.dtype = name, make, dtype
        self.seconds: list[float] = []
        self.gib = 0.0

    @property
    def median(self) -> float:
        """Seconds a step."""
        return statistics.median(self.seconds)

    def build(self, images: Tensor) -> None:
        self.images = images
        self.training = self.make(images.device)
        self.training.module.train()
        self.scaler = torch.amp.GradScaler(images.device.type, enabled=self.dtype == torch.float16)

    def forget(self) -> None:
        del self.training, self.scaler
        torch.cuda.empty_cache()

    def step(self) -> None:
        with torch.autocast(self.images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.training.loss(self.images)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.training.optimizer)
        self.scaler.update()
        self.training.optimizer.zero_grad()

    def run(self, steps: int) -> float:
        """Seconds a step, of so many in a row."""
        on_gpu = self.images.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start = self.clock()
        for _ in range(steps):
            self.step()
        if on_gpu:
            torch.cuda.synchronize()
            self.gib = torch.cuda.max_memory_allocated() / 2**30
        return (self.clock() - start) / steps


def measure(rows: list[Row], images: Tensor, rounds: int, steps: int) -> None:
    """On a GPU one row after the other, since their memory is measured; on a CPU in turns."""
    on_gpu = images.device.type == "cuda"
    for group in [[row] for row in rows] if on_gpu else [rows]:
        for row in group:
            row.build(images)
            row.run(3)  # warms up and compiles
        for _ in range(rounds):
            for row in group:
                row.seconds.append(row.run(steps))
        for row in group:
            row.forget()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps in a row, in each round")


def where(device: str, *packages: str) -> str:
    """The line that says with what, and on what, figures were measured."""
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{len(os.sched_getaffinity(0))} CPU cores"
    return ", ".join(
        [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages), machine]
    )


def milliseconds(seconds: float) -> str:
    """Three digits at least."""
    return f"{1e3 * seconds:.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def report(rows: list[Row], batch_size: int, on_gpu: bool, train_flops: float | None = None, peak: float = 0.0) -> None:
    """Prints a markdown table. ``train_flops``, of an image and step, adds the share of ``peak`` TFLOP/s on a GPU."""
    titles = ["", "ms a step", "lowest to highest", "relative"] + ["images/s", "GiB"] * on_gpu
    titles += ["MFU"] * (on_gpu and train_flops is not None)
    print(f"| {' | '.join(titles)} |".replace("|  |", "| |") + f"\n{'|---' * len(titles)}|")
    for row in rows:
        spread = f"{milliseconds(min(row.seconds))} to {milliseconds(max(row.seconds))}"
        cells = [row.name, milliseconds(row.median), spread, f"{row.median / rows[0].median:.3f}"]
        if on_gpu:
            cells += [f"{batch_size / row.median:.0f}", f"{row.gib:.1f}"]
            if train_flops is not None:
                cells += [f"{100 * train_flops * batch_size / row.median / (peak * 1e12):.0f} %"]
        print(f"| {' | '.join(cells)} |")
