"""Exponential moving average of the weights."""

from typing import Any

import torch
from torch import Tensor, nn

from zoo._lightning import Callback
from zoo.sharding import is_split


class EMA(Callback):
    """Averages the weights while they are trained; validates, tests and ends with the average.

    After a step, ``average = d * average + (1 - d) * weights``, with ``d = min(decay, (1 + n) / (10 + n))`` in the n-th
    update, n from 0: the first weights are forgotten soon, whatever the decay (TensorFlow's ExponentialMovingAverage
    with ``num_updates``, as EfficientNet was trained). Floating-point buffers, such as the statistics of BatchNorm, are
    averaged likewise, unless they hold infinite values; others are copied. All tensors are updated in a few fused
    operations.

    A checkpoint's ``state_dict`` is the average, ready for inference, and ``current_model_state`` the weights in
    training, from which a continued run goes on exactly; one that was written without this callback starts an average
    from its weights. After the fit the module holds the average.

    Args:
        decay: In [0, 1): the weight of the past.
        warmup: Whether the decay grows as above. Without, it is constant.
        every_n_steps: Optimizer steps between updates. The decay is per update.

    Raises:
        ValueError: For weights in half precision, which would not notice small updates, and under strategies that split
            the weights between processes.
    """

    def __init__(self, decay: float = 0.9999, warmup: bool = True, every_n_steps: int = 1) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}: expected at least 0 and less than 1")
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}: expected at least 1")
        self.decay, self.warmup, self.every_n_steps = decay, warmup, every_n_steps
        self.updates = 0
        self.seen_step = 0
        self.averaged = False
        """Whether the module holds the average and ``other`` the weights in training; else the reverse."""
        self.other: dict[str, Tensor] = {}
        self._restored: dict[str, Tensor] | None = None
        self._places: dict[str, tuple[dict[str, Any], str]] = {}
        self._names: dict[str, str] = {}
        self._averageable: list[str] = []

    # The run.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.other and not self._is_of(pl_module):  # the averages of another module's fit, which has failed
            self.other, self.averaged = {}, False
            vars(trainer.strategy).pop("lightning_module_state_dict", None)
        if stage == "fit" and is_split(trainer):
            strategy = type(trainer.strategy).__name__
            raise ValueError(f"EMA needs whole weights in each process, but {strategy} splits them: use ddp")

    @torch.no_grad()
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._find_tensors(pl_module)
        tensors = self._tensors()
        half = next((name for name, t in tensors.items() if t.dtype in (torch.bfloat16, torch.float16)), None)
        if half is not None:
            raise ValueError(f"EMA needs float32 weights, but {half} is {tensors[half].dtype}: use bf16-mixed")
        # Between infinite values, as masks have them, there is no average.
        self._averageable = [n for n, t in tensors.items() if t.is_floating_point() and bool(t.isfinite().all())]
        start = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        if self._restored is None:  # a new run, whatever this object has averaged before
            self.updates = 0
        else:
            start.update({name: self._restored[name].to(t) for name, t in start.items() if name in self._restored})
        self.other, self.averaged, self._restored = start, False, None
        # What every checkpoint takes the weights from; callbacks are not asked when only weights are saved.
        module_state = type(trainer.strategy).lightning_module_state_dict
        trainer.strategy.lightning_module_state_dict = lambda: self._averages(module_state(trainer.strategy))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen_step = trainer.global_step  # by now a checkpoint's

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self.seen_step:  # gradients are still accumulating
            return
        self.seen_step = step
        if step % self.every_n_steps == 0:
            self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Updates the average once."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        self.updates += 1
        tensors = self._tensors()
        floats = self._averageable
        torch._foreach_lerp_([self.other[name] for name in floats], [tensors[name] for name in floats], 1 - decay)
        for name in tensors.keys() - set(floats):
            self.other[name].copy_(tensors[name])

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the module's weights with the others, in place."""
        self.averaged = not self.averaged
        tensors = self._tensors()
        held = {name: tensor.clone() for name, tensor in tensors.items()}
        torch._foreach_copy_(list(tensors.values()), [self.other[name] for name in tensors])
        torch._foreach_copy_([self.other[name] for name in tensors], list(held.values()))

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and not self.averaged:
            self.swap()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and self.averaged:
            self.swap()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if not self.averaged:
            self.swap()

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = state_dict["updates"]

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if not self.other:
            return
        weights = self.other if self.averaged else self._tensors()
        state = checkpoint["state_dict"]
        raw = {key: weights[self._names[key]].detach() if key in self._names else value for key, value in state.items()}
        checkpoint["current_model_state"] = raw

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit" and "current_model_state" in checkpoint:
            self._restored = checkpoint["state_dict"]  # the module has been filled with it
            pl_module.load_state_dict(checkpoint["current_model_state"], strict=pl_module.strict_loading)

    # The module's tensors. Buffers are looked up anew each time, since some modules replace theirs.

    def _is_of(self, module: nn.Module) -> bool:
        held = next(iter(self._places.values()), ({}, ""))[0]
        return any(held is part._parameters or held is part._buffers for part in module.modules())

    def _find_tensors(self, module: nn.Module) -> None:
        """Looks up where each tensor of the state lies, once, and which of them every name of the state means."""
        self._places, first = {}, {}
        for prefix, part in module.named_modules():
            buffers = {k: v for k, v in part._buffers.items() if k not in part._non_persistent_buffers_set}
            for held, tensors in ((part._parameters, part._parameters), (part._buffers, buffers)):
                for key, tensor in tensors.items():
                    if tensor is not None and id(tensor) not in first:
                        first[id(tensor)] = name = f"{prefix}.{key}".lstrip(".")
                        self._places[name] = held, key
        state = module.state_dict(keep_vars=True)
        self._names = {key: first[id(value)] for key, value in state.items() if id(value) in first}

    def _tensors(self) -> dict[str, Tensor]:
        return {name: held[key].data for name, (held, key) in self._places.items()}

    def _averages(self, state: dict[str, Any]) -> dict[str, Any]:
        if self.averaged:
            return state
        return {k: self.other[self._names[k]] if k in self._names else value for k, value in state.items()}
