"""Every usual form of a batch is understood, and every other one refused in one line."""

import pytest
import torch

from zoo import batch as batches

IMAGES = torch.rand(2, 3, 4, 4)
LABELS = torch.tensor([1, 0])


@pytest.mark.parametrize(
    "batch",
    [
        IMAGES,
        (IMAGES, LABELS),
        [IMAGES, LABELS],
        [IMAGES],
        {"image": IMAGES},
        {"pixel_values": IMAGES, "labels": LABELS},
    ],
)
def test_images_are_found(batch):
    assert batches.images(batch) is IMAGES


@pytest.mark.parametrize(
    "batch",
    [
        (IMAGES, LABELS),
        [IMAGES, LABELS.int()],
        {"image": IMAGES, "label": LABELS},
        {"images": IMAGES, "labels": LABELS},
    ],
)
def test_labels_are_found_as_int64(batch):
    images, labels = batches.images_and_labels(batch)
    assert images is IMAGES
    assert labels.dtype == torch.int64
    assert labels.tolist() == [1, 0]


def test_several_labels_an_image_keep_their_type():
    several = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    assert batches.images_and_labels((IMAGES, several))[1] is several


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.rand(3, 4, 4), r"expected images \(B, C, H, W\) in the batch, got a tensor of shape \(3, 4, 4\)"),
        ({"picture": IMAGES}, r"keys \['picture'\]: expected one of image, images, pixel_values"),
        ([], "got a list of 0"),
        ("photo.jpg", "got str"),
        ((torch.zeros(2, 3, 4, 4, dtype=torch.uint8), LABELS), "torch.uint8: normalised floats are expected"),
    ],
)
def test_what_holds_no_images_is_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        batches.images(batch)


@pytest.mark.parametrize("batch", [IMAGES, [IMAGES], {"image": IMAGES}])
def test_missing_labels_are_named(batch):
    with pytest.raises(ValueError, match="label"):
        batches.images_and_labels(batch)


def test_labels_are_optional():
    assert batches.has_labels((IMAGES, LABELS))
    assert batches.has_labels({"image": IMAGES, "labels": LABELS})
    assert not batches.has_labels(IMAGES)
    assert not batches.has_labels([IMAGES])
    assert not batches.has_labels({"image": IMAGES})
