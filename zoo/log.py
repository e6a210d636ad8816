"""Logging from a training step without its price.

``self.log`` costs some 0.3 ms of host time a step and value, although loggers look at one step in fifty, and a value in
the progress bar is fetched from the device after every step, for which the host waits.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo._lightning import LightningModule


class StepLog:
    """Adds values up on the device in every training step, and logs their means when the Trainer logs.

    The mean is taken over the steps since the Trainer last logged, over every batch of an accumulated gradient, and,
    with several processes, over the processes. An epoch's last batch counts as well, so that ``callback_metrics`` has
    the values when callbacks look for them, however short the epochs. In between nothing waits for the device.

    It holds nothing that belongs in a checkpoint. One is enough for a module, as an attribute::

        self.step_log(self, {"train/loss": loss, "train/kl": kl}, prog_bar=("train/loss",))
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], tuple[tuple[int, int], Tensor, int]] = {}

    def __call__(
        self, module: LightningModule, values: Mapping[str, Tensor | float], prog_bar: Sequence[str] = ()
    ) -> None:
        """Takes note of a step's values; to be called in ``training_step``. Does nothing where no Trainer is training.

        Args:
            module: What logs.
            values: Scalars by name; those that are reported together in one step are reported together in all steps.
            prog_bar: Names of those that the progress bar shows.

        Raises:
            ValueError: For a value that is not a scalar.
        """
        trainer: Any = module._trainer  # the property raises where there is none
        if trainer is None or not trainer.training or not trainer.log_every_n_steps:
            return
        step, every = trainer.global_step, trainer.log_every_n_steps
        for name, value in values.items():
            if isinstance(value, Tensor) and value.ndim:
                raise ValueError(f"only scalars can be logged, but {name} has the shape {tuple(value.shape)}")
        with torch.no_grad():
            now = torch.stack(
                [v if isinstance(v, Tensor) else torch.full((), v, device=module.device) for v in values.values()]
            ).float()
        names = tuple(values)
        window = (id(trainer), step // every)
        begun, total, count = self._sums.get(names, (None, now, 0))
        # A new window begins after each step that logs, and in a new run. While gradients accumulate, the step that
        # logs has several batches, of which Lightning logs the last: so the sum outlives the logging.
        if begun == window:
            total += now
        else:
            total, count = now, 0
        self._sums[names] = (window, total, count + 1)
        if (step + 1) % every == 0 or trainer.is_last_batch:
            # One reduction for all values, also because ranks that watch a value have to agree on it. One copy to the
            # host for all values, because what is in the progress bar is read after every step from now on.
            means = trainer.strategy.reduce(total / (count + 1), reduce_op="mean").cpu()
            shown = {name: mean for name, mean in zip(names, means, strict=True) if name in prog_bar}
            module.log_dict({name: mean for name, mean in zip(names, means, strict=True) if name not in shown})
            module.log_dict(shown, prog_bar=True)
