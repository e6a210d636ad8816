"""What a balanced order costs: the order of an epoch, its batches, and a loader's step, beside those without balance.

    OMP_NUM_THREADS=1 python benchmarks/balanced_order.py
    python benchmarks/balanced_order.py --samples 100000 --classes 100 --rounds 3

There are as many samples and classes as in ImageNet, but of the k-th class 1/k as many as of the first. "made" is the
sampler itself, once a run; "an epoch" is its order, once an epoch; "a batch" is one batch of 256 sample numbers out of
an epoch's order, in the main process. torch's samplers, of one process and drawn with replacement where they are
weighted, make numbers one by one: an epoch and its batches are not told apart there. "a step" is a DataLoader's, of 64
images (3, 32, 32) that lie in memory. Rows take turns; what is shown are medians over rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from side_by_side import where
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, WeightedRandomSampler

from datamodules.loading.order import BatchOrder
from datamodules.loading.seeding import SeededBatches

COLUMNS = {"made": "ms", "an epoch": "ms", "a batch": "µs", "a step": "µs"}
UNITS = {"ms": 1e3, "µs": 1e6}


class Images:
    """Images in memory, fewer than there are samples: the first stand for all."""

    random = False

    def __init__(self, size: int) -> None:
        self.size, self.images = size, torch.randint(0, 256, (1000, 3, 32, 32), dtype=torch.uint8)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index % 1000], index % 10


def long_tailed(samples: int, classes: int) -> np.ndarray:
    """Labels (samples,) of which the k-th comes 1/k as often as the first, in no order."""
    shares = 1 / np.arange(1, classes + 1)
    return np.random.default_rng(0).choice(classes, samples, p=shares / shares.sum())


def timed(make: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    made = make()
    return time.perf_counter() - started, made


def passed(batches: Iterator[Any], count: int) -> float:
    """Seconds a batch, of so many behind the first, with which an epoch's order is made."""
    next(batches)
    return timed(lambda: sum(1 for _ in islice(batches, count)))[0] / count


def ours(labels: np.ndarray, balance: float, epoch: int, images: Images, steps: int) -> dict[str, float]:
    size = len(labels)

    def make(batch_size: int) -> BatchOrder:
        return BatchOrder(size, batch_size, shuffle=True, drop_last=True, labels=labels, balance=balance)

    seconds, order = timed(lambda: make(256))
    order.set_epoch(epoch)
    loader = DataLoader(SeededBatches(images, 0), batch_size=None, sampler=make(64), collate_fn=collated)
    return {
        "made": seconds,
        "an epoch": timed(lambda: order.order(epoch))[0],
        "a batch": passed(iter(order), len(order) - 1),
        "a step": passed(iter(loader), steps),
    }


def collated(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    return torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples])


def torchs(labels: np.ndarray, weighted: bool) -> dict[str, float]:
    def make() -> Any:
        if not weighted:
            return RandomSampler(range(len(labels)))
        return WeightedRandomSampler((1 / np.bincount(labels))[labels].tolist(), len(labels))

    seconds, sampler = timed(make)
    batches = BatchSampler(sampler, 256, drop_last=True)
    return {"made": seconds, "a batch": timed(lambda: sum(1 for _ in batches))[0] / len(batches)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_281_167)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epoch", type=int, default=90, help="which one's order is made: later ones have more before")
    parser.add_argument("--steps", type=int, default=500, help="of a loader, in each round")
    arguments = parser.parse_args()
    if arguments.samples < 1000 + 64 * arguments.steps or arguments.classes < 2:
        parser.error(f"expected at least 2 classes, and samples for {arguments.steps} steps of 64 and 1000 more")
    print(where("cpu", "torch", "numpy"))
    labels, images = long_tailed(arguments.samples, arguments.classes), Images(arguments.samples)
    rows: dict[str, Callable[[], dict[str, float]]] = {
        f"BatchOrder, balance {balance:g}": lambda balance=balance: ours(
            labels, balance, arguments.epoch, images, arguments.steps
        )
        for balance in (0.0, 0.5, 1.0)
    }
    rows |= {
        "torch's RandomSampler": lambda: torchs(labels, weighted=False),
        "torch's WeightedRandomSampler": lambda: torchs(labels, weighted=True),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in rows}
    for _ in range(arguments.rounds):
        for name, measure in rows.items():
            found[name].append(measure())
    print(f"{arguments.samples:,} samples of {arguments.classes:,} classes\n")
    print(
        "| | " + " | ".join(f"{name}, {unit}" for name, unit in COLUMNS.items()) + " |\n|---|" + "---|" * len(COLUMNS)
    )
    for name, times in found.items():
        cells = [
            f"{UNITS[unit] * statistics.median(each[column] for each in times):.1f}" if column in times[0] else ""
            for column, unit in COLUMNS.items()
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
