"""Towers of an aligner: how they are built, what their features have to be, and what of them is locked.

A locked tower is frozen and in evaluation mode, as that of LiT (Zhai et al. 2022, "Zero-Shot Transfer with Locked-image
text Tuning"): statistics of BatchNorm would otherwise move on, and dropout would blur what is to be learned from.
"""

from collections.abc import Iterator
from typing import Any, Self

import torch
import torch.nn.functional as F
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from zoo.alignment.text import TextTransformer
from zoo.common.backbones import feature_width
from zoo.common.tokenizers import FitsTokenizer, Tokenizer, check_special


def create_text_tower(given: str | nn.Module | None, tokenizer: Tokenizer, hparams: Any) -> nn.Module:
    """The text tower that was given; or a :class:`zoo.alignment.text.TextTransformer` by the ``text_`` arguments.

    Raises:
        ValueError: For a module that does not state its width; for a tokeniser that lacks a token which the pooling
            needs; for sizes that the transformer does not take.
    """
    if isinstance(given, str):
        raise ValueError(f"unknown text_backbone {given!r}: expected a module, or None for a text transformer")
    if given is not None:
        feature_width(given)
        if isinstance(given, FitsTokenizer):
            given.fit_tokenizer(tokenizer, hparams.context_length)
        return given
    check_special(tokenizer, hparams.text_pool, hparams.text_mask_padding)
    return TextTransformer(
        tokenizer.vocab_size,
        width=hparams.text_width,
        depth=hparams.text_depth,
        heads=hparams.text_heads,
        context_length=hparams.context_length,
        pool=hparams.text_pool,
        causal=hparams.text_causal,
        mask_padding=hparams.text_mask_padding,
        act="gelu" if hparams.text_act is None else hparams.text_act,
        mlp_width=hparams.text_mlp_width,
        norm_eps=1e-5 if hparams.text_norm_eps is None else hparams.text_norm_eps,
        dropout=hparams.text_dropout,
        pad_id=tokenizer.pad_id or 0,
        end_id=tokenizer.end_id,
    )


def create_projection(side: str, kind: str, tower: nn.Module, embed_dim: int, bias: bool) -> nn.Module:
    """Layer from a tower's features to embeddings (B, embed_dim), with CLIP's initial weights.

    Args:
        side: "image" or "text", for messages.
        kind: "linear"; or "none", for features that are embeddings already.
        tower: Whose features.
        embed_dim: Of the embeddings.
        bias: Adds a bias to a linear layer.

    Raises:
        ValueError: For widths that differ without a layer between them.
    """
    width = feature_width(tower)
    if kind == "none":
        if width != embed_dim:
            raise ValueError(
                f"{side}_projection is 'none', but the {side} tower gives {width} features and embed_dim is "
                f"{embed_dim}: set embed_dim to {width}, or the projection to 'linear'"
            )
        return nn.Identity()
    layer = nn.Linear(width, embed_dim, bias=bias)
    nn.init.normal_(layer.weight, std=width**-0.5)
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


def unit(vectors: Tensor) -> Tensor:
    """Vectors (N, D) divided by their length, in float32 at least."""
    return F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)


