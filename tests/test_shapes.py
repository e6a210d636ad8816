"""Rendered shapes: what is drawn is what is said of it, on any machine's worker, and each knob turns what it names."""

import hashlib
import math
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from torchvision.ops import box_area, box_iou, masks_to_boxes

from datamodules.loading.seeding import SeededBatches
from datamodules.reading import shape_images
from datamodules.reading.shape_images import CLASSES, Scene, ShapeSettings, outline, render
from datamodules.shapes import PRESETS, ShapeSamples, ShapesDetectionDataModule, only

SMALL = {"image_size": 64, "max_size": 51.2}


def scenes(count: int, seed: int = 0, **settings) -> list[Scene]:
    return [render(ShapeSettings(**SMALL | settings), seed, index) for index in range(count)]


def of_all(field: str, found: list[Scene]) -> np.ndarray:
    return np.concatenate([getattr(scene, field) for scene in found])


def masks(scene: Scene) -> torch.Tensor:
    """(n, S, S): the pixels that show each object."""
    return torch.from_numpy(scene.owner[None] == np.arange(len(scene.labels))[:, None, None])


def pixels(found: list[Scene]) -> np.ndarray:
    """How many each object has in the image: those that show it, by the share that is visible. nan if none is."""
    seen = np.concatenate([masks(scene).sum((1, 2)).numpy() for scene in found])
    visible = of_all("visible", found)
    return np.divide(seen, visible, out=np.full(len(seen), np.nan), where=visible > 0)


def sides(found: list[Scene]) -> np.ndarray:
    """The sizes of objects: of a whole one, what its pixels say, since neither stretching nor turning changes them."""
    unit = np.array([AREAS[name] for name in CLASSES])
    return np.sqrt(pixels(found) / unit[of_all("labels", found)])


def data(**options) -> ShapesDetectionDataModule:
    return ShapesDetectionDataModule(**{"image_size": 64, "train_size": 40, "batch_size": 8} | options)


def targets(module: ShapesDetectionDataModule, split: str = "train") -> list[dict]:
    samples = module.samples(split)
    return [samples[index][1] for index in range(len(samples))]


def sizes(module: ShapesDetectionDataModule, split: str = "train") -> np.ndarray:
    """The roots of the boxes' areas."""
    return torch.cat([target["area"] for target in targets(module, split)]).sqrt().numpy()


def digest(*images) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(image).tobytes() for image in images)).hexdigest()


# Image 2 of 64 pixels under seed 0, by means over 8x8 pixels and the three channels.
GOLDEN = {
    "index": 2,
    "classes": ["ring", "star", "ring", "ring", "plus", "triangle"],
    "boxes": [[21, 18, 64, 56], [14, 0, 56, 40], [11, 28, 47, 64], [16, 7, 39, 38], [33, 34, 61, 56], [1, 21, 12, 32]],
    "pixels": [424, 461, 539, 422, 340, 56],
    "visible": [0.432, 0.615, 0.703, 1.0, 1.0, 1.0],
    "truncated": [True, False, True, False, False, False],
    "means": [
        [126.9, 128.1, 106.0, 116.4, 105.8, 108.7, 108.8, 107.2],
        [127.0, 127.8, 124.4, 149.2, 122.8, 95.2, 143.3, 109.2],
        [130.4, 127.5, 135.6, 113.1, 146.9, 130.9, 136.7, 125.0],
        [164.9, 124.9, 140.5, 127.6, 156.7, 153.6, 123.5, 135.6],
        [122.2, 130.9, 170.1, 151.8, 166.5, 124.0, 108.7, 129.0],
        [123.6, 135.8, 165.6, 134.3, 133.8, 121.6, 117.3, 126.0],
        [126.9, 136.4, 160.6, 118.7, 143.0, 124.9, 127.3, 131.5],
        [128.1, 135.8, 165.5, 160.5, 180.8, 148.5, 128.6, 125.5],
    ],
}


# Outlines, against polygons of width 1 and points inside them by the even-odd rule.


def polygon(radii: list[float], first: float = 0.0) -> np.ndarray:
    """Corners at equal angles about (0, 0) from straight up (v points down), turned by `first` degrees."""
    angles = np.radians(first) + 2 * np.pi * np.arange(len(radii)) / len(radii)
    return np.stack([np.sin(angles), -np.cos(angles)], axis=1) * np.array(radii)[:, None]


CORNERS = {
    "square": polygon([1] * 4, first=45),
    "triangle": polygon([1] * 3),
    "plus": np.array(
        [[1, 3], [1, 1], [3, 1], [3, -1], [1, -1], [1, -3], [-1, -3], [-1, -1], [-3, -1], [-3, 1], [-1, 1], [-1, 3]]
    ),
    "star": polygon([2, 1] * 5),
}
POLYGONS = {name: corners / np.ptp(corners[:, 0]) for name, corners in CORNERS.items()}
HEIGHTS = dict.fromkeys(CLASSES, 1.0) | {
    "triangle": math.sqrt(3) / 2,
    "star": (1 + math.cos(math.radians(36))) / (2 * math.sin(math.radians(72))),
}


