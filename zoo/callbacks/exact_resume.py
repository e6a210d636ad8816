"""Resumption of a run as if it had never stopped.

Lightning's checkpoints hold weights, optimizers, schedules and counters. What they lack is added here: the state of
every random generator on every process, sums of metrics that are still gathering, gradients that are still
accumulating, and whether a validation was due. The order of the samples is the data module's part: a position in
``datamodules.BatchOrder``, in its own state.

With the same code, versions, hardware, number of processes and deterministic kernels, a continued run equals the
uninterrupted one bit for bit: weights, optimizer, averages, metrics and order. With another number of processes it has
the same order of samples, no more. See docs/reliability.md.
"""

import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from zoo._lightning import Callback, rank_zero_warn
from zoo.common.log import StepLog
from zoo.common.protocols import KnownOrder

KEY = "exact_resume"
TUNER = ".lr_find_", ".scale_batch_size_"  # files that Lightning's Tuner takes back within a run: nothing to continue


class ExactResume(Callback):
    """Keeps in every checkpoint what Lightning leaves out, and makes validation leave no trace on training.

    It belongs behind the other callbacks and in front of those that save: what others draw at random at the end of a
    validation is then taken back as well. A checkpoint is continued where it was written: after a batch, in the middle
    of a validation (which is run again), after it, or at the end of an epoch.

    A run that ended within an epoch, by ``max_steps`` or because it was told to stop, goes on with that epoch where it
    is continued for longer, as if it had not been told.

    Not restored: what a module or a callback holds without having it in its state, what depends on the clock
    (``val_check_interval`` as a time, ``Timer``), and gradients that a manual optimization accumulates over batches. A
    checkpoint that was written because of an exception is one in the middle of a batch, and is not continued exactly.
    """

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None
        self._epoch_ends = False
        self._outside: dict[str, Any] | None = None
        self._validating = False
        self._alone = False

    # Saving.

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        loop = trainer.fit_loop.epoch_loop
        between_steps = loop.batch_progress.current.ready > 0 and loop._should_accumulate()
        own: dict[str, Any] = {
            "random": self._outside or _random_state(trainer),
            "logs": [log.state_dict() for log in _logs(trainer)],
        }
        if between_steps:
            gradients = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
            own["gradients"] = {name: gradient.detach().cpu() for name, gradient in gradients.items()}
        # A batch is processed, but not completed, while callbacks hear of its end: what follows it is still to come.
        progress = loop.batch_progress.total
        after_batch = progress.processed > progress.completed
        due = after_batch and loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
        checkpoint[KEY] = {
            "ranks": [own] if self._alone else _gathered(trainer, own),
            "validation_due": due or self._validating,
            "between_steps": between_steps,
            "within_epoch": _ended_within_epoch(trainer.fit_loop),
            "metrics": _plain(trainer.callback_metrics),
        }

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._alone = True  # other processes may not come to what is saved on the way out

    # Validation.

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._outside, self._validating = _random_state(trainer), True

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self._outside is not None:
            _set_random_state(trainer, self._outside)
        self._outside, self._validating = None, False

    # Continuing.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._outside, self._validating, self._alone = None, False, False
        self._restored = None  # of a fit that failed before it began

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit" or Path(str(trainer.ckpt_path)).name.startswith(TUNER):
            return
        self._restored = checkpoint.get(KEY)
        if self._restored is None:
            rank_zero_warn(
                "the checkpoint was written without ExactResume: weights and optimizer are continued, random numbers "
                "are not"
            )
            return
        self._epoch_ends = _rewind(checkpoint["loops"]["fit_loop"], self._restored)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        restored, self._restored = self._restored, None
        if restored is None:
            return
        order: Any = getattr(trainer.train_dataloader, "sampler", None)
        if isinstance(order, KnownOrder):
            warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before")
            # With another number of processes the batches that are left are others.
            progress = trainer.fit_loop.epoch_loop.batch_progress.current
            progress.ready = progress.started = progress.processed = progress.completed = order.first_batch(order.epoch)
        trainer.callback_metrics.update(restored["metrics"])
        _go_on(trainer.fit_loop, self._epoch_ends, restored.get("within_epoch", False))
        if len(restored["ranks"]) != trainer.world_size:
            rank_zero_warn(
                f"the checkpoint knows of {len(restored['ranks'])} processes, and here are {trainer.world_size}: the "
                "order of the samples is continued, random numbers are not"
            )
            return
        own = restored["ranks"][trainer.global_rank]
        _set_random_state(trainer, own["random"])
        for log, state in zip(_logs(trainer), own["logs"], strict=False):
            log.load_state_dict(state, trainer)
        for name, gradient in own.get("gradients", {}).items():
            parameter = pl_module.get_parameter(name)
            parameter.grad = gradient.to(parameter.device)


