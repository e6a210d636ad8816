"""LayerNorm's epsilon, and BatchNorm that holds the activation behind it, as many of timm's networks have it.

``Trainer(sync_batchnorm=True)`` turns every BatchNorm into torch's SyncBatchNorm for the fit, and back after it.
Neither way knows timm's BatchNormAct2d: its activation is carried along as a child that nothing calls, and the
network goes on as a nearly linear one, without a word.
"""

from collections.abc import Mapping
from typing import Any

from timm.layers import BatchNormAct2d, SyncBatchNormAct
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def restore_activations(module: nn.Module) -> None:
    """Lets each BatchNorm that was converted apply its activation again, synchronised or not. In place.

    Only the class of these modules changes: parameters, buffers, names and hooks stay the same objects.
    """
    for part in module.modules():
        # What was converted is no BatchNorm2d any more. One that is, of whatever class, knows what to do itself.
        converted = isinstance(part, _BatchNorm) and not isinstance(part, nn.BatchNorm2d | SyncBatchNormAct)
        if converted and isinstance(getattr(part, "act", None), nn.Module):
            part.__class__ = SyncBatchNormAct if isinstance(part, nn.SyncBatchNorm) else BatchNormAct2d


def layer_norm_eps(module: nn.Module) -> float | None:
    """The epsilon of a module's LayerNorms; None if it has none, or several."""
    found = {part.eps for part in module.modules() if isinstance(part, nn.LayerNorm)}
    return found.pop() if len(found) == 1 else None


def set_layer_norm_eps(module: nn.Module, eps: float) -> None:
    """Gives all LayerNorms of a module an epsilon.

    Raises:
        ValueError: If there are none, or for an epsilon that is not positive.
    """
    parts = [part for part in module.modules() if isinstance(part, nn.LayerNorm)]
    if not parts:
        raise ValueError(f"norm_eps is for LayerNorm, and {type(module).__name__} has none: leave it out")
    if eps <= 0:
        raise ValueError(f"norm_eps is {eps}: expected more than 0")
    for part in parts:
        part.eps = eps


def restore_layer_norm_eps(module: Any, checkpoint: Mapping[str, Any]) -> None:
    """Gives a module whose ``norm_eps`` is None the one that a Lightning checkpoint of it has.

    It came with the weights that the run began with, which are not read again when it goes on.
    """
    eps = checkpoint.get("hyper_parameters", {}).get("norm_eps")
    if eps is not None and module.hparams.norm_eps is None:
        set_layer_norm_eps(module, eps)
        module.hparams["norm_eps"] = eps
