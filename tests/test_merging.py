"""Merging of detections of several views: each method against worked answers and against a plain loop over boxes."""

import math

import pytest
import torch

from zoo.detection.postprocessing import non_maximum_suppression
from zoo.detection.scale import merging
from zoo.detection.scale.merging import iou, merge, nms, over_smaller, soft_nms, soft_vote, weighted_boxes

METHODS = ("nms", "soft_nms", "soft_vote", "weighted")


def boxes_of(*rows):
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def crowd(seed, count, classes=3, side=64, tied=False):
    """Boxes with whole coordinates, many of which overlap; scores on a grid of 1 / 8 where they are to be tied."""
    draw = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, side, (count, 2), generator=draw)
    sides = torch.randint(4, side // 2, (count, 2), generator=draw)
    scores = torch.randint(1, 8, (count,), generator=draw) / 8 if tied else torch.rand(count, generator=draw)
    labels = torch.randint(0, classes, (count,), generator=draw)
    return torch.cat([corners, corners + sides], 1).float(), scores, labels


def merged(boxes, scores, labels, method="nms", views=None, cut=None, **options):
    views = torch.zeros(len(boxes), dtype=torch.int64) if views is None else views
    cut = torch.zeros(len(boxes), dtype=torch.bool) if cut is None else cut
    settings = {"nms_threshold": 0.5, "score_threshold": 0.05, "max_detections": 100} | options
    return merge(boxes, scores, labels, views, cut, method, **settings)


def rows(found):
    """Detections as (label, score, x0, y0, x1, y1)."""
    listed = found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist()
    return [(label, score, *box) for label, score, box in zip(*listed, strict=True)]


def assert_same(found, expected):
    """Both hold the same detections, best first, whatever the order of those with equal scores."""
    assert found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True)
    assert len(found["labels"]) == len(expected)
    left = list(expected)
    for row in rows(found):
        near = [other for other in left if row == pytest.approx(other, abs=1e-4)]
        assert near, (row, left)
        left.remove(near[0])


# Two boxes of one class whose IoU is 0.8, a third beside them, and another class in the first one's place.
BOXES = boxes_of([0, 0, 10, 10], [0, 0, 10, 8], [20, 0, 30, 10], [0, 0, 10, 10])
SCORES, LABELS = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([1, 1, 1, 2])
ALONE = [(1, 0.7, 20, 0, 30, 10), (2, 0.6, 0, 0, 10, 10)]
BOTH = [(1, 0.9, 0, 0, 10, 10), (1, 0.8, 0, 0, 10, 8), *ALONE]
MEAN = (10 * 0.9 + 8 * 0.8) / 1.7


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        (nms, {}, [(1, 0.9, 0, 0, 10, 10), *ALONE]),
        (nms, {"threshold": 0.81}, BOTH),
        (soft_nms, {}, [(1, 0.9, 0, 0, 10, 10), (1, 0.8 * math.exp(-0.64 / 0.5), 0, 0, 10, 8), *ALONE]),
        (soft_nms, {"sigma": None}, [(1, 0.9, 0, 0, 10, 10), (1, 0.16, 0, 0, 10, 8), *ALONE]),
        (soft_nms, {"sigma": None, "threshold": 0.81}, BOTH),
        (soft_nms, {"sigma": None, "score_threshold": 0.2}, [(1, 0.9, 0, 0, 10, 10), *ALONE]),
        (soft_nms, {"sigma": None, "count": 1}, [(1, 0.9, 0, 0, 10, 10), (2, 0.6, 0, 0, 10, 10)]),
        (soft_vote, {}, [(1, 0.9, 0, 0, 10, MEAN), (1, 0.16, 0, 0, 10, 8), *ALONE]),
        (soft_vote, {"score_threshold": 0.17}, [(1, 0.9, 0, 0, 10, MEAN), *ALONE]),
        (soft_vote, {"threshold": 0.81}, BOTH),
        (weighted_boxes, {}, [(1, 0.85, 0, 0, 10, MEAN), *ALONE]),
        (
            weighted_boxes,
            {"view_count": 2},
            [(1, 0.85, 0, 0, 10, MEAN), (1, 0.35, 20, 0, 30, 10), (2, 0.3, 0, 0, 10, 10)],
        ),
        (
            weighted_boxes,
            {"view_count": 4, "threshold": 0.81},
            [(label, score / 4, *box) for label, score, *box in BOTH],
        ),
    ],
)
def test_worked_answers(method, options, expected):
    assert_same(method(BOXES, SCORES, LABELS, **options), expected)


