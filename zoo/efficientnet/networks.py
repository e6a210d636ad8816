"""Networks at any width and depth, from timm's blocks: EfficientNet, and what the paper scaled beside it.

All of them end in pooled features (B, num_features), without a classifier, and keep timm's names for their parameters.
"""

from functools import partial
from typing import Any

import timm
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.efficientnet import EfficientNet
from torch import nn

from zoo.efficientnet.rounding import NARROWEST, round_filters, round_repeats
from zoo.efficientnet.scaling import PUBLISHED

# Table 1 of the paper. ds: depthwise separable, an inverted residual without expansion; ir: inverted residual (MBConv);
# r: repeats, k: kernel, s: stride, e: expansion, c: channels; se: squeeze-and-excitation, as a share of the channels
# that enter the block.
EFFICIENTNET_B0 = [
    ["ds_r1_k3_s1_e1_c16_se0.25"],
    ["ir_r2_k3_s2_e6_c24_se0.25"],
    ["ir_r2_k5_s2_e6_c40_se0.25"],
    ["ir_r3_k3_s2_e6_c80_se0.25"],
    ["ir_r3_k5_s1_e6_c112_se0.25"],
    ["ir_r4_k5_s2_e6_c192_se0.25"],
    ["ir_r1_k3_s1_e6_c320_se0.25"],
]
# Sandler et al., "MobileNetV2", CVPR 2018, table 2.
MOBILENET_V2 = [
    ["ds_r1_k3_s1_c16"],
    ["ir_r2_k3_s2_e6_c24"],
    ["ir_r3_k3_s2_e6_c32"],
    ["ir_r4_k3_s2_e6_c64"],
    ["ir_r3_k3_s1_e6_c96"],
    ["ir_r3_k3_s2_e6_c160"],
    ["ir_r1_k3_s1_e6_c320"],
]
# He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, table 1: repeats, channels, stride.
RESNET_50 = ((3, 256, 1), (4, 512, 2), (6, 1024, 2), (3, 2048, 2))

# Tan and Le, "EfficientNetV2", ICML 2021, arXiv 2104.00298: image side at evaluation, and the dropout that training
# ends with (table 6). They are not made by the rule.
V2 = {"v2_s": (384, 0.3), "v2_m": (480, 0.4), "v2_l": (480, 0.5)}


