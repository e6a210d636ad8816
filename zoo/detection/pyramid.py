"""From a backbone's maps to a pyramid: the levels of a timm network, and the three necks behind them.

Level l has a stride of 2**l pixels. A plain vision transformer has one stride; it counts as level 4, also at 14 pixels.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import Format, LayerNorm2d, to_2tuple
from timm.models import group_parameters, is_model_in_modules
from torch import Tensor, nn

from zoo.common.backbones import create_backbone

# timm's files whose vision transformers take images of every size, if they are told to.
DYNAMIC = ("vision_transformer", "vision_transformer_hybrid", "deit", "eva")
SWIN = ("swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr")


class Maps:
    """Which of a backbone's maps make the pyramid, and how to get them.

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
    """Whether a timm network takes images of ``image_size`` only if it is built for them.

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
    strides, channels = getattr(backbone, "strides", None), getattr(backbone, "channels", None)
    if strides is None or channels is None:
        raise ValueError(
            f"{type(backbone).__name__} does not say what maps it gives: expected a network of timm, or a module with "
            "strides and channels that returns a list of maps"
        )
    return list(strides), list(channels), list(range(len(strides)))


class FPN(nn.Module):
    """Feature pyramid network (Lin et al. 2017, "Feature Pyramid Networks", section 3), nearest upsampling, no norms.

    Levels coarser than the backbone's come from convolutions of stride 2, with ReLU between them, on the coarsest
    output, or on the backbone's coarsest map (RetinaNet's paper).

    Args:
        levels: Level of each map that comes in, ascending.
        in_channels: Of each.
        channels: Of what goes out.
        last: The coarsest level of the pyramid.
        extra_from: "output" or "backbone": what the first level beyond the backbone's is made of.
    """

    def __init__(
        self, levels: Sequence[int], in_channels: Sequence[int], channels: int, last: int, extra_from: str = "output"
    ) -> None:
        super().__init__()
        self.extra_from = extra_from
        self.lateral = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        self.extra = tuple(f"p{level}" for level in range(levels[-1] + 1, last + 1))
        width = in_channels[-1] if extra_from == "backbone" else channels
        for name in self.extra:
            self.add_module(name, nn.Conv2d(width, channels, 3, stride=2, padding=1))
            width = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(_bias(module))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, channels, h, w) of the pyramid's levels, finest first, of the backbone's."""
        merged = self.lateral[-1](maps[-1])
        outputs = [self.output[-1](merged)]
        for index in range(len(maps) - 2, -1, -1):
            lateral = self.lateral[index](maps[index])
            merged = lateral + F.interpolate(merged, size=lateral.shape[-2:], mode="nearest")  # sizes may be odd
            outputs.insert(0, self.output[index](merged))
        coarse = maps[-1] if self.extra_from == "backbone" else outputs[-1]
        for position, name in enumerate(self.extra):
            coarse = self.get_submodule(name)(coarse.relu() if position else coarse)
            outputs.append(coarse)
        return outputs


class SingleLevel(nn.Module):
    """One level, for comparison: the lateral and the output convolution of an FPN on one map of the backbone."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.lateral, self.output = nn.Conv2d(in_channels, channels, 1), nn.Conv2d(channels, channels, 3, padding=1)
        for module in (self.lateral, self.output):
            nn.init.kaiming_uniform_(module.weight, a=1)
            nn.init.zeros_(_bias(module))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [self.output(self.lateral(maps[0]))]


class SimpleFeaturePyramid(nn.Module):
    """A pyramid on the one map of a plain vision transformer (Li et al. 2022, ViTDet, section 3).

    Finer levels by transposed convolutions, coarser ones by max pooling; each level then has a 1x1 and a 3x3
    convolution with layer norms. Levels two and more coarser than the map are subsampled from the level before.

    Args:
        in_channels: Of the map, which is level 4.
        channels: Of what goes out.
        levels: Finest and coarsest level; the finest is 2 to 5.
    """

    def __init__(self, in_channels: int, channels: int, levels: tuple[int, int]) -> None:
        super().__init__()
        if not 2 <= levels[0] <= 5:
            raise ValueError(f"levels are {list(levels)}: a simple feature pyramid starts at level 2, 3, 4 or 5")
        self.levels = levels
        self.scale, self.lateral, self.output = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level in range(levels[0], min(levels[1], 5) + 1):
            half = in_channels // 2
            up: dict[int, tuple[list[nn.Module], int]] = {
                2: (
                    [
                        nn.ConvTranspose2d(in_channels, half, 2, stride=2),
                        LayerNorm2d(half),
                        nn.GELU(),
                        nn.ConvTranspose2d(half, half // 2, 2, stride=2),
                    ],
                    half // 2,
                ),
                3: ([nn.ConvTranspose2d(in_channels, half, 2, stride=2)], half),
                4: ([], in_channels),
                5: ([nn.MaxPool2d(2, ceil_mode=True)], in_channels),
            }
            layers, width = up[level]
            self.scale.append(nn.Sequential(*layers))
            self.lateral.append(nn.Sequential(nn.Conv2d(width, channels, 1, bias=False), LayerNorm2d(channels)))
            self.output.append(
                nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels))
            )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, channels, h, w), finest first, of one map."""
        outputs = [
            output(lateral(scale(maps[0])))
            for scale, lateral, output in zip(self.scale, self.lateral, self.output, strict=True)
        ]
        while len(outputs) <= self.levels[1] - self.levels[0]:
            outputs.append(outputs[-1][:, :, ::2, ::2])  # max pooling with a window of one
        return outputs


