"""Views at test time: where they look, what comes back in which pixels, what they cost."""

import itertools
import math
import re
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_fpn_detector import HEADS, QUIET, Pyramid, collate, pictures, same_detections, small
from torch import Tensor, nn
from torch.utils.data import DataLoader

import datamodules.preprocessing
import zoo
from datamodules import ShapesDetectionDataModule
from zoo import FasterRCNN, FPNDetector
from zoo._lightning import Trainer
from zoo.detection import detections
from zoo.detection.detections import Found, after_nms, find_in_views
from zoo.detection.postprocessing import Candidates
from zoo.detection.scale import merging
from zoo.detection.scale.views import Cost, View, cost, lay_out, parse_views, starts
from zoo.serving.predictor import Predictor

# A network that knows the answer.


class Squares(nn.Module):
    """Backbone whose maps of stride 8 say where the bright rectangle of each channel lies, the channel being its class.

    Args:
        least: Least width of images in which it sees anything.
    """

    strides, channels = [8], [7]

    def __init__(self, least: int = 0) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []
        self.least = least

    def forward(self, images: Tensor) -> list[Tensor]:
        self.seen.append(tuple(images.shape))
        maps = torch.zeros(len(images), 7, *(-(-side // 8) for side in images.shape[2:]))
        maps[:, :3] = -20
        bright = (images > 0.5) & (images.shape[3] >= self.least)
        for image, channel in bright.flatten(2).any(2).nonzero().tolist():
            rows, columns = (bright[image, channel].any(axis).nonzero()[:, 0] for axis in (1, 0))
            box = [int(end) for end in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]
            column, row = ((box[axis] + box[axis + 2]) // 16 for axis in (0, 1))
            x, y = 8 * column + 4, 8 * row + 4
            maps[image, channel, row, column] = 4
            maps[image, 3:, row, column] = torch.tensor([x - box[0], y - box[1], box[2] - x, box[3] - y]) / 8
        return [maps]


class Read(nn.Module):
    """Head that takes a map for the answer."""

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        cells = maps[0].flatten(2).transpose(1, 2)
        return cells[..., :3], cells[..., 3:], torch.full(cells.shape[:2], 20.0)


def exact(backbone: Squares | None = None, **options) -> FPNDetector:
    """A detector that finds bright rectangles, one a channel, and knows nothing else."""
    made: dict[str, Any] = {"neck": "single", "levels": (4, 4), "channels": 8, "head_depth": 0, "num_classes": 3}
    module = FPNDetector(backbone or Squares(), **made | options).eval()
    module.neck, module.head = nn.Identity(), Read()
    return module


def drawn(boxes: list[list[int]], size: tuple[int, int] = (64, 96)) -> Tensor:
    """An image with a rectangle in each channel; none where it is empty."""
    image = torch.zeros(3, *size)
    for channel, (left, top, right, bottom) in zip(image, boxes, strict=True):
        channel[top:bottom, left:right] = 1
    return image


NONE = [0, 0, 0, 0]
FIRST = [[2, 6, 14, 18], [40, 20, 54, 30], [84, 52, 96, 64]]  # of an image of 64 x 96, up to its corner
SECOND = [[0, 0, 10, 12], [66, 36, 80, 48], NONE]  # of 48 x 80
SIZES = [(64, 96), (48, 80)]


def two_images(noise: bool = False) -> Tensor:
    images = torch.stack([drawn(FIRST), drawn(SECOND)])
    if noise:  # in the padding, of which no view makes anything
        images[1, 2, 50:, 85:] = 1
    return images


def answers(factors: tuple[float, float] = (1, 1)) -> list[list[list[float]]]:
    y, x = factors
    return [[[x * a, y * b, x * c, y * d] for a, b, c, d in boxes] for boxes in (FIRST, SECOND[:2])]


def check(found: list[dict[str, Tensor]], expected: list[list[list[float]]], atol: float = 1e-4) -> None:
    for each, boxes in zip(found, expected, strict=True):
        order = each["labels"].argsort()
        assert each["labels"][order].tolist() == list(range(len(boxes)))
        torch.testing.assert_close(each["boxes"][order], torch.tensor(boxes).float(), rtol=0, atol=atol)
        assert each["boxes"].dtype == each["scores"].dtype == torch.float32


@pytest.mark.parametrize("original", [(1, 1), (2, 2), (0.5, 1.5)])
@pytest.mark.parametrize("tile", [None, 32])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scale", [0.5, 1, 2])
def test_boxes_come_back_in_pixels_of_the_original(scale, flip, tile, original):
    """Every object comes once, where it is: from each view alone, whatever the padding and the size before."""
    view = {"scale": scale, "flip": flip, "tile": tile and tile * max(original), "overlap": 0.5}
    originals = [(int(height * original[0]), int(width * original[1])) for height, width in SIZES]
    module, plain = exact(), (scale, flip, tile) == (1, False, None)
    found = module.detect(two_images(noise=not plain), SIZES, originals, views=[view])
    check(found, answers(original))
    assert all(shape[2] % 32 == shape[3] % 32 == 0 for shape in module.backbone.seen)


@pytest.mark.parametrize("method", ["nms", "soft_nms", "soft_vote", "weighted"])
def test_views_together_find_each_object_once(method):
    views = [
        {"scale": s, "flip": f, "tile": t, "overlap": 0.5} for s in (0.5, 1, 2) for f in (0, 1) for t in (None, 32)
    ]
    views = [view | {"flip": bool(view["flip"])} for view in views]
    module = exact(views=views, merge=method, score_threshold=0.6)
    check(module.detect(two_images(), SIZES), answers(), atol=1e-3)


def test_scales_between_pixels_are_off_by_less_than_one():
    views = [{"scale": 1.3}, {"scale": 0.7, "flip": True}, {"scale": 1.7, "tile": 40.0, "overlap": 0.4}]
    for view in views:
        check(exact().detect(two_images(), SIZES, views=[view]), answers(), atol=1)


def test_images_in_bfloat16_have_their_boxes_in_float32():
    found = exact().detect(
        two_images().bfloat16(), SIZES, views=[{"scale": 2, "flip": True}, {"tile": 32, "overlap": 0.5}]
    )
    check(found, answers())


def test_images_without_anything():
    for views in ([{}], [{"flip": True}, {"tile": 32}]):
        for found in exact(score_threshold=0.5).detect(torch.zeros(2, 3, 64, 96), views=views):
            assert [tuple(found[key].shape) for key in ("boxes", "scores", "labels")] == [(0, 4), (0,), (0,)]
            assert [found[key].dtype for key in ("boxes", "labels")] == [torch.float32, torch.int64]
    found = exact().detect(torch.stack([torch.zeros(3, 64, 96), drawn(FIRST)]), views=[{"flip": True}])
    assert [len(each["scores"]) for each in found] == [0, 3]
    assert exact().detect(torch.zeros(0, 3, 64, 96), [], views=[{"flip": True}]) == []


# A view of the image as it is, is plain detection.


def values(module: FPNDetector) -> FPNDetector:
    """The module with weights by which scores and boxes differ from cell to cell."""
    for parameter in module.head.parameters():
        nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(1))
    return module.eval()


REAL: dict[str, dict[str, Any]] = {head: {"head": head, "levels": (3, 5)} for head in HEADS}
REAL |= {"one level": {"neck": "single", "levels": (4, 4)}, "ViT": {"backbone": "test_vit", "levels": (3, 5)}}
BRANCHES = {"trident": True, "valid_ranges": [(0, 16), (8, 40), (32, None)]}
REAL |= {"TridentNet": {"backbone": "test_byobnet", "levels": (3, 5), **BRANCHES}}


@pytest.fixture(scope="module", params=[*REAL, "two stages"])
def real(request) -> Any:
    if request.param != "two stages":
        return values(small(score_threshold=0.2, **REAL[request.param]))
    torch.manual_seed(0)
    made: dict[str, Any] = {"levels": (3, 5), "channels": 16, "head_width": 32, "post_nms_top_k": (100, 50)}
    module = FasterRCNN("test_resnet", num_classes=3, score_threshold=0.2, image_size=64, **made).eval()
    for layer, deviation in ((module.cls_out, 1.0), (module.box_out, 0.3)):
        nn.init.normal_(layer.weight, std=deviation, generator=torch.Generator().manual_seed(1))
    return module


@pytest.mark.parametrize("views", [[{}], [{"tile": 1000.0}], [{"tile": 64, "overlap": 0.5, "scale": 1.0}]])
def test_a_view_of_the_image_as_it_is_changes_no_bit(real, views):
    images, sizes = pictures(3), [(64, 64), (40, 64), (64, 33)]
    for originals in (None, [(64, 64)] * 3):
        expected = real.detect(real(images), sizes, originals)
        assert sum(len(each["scores"]) for each in expected) > 20
        assert same_detections(real.detect(images, sizes, originals, views=views), expected)
        assert same_detections(real.detect(images, torch.tensor(sizes), originals), expected)
    originals = [(1000, 640), (77, 99), (640, 333)]
    expected = real.detect(real(images), sizes, originals)
    assert same_detections(real.detect(images, sizes, originals, views=[{}]), expected)
    assert same_detections(real.detect(images, sizes, originals, views=[{"tile": 1000}]), expected)


def test_so_does_the_way_that_other_views_go(real):
    """In pixels of the images given, candidates of a single view are merged into what NMS makes of them."""
    images, sizes = pictures(3), [(64, 64), (40, 64), (64, 33)]
    find = lambda batch, sizes: real.candidates(real(batch), sizes)  # noqa: E731
    every = find_in_views(find, images, sizes, sizes, parse_views([{}]), 0.2)
    found = [merging.merge(*each, "nms", real.hparams.nms_threshold, 0.2, 100) for each in every]
    assert same_detections(found, real.detect(images, sizes))


def test_images_mirrored_by_hand(real):
    """A flip is that of each image without its padding, and its boxes' back."""
    images, sizes = pictures(2), [(64, 64), (40, 32)]
    mirrored = torch.zeros_like(images)
    for image, row, (height, width) in zip(images, mirrored, sizes, strict=True):
        row[:, :height, :width] = image[:, :height, :width].flip(-1)
    found, expected = real.detect(images, sizes, views=[{"flip": True}]), real.detect(mirrored, sizes)
    assert sum(len(each["scores"]) for each in found) > 10
    for each, other, (_, width) in zip(found, expected, sizes, strict=True):
        left, top, right, bottom = other["boxes"].unbind(1)
        assert torch.equal(each["boxes"], torch.stack([width - right, top, width - left, bottom], 1))
        assert torch.equal(each["scores"], other["scores"])


def symmetric(head: str) -> FPNDetector:
    """A detector that finds in a mirrored image the mirrored boxes, by its weights.

    It is made of patches: a convolution of stride 2 on an even side is not symmetric.
    """
    module = values(small(backbone=Pyramid(), head=head, levels=(3, 5), score_threshold=0.2, nms_threshold=0.3))
    for layer in [each for each in module.modules() if isinstance(each, nn.Conv2d)]:
        layer.weight.data = (layer.weight + layer.weight.flip(3)).data / 2
    boxes = module.head.box_out
    if head == "fcos":  # left is right
        boxes.weight.data[2], boxes.bias.data[2] = boxes.weight.data[0].flip(2), boxes.bias.data[0]
    else:
        for row in range(0, boxes.out_channels, 4):  # a shift to the right is one to the left
            boxes.weight.data[row, ..., 2] = -boxes.weight.data[row, ..., 0]
            boxes.weight.data[row, ..., 1] = boxes.bias.data[row] = 0
    return module


@pytest.mark.parametrize("head", HEADS)
def test_a_symmetric_network_finds_the_same_in_a_flip(head):
    module, images = symmetric(head), pictures(2)
    plain, flipped = (module.detect(images, views=[{"flip": flip}]) for flip in (False, True))
    for one, other in zip(plain, flipped, strict=True):
        assert len(one["scores"]) > 3
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3)


def test_tiles_shifted_by_strides_find_the_same_as_the_image():
    """Of a network whose cells look at their own pixels alone."""
    module = small(backbone=Pyramid(), neck="single", levels=(3, 3), head_norm="none")
    values(module)
    for layer in [each for each in module.modules() if isinstance(each, nn.Conv2d) and each.kernel_size == (3, 3)]:
        centre = layer.weight.data[:, :, 1, 1].clone()
        layer.weight.data.zero_()
        layer.weight.data[:, :, 1, 1] = centre
    module.head.box_out.weight.data *= 0.2
    find = lambda batch, sizes: module.candidates(module(batch), sizes)  # noqa: E731
    look = partial(find_in_views, find, pictures(1), [(64, 64)], [(64, 64)], score_threshold=0.2)
    (plain,), (tiled,) = look(views=[View()]), look(views=[View(tile=32, overlap=0.5)])
    whole = tiled.boxes[~tiled.cut]
    assert len(whole) > 50
    distances = torch.cat([whole, tiled.scores[~tiled.cut, None]], 1)[:, None] - torch.cat(
        [plain.boxes, plain.scores[:, None]], 1
    )
    assert distances.abs().amax(2).amin(1).max() < 1e-4
    boxes = plain.boxes[(plain.boxes[:, 2:] - plain.boxes[:, :2]).amax(1) < 16 / 1.1]  # some tile has it as a whole
    assert ((boxes[:, None] - whole).abs().amax(2).amin(1) < 1e-4).all()


# Tiles.


@pytest.mark.parametrize("overlap", [0, 0.1, 0.25, 1 / 3, 0.5])
@pytest.mark.parametrize("side", [1, 2, 7, 32, 50])
def test_tiles_cover_every_pixel_and_overlap(side, overlap):
    for length in (1, 2, 31, 32, 33, 63, 64, 65, 100, 257):
        found = starts(length, side, overlap)
        assert found[0] == 0
        assert found == sorted(set(found))
        if side >= length:
            assert found == [0]
            continue
        assert found[-1] + side == length
        shared = min(overlap * side - 1e-9, side - 1)  # of one pixel, none can be
        assert all(side - (second - first) >= shared for first, second in itertools.pairwise(found))
        fewest = 1 + math.ceil((length - side) / max(1, math.floor(side * (1 - overlap))))
        assert len(found) == fewest


def test_tiles_are_measured_in_the_original_image():
    layout = lay_out(View(tile=64, overlap=0.5, scale=2), (64, 96), [(60, 90)], [(120, 360)], tiles_at_once=8)
    assert {(crop.height, crop.width) for crop in layout.crops} == {(32, 16)}
    assert {crop.size for crop in layout.crops} == {(64, 32)}
    assert layout.shape == (64, 32)
    assert sorted({crop.top for crop in layout.crops}) == [0, 16, 28]
    assert {crop.left for crop in layout.crops} == {*range(0, 74, 8), 74}


def test_boxes_that_a_tile_cuts_are_marked():
    """The one across the border of two tiles is cut in both; those at the image's own borders are whole."""
    boxes = [[0, 0, 16, 64], [24, 8, 40, 24], [48, 56, 64, 64]]
    module = exact()
    find = lambda batch, sizes: module.candidates(module(batch), sizes)  # noqa: E731
    for flip in (False, True):
        view = View(tile=32, overlap=0, flip=flip)
        (found,) = find_in_views(find, drawn(boxes, (64, 64))[None], [(64, 64)], [(64, 64)], [view], 0.5)
        rows = sorted(zip(found.labels.tolist(), found.boxes.tolist(), found.cut.tolist(), strict=True))
        assert rows == [
            (0, [0, 0, 16, 32], True),
            (0, [0, 32, 16, 64], True),
            (1, [24, 8, 32, 24], True),
            (1, [32, 8, 40, 24], True),
            (2, [48, 56, 64, 64], False),
        ]


@pytest.mark.parametrize("method", ["nms", "soft_nms", "soft_vote", "weighted"])
def test_the_whole_image_beside_tiles_keeps_large_objects(method):
    boxes = [[4, 4, 92, 60], [8, 8, 18, 18], NONE]
    module = exact(views=[{}, {"tile": 32, "overlap": 0.5, "scale": 2}], merge=method)
    (found,) = module.detect(drawn(boxes)[None])
    of_class = [found["boxes"][found["labels"] == label].tolist() for label in (0, 1)]
    assert of_class[0][0] == pytest.approx([4, 4, 92, 60])
    assert of_class[1][0] == pytest.approx([8, 8, 18, 18])
    if method == "nms":
        assert [len(each) for each in of_class] == [1, 1]


def test_valid_ranges_are_sizes_in_the_original():
    """Boxes of 12, 12 and 11.8 pixels, twice that before the image was resized."""
    look = partial(exact().detect, two_images(), SIZES, [(128, 192), (96, 160)])
    small_ones, large = {"valid_range": [0, 23.8], "flip": True}, {"valid_range": (23.8, None)}
    counts = [len(each["scores"]) for each in look(views=[small_ones, large])]
    assert counts == [3, 2]
    for low, high, expected in ((0, 23.8, [[1], [0]]), (23.8, None, [[0, 2], [1]])):
        # The other view shows nothing that there is.
        rest = {"valid_range": (0, 0.5) if low else (23.8, None), "scale": 0.01}
        middle = [] if not low else [{"valid_range": (0.5, 23.8), "scale": 0.01}]
        found = look(views=[{"valid_range": (low, high)}, rest, *middle])
        assert [sorted(each["labels"].tolist()) for each in found] == expected


def test_ranges_of_views_and_of_candidates_are_both_kept():
    """A fork of two branches, of which each finds everything, and the second one keeps what is above 24 pixels."""
    module, originals = exact(), [(128, 192), (96, 160)]

    def find(batch: Tensor, sizes: Any) -> Candidates:
        found = module.candidates(module(batch), sizes)
        boxes, scores, labels = (torch.cat([each, each], 1) for each in found[:3])
        ranges = torch.tensor([[0.0, 23.8], [23.8, math.inf]]).repeat_interleave(found.scores.shape[1], 0)
        return Candidates(boxes, scores, labels, ranges)

    views = parse_views([{"valid_range": (0, 23.8)}, {"scale": 2, "valid_range": (20, None)}])
    first, second = find_in_views(find, two_images(), SIZES, originals, views, 0.5)
    # Of 24, 23.66 and 24 pixels, and of 21.9 and 25.9: those below 23.8 in the first branch and in both views.
    assert sorted(zip(first.views.tolist(), first.labels.tolist(), strict=True)) == [(0, 1), (1, 0), (1, 1), (1, 2)]
    assert sorted(zip(second.views.tolist(), second.labels.tolist(), strict=True)) == [(0, 0), (1, 0), (1, 1)]


def test_the_best_candidates_are_merged(monkeypatch):
    """As many as there is time for: an untrained network finds tens of thousands in tiles."""
    found = Found(torch.rand(5, 4), torch.tensor([0.5, 0.9, 0.8, 0.7, 0.6]), *torch.arange(15).view(3, 5))
    assert found.best(5) is found
    assert found.best(3).scores.tolist() == pytest.approx([0.9, 0.8, 0.7])
    assert found.best(3).cut.tolist() == [11, 12, 13]
    merged = []
    monkeypatch.setattr(merging, "merge", lambda *found: merged.append(len(found[0])))
    for most in (40, 4):
        monkeypatch.setattr(detections, "MOST", most)
        exact(max_detections=1).detect(two_images(), SIZES, views=[{"flip": True}] * 12)
    assert merged == [36, 24, 30, 24]  # of 3 and 2 in each view; thirty times the detections, if that is more


def test_each_view_is_thinned_out_before_votes():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 11], [0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10]])
    found = Found(
        boxes,
        torch.tensor([0.5, 0.9, 0.8, 0.7, 0.6]),
        torch.tensor([0, 0, 1, 0, 0]),
        torch.tensor([0, 0, 0, 2, 2]),
        torch.tensor([False, False, False, False, True]),
    )
    assert sorted(after_nms(found, 0.5).scores.tolist()) == pytest.approx([0.6, 0.7, 0.8, 0.9])
    assert len(after_nms(Found(*(each[:0] for each in found)), 0.5).scores) == 0


