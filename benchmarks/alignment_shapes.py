"""Alignment on rendered shapes: what losses and positives are worth, for pairs that training has seen and others.

    python benchmarks/alignment_shapes.py --out runs/alignment_shapes --jobs 2
    python benchmarks/alignment_shapes.py --rows softmax shuffled --seeds 1    # a part of it

Rows are the recipe alignment/shapes with options; each run is a process of its own. Accuracy is that of zero-shot
classification among 36 pairs of shape and colour, recall that of an image's caption among those of all test images, and
of a caption's images. Unseen pairs do not occur in training. In the control captions are of other images: its loss has
to stay at ln B, and all else at chance. The swap test is on scenes of two objects: how often the caption is closer to
its image than the one with the two colours exchanged (chance 50).

--out holds one json for each finished run: a second call continues. Prints a markdown table, mean ± standard deviation
over the seeds, and writes it to table.md there. Options that are not the script's are handed to every run.
"""

import argparse
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from zoo.cli.mistakes import Mistake
from zoo.cli.recipes import recipes
from zoo.cli.sweep import sweep_seeds
from zoo.common.study import Results, spread_text

PAIRED, SIGMOID = "--model.positives=paired", ["--model.loss=sigmoid", "--model.bias_init=auto"]
ROWS: Mapping[str, tuple[str, Sequence[str]]] = {
    "softmax_paired": ("softmax, own captions alone", [PAIRED]),
    "softmax": ("softmax, entailed captions too", []),
    "sigmoid_paired": ("sigmoid, own captions alone", [*SIGMOID, PAIRED]),
    "sigmoid": ("sigmoid, entailed captions too", SIGMOID),
    "shuffled": ("control: softmax, captions of other images", ["--data.shuffled=true", PAIRED]),
    "two_objects": ("softmax, two objects", ["--data.objects=2"]),
}
COLUMNS = {
    "accuracy, seen": ("test/acc_seen", 100),
    "unseen": ("test/acc_unseen", 100),
    "image to text R@1, seen": ("test/i2t_r1_seen", 100),
    "unseen ": ("test/i2t_r1_unseen", 100),
    "text to image R@1, seen": ("test/t2i_r1_seen", 100),
    "unseen  ": ("test/t2i_r1_unseen", 100),
    "swap test, seen": ("test/swap_acc_seen", 100),
    "unseen   ": ("test/swap_acc_unseen", 100),
    "training loss": ("train/loss", 1),
    "seconds": ("seconds", 1),
}
"""By title, the metric and what it is multiplied by; a trailing space only tells titles apart."""


def table(results: Results) -> list[str]:
    """Lines of markdown, one for each row."""
    shown = {title: column for title, column in COLUMNS.items() if any(column[0] in row for row in results.values())}
    lines = [f"|  | {' | '.join(title.strip() for title in shown)} |", "|---" * (len(shown) + 1) + "|"]
    for name, found in results.items():
        cells = [
            spread_text(found[metric], {"train/loss": 2, "seconds": 0}.get(metric, 1), scale) if metric in found else ""
            for metric, scale in shown.values()
        ]
        lines.append(f"| {ROWS[name][0]} | {' | '.join(cells)} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs", "alignment_shapes"))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    arguments, options = parser.parse_known_args()
    variants = {name: options_of for name, (_, options_of) in ROWS.items() if name in arguments.rows}
    recipe = [str(recipes()["alignment/shapes"])]
    try:
        results = sweep_seeds(
            recipe, options, variants, arguments.seeds, arguments.out, arguments.jobs, needs="test/i2t_r1"
        )
    except Mistake as mistake:
        parser.error(str(mistake))
    head = f"Python {platform.python_version()}, torch {version('torch')}, timm {version('timm')}, lightning "
    text = "\n".join([f"{head}{version('lightning')}, no GPU", "", *table(results)]) + "\n"
    (arguments.out / "table.md").write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
