"""Pictures of the same images by the ways to detect at many scales, of checkpoints of benchmarks/detection_scale.py.

    python benchmarks/detection_scale_pictures.py --out runs/detection_scale --images 4

A column an image, a row a way: each that has a checkpoint there, TridentNet's branches alone as well. What is detected
with a score above 0.4 has a solid box, what is there a dashed one. Written beside the tables, as pictures.png.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from detection_scale import ROWS
from torch import Tensor
from torchvision.io import write_png
from torchvision.utils import make_grid

import zoo
from zoo.cli.plan import parse
from zoo.cli.recipes import recipes
from zoo.common.pictures import boxed

SURE = 0.4


def ways(out: Path, seed: int) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Title, detector and arguments of ``detect`` of each way whose checkpoint is there."""
    for name, row in ROWS.items():
        run = f"{row.of or name}_all_seed{seed}"
        if not (out / f"{run}.json").exists():  # it is not finished
            continue
        detector = zoo.load(out / "runs" / run).module
        arguments = yaml.safe_load(recipes()[row.recipe].read_text(encoding="utf-8"))["model"]["init_args"]
        branch = [option for option in row.options if option.startswith("--model.branch")]
        detector.hparams.branch = int(re.sub(r"\D", "", branch[0])) if branch else arguments.get("branch")
        yield row.title, detector, {"views": arguments.get("views") or [{}]}
        if name == "trident":
            for number in range(3):
                detector.hparams.branch = number
                yield f"{row.title}, branch {number} alone", detector, {"views": [{}]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs", "detection_scale"))
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data = parse("test", [str(recipes()["detection/shapes_one_level"])], ["--data.num_workers=0"], strict=False).data()
    samples = [data.samples("test")[number] for number in range(args.images)]
    images, targets = data.on_after_batch_transfer(data.collate()(samples), 0)
    rows: list[Tensor] = []
    for title, detector, arguments in ways(args.out, args.seed):
        found = detector.detect(images, **arguments)
        print(f"{len(rows) + 1}. {title}: {sum((each['scores'] > SURE).sum().item() for each in found)} detections")
        rows.append(boxed(images, found, targets, data.classes, threshold=SURE))
    if not rows:
        raise SystemExit(f"there is no checkpoint of seed {args.seed} in {args.out / 'runs'}")
    sheet = make_grid(torch.cat(rows), nrow=args.images, padding=4, pad_value=1.0)
    write_png((sheet * 255).round().to(torch.uint8), str(args.out / "pictures.png"))
    print(f"picture {args.out / 'pictures.png'}, a row each in this order")


if __name__ == "__main__":
    main()
