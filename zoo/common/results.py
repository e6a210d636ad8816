"""Predictions of classifiers and detectors as plain data, with names."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.common.pictures import class_name

THRESHOLD = 0.5
"""Probability from which on one of several labels counts, unless told otherwise."""


class NamedProbabilities:
    """Names the probabilities that a classifier predicts: ``class Net(NamedProbabilities, NamedClasses, ...)``."""

    classes: list[str] | None
    hparams: Any
    thresholds: Tensor | None = None
    """(num_classes,) float32, the probability from which on each of several labels counts; None: 0.5."""

    def use_thresholds(self, thresholds: float | Mapping[str, float]) -> None:
        """Sets the probabilities from which on several labels count.

        Args:
            thresholds: One in [0, 1] for all labels, or by name (by number where there are no names), as
                :class:`zoo.callbacks.TunedThresholds` writes them; a label that is not among them keeps 0.5.

        Raises:
            ValueError: For a classifier of one label an image, an unknown label, or a number out of range.
        """
        if not self.hparams.multi_label:
            raise ValueError("thresholds are for several labels an image, and this classifier has one: leave them out")
        names = [class_name(self.classes, label) for label in range(self.hparams.num_classes)]
        given = thresholds if isinstance(thresholds, Mapping) else dict.fromkeys(names, thresholds)
        for name, value in given.items():
            if name not in names:
                some = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
                raise ValueError(f"there is a threshold for {name}, which is no label: expected some of {some}")
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"the threshold of {name} is {value!r}: expected a number in [0, 1]")
        self.thresholds = torch.tensor([given.get(name, THRESHOLD) for name in names], dtype=torch.float32)

    def named_results(self, outputs: Tensor, top: int = 5) -> list[dict[str, Any]]:
        """Results of probabilities (B, classes): see :class:`zoo.common.protocols.NamesResults`."""
        named = named_probabilities(outputs, self.classes, top)
        if not self.hparams.multi_label:
            return named
        chosen = outputs.detach().float().cpu() >= (THRESHOLD if self.thresholds is None else self.thresholds)
        labels = [[class_name(self.classes, index) for index in each.nonzero().flatten().tolist()] for each in chosen]
        return [{"labels": names, "top": each["top"]} for names, each in zip(labels, named, strict=True)]


def named_probabilities(outputs: Tensor, classes: Sequence[str] | None, top: int = 5) -> list[dict[str, Any]]:
    """Most likely classes of images as plain data, of equal ones the first.

    Args:
        outputs: Probabilities (B, classes).
        classes: Names by label. None: the labels themselves.
        top: How many classes are named for each image.

    Returns:
        For each image ``{"label", "index", "probability", "top": [{"label", "index", "probability"}, ...]}``.
    """
    values, order = outputs.detach().float().cpu().sort(stable=True, dim=1, descending=True)
    ranked = [
        [
            {"label": class_name(classes, index), "index": index, "probability": value}
            for index, value in zip(*each, strict=True)
        ]
        for each in zip(order[:, :top].tolist(), values[:, :top].tolist(), strict=True)
    ]
    return [{**best[0], "top": best} for best in ranked]


def named_detections(
    detection: Mapping[str, Tensor], classes: Sequence[str] | None, category_ids: Sequence[int] | None
) -> dict[str, Any]:
    """An image's detections as plain data.

    Args:
        detection: ``boxes`` (n, 4) xyxy, ``scores`` (n,) and ``labels`` (n,).
        classes: Names by label; None: labels are named by their numbers.
        category_ids: By label; None: the labels themselves, as in a file of detections.

    Returns:
        ``{"boxes": [[x1, y1, x2, y2], ...], "scores": [...], "labels": [names], "indices": [labels], "category_ids":
        [...]}``.
    """
    boxes, scores, labels = (detection[key].detach().cpu().tolist() for key in ("boxes", "scores", "labels"))
    return {
        "boxes": boxes,
        "scores": scores,
        "labels": [class_name(classes, label) for label in labels],
        "indices": labels,
        "category_ids": labels if category_ids is None else [int(category_ids[label]) for label in labels],
    }