class ConvNormAct(nn.Module):
    """A 3x3 convolution, group norm or none, ReLU.

    At most 32 groups, as many as divide the channels into equal ones of at least two: of one channel alone, nothing
    would be left where a map has a single cell.
    """

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        groups = math.gcd(32, channels // 2) if channels % 2 == 0 else 1
        self.norm = nn.GroupNorm(groups, channels) if norm == "group" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)), inplace=True)


class DenseHead(nn.Module):
    """Two towers of convolutions, shared by all levels, and what they predict for each anchor of each cell.

    Initial values are RetinaNet's (Lin et al. 2017, section 4.1): normal with deviation 0.01, and a bias by which
    everything has a probability of 0.01.

    Args:
        channels: Of the maps, and of the towers.
        num_classes: K.
        anchors: Anchors a cell, A.
        depth: Convolutions of each tower.
        norm: "group" or "none".
        centerness: Whether to predict one, on the tower of the boxes.
        positive_boxes: Whether boxes are coded as distances, which pass a ReLU.
        levels: For how many levels the boxes have a factor each that is learned (ATSS, FCOS's first version); or 0.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        anchors: int,
        depth: int,
        norm: str,
        centerness: bool,
        positive_boxes: bool,
        levels: int = 0,
    ) -> None:
        super().__init__()
        self.num_classes, self.positive_boxes = num_classes, positive_boxes
        self.cls_tower = nn.Sequential(*(ConvNormAct(channels, norm) for _ in range(depth)))
        self.box_tower = nn.Sequential(*(ConvNormAct(channels, norm) for _ in range(depth)))
        self.cls_out = nn.Conv2d(channels, anchors * num_classes, 3, padding=1)
        self.box_out = nn.Conv2d(channels, anchors * 4, 3, padding=1)
        self.ctr_out = nn.Conv2d(channels, anchors, 3, padding=1) if centerness else None
        self.scales = nn.Parameter(torch.ones(levels)) if levels else None
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(_bias(module))
        nn.init.constant_(_bias(self.cls_out), -math.log((1 - 0.01) / 0.01))

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits (B, N, K), boxes (B, N, 4) and centerness (B, N) of all anchors of all levels, finest first."""
        logits, boxes, centerness = [], [], []
        for level, features in enumerate(maps):
            logits.append(_by_anchor(self.cls_out(self.cls_tower(features)), self.num_classes))
            tower = self.box_tower(features)
            box = self.box_out(tower)
            box = box if self.scales is None else box * self.scales[level]
            boxes.append(_by_anchor(box.relu() if self.positive_boxes else box, 4))
            if self.ctr_out is not None:
                centerness.append(_by_anchor(self.ctr_out(tower), 1).squeeze(2))
        return torch.cat(logits, 1), torch.cat(boxes, 1), torch.cat(centerness, 1) if centerness else None


def _by_anchor(output: Tensor, width: int) -> Tensor:
    """(B, A * width, h, w) as (B, h * w * A, width). In channels-last memory this is a view."""
    return output.permute(0, 2, 3, 1).reshape(output.shape[0], -1, width)  # len() would fix the batch for an export


def _bias(module: nn.Module) -> Tensor:
    bias = module.bias
    assert isinstance(bias, Tensor)
    return bias
