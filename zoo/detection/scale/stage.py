"""The stage of a backbone that gives its map of stride 16, and the dilation of its convolutions."""

from collections.abc import Sequence
from typing import Any

from torch import nn

LEVEL, STRIDE = 4, 16  # of the stage's map


def stage_of(backbone: Any) -> list[nn.Module]:
    """The modules, one after the other, that give a network's map of stride 16.

    Mostly it is one. Of a plain sequence of layers, such as VGG, it is all since the map before.

    Raises:
        ValueError: If the network does not say where its maps are from, as timm's do.
    """
    modules = dict(backbone.named_modules())
    taps = [(each["reduction"], each["module"]) for each in getattr(backbone, "feature_info", ())]
    names = [name for stride, name in taps if stride == STRIDE][-1:]
    # With features_only timm writes the first dot of a name otherwise, or puts the network into another.
    known = [each for name in names for each in (name, name.replace(".", "_", 1), f"model.{name}") if each in modules]
    if not known:
        raise ValueError(
            f"{type(backbone).__name__} does not say which of its modules gives its map of stride {STRIDE}: expected a "
            "network of timm with stages, such as resnet50"
        )
    stage, parent = modules[known[0]], modules[known[0].rpartition(".")[0]]
    if any(stage.children()) or not isinstance(parent, nn.Sequential):
        return [stage]
    layers = list(parent)
    ends = [modules.get(name) for stride, name in taps if stride < STRIDE]
    before = [layers.index(end) for end in ends if end in layers]
    return layers[max(before, default=-1) + 1 : layers.index(stage) + 1]


def dilatable(backbone: nn.Module, stage: Sequence[nn.Module]) -> list[nn.Conv2d]:
    """The convolutions of a backbone's stage that keep the size of their map with every dilation.

    Raises:
        ValueError: If there are none.
    """
    convolutions = [each for part in stage for each in part.modules() if isinstance(each, nn.Conv2d)]
    found = [each for each in convolutions if _keeps_size(each)]
    if not found:
        kinds = {f"{'x'.join(map(str, each.kernel_size))} of stride {max(each.stride)}" for each in convolutions}
        raise ValueError(
            f"{type(backbone).__name__} has nothing to dilate in its stage of stride {STRIDE}, whose convolutions are "
            f"{', '.join(sorted(kinds)) or 'none'}: expected square odd kernels above 1 of stride 1"
        )
    return found


def _keeps_size(conv: nn.Conv2d) -> bool:
    side = conv.kernel_size[0]
    if conv.kernel_size != (side, side) or side % 2 == 0 or side == 1 or conv.padding_mode != "zeros":
        return False
    return conv.padding in ((side // 2, side // 2), "same") and conv.stride == conv.dilation == (1, 1)


def dilate(backbone: nn.Module, dilation: int) -> None:
    """Gives the convolutions that could have branches one other dilation, in place: the pilot study, section 3.

    Raises:
        ValueError: See :func:`branch_out`.
    """
    for conv in dilatable(backbone, stage_of(backbone)):
        conv.dilation = (dilation, dilation)
        conv.padding = (dilation * (conv.kernel_size[0] // 2),) * 2
