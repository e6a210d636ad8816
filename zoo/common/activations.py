"""Activations of transformers' MLPs: GELU, its two approximations, and whatever else a network was built with."""

from timm.layers import Mlp, get_act_layer
from timm.layers.activations import GELUTanh, QuickGELU
from torch import nn


def activation(module: nn.Module) -> str | None:
    """The name that timm has for the activation of a module's MLPs; None if it has none, or several."""
    found = {_name(part.act) for part in module.modules() if isinstance(part, Mlp)}
    return found.pop() if len(found) == 1 else None


def set_activation(module: nn.Module, name: str) -> None:
    """Gives all MLPs of a module an activation by timm's name. In place: their weights stay the same objects.

    Raises:
        ValueError: If there are none, or for a name that timm does not know.
    """
    parts = [part for part in module.modules() if isinstance(part, Mlp)]
    if not parts:
        raise ValueError(f"{type(module).__name__} has no MLPs to give the activation {name!r}: leave it out")
    try:
        made = get_act_layer(name)
    except KeyError as error:
        raise ValueError(f"timm has no activation {name!r}: gelu, quick_gelu or gelu_tanh, for example") from error
    for part in parts:
        part.act = made()


def _name(layer: nn.Module) -> str:
    if isinstance(layer, GELUTanh) or (isinstance(layer, nn.GELU) and layer.approximate == "tanh"):
        return "gelu_tanh"
    return "quick_gelu" if isinstance(layer, QuickGELU) else type(layer).__name__.lower()
