"""Peers of the detectors, torchvision's, and random boxes to measure with."""

from typing import Any

import torch
from torch import Tensor, nn

from zoo.common import batch as batches
from zoo.common.peers import TRAINING, Built, Peer

BOXES = 8
"""In each image of a random batch."""


def random_targets(images: Tensor, classes: int, generator: torch.Generator) -> list[dict[str, Tensor]]:
    """Eight boxes for each image (B, C, H, W), whose sides are a sixteenth to half of the image's, and their labels."""
    size, targets = torch.tensor([images.shape[3], images.shape[2]]), []
    for _ in images:
        draw = torch.rand(BOXES, 4, generator=generator)
        sides = (1 + 7 * draw[:, :2]) / 16 * size
        corners = draw[:, 2:] * (size - sides)
        labels = torch.randint(classes, (BOXES,), generator=generator)
        targets.append({"boxes": torch.cat([corners, corners + sides], 1), "labels": labels})
    return targets


def _torchvision(model: Any, axes: dict[str, str]) -> Built:
    from torchvision.models.detection import FCOS, RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.retinanet import RetinaNetHead
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    hp = model.hparams
    backbone = _pyramid(hp, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))
    if hp.head == "retinanet":
        sizes = tuple((x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in (32, 64, 128, 256, 512))
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
        head = RetinaNetHead(256, anchors.num_anchors_per_location()[0], hp.num_classes)
        network = RetinaNet(backbone, hp.num_classes, anchor_generator=anchors, head=head, **AS_GIVEN)
    else:
        network = FCOS(backbone, hp.num_classes, **AS_GIVEN)
    return network, _sum_of_losses


def _torchvision_two_stage(model: Any, axes: dict[str, str]) -> Built:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
    from torchvision.models.detection.rpn import RPNHead

    hp = model.hparams
    if hp.neck != "fpn":
        raise ValueError("torchvision has no Faster R-CNN but on a feature pyramid: compare with --model.neck fpn")
    proposals = RPNHead(256, 3, hp.rpn_depth)
    head = FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], nn.BatchNorm2d) if hp.box_head == "conv" else None
    pyramid = _pyramid(hp, norm_layer=nn.BatchNorm2d if hp.neck_norm == "batch" else None)
    network = FasterRCNN(pyramid, 1 + hp.num_classes, rpn_head=proposals, box_head=head, **AS_GIVEN)

    def loss(network: nn.Module, batch: Any) -> Tensor:
        images, targets = batches.images_and_targets(batch)  # class 0 is background there
        return _sum_of_losses(network, (images, [target | {"labels": target["labels"] + 1} for target in targets]))

    return network, loss


def _pyramid(hp: Any, **options: Any) -> nn.Module:
    """torchvision's feature pyramid on the ResNet of a model's name, all of which is trained."""
    import torchvision
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor

    make = getattr(torchvision.models, hp.backbone, None)
    if make is None or not hp.backbone.startswith("resnet"):
        raise ValueError(f"torchvision has no detector on {hp.backbone}: compare with --model.backbone resnet50")
    return _resnet_fpn_extractor(make(weights=None, norm_layer=nn.BatchNorm2d), 5, **options)


def _sum_of_losses(network: nn.Module, batch: Any) -> Tensor:
    images, targets = batches.images_and_targets(batch)
    return torch.stack(list(network(list(images), targets).values())).sum()


AS_GIVEN: dict[str, Any] = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3, "_skip_resize": True}
"""Options with which torchvision's detectors train on images as they are given."""
PEERS = {
    "torchvision": Peer(
        "torchvision",
        TRAINING,
        "torchvision's FCOS, or RetinaNet for head=retinanet: P3 to P7, 256 channels, all layers trained, NCHW",
        _torchvision,
    )
}
TWO_STAGE_PEERS = {
    "torchvision": Peer(
        "torchvision",
        TRAINING,
        "torchvision's Faster R-CNN: P2 to P6, 256 channels, 512 regions an image, all layers trained, NCHW",
        _torchvision_two_stage,
    )
}
