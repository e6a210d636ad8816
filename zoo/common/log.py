"""Logging from a training step without its price.

``self.log`` costs 0.3 ms of host time a step and value and more, although loggers look at one step in fifty. Called at
those steps only it still costs 20 µs a step and value: half to store it, half because Lightning goes through what is
stored after every step, where it also fetches what is in the progress bar from the device, for which the host waits.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo._lightning import LightningModule

WORDS = {"acc": "accuracy", "acc5": "top-5 accuracy", "f1": "macro F1", "ap": "average precision"}
WORDS |= {"f1_micro": "micro F1", "f1_tuned": "macro F1 with tuned thresholds"}
WORDS |= {"cross_entropy": "cross-entropy", "smooth": "smooth metric"}
"""Metrics that many techniques have, in words."""


class StepLog:
    """Adds values up on the device in every training step, and hands on their means when the Trainer logs.

    Loggers get them, the progress bar and, as ``callback_metrics``, callbacks. The mean is taken over the steps since
    the Trainer last logged, over every batch of an accumulated gradient, and, with several processes, over the
    processes. At an epoch's last batch progress bar and callbacks get the mean so far, so that they have it however
    short the epochs. In between nothing waits for the device.

    A checkpoint between two logging steps is continued exactly where :class:`zoo.callbacks.ExactResume` keeps the sums.
    One is enough for a module, as an attribute::

        self.step_log(self, {"train/loss": loss, "train/kl": kl}, prog_bar=("train/loss",))
    """

    def __init__(self) -> None:
        # For names that are reported together: the window of steps they belong to, their sums, the number of batches.
        self._sums: dict[tuple[str, ...], tuple[tuple[int, int], Tensor, int]] = {}

    def __call__(
        self, module: LightningModule, values: Mapping[str, Tensor | float], prog_bar: Sequence[str] = ()
    ) -> bool:
        """Takes note of a step's values; to be called in ``training_step``. Does nothing where no Trainer is training.

        Args:
            module: What is trained.
            values: Scalars by name; those that are reported together in one step are reported together in all steps.
            prog_bar: Names of those that the progress bar shows.

        Returns:
            Whether values were handed on, for which the host has waited for the device.

        Raises:
            ValueError: For a value that is not a scalar.
        """
        trainer: Any = module._trainer  # the property raises where there is none
        if trainer is None or not trainer.training or not trainer.log_every_n_steps:
            return False
        for name, value in values.items():
            if isinstance(value, Tensor) and value.ndim:
                raise ValueError(f"only scalars can be logged, but {name} has the shape {tuple(value.shape)}")
        # Not in the default dtype, which is bfloat16 in a step in bf16-true.
        scalars = [
            v if isinstance(v, Tensor) else torch.full((), v, dtype=torch.float32, device=module.device)
            for v in values.values()
        ]
        total, count = torch.stack(scalars).detach().float(), 1
        step, every, names = trainer.global_step, trainer.log_every_n_steps, tuple(values)
        window = (id(trainer), step // every)  # the Trainer's, because a new run starts over
        if names in self._sums and self._sums[names][0] == window:
            total, count = self._sums[names][1] + total, self._sums[names][2] + 1
        self._sums[names] = (window, total, count)
        window_ends, epoch_ends = (step + 1) % every == 0, trainer.is_last_batch
        if not (window_ends or epoch_ends):
            return False
        # One reduction for all values, also because ranks that act on a value have to agree on it.
        means = trainer.strategy.reduce(total / count, reduce_op="mean").cpu()
        found = dict(zip(names, means.tolist(), strict=True))
        trainer.callback_metrics.update(zip(names, means.unbind(), strict=True))
        trainer.progress_bar_metrics.update({name: found[name] for name in names if name in prog_bar})
        # While gradients accumulate, a step has several batches: the last one is logged.
        if window_ends and (epoch_ends or (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0):
            trainer.logged_metrics.update(zip(names, means.unbind(), strict=True))
            for logger in trainer.loggers:
                logger.log_metrics(found | {"epoch": trainer.current_epoch}, step)
        return True

    def state_dict(self) -> list[dict[str, Any]]:
        """The sums of this process, as plain data."""
        return [
            {"names": list(names), "window": window, "total": total.cpu(), "count": count}
            for names, ((_, window), total, count) in self._sums.items()
        ]

    def load_state_dict(self, state: list[dict[str, Any]], trainer: Any) -> None:
        """Goes on from the sums of a run that this Trainer continues."""
        device = trainer.strategy.root_device
        self._sums = {
            tuple(sums["names"]): ((id(trainer), sums["window"]), sums["total"].to(device), sums["count"])
            for sums in state
        }


def in_words(metric: str, value: float, words: Mapping[str, str] | None = None) -> str:
    """A metric as people say it: ``accuracy 99.31 %`` for "acc"; numbers that are no accuracies as they are.

    Args:
        metric: Its name without the stage.
        value: In [0, 1] for an accuracy.
        words: By name, those that a technique has for its own metrics.
    """
    number = f"{100 * value:.2f} %" if metric.startswith("acc") else f"{value:.4f}"
    return f"{(WORDS | dict(words or {})).get(metric, metric)} {number}"