def polygon_area(corners: np.ndarray) -> float:
    (u, v), (u_next, v_next) = corners.T, np.roll(corners, -1, axis=0).T
    return abs((u * v_next - v * u_next).sum()) / 2


AREAS = {"disc": math.pi / 4, "ring": math.pi / 4 * 3 / 4}
AREAS |= {name: polygon_area(corners) for name, corners in POLYGONS.items()}


def inside_polygon(corners: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    inside = np.zeros(u.shape, bool)
    for (u0, v0), (u1, v1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if v0 != v1:
            inside ^= ((v0 <= v) != (v1 <= v)) & (u < u0 + (v - v0) * (u1 - u0) / (v1 - v0))
    return inside


@pytest.mark.parametrize("name", CLASSES)
def test_an_outline_is_that_of_its_name_in_a_square_of_side_1(name):
    step = 0.005
    u, v = np.meshgrid(*[np.arange(-1, 1, step) + step / 2] * 2)
    distance = outline(CLASSES.index(name), u, v)
    if name in POLYGONS:
        expected = inside_polygon(POLYGONS[name], u, v)
    else:
        expected = (np.hypot(u, v) < 0.5) & (np.hypot(u, v) > (0.25 if name == "ring" else -1))
    clear = np.abs(distance) > 1e-9
    assert np.array_equal(distance[clear] < 0, expected[clear])
    assert clear.mean() > 0.99
    inside = distance < 0
    width, height = (inside.any(axis=axis).sum() * step for axis in (0, 1))
    assert width == pytest.approx(1, abs=0.0101)
    assert height == pytest.approx(HEIGHTS[name], abs=0.0101)
    assert inside.sum() * step**2 == pytest.approx(AREAS[name], abs=0.005)
    farthest = np.hypot(u, v)[inside].max()
    assert farthest <= shape_images.REACH[CLASSES.index(name)] < farthest + 0.02


def test_distance_is_euclidean_next_to_an_edge():
    for label in range(len(CLASSES)):
        u, v = np.meshgrid(*[np.linspace(-1, 1, 401)] * 2)
        down, across = np.gradient(outline(label, u, v), 0.005)
        slope = np.hypot(down, across)[1:-1, 1:-1]
        assert np.median(slope) == pytest.approx(1, abs=0.01)  # but for creases, where two edges are equally near
        assert slope.max() < 1.05


# An image.


def test_an_image_is_a_function_of_seed_and_index():
    settings = ShapeSettings()
    first = [digest(*render(settings, 3, index)) for index in range(6)]
    assert [digest(*render(settings, 3, index)) for index in reversed(range(6))] == first[::-1]
    others = {digest(*render(settings, seed, index)) for seed, index in ((3, 6), (4, 0), (0, 3), (3, 2**62 + 1))}
    assert len({*first, *others}) == 10


def test_another_process_renders_the_same():
    program = (
        "import hashlib; from datamodules.reading.shape_images import ShapeSettings, render\n"
        "print(hashlib.sha256(b''.join(part.tobytes() for part in render(ShapeSettings(), 5, 7))).hexdigest())"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == digest(*render(ShapeSettings(), 5, 7))


def test_pixels_are_the_published_ones():
    """Across machines a pixel may differ by rounding, so means over 8x8 pixels are compared."""
    scene = render(ShapeSettings(image_size=64, max_size=51.2), 0, GOLDEN["index"])
    means = scene.image.astype(float).reshape(8, 8, 8, 8, 3).mean(axis=(1, 3, 4))
    assert np.abs(means - GOLDEN["means"]).max() < 1.5
    assert np.abs(scene.boxes - GOLDEN["boxes"]).max() <= 1
    assert [CLASSES[label] for label in scene.labels] == GOLDEN["classes"]
    np.testing.assert_allclose(np.bincount(scene.owner[scene.owner >= 0]), GOLDEN["pixels"], atol=3)
    np.testing.assert_allclose(scene.visible, GOLDEN["visible"], atol=0.02)
    assert scene.truncated.tolist() == GOLDEN["truncated"]


def test_boxes_are_those_of_the_masks_and_areas_those_of_the_boxes():
    count = 0
    for scene in scenes(80, occlusion=0.0):
        assert scene.image.shape == (64, 64, 3)
        assert scene.image.dtype == np.uint8
        expected = masks_to_boxes(masks(scene)) + torch.tensor([0, 0, 1, 1])  # its ends are the last pixels' numbers
        assert np.array_equal(scene.boxes, expected.numpy())
        assert np.array_equal(scene.area, box_area(expected).numpy())
        assert np.all(scene.visible == 1)
        count += len(scene.labels)
    assert count > 100


def test_modal_boxes_hold_what_is_visible_and_amodal_ones_all():
    narrower = 0
    for whole, seen in zip(scenes(60), scenes(60, boxes="modal"), strict=True):
        assert np.array_equal(whole.image, seen.image)
        assert np.array_equal(whole.area, box_area(torch.from_numpy(whole.boxes)).numpy())
        kept = whole.visible > 0
        assert np.array_equal(seen.boxes, (masks_to_boxes(masks(seen)) + torch.tensor([0, 0, 1, 1])).numpy())
        for field in ("labels", "visible", "area", "truncated"):
            assert np.array_equal(getattr(seen, field), getattr(whole, field)[kept])
        outer = whole.boxes[kept]
        assert np.all(outer[:, :2] <= seen.boxes[:, :2])
        assert np.all(outer[:, 2:] >= seen.boxes[:, 2:])
        narrower += np.any(outer != seen.boxes, axis=1).sum()
    assert narrower > 10


def test_what_nobody_sees_has_no_modal_box():
    hidden = [i for i, scene in enumerate(scenes(100, max_objects=30)) if np.any(scene.visible == 0)]
    assert hidden
    for index in hidden:
        scene = render(ShapeSettings(**SMALL, max_objects=30, boxes="modal"), 0, index)
        assert masks(scene).any((1, 2)).all()


def test_visible_is_the_share_of_a_square_that_a_smaller_one_leaves():
    """Two upright squares are rectangles of pixels: what one hides of the other follows from their boxes."""
    hidden = 0
    for scene in scenes(400, max_objects=2, rotation=0, shapes=3):
        if scene.labels.tolist() == [1, 1]:
            boxes = torch.from_numpy(scene.boxes)
            areas, union = box_area(boxes), box_iou(boxes, boxes)[0, 1]
            common = union * areas.sum() / (1 + union)
            np.testing.assert_allclose(scene.area, areas)
            np.testing.assert_allclose(scene.visible, [1 - common / areas[0], 1], atol=1e-5)
            hidden += bool(common > 0)
    assert hidden > 5


def test_visible_is_the_share_of_pixels_that_smaller_objects_leave(monkeypatch):
    """By the masks, as they are painted one over the other; the boxes that they fill in part say nothing."""
    painted = []
    paint = shape_images._paint

    def noted(rng, image, shape, *rest):
        painted.append(np.zeros(image.shape[1:], bool))
        painted[-1][shape.window] = shape.mask
        paint(rng, image, shape, *rest)

    monkeypatch.setattr(shape_images, "_paint", noted)
    hidden = 0
    for index in range(30):
        painted.clear()
        scene = render(ShapeSettings(**SMALL), 0, index)
        owner = np.full((64, 64), -1)
        for i, mask in enumerate(painted):
            owner[mask] = i
        assert np.array_equal(scene.owner, owner)
        shares = [(mask & (owner == i)).sum() / mask.sum() for i, mask in enumerate(painted)]
        np.testing.assert_allclose(scene.visible, shares, atol=1e-6)
        hidden += (scene.visible < 0.9).sum()
    assert hidden > 10


def test_larger_objects_lie_below():
    """Upright shapes that are not stretched are as wide as their size, give or take a pixel at either side."""
    count = 0
    for scene in scenes(60, rotation=0, aspect=1.0):
        width = (scene.boxes[:, 2] - scene.boxes[:, 0])[~scene.truncated]
        assert np.all(np.diff(width) <= 1)
        count += len(width)
        seen = masks(scene).any((1, 2)).numpy()
        assert np.array_equal(seen, scene.visible > 0)
        assert not len(seen) or scene.visible[-1] == 1
    assert count > 150


def test_truncated_shapes_end_at_the_edge_and_others_are_whole():
    found = scenes(300, max_objects=1, rotation=0, aspect=1.0, shapes=5)
    boxes, truncated = of_all("boxes", found), of_all("truncated", found)
    across, down = (np.any((boxes[:, axis::2] == 0) | (boxes[:, axis::2] == 64), axis=1) for axis in (0, 1))
    assert 15 < truncated.sum() < 150
    assert np.all((across | down)[truncated])
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    as_wide_as_high = of_all("labels", found) != CLASSES.index("triangle")
    assert np.all(np.abs(width - height)[as_wide_as_high & ~truncated] <= 1)
    for cut, other, chosen in ((width, height, across & ~down), (height, width, down & ~across)):
        lost = (other - cut)[chosen & truncated & as_wide_as_high]
        assert lost.min() >= 0
        assert 2 < lost.max() < 0.1 * 51.2 + 1  # the centre is 0.4 of the size from the edge or more


# Many images.


def test_sizes_are_log_uniform_and_the_same_for_every_class():
    found = scenes(500, max_objects=4)
    whole = ~of_all("truncated", found) & (of_all("visible", found) > 0)
    share = np.bincount(of_all("labels", found), minlength=6) / len(whole)
    assert np.all(np.abs(share - 1 / 6) < 0.04)
    # Few small shapes are truncated; among them sizes are as drawn.
    labels, size = of_all("labels", found)[whole], sides(found)[whole]
    small = size < 20
    drawn = np.sort(np.log(size[small] / 8) / math.log(20 / 8))
    assert np.abs(drawn - (np.arange(len(drawn)) + 0.5) / len(drawn)).max() < 1.63 / math.sqrt(len(drawn)) + 0.02
    for label in range(6):
        assert np.log(size[small & (labels == label)]).mean() == pytest.approx(np.log(size[small]).mean(), abs=0.1)


def test_a_size_is_the_side_of_the_box_whatever_the_class():
    found = scenes(200, min_size=24.0, max_size=24.0, max_objects=1, rotation=0, aspect=1.0)
    whole, labels = ~of_all("truncated", found), of_all("labels", found)
    boxes = of_all("boxes", found)
    for label, name in enumerate(CLASSES):
        width, height = (boxes[whole & (labels == label), 2:] - boxes[whole & (labels == label), :2]).T
        assert len(width) > 15
        for side, expected in ((width, 24), (height, 24 * HEIGHTS[name])):  # pointed corners lose a pixel each
            assert np.abs(side - expected).max() <= 2
            assert side.mean() == pytest.approx(expected, abs=1)
        assert pixels(found)[whole & (labels == label)].mean() == pytest.approx(24**2 * AREAS[name], rel=0.02)


def test_the_smallest_size_and_the_largest_are_kept():
    found = scenes(200, min_size=12.0, max_size=24.0)
    size = sides(found)[~of_all("truncated", found) & (of_all("visible", found) > 0)]
    assert 11.5 < size.min() < 13
    assert 23 < size.max() < 24.5


def test_colours_do_not_tell_the_class():
    found = scenes(500, max_objects=1, texture=0.0)
    labels = of_all("labels", found)
    color = np.array([scene.image[scene.owner >= 0].mean(axis=0) for scene in found])
    for label in range(6):
        assert np.abs(color[labels == label].mean(axis=0) - color.mean(axis=0)).max() < 25


def test_a_shape_too_small_to_tell_is_left_out():
    """The smallest shapes allowed, some of them so narrow that they miss the centres of their pixels."""
    covered = pixels(scenes(500, min_size=6.0, max_size=6.0, max_objects=4, aspect=4.0)).round()
    assert np.nanmin(covered) == 12


# Knobs.


def inner(mask: np.ndarray, by: int = 2) -> np.ndarray:
    """A mask without its margin."""
    padded = np.pad(mask, by)
    shifts = [np.roll(padded, (down, across), (0, 1)) for down in range(-by, by + 1) for across in range(-by, by + 1)]
    return np.logical_and.reduce(shifts)[by:-by, by:-by]


def deviations(found: list[Scene]) -> np.ndarray:
    """The standard deviation of the green inside each scene's largest object, in [0, 1]."""
    return np.array([scene.image[inner(scene.owner == 0), 1].std() / 255 for scene in found])


def test_texture_is_how_far_pixels_depart_from_their_mean():
    one = {"max_objects": 1, "min_size": 32.0}
    assert deviations(scenes(20, texture=0.0, **one)).max() < 0.002
    weak, strong = deviations(scenes(60, texture=0.1, **one)), deviations(scenes(60, texture=0.2, **one))
    assert 0.1 < (weak < 0.002).mean() < 0.4  # a fourth is flat
    assert np.median(weak[weak > 0.05]) == pytest.approx(0.1, abs=0.01)
    assert np.median(strong[strong > 0.1]) == pytest.approx(0.2, abs=0.02)


def test_a_texture_keeps_its_period_in_pixels_whatever_the_size():
    """Changes of level along a row, by pixel inside: as many in large objects as in small ones."""

    def changes(size: float) -> float:
        count = total = 0
        found = scenes(60, image_size=128, min_size=size, max_size=size, max_objects=1, texture=0.3, clutter=0)
        for scene in found:
            inside = inner(scene.owner == 0)
            inside &= np.roll(inside, 1, axis=1)
            level = scene.image[..., 1].astype(int)
            count += (np.abs(level - np.roll(level, 1, axis=1))[inside] > 20).sum()
            total += inside.sum()
        return count / total

    assert changes(80) == pytest.approx(changes(20), rel=0.4)


def contrasts(**settings) -> np.ndarray:
    """How far each object's colour is from the background's, in its best channel. One object an image."""
    found = scenes(80, max_objects=1, min_size=16.0, texture=0.0, clutter=0, **settings)
    colors = [
        [scene.image[where].mean(axis=0) for where in (inner(scene.owner == 0), scene.owner < 0)] for scene in found
    ]
    return np.array([np.abs(inside - outside).max() / 255 for inside, outside in colors])


def test_contrast_is_guarded():
    assert contrasts(contrast=0.5).min() > 0.4
    assert 0.2 < contrasts().min() < 0.35
    assert contrasts(contrast=0.0).min() < 0.2


def test_clutter_is_lines_on_the_background():
    def strange(**settings) -> float:
        found = scenes(30, max_objects=1, max_size=16.0, **settings)
        background = [scene.image[scene.owner < 0].astype(int) for scene in found]
        return float(np.mean([(np.abs(part - np.median(part, axis=0)).max(axis=1) > 90).mean() for part in background]))

    none, some, many = (strange(clutter=clutter) for clutter in (0, 6, 20))
    assert none < 0.01
    assert none + 0.02 < some < many - 0.02


def test_occlusion_is_how_much_of_a_shape_others_may_hide():
    for limit in (0.0, 0.3):
        visible = of_all("visible", scenes(60, occlusion=limit, max_objects=12))
        assert visible.min() >= 1 - limit - 1e-6
    assert visible.min() < 0.95
    assert of_all("visible", scenes(60, max_objects=12)).min() < 0.3


def test_max_objects_is_reached_and_not_exceeded():
    counts = [len(scene.labels) for scene in scenes(200, max_objects=5, max_size=16.0)]
    assert np.bincount(counts, minlength=6)[1:].min() > 20
    assert max(counts) == 5


def test_min_objects_is_reached():
    counts = [len(scene.labels) for scene in scenes(100, min_objects=3, max_objects=5, max_size=16.0)]
    assert np.bincount(counts, minlength=6)[3:].min() > 20
    assert (min(counts), max(counts)) == (3, 5)


def test_a_background_is_of_patches():
    """One as large as the image is the image's own background; smaller ones have a colour each."""

    def apart(patch_size: int | None, inner: slice, outer: slice) -> float:
        """How far the colours of two opposite corners are apart, in their best channel. Median over images."""
        found = scenes(30, max_objects=1, max_size=12.0, clutter=0, patch_size=patch_size)
        images = [np.median(np.stack([s.image[inner, inner], s.image[outer, outer]]), axis=(1, 2)) for s in found]
        return float(np.median([np.abs(np.diff(colors, axis=0)).max() for colors in images]))

    for whole, same in zip(scenes(5), scenes(5, patch_size=64), strict=True):
        assert np.array_equal(whole.image, same.image)
    assert apart(None, slice(16), slice(48, None)) < 40
    assert apart(32, slice(16), slice(48, None)) > 60
    assert apart(48, slice(16), slice(48, None)) > 60
    assert apart(48, slice(16), slice(32, 48)) < 40
    assert apart(200, slice(16), slice(48, None)) < 40


def test_aerial_images_have_hundreds_of_objects_on_a_background_as_a_small_image_has():
    sizes_of, densities = [], []
    for side in (512, 2048):
        module = data(preset="aerial", image_size=side)
        found = [render(module.settings, 0, index) for index in range(2048 // side)]
        densities += [len(scene.labels) * (1024 / side) ** 2 for scene in found]
        sizes_of += np.sqrt(of_all("area", found)).tolist()
        assert of_all("visible", found).min() == 1
        for scene in found:
            patches = scene.image.reshape(side // 128, 128, side // 128, 128, 3).astype(np.float32)
            assert patches.std(axis=(1, 3)).mean() < 0.6 * scene.image.std(axis=(0, 1)).mean()
    assert 14 <= min(densities) < max(densities) <= 50
    assert 11 < np.median(sizes_of) < 13
    assert np.quantile(sizes_of, 0.05) > 9
    assert np.quantile(sizes_of, 0.95) < 17
    counts = {size: data(preset="aerial", image_size=size).settings for size in (128, 1024, 4096, 8192)}
    found = {size: (settings.min_objects, settings.max_objects) for size, settings in counts.items()}
    assert found == {128: (1, 1), 1024: (16, 48), 4096: (256, 768), 8192: (1000, 1000)}
    assert data(preset="aerial", image_size=4096, max_objects=100).settings.min_objects == 100


def test_placing_looks_only_at_the_objects_below(monkeypatch):
    """Of 1000 objects each is asked for its pixels a few times, not by each that comes after it."""
    asked = 0

    class Counted(shape_images._Placed):
        @property
        def pixels(self) -> int:
            nonlocal asked
            asked += 1
            return self[4]

    monkeypatch.setattr(shape_images, "_Placed", Counted)
    thousand = {"min_objects": 1000, "max_objects": 1000, "min_size": 8.0, "max_size": 12.0}
    assert len(render(ShapeSettings(image_size=1024, **thousand), 0, 0).labels) > 900
    assert 3000 < asked < 10_000


@pytest.mark.parametrize("shapes", [3, 4, 5, 6])
def test_shapes_is_the_number_of_classes(shapes):
    assert set(of_all("labels", scenes(100, shapes=shapes))) == set(range(shapes))
    assert data(shapes=shapes).num_classes == shapes
    assert data(shapes=shapes).classes == list(CLASSES[:shapes])


def squares(**settings) -> tuple[np.ndarray, np.ndarray]:
    """(ratio of sides, pixels by the box's area) of the whole squares among single objects."""
    found = scenes(300, max_objects=1, **{"min_size": 16.0, "max_size": 32.0} | settings)
    chosen = (of_all("labels", found) == CLASSES.index("square")) & ~of_all("truncated", found)
    width, height = (of_all("boxes", found)[chosen, 2:] - of_all("boxes", found)[chosen, :2]).T
    return width / height, pixels(found)[chosen] / (width * height)


def test_aspect_stretches_and_rotation_turns():
    ratio, filled = squares(aspect=1.0, rotation=0.0)
    assert np.abs(ratio - 1).max() < 0.08
    assert filled.min() == 1
    ratio, filled = squares(aspect=3.0, rotation=0.0)
    assert 2 < ratio.max() < 3.3
    assert 2 < 1 / ratio.min() < 3.3
    assert filled.min() == 1
    ratio, filled = squares(aspect=1.0, rotation=180.0)
    assert np.abs(ratio - 1).max() < 0.1
    assert 0.45 < filled.min() < 0.6  # a square on its corner fills half of its box


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "medium"}, "unknown preset 'medium': expected one of easy, default, hard, tiny, huge"),
        ({"image_size": 16}, "image_size is 16: expected at least 32 pixels"),
        ({"min_size": 40.0, "max_size": 20.0}, "min_size is 40 and max_size 20: expected them to rise, from 6 or more"),
        ({"max_size": 65.0}, "max_size 65: .* to 64, the image_size, or less"),
        ({"min_size": 5.9}, "min_size is 5.9 .* from 6 or more"),
        ({"shapes": 2}, "shapes is 2: expected 3 to 6, of disc, square, triangle, ring, plus, star"),
        ({"shapes": 7}, "shapes is 7: expected 3 to 6"),
        ({"max_objects": 0}, "max_objects is 0: expected 1 to 1000"),
        ({"min_objects": 0}, "min_objects is 0: expected 1 to 8, the max_objects"),
        ({"min_objects": 9}, "min_objects is 9: expected 1 to 8, the max_objects"),
        ({"patch_size": 15}, "patch_size is 15: expected at least 16 pixels"),
        ({"clutter": -1}, "clutter is -1: expected 0 or more line segments"),
        ({"occlusion": 1.5}, "occlusion is 1.5: expected 0 to 1"),
        ({"texture": -0.1}, "texture is -0.1: expected 0 to 1"),
        ({"contrast": 0.6}, "contrast is 0.6: expected 0 to 0.5"),
        ({"rotation": 270.0}, "rotation is 270: expected 0 to 180"),
        ({"aspect": 0.5}, "aspect is 0.5: expected 1 to 4"),
        ({"aspect": math.nan}, "aspect is nan: expected 1 to 4"),
        ({"boxes": "tight"}, "unknown boxes 'tight': expected one of amodal, modal"),
        ({"held_out": (32.0, 16.0)}, r"held_out is \(32.0, 16.0\): expected a band .* from 8 to 51.2"),
        ({"held_out": (8.0, 64.0)}, "held_out is .* and not all"),
        ({"held_out": (60.0, 64.0)}, "held_out is .* leaves out some of the sizes"),
        ({"train_size": -1}, "train_size is -1: expected 0 to"),
        ({"images_seed": -1}, "images_seed is -1: expected 0 or more"),
        ({"cache_mb": -1}, "cache_mb is -1: expected 0 or more"),
    ],
)
def test_a_wrong_knob_is_named(options, message):
    with pytest.raises(ValueError, match=message) as raised:
        data(**options)
    assert "\n" not in str(raised.value)


# Presets.


def statistics(preset: str) -> dict[str, float]:
    found = data(preset=preset, image_size=128, train_size=100)
    settings = found.settings
    made = [render(settings, 0, index) for index in range(100)]
    return {
        "objects": len(of_all("labels", made)) / 100,
        "hidden": float((of_all("visible", made) < 0.9).mean()),
        "size": float(np.median(np.sqrt(of_all("area", made)))),
        "texture": float(np.median([scene.image[scene.owner >= 0].std() for scene in made])),
    }


def test_presets_are_what_they_say():
    easy, default, hard, tiny, huge = (statistics(preset) for preset in ("easy", "default", "hard", "tiny", "huge"))
    assert easy["objects"] < default["objects"] < hard["objects"]
    assert easy["hidden"] == 0 < default["hidden"] < hard["hidden"]
    assert easy["texture"] < default["texture"] < hard["texture"]
    assert 8 < tiny["size"] < 16 < default["size"] < 51.2 < huge["size"]
    assert data(preset="default").settings == data().settings


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("image_size", [32, 640])
def test_presets_suit_small_images_and_large_ones(preset, image_size):
    module = data(preset=preset, image_size=image_size, train_size=2)
    image, target = module.samples("train")[1]
    assert image.shape == (3, image_size, image_size)
    assert len(target["labels"])
    assert module.settings.max_size <= 256


def test_a_knob_wins_over_its_preset():
    settings = data(preset="easy", clutter=9, occlusion=0.5, min_size=9.0).settings
    assert (settings.clutter, settings.occlusion, settings.min_size) == (9, 0.5, 9.0)
    assert (settings.texture, settings.max_objects) == (0.0, 4)


# Sizes: ranges, and a band that training never sees.


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"image_size": 128},
            {"8_16": (0, 256), "16_32": (256, 1024), "32_64": (1024, 4096), "64_128": (4096, 128**2)},
        ),
        ({"image_size": 64}, {"8_16": (0, 256), "16_32": (256, 1024), "32_64": (1024, 64**2)}),
        ({"image_size": 64, "preset": "tiny"}, {"8_16": (0, 64**2)}),
        ({"image_size": 128, "preset": "huge"}, {"32_64": (0, 4096), "64_128": (4096, 128**2)}),
        (
            {"image_size": 64, "min_size": 6.0, "max_size": 20.0},
            {"4_8": (0, 64), "8_16": (64, 256), "16_32": (256, 4096)},
        ),
        ({"image_size": 64, "min_size": 16.0, "max_size": 16.0}, {"16_32": (0, 4096)}),
        ({"image_size": 400}, {"8_16", "16_32", "32_64", "64_128", "128_256"}),
    ],
)
def test_size_ranges_are_powers_of_two_that_hold_every_object(options, expected):
    found = data(**options).size_ranges
    assert (found if isinstance(expected, dict) else set(found)) == expected
    ends = list(found.values())
    assert ends[0][0] == 0
    assert ends[-1][1] == options["image_size"] ** 2
    assert all(one[1] == other[0] for one, other in pairwise(ends))


