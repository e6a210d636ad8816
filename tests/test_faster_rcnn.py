"""FasterRCNN: its two stages against torchvision's, worked answers, every argument, evaluation, and learning."""

import re
from typing import Any

import pytest
import torch
import torchvision
from test_fpn_detector import pictures, targets
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList

from zoo import FasterRCNN
from zoo.detection.two_stage.sampling import EMPTY, Samples

SMALL = {
    "backbone": "test_resnet",
    "num_classes": 3,
    "channels": 16,
    "head_width": 32,
    "image_size": 64,
    "pre_nms_top_k": (200, 100),
    "post_nms_top_k": (100, 50),
    "rpn_samples": 64,
    "region_samples": 32,
}


def small(**options: Any) -> FasterRCNN:
    torch.manual_seed(0)
    return FasterRCNN(**SMALL | options)


# Beside torchvision's, with the same weights.

NAMES = (
    (r"^backbone\.body\.", "backbone."),
    (r"^backbone\.fpn\.inner_blocks\.(\d)\.0\.", r"neck.lateral.\1."),
    (r"^backbone\.fpn\.layer_blocks\.(\d)\.0\.", r"neck.output.\1."),
    (r"^rpn\.head\.conv\.0\.0\.", "rpn.conv."),
    (r"^rpn\.head\.cls_logits\.", "rpn.cls_out."),
    (r"^rpn\.head\.bbox_pred\.", "rpn.box_out."),
    (r"^roi_heads\.box_head\.fc6\.", "box_head.fc1."),
    (r"^roi_heads\.box_head\.fc7\.", "box_head.fc2."),
    (r"^roi_heads\.box_predictor\.cls_score\.", "cls_out."),
    (r"^roi_heads\.box_predictor\.bbox_pred\.", "box_out."),
)
CLASSES = 5


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of torchvision's by our names; there background is the first class, here the last."""
    found = {}
    for name, value in tensors.items():
        for there, here in NAMES:
            name = re.sub(there, here, name)
        if name.startswith("cls_out"):
            value = value.roll(-1, 0)
        if name.startswith("box_out"):
            value = value[4:]
        found[name] = value
    return found


@pytest.fixture(scope="module")
def pair() -> tuple[FasterRCNN, Any]:
    """Ours and torchvision's, with the same weights and settings."""
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18(weights=None, norm_layer=nn.BatchNorm2d)
    stages = {f"layer{number}": str(number - 1) for number in range(1, 5)}
    sides, top_k = (8, 16, 32, 64, 128), {"pre_nms_top_k": (600, 300), "post_nms_top_k": (500, 200)}
    theirs = TorchvisionFasterRCNN(
        BackboneWithFPN(resnet, stages, [64, 128, 256, 512], 32),
        rpn_anchor_generator=AnchorGenerator(tuple((side,) for side in sides), ((0.5, 1.0, 2.0),) * len(sides)),
        box_head=TwoMLPHead(32 * 7**2, 64),
        box_predictor=FastRCNNPredictor(64, CLASSES + 1),
        rpn_pre_nms_top_n_train=600,
        rpn_pre_nms_top_n_test=300,
        rpn_post_nms_top_n_train=500,
        rpn_post_nms_top_n_test=200,
        rpn_batch_size_per_image=128,
        box_batch_size_per_image=64,
        box_score_thresh=0.15,
    )
    for layer in (theirs.rpn.head.cls_logits, theirs.rpn.head.bbox_pred, theirs.roi_heads.box_predictor.cls_score):
        nn.init.normal_(layer.weight, std=0.2)  # else all are nearly alike
    options = {"channels": 32, "head_width": 64, "image_size": 128, "rpn_samples": 128, "region_samples": 64} | top_k
    ours = FasterRCNN(
        "resnet18", CLASSES, 0.15, anchors="torchvision", anchor_sizes=sides, channels_last=False, **options
    )
    ours.load_state_dict(renamed(theirs.state_dict()))
    return ours, theirs


class Notes:
    """torchvision's sampler, which writes down the numbers of what it has sampled of each image."""

    def __init__(self, sampler: Any) -> None:
        self.sampler, self.noted = sampler, []

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        positive, negative = self.sampler(labels)
        self.noted = [torch.where((one | other) > 0)[0] for one, other in zip(positive, negative, strict=True)]
        return positive, negative


