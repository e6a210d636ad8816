"""Box heads: features of pooled regions, out of which their classes and boxes are predicted."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.detection.cells import decode_deltas
from zoo.detection.postprocessing import Candidates
from zoo.detection.two_stage.losses import REGION_WEIGHTS
from zoo.detection.two_stage.proposals import Proposals


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