# What they cost.


def test_memory_is_that_of_so_many_tiles_whatever_the_image():
    most = []
    for side in (128, 512):
        module = exact(views=[{"tile": 64, "scale": 0.5}], tiles_at_once=3, score_threshold=0.5)
        module.detect(torch.zeros(1, 3, side, side))
        most.append(max(map(math.prod, module.backbone.seen)))
        assert {shape[1:] for shape in module.backbone.seen} == {(3, 32, 32)}
        assert len(module.backbone.seen) == cost(module.hparams.views, (side, side), tiles_at_once=3).passes
    assert most == [3 * 3 * 32 * 32] * 2


def test_larger_images_come_one_after_the_other():
    """So that a pass has no more pixels than the batch, or those of one image."""
    module = exact(views=[{"scale": 2}, {"scale": 0.5}, {"flip": True}])
    module.detect(torch.zeros(9, 3, 32, 64))
    assert module.backbone.seen == [*[(2, 3, 64, 128)] * 4, (1, 3, 64, 128), (9, 3, 32, 32), (9, 3, 32, 64)]


def test_costs_are_counted():
    assert cost([{}], (64, 96)) == Cost(1, 64 * 96, 64 * 96)
    assert cost([{}], (60, 90)).factor == 1
    assert cost([{}, {"flip": True}, {"scale": 2}], (64, 96)) == Cost(3, 6 * 64 * 96, 64 * 96)
    views = [{}, {"tile": 64, "overlap": 0.5}]
    assert cost(views, (128, 128), (256, 256)) == Cost(1 + 7, 128 * 128 + 49 * 32 * 32, 128 * 128)
    module = exact(views=views)
    module.detect(torch.zeros(1, 3, 128, 128), original_sizes=[(256, 256)])
    assert len(module.backbone.seen) == 8
    assert (
        sum(shape[0] * shape[2] * shape[3] for shape in module.backbone.seen)
        == cost(views, (128, 128), (256, 256)).pixels
    )