class LocksTowers(nn.Module):
    """Locks towers, whole or but for their last groups: ``class Net(LocksTowers, LightningModule)``.

    Its ``hparams`` have ``lock_image`` and ``lock_text`` for the parts ``backbone`` and ``text``, ``unlock_groups`` and
    ``unlock_every``; its constructor calls :meth:`lock` at the end.

    Where groups are unlocked as the run goes on, those that wait are not frozen: their gradients are computed and
    thrown away. Processes agree on gradients of the same parameters from the first step to the last, as
    DistributedDataParallel needs it, and the optimizer knows them all.
    """

    backbone: Any
    text: Any
    hparams: Any
    current_epoch: Any
    unlocked = 0
    """Number of the last groups of a locked tower that learn now."""

    def lock(self) -> None:
        """Freezes what never learns.

        Raises:
            ValueError: For unlocking without a locked tower, or of more groups than the towers have.
        """
        hp = self.hparams
        self.unlocked = hp.unlock_groups
        if (hp.unlock_groups or hp.unlock_every) and not (hp.lock_image or hp.lock_text):
            raise ValueError("unlock_groups and unlock_every are for a locked tower: set lock_image or lock_text")
        for side, tower in self._locked_towers():
            count = len(layer_groups(tower, side)) if hp.unlock_groups or hp.unlock_every else 1
            if hp.unlock_groups >= count:
                raise ValueError(
                    f"unlock_groups is {hp.unlock_groups}, and the {side} tower has {count} groups: expected fewer, or "
                    f"lock_{side} false"
                )
        if not hp.unlock_every:
            for parameter in self.locked_parameters():
                parameter.requires_grad_(False)
        self.train(self.training)

    def locked_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of locked towers that do not learn now."""
        for side, tower in self._locked_towers():
            names = self._locked_names(side, tower)
            yield from (parameter for name, parameter in tower.named_parameters() if name in names)

    def waiting(self) -> dict[str, int]:
        """Numbers of the groups that are unlocked as the run goes on, from the end, by their parameters' names."""
        return {
            f"{'text' if tower is self.text else 'backbone'}.{name}": number
            for side, tower in self._locked_towers()
            if self.hparams.unlock_every
            for number, group in enumerate(reversed(layer_groups(tower, side)), 1)
            for name in group
        }

    def train(self, mode: bool = True) -> Self:
        """Sets the mode; what is locked stays in evaluation mode."""
        super().train(mode)
        for side, tower in self._locked_towers():
            evaluate_locked(tower, self._locked_names(side, tower))
        return self

    def on_train_start(self) -> None:
        """Unlocks what is due in an epoch that a run goes on within, of which Lightning tells no start."""
        super().on_train_start()  # type: ignore[misc]  # of the LightningModule beside this
        self.on_train_epoch_start()

    def on_train_epoch_start(self) -> None:
        """Unlocks the group that is due."""
        hp = self.hparams
        due = hp.unlock_groups + (self.current_epoch // hp.unlock_every if hp.unlock_every else 0)
        if due != self.unlocked:
            self.unlocked = due
            self.train(self.training)

    def on_after_backward(self) -> None:
        """Throws the gradients of groups that wait away, before they are clipped or used."""
        if self.hparams.unlock_every:
            for parameter in self.locked_parameters():
                parameter.grad = None

    def _locked_names(self, side: str, tower: nn.Module) -> set[str]:
        known = self.__dict__.setdefault("_known_names", {})  # each step asks, and patterns take a while
        if (side, self.unlocked) not in known:
            known[side, self.unlocked] = locked_names(tower, self.unlocked, side)
        return known[side, self.unlocked]

    def _locked_towers(self) -> Iterator[tuple[str, nn.Module]]:
        if self.hparams.lock_image:
            yield "image", self.backbone
        if self.hparams.lock_text:
            yield "text", self.text


def layer_groups(tower: Any, side: str) -> list[list[str]]:
    """Names of a tower's parameters in groups that are unlocked together, by timm's ``group_matcher``, the stem first.

    Raises:
        ValueError: For a tower without it.
    """
    if not callable(getattr(tower, "group_matcher", None)):
        raise ValueError(
            f"the {side} tower {type(tower).__name__} has no group_matcher() as timm's networks do: it is locked as a "
            "whole, without unlock_groups and unlock_every"
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


def evaluate_locked(module: nn.Module, locked: set[str], prefix: str = "") -> None:
    """Puts those parts of a module whose parameters are locked into evaluation mode.

    A part without parameters, as dropout, goes with the part behind it: embeddings are dropped as the first block is.

    Args:
        module: The tower, or a part of it.
        locked: Names of parameters within the tower.
        prefix: What the names of the module's parameters begin with there.
    """
    if locked.issuperset(prefix + name for name, _ in module.named_parameters()):
        module.eval()
        return
    bare: list[nn.Module] = []
    for name, part in module.named_children():
        bare.append(part)
        if next(part.parameters(), None) is None:
            continue
        if locked.issuperset(f"{prefix}{name}.{inner}" for inner, _ in part.named_parameters()):
            for each in bare:
                each.eval()
        else:
            evaluate_locked(part, locked, f"{prefix}{name}.")
        bare = []
