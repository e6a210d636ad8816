"""What other programs call the tensors that have a name here: timm's for encoders, our own for all else."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from zoo.weights import vit_layouts
from zoo.weights.vit_layouts import renamed

# The releases of He et al. 2022: an encoder by timm's names, and decoder_blocks.0.norm1.weight and so on beside it.
MAE_RELEASE = (
    (r"(^|\.)mask_token$", r"\1decoder.mask_token"),
    (r"(^|\.)decoder_(blocks|embed|norm|pos_embed)\b", r"\1decoder.\2"),
    (r"(^|\.)decoder_pred\b", r"\1decoder.head"),
)
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
# torchvision's RetinaNet and FCOS, but for the towers. In its older files convolutions of the pyramid have no ".0".
TORCHVISION_DETECTOR = (
    (r"(^|\.)backbone\.body\.", r"\1backbone."),
    (r"(^|\.)backbone\.fpn\.inner_blocks\.(\d+)\.(?:0\.)?(\w+)$", r"\1neck.lateral.\2.\3"),
    (r"(^|\.)backbone\.fpn\.layer_blocks\.(\d+)\.(?:0\.)?(\w+)$", r"\1neck.output.\2.\3"),
    (r"(^|\.)backbone\.fpn\.extra_blocks\.", r"\1neck."),
    (r"\bclassification_head\.cls_logits\b", "cls_out"),
    (r"\bregression_head\.bbox_reg\b", "box_out"),
    (r"\bregression_head\.bbox_ctrness\b", "ctr_out"),
)
# A layer of a tower: "4.0.weight" of RetinaNet, "4.weight" of FCOS, and of RetinaNet in older files.
TORCHVISION_TOWER = re.compile(
    r"(?P<before>(?:.*\.)?head\.)(?P<tower>classification|regression)_head\.conv\."
    r"(?P<layer>\d+)\.(?:(?P<part>\d+)\.)?(?P<rest>\w+)"
)
# Rows of its 91 class outputs are numbered as COCO numbers categories. These numbers COCO 2017 does not use.
COCO_UNUSED = (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
# What torchvision's detectors take for granted, as arguments of FPNDetector: without, the same weights detect other
# things. Its "coco" weights of RetinaNet were trained when its frozen BatchNorm had no epsilon, and it sets 0 for them.
CONVENTIONS: dict[str, dict[str, Any]] = {
    "FCOS": {"anchors": "torchvision", "score_threshold": 0.2, "nms_threshold": 0.6, "max_detections": 100},
    "RetinaNet": {"anchors": "torchvision", "score_threshold": 0.05, "nms_threshold": 0.5, "max_detections": 300},
}
WITHOUT_EPSILON = {"freeze_norm": True, "norm_eps": 0.0}


def translate(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """A source's tensors by the names they have here, and what kind of source it is, if that can be told.

    Raises:
        ValueError: If one of the three projections of an attention is missing.
    """
    kinds, state = vit_layouts.translate(state)
    if any("decoder_blocks." in key for key in state):
        state = renamed(state, MAE_RELEASE)
    elif any(TORCHVISION_BLOCK.fullmatch(key) for key in state):
        kinds.append("torchvision")
        state = renamed(_named_blocks(state), TORCHVISION)
    elif any(EFFICIENTNET_PYTORCH_BLOCK.fullmatch(key) for key in state):
        kinds.append("efficientnet_pytorch")
        state = renamed(_staged_blocks(state), EFFICIENTNET_PYTORCH)
    elif any(key.endswith("head.regression_head.bbox_reg.weight") for key in state):
        is_fcos = any(".bbox_ctrness." in key for key in state)
        kinds += ["torchvision", "FCOS" if is_fcos else "RetinaNet"]
        state = renamed(_named_towers(state, is_fcos), TORCHVISION_DETECTOR)
    names = [f".{name}" for name in state]
    if any(".decoder.blocks." in name for name in names):
        kinds.append("MAE, encoder and decoder")
    elif any(".blocks.0.attn." in name for name in names) and not any(".head." in name for name in names):
        kinds.append("encoder alone")
    return ", ".join(kinds), dict(state)


def of_coco(kind: str, state: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """The class outputs of one of torchvision's detectors for the classes that COCO uses, where this makes them fit.

    Args:
        kind, state: Of :func:`translate`.
        rows: How many outputs the module has.

    Returns:
        What replaces tensors of ``state``: nothing, unless the source has 91 classes and the module 80.
    """
    boxes = next((len(value) for key, value in state.items() if key.endswith("head.box_out.bias")), 0)
    if not kind.startswith("torchvision, ") or not boxes or rows != 80 * boxes // 4:
        return {}
    used = [number for number in range(91) if number not in COCO_UNUSED]
    outputs = {key: value for key, value in state.items() if ".head.cls_out." in f".{key}"}
    return {
        key: value.unflatten(0, (-1, 91))[:, used].flatten(0, 1)
        for key, value in outputs.items()
        if len(value) == 91 * boxes // 4
    }


def conventions(kind: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of FPNDetector with which the weights of a source detect what they did where they come from."""
    detector = kind.removeprefix("torchvision, ")
    needed = dict(CONVENTIONS.get(detector, {}))
    if detector == "RetinaNet" and not any(key.endswith("num_batches_tracked") for key in state):  # frozen BatchNorm
        needed |= WITHOUT_EPSILON
    return needed