@pytest.mark.parametrize("boxes", ["amodal", "modal"])
def test_a_held_out_band_is_in_validation_and_test_and_not_in_training(boxes):
    module = data(held_out=(16.0, 32.0), boxes=boxes, train_size=300, val_size=100, test_size=100)
    train, val, test = (sizes(module, split) for split in ("train", "val", "test"))
    assert not np.any((train >= 16) & (train < 32))
    assert (train < 16).mean() > 0.3
    assert (train >= 32).mean() > 0.25
    for split in (val, test):
        assert 0.25 < np.mean((split >= 16) & (split < 32)) < 0.5
    plain = data(val_size=3)
    assert np.array_equal(plain.samples("val")[2][0], module.samples("val")[2][0])


def test_a_held_out_band_is_one_of_sizes_and_of_boxes():
    """A stretched and turned shape's box has another size than the shape; neither is in the band."""
    turned = {"aspect": 2.0, "rotation": 180.0}
    banned, free = scenes(150, without=(16.0, 32.0), **turned), scenes(150, **turned)

    def in_band(found: list[Scene]) -> tuple[float, float]:
        whole = ~of_all("truncated", found) & (of_all("visible", found) > 0)
        size, root = sides(found)[whole], np.sqrt(of_all("area", found))
        return np.mean((size > 17) & (size < 31)), np.mean((root >= 16) & (root < 32))

    assert in_band(banned) == (0, 0)
    assert min(in_band(free)) > 0.25


