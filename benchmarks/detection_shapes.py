"""AP by object size of `zoo fit -c detection/shapes`: a feature pyramid, and one level of the same backbone and head.

    python benchmarks/detection_shapes.py --seeds 0 1 2
    python benchmarks/detection_shapes.py --seeds 0 1 2 --jobs 2    # two runs at a time, each on half of the cores

Each run is a fresh process of the real command line: start-up, training, test on images that no training run sees,
which are the same for all. Prints a markdown table, mean ± standard deviation over the seeds, and the ratio of the two
at each size. Options that are not the script's are handed to every run.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

NECKS = {"pyramid, strides 8 to 32": [], "one level, stride 16": ["--model.neck", "single", "--model.levels", "[4, 4]"]}


def run(recipe: str, neck: str, seed: int, options: list[str], threads: int) -> dict[str, float]:
    """A run's test metrics, and its seconds."""
    seeds = ["--seed_everything", str(seed), "--data.seed", str(seed)]
    command = [sys.executable, "-m", "zoo", "fit", "-c", recipe, *seeds, *NECKS[neck], *options]
    start = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    seconds = time.perf_counter() - start
    folder = re.search(r"^\s*run (\S+)\s*$", done.stdout, re.M)
    if done.returncode or folder is None:
        sys.exit(done.stdout + done.stderr)
    metrics = json.loads(Path(folder[1], "metrics.json").read_text())
    print(f"{neck}, seed {seed}: {100 * metrics['test/ap']:.2f} in {seconds:.0f} s, {folder[1]}", file=sys.stderr)
    return {name.removeprefix("test/"): value for name, value in metrics.items() if name.startswith("test/ap")} | {
        "seconds": seconds
    }


def columns(results: list[dict[str, float]]) -> list[str]:
    """AP first, then by threshold, then by size, as the runs named them."""
    return [name for name in results[0] if name.startswith("ap")]


def cell(values: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="detection/shapes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    arguments, options = parser.parse_known_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    work = [(neck, seed) for seed in arguments.seeds for neck in NECKS]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        threads = max(1, cores // arguments.jobs)
        found = list(pool.map(lambda each: run(arguments.recipe, *each, options, threads), work))
    results = {neck: [r for (n, _), r in zip(work, found, strict=True) if n == neck] for neck in NECKS}
    print(f"Python {platform.python_version()}, torch {version('torch')}, timm {version('timm')}, ", end="")
    print(f"lightning {version('lightning')}, {cores} CPU cores, no GPU, {arguments.jobs} run(s) at a time\n")
    names = columns(found)
    titles = [name.replace("ap_", "").replace("_", " to ") + " px" if "_" in name else name.upper() for name in names]
    print(f"| | {' | '.join(titles)} | seconds |\n{'|---' * (len(names) + 2)}|")
    for neck, rows in results.items():
        cells = [cell([row[name] for row in rows]) for name in names]
        print(f"| {neck} | {' | '.join(cells)} | {statistics.mean(row['seconds'] for row in rows):.0f} |")
    first, second = ({name: statistics.mean(row[name] for row in rows) for name in names} for rows in results.values())
    ratios = [f"{first[name] / second[name]:.1f}" if second[name] > 0 else "no other" for name in names]
    print(f"| ratio | {' | '.join(ratios)} | |")


if __name__ == "__main__":
    main()
