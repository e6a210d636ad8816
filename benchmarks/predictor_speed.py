"""Time of ``zoo.load`` to a first answer, and images a second of a folder beside ``zoo predict``'s own way.

    OMP_NUM_THREADS=1 python benchmarks/predictor_speed.py

The first answer is a ViT-Ti's at 224 pixels, from a checkpoint with the states of AdamW, after the imports. The folder
has JPEGs of 500 by 375 pixels; the network is so small that reading is what takes the time. Both ways take turns. The
predictor reads with a thread a core, the data module with its own number of worker processes.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import numpy as np
from lightning.pytorch import Trainer
from PIL import Image
from side_by_side import milliseconds, where

import zoo
from datamodules import ImageFolderDataModule, preprocessing
from zoo.callbacks import WritePredictions
from zoo.guards import guard
from zoo.serving.predictor import Predictor

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def images(folder: Path, count: int) -> None:
    """JPEGs of smooth noise, as large as those of ImageNet."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        small.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number:04}.jpg", quality=90)


def first_answer() -> tuple[float, float]:
    """Seconds of wall and of processor time from a checkpoint to an answer."""
    wall, cpu = time.perf_counter(), time.process_time()
    zoo.load("tiny.ckpt")("train/a/0000.jpg")
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, chdir(place):
        images(Path("folder"), args.images)
        images(Path("train", "a"), 4)
        images(Path("train", "b"), 4)
        module = zoo.ViTClassifier("vit_tiny_patch16_224", num_classes=2)
        trainer = guard(Trainer(max_steps=1, enable_checkpointing=False, **QUIET))  # type: ignore[arg-type]
        trainer.fit(module, ImageFolderDataModule("train", batch_size=4, num_workers=0, val_fraction=0))
        trainer.save_checkpoint("tiny.ckpt")
        answers = [first_answer() for _ in range(args.rounds)]
        print(f"\n{where('cpu', 'torch', 'timm', 'lightning')}\n")
        for name, taken in zip(("wall", "processor"), zip(*answers, strict=True), strict=True):
            spread = f"{milliseconds(min(taken))} to {milliseconds(max(taken))}"
            print(f"first answer, ms of {name} time: first {milliseconds(taken[0])}, all {spread}")

        small = zoo.ViTClassifier("vit_tiny_patch16_224", num_classes=2, width=12, depth=1, heads=2)

        def data() -> ImageFolderDataModule:
            return ImageFolderDataModule("nowhere", predict_root="folder", batch_size=32)

        def recipe() -> None:
            Trainer(callbacks=[WritePredictions()], enable_checkpointing=False, **QUIET).predict(  # type: ignore[arg-type]
                small, datamodule=data(), return_predictions=False
            )

        predictor = Predictor(small, preprocessing.create(data().preprocessing()))
        ways: dict[str, Callable[[], object]] = {"zoo predict": recipe, "predictor": lambda: predictor("folder")}
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(args.rounds):
            for name in list(ways)[:: 1 if number % 2 else -1]:
                start = time.perf_counter()
                ways[name]()
                rates[name].append(args.images / (time.perf_counter() - start))
        for name, found in rates.items():
            print(f"{name}: {statistics.median(found):.1f} images/s, {min(found):.1f} to {max(found):.1f}")


if __name__ == "__main__":
    main()