def test_a_band_at_the_end_of_the_sizes_can_be_held_out():
    assert sizes(data(held_out=(24.0, 99.0), train_size=100)).max() < 24
    assert sizes(data(held_out=(1.0, 24.0), train_size=100)).min() >= 24


# Samples.


def test_a_target_has_every_key():
    for target in targets(data(), "train"):
        n = len(target["boxes"])
        shapes = {key: (tuple(value.shape), value.dtype) for key, value in target.items() if torch.is_tensor(value)}
        assert shapes == {
            "boxes": ((n, 4), torch.float32),
            "labels": ((n,), torch.int64),
            "iscrowd": ((n,), torch.bool),
            "area": ((n,), torch.float32),
            "visible": ((n,), torch.float32),
            "truncated": ((n,), torch.bool),
        }
        assert target["size"] == target["orig_size"] == (64, 64)
    assert [target["image_id"] for target in targets(data())] == list(range(40))
    assert data().samples("val").names[3] == "shapes/val/3"


def test_hidden_objects_are_to_be_ignored():
    hidden = 0
    for target in targets(data(max_objects=16)):
        assert torch.equal(target["iscrowd"], target["visible"] < 0.4)
        hidden += int(target["iscrowd"].sum())
    assert hidden > 5


def test_an_image_in_which_nothing_finds_a_place_is_empty(monkeypatch):
    monkeypatch.setattr(shape_images, "ATTEMPTS", 0)
    image, target = data().samples("train")[0]
    assert image.shape == (3, 64, 64)
    assert target["boxes"].shape == (0, 4)
    assert all(target[key].shape == (0,) for key in ("labels", "iscrowd", "area", "visible", "truncated"))
    assert target["labels"].dtype == torch.int64


