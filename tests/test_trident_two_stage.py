"""TridentNet as it was published: branches on Faster R-CNN's one map, each of which proposes, samples and learns."""

from typing import Any

import pytest
import timm
import torch
from test_detection_parts import NeverWaits
from test_fpn_detector import pictures, same_detections, targets
from test_trident import FITTING, random_norms
from torch import nn

from zoo import FasterRCNN
from zoo.detection.postprocessing import non_maximum_suppression
from zoo.detection.scale.ranges import within
from zoo.detection.two_stage import detector, proposals
from zoo.detection.two_stage.losses import RegionLossSums
from zoo.detection.two_stage.sampling import match_regions

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
def test_an_object_is_learned_by_the_branches_of_its_size_in_the_original_image():
    module = on_one_map(learn_targets=True).eval()
    square = {"boxes": torch.tensor([[20.0, 20, 40, 40]]), "labels": torch.tensor([1])}  # of 20 pixels

    def learns(module: FasterRCNN, **about: Any) -> tuple[list[bool], list[bool]]:
        sums: RegionLossSums = module.loss_sums(module(pictures(1)), [square | about])
        return (sums.rpn_box > 0).tolist(), (sums.box > 0).tolist()

    assert learns(module) == ([False, True, False],) * 2
    larger = {"size": (64, 64), "orig_size": (96, 96)}  # 30 pixels
    assert learns(module, **larger) == ([False, True, True],) * 2
    assert learns(module, size=(64, 64), orig_size=(32, 32)) == ([True, True, False],) * 2
    everything = on_one_map(learn_targets=True, scale_aware=False, valid_ranges=None).eval()
    assert learns(everything) == ([True] * 3,) * 2


@torch.no_grad()
@pytest.mark.parametrize("orig_size", [(64, 64), (80, 80)])
def test_regions_to_learn_from_are_in_their_branchs_range(orig_size, monkeypatch):
    module, given = on_one_map().eval(), []
    monkeypatch.setattr(
        detector, "match_regions", lambda proposals, *rest: given.append(proposals) or match_regions(proposals, *rest)
    )
    about = [target | {"size": (64, 64), "orig_size": orig_size} for target in targets()]
    module.loss_sums(maps := module(pictures(4)), about)
    boxes, valid = (each.unflatten(0, (3, 4)) for each in (given[0].boxes, given[0].valid))
    before = module.proposals(maps, [(64, 64)] * 4).valid.unflatten(0, (3, 4))
    for branch, ends in enumerate(FITTING):
        inside = within(boxes[branch] * (orig_size[0] / 64), *ends)
        assert torch.equal(valid[branch], before[branch] & inside)
        assert valid[branch].any()
        assert not torch.equal(valid[branch], before[branch])


@torch.no_grad()
def test_detections_are_those_of_all_branches_in_their_ranges_after_one_nms():
    module, sizes = on_one_map(score_threshold=0.01).eval(), [(64, 64), (64, 50)]
    found = module.detect(pictures(2), sizes)
    of_branches = []
    for branch in range(3):
        module.hparams.branch = branch
        of_branches.append(module.candidates(module(pictures(2)), sizes))
    for image, size in enumerate(sizes):
        parts = []
        for candidates, ends in zip(of_branches, FITTING, strict=True):
            boxes = candidates.boxes[image].clamp(min=0).minimum(torch.tensor([size[1], size[0]] * 2))
            kept = within(boxes, *ends)
            parts.append((boxes[kept], candidates.scores[image][kept], candidates.labels[image][kept]))
            assert kept.any()
        together = (torch.cat(each) for each in zip(*parts, strict=True))
        expected = non_maximum_suppression(*together, size, 0.01, 0.5, 100)
        assert len(expected["boxes"]) > 3
        for name, value in expected.items():
            torch.testing.assert_close(found[image][name], value, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_the_middle_branch_alone_is_the_detector_with_its_dilation():
    module = on_one_map(branch=1, scale_aware=False, valid_ranges=None).eval()
    plain = on_one_map(trident=False, valid_ranges=None, dilations=[2]).eval()
    assert list(plain.state_dict()) == list(module.state_dict())
    assert same_detections(module.detect(pictures(2)), plain.detect(pictures(2)))
    assert module(pictures(2)).branches == (1,)
    assert module.train()(pictures(2)).branches == (0, 1, 2)


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


@pytest.mark.parametrize("scale_aware", [True, False])
def test_a_training_step_of_two_stages_with_branches_waits_for_nothing(scale_aware, monkeypatch):
    monkeypatch.setattr(proposals, "is_remote", lambda _: True)  # a CPU's NMS does not wait
    module = on_one_map(scale_aware=scale_aware, freeze_norm=True, valid_ranges=FITTING if scale_aware else None)
    module.cells(module(pictures(4)))  # once for each size of images
    with NeverWaits():
        losses = module.loss(module(pictures(4)), targets())
        torch.stack(list(losses.values())).sum().backward()
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in learned)
    assert not any(each.training for each in module.modules() if isinstance(each, nn.BatchNorm2d))