# Where the module uses its own.


def test_evaluation_scores_views_and_has_the_loss_of_the_plain_pass():
    about = [{"boxes": torch.tensor(each).float(), "labels": torch.arange(len(each))} for each in answers()]
    about = [target | {"size": size} for target, size in zip(about, SIZES, strict=True)]
    data = DataLoader(list(zip(two_images(), about, strict=True)), 2, collate_fn=collate)
    figures, seen = [], []
    for views in (None, [{"scale": 2}, {"flip": True}, {}]):
        module = exact(Squares(least=128), views=views)
        for method in ("validate", "test"):
            figures.append(getattr(Trainer(**QUIET), method)(module, data, verbose=False)[0])
            seen.append(module.backbone.seen.copy())
            module.backbone.seen.clear()
    for plain, viewed, stage in zip(figures[:2], figures[2:], ("val", "test"), strict=True):
        assert (plain[f"{stage}/ap"], viewed[f"{stage}/ap"]) == (0, pytest.approx(1))
        losses = [name for name in plain if "loss" in name]
        assert len(losses) == 4
        assert {name: viewed[name] for name in losses} == {name: plain[name] for name in losses}
    # The pass of the loss is the third view's, and comes first.
    assert seen == [[(2, 3, 64, 96)]] * 2 + [[(2, 3, 64, 96), *[(1, 3, 128, 192)] * 2, (2, 3, 64, 96)]] * 2