def test_splits_and_seeds_share_no_image():
    module, other = data(), data(images_seed=1)
    images = [module.samples(split)[i][0] for split in ("train", "val", "test") for i in range(20)]
    images += [other.samples("train")[i][0] for i in range(20)]
    assert len({digest(image) for image in images}) == 80
    assert torch.equal(data(seed=9).samples("val")[0][0], module.samples("val")[0][0])
    with pytest.raises(IndexError, match="sample 40 of 40"):
        module.samples("train")[40]


def test_the_cache_keeps_what_it_has_room_for():
    def samples(cache_mb: int) -> ShapeSamples:
        return ShapeSamples(ShapeSettings(**SMALL), size=200, cache_mb=cache_mb)

    some, none, room = samples(1), samples(0), 2**20 // (3 * 64**2)
    assert some[room - 1][0] is some[room - 1][0]
    assert some[room][0] is not some[room][0]
    assert torch.equal(some[room][0], some[room][0])
    some[0][1]["labels"] = None  # the dict is the caller's
    assert some[0][1]["labels"] is not None
    assert none[0][0] is not none[0][0]
    assert torch.equal(none[0][0], some[0][0])
    assert [data(**options).in_memory for options in ({}, {"cache_mb": 0}, {"fresh": True})] == [True, False, False]