def test_overlaps_are_those_of_worked_boxes():
    first, second = boxes_of([0, 0, 10, 10], [0, 0, 4, 4]), boxes_of([5, 0, 15, 10], [0, 0, 10, 10], [20, 20, 30, 30])
    torch.testing.assert_close(iou(first[:, None], second), torch.tensor([[1 / 3, 1, 0], [0, 0.16, 0]]))
    torch.testing.assert_close(over_smaller(first[:, None], second), torch.tensor([[0.5, 1, 0], [0, 1, 0]]))


# What the package ensemble_boxes 1.0.9 makes of these, at IoU 0.4; benchmarks/merging_parity.py compares at length.
CROWD = boxes_of(
    [30, 34, 55, 93],
    [10, 34, 37, 80],
    [24, 25, 74, 54],
    [28, 18, 59, 55],
    [39, 11, 69, 69],
    [18, 21, 45, 76],
    [27, 22, 78, 75],
    [13, 11, 37, 46],
    [10, 11, 55, 50],
)
SCORES_OF_CROWD = torch.tensor([0.61, 0.73, 0.64, 0.13, 0.1, 0.28, 0.58, 0.52, 0.94])
LABELS_OF_CROWD = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1, 0])


@pytest.mark.parametrize(
    ("method", "options", "scores"),
    [
        (nms, {"threshold": 0.4}, [0.61, 0.73, 0.64, None, 0.1, None, None, 0.52, 0.94]),
        (
            soft_nms,
            {"sigma": None, "threshold": 0.4},
            [0.61, 0.73, 0.64, 0.06117, 0.1, 0.16417, 0.29665, 0.52, 0.94],
        ),
        (soft_nms, {}, [0.5653, 0.68974, 0.64, 0.05475, 0.08165, 0.14022, 0.35608, 0.50129, 0.94]),
    ],
)
def test_scores_are_those_of_ensemble_boxes(method, options, scores):
    rows = zip(LABELS_OF_CROWD.tolist(), scores, CROWD.tolist(), strict=True)
    expected = [(label, score, *box) for label, score, box in rows if score is not None]
    assert_same(method(CROWD, SCORES_OF_CROWD, LABELS_OF_CROWD, **options), expected)


def test_fused_boxes_are_those_of_ensemble_boxes():
    found = weighted_boxes(CROWD, SCORES_OF_CROWD, LABELS_OF_CROWD, view_count=3, threshold=0.4)
    found["boxes"] = (found["boxes"] * 1000).round() / 1000
    assert_same(
        found,
        [
            (1, 0.45, 25.674, 23.037, 74.274, 63.119),
            (0, 0.33667, 12.218, 30.396, 39.218, 78.891),
            (0, 0.31333, 10, 11, 55, 50),
            (0, 0.20333, 30, 34, 55, 93),
            (1, 0.17333, 13, 11, 37, 46),
            (0, 0.03333, 39, 11, 69, 69),
        ],
    )


# The same by plain loops over boxes in float64, as the sources describe them.


def overlap_of(a, b, by_smaller=False):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    first, second = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return common / (min(first, second) if by_smaller else first + second - common)


def by_loops(merge_class, boxes, scores, labels):
    order = sorted(range(len(scores)), key=lambda i: -scores[i].item())
    found = []
    for label in sorted(set(labels.tolist())):
        chosen = [(scores[i].item(), *boxes[i].tolist()) for i in order if labels[i] == label]
        found += [(label, *row) for row in merge_class(chosen)]
    return found


def loop_nms(left, threshold, by_smaller):
    kept = []
    for row in left:
        if all(overlap_of(row[1:], other[1:], by_smaller) <= threshold for other in kept):
            kept.append(row)
    return kept


def loop_soft_nms(left, sigma, threshold, score_threshold, by_smaller=False):
    kept = []
    while left:
        best = max(left, key=lambda row: row[0])
        left.remove(best)
        if best[0] > score_threshold:
            kept.append(best)
        overlaps = [overlap_of(best[1:], row[1:], by_smaller) for row in left]
        if sigma is None:
            factors = [1 - overlap if overlap > threshold else 1 for overlap in overlaps]
        else:
            factors = [math.exp(-(overlap**2) / sigma) for overlap in overlaps]
        left = [(row[0] * factor, *row[1:]) for row, factor in zip(left, factors, strict=True)]
    return kept


def mean_of(group):
    total = sum(row[0] for row in group)
    return [sum(row[0] * row[side] for row in group) / total for side in range(1, 5)]


