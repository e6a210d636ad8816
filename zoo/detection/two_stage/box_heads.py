"""Box heads: features of pooled regions, out of which their classes and boxes are predicted."""

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.detection.cells import decode_deltas
from zoo.detection.features import settle_norms
from zoo.detection.layers import NormedConv
from zoo.detection.postprocessing import Candidates
from zoo.detection.two_stage.losses import REGION_WEIGHTS
from zoo.detection.two_stage.proposals import RATIOS, ProposalHead, Proposals
from zoo.detection.two_stage.stage import StageBoxHead

BoxHead = Literal["mlp", "conv", "stage"]
CONVOLUTIONS = 4
"""Of the box head "conv"."""


def build_heads(detector: Any, stage: StageBoxHead | None) -> None:
    """Gives a two-stage detector its ``rpn``, ``box_head``, ``cls_out`` and ``box_out``, as its hyperparameters say.

    Args:
        detector: With ``hparams``, ``maps`` and ``sides``, those of its anchors.
        stage: The last stage of its backbone as box head. None: another one.
    """
    hp = detector.hparams
    in_maps = detector.maps.channels[0] if hp.neck == "none" else hp.channels
    detector.rpn = ProposalHead(in_maps, hp.channels, RATIOS * len(detector.sides[0]), hp.rpn_depth)
    if stage is not None:
        detector.box_head = stage
        settle_norms(stage, hp)
    elif hp.box_head == "conv":
        detector.box_head = ConvBoxHead(in_maps, hp.channels, hp.head_width)
    else:
        detector.box_head = MLPBoxHead(in_maps, hp.head_width)
    width = detector.box_head.out_channels
    detector.cls_out, detector.box_out = create_predictors(width, hp.num_classes, hp.class_agnostic)


class MLPBoxHead(nn.Module):
    """Two fully connected layers on pooled regions (Lin et al. 2017, "Feature Pyramid Networks", section 4.2).

    Args:
        channels: Of the maps.
        width: Of the layers.

    Attributes:
        pool_size: Cells along a side of a pooled region that it takes.
        out_channels: Of its features.
    """

    pool_size = 7

    def __init__(self, channels: int, width: int = 1024) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels * self.pool_size**2, width), nn.Linear(width, width)
        self.out_channels = width
        for layer in (self.fc1, self.fc2):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)

    def forward(self, regions: Tensor) -> Tensor:
        """Features (n, out_channels) of pooled regions (n, channels, pool_size, pool_size)."""
        return F.relu(self.fc2(F.relu(self.fc1(regions.flatten(1)))))


class ConvBoxHead(nn.Module):
    """Four 3x3 convolutions with BatchNorm and a fully connected layer on pooled regions.

    Source: the box head "4conv1fc" of Wu and He 2018, "Group Normalization", section 4.2, with the norm that it has in
    torchvision's second Faster R-CNN. In training a norm's statistics are of all places for regions of a batch, also
    of those that are left where an image has fewer regions than it learns from.

    Args:
        in_channels: Of the maps.
        channels: Of the convolutions.
        width: Of the fully connected layer.

    Attributes:
        pool_size: Cells along a side of a pooled region that it takes.
        out_channels: Of its features.
    """

    pool_size = 7

    def __init__(self, in_channels: int, channels: int, width: int = 1024) -> None:
        super().__init__()
        widths = (in_channels, *[channels] * (CONVOLUTIONS - 1))
        self.conv = nn.ModuleList(NormedConv(each, channels, 3, "batch") for each in widths)
        self.fc1, self.out_channels = nn.Linear(channels * self.pool_size**2, width), width
        for conv in self.conv:
            nn.init.kaiming_normal_(cast(Tensor, conv.weight), mode="fan_out", nonlinearity="relu")
        nn.init.kaiming_uniform_(self.fc1.weight, a=1)
        nn.init.zeros_(self.fc1.bias)

    def forward(self, regions: Tensor) -> Tensor:
        """Features (n, out_channels) of pooled regions (n, in_channels, pool_size, pool_size)."""
        for conv in self.conv:
            regions = F.relu(conv(regions), inplace=True)
        return F.relu(self.fc1(regions.flatten(1)))


def create_predictors(width: int, num_classes: int, class_agnostic: bool) -> tuple[nn.Linear, nn.Linear]:
    """Layers that predict classes, background last, and boxes (Girshick 2015, "Fast R-CNN", section 3.1)."""
    cls_out, box_out = nn.Linear(width, num_classes + 1), nn.Linear(width, 4 if class_agnostic else 4 * num_classes)
    for layer, deviation in ((cls_out, 0.01), (box_out, 0.001)):
        nn.init.normal_(layer.weight, std=deviation)
        nn.init.zeros_(layer.bias)
    return cls_out, box_out


def region_candidates(proposals: Proposals, logits: Tensor, deltas: Tensor) -> Candidates:
    """Boxes and scores of each proposal and class, in float32; those of no proposal have a score of 0.

    Args:
        proposals: R of each image.
        logits: (B, R, K + 1), background last.
        deltas: (B, R, K * 4), or (B, R, 4) for all classes.
    """
    with torch.autocast(deltas.device.type, enabled=False):
        scores = logits.float().softmax(2)[..., :-1] * proposals.valid[..., None]
        labels = torch.arange(scores.shape[2], device=scores.device).expand(scores.shape)
        boxes = decode_deltas(deltas.float().unflatten(2, (-1, 4)), proposals.boxes[:, :, None], REGION_WEIGHTS)
    boxes = boxes.expand(*scores.shape, 4)
    return Candidates(boxes.flatten(1, 2), scores.flatten(1), labels.flatten(1))
