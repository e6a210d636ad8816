"""Time of COCO's average precision, side by side with pycocotools and with torchmetrics' MeanAveragePrecision.

    python benchmarks/average_precision_speed.py                    # 5,000 images, minutes
    python benchmarks/average_precision_speed.py --images 500       # seconds

Every row gets the same detections as tensors, as a validation epoch has them, in batches of 16, and gives AP, AP by
size and AR. What each needs for that is timed: torchmetrics' updates, pycocotools' dicts. torchmetrics is given its
thresholds in float64, since its own are float32 and count an IoU of .6 as less. Rows take turns; medians are compared.
All have to agree in AP before anything is printed.
"""

import argparse
import contextlib
import io
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from side_by_side import where
from torchmetrics.detection import MeanAveragePrecision

from zoo.metrics.average_precision import CocoAveragePrecision

BATCH = 16
Images = list[dict]


def make_set(images: int, detections: int, classes: int) -> tuple[Images, Images]:
    """Seven objects an image, as COCO has, each found once by a detection a little off; the others are wrong."""
    rng = np.random.default_rng(0)
    found, there = [], []
    for image_id in range(images):
        number = min(rng.poisson(7), detections)
        boxes = rng.uniform(0, 400, (detections + number, 4))
        boxes[:, 2:] = boxes[:, :2] + np.exp(rng.uniform(np.log(8), np.log(300), (detections + number, 2)))
        labels = rng.integers(0, classes, detections + number)
        true, of_true = boxes[detections:], labels[detections:]
        boxes[:number], labels[:number] = true + rng.normal(0, 4, true.shape), of_true
        scores = rng.random(detections)
        scores[:number] **= 0.3
        found.append(
            {
                "boxes": torch.tensor(boxes[:detections], dtype=torch.float32),
                "scores": torch.tensor(scores, dtype=torch.float32),
                "labels": torch.tensor(labels[:detections]),
            }
        )
        there.append(
            {
                "boxes": torch.tensor(true, dtype=torch.float32),
                "labels": torch.tensor(of_true),
                "image_id": image_id,
            }
        )
    return found, there


def ours(found: Images, there: Images, classes: int) -> float:
    metric = CocoAveragePrecision()
    for start in range(0, len(found), BATCH):
        metric.update(found[start : start + BATCH], there[start : start + BATCH])
    return metric.compute()["ap"].item()


def torchmetrics(backend: str) -> Callable[[Images, Images, int], float]:
    def run(found: Images, there: Images, classes: int) -> float:
        metric = MeanAveragePrecision(
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0, 1, 101).tolist(),
            backend=backend,
        )
        for start in range(0, len(found), BATCH):
            metric.update(found[start : start + BATCH], there[start : start + BATCH])
        return metric.compute()["map"].item()

    return run


def rows(images: Images) -> list[dict]:
    out = []
    for image_id, image in enumerate(images):
        boxes = image["boxes"].double().numpy()
        boxes[:, 2:] -= boxes[:, :2]
        scores = image["scores"].tolist() if "scores" in image else [1.0] * len(boxes)
        for box, label, score in zip(boxes.tolist(), image["labels"].tolist(), scores, strict=True):
            row = {"id": len(out) + 1, "image_id": image_id, "category_id": label, "bbox": box, "score": score}
            out.append(row | {"area": box[2] * box[3], "iscrowd": 0})
    return out


def pycocotools(found: Images, there: Images, classes: int) -> float:
    truth = COCO()
    truth.dataset = {
        "images": [{"id": index} for index in range(len(there))],
        "categories": [{"id": index} for index in range(classes)],
        "annotations": rows(there),
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(rows(found)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


ROWS = {
    "ours": ours,
    "torchmetrics, faster_coco_eval": torchmetrics("faster_coco_eval"),
    "torchmetrics, pycocotools": torchmetrics("pycocotools"),
    "pycocotools": pycocotools,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100, help="in each image")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    found, there = make_set(args.images, args.detections, args.classes)
    seconds: dict[str, list[float]] = {name: [] for name in ROWS}
    results = {}
    for _ in range(args.rounds):
        for name, run in ROWS.items():
            start = time.perf_counter()
            results[name] = run(found, there, args.classes)
            seconds[name].append(time.perf_counter() - start)
    for name, ap in results.items():
        # torchmetrics rounds its result to float32.
        if abs(ap - results["ours"]) > (1e-6 if "torchmetrics" in name else 1e-12):
            raise SystemExit(f"{name} has AP {ap}, ours is {results['ours']}")
    print(f"{args.images} images, {args.detections} detections each, {args.classes} classes, AP {results['ours']:.4f};")
    print(where("cpu", "torch", "torchmetrics", "faster-coco-eval", "pycocotools"))
    print("\n| | seconds | lowest to highest | relative |\n|---|---|---|---|")
    for name, times in seconds.items():
        median = statistics.median(times)
        relative = median / statistics.median(seconds["ours"])
        print(f"| {name} | {median:.2f} | {min(times):.2f} to {max(times):.2f} | {relative:.2f} |")


if __name__ == "__main__":
    main()