def create_network(
    family: str,
    depth: float = 1.0,
    width: float = 1.0,
    *,
    in_channels: int = 3,
    stem_stride: int = 2,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    padding: str = "symmetric",
    norm_eps: float = 1e-5,
    norm_momentum: float = 0.1,
) -> Any:
    """A network of a family, its depth and width multiplied.

    Args:
        family: "efficientnet", "mobilenetv2" or "resnet50"; or "v2_s", "v2_m", "v2_l", which come in one size.
        depth, width: Multipliers; blocks are rounded up, channels to multiples of 8.
        in_channels: Channels of the images.
        stem_stride: Of the first convolution, 2 or 1.
        dropout: Before the classifier.
        drop_path: Stochastic depth: the probability rises in a straight line from 0 in the first block towards this.
        padding: "symmetric", or "same" as TensorFlow pads, more on the right and below; resnet50 has the first only.
        norm_eps, norm_momentum: Of every BatchNorm.

    Raises:
        ValueError: For an unknown family, a size or a padding that the family does not have, and values out of range.
    """
    if family not in (*NARROWEST, *V2):
        raise ValueError(f"unknown family {family!r}: expected one of {', '.join((*NARROWEST, *V2))}")
    if family in V2 and (depth, width) != (1, 1):
        raise ValueError(f"{family} comes in one size: leave depth and width at 1")
    if padding not in ("symmetric", "same"):
        raise ValueError(f"unknown padding {padding!r}: expected one of symmetric, same")
    for name, value, fits, expected in (
        ("depth", depth, depth > 0, "a positive multiplier"),
        ("width", width, width > 0, "a positive multiplier"),
        ("in_channels", in_channels, in_channels >= 1, "at least 1"),
        ("stem_stride", stem_stride, stem_stride in (1, 2), "1 or 2"),
        ("dropout", dropout, 0 <= dropout < 1, "a rate in [0, 1)"),
        ("drop_path", drop_path, 0 <= drop_path < 1, "a rate in [0, 1)"),
        ("norm_eps", norm_eps, norm_eps > 0, "a positive number"),
        ("norm_momentum", norm_momentum, 0 <= norm_momentum <= 1, "a share in [0, 1]"),
    ):
        if not fits:
            raise ValueError(f"{name} is {value}: expected {expected}")
    options: dict[str, Any] = {"in_chans": in_channels, "drop_rate": dropout, "drop_path_rate": drop_path}
    norm = partial(nn.BatchNorm2d, eps=norm_eps, momentum=norm_momentum)
    pad_type = "" if padding == "symmetric" else padding
    network: Any
    if family == "resnet50":
        if pad_type:
            raise ValueError(f"resnet50 has no padding {padding!r}: leave it symmetric")
        network = _resnet(depth, width, norm, **options)
    elif family in V2:
        name = f"efficientnet{family}"
        network = timm.create_model(name, num_classes=0, norm_layer=norm, pad_type=pad_type, **options)
    else:
        rounding = partial(round_filters, width=width)
        is_mobilenet = family == "mobilenetv2"
        network = EfficientNet(
            decode_arch_def(MOBILENET_V2 if is_mobilenet else EFFICIENTNET_B0, depth_multiplier=depth),
            num_classes=0,
            # MobileNetV2 keeps its last layer as wide as it is where the others get narrower.
            num_features=max(1280, rounding(1280)) if is_mobilenet else rounding(1280),
            stem_size=32,
            round_chs_fn=rounding,
            act_layer=nn.ReLU6 if is_mobilenet else nn.SiLU,
            norm_layer=norm,
            pad_type=pad_type,
            **options,
        )
    named = timm_name(family, depth, width)
    if stem_stride == 2 and named is not None:
        norms = {"pad_type": pad_type, "bn_eps": norm_eps, "bn_momentum": norm_momentum}
        network.timm_arguments = (named, options | norms)
    if stem_stride != 2:
        stem = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
        stem.stride = (stem_stride, stem_stride)
    return network


def timm_name(family: str, depth: float, width: float) -> str | None:
    """Name of the network in timm; None where timm has none, as of most phi."""
    if family in V2:
        return f"efficientnet{family}"
    if family == "mobilenetv2":
        return "mobilenetv2_100" if depth == width == 1 else None
    sizes = {(network.depth, network.width): f"efficientnet_{variant}" for variant, network in PUBLISHED.items()}
    return sizes.get((depth, width)) if family == "efficientnet" else None


def _resnet(depth: float, width: float, norm: Any, **options: Any) -> ByobNet:
    """ResNet of timm's bring-your-own-blocks network; timm's own ResNet has a stem of fixed width."""
    blocks = [
        ByoBlockCfg(type="bottle", d=round_repeats(repeats, depth), c=round_filters(channels, width), s=stride, br=0.25)
        for repeats, channels, stride in RESNET_50
    ]
    config = ByoModelCfg(
        blocks=tuple(blocks),
        downsample="conv1x1",
        stem_type="7x7",
        stem_pool="maxpool",
        stem_chs=round_filters(64, width),
    )
    return ByobNet(config, num_classes=0, norm_layer=norm, **options)


def recompute_blocks(network: Any, norm_momentum: float) -> None:
    """Has the backward pass compute the blocks once more, instead of keeping what they computed.

    BatchNorm's running statistics then take in each batch twice. With 1 - sqrt(1 - m) for momentum m, that is what once
    makes with m.
    """
    network.set_grad_checkpointing(True)
    for module in (network.stages if isinstance(network, ByobNet) else network.blocks).modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1 - (1 - norm_momentum) ** 0.5
