"""Times of TridentNet beside its base: prediction and training step, in turns.

    python benchmarks/trident_speed.py
    python benchmarks/trident_speed.py --device cuda --batch-size 8 --size 800 --steps 10 --channels 256 --head-depth 4

Prediction is network and detections. Fast is one branch of three, trained as all of them; the base whose stage has
Fast's dilation tells what comes of the dilation and what of the branches. Rounds begin with another row each time.
Ratios are medians over the rounds of a row's time by the base's in the same round.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from side_by_side import add_arguments, milliseconds, where

from zoo import FPNDetector
from zoo.common.optim import create_optimizer
from zoo.detection.peers import random_targets

CLASSES = 10
ROWS: dict[str, dict[str, Any]] = {
    "base": {},
    "base, dilation 2": {"dilations": [2]},
    "Fast: branch 1": {"trident": True, "branch": 1},
    "all branches": {"trident": True},
}


def timed(function: Callable[[], Any], steps: int, clock: Callable[[], float]) -> float:
    """Seconds of a call, of so many in a row."""
    start = clock()
    for _ in range(steps):
        function()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return (clock() - start) / steps


def measure(calls: dict[str, Callable[[], Any]], rounds: int, steps: int, clock: Callable[[], float]) -> None:
    """Measures in turns and prints a table."""
    names, seconds = list(calls), {name: list[float]() for name in calls}
    for call in calls.values():
        timed(call, 2, clock)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds[name].append(timed(calls[name], steps, clock))
    print("| | ms | lowest to highest | by the base |\n|---|---|---|---|")
    for name, found in seconds.items():
        ratio = median(own / base for own, base in zip(found, seconds[names[0]], strict=True))
        spread = f"{milliseconds(min(found))} to {milliseconds(max(found))}"
        print(f"| {name} | {milliseconds(median(found))} | {spread} | {ratio:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--head-depth", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="one thread's time on its core, on a busy machine")
    parser.set_defaults(batch_size=2)
    arguments = parser.parse_args()
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    if arguments.cpu_time:
        torch.set_num_threads(1)
    device = torch.device(arguments.device)
    images = torch.randn(arguments.batch_size, 3, arguments.size, arguments.size, device=device)
    drawn = random_targets(images, CLASSES, torch.Generator().manual_seed(0))
    targets = [{name: value.to(device) for name, value in each.items()} for each in drawn]
    shape = {"channels": arguments.channels, "head_depth": arguments.head_depth, "image_size": arguments.size}
    modules = {}
    for name, options in ROWS.items():
        torch.manual_seed(0)
        modules[name] = FPNDetector(
            arguments.network, CLASSES, neck="single", freeze_norm=True, score_threshold=0.3, **shape, **options
        ).to(device)
    print(
        f"{where(arguments.device, 'torch', 'timm', 'lightning')}; {arguments.network}, one map of stride 16, ", end=""
    )
    print(f"{arguments.batch_size} images of {arguments.size} pixels, {arguments.rounds} rounds of {arguments.steps}")

    def predict(module: FPNDetector) -> Callable[[], Any]:
        return lambda: module.detect(images)

    print("\nPrediction:\n")
    for module in modules.values():
        module.eval()
    measure({name: predict(module) for name, module in modules.items()}, arguments.rounds, arguments.steps, clock)

    def train(module: FPNDetector) -> Callable[[], Any]:
        optimizer = create_optimizer(module, "sgd", 0.0, 0.0)

        def step() -> None:
            sum(module.loss(module(images), targets).values()).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    print("\nTraining step:\n")
    del modules["base, dilation 2"]
    for module in modules.values():
        module.train()
    measure({name: train(module) for name, module in modules.items()}, arguments.rounds, arguments.steps, clock)


if __name__ == "__main__":
    main()
