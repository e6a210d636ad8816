"""TridentNet on two stages: what is not in ``test_trident.py``, proposals and both stages' losses branch by branch."""

from functools import partial
from typing import Any

import pytest
import timm
import torch
from test_fpn_detector import pictures, targets
from test_trident import FITTING, random_norms
from torch import Tensor

from zoo import FasterRCNN
from zoo.detection.scale.ranges import within
from zoo.detection.scale.trident import original_scales

SMALL: dict[str, Any] = {
    "num_classes": 3,
    "channels": 16,
    "image_size": 64,
    "neck": "none",
    "box_head": "stage",
    "class_agnostic": True,
    "learn_targets": False,
    "channels_last": False,
    "anchor_sizes": [8, 16, 32, 64],
    "pre_nms_top_k": (300, 200),
    "post_nms_top_k": (40, 20),
    "rpn_samples": 32,
    "region_samples": 16,
}


def on_one_map(**options: Any) -> FasterRCNN:
    """With outputs as of training: boxes of many sizes, some of them likely."""
    torch.manual_seed(0)
    backbone = timm.create_model("resnet50d", channels=(8, 8, 16, 16), stem_width=8, num_classes=0)
    module = FasterRCNN(random_norms(backbone), **SMALL | {"trident": True, "valid_ranges": FITTING} | options)
    with torch.no_grad():
        outputs = module.rpn.cls_out, module.rpn.box_out, module.cls_out, module.box_out
        for layer, factor in zip(outputs, (3, 0.5, 0.02, 0.1), strict=True):
            layer.weight.mul_(factor)
    return module


@torch.no_grad()
def test_losses_are_of_all_branches_each_with_its_own_proposals_and_objects():
    module = on_one_map().eval()
    sums = module.loss_sums(module(pictures(4)), targets())
    assert all(each.shape == (12,) for each in sums)
    for branch in range(3):
        module.hparams.branch = branch
        alone = module.loss_sums(module(pictures(4)), targets())
        for together, expected in zip(sums, alone, strict=True):
            torch.testing.assert_close(together.unflatten(0, (3, 4))[branch], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("orig_size", [(64, 64), (80, 80)])
def test_boxes_out_of_a_branchs_range_are_dropped_before_nms(orig_size):
    """As if the anchors that they are of had not been there."""
    module, images, sizes = on_one_map(pre_nms_top_k=(9999, 9999)).train(), pictures(2), [(64, 64)] * 2
    maps = module(images)
    scales = original_scales([{"size": (64, 64), "orig_size": orig_size}] * 2, (64, 64), "cpu")
    wanted = partial(module.trident.wanted, scales=scales, running=maps.branches)
    found = module.proposals(maps, sizes, wanted=wanted)
    originals = found.boxes.unflatten(0, (3, 2)) * (orig_size[0] / 64)
    valid = found.valid.unflatten(0, (3, 2))
    for branch, ends in enumerate(FITTING):
        assert valid[branch].any()
        assert within(originals[branch], *ends)[valid[branch]].all()
    dropped: list[Tensor] = []

    def note(boxes: Tensor) -> Tensor:
        dropped.append(~wanted(boxes))
        return torch.ones_like(boxes[..., 0], dtype=torch.bool)

    module.proposals(maps, sizes, wanted=note)
    order = maps.objectness.argsort(1, descending=True)
    likely = maps.objectness.gather(1, order).masked_fill(dropped[0], -torch.inf)
    expected = module.proposals(maps._replace(objectness=maps.objectness.scatter(1, order, likely)), sizes)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.boxes, expected.boxes)


@torch.no_grad()
def test_exported_proposals_are_those_of_all_branches():
    module, sizes = on_one_map().eval(), torch.tensor([[64, 64], [64, 50]])
    found = module.exported_proposals(pictures(2), sizes)
    assert found["boxes"].shape == (2, 3 * 20, 4)
    for branch in range(3):
        module.hparams.branch = branch
        alone = module.exported_proposals(pictures(2), sizes)
        own = slice(20 * branch, 20 * (branch + 1))
        torch.testing.assert_close(found["boxes"][:, own], alone["boxes"], rtol=1e-4, atol=1e-3)
