"""VisionTokenizer: sizes against Qwen2-VL's, pixels against its image processor, and what is refused."""

import warnings

import pytest
import torch
from torch.nn.functional import fold

from zoo.packed_vit import PackedViT, VisionTokenizer, patchify


def qwen():
    return pytest.importorskip("transformers.models.qwen2_vl.image_processing_qwen2_vl")


SIDES = (1, 5, 13, 14, 15, 27, 28, 41, 42, 43, 56, 70, 97, 98, 112, 140, 223, 224, 333, 512, 700, 1001, 1700, 2200)


@pytest.mark.parametrize(
    ("low", "high", "least"), [(56 * 56, 28 * 28 * 1280, 554), (28 * 28, 28 * 28 * 4, 340), (4096, 50_000, 548)]
)
def test_sizes_are_those_of_smart_resize(low, high, least):
    peer, tokenizer = qwen().smart_resize, VisionTokenizer(14, 2, min_pixels=low, max_pixels=high)
    equal = 0
    for height in SIDES:
        for width in SIDES:
            if max(height, width) > 200 * min(height, width):
                continue
            theirs, ours = peer(height, width, 28, low, high), tokenizer.sizes(height, width)
            if theirs[0] * theirs[1] <= high:  # theirs may leave their own range
                assert ours == theirs, (height, width)
                equal += 1
            else:
                assert ours[0] * ours[1] <= high
                assert min(ours) == min(theirs)
    assert equal >= least


def test_the_maximum_holds_for_all_sizes_and_ranges():
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        low, more, height, width = (int(n) for n in torch.randint(1, 400, (4,), generator=generator))
        tokenizer = VisionTokenizer((4, 6), min_tokens=low, max_tokens=low + more, max_aspect=1000)
        new = tokenizer.sizes(height, width)
        assert new[0] % 4 == new[1] % 6 == 0
        assert 24 <= new[0] * new[1] <= 24 * (low + more)


def test_tokens_are_pixels_in_patches():
    by_tokens = VisionTokenizer(14, 2, min_tokens=16, max_tokens=100)
    by_pixels = VisionTokenizer(14, 2, min_pixels=16 * 196, max_pixels=100 * 196)
    for size in ((10, 10), (300, 120), (130, 140), (2000, 2000)):
        assert by_tokens.sizes(*size) == by_pixels.sizes(*size)


