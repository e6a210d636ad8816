"""Cost of a network: its parameters, and the multiply-accumulates of an image.

torch counts the operations of a forward pass; on the meta device, where tensors have shapes and no memory, this takes a
fraction of a second for a network of any size. Its count of the backward pass is wrong for grouped convolutions (42
times the forward pass of EfficientNet-B0, torch 2.15), so that training is taken as three times the forward pass: an
upper bound where layers are frozen, as for a linear probe.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.backends import mha
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from zoo.common.protocols import PredictsOtherwise, TrainsOtherwise


class Cost(NamedTuple):
    """Cost of one image.

    Attributes:
        parameters: All of them, frozen ones as well.
        macs: Multiply-accumulates of the forward pass in convolutions, linear layers and attention.
        training_macs: Those of the forward pass that a training step computes, which may be less: those that an image
            more in the batch adds.
    """

    parameters: int
    macs: int
    training_macs: int

    @property
    def training_flops(self) -> int:
        """Floating-point operations of a training step: two a multiply-accumulate, three times the forward pass."""
        return 6 * self.training_macs


_FILLING = {getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")}
_FILLING |= {torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.fill_, torch.Tensor.zero_}
_ALIKE = {F.batch_norm, F.relu, F.leaky_relu, F.gelu, F.silu, F.hardswish, F.hardsigmoid}
_ALIKE |= {torch.relu, torch.sigmoid, torch.Tensor.relu, torch.Tensor.sigmoid}
_COMBINING = {torch.add, torch.mul, torch.Tensor.add, torch.Tensor.mul}


class Blueprint(TorchFunctionMode):
    """Context that skips what keeps the shape of a tensor on the meta device: initialisation, norms and activations.

    torch finds that out in Python, operation by operation, in more than half of the time that a network takes to be
    built and counted. None of it is a multiply-accumulate. Tensors on other devices are treated as ever.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("tensor")
        if not (isinstance(first, torch.Tensor) and first.is_meta):
            return func(*args, **kwargs)
        if func in _FILLING or func in _ALIKE or _fits(func, first, args, kwargs):
            return first  # which has no values that could have become others
        return func(*args, **kwargs)


def _fits(func: Any, first: torch.Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Tells whether the other arguments are such that the result is like the first; of others torch is asked."""
    if len(args) < 2:
        return False
    other = args[1]
    if func in _COMBINING:
        return (
            not kwargs and isinstance(other, torch.Tensor) and (other.shape, other.dtype) == (first.shape, first.dtype)
        )
    if func is F.layer_norm:
        return first.shape[-len(other) :] == torch.Size(other)
    if func is F.group_norm:
        weight = args[2] if len(args) > 2 else kwargs.get("weight")
        return bool(first.shape[1] % other == 0 and (weight is None or weight.shape == first.shape[1:2]))
    return False


def count(module: nn.Module, input_shape: Sequence[int]) -> Cost:
    """Counts what a module computes for one image.

    Args:
        module: Best built under ``torch.device("meta")`` and :class:`Blueprint`: it then needs neither memory nor time.
            Where training runs something else than ``forward``, it has a method ``training_forward(images)`` as well;
            where a prediction does, ``predicting_forward(images)``.
        input_shape: (C, H, W) of an image.
    """
    parameters = list(module.parameters())
    like = parameters[0] if parameters else torch.zeros(())
    images = torch.zeros((1, *input_shape), dtype=like.dtype, device=like.device)
    training, fast_path = {each: each.training for each in module.modules()}, mha.get_fastpath_enabled()
    learned = [parameter for parameter in parameters if parameter.requires_grad]
    module.eval()  # batch norm cannot train on a single value a channel
    mha.set_fastpath_enabled(False)  # of nn.TransformerEncoderLayer: torch does not look into it
    for parameter in learned:  # torch's counter follows gradients of what enters a layer, and fails for a class token
        parameter.requires_grad_(False)
    try:
        predicts = module.predicting_forward if isinstance(module, PredictsOtherwise) else module
        macs = training_macs = _macs(predicts, images)
        if isinstance(module, TrainsOtherwise):
            trains = module.training_forward
            training_macs = _macs(trains, torch.cat([images, images])) - _macs(trains, images)
        return Cost(sum(p.numel() for p in parameters), macs, training_macs)
    finally:
        mha.set_fastpath_enabled(fast_path)
        for parameter in learned:
            parameter.requires_grad_(True)
        for each, mode in training.items():
            each.training = mode


@torch.no_grad()
def _macs(function: Callable[..., Any], images: torch.Tensor) -> int:
    # The CPU's fused attention is not counted; as matrix products it is, on every device.
    with sdpa_kernel(SDPBackend.MATH), Blueprint(), FlopCounterMode(display=False) as counter:
        function(images)
    return counter.get_total_flops() // 2
