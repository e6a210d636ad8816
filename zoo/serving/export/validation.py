"""Validation of an exported file on a data module's images: does it predict what the checkpoint does, as well?"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.loading.seeding import map_images
from zoo.common import batch as batches
from zoo.common.classes import matched, names_of
from zoo.common.protocols import MeasuresDetections
from zoo.serving.export.graph import Graph, input_shape
from zoo.serving.export.proof import (
    ROUNDING,
    ROWS,
    Run,
    computed,
    difference,
    difference_of_rows,
    relative,
    rows_of,
    threshold_of,
)

EXACT = 1e-6
"""Difference that a metric of the file may have from the checkpoint's."""


@torch.no_grad()
def validate(
    graph: Graph, run: Run, data: Any, free: tuple[bool, bool] = (True, True), limit: int | None = None
) -> dict[str, Any]:
    """Predictions of a file beside those of its module, on a data module's validation split.

    Args:
        graph: The graph that was exported; its module is asked in its own way, by ``predict_step``.
        run: The file.
        data: A data module, whose batches are uint8 images until it has prepared them.
        free: Tells of height and width whether the file takes others than those traced.
        limit: After so many images it ends, with a whole batch. None: all.

    Returns:
        ``images``; ``differing``, how many of them are predicted otherwise; ``difference``, the largest of the values
        predicted; and where there are labels ``metric``, its name, and its value for ``checkpoint`` and ``file``.

    Raises:
        ValueError: If there are no such images, or the file takes others.
    """
    compared = _comparison(graph, data)
    for number, batch in enumerate(_batches(data)):
        prepared = data.on_after_batch_transfer(batch, 0)
        compared.add(computed(run, *_inputs(graph, batch, prepared, free)), prepared, number)
        if limit is not None and compared.images >= limit:
            break
    if not compared.images:
        raise ValueError(f"{type(data).__name__} has no validation images")
    found = {"images": compared.images, "differing": compared.differing, "difference": compared.difference}
    return found | compared.metric()


def agrees(found: Mapping[str, Any], tolerance: float) -> bool:
    """Tells whether a validation says that a file predicts what its checkpoint does.

    What is predicted has to be the same, and the metric; numbers may differ by rounding, which in a trained network is
    more than ``tolerance``, of random images. A file that is to be exact, of tolerance 0, stays within 1e-6.
    """
    same = not found["differing"] and found["difference"] <= (max(tolerance, ROUNDING) if tolerance else EXACT)
    return same and ("metric" not in found or abs(found["checkpoint"] - found["file"]) <= EXACT)


def _batches(data: Any) -> Iterator[Any]:
    """Batches of the validation split, of one loader after the other, as their images are read."""
    data.prepare_data()
    data.setup("validate")
    loaders = data.val_dataloader()
    for loader in [loaders] if isinstance(loaders, DataLoader) else loaders or ():
        yield from loader


def _inputs(graph: Graph, batch: Any, prepared: Any, free: tuple[bool, bool]) -> tuple[Tensor, ...]:
    images = batches.images(prepared) if graph.preprocessing is None else _pixels(batch)
    got, expected = images.shape[1:], input_shape(graph.variant.module)
    if any(not may and ours != theirs for may, ours, theirs in zip((False, *free), got, expected, strict=True)):
        raise ValueError(f"they are {'x'.join(map(str, got))}, and the graph takes {'x'.join(map(str, expected))}")
    if graph.inputs == ("images",):
        return (images,)
    sizes = [each.get("size", images.shape[2:]) for each in batches.about_images(prepared)]
    return images, torch.as_tensor(sizes, dtype=torch.int64)


def _pixels(batch: Any) -> Tensor:
    """The uint8 images of a batch, which :func:`zoo.common.batch.images` does not take for a module's."""
    found: list[Tensor] = []
    map_images(batch, lambda images: found.append(images) or images)  # type: ignore[func-returns-value]
    if len(found) != 1:
        raise ValueError("they are no uint8 images (B, C, H, W), which the graph takes")
    return found[0]


def _comparison(graph: Graph, data: Any) -> Any:
    """The way to compare predictions, by what the variant gives: a set of boxes, classes, or values as they are."""
    outputs = set(graph(*graph.example(1)))
    if "count" in outputs and isinstance(graph.variant.module, MeasuresDetections):
        return Boxes(graph, data)
    return Classes(graph, data) if "probabilities" in outputs else Values(graph, data)


