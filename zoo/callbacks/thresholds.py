"""Thresholds of several labels, tuned on validation data."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import (
    BinaryF1Score,
    BinaryPrecisionRecallCurve,
    MultilabelF1Score,
    MultilabelPrecisionRecallCurve,
)

from zoo._lightning import Callback
from zoo.callbacks.run_directory import run_directory
from zoo.common import batch as batches


class TunedThresholds(Callback):
    """Tests a classifier of several labels with the thresholds that have the best F1 on the validation data as well.

    A test begins with a pass over the validation data, with the weights that are tested, and logs ``test/f1_tuned``,
    the macro F1 with a threshold for each label, and ``test/f1_micro``, the micro F1 with 0.5 for all. The thresholds,
    in [0, 1], are in ``thresholds.json`` in the run's directory, by class where classes have names.

    A label without positives in the validation data keeps 0.5.
    """

    writes = "thresholds"

    def __init__(self) -> None:
        self.last_path: Path | None = None
        self._thresholds = torch.empty(0)
        self._scores: dict[str, Metric] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Raises ValueError for a module whose labels need no thresholds."""
        from zoo.common.classification import Classifier  # here: it imports timm

        if not isinstance(pl_module, Classifier) or not pl_module.hparams.multi_label:
            raise ValueError("TunedThresholds is for a classifier of several labels: set multi_label, or leave it out")

    @torch.no_grad()
    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        loader = trainer.datamodule.val_dataloader() if trainer.datamodule is not None else None
        if not loader:
            raise ValueError("TunedThresholds tunes on a data module's validation data, and there are none")
        count = pl_module.hparams.num_classes
        curve = BinaryPrecisionRecallCurve() if count == 1 else MultilabelPrecisionRecallCurve(count)
        curve.to(pl_module.device)
        for batch in loader:
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            curve.update(*_judged(pl_module, batch))
        found = curve.compute()
        curves = [found] if count == 1 else zip(*found, strict=True)
        self._thresholds = torch.stack([best_threshold(*each) for each in curves])
        self._scores = {
            "f1_micro": BinaryF1Score() if count == 1 else MultilabelF1Score(count, average="micro"),
            "f1_tuned": BinaryF1Score() if count == 1 else MultilabelF1Score(count, average="macro"),
        }
        for score in self._scores.values():
            score.to(pl_module.device)

    @torch.no_grad()
    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        own = batches.once(pl_module, batch, batch_idx, dataloader_idx)
        if own is not None:
            probabilities, labels = _judged(pl_module, own)
            self._scores["f1_micro"].update(probabilities, labels)
            self._scores["f1_tuned"].update((probabilities >= self._thresholds).int(), labels)

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        for name, score in self._scores.items():
            pl_module.log(f"test/{name}", score.compute(), sync_dist=True)
        folder = run_directory(trainer)  # all ranks have to ask
        if trainer.is_global_zero and not trainer.fast_dev_run:
            values = self._thresholds.tolist()
            names = pl_module.classes or [str(label) for label in range(len(values))]
            folder.mkdir(parents=True, exist_ok=True)
            self.last_path = folder / "thresholds.json"
            self.last_path.write_text(json.dumps(dict(zip(names, values, strict=True)), indent=1) + "\n", "utf-8")


def best_threshold(precision: Tensor, recall: Tensor, thresholds: Tensor) -> Tensor:
    """The threshold with the best F1 of a precision-recall curve, as torchmetrics computes it; 0.5 without positives.

    Args:
        precision, recall: (n + 1,), for predictions of at least each threshold; what stands last is of none.
        thresholds: (n,), ascending: the scores that there are.

    Returns:
        0-dimensional: halfway to the next lower score, between which thresholds predict the same.
    """
    f1 = (2 * precision * recall / (precision + recall)).nan_to_num(0.0)[:-1]
    if not f1.any():
        return torch.full_like(f1.sum(), 0.5)
    best = f1.argmax()
    lower = torch.where(best > 0, thresholds[(best - 1).clamp_min(0)], 0.0)
    return (thresholds[best] + lower) / 2


def _judged(module: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Probabilities (B, labels) of a batch, and its labels, 0 and 1."""
    images, labels = batches.images_and_labels(batch)
    return module.probabilities(images), module.own_labels(labels).int()
