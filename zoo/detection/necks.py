"""Necks: maps of a pyramid's levels out of the backbone's maps."""

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from zoo.detection.layers import NeckNorm, NormedConv
from zoo.detection.maps import Maps

Neck = Literal["fpn", "single"]
AnyNeck = Literal["fpn", "single", "none"]
ExtraFrom = Literal["output", "backbone"]
Extra = Literal["output", "backbone", "subsampled"]


def create_neck(
    neck: AnyNeck, maps: Maps, channels: int, levels: tuple[int, int], extra_from: Extra, norm: NeckNorm = "none"
) -> nn.Module:
    """The neck for a backbone's maps: a feature pyramid, a simple one for a plain ViT, a single level, or nothing.

    Raises:
        ValueError: For levels that it cannot have, and for a norm where it is no FPN.
    """
    if norm != "none" and (neck != "fpn" or maps.plain):
        found = "a plain ViT's pyramid, which has layer norms" if neck == "fpn" else f"neck {neck!r}"
        raise ValueError(f"neck_norm is {norm!r}, with {found}: take neck_norm='none', or neck='fpn' on several maps")
    if neck == "none":
        return nn.Identity()
    if neck == "single":
        return SingleLevel(maps.channels[0], channels)
    if maps.plain:
        return SimpleFeaturePyramid(maps.channels[-1], channels, levels)
    return FPN(maps.levels, maps.channels, channels, levels[1], extra_from, norm)


class FPN(nn.Module):
    """Feature pyramid network (Lin et al. 2017, "Feature Pyramid Networks", section 3), nearest upsampling.

    Levels coarser than the backbone's come from convolutions of stride 2, with ReLU between them, on the coarsest
    output, or on the backbone's coarsest map (RetinaNet's paper); or they are the coarsest output, subsampled (section
    4.1).

    Args:
        levels: Level of each map that comes in, ascending.
        in_channels: Of each.
        channels: Of what goes out.
        last: The coarsest level of the pyramid.
        extra_from: "output" or "backbone": what the first level beyond the backbone's is made of; or "subsampled".
        norm: "none", as there; or "batch", behind each convolution of the backbone's levels.
    """

    def __init__(
        self,
        levels: Sequence[int],
        in_channels: Sequence[int],
        channels: int,
        last: int,
        extra_from: Extra = "output",
        norm: NeckNorm = "none",
    ) -> None:
        super().__init__()
        self.extra_from = extra_from
        self.lateral = nn.ModuleList(NormedConv(width, channels, 1, norm) for width in in_channels)
        self.output = nn.ModuleList(NormedConv(channels, channels, 3, norm) for _ in in_channels)
        self.extra = tuple(f"p{level}" for level in range(levels[-1] + 1, last + 1))
        width = in_channels[-1] if extra_from == "backbone" else channels
        for name in () if extra_from == "subsampled" else self.extra:
            self.add_module(name, nn.Conv2d(width, channels, 3, stride=2, padding=1))
            width = channels
        _initialize(self)

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
            if self.extra_from == "subsampled":
                coarse = coarse[:, :, ::2, ::2]  # max pooling with a window of one
            else:
                coarse = self.get_submodule(name)(coarse.relu() if position else coarse)
            outputs.append(coarse)
        return outputs


class SingleLevel(nn.Module):
    """A single level, for comparison: the lateral and the output convolution of an FPN on one map of the backbone."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.lateral, self.output = nn.Conv2d(in_channels, channels, 1), nn.Conv2d(channels, channels, 3, padding=1)
        _initialize(self)

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


def _initialize(module: nn.Module) -> None:
    """Initialises convolutions as detectron2 and torchvision do: Kaiming-uniform weights for linear outputs, bias 0."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_uniform_(part.weight, a=1)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