def test_prediction_and_pictures_see_views():
    """Views alone find what is shown: the module's own pass finds nothing."""
    module = exact(views=[{"flip": True}, {"scale": 2, "tile": 64, "overlap": 0.5}])
    about = [{"size": size, "orig_size": (2 * size[0], 2 * size[1]), "image_id": i} for i, size in enumerate(SIZES)]
    found = module.predict_step((two_images(), about), 0)
    check(found, answers((2, 2)), atol=1e-3)
    assert [each["image_id"] for each in found] == [0, 1]
    assert {shape[2:] for shape in module.backbone.seen} == {(64, 96), (64, 64)}  # tiles of 64 are of 32 here
    shown, seen = module.pictures((two_images(), about))["detections"], list(module.backbone.seen)
    assert set(seen[len(seen) // 2 :]) == set(seen[: len(seen) // 2])
    module.hparams.views = None
    assert torch.equal(shown, module.pictures((two_images(), about))["detections"])


def test_the_predictor_sees_views():
    stated = {
        "kind": "fit",
        "channels": 3,
        "image_size": None,
        "max_size": None,
        "pad_multiple": 32,
        "size_buckets": None,
    }
    stated |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    module = exact(views=[{"flip": True}])
    predict = Predictor(module, datamodules.preprocessing.create(stated))
    found = predict((255 * drawn(FIRST)).to(torch.uint8))
    assert sorted(found["boxes"]) == sorted(answers()[0])
    assert module.backbone.seen == [(1, 3, 64, 96)]


def test_arguments_of_detect_come_before_the_modules():
    module = exact(views=[{"scale": 2}], merge="weighted")
    module.detect(two_images(), views=[{}], merge="nms")
    assert module.backbone.seen == [(2, 3, 64, 96)]
    check(module.detect(module(two_images()), SIZES, views=[{}], merge="nms"), answers())
    with pytest.raises(
        ValueError, match="views and merge are of images, and these are raw predictions: give the images"
    ):
        module.detect(module(two_images()))


def test_checkpoints_have_them_as_plain_data(tmp_path):
    options = {"neck": "single", "levels": (4, 4)}
    module = small(views=({"tile": 64, "valid_range": (0, 32.5)}, {"valid_range": [30, None]}), **options)
    trainer = Trainer(**QUIET)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    there = torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]["views"]
    assert there == module.hparams.views
    assert parse_views(there) == (View(tile=64, valid_range=(0, 32.5)), View(valid_range=(30, None)))
    assert FPNDetector.load_from_checkpoint(tmp_path / "a.ckpt", views=None).hparams.views is None


# Mistakes.


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ({"scale": 2}, "views is {'scale': 2}: expected a list of mappings such as {'scale': 2.0}, or None"),
        ([], "views is []: expected a list of mappings"),
        ("flip", "views is 'flip': expected a list of mappings"),
        (["flip"], "views[0] is 'flip': expected a mapping with scale, flip, tile, overlap, valid_range"),
        ([{}, {"scales": 2}], "views[1] has no 'scales': expected scale, flip, tile, overlap, valid_range"),
        ([{"scale": 0}], "scale of views[0] is 0: expected a finite number above 0"),
        ([{"scale": math.inf}], "scale of views[0] is inf: expected a finite number above 0"),
        ([{"scale": "2"}], "scale of views[0] is '2': expected a finite number above 0"),
        ([{"scale": True}], "scale of views[0] is True: expected a finite number above 0"),
        ([{"flip": 1}], "flip of views[0] is 1: expected true or false"),
        ([{"tile": 0}], "tile of views[0] is 0: expected at least 1 pixel, or None"),
        ([{"tile": [64, 64]}], "tile of views[0] is [64, 64]: expected at least 1 pixel, or None"),
        ([{"overlap": 0.6}], "overlap of views[0] is 0.6: expected a share of the tile, 0 to 0.5"),
        ([{"overlap": -0.1}], "overlap of views[0] is -0.1: expected a share of the tile, 0 to 0.5"),
        ([{"overlap": math.nan}], "overlap of views[0] is nan: expected a share of the tile, 0 to 0.5"),
        ([{"valid_range": 3}], "valid_range of views[0] is 3: expected two numbers of pixels"),
        ([{"valid_range": [1]}], "valid_range of views[0] is [1]: expected two numbers of pixels"),
        ([{"valid_range": "ab"}], "valid_range of views[0] is 'ab': expected two numbers of pixels"),
        ([{"valid_range": [5, 3]}], "expected 0 <= low < high"),
        (
            [{"valid_range": [0, 32]}],
            "valid_ranges leave objects from 32 pixels on to none of views[0] (scale 1)",
        ),
        (
            [{"valid_range": [0, 32]}, {"scale": 0.5, "flip": True, "valid_range": [48, None]}],
            "leave objects of 32 to 48 pixels to none of views[0] (scale 1), views[1] (scale 0.5, flip)",
        ),
        (
            [{"tile": 31}],
            "views[0] shows tiles of 31 pixels: expected at least the network's largest stride, 32",
        ),
        (
            [{}, {"tile": 48, "scale": 0.5}],
            "views[1] shows tiles of 24 pixels: expected at least the network's largest stride, 32",
        ),
    ],
)
def test_wrong_views(real_one, views, message):
    for wrong in (partial(real_one.detect, pictures(1)), partial(small, levels=(3, 5))):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            wrong(views=views)
        assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def real_one() -> FPNDetector:
    return small(levels=(3, 5)).eval()


