"""The logging interval, for short epochs."""

import math
from typing import Any

from zoo._lightning import Callback


class LogInterval(Callback):
    """Has the Trainer log once an epoch, or at the end of the run, where its ``log_every_n_steps`` is longer than that.

    The Trainer's own 50 steps leave a run on a small folder without a curve, and with a warning. The ``zoo`` command
    adds this one where neither a recipe nor an option says how often to log.
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        steps = math.inf if trainer.max_steps == -1 else max(1, trainer.max_steps - trainer.global_step)
        batches = trainer.num_training_batches  # infinite, for data without a length
        if not math.isinf(batches):
            steps = min(steps, math.ceil(batches / trainer.accumulate_grad_batches))
        if 0 < steps < trainer.log_every_n_steps:  # 0: never
            trainer.log_every_n_steps = int(steps)
