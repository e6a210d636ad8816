"""Augmentation against closed forms and against torchvision and timm, which do the same for one image."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from datamodules.transforms import (
    affine,
    batches,
    binarize,
    erase,
    eval_transform,
    flip,
    normalize,
    to_float,
    train_transform,
    warp,
)

POLICIES = ["rand-m9-mstd0.5-inc1", "rand-m9-n3-p0.7-mmax20-t3aw", "original", "originalr-mstd0.5", "v0", "v0r", "3a"]
POLICIES += ["augmix-m5-w4-d2", "augmix-b1"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seed_all(seed: int) -> None:
    torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)


def picture(width: int = 60, height: int = 40, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture
def images():
    return torch.rand(6, 3, 8, 8, generator=seeded(0))


def warped(images: torch.Tensor, angle=0.0, shift=(0.0, 0.0), zoom=1.0, shear=0.0, **options) -> torch.Tensor:
    """The same map for each image of a batch."""
    count = len(images)
    one = {
        "angle": torch.full((count,), angle),
        "zoom": torch.full((count,), zoom),
        "shear": torch.full((count,), shear),
    }
    return warp(images, shift=torch.tensor([shift] * count), **one, **options)


# On the device: flip.


def test_flip_always_and_never(images):
    assert torch.equal(flip(images, 1.0, seeded(0)), images.flip(-1))
    assert torch.equal(flip(images, 0.0, seeded(0)), images)


def test_flip_mirrors_whole_images_at_the_rate_asked_for():
    images = torch.arange(2.0).view(1, 1, 1, 2).repeat(4000, 3, 5, 1)
    flipped = flip(images, 0.3, seeded(1))
    rows = flipped[:, 0, 0, 0]
    assert torch.equal(flipped, torch.where(rows.view(-1, 1, 1, 1).bool(), images.flip(-1), images))
    assert rows.mean().item() == pytest.approx(0.3, abs=3 * math.sqrt(0.3 * 0.7 / 4000))


# On the device: affine.


def test_affine_of_nothing_changes_nothing(images):
    torch.testing.assert_close(affine(images, generator=seeded(0)), images)


@pytest.mark.parametrize(("right", "down"), [(1, 0), (0, 1), (-3, 2)])
def test_a_shift_by_whole_pixels_is_a_roll_with_zeros_behind(images, right, down):
    padded = torch.nn.functional.pad(images, (8, 8, 8, 8))
    expected = padded[..., 8 - down : 16 - down, 8 - right : 16 - right]
    torch.testing.assert_close(warped(images, shift=(right / 8, down / 8)), expected)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_quarter_turn_is_rot90(images, turns):
    torch.testing.assert_close(warped(images, angle=-90.0 * turns), images.rot90(turns, (-2, -1)))


def test_zoom_by_two_shows_the_middle():
    images = torch.zeros(1, 1, 8, 8)
    images[..., 2:6, 2:6] = 1
    assert warped(images, zoom=2.0)[..., 1:7, 1:7].min() == 1
    assert warped(images, zoom=0.5).sum() == pytest.approx(images.sum().item() / 4, rel=0.01)


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (16, 5)])
@pytest.mark.parametrize(
    ("angle", "shift", "zoom", "shear"),
    [
        (30.0, (0.0, 0.0), 1.0, 0.0),
        (0.0, (0.1, -0.2), 1.3, 0.0),
        (0.0, (0.0, 0.0), 1.0, 25.0),
        (-70.0, (-0.3, 0.1), 0.6, -15.0),
    ],
)
def test_warp_is_torchvisions_affine(size, angle, shift, zoom, shear):
    images = torch.rand(2, 3, *size, generator=seeded(0))
    pixels = [shift[0] * size[1], shift[1] * size[0]]
    expected = F.affine(images, angle, pixels, zoom, [shear, 0.0], F.InterpolationMode.BILINEAR)
    torch.testing.assert_close(warped(images, angle, shift, zoom, shear), expected, rtol=0, atol=1e-5)


def test_each_image_has_parameters_of_its_own_within_the_ranges():
    ramp = torch.arange(64.0).view(1, 1, 1, 64).expand(500, 1, 64, 64)
    shifted = affine(ramp, translate=0.25, generator=seeded(0))[:, 0, 32, 32] - ramp[:, 0, 32, 32]
    assert shifted.abs().max().item() <= 0.25 * 64 + 1e-3
    assert shifted.unique().numel() > 450
    assert shifted.std().item() == pytest.approx(0.25 * 64 / math.sqrt(3), rel=0.1)  # of a uniform distribution
    zoomed = affine(ramp, scale=(0.5, 2.0), generator=seeded(0))[:, 0, 32]
    slope = (zoomed[:, 34] - zoomed[:, 30]) / 4  # 1 / zoom
    assert 0.49 < slope.min() < 0.55
    assert 1.8 < slope.max() < 2.01


@pytest.mark.parametrize("option", [{"degrees": 20}, {"translate": 0.2}, {"scale": (0.7, 0.9)}, {"shear": 20}])
def test_each_affine_option_changes_images(images, option):
    assert not torch.allclose(affine(images, **option, generator=seeded(0)), images, atol=0.01)


def test_fill_and_border_surround_the_image():
    images = torch.full((2, 1, 8, 8), 0.5)
    shift = {"shift": (0.5, 0.0)}
    assert warped(images, **shift)[..., :4].eq(0).all()
    torch.testing.assert_close(warped(images, **shift, fill=0.25)[..., :4], torch.full((2, 1, 8, 4), 0.25))
    torch.testing.assert_close(warped(images, **shift, border=True), images)


def test_warp_keeps_its_aim_in_low_precision():
    images = torch.rand(2, 1, 224, 224, generator=seeded(0)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moved = warped(images, shift=(0.5, 0.0))
    torch.testing.assert_close(moved[..., 112:], images[..., :112], rtol=0.01, atol=1e-4)


# On the device: binarize.


def test_the_threshold_is_one_half_and_belongs_to_the_ones():
    levels = to_float(torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16))
    assert torch.equal(binarize(levels), (levels * 255 >= 128).float())
    halves = torch.tensor([0.0, 0.5 - 2**-25, 0.5, 1.0]).view(1, 1, 2, 2)
    assert binarize(halves).flatten().tolist() == [0.0, 0.0, 1.0, 1.0]


def test_the_draw_is_one_as_often_as_the_intensity_says_in_each_pixel_and_channel_on_its_own():
    intensity = torch.tensor([0.1, 0.5, 0.8]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    drawn = binarize(intensity.expand(20_000, 3, 2, 2), True, seeded(0))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    deviation = (intensity[0] * (1 - intensity[0]) / 20_000).sqrt()
    assert ((drawn.mean(0) - intensity[0]).abs() < 4 * deviation).all()
    correlations = torch.corrcoef(drawn.flatten(1).T) - torch.eye(12)
    assert correlations.abs().max() < 4.5 / math.sqrt(20_000)


@pytest.mark.parametrize("draw", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_black_and_white_stay_black_and_white(draw, dtype):
    images = (torch.rand(20, 3, 64, 64, generator=seeded(0)) < 0.5).to(dtype)
    assert torch.equal(binarize(images, draw, seeded(1)), images)


def test_jitter_moves_what_is_near_the_threshold_as_often_as_uniform_noise_does():
    values = torch.tensor([0.3, 0.45, 0.5, 0.55, 0.7]).view(1, 1, 1, 5)
    ones = binarize(values.expand(40_000, 1, 1, 5), generator=seeded(0), jitter=0.1).mean((0, 1, 2))
    assert ones[[0, 4]].tolist() == [0.0, 1.0]  # out of its reach
    assert torch.allclose(ones[1:4], torch.tensor([0.25, 0.5, 0.75]), atol=0.01)
    assert torch.equal(binarize(values, jitter=0.0), binarize(values))


# On the device: erase.


def test_erased_areas_and_shapes_are_as_asked():
    images = torch.full((2000, 1, 40, 60), 99.0)
    out = erase(images, 1.0, seeded(0), area=(0.1, 0.3), aspect=(0.5, 2.0))
    inside = (out != images)[:, 0]
    rows, columns = inside.any(2).sum(1), inside.any(1).sum(1)
    assert torch.equal(inside.sum((1, 2)), rows * columns)  # one rectangle each, without holes
    share, aspect = rows * columns / 2400, rows / columns
    assert 0.09 < share.min() < 0.11
    assert 0.29 < share.max() < 0.31
    assert share.mean().item() == pytest.approx(0.2, abs=0.01)
    assert 0.45 < aspect.min() < 0.6
    assert 1.7 < aspect.max() < 2.2
    assert aspect.log().mean().item() == pytest.approx(0, abs=0.05)
    assert inside.any(0).all()  # every corner is reached


def test_what_is_erased_is_normal_noise_and_the_rest_is_untouched():
    images = torch.full((400, 3, 32, 32), 99.0)
    out = erase(images, 0.25, seeded(0))
    touched = (out != images).flatten(1).any(1)
    assert touched.float().mean().item() == pytest.approx(0.25, abs=0.07)
    assert torch.equal(out[~touched], images[~touched])
    noise = out[out != images]
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert torch.equal((out != images)[:, 0], (out != images)[:, 2])  # all channels alike, each with its own noise
    assert not torch.equal(out[touched][:, 0], out[touched][:, 2])


def test_erase_never_and_where_no_rectangle_fits():
    images = torch.rand(50, 3, 8, 8)
    assert torch.equal(erase(images, 0.0, seeded(0)), images)
    assert torch.equal(erase(images, 1.0, seeded(0), area=(1.0, 1.0), aspect=(1.0, 1.0)), images)


# On the device: all of them.

AUGMENTATIONS = {
    "flip": lambda images, generator=None: flip(images, 0.5, generator),
    "affine": lambda images, generator=None: affine(images, 20, 0.1, (0.9, 1.1), 10, generator),
    "draw": lambda images, generator=None: binarize(images, True, generator),
    "jitter": lambda images, generator=None: binarize(images, False, generator, 0.2),
    "erase": lambda images, generator=None: erase(images, 0.8, generator),
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_generator_decides_and_nothing_else(images, name):
    augment = AUGMENTATIONS[name]
    global_state = torch.get_rng_state()
    first, again, other = (augment(images, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), global_state)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_images_of_a_batch_are_treated_differently(name):
    one = torch.rand(1, 3, 16, 16, generator=seeded(0))
    out = AUGMENTATIONS[name](one.expand(64, -1, -1, -1).clone(), seeded(0))
    assert len(out.flatten(1).unique(dim=0)) > (1 if name == "flip" else 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_dtype_and_shape_are_kept(name, dtype):
    out = AUGMENTATIONS[name](torch.rand(3, 1, 9, 7).to(dtype), seeded(0))
    assert out.dtype == dtype
    assert out.shape == (3, 1, 9, 7)


@pytest.mark.parametrize("name", [*AUGMENTATIONS, "threshold", "normalize", "to_float"])
def test_compiles_without_graph_breaks(images, name):
    others = {
        "threshold": binarize,
        "normalize": lambda images: normalize(images, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)),
        "to_float": to_float,
    }
    augment = (AUGMENTATIONS | others)[name]
    torch._dynamo.reset()
    compiled = torch.compile(augment, fullgraph=True, backend="eager")
    torch.manual_seed(0)
    expected = augment(images)
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(images), expected)


def test_to_float_is_from_0_to_1():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    out = to_float(levels)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, F.to_dtype(levels, torch.float32, scale=True))
    assert out.min() == 0
    assert out.max() == 1


def test_normalize_is_torchvisions(images):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    torch.testing.assert_close(normalize(images, mean, std), F.normalize(images, mean, std))
    torch.testing.assert_close(normalize(images, (0.5,), (0.25,)), images * 4 - 2)
    assert normalize(images.bfloat16(), mean, std).dtype == torch.bfloat16


def test_normalize_refuses_a_wrong_number_of_channels():
    with pytest.raises(
        ValueError, match=r"mean has 3 values, but images have 1 channel\(s\): expected one each, or one"
    ):
        normalize(torch.rand(2, 1, 4, 4), (0.1, 0.2, 0.3), (1.0,))


def test_normalizing_first_in_inference_mode_leaves_training_intact():
    batches._constant.cache_clear()
    with torch.inference_mode():
        normalize(torch.rand(1, 1, 2, 2), (0.5,), (0.5,))
    images = torch.rand(1, 1, 2, 2, requires_grad=True)
    normalize(images, (0.5,), (0.5,)).sum().backward()
    assert torch.equal(images.grad, torch.full_like(images, 2.0))


# In the worker: evaluation.


@pytest.mark.parametrize(("width", "height"), [(60, 40), (40, 61), (33, 33), (300, 40)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest", "lanczos"])
def test_evaluation_is_resize_and_centre_crop(width, height, interpolation):
    image = picture(width, height)
    mode = v2.InterpolationMode(interpolation)
    expected = v2.Compose([v2.Resize(36, mode), v2.CenterCrop(32), v2.PILToTensor()])(image)
    assert torch.equal(eval_transform(32, 32 / 36.5, interpolation)(image), expected)


def test_evaluation_of_a_size_that_is_not_square_keeps_the_aspect():
    circle = np.hypot(*np.mgrid[-50:50, -50:50]) < 40
    image = Image.fromarray((circle * 255).astype(np.uint8)).convert("RGB")
    out = eval_transform((40, 80), 0.5)(image)  # 160 pixels wide to cover 80 x 160; the middle 40 rows are kept
    assert out.shape == (3, 40, 80)
    assert (out[0, 20] > 127).sum() == 80
    assert (eval_transform((80, 40), 1.0)(image)[0, :, 20] > 127).sum() == pytest.approx(64, abs=1)


def test_whole_image_at_crop_ratio_1():
    image = picture(32, 32)
    assert torch.equal(eval_transform(32, 1.0)(image), F.pil_to_tensor(image))


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1)])
def test_extremely_long_images_do_not_fill_the_memory(size):
    assert eval_transform(256, 1.0)(Image.new("RGB", size)).shape == (3, 256, 256)
    assert train_transform(256, scale=None)(Image.new("RGB", size)).shape == (3, 256, 256)


# In the worker: training.


def test_random_resized_crop_is_torchvisions():
    image = picture()
    seed_all(3)
    out = train_transform((24, 32), scale=(0.2, 0.7), ratio=(0.5, 2.0))(image)
    seed_all(3)
    mode = v2.InterpolationMode.BICUBIC
    expected = v2.RandomResizedCrop((24, 32), (0.2, 0.7), (0.5, 2.0), mode)(image)
    assert torch.equal(out, F.pil_to_tensor(expected))


def test_without_scale_square_images_are_only_resized():
    image = picture(40, 40)
    out = train_transform(16, scale=None)(image)
    assert torch.equal(out, F.pil_to_tensor(image.resize((16, 16), Image.Resampling.BICUBIC)))


def test_without_scale_the_crop_moves_along_the_long_side():
    ramp = Image.fromarray(np.tile(np.arange(160, dtype=np.uint8), (32, 1)))
    lefts = {int(train_transform(32, scale=None)(ramp)[0, 0, 0]) for _ in range(400)}
    assert min(lefts) < 4
    assert max(lefts) > 124
    assert max(lefts) <= 128


def test_padding_is_the_crop_of_cifar():
    image = Image.new("L", (8, 8), 255)
    black = [(train_transform(8, scale=None, padding=2)(image) == 0).sum().item() for _ in range(300)]
    assert min(black) == 0
    assert max(black) == 64 - 36  # two rows and two columns


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_policy_changes_images_and_repeats_for_a_seed(policy, mode):
    image = picture(mode=mode)
    transform, plain = train_transform(32, scale=None, auto_augment=policy), train_transform(32, scale=None)
    changed = 0
    for seed in range(8):
        seed_all(seed)
        first = transform(image)
        seed_all(seed)
        assert torch.equal(transform(image), first)
        seed_all(seed)
        changed += not torch.equal(plain(image), first)
        assert first.dtype == torch.uint8
        assert first.shape == (3 if mode == "RGB" else 1, 32, 32)
    assert changed >= 4


def test_three_augment_is_grey_solarized_or_blurred():
    """DeiT III, section 3.2: one of the three, each as often."""
    image = picture(32, 32)
    transform = train_transform(32, scale=None, auto_augment="3a")
    pixels = F.pil_to_tensor(image)
    kinds = {"grey": 0, "solarized": 0, "blurred": 0}
    for _ in range(300):
        out = transform(image)
        if (out[0] == out[1]).all():
            kinds["grey"] += 1
        elif torch.equal(out, torch.where(pixels < 128, pixels, 255 - pixels)):
            kinds["solarized"] += 1
        else:
            kinds["blurred"] += 1
    assert min(kinds.values()) > 70


@pytest.mark.parametrize("policy", ["rand-m10-n1-p1-inc1", "rand-m1-n1-p1", "v0"])
def test_posterizing_to_no_bits_leaves_black(policy):
    """Which Pillow 13 raises for, in one image of a hundred or so."""
    image, black = Image.new("RGB", (8, 8), (100, 100, 100)), 0
    transform = train_transform(8, scale=None, auto_augment=policy)
    for seed in range(200):
        seed_all(seed)
        black += not transform(image).any()
    assert black > 0


def test_fill_is_what_rotations_uncover():
    image = Image.new("RGB", (32, 32), "white")
    corners = set()
    for _ in range(200):
        out = train_transform(
            32, scale=None, auto_augment="rand-m10-n1-p1", fill=(0.2, 0.4, 0.6), interpolation="nearest"
        )(image)
        corners.add(tuple(out[:, 0, 0].tolist()))
    assert (51, 102, 153) in corners


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_color_jitter_changes_brightness_within_its_range(mode):
    image = Image.new(mode, (8, 8), "#646464" if mode == "RGB" else 100)
    levels = [train_transform(8, scale=None, color_jitter=0.3)(image).float().mean().item() for _ in range(200)]
    assert 69 <= min(levels) < 80
    assert 120 < max(levels) <= 131


@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
def test_interpolation_matters_in_training(interpolation):
    image = picture(50, 50)
    assert not torch.equal(
        train_transform(16, None, interpolation=interpolation)(image), train_transform(16, None)(image)
    )


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"auto_augment": "randm9"},
            "unknown auto_augment 'randm9': expected rand, augmix, original, .*3a.*; did you mean rand?",
        ),
        ({"auto_augment": "rand-m9-std0.5"}, "unknown setting 'std0.5', rand takes those like m9, n9, p0.5, mstd0.5"),
        ({"auto_augment": "rand-mstdinf"}, "unknown setting 'mstdinf'"),
        ({"auto_augment": "rand-m9.5"}, "unknown setting 'm9.5'"),
        ({"auto_augment": "rand-m15-n2"}, "'rand-m15-n2': a magnitude above 10 needs a higher limit, add -mmax15"),
        ({"auto_augment": "rand-m25-mmax20"}, "a magnitude above 10 needs a higher limit, add -mmax25"),
        ({"auto_augment": "3a-m9"}, "'3a-m9': unknown setting 'm9', 3a takes those like mstd0.5"),
        (
            {"interpolation": "cubic"},
            "unknown interpolation 'cubic': expected one of nearest, bilinear, bicubic, lanczos",
        ),
        ({"scale": (0.5, 0.1)}, "scale is .* expected two shares"),
        ({"scale": (0.0, 1.0)}, "scale is"),
        ({"ratio": (2.0, 1.0)}, "ratio is"),
        ({"padding": 4}, "padding is 4, but padding goes with a plain random crop only: set scale to null"),
        ({"scale": None, "padding": -1}, "padding is -1"),
        ({"color_jitter": -0.1}, "color_jitter is -0.1"),
    ],
)
def test_wrong_choices_are_named_with_what_would_work(options, message):
    with pytest.raises(ValueError, match=message) as error:
        train_transform(32, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [0, (4,), (3, -1)])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(ValueError, match=r"image_size is .* expected a side in pixels"):
        eval_transform(size)


@pytest.mark.parametrize("crop_ratio", [0, 1.5])
def test_impossible_crop_ratios_are_refused(crop_ratio):
    with pytest.raises(ValueError, match="crop_ratio is"):
        eval_transform(32, crop_ratio)
