"""Pooling of regions: what the second stage sees of the maps, for all regions of a batch at once."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

SAMPLES = 2
"""Points along a side of each cell that is pooled, as in torchvision; detectron2 takes as many as the region has."""
COARSEST_POOLED = 5
"""The coarsest level that regions are pooled from; those beyond have proposals alone."""
# A region of this side in pixels is pooled from level 4: an image of ImageNet, and the map of its classifier.
CANONICAL_SIDE, CANONICAL_LEVEL = 224, 4


def pool_regions(
    features: Sequence[Tensor], boxes: Tensor, strides: Sequence[float], resolution: int = 7, aligned: bool = True
) -> Tensor:
    """RoIAlign (He et al. 2017, section 3), of each region on the level of its size.

    All regions are pooled on all levels, those of another level far outside of the map, where there is nothing to be
    read, and added up: shapes are fixed, and nobody waits for a device that counts the regions of a level.

    Args:
        features: Maps (B, C, h, w) of the levels, finest first.
        boxes: (B, R, 4) xyxy in pixels of the images.
        strides: Pixels between the cells of each level.
        resolution: Cells along a side of what is pooled.
        aligned: Whether a pixel's centre is half a pixel from its corner: else maps are read half a cell off.

    Returns:
        (B * R, C, resolution, resolution), in the type of the maps; it is computed in float32.
    """
    images, regions = boxes.shape[:2]
    number = torch.arange(images, device=boxes.device, dtype=torch.float32)[:, None, None].expand(-1, regions, 1)
    levels, dtype = region_levels(boxes, strides), features[0].dtype
    pooled = None
    for level, (each, stride) in enumerate(zip(features, strides, strict=True)):
        placed = boxes.float()
        if len(features) > 1:
            placed = torch.where((levels == level)[..., None], placed, -16.0 * stride)
        rows = torch.cat([number, placed], -1).flatten(0, 1)
        part = roi_align(each.float(), rows, resolution, 1 / stride, SAMPLES, aligned)
        pooled = part if pooled is None else pooled + part
    assert pooled is not None
    return pooled.to(dtype)


def region_levels(boxes: Tensor, strides: Sequence[float]) -> Tensor:
    """Number, from 0, of the level of each region (Lin et al. 2017, "Feature Pyramid Networks", equation 1).

    Args:
        boxes: (B, R, 4) xyxy in pixels.
        strides: Of the levels, finest first.
    """
    width, height = (boxes[..., 2:] - boxes[..., :2]).float().unbind(-1)
    octave = ((width * height).sqrt() / CANONICAL_SIDE).log2()
    finest = round(math.log2(strides[0]))
    level = (CANONICAL_LEVEL + octave + 1e-6).floor() - finest  # a region just as large as a bound is the coarser's
    return level.clamp(0, len(strides) - 1).long()