def test_other_wrong_arguments(real_one):
    with pytest.raises(ValueError, match="unknown merge 'mean': expected one of nms, soft_nms, soft_vote, weighted"):
        small(merge="mean")
    with pytest.raises(ValueError, match="unknown merge 'mean': expected one of nms, soft_nms, soft_vote, weighted"):
        real_one.detect(pictures(1), merge="mean")
    with pytest.raises(ValueError, match="tiles_at_once is 0: expected at least 1"):
        small(tiles_at_once=0)
    with pytest.raises(ValueError, match="there are 1 sizes for 2 images: expected one each"):
        real_one.detect(pictures(2), [(64, 64)], views=[{"flip": True}])


def test_tiles_of_an_image_that_was_resized_may_be_too_small(real_one):
    message = (
        r"views\[1\] \(scale 1, tile 64\): its tiles have 16 pixels, of images that were resized: expected at least"
    )
    with pytest.raises(ValueError, match=message):
        real_one.detect(pictures(1), original_sizes=[(256, 256)], views=[{}, {"tile": 64}])


def test_a_network_of_one_size_names_the_view():
    module = small(backbone="efficientformerv2_s0", levels=(3, 5), image_size=64)
    with pytest.raises(
        ValueError, match=r"^views\[1\] \(scale 2\): EfficientFormerV2 gives no maps of images of 128x128"
    ):
        module.eval().detect(pictures(1), views=[{}, {"scale": 2}])


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("x: can't allocate memory")]
)
def test_a_view_that_exceeds_the_memory_is_named(error):
    module = exact()
    shown = module.detect(two_images(), views=[{}, {"scale": 4}])

    def runs_out(_, images):
        if images[0].shape[-1] > 200:
            raise error

    hook = module.register_forward_pre_hook(runs_out)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        module.detect(two_images(), views=[{}, {"scale": 4}])
    said = "views[1] (scale 4) needs more memory than there is: take a smaller scale, or fewer tiles_at_once"
    assert str(raised.value) == said
    hook.remove()
    assert same_detections(module.detect(two_images(), views=[{}, {"scale": 4}]), shown)


