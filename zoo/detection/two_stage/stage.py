"""Box head of a single map: the last stage of the backbone, on pooled regions."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.detection.maps import create_pyramid_backbone

POOL_SIZE = 14
"""Cells of a side of a pooled region."""


class StageBoxHead(nn.Module):
    """The last stage of a backbone as box head on the map of stride 16, which detectors call C4.

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition", arXiv 1512.03385, appendix A. Regions are
    pooled to 14x14 cells, of which the stage's stride makes 7x7, as in detectron2; in SimpleDet, TridentNet's program,
    they are pooled to 7x7, and the stage has no stride.

    Args:
        place: Its name in the backbone.
        stage: Of :func:`last_stage`.
        out_channels: D, the channels of what it gives.
    """

    pool_size = POOL_SIZE

    def __init__(self, place: str, stage: nn.Module, out_channels: int) -> None:
        super().__init__()
        self.place, self.stage, self.out_channels = place, stage, out_channels

    def forward(self, regions: Tensor) -> Tensor:
        """Features (n, D) of pooled regions (n, C, 14, 14)."""
        return self.stage(regions).mean((2, 3))


def backbone_and_stage(backbone: str | nn.Module, hp: Any, levels: Sequence[int]) -> tuple[Any, StageBoxHead]:
    """A detector's backbone, and its last stage as box head, which is there until maps are selected.

    Args:
        backbone: By name, or as a module.
        hp: The detector's hyperparameters.
        levels: Finest and coarsest.

    Raises:
        ValueError: For a neck or levels that do not end at the map of stride 16; and as :func:`last_stage`.
    """
    if hp.neck != "none" or tuple(levels) != (4, 4):
        raise ValueError(
            f"box_head 'stage' goes on from the backbone's map of stride 16, and neck is {hp.neck!r}, levels are "
            f"{list(levels)}: take neck='none' and levels [4, 4], or box_head='mlp'"
        )
    network = create_pyramid_backbone(backbone, hp.in_channels, hp.image_size)
    return network, StageBoxHead(*last_stage(network))


def last_stage(backbone: Any) -> tuple[str, nn.Module, int]:
    """The stage of a timm network that makes its map of stride 32 out of that of stride 16, still in its place.

    Returns:
        Its name in the network, the stage, and the channels of what it gives.

    Raises:
        ValueError: For a network in which no such stage stands by itself: it is of several modules, reads more than
            the map of stride 16, or takes maps of one size or with channels last.
    """
    info = getattr(backbone, "feature_info", None)
    of_stride = {entry["reduction"]: entry for entry in info or () if isinstance(entry, dict)}
    try:
        fine, coarse = of_stride[16], of_stride[32]
        stage = backbone.get_submodule(coarse["module"])
        found = _on_regions(stage, fine["num_chs"])
        if found != (1, coarse["num_chs"], POOL_SIZE // 2, POOL_SIZE // 2):
            raise RuntimeError(found)
    except Exception as error:  # what a stage raises that expects something else is its own
        raise ValueError(
            f"{type(backbone).__name__} has no stage for box_head 'stage': expected one module that makes the map of "
            "stride 32 out of that of stride 16, as in resnet50; or take box_head 'mlp'"
        ) from error
    return coarse["module"], stage, coarse["num_chs"]


def _on_regions(stage: nn.Module, channels: int) -> tuple[int, ...]:
    """Shape of what a stage makes of one pooled region, tried out without memory."""
    if next(stage.parameters(), None) is None:  # a pooling layer
        return ()
    trial = copy.deepcopy(stage).to("meta").eval()
    with torch.no_grad():
        return tuple(trial(torch.zeros(1, channels, POOL_SIZE, POOL_SIZE, device="meta")).shape)
