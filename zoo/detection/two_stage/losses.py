"""Losses of both stages, of what is sampled, summed image by image: no boolean index, and no wait for a device.

What is not matched gets values that logarithm and quotient can take, and is masked afterwards.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.detection.cells import ATSS_WEIGHTS, RETINANET_WEIGHTS, Cells, Targets, encode_deltas
from zoo.detection.two_stage.sampling import EMPTY, Regions

REGION_WEIGHTS = ATSS_WEIGHTS
"""What deltas of regions are multiplied by: their deviation is about a tenth, and a fifth for logarithms."""


class RegionLossSums(NamedTuple):
    """Sums over the samples of each image, (B,) float32, and what they are to be divided by.

    Attributes:
        rpn_objectness: Binary cross-entropy of the sampled anchors.
        rpn_box: Of the sampled anchors with an object.
        classification: Cross-entropy of the sampled regions.
        box: Of the sampled regions with an object.
        anchors: How many anchors are sampled.
        regions: How many regions.
    """

    rpn_objectness: Tensor
    rpn_box: Tensor
    classification: Tensor
    box: Tensor
    anchors: Tensor
    regions: Tensor

    def total(self) -> "RegionLossSums":
        """The same over all images: scalars."""
        return RegionLossSums(*(each.sum() for each in self))

    def mean(self) -> dict[str, Tensor]:
        """The losses by name: each sum by the number of samples of its stage, those without an object as well."""
        anchors, regions = self.anchors.clamp(min=1), self.regions.clamp(min=1)
        return {
            "rpn_objectness": self.rpn_objectness / anchors,
            "rpn_box": self.rpn_box / anchors,
            "classification": self.classification / regions,
            "box": self.box / regions,
        }


def proposal_losses(
    objectness: Tensor, boxes: Tensor, match: Tensor, chosen: Tensor, cells: Cells, targets: Targets, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Objectness and box loss of sampled anchors, and their number: (B,) each, in float32 whatever the precision.

    Args:
        objectness: (B, N) logits.
        boxes: (B, N, 4) deltas.
        match: (B, N), of :func:`zoo.detection.assign.assign`.
        chosen: (B, n) anchors, of :func:`zoo.detection.two_stage.sampling.sample`.
        cells, targets: What was matched.
        beta: Of the box loss: see :func:`box_errors`.
    """
    with torch.autocast(objectness.device.type, enabled=False):
        there, index = chosen != EMPTY, chosen.clamp(min=0)
        slots = match.gather(1, index)
        positive = there & (slots >= 0)
        logits = objectness.gather(1, index).float()
        errors = F.binary_cross_entropy_with_logits(logits, positive.float(), reduction="none")
        own = cells.anchors[index]
        wanted = encode_deltas(_objects(targets, slots, own), own, RETINANET_WEIGHTS)
        deltas = boxes.gather(1, index[..., None].expand(-1, -1, 4)).float()
        box = box_errors(deltas, wanted, beta) * positive
        return (errors * there).sum(1), box.sum(1), there.float().sum(1)


def region_losses(
    logits: Tensor, boxes: Tensor, regions: Regions, there: Tensor, targets: Targets, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Classification and box loss of sampled regions, and their number: (B,) each, in float32.

    Args:
        logits: (B, m, K + 1), background last.
        boxes: (B, m, K * 4) deltas by class, or (B, m, 4) of all.
        regions: The sampled ones, m an image.
        there: (B, m), whether there is one in a place.
        targets: The objects.
        beta: See :func:`box_errors`.
    """
    with torch.autocast(logits.device.type, enabled=False):
        classes = logits.shape[2] - 1
        positive = there & (regions.match >= 0)
        labels = targets.labels.gather(1, regions.match.clamp(min=0))
        logits = logits.float().transpose(1, 2)
        errors = F.cross_entropy(logits, torch.where(positive, labels, classes), reduction="none")
        wanted = encode_deltas(_objects(targets, regions.match, regions.boxes), regions.boxes, REGION_WEIGHTS)
        by_class = boxes.float().unflatten(2, (-1, 4))
        if by_class.shape[2] > 1:
            by_class = by_class.gather(2, labels[..., None, None].expand(-1, -1, 1, 4))
        box = box_errors(by_class.squeeze(2), wanted, beta) * positive
        return (errors * there).sum(1), box.sum(1), there.float().sum(1)


def box_errors(deltas: Tensor, wanted: Tensor, beta: float) -> Tensor:
    """Smooth L1 (Girshick 2015, equation 3) of deltas (..., 4), summed: (...). It is squared below ``beta``, 0: L1."""
    return F.smooth_l1_loss(deltas, wanted, beta=beta, reduction="none").sum(-1)


def _objects(targets: Targets, slots: Tensor, otherwise: Tensor) -> Tensor:
    """Boxes (B, n, 4) of the objects in slots (B, n), and ``otherwise`` where there is none."""
    boxes = targets.boxes.gather(1, slots.clamp(min=0)[..., None].expand(-1, -1, 4))
    return torch.where((slots >= 0)[..., None], boxes, otherwise)
