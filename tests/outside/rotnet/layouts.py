"""Names that another program has for a rotation predictor: ``conv1``, ``conv2``, ``conv3``, and ``rotation``."""

from collections.abc import Mapping

from torch import Tensor

from zoo.weights import Layout
from zoo.weights.names import renamed

OTHERS = (*((rf"^conv{i + 1}\.", f"backbone.{2 * i}.") for i in range(3)), (r"^rotation\.", "head."))


class RotationLayout(Layout):
    def translate(self, state: Mapping[str, Tensor]) -> tuple[list[str], dict[str, Tensor]]:
        return (["rotations of others"], renamed(state, OTHERS)) if "rotation.weight" in state else ([], dict(state))
