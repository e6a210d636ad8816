"""Thresholds of several labels, tuned on validation data, of a linear classifier."""

import json
from statistics import mean
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from sklearn.metrics import f1_score
from torchmetrics.classification import BinaryPrecisionRecallCurve

from datamodules import DigitsDataModule
from zoo import ViTClassifier
from zoo.callbacks import TunedThresholds
from zoo.callbacks.thresholds import best_threshold
from zoo.common.backbones import Pixels

RARE: dict[str, Any] = {"split": "random", "labels": [8, 5, 9], "noise": 0.6, "batch_size": 100, "num_workers": 0}
QUIET: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
QUIET |= {"accelerator": "cpu", "enable_checkpointing": False}


def linear(labels: int = 3, several: bool = True) -> ViTClassifier:
    torch.manual_seed(0)
    settings = {"multi_label": several, "loss": "bce" if several else "cross_entropy"}
    return ViTClassifier(Pixels(64), num_classes=labels, image_size=8, in_channels=1, **settings)


def test_pixels_are_the_backbone_of_a_linear_classifier():
    model, images = linear(), torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(model(images), images.flatten(1) @ model.head.weight.T + model.head.bias)
    assert model.input_shape == (1, 8, 8)
    with pytest.raises(ValueError, match="expected pooled features"):
        model(torch.randn(4, 1, 9, 9))


@pytest.mark.parametrize("seed", range(20))
def test_the_best_threshold_is_that_of_all_there_are(seed):
    generator = np.random.default_rng(seed)
    labels = generator.random(40) < 0.3
    scores = np.round(generator.random(40) / 2 + labels / 4, 1 if seed % 2 else 6)  # every other time with ties
    labels[0] = True
    curve = BinaryPrecisionRecallCurve()
    curve.update(torch.from_numpy(scores).float(), torch.from_numpy(labels).int())
    threshold = best_threshold(*curve.compute()).item()
    everywhere = [f1_score(labels, scores >= other) for other in [*scores, *(scores + 1e-3), 0.0]]
    assert f1_score(labels, scores >= threshold) == pytest.approx(max(everywhere))


@pytest.mark.filterwarnings("ignore:No positive samples")
def test_a_label_without_positives_keeps_one_half():
    curve = BinaryPrecisionRecallCurve()
    curve.update(torch.rand(9), torch.zeros(9, dtype=torch.int))
    assert best_threshold(*curve.compute()).item() == 0.5


@pytest.mark.parametrize("labels", [[8], [8, 5, 9]])
def test_thresholds_are_tuned_on_validation_and_judged_on_test_data(labels):
    data, model = DigitsDataModule(**RARE | {"labels": labels}), linear(len(labels))
    callback = TunedThresholds()
    trainer = Trainer(max_epochs=2, callbacks=[callback], log_every_n_steps=1, **QUIET)
    trainer.fit(model, data)
    (found,) = trainer.test(model, data, verbose=False)
    judged = {}
    for split in ("val", "test"):
        samples = data.samples(split)
        images = data.on_after_batch_transfer((samples.images, samples.labels), 0)[0]
        judged[split] = model.eval().probabilities(images).detach().numpy(), samples.labels.numpy()
    thresholds = json.loads(callback.last_path.read_text())
    assert list(thresholds) == data.classes
    scores, truth = judged["val"]
    for label, threshold in enumerate(thresholds.values()):
        tuned = f1_score(truth[:, label], scores[:, label] >= threshold)
        every = [f1_score(truth[:, label], scores[:, label] >= other) for other in scores[:, label]]
        assert tuned == pytest.approx(max(every))
    scores, truth = judged["test"]
    tuned = [f1_score(truth[:, i], scores[:, i] >= t) for i, t in enumerate(thresholds.values())]
    assert found["test/f1_tuned"] == pytest.approx(mean(tuned), abs=1e-5)
    expected = f1_score(truth.ravel(), scores.ravel() > 0.5, zero_division=0)
    assert found["test/f1_micro"] == pytest.approx(expected, abs=1e-5)


def test_thresholds_are_for_several_labels_and_validation_data():
    trainer = Trainer(callbacks=[TunedThresholds()], **QUIET)
    with pytest.raises(ValueError, match="for a classifier of several labels: set multi_label, or leave it out"):
        trainer.test(linear(10, several=False), DigitsDataModule(num_workers=0), verbose=False)
    data = DigitsDataModule(**RARE)
    data.setup("test")
    trainer = Trainer(callbacks=[TunedThresholds()], **QUIET)
    with pytest.raises(ValueError, match="tunes on a data module's validation data, and there are none"):
        trainer.test(linear(), data.test_dataloader(), verbose=False)