def test_other_errors_stay_what_they_are():
    module = exact()
    module.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="^something else$"):
        module.detect(two_images(), views=[{"flip": True}])


def test_split_weights_take_one_pass_alone():
    """Each process has its own number of tiles, and those that share weights would wait for each other."""

    class ModelParallelStrategy:
        pass

    module = exact()
    module._trainer = SimpleNamespace(strategy=ModelParallelStrategy(), world_size=2)
    check(module.detect(two_images(), SIZES, views=[{}]), answers())
    with pytest.raises(ValueError, match="views are not computed under ModelParallelStrategy: .* evaluate with ddp"):
        module.detect(two_images(), SIZES, views=[{"tile": 32}])
    module._trainer.world_size = 1
    check(module.detect(two_images(), SIZES, views=[{"tile": 32, "overlap": 0.5}]), answers())


def test_views_are_no_part_of_an_exported_file():
    sizes = torch.tensor([[64, 96], [48, 80]])
    module = exact(views=[{"flip": True}])
    with pytest.raises(ValueError, match="views and merge are no part of an exported file: export zoo.load"):
        module.exported_detections(two_images(), sizes)
    with pytest.raises(ValueError, match=r"cannot be exported: views and merge are .* hparams.merge 'nms'$"):
        zoo.export(module, "a.pt2", "pt2", preprocessing=False)
    assert set(module.exported_maps(two_images())) == {"logits", "boxes", "centerness"}
    module.hparams.views = None
    assert module.exported_detections(two_images(), sizes)["count"].tolist() == [3, 2]


