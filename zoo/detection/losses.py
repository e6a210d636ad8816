"""Losses of a dense detector, summed image by image: no boolean index, no one-hot target, no wait for a device.

A cell that is not matched gets values that every root, logarithm and quotient can take, and is masked afterwards: NaN
times 0 would be NaN in the backward pass.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.detection.assign import IGNORE
from zoo.detection.cells import (
    ATSS_WEIGHTS,
    RETINANET_WEIGHTS,
    Cells,
    Head,
    Targets,
    decode_deltas,
    decode_distances,
    encode_deltas,
)

BoxLoss = Literal["giou", "l1"]
GIOU_EPS = 1e-7  # torchvision's


class LossSums(NamedTuple):
    """Sums over the cells of each image, (B,) float32, and what they are to be divided by.

    Attributes:
        classification: Focal loss over all classes of all cells that are not ignored.
        box: Over the cells with an object.
        centerness: The same; zeros for a head without.
        positives: How many cells have an object.
        box_weight: What ``box`` is to be divided by: the centernesses of these cells, or their number.
    """

    classification: Tensor
    box: Tensor
    centerness: Tensor
    positives: Tensor
    box_weight: Tensor

    def total(self) -> "LossSums":
        """The same over all images: scalars."""
        return LossSums(*(each.sum() for each in self))

    def mean(self, head: Head) -> dict[str, Tensor]:
        """The losses that a head learns from: "classification", "box" and, but for "retinanet", "centerness".

        Each sum by its own count; without objects by 1, so that classes that are not there are still learned.
        """
        positives = self.positives.clamp(min=1)
        box = self.box / self.box_weight.clamp(min=1e-6)
        # ATSS's released code counts boxes twice.
        losses = {"classification": self.classification / positives, "box": 2 * box if head == "atss" else box}
        return losses if head == "retinanet" else losses | {"centerness": self.centerness / positives}


def dense_loss(
    head: Head,
    logits: Tensor,
    boxes: Tensor,
    centerness: Tensor | None,
    match: Tensor,
    cells: Cells,
    targets: Targets,
    box_loss: BoxLoss = "giou",
    weighted: bool = True,
) -> LossSums:
    """The losses of all cells of a batch, in float32 whatever the precision.

    Args:
        head: Says how boxes are coded: "fcos" as distances, the others as deltas.
        logits: (B, N, K).
        boxes: (B, N, 4) as the head codes them.
        centerness: (B, N) logits, or None.
        match: (B, N), of :func:`zoo.detection.assign.assign`.
        cells, targets: What was matched.
        box_loss: "giou" of decoded boxes (Rezatofighi et al. 2019), or "l1" of deltas.
        weighted: Whether the box loss of a cell counts by its centerness, as in the released code of FCOS and ATSS.
    """
    with torch.autocast(logits.device.type, enabled=False):
        positive = match >= 0
        index = match.clamp(min=0)
        labels = targets.labels.gather(1, index)
        own = cells.anchors.expand(*match.shape, 4)
        matched = targets.boxes.gather(1, index[..., None].expand(-1, -1, 4))
        matched = torch.where(positive[..., None], matched, own)
        classification = focal_loss(logits.float(), labels, positive)
        classification = torch.where(match == IGNORE, 0.0, classification).sum(1)

        weight = positive.float()
        positives = weight.sum(1)
        center_sum = torch.zeros_like(positives)
        if centerness is not None:
            target = centerness_of(matched, cells.centers)
            errors = softplus(centerness.float()) - centerness.float() * target  # cross-entropy
            center_sum = (errors * weight).sum(1)
            if weighted:
                weight = weight * target
        if box_loss == "l1":
            coder = RETINANET_WEIGHTS if head == "retinanet" else ATSS_WEIGHTS
            box_errors = (boxes.float() - encode_deltas(matched, cells.anchors, coder)).abs().sum(-1)
        else:
            box_errors = giou_loss(decode(head, boxes.float(), cells.anchors), matched)
        return LossSums(classification, (box_errors * weight).sum(1), center_sum, positives, weight.sum(1))


def mark_sizes(outputs: Sequence[Tensor | None], cells: Cells, targets: Targets) -> None:
    """Has a compiled loss take the number of images, cells and slots as sizes that change: one graph for all of them.

    Left to itself it compiles anew for each, since which of the sizes vary together shows only one by one. A batch of
    one image, and a level of one anchor, have a graph of their own.
    """
    for each in (*outputs, *targets):
        if each is not None:
            torch._dynamo.maybe_mark_dynamic(each, [0, 1])
    for each in (cells.anchors, cells.ranges, *cells.levels):
        torch._dynamo.maybe_mark_dynamic(each, 0)


def decode(head: Head, boxes: Tensor, anchors: Tensor) -> Tensor:
    """Boxes xyxy in pixels (..., 4), float32, of what a head predicts for anchors (..., 4)."""
    if head == "fcos":
        return decode_distances(boxes, anchors)
    return decode_deltas(boxes, anchors, RETINANET_WEIGHTS if head == "retinanet" else ATSS_WEIGHTS)


def focal_loss(logits: Tensor, labels: Tensor, positive: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss (Lin et al. 2017, equation 5) of each cell, summed over its classes: (B, N).

    All classes are taken for absent, and what this gets wrong is put right for the one class that is there: the same
    sum without a target of the logits' size.

    Args:
        logits: (B, N, K).
        labels: (B, N), the class of a cell with an object; any class where there is none.
        positive: (B, N), whether there is one.
        alpha: Weight of what is there; of what is not, 1 - alpha.
        gamma: How much less counts what is already right.
    """
    absent = (1 - alpha) * _FocalOfAbsent.apply(logits, gamma)
    logit = logits.gather(2, labels[..., None]).squeeze(2)
    there = alpha * (-logit).sigmoid().pow(gamma) * softplus(-logit)
    not_there = (1 - alpha) * logit.sigmoid().pow(gamma) * softplus(logit)
    return absent + torch.where(positive, there - not_there, 0.0)


