"""Nats of `gumbel_vae/digits` and `gaussian_vae/digits` over seeds, beside exact densities on the same split.

    python benchmarks/gumbel_vae_digits.py --seeds 3 --jobs 2

Each run is a fresh process of the real command line, timed as a whole. It is tested at the checkpoint with the best
ELBO of the validation images: -ELBO of 200 samples an image, and the importance-weighted bound of 1,000. What is
finished is kept in runs/gumbel_vae_digits, so that the command can be stopped and called again. Prints a markdown
table.
"""

import argparse
import os
from pathlib import Path
from statistics import mean, stdev

import mixture
from side_by_side import where

from zoo.cli.recipes import recipes
from zoo.cli.sweep import sweep_seeds

RECIPES = ("gumbel_vae/digits", "gaussian_vae/digits")


def spread(values: list[float]) -> str:
    return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{mean(values):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+", default=RECIPES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs", "gumbel_vae_digits"))
    arguments, options = parser.parse_known_args()  # what is left is handed to every run
    lines = [
        "| | -ELBO | -log p, 1,000 samples | KL | active latents | seconds | -ELBO of each seed |",
        "|---" * 7 + "|",
    ]
    for name in arguments.recipe:
        variants: dict[str, list[str]] = {"run": []}
        out = arguments.out / name.replace("/", "_")
        found = sweep_seeds(
            [str(recipes()[name])], options, variants, arguments.seeds, out, arguments.jobs, "test/log_likelihood"
        )["run"]
        losses, bounds = ([-value for value in found[f"test/{key}"]] for key in ("elbo", "log_likelihood"))
        cells = [f"`{name}`", spread(losses), spread(bounds), f"{mean(found['test/kl']):.2f}"]
        cells += [f"{mean(found['test/active_latents']):.1f}", f"{mean(found['seconds']):.0f}"]
        lines.append(f"| {' | '.join([*cells, ', '.join(f'{loss:.2f}' for loss in losses)])} |")
    data = mixture.benchmark_digits()
    exact = {**data.nats(), **mixture.nats(data)}
    lines += [f"| {name} | exact | {-value:.2f} | | | | |" for name, value in exact.items()]
    print(where("cpu", "torch", "lightning"), f"jobs {arguments.jobs}, {os.cpu_count()} cores", "", sep="\n")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
