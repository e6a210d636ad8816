"""What pretraining without labels is worth on the digits: few labels, linear probe and nearest neighbours.

    python benchmarks/mae_digits.py

One pretraining (`mae/digits`) on the 1,077 training images without their labels; then, for each of five draws of five
labelled images a digit, a fine-tuning (`vit/digits_few_labels`) and the same network from scratch with settings of its
own (`vit/digits_few_labels_scratch`); then a linear probe (`vit/digits_linear_probe`) and nearest neighbours on frozen
features, pretrained and as initialised. Every row is a fresh process of `zoo`. Test accuracies are on the same 540
images. Prints a markdown table; --out keeps the runs.
"""

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path


class Zoo:
    """Runs `zoo fit` in a folder, and reads what it says at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fit(self, recipe: str, *options: str) -> dict[str, str]:
        start = time.perf_counter()
        command = [sys.executable, "-m", "zoo", "fit", "-c", recipe, *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=self.folder)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        said = dict(
            re.findall(
                r"^(test [a-z ]+|[\w -]+ on the same split|encoder|pictures|run) (\S+)(?: %)?$", done.stdout, re.M
            )
        )
        return said | {"seconds": f"{time.perf_counter() - start:.0f}"}


def row(name: str, runs: Sequence[dict[str, str]], key: str = "test accuracy") -> str:
    values = [float(run[key]) for run in runs]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    each = ", ".join(f"{value:.2f}" for value in values) if len(values) > 1 else ""
    seconds = statistics.mean(float(run["seconds"]) for run in runs) if key.startswith("test") else 0
    return f"| {name} | {statistics.mean(values):.2f}{spread} % | {each} | {f'{seconds:.0f}' if seconds else ''} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for the runs; without, they are thrown away")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        zoo = Zoo(arguments.out or Path(scratch))
        zoo.folder.mkdir(parents=True, exist_ok=True)
        pretrained = zoo.fit("mae/digits")
        random = zoo.fit("mae/digits", "--model.lr", "0", "--model.min_lr", "0", "--trainer.max_epochs", "1")
        weights = ["--model.weights", pretrained["encoder"]]
        draws = [
            ["--seed_everything", str(d), "--data.seed", str(d), "--data.labels_seed", str(d)]
            for d in range(arguments.draws)
        ]
        tuned = [zoo.fit("vit/digits_few_labels", *weights, *draw) for draw in draws]
        alone = [zoo.fit("vit/digits_few_labels_scratch", *draw) for draw in draws]
        probes = [zoo.fit("vit/digits_linear_probe", *options) for options in (weights, [])]

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"Python {platform.python_version()}, torch {version('torch')}, timm {version('timm')}, ", end="")
    print(f"lightning {version('lightning')}, {cores} CPU cores, no GPU; pretraining took {pretrained['seconds']} s\n")
    neighbours = "test accuracy of nearest neighbours"
    print("| | test accuracy | each draw | seconds |\n|---|---|---|---|")
    print(row("50 labels: pretrained, fine-tuned", tuned))
    print(row("50 labels: the same network from scratch", alone))
    for name in ("1-nearest neighbour", "RBF-kernel SVM"):
        print(row(f"50 labels: {name} on raw pixels", tuned, f"{name} on the same split"))
    print(row("all labels: linear probe, pretrained features", probes[:1]))
    print(row("all labels: linear probe, features as initialised", probes[1:]))
    print(row("20 nearest neighbours, leave one out, pretrained features", [pretrained], neighbours))
    print(row("20 nearest neighbours, leave one out, features as initialised", [random], neighbours))
    if arguments.out:
        print(f"\nreconstructions {zoo.folder / pretrained['pictures']}")


if __name__ == "__main__":
    main()