def loop_soft_vote(left, threshold, score_threshold, by_smaller=False):
    found = []
    while left:
        best = left[0]
        group = [row for row in left if overlap_of(best[1:], row[1:], by_smaller) >= threshold]
        left = [row for row in left if row not in group]
        found.append((best[0], *mean_of(group)))
        decayed = [(row[0] * (1 - overlap_of(best[1:], row[1:], by_smaller)), *row[1:]) for row in group[1:]]
        found += [row for row in decayed if row[0] >= score_threshold]
    return found


def loop_weighted_boxes(rows, view_count, threshold, by_smaller=False):
    groups = []
    for row in rows:
        overlaps = [overlap_of(mean_of(group), row[1:], by_smaller) for group in groups]
        if overlaps and max(overlaps) > threshold:
            groups[overlaps.index(max(overlaps))].append(row)
        else:
            groups.append([row])
    return [
        (sum(row[0] for row in group) / len(group) * min(len(group), view_count) / view_count, *mean_of(group))
        for group in groups
    ]


# No ratio of small whole numbers: there float32 and float64 may disagree about which is the larger.
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("overlap", [iou, over_smaller])
def test_methods_do_what_their_sources_describe(overlap, tied):
    smaller = overlap is over_smaller
    for seed in range(16):
        count = seed * 3 % 40
        made = crowd(seed, count, classes=1 + seed % 4, tied=tied)
        if tied:  # no box twice: the loops tell boxes by their values
            once = sorted({tuple(row): i for i, row in enumerate(made[0].tolist())}.values())
            made = tuple(part[once] for part in made)
        threshold, least = 0.3501, 0.0873
        found = nms(*made, threshold, overlap)
        assert_same(found, by_loops(lambda r, t=threshold: loop_nms(r, t, smaller), *made))
        for sigma in (0.5, None):
            found = soft_nms(*made, sigma, threshold, least, overlap=overlap)
            args = sigma, threshold, least, smaller
            assert_same(found, by_loops(lambda r, args=args: loop_soft_nms(r, *args), *made))
        found = soft_vote(*made, threshold, least, overlap)
        assert_same(found, by_loops(lambda r, t=threshold, s=least: loop_soft_vote(r, t, s, smaller), *made))
        found = weighted_boxes(*made, 3, threshold, overlap)
        assert_same(found, by_loops(lambda r, t=threshold: loop_weighted_boxes(r, 3, t, smaller), *made))


def test_nms_without_cut_boxes_is_that_of_a_detector():
    """Below and above the number of boxes from which torchvision keeps classes apart in another way."""
    for seed, (count, classes) in enumerate([(0, 1), (1, 1), (60, 3), (900, 2), (3000, 5)]):
        boxes, scores, labels = crowd(seed, count, classes, side=200)
        boxes = boxes.clamp(max=210)
        for limit in (5, 4000):
            expected = non_maximum_suppression(boxes, scores, labels, (210, 210), 0.05, 0.5, limit)
            found = merged(boxes, scores, labels, max_detections=limit)
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_nms_drops_what_is_above_its_threshold_and_the_vote_joins_what_reaches_it():
    """At IoU 0.5, and at 0.6, which float32 rounds up, and so does torchvision."""
    for height, threshold, kept in ((5, 0.5, 2), (6, 0.6, 1)):
        pair = boxes_of([0, 0, 10, 10], [0, 0, 10, height]), torch.tensor([0.9, 0.8]), torch.tensor([0, 0])
        assert len(nms(*pair, threshold)["scores"]) == kept
        assert len(soft_vote(*pair, threshold, 0.5)["scores"]) == 1
    for right, threshold, kept in ((15, 0.5, 2), (14, 0.6, 1)):
        pair = boxes_of([0, 0, 10, 10], [right - 10, 0, right, 10]), torch.tensor([0.9, 0.8]), torch.tensor([0, 0])
        assert len(nms(*pair, threshold, over_smaller)["scores"]) == kept


# Pieces that a tile's border cut.


def test_a_whole_box_takes_the_place_of_its_piece_whatever_the_scores():
    boxes = boxes_of([0, 0, 20, 20], [0, 0, 6, 20])  # IoU 0.3
    cut = torch.tensor([False, True])
    for method in METHODS:
        for scores in ([0.9, 0.8], [0.5, 0.8]):
            found = merged(boxes, torch.tensor(scores), torch.tensor([3, 3]), method, cut=cut)
            assert_same(found, [(3, scores[0], 0, 0, 20, 20)])
            found = merged(boxes, torch.tensor(scores), torch.tensor([3, 4]), method, cut=cut)
            assert_same(found, [(3, scores[0], 0, 0, 20, 20), (4, 0.8, 0, 0, 6, 20)])
            assert len(merged(boxes, torch.tensor(scores), torch.tensor([3, 3]), method)["scores"]) == 2


