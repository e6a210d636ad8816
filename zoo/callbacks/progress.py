"""The progress bar: what one wants to see while waiting, at a price one does not notice."""

import time
from typing import Any

from rich import get_console

from zoo._lightning import RichProgressBar
from zoo.common.protocols import Watched

# What says best how validation went: the first of these that there is, behind those that a module names.
WATCHED = ("val/acc", "val/ap", "val/loss")


class ProgressBar(RichProgressBar):
    """Lightning's bar with learning rate, what is logged with ``prog_bar``, and the last validation's score.

    It is redrawn a few times a second.

    Where nobody watches, in a log file or a pipe, it writes one line for each validation instead, or, in a run without,
    a line every half minute.

    Args:
        refresh_rate: Times a second that it is redrawn.
    """

    def __init__(self, refresh_rate: int = 4) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._seconds = 1 / refresh_rate if refresh_rate else float("inf")
        self._drawn = self._written = 0.0
        self._lines = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        console = get_console()
        if self.is_enabled and not (console.is_terminal or console.is_jupyter):
            self._lines = True
            self.disable()
        self._written = time.monotonic()

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        metrics = {"lr": f"{max(rates):.2e}", **metrics} if rates else metrics
        own = pl_module.watched if isinstance(pl_module, Watched) else ()
        score = next((name for name in (*own, *WATCHED) if name in trainer.callback_metrics), None)
        return metrics | {score: float(trainer.callback_metrics[score])} if score else metrics

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.is_enabled and self._is_due(batch_idx + 1 == self.total_train_batches):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *where: int) -> None:
        if self.is_enabled and self._is_due(where[0] + 1 == self.total_val_batches_current_dataloader):
            super().on_validation_batch_end(trainer, pl_module, outputs, batch, *where)

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *where: int) -> None:
        if self.is_enabled and self._is_due(where[0] + 1 == self.total_test_batches_current_dataloader):
            super().on_test_batch_end(trainer, pl_module, outputs, batch, *where)

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *where: int) -> None:
        if self.is_enabled and self._is_due(where[0] + 1 == self.total_predict_batches_current_dataloader):
            super().on_predict_batch_end(trainer, pl_module, outputs, batch, *where)

    def _is_due(self, last: bool) -> bool:
        now = time.monotonic()
        if not last and now - self._drawn < self._seconds:
            return False
        self._drawn = now
        return True

    # Lines where there is no terminal.

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if time.monotonic() - self._written > 30:
            self._write(trainer, pl_module)

    def _write(self, trainer: Any, pl_module: Any) -> None:
        if not self._lines:
            return
        self._written = time.monotonic()
        shown = self.get_metrics(trainer, pl_module)
        shown |= {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        values = [
            f"{name} {value if isinstance(value, str) else f'{float(value):.4g}'}" for name, value in shown.items()
        ]
        epochs = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        print(f"epoch {trainer.current_epoch + 1}{epochs}", *values, sep="  ", flush=True)