class Values:
    """Comparison of outputs, number by number: features, codes, maps; the module is asked for the same variant."""

    def __init__(self, graph: Graph, data: Any) -> None:
        self.graph, self.data = graph, data
        self.module: Any = graph.variant.module
        self.threshold = threshold_of(self.module)
        self.images, self.differing, self.difference = 0, 0, 0.0

    def add(self, found: Mapping[str, Tensor], batch: Any, number: int) -> None:
        """Compares what a file found in a batch with what the module finds in it, prepared."""
        images = batches.images(batch)
        sizes = [torch.as_tensor([each.get("size", images.shape[2:]) for each in batches.about_images(batch)])]
        expected = self.graph.variant(images, *(sizes if self.graph.variant.needs_sizes else ()))
        for i in range(len(images)):
            ours, theirs = ({name: each[i : i + 1] for name, each in of.items()} for of in (found, expected))
            self.count([difference(ours, theirs, self.threshold)])

    def count(self, differences: Sequence[float]) -> None:
        finite = [each for each in differences if each != math.inf]
        self.images += len(differences)
        self.differing += len(differences) - len(finite)
        self.difference = max([self.difference, *finite])

    def metric(self) -> dict[str, Any]:
        return {}


class Classes(Values):
    """Comparison of classes, and of their accuracy."""

    def __init__(self, graph: Graph, data: Any) -> None:
        super().__init__(graph, data)
        self.right = {"checkpoint": 0.0, "file": 0.0}
        self.labelled = 0
        self.table = _table(self.module, data)

    def add(self, found: Mapping[str, Tensor], batch: Any, number: int) -> None:
        given, expected = found["probabilities"], self.module.predict_step(batch, number)
        several = self.module.hparams.multi_label
        if several:
            other = ((given >= 0.5) != (expected >= 0.5)) & ((expected - 0.5).abs() > ROUNDING)
            others = other.any(1)
        else:  # of two that are as likely, rounding decides
            chosen = expected.gather(1, given.argmax(1, keepdim=True))[:, 0]
            others = chosen < expected.max(1).values - ROUNDING
        self.count(
            [math.inf if other else relative(*pair) for other, *pair in zip(others, given, expected, strict=True)]
        )
        if batches.has_labels(batch):
            labels = batches.images_and_labels(batch)[1]
            self.labelled += len(labels)
            for name, each in (("file", given), ("checkpoint", expected)):
                self.right[name] += self._right(each, labels, several)

    def _right(self, probabilities: Tensor, labels: Tensor, several: bool) -> float:
        if not several:
            own = labels if self.table is None else self.table[labels]
            return float((probabilities.argmax(1) == own).sum())
        own = labels
        if self.table is not None:
            own = torch.zeros_like(probabilities, dtype=labels.dtype)
            own[:, self.table] = labels
        return float(((probabilities >= 0.5) == own.bool()).float().mean(1).sum())

    def metric(self) -> dict[str, Any]:
        if not self.labelled:
            return {}
        return {"metric": "accuracy", **{name: right / self.labelled for name, right in self.right.items()}}


class Boxes(Values):
    """Comparison of detections, in pixels of the original images, and of their average precision."""

    def __init__(self, graph: Graph, data: Any) -> None:
        super().__init__(graph, data)
        self.most = self.module.hparams.max_detections
        self.precision = {name: self.module.detection_metric(data) for name in ("checkpoint", "file")}
        self.labelled = False
        self.table = _table(self.module, data)

    def add(self, found: Mapping[str, Tensor], batch: Any, number: int) -> None:
        expected = self.module.predict_step(batch, number)
        images, about = batches.images(batch), batches.about_images(batch)
        scales = [_scale(each, images.shape[2:]) for each in about]
        given = [rows_of(found, i) for i in range(len(images))]
        given = [rows | {"boxes": rows["boxes"] * scale} for rows, scale in zip(given, scales, strict=True)]
        self.count([difference_of_rows(*pair, self.most, self.threshold) for pair in zip(given, expected, strict=True)])
        if batches.has_targets(batch):
            self.labelled = True
            targets = [
                target | {"boxes": target["boxes"].float() * scale, "labels": self._own(target["labels"])}
                for target, scale in zip(batches.images_and_targets(batch)[1], scales, strict=True)
            ]
            for name, each in (("file", given), ("checkpoint", expected)):
                self.precision[name].update([{row: image[row] for row in ROWS} for image in each], targets)

    def _own(self, labels: Tensor) -> Tensor:
        return labels if self.table is None else self.table[labels]

    def metric(self) -> dict[str, Any]:
        if not self.labelled:
            return {}
        return {
            "metric": "average precision",
            **{name: float(ap.compute()["ap"]) for name, ap in self.precision.items()},
        }


def _table(module: Any, data: Any) -> Tensor | None:
    """The module's label of each of the data's, by name; None where they are the same, or not known."""
    ours, theirs = names_of(module), names_of(data)
    table = matched(theirs, ours) if ours and theirs else None
    return None if table is None else torch.tensor(table)


def _scale(about: Mapping[str, Any], whole: Sequence[int]) -> Tensor:
    """Factors (4,) from pixels of an image as it was resized to those of the original."""
    height, width = (int(side) for side in about.get("size", whole))
    original_height, original_width = (int(side) for side in about.get("orig_size", (height, width)))
    x, y = original_width / width, original_height / height
    return torch.tensor([x, y, x, y])
