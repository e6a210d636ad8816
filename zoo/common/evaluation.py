"""Validation and test by the same methods, each loader counted apart and each sample once."""

from typing import Any

from zoo.common import batch as batches
from zoo.common import loaders


class Evaluation:
    """The hooks and steps of validation and test, by three methods: ``class Net(Evaluation, LightningModule)``.

    A stage is "val" or "test": what its metrics' names begin with.
    """

    def start_evaluation(self, stage: str) -> None:
        """Resets the metrics of a stage, by :func:`zoo.common.loaders.start`."""
        raise NotImplementedError

    def evaluation_step(self, batch: Any, batch_idx: int, dataloader_idx: int, stage: str) -> None:
        """Updates the metrics with a batch, without the samples that it repeats."""
        raise NotImplementedError

    def end_evaluation(self, stage: str) -> None:
        """Logs what is computed of a stage at its end alone."""

    def on_validation_epoch_start(self) -> None:
        self.start_evaluation("val")

    def on_test_epoch_start(self) -> None:
        self.start_evaluation("test")

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if (own := batches.once(self, batch, batch_idx, dataloader_idx)) is not None:
            self.evaluation_step(own, batch_idx, dataloader_idx, "val")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if (own := batches.once(self, batch, batch_idx, dataloader_idx)) is not None:
            self.evaluation_step(own, batch_idx, dataloader_idx, "test")

    def on_validation_epoch_end(self) -> None:
        self.end_evaluation("val")
        loaders.finish(self)

    def on_test_epoch_end(self) -> None:
        self.end_evaluation("test")
        loaders.finish(self)
