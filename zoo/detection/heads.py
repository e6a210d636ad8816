"""Head: the layers that predict classes, boxes and centerness on every level of a pyramid."""

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DenseMaps(NamedTuple):
    """Raw predictions of :meth:`zoo.FPNDetector.forward` for N anchors, all levels, finest first.

    Attributes:
        logits: (B, N, K).
        boxes: (B, N, 4), coded as the head does.
        centerness: (B, N) logits, or None.
        shapes: (rows, columns) of each level's map.
        image_size: (H, W) of the images.
        branches: Numbers of TridentNet's branches that the batch is of, the images of one behind those of another;
            one without.
    """

    logits: Tensor
    boxes: Tensor
    centerness: Tensor | None
    shapes: tuple[tuple[int, int], ...]
    image_size: tuple[int, int]
    branches: tuple[int, ...] = (0,)


class ConvNormAct(nn.Module):
    """A 3x3 convolution, group norm or none, ReLU.

    At most 32 groups, as many as divide the channels into equal ones of at least two: of one channel alone, nothing
    would be left where a map has a single cell.
    """

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        groups = math.gcd(32, channels // 2) if channels % 2 == 0 else 1
        self.norm = nn.GroupNorm(groups, channels) if norm == "group" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)), inplace=True)


class DenseHead(nn.Module):
    """Two towers of convolutions, shared by all levels, and predictions for each anchor of each cell.

    Initial values are RetinaNet's (Lin et al. 2017, section 4.1): normal with deviation 0.01, and a bias by which
    everything has a probability of 0.01.

    Args:
        channels: Of the maps, and of the towers.
        num_classes: K.
        anchors: Anchors a cell, A.
        depth: Convolutions of each tower.
        norm: "group" or "none".
        centerness: Whether to predict one, on the tower of the boxes.
        positive_boxes: Whether boxes are coded as distances, which pass a ReLU.
        levels: For how many levels the boxes have a factor each that is learned (ATSS, FCOS's first version); or 0.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        anchors: int,
        depth: int,
        norm: str,
        centerness: bool,
        positive_boxes: bool,
        levels: int = 0,
    ) -> None:
        super().__init__()
        self.num_classes, self.positive_boxes = num_classes, positive_boxes
        self.cls_tower = nn.Sequential(*(ConvNormAct(channels, norm) for _ in range(depth)))
        self.box_tower = nn.Sequential(*(ConvNormAct(channels, norm) for _ in range(depth)))
        self.cls_out = nn.Conv2d(channels, anchors * num_classes, 3, padding=1)
        self.box_out = nn.Conv2d(channels, anchors * 4, 3, padding=1)
        self.ctr_out = nn.Conv2d(channels, anchors, 3, padding=1) if centerness else None
        self.scales = nn.Parameter(torch.ones(levels)) if levels else None
        rare = -math.log((1 - 0.01) / 0.01)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.constant_(cast(Tensor, module.bias), rare if module is self.cls_out else 0.0)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits (B, N, K), boxes (B, N, 4) and centerness (B, N) of all anchors of all levels, finest first."""
        logits, boxes, centerness = [], [], []
        for level, features in enumerate(maps):
            logits.append(by_anchor(self.cls_out(self.cls_tower(features)), self.num_classes))
            tower = self.box_tower(features)
            box = self.box_out(tower)
            box = box if self.scales is None else box * self.scales[level]
            boxes.append(by_anchor(box.relu() if self.positive_boxes else box, 4))
            if self.ctr_out is not None:
                centerness.append(by_anchor(self.ctr_out(tower), 1).squeeze(2))
        return torch.cat(logits, 1), torch.cat(boxes, 1), torch.cat(centerness, 1) if centerness else None


def by_anchor(output: Tensor, width: int) -> Tensor:
    """View of a map (B, A * width, h, w) by anchor, (B, h * w * A, width); a copy unless memory is channels last."""
    return output.permute(0, 2, 3, 1).reshape(output.shape[0], -1, width)  # len() would fix the batch for an export
