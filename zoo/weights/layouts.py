"""Names of other programs for tensors that have a name here: timm's for encoders, a technique's own for all else."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from zoo.common.activations import activation
from zoo.common.norms import layer_norm_eps, set_layer_norm_eps
from zoo.common.protocols import ForeignWeights, KeepsArguments, SetsLayerNorm
from zoo.weights import clip_layouts, efficientnet_layouts, vit_layouts
from zoo.weights.names import HEADS
from zoo.weights.stated import Stated, encoder_of


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

    def settle(self, kind: str, stated: Stated, module: nn.Module) -> list[str]:
        """Gives the module what its arguments leave to the weights, of what their source says beside tensors.

        It comes before the first tensor is written, and changes nothing where it raises.

        Args:
            kind: As above.
            stated: By the source.
            module: To fill.

        Returns:
            Notes on what was set, or would have to be.

        Raises:
            ValueError: With a reason to refuse the file, as the end of a sentence about it.
        """
        notes = _settle_eps(module, stated.norm_eps)
        if stated.activation not in (None, activation(encoder_of(module)) or "gelu"):
            notes.append(f"activations are {stated.activation} there: build the network alike")
        return notes

    def said(self, module: Any) -> dict[str, Any]:
        """Arguments of a module that its tensors do not show, for :func:`zoo.weights.save` to write beside them.

        :meth:`settle` reads them, out of ``stated.config``.
        """
        return {}

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


def other_arguments(there: Mapping[str, Any], here: Mapping[str, Any], along: Mapping[str, str]) -> str:
    """Arguments that differ between two modules, and how to build the second like the first; "" if none do.

    Args:
        there, here: Arguments of each, as far as its tensors show them.
        along: An argument that has to be named where another one differs, by that one's name.
    """
    other = [name for name in here if there and there.get(name, here[name]) != here[name]]
    if not other:
        return ""
    differs = ", ".join(f"{name} is {there[name]} there and {here[name]} here" for name in other)
    other += [name for cause, name in along.items() if cause in other and name not in other]
    return f"{differs}; build with {', '.join(f'{name}={there[name]!r}' for name in other)}"


def _settle_eps(module: Any, eps: float | None) -> list[str]:
    """Gives LayerNorms the epsilon that the weights were trained with, where the module leaves it to them.

    Returns:
        What to say of it: nothing, if it was the same.
    """
    here = layer_norm_eps(encoder_of(module))
    if eps is None or here is None or here == eps:
        return []
    if isinstance(module, KeepsArguments):
        if not isinstance(module, SetsLayerNorm):
            return [f"LayerNorm's epsilon was {eps:g} there and is {here:g} here"]
        if module.hparams.get("norm_eps") is not None:
            return [f"to compute as there, build with norm_eps={eps:g}"]
        module.hparams["norm_eps"] = eps  # a checkpoint remembers it
    set_layer_norm_eps(module, eps)
    return [f"norm_eps {eps:g}, as there"]
