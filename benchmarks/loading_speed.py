"""How many training images a second a loader makes of a folder of JPEGs: ours beside torchvision's plain way.

    python benchmarks/loading_speed.py
    python benchmarks/loading_speed.py --hop                # with what is left to do on the device, done here
    python benchmarks/loading_speed.py --workers 4 --images 2000

The images are made anew, in a temporary folder: 500 x 375 pixels, quality 87, about 100 kB each, as much as ImageNet's
photographs. The first row is ``torchvision.datasets.ImageFolder`` with the usual transforms (random resized crop to
224, flip, float, normalise) in a plain DataLoader. Ours makes uint8 crops; flip, float and normalisation come after the
hop to the device, and are not in the figures without ``--hop``. Rows take turns, each with as many workers, and read
files that the system still has in memory; what is compared are medians over rounds. Making caches is not counted.
"""

import argparse
import contextlib
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from side_by_side import where
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision import transforms as classic

from datamodules import ImageFolderDataModule, transforms
from datamodules.base import IMAGENET_MEAN, IMAGENET_STD

SIZE = 224
WARM_UP = 2  # batches of each epoch that do not count: workers, which stay from epoch to epoch, have them ready early


def write(root: Path, count: int) -> float:
    """Images like photographs, in ten folders. Returns their mean size in bytes."""

    def one(number: int) -> int:
        generator = np.random.default_rng(number)
        coarse = Image.fromarray(generator.integers(0, 256, (375 // 4, 500 // 4, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = np.clip(smooth + generator.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
        path = root / f"class{number % 10}" / f"{number:05}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noisy).save(path, quality=87)
        return path.stat().st_size

    with ThreadPoolExecutor() as pool:
        return statistics.mean(pool.map(one, range(count)))


def plain(root: Path, batch_size: int, workers: int) -> DataLoader[Any]:
    steps = [classic.RandomResizedCrop(SIZE), classic.RandomHorizontalFlip(), classic.ToTensor()]
    steps += [classic.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    samples = datasets.ImageFolder(str(root), classic.Compose(steps))
    return DataLoader(
        samples, batch_size, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0
    )


def ours(root: Path, batch_size: int, workers: int, **options: Any) -> DataLoader[Any]:
    given = {"image_size": SIZE, "batch_size": batch_size, "num_workers": workers, "hflip": 0.5} | options
    data = ImageFolderDataModule(str(root), val_fraction=0, test_fraction=0, **given)
    return data.train_dataloader()


def on_the_device(images: torch.Tensor) -> torch.Tensor:
    if images.dtype != torch.uint8:
        return images
    return transforms.normalize(transforms.flip(transforms.to_float(images), 0.5), IMAGENET_MEAN, IMAGENET_STD)


def rate(loader: DataLoader[Any], seconds: float, hop: bool) -> float:
    """Images a second, over epochs without their first batches, until so many seconds have been measured."""
    images, measured = 0, 0.0
    while measured < seconds:
        for number, (batch, _) in enumerate(loader):
            if hop:
                on_the_device(batch)
            if number == WARM_UP - 1:
                started = time.perf_counter()
            elif number >= WARM_UP:
                images += len(batch)
        measured += time.perf_counter() - started
    return images / measured


def rows(root: Path, caches: Path, batch_size: int, workers: int) -> dict[str, Callable[[], DataLoader[Any]]]:
    made: dict[str, Callable[[], DataLoader[Any]]] = {
        "`ImageFolder`, classic transforms, bilinear": lambda: plain(root, batch_size, workers)
    }
    ways = {
        "decoder pil": {},
        "decoder torchcodec": {"decoder": "torchcodec"},
        "cache ram": {"cache": "ram"},
        "cache in a folder": {"cache": "folder"},
    }
    for interpolation in ("bilinear", "bicubic"):
        for name, options in ways.items():
            given: dict[str, Any] = {"interpolation": interpolation} | options
            if given.get("cache") == "folder":
                given["cache"] = str(caches / interpolation)
            made[f"ours, {name}, {interpolation}"] = lambda given=given: ours(root, batch_size, workers, **given)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1, help="of each loader")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="about how long a row is measured in each round")
    parser.add_argument("--hop", action="store_true", help="flip, float and normalise here what the loader gives")
    parser.add_argument("--only", nargs="+", default=[""], help="our rows whose names hold one of these words")
    arguments = parser.parse_args()
    if arguments.workers < 1 or arguments.images < (WARM_UP + 1) * arguments.batch_size:
        parser.error(f"expected at least a worker, and images for {WARM_UP + 1} batches")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(where("cpu", "torch", "torchvision", "pillow", "torchcodec"))
    with contextlib.ExitStack() as stack:
        root, caches = (Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2))
        size = write(root, arguments.images)
        print(
            f"{arguments.images} JPEGs of 500 x 375 pixels, {size / 1e3:.0f} kB each; {arguments.workers} worker(s)\n"
        )
        loaders = {
            name: make()
            for number, (name, make) in enumerate(rows(root, caches, arguments.batch_size, arguments.workers).items())
            if number == 0 or any(word in name for word in arguments.only)
        }
        found: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(arguments.rounds):
            for name, loader in loaders.items():  # workers of a loader that has come to its epoch's end only wait
                found[name].append(rate(loader, arguments.seconds, arguments.hop))
    print("| | images/s | lowest to highest | ratio |\n|---|---|---|---|")
    first = statistics.median(next(iter(found.values())))
    for name, rates in found.items():
        middle = statistics.median(rates)
        print(f"| {name} | {middle:.0f} | {min(rates):.0f} to {max(rates):.0f} | {middle / first:.2f} |")


if __name__ == "__main__":
    main()
