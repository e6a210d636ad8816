"""NMS, soft-NMS and weighted boxes fusion beside the package `ensemble_boxes`, on random sets of boxes.

    pip install ensemble-boxes    # 1.0.9; with numba and pandas 300 MB, so tests do without
    OMP_NUM_THREADS=1 python benchmarks/merging_parity.py --sets 3000

Sets are of 0 to 200 boxes of 1 to 20 classes, spread out or in a crowd, with distinct scores or with eight of them, in
1 to 5 views. Coordinates are 128ths, which float32 and the package's float64 hold alike; no threshold but 0.5 is a
ratio that two such boxes may have. The package sorts equal scores in an order of its own, which is given to ours. Where
scores are tied, its soft-NMS depends on how it swaps boxes meanwhile, and is not compared.

The package's `soft_nms` returns the scores from before; those after are in what its own function leaves.
"""

import argparse
from collections.abc import Callable
from importlib.metadata import version

import ensemble_boxes
import numba
import numpy as np
import torch
from ensemble_boxes.ensemble_boxes_nms import cpu_soft_nms_float

from zoo.detection.scale.merging import nms, soft_nms, weighted_boxes

NMS, LINEAR, GAUSSIAN = 3, 1, 2  # the package's numbers
THRESHOLDS = (0.5, 0.3001, 0.5501, 0.7001)


def drawn(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, bool]:
    """Boxes (n, 4) in [0, 1], scores, labels and views (n,), and whether scores are tied."""
    count, classes, views = int(rng.integers(0, 201)), int(rng.integers(1, 21)), int(rng.integers(1, 6))
    side, tied = int(rng.choice([16, 64])), bool(rng.random() < 0.3)
    corners = rng.integers(0, 128 - side // 2, (count, 2)) if rng.random() < 0.5 else rng.integers(40, 60, (count, 2))
    boxes = np.concatenate([corners, corners + rng.integers(1, side // 2, (count, 2))], 1) / 128
    scores = rng.integers(1, 9, count) / 8 if tied else rng.random(count, np.float32).astype(float)
    return boxes, scores, rng.integers(0, classes, count), rng.integers(0, views, count), tied


def theirs_nms(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, threshold: float) -> np.ndarray:
    found = ensemble_boxes.nms([boxes], [scores], [labels], iou_thr=threshold)
    return np.concatenate([found[2][:, None], found[1][:, None], found[0]], 1)


def theirs_soft(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, threshold: float, method: int) -> np.ndarray:
    kept = ensemble_boxes.soft_nms([boxes], [scores], [labels], method, threshold, 0.5, 0.001)
    rows = []
    for label in np.unique(labels):
        chosen, decayed = boxes[labels == label], scores[labels == label].copy()
        numbers = cpu_soft_nms_float(chosen.copy(), decayed, threshold, 0.5, 0.001, method)
        values = decayed[decayed > 0.001]
        rows.append(np.concatenate([np.full((len(numbers), 1), label), values[:, None], chosen[numbers]], 1))
    together = np.concatenate(rows)
    if not np.array_equal(together[:, 2:], kept[0]):
        raise SystemExit("the package's soft_nms is not what its own function gives")
    return together


def theirs_weighted(
    boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, views: np.ndarray, count: int, threshold: float
) -> np.ndarray:
    split = [[part[views == view] for view in range(count)] for part in (boxes, scores, labels)]
    found = ensemble_boxes.weighted_boxes_fusion(*split, iou_thr=threshold)
    return np.concatenate([found[2][:, None], found[1][:, None], found[0]], 1)


@numba.jit(nopython=True)
def compiled_argsort(scores: np.ndarray) -> np.ndarray:
    """Order of equal scores in the package's NMS, which is compiled: numba's own."""
    return scores.argsort()


def best_first(
    boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, argsort: Callable[[np.ndarray], np.ndarray]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments of ours, each class in the package's order of scores, which ours keeps where they are equal."""
    order = [np.flatnonzero(labels == label)[argsort(scores[labels == label])[::-1]] for label in np.unique(labels)]
    order = np.concatenate([*order, np.zeros(0, int)]).astype(int)
    made = torch.from_numpy(boxes[order]), torch.from_numpy(scores[order]), torch.from_numpy(labels[order])
    return made[0].float(), made[1].float(), made[2]


def difference(ours: dict[str, torch.Tensor], theirs: np.ndarray) -> float:
    """Largest difference of scores and coordinates between detections paired by nearness; inf if not as many."""
    rows = np.concatenate([ours["labels"][:, None].numpy(), ours["scores"][:, None].numpy(), ours["boxes"].numpy()], 1)
    if len(rows) != len(theirs):
        return float("inf")
    free, largest = np.ones(len(theirs), bool), 0.0
    for row in rows:
        apart = np.where(free, np.abs(theirs - row).max(1), np.inf)
        largest = max(largest, float(apart.min()))
        free[apart.argmin()] = False
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    found: dict[str, list[float]] = {}
    boxes_seen = 0

    def note(name: str, ours: dict[str, torch.Tensor], theirs: np.ndarray) -> None:
        found.setdefault(name, []).append(difference(ours, theirs))

    for number in range(arguments.sets):
        boxes, scores, labels, views, tied = drawn(rng)
        count = int(views.max()) + 1 if len(views) else 1
        order = np.argsort(views, kind="stable")  # the package puts views behind each other
        boxes, scores, labels, views = boxes[order], scores[order], labels[order], views[order]
        threshold = THRESHOLDS[number % len(THRESHOLDS)]
        given, compiled = (best_first(boxes, scores, labels, each) for each in (np.argsort, compiled_argsort))
        boxes_seen += len(boxes)
        if len(boxes):  # the package's NMS fails without boxes
            note("NMS", nms(*compiled, threshold), theirs_nms(boxes, scores, labels, threshold))
            if not tied:
                expected = theirs_soft(boxes, scores, labels, threshold, LINEAR)
                note("soft-NMS, linear", soft_nms(*given, None, threshold), expected)
                expected = theirs_soft(boxes, scores, labels, threshold, GAUSSIAN)
                note("soft-NMS, Gaussian", soft_nms(*given), expected)
        expected = theirs_weighted(boxes, scores, labels, views, count, threshold)
        note("weighted boxes fusion", weighted_boxes(*given, count, threshold), expected)
    print(f"ensemble_boxes {version('ensemble-boxes')}, numpy {version('numpy')}, torch {version('torch')}; ", end="")
    print(f"{boxes_seen} boxes\n\n| | sets | other sets kept | largest difference of scores and coordinates |")
    print("|---|---|---|---|")
    for name, each in found.items():
        finite = [value for value in each if value < 1e-3]
        print(f"| {name} | {len(each)} | {len(each) - len(finite)} | {max(finite):.1e} |")


if __name__ == "__main__":
    main()