class _FocalOfAbsent(torch.autograd.Function):
    """sum p^gamma * -log(1 - p) over the last dimension, p = sigmoid(x). It keeps its derivative, not what led there.

    It is the one tensor of the logits' size that stays until the backward pass, where autograd would keep four.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, gamma: float) -> Tensor:
        probability, loss = logits.sigmoid(), softplus(logits)
        focus = probability.pow(gamma)
        ctx.save_for_backward(focus * (gamma * (1 - probability) * loss + probability))
        return (focus * loss).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (derivative,) = ctx.saved_tensors
        return derivative * gradient[..., None], None


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), by a logarithm of numbers from 1/2 to 1: on a CPU torch's log1p takes ten times as long."""
    size = x.abs()
    return 0.5 * (x + size) - size.sigmoid().log()  # not relu(), whose gradient at 0 would be wrong


def giou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """1 - generalised IoU (Rezatofighi et al. 2019, algorithm 1) of boxes (..., 4) xyxy, pair by pair: (...)."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    tx1, ty1, tx2, ty2 = targets.unbind(-1)
    width = (torch.minimum(x2, tx2) - torch.maximum(x1, tx1)).clamp(min=0)
    height = (torch.minimum(y2, ty2) - torch.maximum(y1, ty1)).clamp(min=0)
    intersection = width * height
    union = (x2 - x1) * (y2 - y1) + (tx2 - tx1) * (ty2 - ty1) - intersection
    hull = (torch.maximum(x2, tx2) - torch.minimum(x1, tx1)) * (torch.maximum(y2, ty2) - torch.minimum(y1, ty1))
    return 1 - intersection / (union + GIOU_EPS) + (hull - union) / (hull + GIOU_EPS)


def centerness_of(boxes: Tensor, centers: Tensor) -> Tensor:
    """Centerness (B, N) in [0, 1] of points (N, 2) in boxes (B, N, 4) (Tian et al. 2019, equation 3)."""
    x, y = centers.unbind(-1)
    x1, y1, x2, y2 = boxes.unbind(-1)
    left, top, right, bottom = x - x1, y - y1, x2 - x, y2 - y
    across = torch.minimum(left, right) / torch.maximum(left, right)
    along = torch.minimum(top, bottom) / torch.maximum(top, bottom)
    # An anchor's centre may lie outside of a box that ATSS does not give it; rounding may leave a hair below 0.
    return (across * along).clamp(min=0).sqrt()
