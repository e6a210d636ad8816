"""The maps of a backbone that make the levels of a pyramid, out of timm's networks and others.

Level l has a stride of 2**l pixels. A plain vision transformer has one stride; it counts as level 4, also at 14 pixels.
"""

from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.layers import Format, to_2tuple
from timm.models import group_parameters, is_model_in_modules
from torch import Tensor, nn

from zoo.common.backbones import create_backbone
from zoo.common.protocols import StatesMaps

# timm's files whose vision transformers take images of every size, if they are told to.
DYNAMIC = ("vision_transformer", "vision_transformer_hybrid", "deit", "eva")
SWIN = ("swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr")


class Maps:
    """Selection of a backbone's maps for the pyramid.

    Attributes:
        levels: Level of each map, ascending.
        strides: Pixels between the cells of each, whole numbers.
        channels: Of each.
        plain: Whether the backbone is a plain vision transformer: one map, whatever the depth.
        pruned: Names of what the backbone had behind the last of these maps, and no longer has: weights have it.
    """

    def __init__(self, backbone: Any, levels: tuple[int, int]) -> None:
        strides, channels, indices = _described(backbone)
        self.plain = len(set(strides)) == 1
        if self.plain:
            kept = [(4, strides[-1], channels[-1], indices[-1])]
        else:
            found = {
                stride: (stride, width, index) for stride, width, index in zip(strides, channels, indices, strict=True)
            }
            kept = [(level, *found[2**level]) for level in range(levels[0], levels[1] + 1) if 2**level in found]
            if not kept or kept[0][0] != levels[0]:
                raise ValueError(
                    f"levels are {list(levels)}: {type(backbone).__name__} has no map of stride {2 ** levels[0]}, only "
                    f"of {', '.join(map(str, sorted(found)))}"
                )
            if (coarsest := kept[-1][0]) - levels[0] >= len(kept):
                raise ValueError(
                    f"{type(backbone).__name__} has maps of strides {', '.join(map(str, sorted(found)))}: expected one "
                    f"of each level from {levels[0]} to {coarsest}"
                )
        self.levels, self.strides, self.channels, self.indices = (tuple(each) for each in zip(*kept, strict=True))
        whole = set(backbone.state_dict())
        if hasattr(backbone, "prune_intermediate_layers"):  # what nobody uses would have no gradient: DDP waits for it
            backbone.prune_intermediate_layers(list(self.indices), prune_norm=True, prune_head=True)
        self.pruned = frozenset(whole - set(backbone.state_dict()))

    def pyramid_strides(self, levels: tuple[int, int]) -> tuple[float, ...]:
        """Pixels between the cells of each level, from the finest to the coarsest of a pyramid on these maps."""
        unit = self.strides[0] / 2 ** self.levels[0]  # a ViT with patches of 14 pixels has levels 3.5, 7, 14, 28 apart
        strides = [unit * 2**level for level in range(levels[0], levels[1] + 1)]
        return tuple(int(stride) if stride == int(stride) else stride for stride in strides)

    def __call__(self, backbone: Any, images: Tensor) -> list[Tensor]:
        """The maps (B, C, H / stride, W / stride) of images (B, C, H, W), finest first.

        Raises:
            ValueError: For images of a size that the backbone does not take, and for maps that are not what it states.
        """
        if torch.compiler.is_compiling():
            return self._compute(backbone, images)
        name, (height, width) = type(backbone).__name__, images.shape[2:]
        try:
            maps = self._compute(backbone, images)
        except (AssertionError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise ValueError(
                f"{name} gives no maps of images of {height}x{width}: {reason} (some networks take one image_size "
                "alone, or sides that are multiples of 32; resnet50 takes all)"
            ) from error
        for each, stride, channels in zip(maps, self.strides, self.channels, strict=True):
            if each.ndim != 4 or each.shape[1] != channels:
                raise ValueError(
                    f"{name} gives a map of {tuple(each.shape)}: expected (B, {channels}, H / {stride}, W / {stride})"
                )
            if any(
                not side // stride <= cells <= -(-side // stride)
                for side, cells in zip((height, width), each.shape[2:], strict=True)
            ):
                raise ValueError(
                    f"{name} gives a map of {each.shape[2]}x{each.shape[3]} cells of images of {height}x{width}, which "
                    f"its stride of {stride} does not explain: where its cells lie is not known"
                )
        return maps

    def _compute(self, backbone: Any, images: Tensor) -> list[Tensor]:
        if hasattr(backbone, "forward_intermediates"):
            options = {"stop_early": True, "intermediates_only": True}
            return backbone.forward_intermediates(images, indices=list(self.indices), **options)
        maps = backbone(images)
        maps = list(maps.values()) if isinstance(maps, Mapping) else maps
        chosen = [maps[index] for index in self.indices]
        # timm's features_only leaves the maps of Swin and its kin with channels last.
        return [each.permute(0, 3, 1, 2) for each in chosen] if _is_channels_last(backbone) else chosen


def create_pyramid_backbone(backbone: str | nn.Module, in_channels: int, image_size: Any) -> Any:
    """A timm network whose maps can be had, or the module that was given: see :class:`zoo.FPNDetector`.

    Raises:
        ValueError: As :func:`zoo.common.backbones.create_backbone`; and for a network that gives no maps.
    """
    if isinstance(backbone, nn.Module):
        return backbone
    options: dict[str, Any] = {"in_chans": None if in_channels == 3 else in_channels}
    if is_model_in_modules(backbone.partition(".")[0], DYNAMIC):
        options |= {"img_size": image_size, "dynamic_img_size": True, "dynamic_img_pad": True}
    elif is_model_in_modules(backbone.partition(".")[0], SWIN):
        options |= {"strict_img_size": False}
    model = create_backbone(backbone, **options)
    if "img_size" not in options and _is_for_another_size(model, backbone, in_channels, image_size):
        model = create_backbone(backbone, img_size=image_size, **options)
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(
            f"timm's {backbone} gives no maps: take a network with forward_intermediates, such as resnet50"
        )
    return model


def _is_for_another_size(model: Any, name: str, in_channels: int, image_size: Any) -> bool:
    """Tells whether a timm network takes images of ``image_size`` only if it is built for them.

    timm says of many that their size is fixed, also of some that adapt to every one: tried out, without memory.
    """
    if not model.pretrained_cfg.get("fixed_input_size"):
        return False
    with torch.device("meta"), torch.no_grad():
        network = timm.create_model(name, num_classes=0, in_chans=in_channels).eval()
        try:
            network(torch.zeros(1, in_channels, *to_2tuple(image_size)))
        except (AssertionError, RuntimeError):
            return True
    return False


def _is_channels_last(backbone: Any) -> bool:
    return getattr(backbone, "output_fmt", None) == Format.NHWC


def freeze_stages(backbone: Any, count: int) -> None:
    """Freezes the stem and the stages before stage ``count``, as timm groups them: 2 is detectron2's ``FREEZE_AT``.

    Raises:
        ValueError: If the backbone has fewer, or timm's groups are unknown of it.
    """
    if not count:
        return
    if not hasattr(backbone, "group_matcher"):
        raise ValueError(f"frozen_stages needs group_matcher(), as timm's networks have it: {type(backbone).__name__}")
    groups = group_parameters(backbone, backbone.group_matcher(coarse=True))
    numbers = sorted(groups)
    if not 0 < count < len(numbers):
        raise ValueError(f"frozen_stages is {count}: expected 0 to {len(numbers) - 1}, of {type(backbone).__name__}")
    for number in numbers[:count]:
        for name in groups[number]:
            backbone.get_parameter(name).requires_grad = False


def _described(backbone: Any) -> tuple[list[int], list[int], list[int]]:
    """Strides, channels and indices of the maps that a backbone can give."""
    info: Any = getattr(backbone, "feature_info", None)
    if info is not None and hasattr(backbone, "forward_intermediates"):
        entries = list(info)
        return [e["reduction"] for e in entries], [e["num_chs"] for e in entries], list(range(len(entries)))
    if hasattr(info, "channels"):  # timm's features_only
        return list(info.reduction()), list(info.channels()), list(range(len(info.channels())))
    if not isinstance(backbone, StatesMaps):
        raise ValueError(
            f"{type(backbone).__name__} does not say what maps it gives: expected a network of timm, or a module with "
            "strides and channels that returns a list of maps"
        )
    return list(backbone.strides), list(backbone.channels), list(range(len(backbone.strides)))
