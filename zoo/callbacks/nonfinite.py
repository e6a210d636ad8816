"""Stops a run whose loss is no longer a number, and keeps what led to it."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo._lightning import Callback


class NonFiniteLossError(FloatingPointError):
    """A loss was NaN or infinite."""


class Step(NamedTuple):
    """One training batch: the optimizer step it belongs to, its epoch, and its number within the epoch."""

    step: int
    epoch: int
    batch_idx: int


class NonFiniteGuard(Callback):
    """Raises :class:`NonFiniteLossError` for a loss that is NaN or infinite, and saves its batch.

    On the CPU, in a single process, each loss is looked at before its backward pass, so that no weight is touched. On
    an accelerator a look makes the host wait and with several processes they have to agree, so losses stay on the
    device and are looked at together, at the Trainer's logging steps and before anything is saved: no checkpoint holds
    what came after. All processes stop at the same step.

    ``nonfinite_rank0.pt`` in the run's directory (one for each rank that met such a loss) is a dictionary, to be read
    with ``torch.load``: step, epoch, batch_idx, the losses since the last look, and, where the loader can tell, the
    batch, with the indices and names of its samples.

    Args:
        every_n_steps: Batches between looks. None: as described above.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}: expected at least 1")
        self.every_n_steps = every_n_steps
        self.last_path: Path | None = None
        self._losses: list[tuple[Step, Tensor]] = []
        self._batch: tuple[int, Any] = (-1, None)
        self._every = 1
        self._stopped = False

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        alone = trainer.world_size == 1 and pl_module.device.type == "cpu"
        self._every = self.every_n_steps or (1 if alone else max(1, trainer.log_every_n_steps))
        self._losses, self._stopped = [], False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._batch = batch_idx, batch

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        self._losses.append((Step(trainer.global_step, trainer.current_epoch, self._batch[0]), loss.detach()))
        if self._every == 1 and trainer.world_size == 1:
            self._look(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % self._every == 0:
            self._look(trainer)
        self._batch = -1, None

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._look(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._look(trainer)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._look(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._stopped = True  # what is saved on the way out is not looked at: other processes may not come here

    def _look(self, trainer: Any) -> None:
        """Looks at the losses since the last look. All processes come here after the same batch."""
        losses, self._losses = self._losses, []
        if self._stopped or trainer.state.fn != "fit" or (trainer.world_size == 1 and not losses):
            return
        values = torch.stack([loss for _, loss in losses]).flatten().tolist() if losses else []
        first = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
        number = float("inf") if first is None else float(losses[first][0].step)
        if trainer.world_size > 1:
            device = trainer.strategy.root_device
            number = trainer.strategy.reduce(torch.tensor(number, device=device), reduce_op="min").item()
        if number == float("inf"):
            return
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # all ranks have to ask
        if first is None or losses[first][0].step > number:
            raise NonFiniteLossError(f"the loss of another process was not finite at step {number:.0f}; see {folder}")
        found = losses[first][0]
        indices, names, batch = self._samples(trainer, found)
        self.last_path = folder / f"nonfinite_rank{trainer.global_rank}.pt"
        history = {"step": [place.step for place, _ in losses], "loss": values}
        beside = {"losses": history, "indices": indices, "names": names, "batch": batch}
        _save({**found._asdict(), **beside}, self.last_path)
        samples = "" if indices is None else f", samples {', '.join(map(str, indices[:8]))}"
        samples += ", ..." if indices is not None and len(indices) > 8 else ""
        raise NonFiniteLossError(
            f"the loss is {values[first]} at step {found.step} (epoch {found.epoch}, batch {found.batch_idx}{samples})"
            f"; the batch is in {self.last_path}"
        )

    def _samples(self, trainer: Any, found: Step) -> tuple[list[int] | None, list[str] | None, Any]:
        """Indices, names and tensors of a batch. A past one is loaded again if its order is known."""
        loader = trainer.train_dataloader
        sampler: Any
        dataset: Any
        sampler, dataset = getattr(loader, "sampler", None), getattr(loader, "dataset", None)
        batch = self._batch[1] if self._batch[0] == found.batch_idx else None
        if not hasattr(sampler, "keys_of_batch"):
            return None, None, _plain(batch)
        keys = sampler.keys_of_batch(found.batch_idx, found.epoch)
        if batch is None:
            batch = loader.collate_fn(dataset[keys])
        return [key[-1] for key in keys], [dataset.name(key[-1]) for key in keys], _plain(batch)


def _plain(batch: Any) -> Any:
    """A batch on the CPU, as tensors and containers only: what ``weights_only`` reads."""
    if isinstance(batch, Tensor):
        return batch.detach().cpu()
    if isinstance(batch, Mapping):
        return {str(key): _plain(value) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [_plain(value) for value in batch]
    return batch if batch is None or isinstance(batch, str | int | float) else str(batch)


def _save(content: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, beside := path.with_name(f".{path.name}"))
    os.replace(beside, path)
