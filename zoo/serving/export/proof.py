"""Proof that an exported file computes what its module does: differences, and the time that both take."""

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from zoo.common.protocols import KeepsArguments
from zoo.serving.export.graph import Graph, quiet, reason

BATCHES = (1, 2, 5)
TIMED = (1, 16)
ROWS = ("boxes", "scores", "labels")
"""Outputs that are a set of rows, of which ``count`` are filled: equal scores may come in another order."""

ROUNDING = 1e-4
"""Relative difference that float32 alone may make of real images in a trained network.

After two epochs of ``efficientnet/digits`` eager torch is off by 1.9e-5 from itself in float64, onnxruntime by 1.4e-5.
"""

Run = Callable[..., Mapping[str, Tensor]]


@torch.no_grad()
def differences(graph: Graph, run: Run, free: tuple[bool, bool]) -> dict[str, float]:
    """Largest relative difference between a graph and a file of it, by the batch that both computed.

    Args:
        graph: The graph, run by eager torch in float32.
        run: The file.
        free: Tells of height and width whether the file takes others than those traced.
    """
    threshold = threshold_of(graph.variant.module)
    _, height, width = graph.example(1)[0].shape[1:]
    asked: list[tuple[int, tuple[int, int]]] = [(count, (height, width)) for count in BATCHES]
    asked += [(1, (2 * height, width))] * free[0] + [(1, (height, 2 * width))] * free[1]
    found = {}
    for count, size in asked:
        inputs = graph.example(count, size)
        found[named(inputs[0])] = difference(computed(run, *inputs), graph(*inputs), threshold)
    return found


class FailingFileError(RuntimeError):
    """A file that does not compute images which it should take. Its message says of which, and why."""


def computed(run: Run, *inputs: Tensor) -> Mapping[str, Tensor]:
    """Outputs of a file.

    Raises:
        FailingFileError: If it ends in an error, whichever its runtime raises.
    """
    try:
        return run(*inputs)
    except Exception as error:
        raise FailingFileError(f"it does not compute images {named(inputs[0])}: {reason(error)}") from error


def named(images: Tensor) -> str:
    """``5 x 3x224x224`` for a batch of images (5, 3, 224, 224)."""
    return f"{len(images)} x {'x'.join(map(str, images.shape[1:]))}"


def difference(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], threshold: float = 0.0) -> float:
    """Largest difference of some outputs, relative to the largest value of each; infinite where they are others.

    Args:
        given, expected: Outputs by name.
        threshold: Score from which detections count.
    """
    if given.keys() != expected.keys():
        return math.inf
    if "count" in expected:
        images, most = range(len(expected["count"])), expected["boxes"].shape[1]
        rows = [(rows_of(given, i), rows_of(expected, i)) for i in images]
        return max((difference_of_rows(ours, theirs, most, threshold) for ours, theirs in rows), default=0.0)
    return max(relative(given[name], expected[name]) for name in expected)


def relative(given: Tensor, expected: Tensor) -> float:
    """Largest difference of two tensors, relative to the largest value; of integers, infinite unless they are equal."""
    if given.shape != expected.shape or given.dtype != expected.dtype:
        return math.inf
    if torch.equal(given, expected) or not expected.numel():
        return 0.0
    if not expected.is_floating_point() or not torch.isfinite(given).all():
        return math.inf
    return float((given - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny))


def difference_of_rows(
    given: Mapping[str, Tensor], expected: Mapping[str, Tensor], most: int, threshold: float
) -> float:
    """Largest difference between detections of an image, boxes relative to the largest coordinate; infinite for others.

    Scores that differ by rounding come in another order, and whether one is just above the threshold, or still among
    the best, is a matter of rounding as well: there a row need not have its like.

    Args:
        given, expected: ``boxes`` (n, 4), ``scores`` (n,), ``labels`` (n,).
        most: The number of detections at which the best are taken.
        threshold: Score from which detections count.
    """
    if all(torch.equal(given[name], expected[name]) for name in ROWS):
        return 0.0
    both = (given, expected)
    side = max(float(rows["boxes"].abs().max()) for rows in both if len(rows["boxes"]))
    ours, theirs = (torch.cat([rows["boxes"] / side, rows["scores"][:, None]], 1).double() for rows in both)
    apart = (ours[:, None] - theirs).abs().amax(-1)
    apart[given["labels"][:, None] != expected["labels"]] = math.inf
    lowest = max([threshold, *(float(rows["scores"].min()) for rows in both if len(rows["scores"]) >= most)])
    worst = 0.0
    for rows, distances in ((given, apart), (expected, apart.T)):
        for score, row in zip(rows["scores"].tolist(), distances, strict=True):
            nearest = float(row.min()) if len(row) else math.inf
            if nearest <= ROUNDING or score > lowest + ROUNDING:
                worst = max(worst, nearest if nearest <= ROUNDING else math.inf)
    return worst


def threshold_of(module: Any) -> float:
    """Score from which a detector's detections count."""
    return float(module.hparams.get("score_threshold", 0.0)) if isinstance(module, KeepsArguments) else 0.0


def rows_of(outputs: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """The rows of one image that are filled."""
    count = int(outputs["count"][number])
    return {name: outputs[name][number, :count] for name in ROWS}


@torch.no_grad()
def times(graph: Graph, run: Run, compiled: Run | None) -> tuple[dict[str, dict[int, float]], list[str]]:
    """Seconds an image of eager torch, ``torch.compile`` and the file, by batch size; and what could not be measured.

    Args:
        graph: The graph; eager is the module's own ``predict_step``.
        run: The file.
        compiled: The graph compiled, which is done when it is first called. None: it is not measured.
    """
    runs: dict[str, Callable[..., Any]] = {"eager": partial(_predict, graph)}
    runs |= ({} if compiled is None else {"compiled": compiled}) | {"file": run}
    found: dict[str, dict[int, float]] = {}
    notes = []
    for name, each in runs.items():
        try:
            with quiet():
                found[name] = {count: _seconds(each, graph.example(count)) / count for count in TIMED}
        except Exception as error:  # of whatever compiles for this machine
            if name != "compiled":
                raise
            notes.append(f"torch.compile failed: {reason(error)}")
    return found, notes


def _predict(graph: Graph, images: Tensor, sizes: Tensor | None = None) -> Any:
    """Predictions of a graph's inputs by the module in its own way; a variant that is not the first has none."""
    variant: Any = graph.variant
    if variant.name != next(iter(variant.module.exports)):
        return graph(images) if sizes is None else graph(images, sizes)
    images = graph.prepared(images, sizes)
    return variant.module.predict_step(
        images if sizes is None else (images, [{"size": tuple(size)} for size in sizes.tolist()]), 0
    )


def _seconds(run: Callable[..., Any], inputs: tuple[Any, ...], enough: float = 0.3, least: int = 3) -> float:
    """Median of the seconds that a run takes, once it is warm."""
    run(*inputs)
    taken: list[float] = []
    while len(taken) < least or sum(taken) < enough:
        start = time.perf_counter()
        run(*inputs)
        taken.append(time.perf_counter() - start)
    return median(taken)
