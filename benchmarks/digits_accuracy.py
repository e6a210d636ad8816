"""Test accuracy of `zoo fit -c vit/digits` over seeds, beside an RBF-kernel SVM on the same split.

    python benchmarks/digits_accuracy.py --seeds 0 1 2

Each seed is a fresh process of the real command line, timed as a whole: start-up, training, test, pictures. Prints a
markdown table. Nothing is chosen on the test split: every run keeps its last weights.
"""

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from importlib.metadata import version


def run(recipe: str, seed: int, options: list[str]) -> tuple[float, dict[str, float], float]:
    """One run's test accuracy, the baselines that it printed, and its seconds."""
    seeds = ["--seed_everything", str(seed), "--data.seed", str(seed)]
    command = [sys.executable, "-m", "zoo", "fit", "-c", recipe, *seeds]
    start = time.perf_counter()
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    found = re.search(r"test accuracy\s+([\d.]+) %", done.stdout)
    if found is None:
        sys.exit(f"no test accuracy in what the run printed:\n{done.stdout}")
    baselines = {name: float(value) for name, value in re.findall(r"^\s*(\S.*SVM).*?\s([\d.]+) %", done.stdout, re.M)}
    return float(found[1]), baselines, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="vit/digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments, options = parser.parse_known_args()  # what is left is handed to every run
    rows = [(seed, *run(arguments.recipe, seed, options)) for seed in arguments.seeds]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"Python {platform.python_version()}, torch {version('torch')}, timm {version('timm')}, ", end="")
    print(f"lightning {version('lightning')}, {cores} CPU cores, no GPU\n")
    print("| seed | test accuracy | seconds |\n|---|---|---|")
    for seed, accuracy, _, seconds in rows:
        print(f"| {seed} | {accuracy:.2f} % | {seconds:.0f} |")
    accuracies = [accuracy for _, accuracy, _, _ in rows]
    spread = f" ± {statistics.stdev(accuracies):.2f}" if len(rows) > 1 else ""
    print(f"| mean | {statistics.mean(accuracies):.2f}{spread} % | {statistics.mean(row[3] for row in rows):.0f} |")
    for name, value in rows[0][2].items():
        print(f"| {name} | {value:.2f} % | |")


if __name__ == "__main__":
    main()
