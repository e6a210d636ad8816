"""Exports of every technique: difference, metric on the validation split, time and size, by format.

    python benchmarks/export_table.py                        # six recipes, trained for some epochs each
    python benchmarks/export_table.py --recipe vit/digits --epochs 5

Training is cut short, since a file is compared with its checkpoint, however well that has learned. A row is what the
file's own proof says (docs/serving.md): the metric is that of the file, and in brackets the
checkpoint's; times are milliseconds an image, of a batch of 1 and of 16 images.
"""

import argparse
import tempfile
from contextlib import chdir
from pathlib import Path

from side_by_side import milliseconds, where

import zoo
from zoo.cli import main as command
from zoo.cli import recipes
from zoo.cli.plan import parse
from zoo.serving.export import Report

RECIPES = ("vit", "efficientnet", "mae", "gumbel_vae", "gaussian_vae")
SHORT = ["--trainer.enable_progress_bar=false", "--trainer.limit_test_batches=0", "--model.warmup_epochs=0"]


WAYS = ("eager", "compiled", "file")


def row(recipe: str, report: Report) -> list[str]:
    """A line of the table."""
    difference = f"{max(report.differences.values()):.1e}" if report.differences else ""
    said, found = "", report.validation
    if found is not None:
        said = f"{found['images'] - found['differing']:,} of {found['images']:,} alike"
    if found is not None and "metric" in found:
        said += f"; {found['metric']} {found['file']:.6f} ({found['checkpoint']:.6f})"
    times = [" / ".join(map(milliseconds, report.seconds.get(name, {}).values())) for name in WAYS]
    return [recipe, report.format, report.variant, difference, said, *times, f"{report.size / 1e6:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+", default=[*(f"{name}/digits" for name in RECIPES), "detection/shapes"])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--format", nargs="+", default=["onnx", "pt2", "safetensors"])
    parser.add_argument("--limit", type=int, help="validation images")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        for recipe in args.recipe:
            if command(["fit", recipe, f"--trainer.max_epochs={args.epochs}", *SHORT]):
                raise SystemExit(f"{recipe} was not trained")
            data = parse("fit", [str(recipes.find(recipe))], [], strict=False).data()
            for form in args.format:
                out = Path(f"{recipe.replace('/', '_')}.{form}")
                report = zoo.export(Path("runs", recipe), out, form, data=data, limit=args.limit)
                print(report, flush=True)
                rows.append(row(recipe, report))
    titles = ["recipe", "format", "outputs", "difference", "validation split"]
    titles += [f"{name}, ms" for name in WAYS] + ["MB"]
    print(f"\n{where('cpu', 'torch', 'timm', 'onnxruntime')}\n")
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    print("\n".join(f"| {' | '.join(each)} |" for each in rows))


if __name__ == "__main__":
    main()