# Lightning's counters.


def _ended_within_epoch(loop: Any) -> bool:
    """Tells whether an epoch ended before its last batch, by ``max_steps`` or ``should_stop``."""
    epochs, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress.current
    return epochs.processed == epochs.ready and batches.ready > 0 and not loop.epoch_loop._num_ready_batches_reached()


def _rewind(loop: dict[str, Any], restored: dict[str, Any]) -> bool:
    """Sets Lightning's counters so that it goes on with what has not happened yet.

    Left alone, it takes a checkpoint written at the end of a batch to have been written after the validation and the
    end of the epoch that follow, and skips both.

    Returns:
        Whether the checkpoint was written at the end of an epoch, before schedulers that wait for a metric had it.
    """
    epochs, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    counts = epochs["total"], epochs["current"]
    if restored.get("within_epoch"):
        for count in counts:
            count["processed"] = count["completed"] = count["ready"] - 1
    elif epochs["total"]["processed"] == epochs["total"]["ready"]:  # at the end of an epoch: on to the next one
        ends = bool(epochs["total"]["processed"] > epochs["total"]["completed"])
        for count in counts:
            count["completed"] = count["processed"]
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False
        return ends
    for count in (batches["total"], batches["current"]):
        count["completed"] = count["processed"]
    if restored["validation_due"]:  # Lightning takes up a validation of which a batch has started and not ended
        begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        loop["epoch_loop.val_loop.batch_progress"] |= {"total": dict(begun), "current": dict(begun)}
    return False


def _go_on(loop: Any, epoch_ends: bool, within_epoch: bool) -> None:
    """Goes on with what was to come when the checkpoint was written, which Lightning cannot tell from its counters.

    Args:
        loop: The loop over epochs, with its counters set back.
        epoch_ends: What :func:`_rewind` said.
        within_epoch: What :func:`_ended_within_epoch` said when the checkpoint was written.
    """
    loop._restarting = False  # else ReduceLROnPlateau is left out at the end of the epoch, for want of the metrics
    batches, epochs = loop.epoch_loop, loop.epoch_progress.current
    if epoch_ends:
        epochs.completed -= 1  # the number of the epoch, which counts with a frequency
        _update_plateaus(loop, "epoch")
        epochs.completed += 1
    if batches.batch_progress.current.ready == 0:  # with max_steps it would look for what follows the last batch
        batches.restarting = False
        return
    look = batches._should_check_val_fx
    if within_epoch:  # that has all been done before the epoch was ended

        def not_again(fetcher: Any) -> bool:
            batches._should_check_val_fx = look
            return not batches.restarting and bool(look(fetcher))

        batches._should_check_val_fx = not_again
    elif batches.restarted_on_last and not look(loop._data_fetcher):  # else it comes behind the validation
        _update_plateaus(loop, "step")
        batches._batches_that_stepped += not batches._should_accumulate()


def _update_plateaus(loop: Any, interval: str) -> None:
    """Gives schedulers that wait for a metric what they would have got next, if it was known by then."""
    trainer = loop.trainer
    monitors = [config.monitor for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
    if all(monitor in trainer.callback_metrics for monitor in monitors):
        loop.epoch_loop.update_lr_schedulers(interval, update_plateau_schedulers=True)


# What a checkpoint holds.


def _plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as tensors on the CPU and plain numbers; what else somebody has put there is left out."""
    found = {name: value.item() if isinstance(value, np.generic) else value for name, value in metrics.items()}
    return {
        name: value.detach().cpu() if isinstance(value, torch.Tensor) else value
        for name, value in found.items()
        if isinstance(value, torch.Tensor | int | float)
    }


def _logs(trainer: Any) -> list[StepLog]:
    owners = [trainer.lightning_module, *trainer.callbacks]
    return [value for owner in owners for value in vars(owner).values() if isinstance(value, StepLog)]


def _gathered(trainer: Any, own: dict[str, Any]) -> list[dict[str, Any]]:
    """Gathers each process's part in the process that writes; elsewhere gives its own only."""
    if trainer.world_size == 1:
        return [own]
    parts: list[Any] | None = [None] * trainer.world_size if trainer.global_rank == 0 else None
    dist.gather_object(own, parts)
    return parts or [own]


def _random_state(trainer: Any) -> dict[str, Any]:
    """The state of every generator that training draws from, in what ``weights_only`` reads."""
    numbers: Any = np.random.get_state()
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    states["numpy"] = tuple(part.tolist() if isinstance(part, np.ndarray) else part for part in numbers)
    device = trainer.strategy.root_device
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def _set_random_state(trainer: Any, states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    device = trainer.strategy.root_device
    if device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type])