# A model that has learned by valid ranges.

LEARNED = {32: (32, None), 64: (16, 64), 128: (0, 32)}


@pytest.mark.parametrize("kind", [FPNDetector, FasterRCNN])
def test_views_of_objects_that_were_not_learned_at_their_scale_are_refused(kind, tmp_path):
    """Ranges of training travel with the checkpoint; plain detection, and views of about those ranges, are as ever."""
    shapes = ShapesDetectionDataModule(
        image_size=64,
        train_size=2,
        val_size=0,
        test_size=0,
        batch_size=2,
        num_workers=0,
        short_sides=list(LEARNED),
        valid_ranges=list(LEARNED.values()),
    )
    options = {"image_size": 64, "channels": 8, "num_classes": 6}
    module = kind("test_resnet", **options | ({"levels": (3, 5)} if kind is FPNDetector else {"head_width": 8}))
    trainer = Trainer(**QUIET | {"max_epochs": 1})
    trainer.fit(module, shapes)
    trainer.save_checkpoint(file := tmp_path / "snip.ckpt")
    restored = kind.load_from_checkpoint(file).eval()
    assert restored.trained_ranges == module.trained_ranges == LEARNED
    images = torch.randn(1, 3, 64, 64)
    restored.detect(images)
    restored.detect(images, views=[{"scale": 0.5, "valid_range": (30, None)}, {"scale": 2, "valid_range": (0, 40)}])
    message = r"views\[1\] \(scale 2\) is of objects of 40 pixels and more, but at a short side of 128 the model has "
    with pytest.raises(ValueError, match=message + "learned those of 0 to 32 pixels: give the views its ranges"):
        restored.detect(images, views=[{"valid_range": (0, 48)}, {"scale": 2, "valid_range": (40, None)}])
    with pytest.raises(
        ValueError, match="of objects of 0 to 30 pixels, but at a short side of 32 .* 32 pixels and more"
    ):
        restored.detect(images, views=[{"scale": 0.4, "valid_range": (0, 30)}, {}])


def test_a_run_without_valid_ranges_has_none(tmp_path):
    module = small()
    module.trained_ranges = LEARNED
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    loader = DataLoader([(pictures(1)[0], nothing)], 1, collate_fn=collate)
    trainer = Trainer(**QUIET | {"max_epochs": 1})
    trainer.fit(module, loader)
    trainer.save_checkpoint(file := tmp_path / "plain.ckpt")
    assert module.trained_ranges is None
    assert "trained_ranges" not in torch.load(file)