def test_pixels_are_those_of_qwens_image_processor():
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    low, high = 28 * 28 * 4, 28 * 28 * 30
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((60, 90), (200, 300), (20, 31))]
    processor = qwen().Qwen2VLImageProcessor(size={"shortest_edge": low, "longest_edge": high})
    theirs = processor(images, return_tensors="pt")
    ours = VisionTokenizer(14, 2, min_pixels=low, max_pixels=high, mean=mean, std=std)(images)
    assert [[1, *grid] for grid in ours.grids] == theirs["image_grid_thw"].tolist()
    start = 0
    for rows, columns in ours.grids:
        part = slice(start, start + rows * columns)
        # theirs: tokens in blocks of 2x2, patches (channel, time, row, column), the frame twice
        blocks = theirs["pixel_values"][part].view(rows // 2, columns // 2, 2, 2, 3, 2, 14, 14)
        plain = blocks[:, :, :, :, :, 0].permute(0, 2, 1, 3, 5, 6, 4).flatten(4).flatten(0, 3)
        torch.testing.assert_close(ours.pixels[part], plain, atol=2e-6, rtol=0)
        start += rows * columns


def test_an_image_of_fitting_size_stays_as_it_is():
    image = torch.rand(3, 24, 40)
    found = VisionTokenizer(8)([image])
    assert found.grids == ((3, 5),)
    columns = found.pixels.view(15, 8, 8, 3).permute(3, 1, 2, 0).reshape(1, 3 * 64, 15)
    torch.testing.assert_close(fold(columns, (24, 40), 8, stride=8)[0], image, atol=0, rtol=0)


def test_a_batch_is_its_images_and_bytes_are_floats_in_the_unit_range():
    images = torch.randint(0, 256, (3, 3, 30, 50), dtype=torch.uint8)
    tokenizer = VisionTokenizer(8, max_tokens=12, mean=(0.5,), std=(0.25,))
    batch, each = tokenizer(images), tokenizer(list(images))
    assert batch.grids == each.grids == ((2, 4),) * 3
    torch.testing.assert_close(batch.pixels, each.pixels, atol=0, rtol=0)
    bare = VisionTokenizer(8, max_tokens=12)(images).pixels
    assert bare.dtype == torch.float32
    assert bare.min() >= 0
    assert bare.max() <= 1
    torch.testing.assert_close(batch.pixels, (bare - 0.5) / 0.25)
    floats = tokenizer([image / 255 for image in images])
    assert (floats.pixels - batch.pixels).abs().mean() < 0.01  # bytes are rounded and clipped when resized
    half = tokenizer([image.half() / 255 for image in images])
    assert half.pixels.dtype == torch.float16
    torch.testing.assert_close(half.pixels.float(), floats.pixels, atol=0.01, rtol=0)


def test_what_was_done_to_each_image_is_said():
    tokenizer = VisionTokenizer(16, 2, min_tokens=4, max_tokens=64)
    reports = tokenizer.report([(64, 96), (8, 16), (512, 256)])
    assert [each.new_size for each in reports] == [(64, 96), (32, 64), (160, 64)]
    assert [each.grid for each in reports] == [(4, 6), (2, 4), (10, 4)]
    assert [each.tokens for each in reports] == [24, 8, 40]
    assert reports[1].scale == (4.0, 4.0)
    assert reports[2].scale == (0.3125, 0.25)
    assert str(reports[2]) == "512x256 to 160x64, 40 tokens"
    assert tokenizer.report([torch.zeros(3, 512, 256)]) == (reports[2],)


def test_it_warns_once_of_images_that_shrink_by_more_than_half():
    tokenizer = VisionTokenizer(8, max_tokens=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer([torch.rand(1, 64, 64)])  # by half
    with pytest.warns(UserWarning, match=r"image 1 shrinks by more than half per side, from 80x80 to 32x32, 16 tokens"):
        tokenizer([torch.rand(1, 8, 8), torch.rand(1, 80, 80)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer([torch.rand(1, 90, 90)])


def test_a_network_takes_what_it_makes():
    network = PackedViT("vit_tiny_patch16_224", patch_size=8, width=24, depth=1, heads=2, image_size=32)
    tokenizer = VisionTokenizer(network.patch_size, min_tokens=4, max_tokens=20)
    images = [torch.rand(3, 40, 17), torch.rand(3, 9, 9), torch.rand(3, 16, 32)]
    features = network(tokenizer(images))
    assert features.shape == (3, 24)
    torch.testing.assert_close(features[2], network(patchify([images[2]], 8))[0], atol=1e-5, rtol=0)


def test_it_moves_with_its_module_and_leaves_no_trace_in_a_checkpoint():
    tokenizer = VisionTokenizer(8, mean=(0.5,), std=(0.5,))
    assert not tokenizer.state_dict()
    assert not list(tokenizer.parameters())
    assert tokenizer.to("meta")._mean.device.type == "meta"


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ((0, 10), {}, "image 1: an image of 0x10 has no pixels"),
        ((10, 2100), {}, "aspect of 210 to 1: expected at most max_aspect, 200"),
        ((3, 60), {}, "would have 0x8 patches, a side of none: set min_tokens"),
        ((3, 60), {"min_tokens": 1}, "would have 0x8 patches"),
        (
            (80, 80),
            {"max_tokens": 64, "resizes": False},
            "has 100 tokens, more than the 64 allowed: resize it to 64x64",
        ),
        ((81, 80), {"resizes": False}, "would have to be 80x80, with sides that are multiples of 8x8"),
        ((8, 8), {"resizes": False, "min_tokens": 4}, "would have to be 16x16, .*at least 4 tokens"),
    ],
)
def test_an_image_that_cannot_be_taken_is_named(size, options, expected):
    if options == {"min_tokens": 1}:
        assert VisionTokenizer(8, **options).sizes(*size) == (8, 40)
        return
    with pytest.raises(ValueError, match=expected):
        VisionTokenizer(8, **options)([torch.rand(3, 16, 16), torch.rand(3, *size)])


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ([], "there are no images"),
        (torch.rand(3, 16, 16), r"images are \(3, 16, 16\)"),
        ([torch.rand(16, 16)], r"image 0 is \(16, 16\): expected \(C, H, W\)"),
        ([torch.zeros(3, 16, 16, dtype=torch.int64)], "image 0 is torch.int64: expected uint8"),
        ([torch.rand(4, 16, 16)], "image 0 has 4 channels, mean 3 values"),
    ],
)
def test_images_of_no_known_form_are_refused(images, expected):
    with pytest.raises(ValueError, match=expected):
        VisionTokenizer(8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))(images)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"patch_size": 0}, "patch_size is 0"),
        ({"multiple": 0}, "multiple 0"),
        ({"max_aspect": 0.5}, "max_aspect 0.5"),
        ({"min_tokens": 4, "max_pixels": 4096}, "there are tokens and pixels"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9, max_tokens 8"),
        ({"multiple": 2, "max_tokens": 3}, "a max_tokens of at least 4, the smallest image"),
        ({"max_pixels": 100}, "a max_pixels of at least 196"),
        ({"mean": (0.5,)}, "mean is .*, std None: expected both"),
        ({"mean": (0.5,), "std": (0.0,)}, "std of positive numbers"),
    ],
)
def test_settings_that_make_no_tokenizer_are_refused(options, expected):
    with pytest.raises(ValueError, match=expected):
        VisionTokenizer(**options)
