"""Small objects in large images: the image as a whole beside its tiles, by what is found, time and memory.

    OMP_NUM_THREADS=1 python benchmarks/large_images.py    # trains a detector at 128 pixels first, which takes longest
    python benchmarks/large_images.py --checkpoint runs/detection/shapes/version_0/checkpoints/last.ckpt

Images are aerial renders (`preset: aerial`), with 16 to 48 objects of 10 to 14 pixels in each 1024 pixels squared. They
are shown to the detector in four ways: as a whole, resized to the size that it was trained at; as a whole and as they
are; in tiles; and in tiles beside the resized whole, which then answers for what is larger than tiles share. All with
up to 1,000 detections; out of 10,000 candidates a level in the image as it is, the detector's own number in the others.

Each way and size is measured in a process of its own. Memory is the largest that the process took (VmHWM in Linux's
/proc) beyond what it had with the detector and the image in it. Times are of the processor, which other programs
disturb less. Objects are found by a detection of their class with an IoU of 0.5 and a score above 0.5; the others above
that are wrong. AP has no such limit.

What is done is kept in --out: a command that was interrupted goes on where it was. It prints a markdown table, and
writes that, and the same part of the largest image in all ways, to --out.
"""

import argparse
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.io import write_png
from torchvision.ops import box_iou
from torchvision.utils import draw_bounding_boxes, make_grid

import zoo
from datamodules import ShapesDetectionDataModule
from zoo.metrics.average_precision import CocoAveragePrecision

TRAINING = ["--data.preset", "aerial", "--data.max_objects", "8", "--trainer.max_epochs", "3"]
TRAINING += ["--trainer.check_val_every_n_epoch", "3"]
WAYS = ("whole, at training size", "whole, as it is", "tiles", "tiles and whole")
SURE = 0.5
COLORS = ["#ff5252", "#40c4ff", "#ffd740", "#b2ff59", "#ea80fc", "#ffab40"]
SHOWN, ENLARGED = 384, 2  # side in pixels of what the picture shows, and how much larger that is in it


def views(way: str, size: int, trained: int, tile: int, overlap: float) -> list[dict[str, Any]]:
    """The views of a way to look at an image of some size."""
    whole, tiles = {"scale": trained / size}, {"tile": tile, "overlap": overlap}
    beside = whole | {"valid_range": [tile * overlap, None]}
    return dict(zip(WAYS, ([whole], [{}], [tiles], [tiles, beside]), strict=True))[way]


def render(path: Path, size: int, number: int) -> None:
    """Draws a test image and its target."""
    data = ShapesDetectionDataModule("aerial", size, test_size=number + 1, cache_mb=0)
    image, target = data.raw_samples("test")[number]
    _write(path, {"image": image, "boxes": target["boxes"], "labels": target["labels"]})


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, part := path.with_suffix(".part"))
    part.replace(path)


def train(folder: Path, options: list[str]) -> Path:
    """The checkpoint of a detector that is trained unless it is there."""
    found = sorted(folder.glob("runs/**/last.ckpt"))
    if not found:
        print("training a detector, see", folder / "training.log", file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "zoo", "fit", "-c", "detection/shapes", *TRAINING, *options]
        with (folder / "training.log").open("w") as log:
            if subprocess.run(command, cwd=folder, stdout=log, stderr=log, check=False).returncode:
                raise SystemExit(f"the training failed: see {folder / 'training.log'}")
        found = sorted(folder.glob("runs/**/last.ckpt"))
    return found[-1]


# One measurement, in a process of its own.


def apart(function: Callable[..., None], *args: Any) -> None:
    """Calls a function in a process that has imported all, and computed nothing yet."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__}{args} failed")


def memory(name: str) -> int:
    """VmRSS, what the process has now, or VmHWM, the most that it had, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measure(path: Path, way: str, images: list[Path], settings: dict[str, Any]) -> None:
    """Writes detections, seconds of the processor an image, and memory in bytes."""
    predictor = zoo.load(settings["checkpoint"])
    detector, preprocessing = predictor.module, predictor.preprocessing
    detector.hparams.max_detections = 1000
    if way == WAYS[1]:  # as many candidates as in tiles, more or less
        detector.hparams.top_candidates = 10_000
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    trained = int(detector.hparams.image_size)
    detector.detect(torch.zeros(1, 3, trained, trained))  # what is made once only
    found, seconds, most = [], 0.0, 0
    for file in images:
        image = torch.load(file, weights_only=True)["image"].float().div_(255).sub_(mean).div_(std)[None]
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before, start = memory("VmRSS"), time.process_time()
        shown = views(way, image.shape[-1], trained, settings["tile"], settings["overlap"])
        found += detector.detect(image, views=shown, merge=settings["merge"])
        seconds += time.process_time() - start
        most = max(most, memory("VmHWM") - before)
    made = {"detections": found, "seconds": seconds / len(images), "bytes": most}
    _write(path, made | {"settings": settings})


# What the measurements say.


def matched(found: dict[str, Tensor], target: dict[str, Tensor]) -> tuple[int, int]:
    """Objects that a sure detection finds, and sure detections that find none, from the best on."""
    sure = found["scores"] > SURE
    overlaps = box_iou(found["boxes"][sure], target["boxes"])
    overlaps[found["labels"][sure][:, None] != target["labels"]] = 0
    hits = 0
    for row in overlaps:
        if len(row) and row.max() >= 0.5:
            overlaps[:, row.argmax()] = 0  # the object is taken; row is a view, but it is not looked at again
            hits += 1
    return hits, int(sure.sum()) - hits


