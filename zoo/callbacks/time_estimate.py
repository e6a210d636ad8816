"""Estimate of the time at which a fit ends."""

import math
import time
from typing import Any

from zoo._lightning import Callback, EarlyStopping, Timer


class TimeEstimate(Callback):
    """Says how long a fit will take and when it will end, as soon as a few seconds of its steps have been timed.

    The first step is left out: in it networks are compiled, and workers start. Validation counts once one has been
    timed. If the estimate is then off by more than a third, a second line says so, once, at the start of an epoch. It
    is wall time between steps, so that loading, logging and saving count, and nothing waits for the device: within
    seconds its queue is full, and the host is as slow as it is. Steps that grow later, as those of
    :class:`zoo.callbacks.ProgressiveLearning` do, are not foreseen.

    The ``zoo`` command adds this one to a fit that shows its progress.

    Args:
        seconds: Time of training steps that an estimate is made from.
    """

    def __init__(self, seconds: float = 3.0) -> None:
        if seconds < 0:
            raise ValueError(f"seconds is {seconds}: expected at least 0")
        self.seconds = seconds
        self._open = False
        """Whether there may be something to say."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._open = bool(trainer.is_global_zero)
        self._started = time.monotonic()
        self._steps = -1  # since the end of the first
        self._validations, self._validating = 0, 0.0
        self._end = math.nan  # as it was said

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self._open:
            return
        self._steps += 1
        if self._steps == 0:
            self._timed_from = time.monotonic()
        elif math.isnan(self._end):
            spent = time.monotonic() - self._timed_from - self._validating
            if spent >= self.seconds:
                self._say(trainer, *self._left(trainer, batch_idx + 1))

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._validation_from = time.monotonic()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self._open and self._steps >= 0:
            self._validations += 1
            self._validating += time.monotonic() - self._validation_from

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if not self._open or not math.isfinite(self._end):
            return
        batches, checks = self._left(trainer, 0)
        if checks and not self._validations:
            return
        self._open = False
        before, now = self._end - self._started, time.monotonic() + self._seconds(batches, checks) - self._started
        if not 3 / 4 <= now / before <= 4 / 3:
            self._say(trainer, batches, checks)

    def _left(self, trainer: Any, done: int) -> tuple[float, float]:
        """Numbers of steps and validations still to come, where ``done`` steps of this epoch are over."""
        steps, epoch, validated = math.inf, trainer.num_training_batches, trainer.val_check_batch or math.inf
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            steps = (trainer.max_epochs - trainer.current_epoch) * epoch - done
        if trainer.max_steps >= 0:
            steps = min(steps, (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches)
        if not trainer.enable_validation or math.isinf(steps) or math.isinf(validated):
            return steps, 0
        if trainer.check_val_every_n_epoch is None or math.isinf(epoch):
            return steps, steps // validated
        return steps, math.ceil(steps / epoch) * (epoch // validated) // trainer.check_val_every_n_epoch

    def _seconds(self, steps: float, checks: float) -> float:
        return steps * self._step() + checks * self._validating / max(1, self._validations)

    def _step(self) -> float:
        return (time.monotonic() - self._timed_from - self._validating) / self._steps

    def _say(self, trainer: Any, steps: float, checks: float) -> None:
        seconds = self._seconds(steps, checks)
        self._end = time.monotonic() + seconds
        pace = f"{_short(self._step())} a step"
        if self._validations:
            pace += f" and {_short(self._validating / self._validations)} a validation"
        elif checks:
            pace += ", validation not counted"
        timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]
        limit = min((timer.time_remaining() or math.inf for timer in timers), default=math.inf)
        if limit < seconds:
            self._open, seconds, what = False, limit, f"max_time, at {pace}"
        elif math.isinf(seconds):
            print(f"time: no end is set, by max_steps or otherwise; {pace}", flush=True)
            return
        else:
            what = f"{self._amount(trainer, steps)} at {pace}"
        if any(isinstance(callback, EarlyStopping) for callback in trainer.callbacks):
            what += "; earlier if EarlyStopping says so"
        end = time.localtime(time.time() + seconds)
        clock = time.strftime("%H:%M" if seconds < 12 * 3600 else "%a %d %b, %H:%M", end)
        print(f"time: about {_long(seconds)}, until {clock}: {what}", flush=True)

    @staticmethod
    def _amount(trainer: Any, steps: float) -> str:
        more = "more " if trainer.current_epoch else ""
        epochs = (trainer.max_epochs or -1) - trainer.current_epoch
        if epochs > 0 and steps > (epochs - 1) * trainer.num_training_batches:
            return f"{epochs} {more}epochs of {trainer.num_training_batches:,} steps"
        return f"{int(steps):,} more steps"


def _short(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _long(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.2g} {unit}"
    return f"{seconds:.0f} s"
