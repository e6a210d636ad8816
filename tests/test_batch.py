"""Every usual form of a batch is understood, and every other one refused in one line."""

import pytest
import torch
from torchvision import tv_tensors

from zoo.common import batch as batches

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


# Targets.

TARGETS = [
    {"boxes": torch.tensor([[0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 3.0, 2.0]]), "labels": torch.tensor([4, 0])},
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "image_id": 7, "size": (4, 4)},
]


@pytest.mark.parametrize(
    "batch",
    [
        (IMAGES, TARGETS),
        [IMAGES, tuple(TARGETS)],
        (list(IMAGES), TARGETS),
        (tuple(IMAGES), tuple(TARGETS)),  # as torchvision's references collate
        {"image": IMAGES, "target": TARGETS},
        {"pixel_values": list(IMAGES), "targets": TARGETS, "names": ["a", "b"]},
    ],
)
def test_targets_are_found(batch):
    images, targets = batches.images_and_targets(batch)
    assert torch.equal(images, IMAGES)
    assert torch.equal(batches.images(batch), IMAGES)
    assert [target.keys() for target in targets] == [target.keys() for target in TARGETS]
    assert torch.equal(targets[0]["boxes"], TARGETS[0]["boxes"])
    assert targets[0]["labels"].tolist() == [4, 0]
    assert targets[1]["image_id"] == 7
    assert batches.has_targets(batch)


@pytest.mark.parametrize("batch", [IMAGES, [IMAGES], (IMAGES, LABELS), {"image": IMAGES}, list(IMAGES), (IMAGES, [])])
def test_targets_are_optional(batch):
    assert not batches.has_targets(batch)
    with pytest.raises(
        ValueError, match=r"expected \(images, targets\), a dict of boxes and labels for each image, got"
    ):
        batches.images_and_targets(batch)


def test_what_is_said_of_images_without_boxes_is_found_all_the_same():
    """As of images to predict: how large they were before they were resized."""
    about = [{"size": (4, 4), "orig_size": (8, 8), "image_id": 3}, {"size": (2, 4), "orig_size": (4, 8)}]
    batch = (IMAGES, about)
    assert batches.about_images(batch) == about
    assert batches.about_images({"images": IMAGES, "targets": TARGETS}) == TARGETS
    assert batches.about_images(IMAGES) == batches.about_images((IMAGES, LABELS)) == [{}, {}]
    assert not batches.has_targets(batch)
    with pytest.raises(
        ValueError, match=r"sample 0 of the batch \(image_id 3\) has the keys .*: expected tensors boxes"
    ):
        batches.images_and_targets(batch)
    with pytest.raises(ValueError, match="1 targets for 2 images"):
        batches.about_images((IMAGES, about[:1]))


def test_labels_become_int64_and_the_loaders_own_targets_stay_as_they_are():
    given = {"boxes": torch.zeros(0), "labels": torch.zeros(0)}  # what torch.tensor([]) is
    short = {"boxes": torch.rand(1, 4, dtype=torch.float64), "labels": torch.tensor([3], dtype=torch.uint8)}
    _, targets = batches.images_and_targets((IMAGES, [given, short]))
    assert targets[0]["boxes"].shape == (0, 4)
    assert targets[0]["boxes"].dtype == torch.float32
    assert [target["labels"].dtype for target in targets] == [torch.int64] * 2
    assert targets[1]["boxes"] is short["boxes"]
    assert given["boxes"].shape == (0,)


def target(**changed):
    return {"boxes": torch.rand(3, 4), "labels": torch.tensor([0, 1, 2])} | changed


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            target(boxes=torch.rand(3, 5)),
            r"the boxes of sample 1 of the batch are a tensor of shape \(3, 5\) and torch.float32: "
            r"expected \(n, 4\) floats, xyxy in pixels",
        ),
        (target(boxes=torch.rand(4)), r"boxes of sample 1 .* shape \(4,\)"),
        (target(boxes=torch.ones(3, 4, dtype=torch.int64)), r"and torch.int64: expected \(n, 4\) floats"),
        (
            target(boxes=tv_tensors.BoundingBoxes(torch.rand(3, 4), format="XYWH", canvas_size=(4, 4))),
            "in the format XYWH: expected",
        ),
        (
            target(labels=torch.tensor([1, 2]), image_id=42),
            r"the labels of sample 1 of the batch \(image_id 42\) are a tensor of shape \(2,\) and torch.int64: "
            r"expected \(3,\) integers from 0",
        ),
        (target(labels=torch.rand(3)), r"labels of .* and torch.float32: expected \(3,\) integers"),
        (target(labels=torch.ones(3, dtype=torch.bool)), r"and torch.bool: expected \(3,\) integers"),
        (target(boxes=torch.zeros(0)), r"shape \(3,\) and torch.int64: expected \(0,\) integers"),
        (target(boxes=[[0, 0, 1, 1]]), r"sample 1 of the batch has boxes as a list of 1: expected tensors boxes"),
        ({"bbox": torch.rand(3, 4), "labels": LABELS}, r"sample 1 of the batch has the keys \['bbox', 'labels'\]"),
        (target(iscrowd=torch.zeros(2)), r"iscrowd of sample 1 .* is a tensor of shape \(2,\): expected \(3,\)"),
    ],
)
def test_the_wrong_target_is_named_with_what_it_is(wrong, message):
    with pytest.raises(ValueError, match=message) as raised:
        batches.images_and_targets((IMAGES, [target(), wrong]))
    assert "\n" not in str(raised.value)


def test_as_many_targets_as_images_of_one_size():
    with pytest.raises(ValueError, match="1 targets for 2 images: expected one for each"):
        batches.images_and_targets((IMAGES, [target()]))
    uneven = [torch.rand(3, 4, 4), torch.rand(3, 4, 5)]
    with pytest.raises(ValueError, match=r"image 1 of the batch is \(3, 4, 5\), image 0 \(3, 4, 4\): .* pad them"):
        batches.images_and_targets((uneven, [target(), target()]))
    with pytest.raises(ValueError, match="torch.uint8: normalised floats"):
        batches.images_and_targets((list(IMAGES.to(torch.uint8)), [target(), target()]))


def test_targets_are_read_without_their_values():
    """On the meta device there are none: reading one, as a synchronisation with a device would, raises."""
    there = [{key: value.to("meta") for key, value in target(iscrowd=torch.zeros(3)).items()} for _ in range(2)]
    images, targets = batches.images_and_targets((IMAGES.to("meta"), there))
    assert images.device == targets[1]["labels"].device == torch.device("meta")
