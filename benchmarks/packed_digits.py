"""Digits of mixed sizes and aspects, packed and squeezed to one size, also on sizes that training has not seen.

    python benchmarks/packed_digits.py --out runs/packed_digits --jobs 2

Rows are the recipe packed_vit/digits_sizes, a process each for the seeds 0, 1 and 2: as it is; tested without its limit
of tokens, so that larger images keep their size; with the same images squeezed to squares of 16 pixels, as a ViT of one
size needs them, whose 16 tokens are what the images have on average; and with plain digits of 16 pixels alone. All are
the same network and are trained for as many epochs. Columns are the 540 test digits rendered in four ways, each digit
the same in all runs.

--out holds one json for each finished run: a second call continues. Prints a markdown table, mean ± standard deviation
over the seeds. Options that are not the script's are handed to every run.
"""

import argparse
import logging
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from lightning import Trainer

from datamodules import DigitsDataModule
from zoo import PackedViTClassifier
from zoo.cli.mistakes import Mistake
from zoo.cli.recipes import recipes
from zoo.cli.sweep import sweep_seeds
from zoo.common.study import spread_text

RECIPE = "packed_vit/digits_sizes"
ONE_SIZE = {"token_budget": None, "image_size": 16, "batch_size": 64}
PLAIN = {"sizes": [16, 16], "aspects": [1.0, 1.0]}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "packed": ("packed, each at its own size", {}),
    "squeezed": ("the same images squeezed to 16x16", ONE_SIZE),
    "plain": ("digits of 16x16 alone", ONE_SIZE | PLAIN),
}
"""By name: title, and how the data differ from the recipe's in training."""
COLUMNS: dict[str, dict[str, Any]] = {
    "as in training": {},
    "sides of 20 to 32 pixels": {"eval_sizes": (20, 32)},
    "two to three times as wide": {"eval_aspects": (2.0, 3.0)},
    "both": {"eval_sizes": (20, 32), "eval_aspects": (2.0, 3.0)},
}
"""By title, how the test images differ from the recipe's."""


def accuracies(checkpoint: Path, changes: dict[str, Any], **model_options: Any) -> list[float]:
    """Test accuracy of a run on each rendering."""
    rendered = yaml.safe_load(recipes()[RECIPE].read_text(encoding="utf-8"))["data"]["init_args"]
    model = PackedViTClassifier.load_from_checkpoint(checkpoint, weights_only=True, **model_options)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    found = []
    for column in COLUMNS.values():
        changed = ONE_SIZE if changes and column else changes  # plain digits are tested on mixed sizes, too
        (metrics,) = Trainer(**quiet).test(model, DigitsDataModule(**rendered | changed | column), verbose=False)
        found.append(metrics["test/acc"])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs", "packed_digits"))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    arguments, options = parser.parse_known_args()
    variants = {
        name: [f"--data.{key}={'null' if value is None else value}" for key, value in ROWS[name][1].items()]
        for name in arguments.rows
    }
    try:
        results = sweep_seeds(
            [str(recipes()[RECIPE])], options, variants, arguments.seeds, arguments.out, arguments.jobs, "test/acc"
        )
    except Mistake as mistake:
        parser.error(str(mistake))
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    lines = [f"| test accuracy, % | {' | '.join(COLUMNS)} | seconds |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, found in results.items():
        unlimited: list[dict[str, Any]] = [{"max_tokens": None}] if name == "packed" else []
        for options_of_test in [{}, *unlimited]:
            runs = [
                accuracies(checkpoint, ROWS[name][1], **options_of_test)
                for seed in range(arguments.seeds)
                for checkpoint in [arguments.out / f"{name}_seed{seed}" / "checkpoints" / "last.ckpt"]
            ]
            cells = [spread_text(list(column), 2, 100) for column in zip(*runs, strict=True)]
            title = "the same, without a limit of tokens" if options_of_test else ROWS[name][0]
            lines.append(f"| {' | '.join([title, *cells, spread_text(found['seconds'], 0)])} |")
    head = f"Python {platform.python_version()}, torch {version('torch')}, timm {version('timm')}, lightning "
    text = "\n".join([f"{head}{version('lightning')}, no GPU", "", *lines]) + "\n"
    (arguments.out / "table.md").write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
