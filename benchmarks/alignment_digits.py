"""LiT on the digits: zero-shot classification beside the supervised linear probe of the same frozen encoder.

    python benchmarks/alignment_digits.py --out runs/alignment_digits --jobs 2

For each seed a pretraining without labels (`mae/digits`); on its encoder, locked, a text tower (`alignment/digits_lit`)
and a linear layer (`vit/digits_linear_probe`); then both on the encoder as initialised. Test accuracies are on the same
540 images. --out holds one json for each finished run: a second call continues. Prints a markdown table. Options that
are not the script's are handed to every run.
"""

import argparse
import platform
import sys
from importlib.metadata import version
from pathlib import Path

from zoo.cli.mistakes import Mistake
from zoo.cli.recipes import recipes
from zoo.cli.sweep import sweep
from zoo.common.study import spread_text

READERS = {
    "lit": ("zero-shot, a text tower to the locked encoder (LiT)", "alignment/digits_lit", "image_weights"),
    "probe": ("linear probe, with labels", "vit/digits_linear_probe", "weights"),
}
"""By name: title, recipe, and the argument of the model that takes the encoder."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs", "alignment_digits"))
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    arguments, options = parser.parse_known_args()
    seeds = {f"seed{n}": [f"--seed_everything={n}", f"--data.seed={n}"] for n in range(arguments.seeds)}
    encoders = arguments.out / "pretraining"

    def runs(recipe: str, folder: Path, weights: dict[str, list[str]]) -> dict[str, dict[str, float]]:
        every = {name: [*seeds[name], *weights.get(name, [])] for name in seeds}
        return sweep([str(recipes()[recipe])], options, every, folder, arguments.jobs)

    lines = ["| test accuracy, % | pretrained | as initialised |", "|---|---|---|"]
    try:
        runs("mae/digits", encoders, {})
        for reader, (title, recipe, argument) in READERS.items():
            weights = {
                name: [f"--model.{argument}={(encoders / name / 'encoder.safetensors').resolve()}"] for name in seeds
            }
            found = runs(recipe, arguments.out / reader, weights), runs(recipe, arguments.out / f"{reader}_random", {})
            cells = [spread_text([run["test/acc"] for run in of.values()], 2, scale=100) for of in found]
            lines.append(f"| {title} | {' | '.join(cells)} |")
    except Mistake as mistake:
        parser.error(str(mistake))
    print(f"Python {platform.python_version()}, torch {version('torch')}, lightning {version('lightning')}, no GPU\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
