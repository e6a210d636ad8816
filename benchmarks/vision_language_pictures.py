"""Twenty questions with answers as a picture, of a checkpoint of benchmarks/vision_language_shapes.py.

    python benchmarks/vision_language_pictures.py --out runs/vision_language_shapes

Half of them are about images whose pairs of shape and colour training has seen, and half about images with a pair that
it has not; the kinds come in turn, each the first of the test questions. Nothing is chosen by its answer. Under each
image stand the question, what was written, and in brackets the truth. Written beside the tables, as questions.png.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torchvision.io import write_png
from torchvision.utils import make_grid
from vision_language_shapes import CHAIN, data_of

import zoo

COLUMNS, OF_SUBSET = 5, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs", "vision_language_shapes"))
    parser.add_argument("--row", default="stage2", choices=[*CHAIN], help="whose checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model: Any = zoo.load(args.out / args.row / f"seed{args.seed}").module
    data = data_of(CHAIN[args.row][0])
    samples = data.samples("test")
    assert samples is not None, "recipes have test images"
    found: dict[tuple[int, str], list[int]] = {}
    for index in range(len(samples)):
        about = samples[index][1]
        found.setdefault((about["subset"], about["kind"]), []).append(index)
    chosen = [
        found[subset, data.kinds[number % len(data.kinds)]][number // len(data.kinds)]
        for subset in range(len(data.subsets))
        for number in range(OF_SUBSET)
    ]
    batch = data.on_after_batch_transfer(data.collate()([samples[index] for index in chosen]), 0)
    sheet = make_grid(model.pictures(batch)["answers"], nrow=COLUMNS, padding=6, pad_value=1.0)
    write_png((sheet * 255).round().to(torch.uint8), str(args.out / "questions.png"))
    print(f"picture {args.out / 'questions.png'}, the last {OF_SUBSET} of them with an unseen pair")


if __name__ == "__main__":
    main()