def test_fresh_images_follow_from_seed_epoch_and_index():
    batches = SeededBatches(data(fresh=True).samples("train"), seed=0)

    def of(*keys):
        return [digest(image) for image, _ in batches[list(keys)]]

    assert of((0, 0, 1), (0, 0, 2)) == of((0, 0, 2), (0, 0, 1))[::-1]
    assert len({*of((0, 0, 1), (0, 0, 2), (1, 0, 1), (0, 1, 1))}) == 4
    assert of((0, 0, 1)) != [digest(data().samples("train")[1][0])]
    fixed = SeededBatches(data().samples("train"), seed=0)
    assert digest(fixed[[(0, 0, 1)]][0][0]) == digest(fixed[[(5, 1, 1)]][0][0])
    assert data(fresh=True).samples("val")[0][0].equal(data().samples("val")[0][0])


def test_only_some_objects_count():
    target = {
        "labels": torch.arange(4),
        "iscrowd": torch.tensor([False, False, True, False]),
        "visible": torch.tensor([1.0, 0.5, 0.2, 0.9]),
        "truncated": torch.tensor([True, False, False, False]),
    }
    assert only([target], visible=(0.9, 1))[0]["iscrowd"].tolist() == [False, True, True, False]
    assert only([target], visible=(0.4, 0.9))[0]["iscrowd"].tolist() == [True, False, True, True]
    assert only([target], truncated=False)[0]["iscrowd"].tolist() == [True, False, True, False]
    assert only([target], truncated=True)[0]["iscrowd"].tolist() == [False, True, True, True]
    assert target["iscrowd"].tolist() == [False, False, True, False]


