"""Names of torchvision's Faster R-CNN for what FasterRCNN has, and what else its files mean to it."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from zoo.detection.layouts import COCO_UNUSED, TORCHVISION_PYRAMID, WITHOUT_EPSILON, as_there
from zoo.weights import Layout
from zoo.weights.layouts import other_arguments
from zoo.weights.names import renamed, unwrapped

CLASSES, BOXES = "cls_out", "box_out"
"""The layers whose rows depend on the number of classes."""
STAGE = "box_head.stage"
"""The last stage of the backbone, where it is the box head."""
# In older files of torchvision's the convolution of the proposals has no ".0.0"; further ones count from 1 there.
TORCHVISION_TWO_STAGE = (
    *TORCHVISION_PYRAMID,
    (r"(^|\.)rpn\.head\.conv\.(?:0\.0\.)?(\w+)$", r"\1rpn.conv.\2"),
    *((rf"(^|\.)rpn\.head\.conv\.{n - 1}\.0\.", rf"\1rpn.conv{n}.") for n in range(2, 10)),
    (r"(^|\.)rpn\.head\.cls_logits\.", r"\1rpn.cls_out."),
    (r"(^|\.)rpn\.head\.bbox_pred\.", r"\1rpn.box_out."),
    (r"(^|\.)roi_heads\.box_head\.fc6\.", r"\1box_head.fc1."),
    (r"(^|\.)roi_heads\.box_head\.fc7\.", r"\1box_head.fc2."),
    # Of the second version's box head: convolutions, norms, and behind four of them a layer that flattens.
    (r"(^|\.)roi_heads\.box_head\.(\d+)\.0\.weight$", r"\1box_head.conv.\2.weight"),
    (r"(^|\.)roi_heads\.box_head\.(\d+)\.1\.(\w+)$", r"\1box_head.conv.\2.norm.\3"),
    (r"(^|\.)roi_heads\.box_head\.5\.(\w+)$", r"\1box_head.fc1.\2"),
    (r"(^|\.)roi_heads\.box_predictor\.cls_score\.", rf"\1{CLASSES}."),
    (r"(^|\.)roi_heads\.box_predictor\.bbox_pred\.", rf"\1{BOXES}."),
)
# Other detectors of torchvision's that have no counterpart here, by a tensor that only they have.
OTHERS = {
    r"(^|\.)backbone\.body\.0\.0\.weight$": "Faster R-CNN on MobileNetV3, with maps and anchors of its own",
}
# What torchvision's takes for granted, as arguments of FasterRCNN: without, the same weights detect other things.
CONVENTIONS: dict[str, Any] = {
    "anchors": "torchvision",
    "score_threshold": 0.05,
    "nms_threshold": 0.5,
    "max_detections": 100,
    "pre_nms_top_k": (2000, 1000),
    "post_nms_top_k": (2000, 1000),
    "proposal_nms": 0.7,
}


class TwoStageLayout(Layout):
    """Files of torchvision's Faster R-CNN, and of two-stage detectors of ours.

    A detector of another kind is refused; one of other classes is taken but for its outputs by class, which are left as
    they are. Class 0 of torchvision's is background, which is the last one here. Of its 90 others a detector of 80 gets
    those that COCO uses, by category id.

    Args:
        stage: Name in the backbone of the stage that is the box head. None: it is another one.
    """

    optional = (CLASSES, BOXES)

    def __init__(self, stage: str | None = None) -> None:
        self.stage = None if stage is None else unwrapped(stage)  # as names in files are, too

    def translate(self, state: Mapping[str, Tensor]) -> tuple[list[str], dict[str, Tensor]]:
        kinds, named = [], dict(state)
        if any(re.search(r"(^|\.)roi_heads\.box_predictor\.", key) for key in state):
            for pattern, what in OTHERS.items():
                if any(re.search(pattern, key) for key in state):
                    raise ValueError(f"torchvision's {what}, is not built here: take fasterrcnn_resnet50_fpn's weights")
            kinds = ["torchvision", "Faster R-CNN"]
            named = {key: _background_last(key, value) for key, value in renamed(state, TORCHVISION_TWO_STAGE).items()}
        if self.stage is not None:
            named = {self._in_box_head(key): value for key, value in named.items()}
        return kinds, named

    def _in_box_head(self, key: str) -> str:
        """The name of a tensor of the backbone's last stage in the box head; of all others their own."""
        name = unwrapped(key)
        return f"{STAGE}{name.removeprefix(str(self.stage))}" if name.startswith(f"{self.stage}.") else key

    def resized(self, kind: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not kind.startswith("torchvision, ") or len(own[f"{CLASSES}.bias"]) != 80 + 1:
            return {}
        used = [number - 1 for number in range(1, 91) if number not in COCO_UNUSED]
        found: dict[str, Tensor] = {}
        for key, value in state.items():
            layer = unwrapped(key).rpartition(".")[0]
            if layer == CLASSES and len(value) == 90 + 1:
                found[key] = value[[*used, 90]]
            elif layer == BOXES and len(value) == 90 * 4:
                found[key] = value.unflatten(0, (90, 4))[used].flatten(0, 1)
        return found

    def differences(self, theirs: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
        if "head.box_out.weight" in theirs:
            return "is of a dense detector: build zoo.FPNDetector, or start from the backbone alone"
        if differs := other_arguments(_built(theirs), _built(own), {}):
            return f"is of another detector than this: {differs}, or start from the backbone alone"
        if self.stage is not None and not any(key.startswith(f"{STAGE}.") for key in theirs):
            return f"lacks {self.stage}, the stage of the backbone that is the box head: take weights that have it"
        return ""

    def advice(self, kind: str, state: Mapping[str, Tensor], module: nn.Module, filled: Collection[str]) -> str:
        if not kind.startswith("torchvision, ") or f"{CLASSES}.weight" not in filled:
            return ""
        frozen = not any(re.search(r"(^|\.)backbone\..*\.num_batches_tracked$", key) for key in state)
        return as_there(CONVENTIONS | (WITHOUT_EPSILON if frozen else {}), module)


def _background_last(key: str, value: Tensor) -> Tensor:
    """Rows by class of torchvision's, whose first class is background, in our order; it has no box here."""
    layer = unwrapped(key).rpartition(".")[0]
    return value.roll(-1, 0) if layer == CLASSES else value[4:] if layer == BOXES else value


def _built(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of the FasterRCNN that tensors are of, as far as they show; none for tensors of something else."""
    if "rpn.box_out.weight" not in state:
        return {}
    lateral = any(key.startswith("neck.lateral.") for key in state)
    found: dict[str, Any] = {
        "neck": ("single" if "neck.lateral.weight" in state else "fpn") if lateral else "none",
        "neck_norm": "batch" if "neck.lateral.0.norm.weight" in state else "none",
        "channels": state["rpn.box_out.weight"].shape[1],
        "rpn_depth": sum(re.fullmatch(r"rpn\.conv\d*\.weight", key) is not None for key in state),
        "box_head": "stage" if any(key.startswith(f"{STAGE}.") for key in state) else "mlp",
    }
    if "box_head.conv.0.weight" in state:
        found["box_head"] = "conv"
    if f"{CLASSES}.bias" in state and f"{BOXES}.bias" in state and len(state[f"{CLASSES}.bias"]) > 2:
        found["class_agnostic"] = len(state[f"{BOXES}.bias"]) == 4
    return found
