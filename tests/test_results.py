"""Named results of what modules predict, without any preprocessing."""

import json
from typing import Any

import pytest
import torch

from zoo import FPNDetector, GaussianVAE, GumbelVAE, MAEPretrainer, ViTClassifier
from zoo.common.results import named_detections

VIT = {"backbone": "vit_tiny_patch16_224", "width": 12, "depth": 1, "heads": 2, "image_size": 32}


def classifier(classes: list[str] | None, **options: Any) -> ViTClassifier:
    module = ViTClassifier(num_classes=3, **VIT, **options).eval()
    module.classes = classes
    return module


def plain(results: Any) -> Any:
    """What JSON makes of results, which are plain data then."""
    return json.loads(json.dumps(results))


def test_a_classifiers_most_likely_classes_have_their_names():
    outputs = torch.tensor([[0.25, 0.5, 0.25], [0.125, 0.125, 0.75]])
    first, second = classifier(["cat", "dog", "eel"]).named_results(outputs, top=2)
    cat = {"label": "cat", "index": 0, "probability": 0.25}
    dog = {"label": "dog", "index": 1, "probability": 0.5}
    eel = {"label": "eel", "index": 2, "probability": 0.75}
    assert first == {**dog, "top": [dog, cat]}  # of equal ones the first
    assert second == {**eel, "top": [eel, {**cat, "probability": 0.125}]}
    assert plain([first, second]) == [first, second]
    assert [each["label"] for each in classifier(None).named_results(outputs)[0]["top"]] == ["1", "0", "2"]


def test_of_equal_probabilities_the_class_is_that_of_argmax():
    outputs = torch.randint(0, 3, (200, 3)).float() / 3
    found = classifier(["a", "b", "c"]).named_results(outputs)
    assert [each["index"] for each in found] == outputs.argmax(1).tolist()


def test_of_several_labels_those_above_their_thresholds_are_named():
    outputs = torch.tensor([[0.5, 0.75, 0.25], [0.25, 0.0, 0.125]])
    module = classifier(["red", "round", "small"], multi_label=True, loss="bce")
    assert [each["labels"] for each in module.named_results(outputs)] == [["red", "round"], []]
    module.use_thresholds(0.25)
    assert [each["labels"] for each in module.named_results(outputs)] == [["red", "round", "small"], ["red"]]
    module.use_thresholds({"small": 0.125, "round": 0.8})  # the other keeps 0.5
    found = module.named_results(outputs, top=1)
    assert [each["labels"] for each in found] == [["red", "small"], ["small"]]
    assert found[0]["top"] == [{"label": "round", "index": 1, "probability": 0.75}]
    assert plain(found) == found


@pytest.mark.parametrize(
    ("thresholds", "said"),
    [
        (1.5, r"threshold of red is 1.5: expected a number in \[0, 1\]"),
        (True, "threshold of red is True"),
        ({"red": float("nan")}, "threshold of red is nan"),
        ({"red": None}, "threshold of red is None"),
        ({"green": 0.5}, "threshold for green, which is no label: expected some of red, round, small"),
    ],
)
def test_what_is_no_threshold_is_refused(thresholds, said):
    with pytest.raises(ValueError, match=said):
        classifier(["red", "round", "small"], multi_label=True, loss="bce").use_thresholds(thresholds)
    with pytest.raises(ValueError, match="thresholds are for several labels"):
        classifier(["red", "round", "small"]).use_thresholds(thresholds)


def test_detections_have_the_names_and_the_numbers_of_the_data():
    module = FPNDetector("test_resnet", num_classes=2, channels=8, head_depth=1)
    detection = {
        "boxes": torch.tensor([[1.0, 2.0, 3.5, 4.0], [0.0, 0.0, 8.0, 8.0]]),
        "scores": torch.tensor([0.75, 0.5]),
        "labels": torch.tensor([1, 0]),
    }
    expected = {
        "boxes": [[1.0, 2.0, 3.5, 4.0], [0.0, 0.0, 8.0, 8.0]],
        "scores": [0.75, 0.5],
        "labels": ["1", "0"],
        "indices": [1, 0],
        "category_ids": [1, 0],
    }
    assert module.named_results([detection]) == [expected]
    module.classes, module.category_ids = ["disc", "box"], [18, 44]
    named = expected | {"labels": ["box", "disc"], "category_ids": [44, 18]}
    assert plain(module.named_results([detection], top=1)) == [named]  # all of them, whatever top is
    none = named_detections({key: value[:0] for key, value in detection.items()}, ["disc", "box"], None)
    assert none == {key: [] for key in expected}


def test_what_others_predict_is_a_tensor_for_each_image():
    images = torch.rand(3, 1, 8, 8).round()
    vae = GumbelVAE(categories=2, latents=2, image_size=8, hidden=(8,)).eval()
    codes = vae.predict_step(images, 0)
    assert [each["codes"].tolist() for each in vae.named_results(codes)] == codes.tolist()
    assert torch.equal(vae.reconstructions(images), vae.reconstruct(images))
    gaussian = GaussianVAE(latents=2, image_size=8, hidden=(8,)).eval()
    assert gaussian.named_results(gaussian.predict_step(images, 0))[2]["features"].shape == (2,)
    assert gaussian.reconstructions(images).shape == images.shape


def test_a_masked_autoencoders_reconstruction_keeps_what_is_visible_and_is_its_own_images_alone():
    module = MAEPretrainer(**VIT, decoder_dim=8, decoder_depth=1, decoder_heads=2).eval()
    images = torch.randn(3, 3, 32, 32)
    assert module.named_results(module.predict_step(images, 0))[0]["features"].shape == (12,)
    made = module.reconstructions(images)
    assert made.shape == images.shape
    patches = (made == images).unfold(2, 16, 16).unfold(3, 16, 16).all(-1).all(-1).all(1)  # (3, 2, 2)
    assert patches.flatten(1).sum(1).tolist() == [1, 1, 1]  # of four patches, one is visible: the same of each image
    assert torch.equal(patches[0], patches[2])
    assert torch.allclose(module.reconstructions(images[1:2]), made[1:2], atol=1e-5)