# Batches.


def test_batches_are_images_and_targets():
    images, batch = next(iter(data(num_workers=0, image_size=40, hflip=0.5).train_dataloader()))
    assert images.shape == (8, 3, 64, 64)  # padded to a multiple of 32
    assert images.dtype == torch.uint8
    assert not images[:, :, 40:].any()
    assert images[:, :, :40, :40].float().std() > 20
    assert len(batch) == 8
    assert batch[0]["size"] == (40, 40)
    module = data(val_size=20, test_size=9)
    assert [len(batch) for _, batch in module.val_dataloader()] == [7, 7, 6]
    assert sum(len(batch) for _, batch in module.test_dataloader()) == 9
    assert sum(len(batch) for _, batch in module.predict_dataloader()) == 9
    assert data(val_size=0).val_dataloader() == []


@pytest.mark.parametrize("fresh", [False, True])
def test_the_number_of_workers_changes_nothing(fresh):
    def loaded(workers: int) -> list[tuple[int, str, str]]:
        loader = data(num_workers=workers, train_size=24, fresh=fresh, hflip=0.5).train_dataloader()
        found = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            for images, batch in loader:
                found += [(t["image_id"], digest(i), digest(t["boxes"])) for i, t in zip(images, batch, strict=True)]
        return found

    alone = loaded(0)
    assert len(alone) == 48
    assert len({image for _, image, _ in alone}) > 24  # flipped in one epoch and not in the other, or new
    assert loaded(2) == alone