def padded(images: int, height: int, width: int, sizes: list[tuple[int, int]]) -> Tensor:
    found = torch.zeros(images, 3, height, width)
    for image, picture, (rows, columns) in zip(found, pictures(images, max(height, width)), sizes, strict=True):
        image[:, :rows, :columns] = picture[:, :rows, :columns]
    return found


@pytest.mark.parametrize(
    ("height", "width", "sizes"),
    [(128, 128, [(128, 128), (128, 128)]), (128, 160, [(101, 160), (128, 90)]), (97, 131, [(97, 131), (97, 131)])],
)
def test_losses_and_gradients_are_torchvisions_for_the_same_samples(pair, height, width, sizes, monkeypatch):
    ours, theirs = (each.train() for each in pair)
    images, about = padded(2, height, width, sizes), targets((5, 2), 90)
    about = [{**each, "size": size} for each, size in zip(about, sizes, strict=True)]
    there = [{"boxes": each["boxes"], "labels": each["labels"] + 1} for each in about]
    rpn, roi = Notes(theirs.rpn.fg_bg_sampler), Notes(theirs.roi_heads.fg_bg_sampler)
    monkeypatch.setattr(theirs.rpn, "fg_bg_sampler", rpn)
    monkeypatch.setattr(theirs.roi_heads, "fg_bg_sampler", roi)
    features = theirs.backbone(images)
    proposals, losses = theirs.rpn(ImageList(images, sizes), features, there)
    losses |= theirs.roi_heads(features, proposals, sizes, there)[1]
    sum(losses.values()).backward()

    maps = ours(images)
    found = ours.proposals(maps, sizes)
    regions = []
    for index, each, boxes in zip(roi.noted, proposals, found.boxes, strict=True):
        # Where scores are alike but for rounding, proposals change places.
        distance, same = (each[:, None] - boxes).abs().amax(2).min(1)
        number = torch.cat([same, len(boxes) + torch.arange(8)])[index]
        assert (distance[index[index < len(each)]] < 1e-4).all()
        regions.append(number)
    pad = lambda rows: nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=EMPTY)  # noqa: E731
    of_ours = ours.loss(maps, about, Samples(pad(rpn.noted), pad(regions)))
    sum(of_ours.values()).backward()
    names = {
        "rpn_objectness": "loss_objectness",
        "rpn_box": "loss_rpn_box_reg",
        "classification": "loss_classifier",
        "box": "loss_box_reg",
    }
    for name, value in of_ours.items():
        torch.testing.assert_close(value, losses[names[name]], rtol=1e-6, atol=1e-6)
        assert value > 0
    gradients = renamed({name: parameter.grad for name, parameter in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=name)
    for each in pair:
        each.zero_grad()


@pytest.mark.parametrize(
    ("height", "width", "sizes"),
    [(128, 128, [(128, 128), (128, 128)]), (97, 131, [(97, 131), (97, 131)]), (128, 160, [(101, 160), (128, 90)])],
)
def test_detections_are_torchvisions(pair, height, width, sizes):
    ours, theirs = (each.eval() for each in pair)
    images = padded(2, height, width, sizes)
    with torch.no_grad():
        features = theirs.backbone(images)
        proposals, _ = theirs.rpn(ImageList(images, sizes), features)
        expected, _ = theirs.roi_heads(features, proposals, sizes)
    for found, wanted in zip(ours.detect(images, sizes), expected, strict=True):
        assert len(found["boxes"]) == len(wanted["boxes"]) > 10
        order, other = (each.argsort(stable=True) for each in (found["scores"], wanted["scores"]))
        torch.testing.assert_close(found["scores"][order], wanted["scores"][other], rtol=0, atol=1e-5)
        distance = (found["boxes"][:, None] - wanted["boxes"][None]).abs().amax(2)
        same = found["labels"][:, None] == wanted["labels"][None] - 1
        assert (torch.where(same, distance, torch.inf).amin(1) < 1e-3).all()
        assert (torch.where(same, distance, torch.inf).amin(0) < 1e-3).all()
