"""BatchNorm's running statistics under several processes."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from zoo._lightning import Callback


class DistributeBatchNorm(Callback):
    """Averages BatchNorm's running means and variances over all processes, before each step of the optimizer.

    Without it, and without ``sync_batchnorm``, what is validated and saved has seen the batches of rank 0 alone: DDP
    overwrites the buffers of all other ranks with those of rank 0 before each forward pass that ends in a step
    (``broadcast_buffers``, on by default), or, with that off, each rank keeps its own. With it, they are those of all
    ranks: a running statistic is a sum over batches, so that averaging after each step is the same as averaging what
    each rank would have gathered by itself, and the same with ``broadcast_buffers`` on or off.

    Each process still normalises by its own batch. ``Trainer(sync_batchnorm=True)`` normalises by all of them, which
    matters where a process has few images. But it waits for the others in every layer, forward and backward, and each
    such layer breaks the graph of ``torch.compile``. This is one short message a step, and needs no GPU.

    Put it anywhere in the list of callbacks: :class:`zoo.callbacks.EMA` and checkpoints come after the optimizer's
    step, and see the averaged statistics. With one process it does nothing.

    Raises:
        ValueError: For a module without running statistics.
    """

    def __init__(self) -> None:
        self._norms: list[_BatchNorm] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        norms = (part for part in pl_module.modules() if isinstance(part, _BatchNorm))
        self._norms = [norm for norm in norms if norm.running_mean is not None]
        if not self._norms:
            raise ValueError(f"{type(pl_module).__name__} has no BatchNorm to average: leave DistributeBatchNorm out")

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.world_size == 1:
            return
        statistics: list[Any] = [part for norm in self._norms for part in (norm.running_mean, norm.running_var)]
        # As one tensor: EfficientNet-B0 has 98 of them, and each message costs the same wait.
        mean: Tensor = trainer.strategy.reduce(torch.cat(statistics), reduce_op="mean")
        torch._foreach_copy_(statistics, list(mean.split([len(part) for part in statistics])))