def test_flipped_images_keep_their_boxes_tight():
    plain, flipped = data(hflip=0.0), data(hflip=1.0)
    for index in range(5):
        (image, target), (mirrored, moved) = plain.samples("train")[index], flipped.samples("train")[index]
        assert torch.equal(mirrored, image.flip(-1))
        left, top, right, bottom = target["boxes"].unbind(1)
        assert torch.equal(moved["boxes"], torch.stack([64 - right, top, 64 - left, bottom], dim=1))
        assert torch.equal(moved["visible"], target["visible"])
    assert torch.equal(flipped.samples("val")[0][0], plain.samples("val")[0][0])


def test_mean_and_std_are_the_training_pixels():
    module = ShapesDetectionDataModule(train_size=300)
    pixels = torch.stack([image for image, _ in (module.samples("train")[i] for i in range(300))]).float() / 255
    assert torch.tensor(module.mean).sub(pixels.mean((0, 2, 3))).abs().max() < 0.02
    assert torch.tensor(module.std).sub(pixels.std((0, 2, 3))).abs().max() < 0.01


def test_transforms_reach_the_training_images():
    plain = [image for image, _ in SeededBatches(data().samples("train"), seed=0)[[(0, 0, i) for i in range(4)]]]
    for options in ({"scale_jitter": (0.5, 0.6)}, {"iou_crop": 1.0}, {"photometric": 1.0}):
        samples = SeededBatches(data(**options).samples("train"), seed=0)
        changed = [image for image, _ in samples[[(0, 0, i) for i in range(4)]]]
        assert any(one.shape != other.shape or not one.equal(other) for one, other in zip(plain, changed, strict=True))
    sides = {images.shape[-1] for images, _ in data(short_sides=(32, 96), num_workers=0).train_dataloader()}
    assert sides == {32, 96}
    assert next(iter(data(pad_multiple=48, num_workers=0).train_dataloader()))[0].shape[-1] == 96