def row(measured: dict[str, Any], targets: list[dict[str, Tensor]]) -> dict[str, float]:
    """Columns of the table."""
    metric = CocoAveragePrecision(max_detections=(1000,))
    metric.update(measured["detections"], targets)
    scores = metric.compute()
    hits, wrong = (sum(each) for each in zip(*map(matched, measured["detections"], targets), strict=True))
    columns = {"ap": 100 * scores["ap"].item(), "ap50": 100 * scores["ap50"].item(), "hits": hits, "wrong": wrong}
    return columns | {"seconds": measured["seconds"], "megabytes": measured["bytes"] / 2**20}


def picture(found: dict[str, dict[str, Tensor]], sample: dict[str, Tensor]) -> Tensor:
    """The part of an image with the most objects, in all ways side by side. uint8.

    Objects have thin white boxes, sure detections coloured ones, a colour for each class.
    """
    corners, counts = (sample["boxes"][:, :2] // SHOWN).long().unique(dim=0, return_counts=True)
    left, top = (corners[counts.argmax()] * SHOWN).tolist()
    part = sample["image"][:, top : top + SHOWN, left : left + SHOWN]
    part = part.repeat_interleave(ENLARGED, 1).repeat_interleave(ENLARGED, 2)

    def drawn(panel: Tensor, boxes: Tensor, colors: list[str], width: int) -> Tensor:
        boxes = (boxes - boxes.new_tensor([left, top, left, top])) * ENLARGED
        inside = ((boxes[:, :2] < panel.shape[1]) & (boxes[:, 2:] > 0)).all(1)
        colors = [color for color, shown in zip(colors, inside.tolist(), strict=True) if shown]
        boxes = boxes[inside].clamp(0, panel.shape[1] - 1)
        return draw_bounding_boxes(panel, boxes, colors=colors, width=width) if colors else panel

    part, panels = drawn(part, sample["boxes"], ["white"] * len(sample["boxes"]), 1), []
    for detections in found.values():
        sure = detections["scores"] > SURE
        colors = [COLORS[label] for label in detections["labels"][sure].tolist()]
        panels.append(drawn(part, detections["boxes"][sure], colors, 2))
    return make_grid(torch.stack(panels), nrow=2, padding=6, pad_value=255)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="of a detector of shapes; one is trained without it")
    parser.add_argument("--out", type=Path, default=Path("runs/large_images"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--images", type=int, default=4, help="of each size")
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--overlap", type=float, default=0.25)
    parser.add_argument("--merge", default="nms")
    parser.add_argument(
        "--measure", nargs=2, metavar=("WAY", "SIZE"), help="one measurement, as the others are started"
    )
    args, options = parser.parse_known_args()
    checkpoint = args.checkpoint or train(args.out, options)
    settings = {"checkpoint": str(checkpoint.resolve()), "images": args.images, "tile": args.tile}
    settings |= {"overlap": args.overlap, "merge": args.merge}  # results under others are measured again
    images = {size: [args.out / "images" / f"{size}_{n}.pt" for n in range(args.images)] for size in args.sizes}
    results = {(size, way): args.out / "results" / f"{size}_{way}.pt" for size in args.sizes for way in WAYS}
    for size, paths in images.items():
        for number, path in enumerate(paths):
            if not path.exists():
                apart(render, path, size, number)
    for (size, way), path in results.items():
        if not path.exists() or torch.load(path, weights_only=True)["settings"] != settings:
            print(f"{size} pixels, {way}", file=sys.stderr)
            apart(measure, path, way, images[size], settings)
    lines = []
    for size, paths in images.items():
        samples = [torch.load(path, weights_only=True) for path in paths]
        targets = [{name: sample[name] for name in ("boxes", "labels")} for sample in samples]
        measured = {way: torch.load(results[size, way], weights_only=True) for way in WAYS}
        objects = sum(len(target["labels"]) for target in targets)
        rows = {way: row(measured[way], targets) for way in WAYS}
        for way, each in rows.items():
            first = rows[WAYS[0]]["hits"]
            times = f"{each['hits'] / first:.1f}" if first else "none there"
            lines.append(
                f"| {size} | {way} | {each['ap']:.1f} | {each['ap50']:.1f} | {each['hits']} of {objects} | "
                f"{times} | {each['wrong']} | {each['seconds']:.2f} | {each['megabytes']:.0f} |"
            )
        shown = picture({way: measured[way]["detections"][0] for way in WAYS}, samples[0])
        write_png(shown, str(args.out / f"{size}.png"))
    where = f"Python {platform.python_version()}, torch {version('torch')}, NumPy {np.__version__}, "
    where += f"{torch.get_num_threads()} thread(s) of {os.cpu_count()} cores, no GPU; "
    where += f"{args.images} images of each size, tiles of {args.tile} pixels that share {args.overlap:g}, {args.merge}"
    head = "| pixels | shown | AP | AP50 | found | times the first | wrong | CPU s an image | MB |"
    table = "\n".join([where, "", head, "|---" * 9 + "|", *lines])
    (args.out / "table.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
