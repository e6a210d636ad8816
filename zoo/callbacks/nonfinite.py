"""Stops a run whose numbers are no longer finite, or skips a few of its steps, and keeps what led to it."""

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo._lightning import Callback
from zoo.callbacks.run_directory import run_directory
from zoo.common.protocols import KnownOrder, KnownSamples


class NonFiniteLossError(FloatingPointError):
    """A loss, or a gradient, was NaN or infinite."""


class NonFiniteWeightError(FloatingPointError):
    """A weight was NaN or infinite."""


class Step(NamedTuple):
    """A training batch: the optimizer step it belongs to, its epoch, and its number within the epoch."""

    step: int
    epoch: int
    batch_idx: int


Losses = list[tuple[Step, Tensor]]


class NonFiniteGuard(Callback):
    """Raises :class:`NonFiniteLossError` for a loss that is NaN or infinite, and saves its batch.

    On the CPU, in a single process, each loss is looked at before its backward pass, so that no weight is touched. On
    an accelerator a look makes the host wait and with several processes they have to agree, so losses stay on the
    device and are looked at together, at the Trainer's logging steps and before anything is saved: no checkpoint holds
    what came after. All processes stop at the same step.

    A gradient may be infinite where the loss is not. So before anything is saved, and at the end, the weights are
    looked at, too: no checkpoint of a fit, be it of weights alone or written on the way out, holds a parameter that is
    not finite (buffers may, as masks do). :class:`NonFiniteWeightError` stops all processes.

    ``nonfinite_rank0.pt`` in the run's directory (one for each rank that met such a loss) is a dictionary, to be read
    with ``torch.load``: step, epoch, batch_idx, the losses since the last look, and, where the loader can tell, the
    batch, with the indices and names of its samples.

    With ``skip`` a step is left out instead if a loss of any of its batches on any rank, or a gradient, is not finite:
    all ranks drop their gradients, so that neither weights nor moments nor weight decay move, and floating-point
    buffers, such as BatchNorm's statistics, get their values from before the step back. The step still counts, also for
    schedules. A warning names it and its samples, and ``nonfinite_rank0_step7.pt`` keeps the batch: that of the loss,
    or, of a gradient, each rank's last. The price: in every step the host waits for the device, processes exchange a
    number, and buffers are copied. In 16-mixed precision only losses count: its scaler finds its scale by gradients
    that overflow, and skips their steps itself.

    Args:
        every_n_steps: Batches between looks. None: as described above. With ``skip`` every step is looked at.
        skip: How many steps in a row may be skipped; one more raises. 0: none.

    Raises:
        ValueError: With ``skip`` under DeepSpeed, which keeps the gradients to itself.
    """

    kept = 20
    """Of a run's skipped batches each rank keeps the first so many: they are to be looked at, not to fill a disk."""

    writes = "skipped batch"

    def __init__(self, every_n_steps: int | None = None, skip: int = 0) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}: expected at least 1")
        if skip < 0:
            raise ValueError(f"skip is {skip}: expected 0 or more")
        self.every_n_steps, self.skip = every_n_steps, skip
        self.last_path: Path | None = None
        self._losses: Losses = []
        self._batch: tuple[int, Any] = (-1, None)
        self._every = 1
        self._stopped = False
        self._in_a_row = self._saved = 0
        self._buffers: list[Tensor] = []
        self._clips: tuple[Any, float] | None = None  # a Trainer, and its gradient_clip_val
        self._states: tuple[Callable[[], dict[str, Any]], ...] = ()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._put_back(trainer)  # after a fit that has failed there is no teardown

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if self.skip and type(trainer.strategy).__name__ == "DeepSpeedStrategy":
            raise ValueError("NonFiniteGuard cannot skip a step of DeepSpeedStrategy: leave skip at 0, or use ddp")
        alone = trainer.world_size == 1 and pl_module.device.type == "cpu"
        self._every = self.every_n_steps or (1 if alone else max(1, trainer.log_every_n_steps))
        self._losses, self._buffers, self._stopped, self._in_a_row, self._saved = [], [], False, 0, 0

    # Losses, at some batches, or with skip losses and gradients, at each step.

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._batch = batch_idx, batch
        if self.skip and not self._losses:  # the first batch of a step
            self._buffers = [buffer.clone() for buffer in _float_buffers(pl_module)]

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        self._losses.append((Step(trainer.global_step, trainer.current_epoch, self._batch[0]), loss.detach()))
        if self._every == 1 and trainer.world_size == 1:
            self._look(trainer)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.skip and self._look_at_step(trainer, pl_module, optimizer):
            # Of a fused optimizer the scaler insists on gradients, and skips by itself.
            by_scaler = _has_scaler(trainer) and getattr(optimizer, "_step_supports_amp_scaling", False)
            for parameter in _with_gradient(optimizer):
                parameter.grad = torch.full_like(parameter, math.nan) if by_scaler else None
            for buffer, before in zip(_float_buffers(pl_module), self._buffers, strict=True):
                buffer.copy_(before)
            if trainer.gradient_clip_val is not None:  # torch fails to clip nothing
                self._clips, trainer.gradient_clip_val = (trainer, trainer.gradient_clip_val), None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % self._every == 0:
            self._look(trainer)
        self._batch = -1, None
        self._clip_again()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._look(trainer)

    on_train_epoch_end = on_validation_start

    def _look(self, trainer: Any) -> None:
        """Looks at the losses since the last look. All processes come here after the same batch."""
        if self.skip or self._stopped or trainer.state.fn != "fit" or (trainer.world_size == 1 and not self._losses):
            return
        losses, self._losses = self._losses, []
        values = torch.stack([loss for _, loss in losses]).flatten().tolist() if losses else []
        first = _first_bad(values)
        self._judge(trainer, losses, values, None if first is None else losses[first][0])

    def _look_at_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> bool:
        """Decides whether the step that is due is skipped. All processes answer alike."""
        losses, self._losses = self._losses, []
        gradients = [] if _has_scaler(trainer) else [parameter.grad for parameter in _with_gradient(optimizer)]
        parts = [loss.float().reshape(1) for _, loss in losses] + ([_largest(gradients)] if gradients else [])
        numbers = torch.cat(parts).tolist() if parts else []
        values, first = numbers[: len(losses)], _first_bad(numbers)
        if first is None or first < len(losses):
            return self._judge(trainer, losses, values, None if first is None else losses[first][0])
        bad, named = gradients[first - len(losses)], pl_module.named_parameters()
        name = next((name for name, parameter in named if parameter.grad is bad), "a parameter")
        last = Step(trainer.global_step, trainer.current_epoch, self._batch[0])
        return self._judge(trainer, losses, values, last, f"the gradient of {name} is not finite")

    def _judge(self, trainer: Any, losses: Losses, values: list[float], found: Step | None, gradient: str = "") -> bool:
        """Tells whether a process has found a batch with a bad loss or gradient; raises unless it may be skipped."""
        own = math.inf if found is None else found.step
        # A gradient counts where no process has a bad loss, which spoils the gradients of all.
        number = _of_all(trainer, own + 0.5 if gradient else own, "min")
        self._in_a_row = 0 if number == math.inf else self._in_a_row + 1
        if number == math.inf:
            return False
        folder = run_directory(trainer)  # all ranks have to ask
        stops, told = self._in_a_row > self.skip, ""
        if found is not None and own + (0.5 if gradient else 0) == number:
            self._saved += not stops
            path = folder / f"nonfinite_rank{trainer.global_rank}{'' if stops else f'_step{own}'}.pt"
            kept = path if stops or self._saved <= self.kept else None
            told = gradient or f"the loss is {values[_first_bad(values) or 0]}"
            told += f" {self._keep(trainer, losses, values, found, kept)}"
        if stops:
            told = told or f"the loss of another process was not finite at step {int(number)}; see {folder}"
            raise NonFiniteLossError(told + (f"; {self.skip} steps before it were skipped" if self.skip else ""))
        if told:
            warnings.warn(f"skipped a step, {self._in_a_row} in a row: {told}", stacklevel=2)
        return True

    # Weights, before each checkpoint and at the end.

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        given = trainer.strategy.lightning_module_state_dict

        def looked_at() -> dict[str, Any]:
            self._look(trainer)
            self._look_at_weights(trainer, trainer.lightning_module)
            return given()

        # All processes take the weights of every checkpoint from it; callbacks are not asked where these are all.
        trainer.strategy.lightning_module_state_dict = looked_at
        self._states = given, looked_at

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._look_at_weights(trainer, pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._put_back(trainer)

    def _put_back(self, trainer: Any) -> None:
        """Takes back what a fit has changed of the Trainer, so that the next one is not judged by it."""
        if self._states and vars(trainer.strategy).get("lightning_module_state_dict") is self._states[1]:
            trainer.strategy.lightning_module_state_dict = self._states[0]
        self._states = ()
        self._clip_again()
        self._losses, self._batch = [], (-1, None)

    def _clip_again(self) -> None:
        if self._clips is not None:
            trainer, value = self._clips
            trainer.gradient_clip_val, self._clips = value, None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._stopped = True  # from here on each process looks for itself: others may not come
        savers = [saver for saver in trainer.checkpoint_callbacks if getattr(saver, "save_on_exception", False)]
        if savers and _bad_weight(pl_module) is not None:
            for saver in savers:  # an error in the midst of this one would keep loggers from writing what they have
                _leave_out(saver)

    def _look_at_weights(self, trainer: Any, pl_module: Any) -> None:
        name = _bad_weight(pl_module)
        if not (name is not None if self._stopped else _of_all(trainer, float(name is not None), "max")):
            return
        raise NonFiniteWeightError(
            f"{name or 'a weight of another process'} is not finite after {trainer.global_step} steps, and not saved: "
            "a gradient was too large; try a smaller learning rate, gradient_clip_val or NonFiniteGuard's skip"
        )

    # What is kept of a batch.

    def _keep(self, trainer: Any, losses: Losses, values: list[float], found: Step, path: Path | None) -> str:
        """Saves a batch, if there is a path, and says where in the run it came and where it is."""
        indices, names, batch = self._samples(trainer, found)
        if path is not None:
            history = {"step": [place.step for place, _ in losses], "loss": values}
            beside = {"losses": history, "indices": indices, "names": names, "batch": batch}
            _save({**found._asdict(), **beside}, path)
            self.last_path = path
        samples = "" if indices is None else f", samples {', '.join(map(str, indices[:8]))}"
        samples += ", ..." if indices is not None and len(indices) > 8 else ""
        saved = f"; the batch is in {path}" if path is not None else f"; {self.kept} batches are saved, this one is not"
        return f"at step {found.step} (epoch {found.epoch}, batch {found.batch_idx}{samples}){saved}"

    def _samples(self, trainer: Any, found: Step) -> tuple[list[int] | None, list[str] | None, Any]:
        """Indices, names and tensors of a batch. A past one is loaded again if its order is known."""
        loader = trainer.train_dataloader
        sampler: Any
        dataset: Any
        sampler, dataset = getattr(loader, "sampler", None), getattr(loader, "dataset", None)
        batch = self._batch[1] if self._batch[0] == found.batch_idx else None
        if not (isinstance(sampler, KnownOrder) and isinstance(dataset, KnownSamples)):
            return None, None, _plain(batch)
        keys = sampler.keys_of_batch(found.batch_idx, found.epoch)
        if batch is None:
            batch = loader.collate_fn(dataset[keys])
        return [key[-1] for key in keys], [dataset.name(key[-1]) for key in keys], _plain(batch)


def _leave_out(saver: Any) -> None:
    """Keeps a callback from saving because of this exception; later ones are its own again."""

    def once(*_: Any) -> None:
        del saver.on_exception

    saver.on_exception = once


def _has_scaler(trainer: Any) -> bool:
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def _with_gradient(optimizer: Any) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _float_buffers(module: torch.nn.Module) -> list[Tensor]:
    return [buffer for buffer in module.buffers() if buffer.is_floating_point()]


def _first_bad(values: Sequence[float]) -> int | None:
    return next((index for index, value in enumerate(values) if not math.isfinite(value)), None)


def _largest(tensors: Sequence[Tensor]) -> Tensor:
    """(n,) the largest magnitude in each of n tensors: NaN or infinite where a value is. A sum could overflow."""
    own = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]  # of a shard
    return torch.stack(torch._foreach_norm([t.detach() if t.numel() else t.new_zeros(1) for t in own], math.inf))


def _bad_weight(module: torch.nn.Module) -> str | None:
    """The name of the first parameter with a value that is NaN or infinite."""
    weights = {name: weight for name, weight in module.named_parameters() if weight.is_floating_point()}
    index = _first_bad(_largest(list(weights.values())).tolist()) if weights else None
    return None if index is None else list(weights)[index]


def _of_all(trainer: Any, value: float, reduce_op: str) -> float:
    """The smallest or the largest of all processes' values."""
    if trainer.world_size == 1:
        return value
    number = torch.tensor(value, dtype=torch.float64, device=trainer.strategy.root_device)  # float32 counts to 2^24
    return float(trainer.strategy.reduce(number, reduce_op=reduce_op))


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
