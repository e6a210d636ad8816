"""Features that a detector's head reads: the backbone, its maps, and the neck on them."""

from typing import Any

from torch import nn

from zoo.common.backbones import name_of, recompute_activations
from zoo.detection.base import Detector, batch_norms
from zoo.detection.checks import check_levels
from zoo.detection.layers import NeckNorm
from zoo.detection.maps import Maps, create_pyramid_backbone, freeze_stages
from zoo.detection.necks import Extra, create_neck
from zoo.detection.scale.trident import create_branches


def build_features(
    detector: Detector,
    backbone: str | nn.Module,
    levels: tuple[int, int],
    extra_from: Extra,
    neck_norm: NeckNorm = "none",
) -> None:
    """Gives a detector its ``backbone``, ``maps``, ``trident``, ``neck`` and ``strides``, as its hyperparameters say.

    What is frozen is so afterwards, and the detector in the mode in which Lightning trains.

    Args:
        detector: With ``hparams``.
        backbone: By name, or as a module.
        levels: Finest and coarsest level.
        extra_from, neck_norm: See :class:`zoo.detection.necks.FPN`.

    Raises:
        ValueError: For levels that backbone or neck do not have, and for branches that it cannot have.
    """
    hp: Any = detector.hparams
    check_levels(levels, hp.neck)
    detector.backbone = create_pyramid_backbone(backbone, hp.in_channels, hp.image_size)
    detector.maps = Maps(detector.backbone, levels)
    detector.pruned = detector.maps.pruned
    detector.trident = create_branches(hp, detector.backbone, detector.maps)
    if hp.neck != "fpn" and levels[0] not in detector.maps.levels:
        raise ValueError(f"levels are {list(levels)}: the one map of {name_of(backbone)} is level 4, take [4, 4]")
    detector.neck = create_neck(hp.neck, detector.maps, hp.channels, levels, extra_from, neck_norm)
    detector.strides = detector.maps.pyramid_strides(levels)
    freeze_stages(detector.backbone, hp.frozen_stages)
    settle_norms(detector.backbone, hp)
    detector.train()  # but for what is frozen: Lightning trains in the mode that it finds
    if hp.grad_checkpointing:
        recompute_activations(detector.backbone)


def settle_norms(module: nn.Module, hp: Any) -> None:
    """Gives the BatchNorm of a backbone, or of a part of one, its epsilon, and freezes its weights if asked for."""
    for norm in batch_norms(module):
        if hp.norm_eps is not None:
            norm.eps = hp.norm_eps
        if hp.freeze_norm:
            norm.requires_grad_(False)