def other_detector(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> str:
    """In what a source's FPNDetector was built otherwise than the module, and how to build alike; "" if in nothing."""
    there, here = _built(theirs), _built(ours)
    other = [name for name in here if there and there.get(name, here[name]) != here[name]]
    if not other:
        return ""
    differs = ", ".join(f"{name} is {there[name]} there and {here[name]} here" for name in other)
    if "head" in other and "head_norm" not in other:
        other.append("head_norm")  # whose default depends on the head
    return f"{differs}; build with {', '.join(f'{name}={there[name]!r}' for name in other)}"


def _built(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """How the FPNDetector was built that tensors are of, by its arguments, as far as they show; else nothing."""
    boxes = state.get("head.box_out.weight")
    if boxes is None:
        return {}
    towers = [re.match(r"head\.box_tower\.(\d+)\.", key) for key in state]
    found: dict[str, Any] = {
        "head": "atss" if "head.scales" in state else "fcos" if "head.ctr_out.weight" in state else "retinanet",
        "channels": boxes.shape[1],
        "head_depth": len({layer[1] for layer in towers if layer}),
        "head_norm": "group" if "head.box_tower.0.norm.weight" in state else "none",
    }
    if any(key.startswith("neck.lateral.") for key in state):
        found["neck"] = "single" if "neck.lateral.weight" in state else "fpn"
    extra = sorted((int(key[6:-7]), key) for key in state if re.fullmatch(r"neck\.p\d+\.weight", key))
    if extra:
        found["extra_from"] = "output" if state[extra[0][1]].shape[1] == boxes.shape[1] else "backbone"
    return found


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


def _named_towers(state: Mapping[str, Tensor], is_fcos: bool) -> dict[str, Tensor]:
    """The towers of torchvision's detectors, by the names that their layers have here."""
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        match = TORCHVISION_TOWER.fullmatch(key)
        if match:
            index, part = int(match["layer"]), match["part"]
            if part is None:  # convolution, group norm in FCOS, ReLU: each counts
                index, part = (index // 3, str(index % 3)) if is_fcos else (index // 2, "0")
            tower = {"classification": "cls_tower", "regression": "box_tower"}[match["tower"]]
            key = f"{match['before']}{tower}.{index}.{'conv' if part == '0' else 'norm'}.{match['rest']}"
            if match["part"] == "1" and match["rest"] == "weight":  # of RetinaNet's norm: no bias comes before it
                named[key.replace(".norm.weight", ".conv.bias")] = value.new_zeros(len(value))
        named[key] = value
    return named
