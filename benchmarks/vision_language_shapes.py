"""Questions about rendered shapes: LLaVA's two stages beside one of as many steps, by kind of question, with controls.

    python benchmarks/vision_language_shapes.py --out runs/vision_language_shapes --jobs 2

For each seed a tower (vlm/shapes_tower) and a language model (vlm/shapes_language); on both of them vlm/shapes_stage1
and vlm/shapes_stage2, and vlm/shapes_one_stage. All are tested on the same questions, by kind, about scenes of pairs of
shape and colour that training has seen and of pairs that it has not; by another sample's image; and without any. What
could be known of a question's text alone is counted in the data. --out holds one json for each finished run: a second
call continues. Prints markdown tables, mean ± standard deviation over the seeds. Options that are not the script's are
handed to every run.
"""

import argparse
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from datamodules import ShapesQuestionsDataModule
from zoo.cli.mistakes import Mistake
from zoo.cli.recipes import recipes
from zoo.cli.sweep import sweep
from zoo.common.study import spread_text

Runs = Mapping[str, Mapping[str, float]]

CHAIN: dict[str, tuple[str, dict[str, tuple[str, str]]]] = {
    "tower": ("vlm/shapes_tower", {}),
    "language": ("vlm/shapes_language", {}),
    "stage1": (
        "vlm/shapes_stage1",
        {"image_weights": ("tower", "last.ckpt"), "language_weights": ("language", "last.ckpt")},
    ),
    "stage2": ("vlm/shapes_stage2", {"weights": ("stage1", "last.ckpt")}),
    "one_stage": (
        "vlm/shapes_one_stage",
        {"image_weights": ("tower", "last.ckpt"), "language_weights": ("language", "last.ckpt")},
    ),
}
"""By name: recipe, and the checkpoints that it starts from, by argument."""
ROWS = {"stage2": "two stages", "one_stage": "one stage"}
WAYS = {"": "", "shuffled_": "by another image", "text_": "without image"}


def trained(name: str, out: Path, seeds: Mapping[str, Sequence[str]], jobs: int, options: Sequence[str]) -> Runs:
    """Metrics of a link of the chain, by seed."""
    recipe, starts = CHAIN[name]
    runs = {
        seed: [
            *words,
            *(
                f"--model.{argument}={(out / link / seed / 'checkpoints' / file).resolve()}"
                for argument, (link, file) in starts.items()
            ),
        ]
        for seed, words in seeds.items()
    }
    return sweep([str(recipes()[recipe])], list(options), runs, out / name, jobs)


def data_of(recipe: str) -> ShapesQuestionsDataModule:
    """The data of a recipe."""
    options: dict[str, Any] = yaml.safe_load(recipes()[recipe].read_text(encoding="utf-8"))["data"]["init_args"]
    return ShapesQuestionsDataModule(**options)


def table(found: Mapping[str, Runs], data: ShapesQuestionsDataModule, subset: str) -> list[str]:
    """Lines of markdown: accuracies of a subset by kind, of each row and way, and what questions alone tell."""
    kinds = data.kinds

    def cells(runs: Runs, way: str) -> list[str]:
        names = [f"test/{way}acc_{subset}", *(f"test/{way}acc_{subset}_{kind}" for kind in kinds)]
        return [spread_text([run[name] for run in runs.values()], 1, scale=100) for name in names]

    lines = [f"| {subset} | all | {' | '.join(kinds)} |", "|---" * (len(kinds) + 2) + "|"]
    for row, title in ROWS.items():
        for way, said in WAYS.items():
            lines.append(f"| {', '.join(filter(None, [title, said]))} | {' | '.join(cells(found[row], way))} |")
    priors = data.priors(data.subsets.index(subset))
    for prior, title in {"constant": "the most frequent answer", "text": "the likeliest of each question"}.items():
        of_kinds = [100 * priors[kind][prior] for kind in kinds]
        shown = [f"{value:.1f}" for value in (sum(of_kinds) / len(of_kinds), *of_kinds)]
        lines.append(f"| {title} | {' | '.join(shown)} |")
    return lines


def times(found: Mapping[str, Runs]) -> list[str]:
    """Lines of markdown: wall time of each link with its tests, the start of its process included."""
    rows = [
        f"| `{CHAIN[name][0]}` | {spread_text([run['seconds'] for run in found[name].values()], 0)} |" for name in CHAIN
    ]
    return ["| run | seconds |", "|---|---|", *rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs", "vision_language_shapes"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    arguments, options = parser.parse_known_args()
    seeds = {f"seed{n}": [f"--seed_everything={n}", f"--data.seed={n}"] for n in arguments.seeds}
    try:
        found = {name: trained(name, arguments.out, seeds, arguments.jobs, options) for name in CHAIN}
    except Mistake as mistake:
        parser.error(str(mistake))
    data = data_of(CHAIN["stage2"][0])
    head = f"Python {platform.python_version()}, torch {version('torch')}, timm {version('timm')}, lightning "
    lines = [f"{head}{version('lightning')}, no GPU"]
    for subset in data.subsets:
        lines += ["", *table(found, data, subset)]
    lines += ["", *times(found)]
    text = "\n".join(lines) + "\n"
    (arguments.out / "table.md").write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
