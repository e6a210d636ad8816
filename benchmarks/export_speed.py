"""Time of a prediction: eager PyTorch, torch.compile, and exported files, side by side on the CPU.

    python benchmarks/export_speed.py                       # ViT-S/16 and EfficientNet-B0, batches of 1 and 16
    python benchmarks/export_speed.py --network resnet50 --batch-size 4

Each network of random weights is exported by ``zoo.export``, which proves the file before it has its name; here the
files are only timed. Rows take turns, so that a busy moment of the machine hits all of them alike; what is compared are
medians. All have as many threads as there are cores. Images are normalised floats: preprocessing is timed by nobody.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from side_by_side import Row, report, where

import zoo

NETWORKS: dict[str, Callable[[], Any]] = {
    "vit_small_patch16_224": lambda: zoo.ViTClassifier("vit_small_patch16_224", num_classes=1000),
    "efficientnet_b0": lambda: zoo.EfficientNetClassifier("b0", num_classes=1000),
}
"""Modules by name; of others the name is timm's."""


def rows_of(name: str, folder: Path, compiled: bool) -> dict[str, Callable[[torch.Tensor], Any]]:
    """The ways to predict with a network, by name, each a function of images (B, 3, H, W)."""
    make = NETWORKS.get(name, lambda: zoo.ViTClassifier(name, num_classes=1000))
    module = make().eval().requires_grad_(False)
    files = {form: folder / f"{name}.{form}" for form in ("onnx", "pt2")}
    for form, file in files.items():
        print(zoo.export(module, file, form, preprocessing=False, compiled=False), flush=True)
    program = torch.export.load(files["pt2"]).module()
    session = onnxruntime.InferenceSession(files["onnx"], providers=["CPUExecutionProvider"])
    found = {
        "eager": module.probabilities,
        "torch.export": program,
        "onnxruntime": lambda images: session.run(None, {"images": images.numpy()}),
    }
    if compiled:
        found["torch.compile"] = torch.compile(module.probabilities)
    return found


def measure(functions: dict[str, Callable[[torch.Tensor], Any]], images: torch.Tensor, rounds: int) -> list[Row]:
    """Rows with the seconds of each round's prediction, which take turns."""
    rows = [Row(name, lambda device: None) for name in functions]  # type: ignore[arg-type, return-value]
    with torch.inference_mode():
        for function in functions.values():
            for _ in range(3):  # warms up and compiles
                function(images)
        for _ in range(rounds):
            for row in rows:
                start = time.perf_counter()
                functions[row.name](images)
                row.seconds.append(time.perf_counter() - start)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", default=list(NETWORKS), help="a timm network's name")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    args = parser.parse_args()
    print(where("cpu", "torch", "timm", "onnxruntime"))
    with tempfile.TemporaryDirectory() as folder:
        for name in args.network:
            functions = rows_of(name, Path(folder), not args.no_compile)
            size = 224
            for batch_size in args.batch_size:
                images = torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(0))
                print(f"\n{name}, batch {batch_size}\n")
                report(measure(functions, images, args.rounds), batch_size, on_gpu=False)


if __name__ == "__main__":
    main()
