"""Text in pictures, as it is drawn: what is written fits the image, and tells one class from another."""

import itertools

import pytest
import torch
from torch import Tensor

from zoo import ViTClassifier
from zoo.common import pictures

NAMES = [
    "0",
    "functional",
    "a very long name of a class that nobody would read to its end",
    "defect_of_the_type_a",
    "defect_of_the_type_b",
    "Überraschungsgröße",
    "Nai\u0308ve cafe\u0301",  # decomposed
    "Жираф",
    "αβγδ",
    "مرحبا",
    "猫",
    "नमस्ते",
    "two\nlines\tand a tab",
    "W" * 300,
    "",
    "\udce4",  # of a file's name that is no UTF-8
]
BOTH = [*itertools.combinations(range(len(NAMES)), 2), *((i, i) for i in range(len(NAMES)))]


def columns(strip: Tensor) -> list[int]:
    """The first and the last column of a strip (3, h, W) on which something is written."""
    written = strip.amax((0, 1)).gt(0.05).nonzero().flatten().tolist()
    return [written[0], written[-1]]


@pytest.mark.parametrize("size", [(28, 28), (224, 224), (96, 96), (8, 8), (20, 200), (200, 20)])
def test_every_caption_lies_within_its_tile(size):
    captions = [
        f"{pictures.legible_name(NAMES, predicted)}: {100 * (i + 1) // len(BOTH)}%"
        + (f"\nis {pictures.legible_name(NAMES, true)}" if predicted != true else "")
        for i, (predicted, true) in enumerate(BOTH)
    ]
    shown = pictures.displayable(torch.rand(1, 1, *size))
    drawn = pictures.captioned(torch.rand(len(BOTH), 1, *size), captions, [None] * len(BOTH))
    height, width = shown.shape[-2:]
    assert drawn.shape == (len(BOTH), 3, height + 2 * pictures.CAPTION_HEIGHT, width)
    for tile, caption in zip(drawn[:, :, height:], captions, strict=True):
        for line, text in zip(tile.split(pictures.CAPTION_HEIGHT, 1), caption.split("\n"), strict=False):
            first, last = columns(line)
            assert first >= 1, text
            assert last <= width - 2, text
            assert not line[:, -1].any(), text  # letters with a tail end above the next line
    assert not drawn[-1, :, height + pictures.CAPTION_HEIGHT :].any()  # a caption of one line leaves the other free


def test_a_name_and_its_score_are_apart():
    with_score = pictures.captioned(torch.zeros(1, 1, 28, 28), ["0: 91%"], [None])[0, :, -pictures.CAPTION_HEIGHT :]
    name = pictures.captioned(torch.zeros(1, 1, 28, 28), ["0"], [None])[0, :, -pictures.CAPTION_HEIGHT :]
    end = columns(name)[1]
    rest = with_score[:, :, end + 1 :].amax((0, 1)).gt(0.05)
    colon = rest.nonzero().flatten()[0].item()
    assert rest[colon : colon + 3].sum() <= 2  # as narrow as a colon
    assert not rest[colon + 2 : colon + 4].any()  # and free behind it


@pytest.mark.parametrize("width", range(0, 200, 7))
def test_what_is_too_long_loses_its_middle_and_keeps_its_score(width):
    for name in NAMES:
        text = f"{pictures.legible_name([name], 0)}: 100%"
        short = pictures.shortened(text, width)
        assert pictures._width(short) <= width
        assert short == text if pictures._width(text) <= width else len(short) < len(text)
        if pictures._width("100%") <= width:
            assert short.endswith("100%")
        if pictures._width(text) > width > pictures._width("…: 100%"):
            assert "…" in short


def test_names_that_differ_in_an_end_differ_when_they_are_short():
    for pair in (("defect_of_the_type_a", "defect_of_the_type_b"), ("a_defect_of_the_type", "b_defect_of_the_type")):
        short = {pictures.shortened(f"{name}: 50%", 90) for name in pair}
        assert len(short) == 2
        assert all("…" in text for text in short)


def test_names_whose_letters_the_font_lacks_are_told_by_number():
    assert pictures.legible_name(["猫", "犬"], 1) == "class 1"
    assert pictures.legible_name(["Überraschungsgröße"], 0) == "Überraschungsgröße"
    assert pictures.legible_name(["two\nlines"], 0) == "two lines"
    assert pictures.legible_name(["", " "], 1) == "class 1"


@pytest.mark.parametrize("size", [(28, 28), (64, 64), (224, 224), (512, 64), (64, 512)])
def test_every_label_of_a_box_lies_within_the_image(size):
    height, width = size
    images = torch.full((1, 3, *size), 0.5)
    images[..., -1, 0], images[..., -1, 1] = 0.0, 1.0  # what is shown is stretched to its full contrast
    rows = (0.0, 0.5) if height >= 64 else (0.0,)
    for (label, name), x, y in itertools.product(enumerate(NAMES), (0.0, 0.9), rows):
        box = torch.tensor([[x * width, y * height, (x + 0.1) * width, (y + 0.1) * height]])
        detection = {"boxes": box, "scores": torch.tensor([1.0]), "labels": torch.tensor([label])}
        (drawn,) = pictures.boxed(images, [detection], classes=NAMES)
        where = drawn[:, : drawn.shape[1] * 3 // 4]  # without the corner above
        text = (where.amax(0) < 0.3).any(0).nonzero().flatten()
        assert text[0] >= 1, (name, x, y)
        assert text[-1] <= drawn.shape[2] - 2, (name, x, y)


@pytest.mark.parametrize("classes", [None, ["a", "b", "c"]])
def test_a_class_beyond_the_datas_names_is_told_by_its_index(classes):
    assert [pictures.class_name(classes, index) for index in (2, 3, -1)] == ["2" if classes is None else "c", "3", "-1"]
    image = torch.rand(1, 1, 8, 8)
    box = {"boxes": torch.tensor([[1.0, 1, 5, 5]]), "scores": torch.ones(1), "labels": torch.tensor([9])}
    assert pictures.boxed(image, [box], [box], classes).isfinite().all()


def test_a_classifier_with_more_outputs_than_the_data_has_names_draws():
    module = ViTClassifier(
        "vit_tiny_patch16_224", num_classes=10, image_size=8, patch_size=4, in_channels=1, width=16, depth=1, heads=2
    )
    module.head.bias.data[7] = 100.0
    module.classes = ["ring", "disc", "star"]
    drawn = module.pictures((torch.rand(2, 1, 8, 8), torch.tensor([1, 7])))["predictions"]
    captions = pictures.captioned(torch.rand(2, 1, 8, 8), ["7: 100%\nis disc", "7: 100%"], [False, True])
    assert torch.equal(drawn[:, :, 96:], captions[:, :, 96:])
