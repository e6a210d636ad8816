"""Towers of an aligner: how they are built, what of them is locked, and what their features have to be."""

from collections.abc import Sequence
from typing import Any

from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from zoo.common.backbones import feature_width


def projection(kind: str, width: int, embed_dim: int, bias: bool, side: str) -> nn.Module:
    """Layer from a tower's features (B, width) to embeddings (B, embed_dim).

    Args:
        kind: "linear"; or "none", for features that are embeddings already.
        width: Of the tower's features.
        embed_dim: Of the embeddings.
        bias: Adds a bias to a linear layer.
        side: "image" or "text", for messages.

    Raises:
        ValueError: For an unknown kind, or widths that differ without a layer between them.
    """
    if kind == "none":
        if width != embed_dim:
            raise ValueError(
                f"{side}_projection is 'none', but the {side} tower gives {width} features and embed_dim is "
                f"{embed_dim}: set embed_dim to {width}, or the projection to 'linear'"
            )
        return nn.Identity()
    if kind != "linear":
        raise ValueError(f"unknown {side}_projection {kind!r}: expected linear or none")
    layer = nn.Linear(width, embed_dim, bias=bias)
    nn.init.normal_(layer.weight, std=width**-0.5)  # as CLIP's
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def pooled(features: Any, tower: nn.Module, count: int, side: str) -> Tensor:
    """Features of a tower, once they are known to be pooled, (count, width).

    Raises:
        ValueError: If they are something else, a map or tokens for example.
    """
    width = feature_width(tower)
    if not isinstance(features, Tensor) or features.shape != (count, width):
        got = str(tuple(features.shape)) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"the {side} tower {type(tower).__name__} returns {got} for {count} {side}s: expected pooled features "
            f"({count}, {width})"
        )
    return features


def layer_groups(tower: Any, side: str) -> list[list[str]]:
    """Names of a tower's parameters in groups that are unlocked together, from its stem to its end.

    They are those of timm's ``group_matcher``, by which learning rates decay as well.

    Raises:
        ValueError: For a tower without them.
    """
    if not callable(getattr(tower, "group_matcher", None)):
        raise ValueError(
            f"the {side} tower {type(tower).__name__} has no group_matcher() as timm's networks do: it can be locked "
            "as a whole, without unlock_groups and unlock_every"
        )
    layers = group_with_matcher(tower.named_parameters(), tower.group_matcher(coarse=False), reverse=True)
    groups: dict[int, list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault(layer, []).append(name)
    return [groups[layer] for layer in sorted(groups)]


def locked_names(tower: nn.Module, unlocked: int, side: str) -> set[str]:
    """Names of the parameters of a tower that do not learn while its last ``unlocked`` groups do."""
    if not unlocked:
        return {name for name, _ in tower.named_parameters()}
    groups = layer_groups(tower, side)
    return {name for group in groups[: max(0, len(groups) - unlocked)] for name in group}


def evaluate_locked(tower: nn.Module, locked: set[str], prefix: str = "") -> None:
    """Puts those parts of a tower that do not learn into evaluation mode, what they normalise and drop as well.

    A part without parameters does what the part behind it does: dropout behind the embedding is locked with the first
    block.
    """
    names = [prefix + name for name, _ in tower.named_parameters()]
    if all(name in locked for name in names):
        tower.eval()
        return
    waiting: list[nn.Module] = []
    for name, part in tower.named_children():
        inner = [f"{prefix}{name}.{each}" for each, _ in part.named_parameters()]
        if not inner:
            waiting.append(part)
            continue
        if all(each in locked for each in inner):
            for each in (*waiting, part):
                each.eval()
        else:
            evaluate_locked(part, locked, f"{prefix}{name}.")
        waiting = []


def check_unlocking(towers: Sequence[tuple[str, nn.Module]], unlock_groups: int, unlock_every: int | None) -> None:
    """Raises ValueError for unlocking without a locked tower, or of more groups than the towers have."""
    if not (unlock_groups or unlock_every):
        return
    if not towers:
        raise ValueError("unlock_groups and unlock_every are for a locked tower: set lock_image or lock_text")
    for side, tower in towers:
        count = len(layer_groups(tower, side))
        if unlock_groups >= count:
            raise ValueError(
                f"unlock_groups is {unlock_groups}, and the {side} tower has {count} groups: expected fewer, or "
                f"lock_{side} False"
            )
