"""The gradient's norm, for the price of a look at what clipping has computed anyway."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from zoo._lightning import Callback
from zoo.common.log import StepLog


class GradientNorm(Callback):
    """Logs ``train/grad_norm``, the Euclidean norm of all gradients before clipping, at the Trainer's logging steps.

    With ``gradient_clip_val`` it is the norm that clipping computes. Without, it is computed at logging steps alone.
    """

    def __init__(self) -> None:
        self.step_log = StepLog()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        plugin = trainer.precision_plugin
        # Lightning calls torch here, and drops what it returns. FSDP has another way, whose norm stays unknown.
        if type(plugin).__name__ == "FSDPPrecision":
            return

        def clip(optimizer: Any, clip_val: float) -> None:
            norm = clip_grad_norm_(plugin.main_params(optimizer), clip_val)
            self._log(trainer, pl_module, norm)

        plugin.clip_grad_by_norm = clip

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        clips = trainer.gradient_clip_val and trainer.gradient_clip_algorithm in (None, "norm")
        if not clips and _is_logged(trainer):
            parameters = trainer.precision_plugin.main_params(optimizer)
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if gradients:
                self._log(trainer, pl_module, get_total_norm(gradients))

    def _log(self, trainer: Any, pl_module: Any, norm: torch.Tensor) -> None:
        if _is_logged(trainer):
            whole = norm.full_tensor() if isinstance(norm, DTensor) else norm  # of weights that FSDP2 splits
            self.step_log(pl_module, {"train/grad_norm": whole})


def _is_logged(trainer: Any) -> bool:
    every = trainer.log_every_n_steps
    return bool(every) and (trainer.global_step + 1) % every == 0