def test_a_piece_gives_way_to_a_smaller_whole_box_only_if_that_is_better():
    boxes, labels = boxes_of([2, 2, 6, 6], [0, 0, 20, 20]), torch.tensor([0, 0])
    cut = torch.tensor([False, True])
    for method in METHODS:
        assert len(merged(boxes, torch.tensor([0.2, 0.9]), labels, method, cut=cut)["scores"]) == 2
        assert_same(merged(boxes, torch.tensor([0.9, 0.2]), labels, method, cut=cut), [(0, 0.9, 2, 2, 6, 6)])


def test_of_pieces_alone_the_better_stays():
    boxes = boxes_of([0, 0, 20, 10], [12, 0, 20, 10], [19, 0, 39, 10])
    scores, labels, cut = torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3, dtype=torch.int64), torch.ones(3).bool()
    assert_same(merged(boxes, scores, labels, cut=cut), [(0, 0.9, 0, 0, 20, 10), (0, 0.7, 19, 0, 39, 10)])
    found = merged(boxes, scores, labels, "soft_nms", cut=cut)
    assert_same(
        found,
        [
            (0, 0.9, 0, 0, 20, 10),
            (0, 0.8 * math.exp(-1 / 0.5 - 0.125**2 / 0.5), 12, 0, 20, 10),
            (0, 0.7 * math.exp(-(0.05**2) / 0.5), 19, 0, 39, 10),
        ],
    )
    mean = [12 * 0.8 / 1.7, 0, 20, 10]
    for method, first in (("soft_vote", 0.9), ("weighted", 0.85)):
        assert_same(merged(boxes, scores, labels, method, cut=cut), [(0, first, *mean), (0, 0.7, 19, 0, 39, 10)])


@pytest.mark.parametrize("method", METHODS)
def test_pieces_change_nothing_among_whole_boxes(method):
    for seed in range(5):
        boxes, scores, labels = crowd(seed, 120)
        cut = torch.rand(120, generator=torch.Generator().manual_seed(seed)) < 0.4
        whole = merged(boxes[~cut], scores[~cut], labels[~cut], method, max_detections=1000)
        found = merged(boxes, scores, labels, method, cut=cut, max_detections=1000)
        assert set(rows(whole)) < set(rows(found))
        pieces = set(rows(found)) - set(rows(whole))
        for label, score, *box in pieces:
            for other, better, *holder in rows(whole):
                if other == label:
                    share = overlap_of(box, holder, by_smaller=True)
                    area, of_holder = ((b[2] - b[0]) * (b[3] - b[1]) for b in (box, holder))
                    assert share <= 0.5 or method in ("soft_vote", "weighted") or (of_holder < area and better < score)


# Properties.


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_candidates_does_not_matter(method):
    boxes, scores, labels = crowd(3, 200)
    cut, views = torch.arange(200) % 3 == 0, torch.arange(200) % 4
    expected = merged(boxes, scores, labels, method, views, cut)
    for seed in range(5):
        order = torch.randperm(200, generator=torch.Generator().manual_seed(seed))
        found = merged(boxes[order], scores[order], labels[order], method, views[order], cut[order])
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("method", METHODS)
def test_detections_are_within_their_candidates(method):
    for seed in range(5):
        boxes, scores, labels = crowd(seed, 150, tied=seed % 2 == 1)
        boxes = boxes * 1.37
        cut = torch.arange(150) % 5 == 0
        found = merged(boxes, scores, labels, method, torch.arange(150) % 3, cut, max_detections=60)
        assert {name: values.dtype for name, values in found.items()} == {
            "boxes": torch.float32,
            "scores": torch.float32,
            "labels": torch.int64,
        }
        assert len(found["scores"]) <= 60
        assert (found["scores"].diff() <= 0).all()
        assert 0 < found["scores"].min() <= found["scores"].max() <= scores.max()
        for label in labels.unique():
            ours, theirs = found["boxes"][found["labels"] == label], boxes[labels == label]
            assert (ours >= theirs.amin(0)).all()
            assert (ours <= theirs.amax(0)).all()
        if method != "weighted":
            assert found["scores"].min() >= 0.05


@pytest.mark.parametrize("method", METHODS)
def test_detections_keep_no_more_in_memory_than_they_are(method):
    for cut in (None, torch.arange(200) % 3 == 0):
        for values in merged(*crowd(1, 200), method, cut=cut, max_detections=5).values():
            assert values.untyped_storage().nbytes() == values.nbytes


