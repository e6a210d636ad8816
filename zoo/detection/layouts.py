"""Names of torchvision's detectors for what FPNDetector has, and what else their files mean to it."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from zoo.weights import Layout
from zoo.weights.layouts import other_arguments
from zoo.weights.names import renamed

CLASSES = "head.cls_out"
"""The layer whose rows depend on the number of classes."""
# Backbone and pyramid of torchvision's detectors. In its older files convolutions of the pyramid have no ".0".
TORCHVISION_PYRAMID = (
    (r"(^|\.)backbone\.body\.", r"\1backbone."),
    (r"(^|\.)backbone\.fpn\.inner_blocks\.(\d+)\.(?:0\.)?(\w+)$", r"\1neck.lateral.\2.\3"),
    (r"(^|\.)backbone\.fpn\.layer_blocks\.(\d+)\.(?:0\.)?(\w+)$", r"\1neck.output.\2.\3"),
    (r"(^|\.)backbone\.fpn\.inner_blocks\.(\d+)\.1\.(\w+)$", r"\1neck.lateral.\2.norm.\3"),
    (r"(^|\.)backbone\.fpn\.layer_blocks\.(\d+)\.1\.(\w+)$", r"\1neck.output.\2.norm.\3"),
    (r"(^|\.)backbone\.fpn\.extra_blocks\.", r"\1neck."),
)
# Its RetinaNet and FCOS, but for the towers.
TORCHVISION_DETECTOR = (
    *TORCHVISION_PYRAMID,
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


class DetectorLayout(Layout):
    """Files of torchvision's RetinaNet and FCOS, and of detectors of ours.

    A detector of another kind is refused; one of other classes is taken but for its outputs by class, which are left as
    they are. Of torchvision's 91 classes a detector of 80 gets the 80 that COCO uses, by category id.
    """

    optional = (CLASSES,)

    def translate(self, state: Mapping[str, Tensor]) -> tuple[list[str], dict[str, Tensor]]:
        if not any(key.endswith("head.regression_head.bbox_reg.weight") for key in state):
            return [], dict(state)
        is_fcos = any(".bbox_ctrness." in key for key in state)
        named = renamed(_named_towers(state, is_fcos), TORCHVISION_DETECTOR)
        return ["torchvision", "FCOS" if is_fcos else "RetinaNet"], named

    def resized(self, kind: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return of_coco(kind, state, len(own[f"{CLASSES}.weight"]))

    def differences(self, theirs: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
        if "rpn.cls_out.weight" in theirs:
            return "is of a two-stage detector: build zoo.FasterRCNN, or start from the backbone alone"
        differs = other_detector(theirs, own)
        return f"is of another detector than this: {differs}, or start from the backbone alone" if differs else ""

    def advice(self, kind: str, state: Mapping[str, Tensor], module: nn.Module, filled: Collection[str]) -> str:
        if f"{CLASSES}.weight" not in filled:
            # Not to fine-tune on other classes, for which thresholds are one's own, and anchors are learned anew.
            return ""
        return as_there(conventions(kind, state), module)


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


def as_there(wanted: Mapping[str, Any], module: Any) -> str:
    """Advice to build a detector with arguments that it does not have; "" if it has them."""
    here = module.hparams
    missing = [f"{name}={value}" for name, value in wanted.items() if name not in here or here[name] != value]
    return f"to detect as there, build with {', '.join(missing)}" if missing else ""


def other_detector(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> str:
    """Arguments that differ between a source's FPNDetector and the module, and how to build alike; "" if none do."""
    return other_arguments(_built(theirs), _built(ours), {"head": "head_norm"})  # whose default depends on the head


def _built(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of the FPNDetector that tensors are of, as far as they show; none for tensors of something else."""
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
