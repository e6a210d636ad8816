"""Names of other programs for tensors that have a name here: timm's for encoders, a technique's own for all else."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from zoo.common.protocols import ForeignWeights
from zoo.weights import clip_layouts, efficientnet_layouts, vit_layouts
from zoo.weights.names import HEADS


class Layout:
    """Files of weights, as a technique knows them: a module's ``foreign_weights``, made in its ``layouts.py``.

    Names of encoders are known without, to whatever module has them as its ``backbone``. This one knows no more, and
    serves modules that say nothing.

    Attributes:
        optional: Parts besides the encoder that may be of another size in a file, or not there, and then stay as they
            are. All others are taken whole or refused.
    """

    optional: tuple[str, ...] = HEADS

    def translate(self, state: Mapping[str, Tensor]) -> tuple[list[str], dict[str, Tensor]]:
        """Tensors by the module's names, as far as they are known, and where they come from, if that can be told.

        Args:
            state: The source's, whose encoder has timm's names already.
        """
        return [], dict(state)

    def resized(self, kind: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that take the place of the source's, so that they fit.

        Args:
            kind: Where it comes from, as :func:`translate` tells.
            state: Translated.
            own: The module's tensors.
        """
        return {}

    def differences(self, theirs: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
        """Reason to refuse a file whose encoder fits, as the end of a sentence about it; "" for none."""
        return ""

    def advice(self, kind: str, state: Mapping[str, Tensor], module: nn.Module, filled: Collection[str]) -> str:
        """Advice on another way to build the module, by which weights do what they did at their source; "" if alike.

        Args:
            kind, state: As above.
            module: To which they went.
            filled: Names in it of what it has got.
        """
        return ""


def layout_of(module: Any) -> Layout:
    """The layout that a module states, or else the one of encoders alone."""
    return module.foreign_weights if isinstance(module, ForeignWeights) else Layout()


def translate(state: Mapping[str, Tensor], layout: Layout | None = None) -> tuple[str, dict[str, Tensor]]:
    """A source's tensors by the names they have here, and what kind of source it is, if that can be told.

    Args:
        state: By the names that they have there.
        layout: The module's. None: encoders alone are known.

    Raises:
        ValueError: If one of the three projections of an attention is missing.
    """
    kinds: list[str] = []
    for known in (vit_layouts, efficientnet_layouts, clip_layouts, layout or Layout()):
        found, state = known.translate(state)
        kinds += found
    names = [f".{name}" for name in state]
    if any(".decoder.blocks." in name or ".decoder_blocks." in name for name in names):
        kinds.append("encoder and decoder")
    elif any(".blocks.0.attn." in name for name in names) and not any(
        ".head." in name or name.endswith(".logit_scale")
        for name in names  # a classifier, or a text tower beside it
    ):
        kinds.append("encoder alone")
    return ", ".join(kinds), dict(state)
