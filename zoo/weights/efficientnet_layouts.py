"""Names of other programs for the tensors of EfficientNets, whose names here are timm's."""

import re
from collections.abc import Mapping

from torch import Tensor

from zoo.weights.names import renamed

# torchvision's EfficientNets, V2 as well, but for what is within blocks.
TORCHVISION = (
    (r"(^|\.)features\.0\.0\.", r"\1conv_stem."),
    (r"(^|\.)features\.0\.1\.", r"\1bn1."),
    (r"(^|\.)features\.\d+\.0\.weight$", r"\1conv_head.weight"),
    (r"(^|\.)features\.\d+\.1\.(\w+)$", r"\1bn2.\2"),
    (r"(^|\.)classifier\.1\.", r"\1classifier."),
)
# It numbers the layers of a block. Which they are shows in how many there are: a convolution alone, a fused inverted
# residual, a depthwise separable block, an inverted residual.
TORCHVISION_BLOCK = re.compile(
    r"(?P<before>(?:.*\.)?)features\.(?P<block>(?P<stage>\d+)\.\d+)\.block\.(?P<layer>\d+)\.(?P<part>\w+)\.(?P<rest>\w+)"
)
TORCHVISION_LAYERS = {
    1: ("conv",),
    2: ("conv_exp", "conv_pwl"),
    3: ("conv_dw", "se", "conv_pw"),
    4: ("conv_pw", "conv_dw", "se", "conv_pwl"),
}
# The package efficientnet_pytorch: blocks are numbered through, with a norm 0 only behind an expansion.
EFFICIENTNET_PYTORCH = (
    (r"(^|\.)_conv_(stem|head)\.", r"\1conv_\2."),
    (r"(^|\.)_bn0\.", r"\1bn1."),
    (r"(^|\.)_bn1\.", r"\1bn2."),
    (r"(^|\.)_fc\.", r"\1classifier."),
)
EFFICIENTNET_PYTORCH_BLOCK = re.compile(r"(?P<before>(?:.*\.)?)_blocks\.(?P<block>\d+)\.(?P<layer>\w+)\.(?P<rest>\w+)")
EFFICIENTNET_PYTORCH_LAYERS = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
# A block without an expansion, timm's depthwise separable one.
EFFICIENTNET_PYTORCH_SEPARABLE = {"_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def translate(state: Mapping[str, Tensor]) -> tuple[list[str], dict[str, Tensor]]:
    """Tensors of an EfficientNet by timm's names, and where they come from, if that can be told."""
    if any(TORCHVISION_BLOCK.fullmatch(key) for key in state):
        return ["torchvision"], renamed(_named_blocks(state), TORCHVISION)
    if any(EFFICIENTNET_PYTORCH_BLOCK.fullmatch(key) for key in state):
        return ["efficientnet_pytorch"], renamed(_staged_blocks(state), EFFICIENTNET_PYTORCH)
    return [], dict(state)


def _named_blocks(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's blocks, by the names that their layers have here."""
    matches = {key: TORCHVISION_BLOCK.fullmatch(key) for key in state}
    lengths: dict[str, int] = {}
    for found in filter(None, matches.values()):
        lengths[found["block"]] = max(lengths.get(found["block"], 0), int(found["layer"]) + 1)
    named = {}
    for key, value in state.items():
        match = matches[key]
        if match and (layers := TORCHVISION_LAYERS.get(lengths[match["block"]])):
            index = int(match["layer"])
            name = layers[index]
            if name == "se":
                name = {"fc1": "se.conv_reduce", "fc2": "se.conv_expand"}.get(match["part"], name)
            elif match["part"] == "1":
                name = f"bn{index + 1 - layers[:index].count('se')}"  # behind each convolution, counted from 1
            stage = int(match["stage"]) - 1
            key = f"{match['before']}blocks.{stage}.{match['block'].rpartition('.')[2]}.{name}.{match['rest']}"
        named[key] = value
    return named


def _staged_blocks(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The blocks of efficientnet_pytorch, by the names that their layers have here.

    They are numbered through all stages. In each published size every stage has another number of channels than the one
    before it, which is where it begins.
    """
    matches = {key: EFFICIENTNET_PYTORCH_BLOCK.fullmatch(key) for key in state}
    of_blocks = [(int(found["block"]), found["layer"], key) for key, found in matches.items() if found]
    expanded = {block for block, layer, _ in of_blocks if layer == "_expand_conv"}
    widths = {block: len(state[key]) for block, layer, key in of_blocks if layer == "_project_conv"}
    places: dict[int, tuple[int, int]] = {}
    stage, index, before = -1, 0, -1
    for block, width in sorted(widths.items()):
        stage, index = (stage, index + 1) if width == before else (stage + 1, 0)
        places[block], before = (stage, index), width
    named = {}
    for key, value in state.items():
        match = matches[key]
        if match and (block := int(match["block"])) in places:
            own = {} if block in expanded else EFFICIENTNET_PYTORCH_SEPARABLE
            layer = (EFFICIENTNET_PYTORCH_LAYERS | own).get(match["layer"], match["layer"])
            stage, index = places[block]
            key = f"{match['before']}blocks.{stage}.{index}.{layer}.{match['rest']}"
        named[key] = value
    return named