def test_nms_of_what_nms_left_changes_nothing():
    for seed in range(10):
        once = nms(*crowd(seed, 150, tied=seed % 2 == 1), 0.4)
        twice = nms(**once, threshold=0.4)
        assert all(torch.equal(once[name], twice[name]) for name in once)
        once = nms(*crowd(seed, 150), 0.4, over_smaller)
        twice = nms(**once, threshold=0.4, overlap=over_smaller)
        assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.parametrize("method", METHODS)
def test_no_candidates_are_no_detections(method):
    for count, cut in ((0, None), (4, None), (4, torch.ones(4).bool()), (4, torch.arange(4) < 2)):
        boxes, _, labels = crowd(0, count)
        found = merged(boxes, torch.full((count,), 0.05), labels, method, cut=cut)
        assert {name: tuple(values.shape) for name, values in found.items()} == {
            "boxes": (0, 4),
            "scores": (0,),
            "labels": (0,),
        }
        assert (found["boxes"].dtype, found["labels"].dtype) == (torch.float32, torch.int64)
    lines = boxes_of([0, 0, 0, 10], [3, 5, 9, 5])  # what clipping left of boxes beside the image
    assert len(merged(lines, torch.tensor([0.9, 0.8]), torch.tensor([0, 0]), method)["scores"]) == 0


def test_weighted_boxes_count_the_views_that_found_nothing():
    boxes, scores, labels = boxes_of([0, 0, 9, 9]), torch.tensor([0.8]), torch.tensor([0])
    assert merged(boxes, scores, labels, "weighted")["scores"].item() == pytest.approx(0.8)
    found = merged(boxes, scores, labels, "weighted", views=torch.tensor([1]))
    assert found["scores"].item() == pytest.approx(0.4)
    found = merged(boxes, scores, labels, "weighted", views=torch.tensor([1]), view_count=4)
    assert found["scores"].item() == pytest.approx(0.2)


@pytest.mark.parametrize("method", METHODS)
def test_blocks_change_nothing_and_bound_the_pairs_in_memory(method, monkeypatch):
    made = [(crowd(seed, 300, side=128), torch.arange(300) % (2 + seed) == 0) for seed in range(3)]
    expected = [merged(*each, method, cut=cut, max_detections=1000) for each, cut in made]
    most, common = 0, merging._common

    def noted(first, second):
        nonlocal most
        found = common(first, second)
        most = max(most, found.numel())
        return found

    monkeypatch.setattr(merging, "_common", noted)
    monkeypatch.setattr(merging, "BLOCK", 13)
    for (each, cut), before in zip(made, expected, strict=True):
        found = merged(*each, method, cut=cut, max_detections=1000)
        assert all(torch.equal(found[name], before[name]) for name in before)
    assert 0 < most <= 300  # 13 * 13 pairs, or one box and all others


def test_a_chain_in_which_each_depends_on_the_last_is_followed_to_its_end():
    """Every second of 300 boxes stays, each of which overlaps the next by two thirds of it."""
    left = torch.arange(300.0) * 3
    boxes = torch.stack([left, left * 0, left + 9, left * 0 + 9], 1)
    found = nms(boxes, torch.linspace(0.9, 0.1, 300), torch.zeros(300, dtype=torch.int64), 0.5, over_smaller)
    assert torch.equal(found["boxes"], boxes[::2])


@pytest.mark.parametrize("method", METHODS)
def test_the_default_dtype_does_not_matter(method):
    """It is bfloat16 in steps of bf16-true, which counts to 256."""
    boxes = boxes_of([0, 0, 9, 9]).repeat(301, 1)
    boxes[:, 2] += torch.arange(301) / 1000
    made = boxes, torch.full((301,), 0.7), torch.zeros(301, dtype=torch.int64)
    expected = merged(*made, method)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = merged(*made, method)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_on_an_accelerator_detections_are_the_same(method):
    device, made = torch.accelerator.current_accelerator(), crowd(5, 300)
    cut = torch.arange(300) % 3 == 0
    expected = merged(*made, method, cut=cut)
    views = torch.zeros(300, dtype=torch.int64, device=device)
    found = merged(*(part.to(device) for part in made), method, views, cut.to(device))
    assert all(values.device.type == device.type for values in found.values())
    assert_same({name: values.cpu() for name, values in found.items()}, rows(expected))


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="unknown merge 'vote': expected one of nms, soft_nms, soft_vote, weighted$"):
        merged(*crowd(0, 3), "vote")
