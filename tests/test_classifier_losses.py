"""Losses of the classifiers: weights of classes and positives, modules, what is logged, and what checkpoints keep."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from datamodules import DigitsDataModule
from zoo import EfficientNetClassifier, ViTClassifier, weights
from zoo.callbacks import EMA
from zoo.common.classification_losses import classification_loss
from zoo.common.label_weights import LabelWeights
from zoo.losses import LOSSES, SmoothAPLoss, SoftFBetaLoss

QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
QUIET |= {"accelerator": "cpu", "enable_checkpointing": False, "max_epochs": 1}
VIT = {"backbone": "vit_tiny_patch16_224", "width": 12, "depth": 1, "heads": 2, "image_size": 16, "patch_size": 8}
NET = {"phi": -6, "image_size": 32}
CLASSIFIERS = {ViTClassifier: VIT, EfficientNetClassifier: NET}


def make(kind: type = ViTClassifier, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(**CLASSIFIERS[kind] | {"num_classes": 3, "in_channels": 1} | options)


class LabelledPixels(LightningDataModule):
    """Images whose labels, by default four of class 0, two of class 1 and one of class 2, are told by a bright row."""

    def __init__(self, labels: Any = (0, 1, 0, 2, 0, 1, 0), side: int = 16, classes: list[str] | None = None) -> None:
        super().__init__()
        self.labels, self.classes = torch.as_tensor(labels), classes
        generator = torch.Generator().manual_seed(3)
        self.images = torch.randn(len(self.labels), 1, side, side, generator=generator)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(list(zip(self.images, self.labels, strict=True)), 4)

    val_dataloader = test_dataloader = train_dataloader


class CountedPixels(LabelledPixels):
    def class_counts(self) -> list[int]:
        if self.labels.ndim > 1:
            return self.labels.sum(0).tolist()
        return torch.bincount(self.labels, minlength=len(self.classes or ())).tolist()

    def sample_count(self) -> int:
        return len(self.labels)


SEVERAL = [[1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 0, 0]]


# Weights.


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_weighted_cross_entropy_is_torchs(smoothing, soft):
    logits, weights = torch.randn(6, 3), torch.tensor([0.2, 1.0, 5.0])
    labels = torch.randn(6, 3).softmax(1) if soft else torch.tensor([0, 1, 2, 2, 1, 0])
    found = classification_loss(logits, labels, "cross_entropy", smoothing, weights)
    expected = nn.CrossEntropyLoss(weights, label_smoothing=0.0 if soft else smoothing)(logits, labels)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("kind", "factor"), [("bce", 1), ("sigmoid", 3)])
def test_weighted_binary_cross_entropy_is_torchs(kind, factor):
    logits, weights, positives = torch.randn(6, 3), torch.tensor([0.2, 1.0, 5.0]), torch.tensor([3.0, 0.5, 1.0])
    labels = torch.randint(2, (6, 3))
    found = classification_loss(logits, labels, kind, class_weight=weights, pos_weight=positives)
    expected = nn.BCEWithLogitsLoss(weights, pos_weight=positives)(logits, labels.float())
    torch.testing.assert_close(found, factor * expected)


def test_a_batch_of_classes_that_weigh_nothing_has_no_loss_and_no_gradient():
    logits = torch.randn(2, 3, requires_grad=True)
    loss = classification_loss(logits, torch.tensor([1, 1]), "cross_entropy", class_weight=torch.tensor([1.0, 0, 1]))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_weights_of_one_change_nothing():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    for kind in ("cross_entropy", "bce", "sigmoid"):
        plain, weighted = (classification_loss(logits, labels, kind, 0.1, each) for each in (None, torch.ones(3)))
        torch.testing.assert_close(plain, weighted)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_both_classifiers_train_with_their_weights(kind):
    module = make(kind, class_weight=[0.2, 1.0, 5.0]).eval()
    images, labels = torch.randn(4, 1, *[module.hparams.image_size] * 2), torch.tensor([0, 1, 2, 2])
    expected = F.cross_entropy(module(images), labels, torch.tensor([0.2, 1.0, 5.0]))
    torch.testing.assert_close(module.training_step((images, labels), 0), expected)
    several = make(kind, multi_label=True, loss="bce", pos_weight=3.0).eval()
    targets = torch.tensor(SEVERAL[:4])
    positives = torch.full((3,), 3.0)
    expected = F.binary_cross_entropy_with_logits(several(images), targets.float(), pos_weight=positives)
    torch.testing.assert_close(several.training_step((images, targets), 0), expected)


def test_balanced_classes_weigh_the_same_in_sum_and_one_in_the_mean():
    module = make(class_weight="balanced")
    Trainer(**QUIET).fit(module, CountedPixels())
    weights = module.label_weights.classes
    torch.testing.assert_close(weights, torch.tensor([7 / 12, 7 / 6, 7 / 3]))  # images / (classes * images of it)
    labels = CountedPixels().labels.numpy()
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32))


def test_a_class_that_never_occurs_weighs_nothing_and_the_others_as_without_it():
    module = make(num_classes=5, class_weight="balanced")
    Trainer(**QUIET).fit(module, CountedPixels())
    torch.testing.assert_close(module.label_weights.classes, torch.tensor([7 / 12, 7 / 6, 7 / 3, 0, 0]))


def test_balanced_positives_weigh_what_the_negatives_do():
    module = make(multi_label=True, loss="bce", pos_weight="balanced", class_weight="balanced")
    Trainer(**QUIET).fit(module, CountedPixels(SEVERAL))
    # Of five images all have the first label, two the second, none the third.
    assert module.label_weights.positives.tolist() == [1, 1.5, 1]
    torch.testing.assert_close(module.label_weights.classes, torch.tensor([7 / 10, 7 / 4, 0]))


def test_balance_is_matched_to_the_models_classes_by_name():
    module = make(class_weight="balanced")
    module.classes = ["c", "a", "b"]
    Trainer(**QUIET).fit(module, CountedPixels(classes=["a", "b", "c"]))
    torch.testing.assert_close(module.label_weights.classes, torch.tensor([7 / 3, 7 / 12, 7 / 6]))


def test_ema_keeps_the_balance_as_it_is():
    module = make(class_weight="balanced")
    Trainer(callbacks=[EMA(0.9)], **QUIET).fit(module, CountedPixels())
    torch.testing.assert_close(module.label_weights.classes, torch.tensor([7 / 12, 7 / 6, 7 / 3]))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_weights_stay_float32(precision):
    module = make(class_weight="balanced").to({"bf16-true": torch.bfloat16, "16-true": torch.float16}[precision])
    module.label_weights.balance(module, CountedPixels())
    assert module.label_weights.classes.dtype == torch.float32


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_state_dicts_have_the_balance_and_nothing_else_of_losses(kind):
    plain = list(make(kind).state_dict())
    assert list(make(kind, class_weight=[1.0, 2.0, 3.0]).state_dict()) == plain
    assert list(make(kind, loss=nn.CrossEntropyLoss()).state_dict()) == plain
    balanced = list(make(kind, class_weight="balanced").state_dict())
    assert sorted(set(balanced) - set(plain)) == ["label_weights.classes"]
    several = make(kind, multi_label=True, loss="bce", pos_weight="balanced")
    assert sorted(set(several.state_dict()) - set(plain)) == ["label_weights.positives"]


def test_the_balance_comes_back_for_testing_without_the_data(tmp_path):
    module, data = make(class_weight="balanced"), CountedPixels()
    trainer = Trainer(**QUIET)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "balanced.ckpt")
    expected = trainer.test(module, data, verbose=False)
    again = ViTClassifier.load_from_checkpoint(tmp_path / "balanced.ckpt", weights_only=True)
    assert Trainer(**QUIET).test(again, data.test_dataloader(), verbose=False) == expected
    fresh = make(class_weight="balanced")
    path = str(tmp_path / "balanced.ckpt")
    assert Trainer(**QUIET).test(fresh, data.test_dataloader(), ckpt_path=path, verbose=False) == expected


def test_a_continued_run_keeps_its_balance_and_a_new_one_makes_its_own(tmp_path):
    module, other = make(class_weight="balanced"), CountedPixels([0, 1, 2, 2, 2, 2])
    trainer = Trainer(**QUIET)
    trainer.fit(module, CountedPixels())
    trainer.save_checkpoint(tmp_path / "balanced.ckpt")
    before = module.label_weights.classes.clone()
    again = make(class_weight="balanced")
    Trainer(**QUIET | {"max_epochs": 2}).fit(again, other, ckpt_path=str(tmp_path / "balanced.ckpt"))
    assert torch.equal(again.label_weights.classes, before)
    Trainer(**QUIET).fit(again, other)
    torch.testing.assert_close(again.label_weights.classes, torch.tensor([2.0, 2.0, 0.5]))


def test_balance_that_nobody_has_counted_is_refused():
    module = make(class_weight="balanced")
    with pytest.raises(ValueError, match="class_weight 'balanced' needs a data module that counts"):
        module.training_step((torch.randn(2, 1, 16, 16), torch.tensor([0, 1])), 0)
    with pytest.raises(ValueError, match="class_weight 'balanced' needs a data module that counts"):
        Trainer(**QUIET).validate(module, CountedPixels(), verbose=False)


class UnlabelledPixels(CountedPixels):
    def class_counts(self):
        raise ValueError("UnlabelledPixels has no labels")


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (LabelledPixels(), "class_weight 'balanced' needs a data module that counts the labels of its training data"),
        (LabelledPixels().train_dataloader(), "class_weight 'balanced' needs a data module that counts the labels"),
        (CountedPixels([0, 1, 5]), "has 3 labels of 6 classes, and num_classes is 3"),
        (UnlabelledPixels(), "class_weight 'balanced': UnlabelledPixels has no labels"),
    ],
)
def test_data_that_cannot_be_balanced_is_one_line(data, message, known):
    module = make(class_weight="balanced")
    if known:  # from another run, which this one does not continue
        module.label_weights.balance(module, CountedPixels())
    with pytest.raises(ValueError, match=message) as error:
        Trainer(**QUIET).fit(module, data)
    assert "give numbers, one for each class" in str(error.value)
    assert "\n" not in str(error.value)


BCE = {"multi_label": True, "loss": "bce"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_weight": [1.0, 2.0]}, "class_weight has 2 numbers for 3 classes: give one for each class"),
        ({"class_weight": [1.0, -2.0, 1.0]}, r"class_weight is \[1.0, -2.0, 1.0\]: expected finite numbers of 0 or"),
        ({"class_weight": [1.0, float("nan"), 1.0]}, "class_weight is .*: expected finite numbers"),
        ({"class_weight": [0.0, 0.0, 0.0]}, "class_weight is 0 for every class"),
        ({"class_weight": "inverse"}, "class_weight is 'inverse': expected 'balanced' or numbers, one for each class"),
        ({"class_weight": 2.0}, "class_weight is 2.0: expected 'balanced' or numbers"),
        ({"pos_weight": 2.0}, "pos_weight is for several labels an image, multi_label"),
        ({**BCE, "pos_weight": -1.0}, "pos_weight is .*: expected finite numbers of 0 or more"),
        ({**BCE, "pos_weight": 0}, "pos_weight is 0 for every class"),
        ({**BCE, "pos_weight": [1.0] * 4}, "pos_weight has 4 numbers for 3 classes"),
        ({"loss": nn.CrossEntropyLoss(), "class_weight": [1.0, 2.0, 3.0]}, "class_weight is for a loss by name: build"),
        ({"loss": nn.CrossEntropyLoss(), "loss_options": {"a": 1}}, "loss_options are for a loss by name"),
        ({"loss_options": {"beta": 2}}, "loss_options are beta, and loss 'cross_entropy' has none"),
        ({"loss": "hinge"}, "unknown loss 'hinge': expected one of cross_entropy, bce, sigmoid.*passed as an object"),
    ],
)
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_what_cannot_be_is_refused_in_one_line(kind, options, message):
    with pytest.raises(ValueError, match=message) as error:
        make(kind, **options)
    assert "\n" not in str(error.value)


# Modules.


class MarginOfTheLabel(nn.Module):
    """A loss of one's own, with a parameter that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.margin = nn.Parameter(torch.ones(()))

    def forward(self, logits, target):
        assert logits.dtype == torch.float32
        return F.multi_margin_loss(logits, target) + (self.margin - 2) ** 2


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_module_of_ones_own_is_trained_on_in_float32(kind):
    side = 32 if kind is EfficientNetClassifier else 16
    module = make(kind, loss=MarginOfTheLabel(), lr=0.1)
    start = copy.deepcopy(module)
    Trainer(**QUIET | {"precision": "bf16-mixed"}).fit(module, LabelledPixels(side=side))
    assert module.criterion.margin != start.criterion.margin
    assert any(not torch.equal(a, b) for a, b in zip(module.head.parameters(), start.head.parameters(), strict=True))


def test_the_loss_of_torch_by_module_is_that_by_name():
    found = []
    for options in ({}, {"loss": nn.CrossEntropyLoss()}, {"loss": nn.CrossEntropyLoss(torch.ones(3))}):
        module = make(**options)
        Trainer(**QUIET).fit(module, LabelledPixels())
        found.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


def test_a_module_that_gives_no_scalar_is_named():
    module = make(loss=nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(ValueError, match=r"loss CrossEntropyLoss gives a tensor \(2,\): expected a scalar"):
        module.training_step((torch.randn(2, 1, 16, 16), torch.tensor([0, 1])), 0)


def test_a_checkpoint_of_an_own_loss_says_to_pass_it(tmp_path):
    module = make(loss=MarginOfTheLabel())
    trainer = Trainer(**QUIET)
    trainer.fit(module, LabelledPixels())
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    torch.load(tmp_path / "own.ckpt", weights_only=True)
    with pytest.raises(ValueError, match="MarginOfTheLabel.*a module of your own is passed as an object"):
        ViTClassifier.load_from_checkpoint(tmp_path / "own.ckpt")
    again = ViTClassifier.load_from_checkpoint(tmp_path / "own.ckpt", loss=MarginOfTheLabel())
    assert again.criterion.margin == module.criterion.margin != 1


@pytest.mark.parametrize(
    "evil",
    [
        {"loss": "evil_loss_module.Loss"},
        {"loss": {"class_path": "evil_loss_module.Loss", "init_args": {}}},
        {"loss": "soft_confusion", "loss_options": {"metric": "evil_loss_module.call"}},
    ],
)
def test_a_checkpoint_imports_nothing_that_it_names(evil, tmp_path, monkeypatch):
    (tmp_path / "evil_loss_module.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    trainer = Trainer(**QUIET)
    trainer.fit(make(), LabelledPixels())
    trainer.save_checkpoint(tmp_path / "evil.ckpt")
    content = torch.load(tmp_path / "evil.ckpt", weights_only=True)
    content["hyper_parameters"] |= evil
    torch.save(content, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="unknown loss|evil_loss_module.call"):
        ViTClassifier.load_from_checkpoint(tmp_path / "evil.ckpt")


@pytest.mark.parametrize("kind", CLASSIFIERS)
@pytest.mark.parametrize(("theirs", "ours"), [({}, "balanced"), ({"class_weight": "balanced"}, None)])
def test_weights_of_a_run_with_other_weights_of_classes_start_another(kind, theirs, ours, tmp_path):
    module = make(kind, **theirs)
    weights.save(module, tmp_path / "start.safetensors")
    again = make(kind, class_weight=ours, weights=str(tmp_path / "start.safetensors"))
    assert all(map(torch.equal, again.parameters(), module.parameters()))


# By name.

OF_ONE = ["smooth_accuracy", "soft_fbeta", "f1_cross_entropy", "soft_confusion", "smooth_ap", "smooth_auc"]
OF_SEVERAL = [*OF_ONE, "zlpr", "asymmetric", "two_way"]
TASKS = [("asymmetric_single", False), *((n, False) for n in OF_ONE), *((n, True) for n in OF_SEVERAL)]
SKIP = {"loss_options": {"zero_division": "skip"}}


def options_of(name: str, multi_label: bool) -> dict[str, Any]:
    skips = SKIP if name in ("soft_fbeta", "soft_confusion") else {}
    return {"loss": name, "multi_label": multi_label} | skips


@pytest.mark.parametrize(
    ("kind", "name", "multi_label"),
    [
        *((ViTClassifier, *task) for task in TASKS),
        (EfficientNetClassifier, "soft_fbeta", False),
        (EfficientNetClassifier, "f1_cross_entropy", True),
    ],
)
def test_a_loss_by_name_is_trained_logged_and_comes_back_from_a_checkpoint(kind, name, multi_label, tmp_path):
    module = make(kind, **options_of(name, multi_label))
    data = CountedPixels(SEVERAL[:4] if multi_label else (0, 1, 0, 2, 0, 1, 0), side=module.hparams.image_size)
    trainer = Trainer(**QUIET)
    trainer.fit(module, data)
    found = {"val/loss", "val/acc", "val/f1", "val/cross_entropy"}
    found |= ({"val/ap"} if multi_label else set()) | ({"val/smooth"} if name in OF_ONE else set())
    metrics = logged(module, data)
    assert set(metrics) == found
    trainer.save_checkpoint(tmp_path / "named.ckpt")
    again = kind.load_from_checkpoint(tmp_path / "named.ckpt", weights_only=True)
    assert logged(again, data) == metrics
    assert again.hparams == module.hparams


def test_every_name_is_tried():
    assert set(LOSSES) == {name for name, _ in TASKS}


@pytest.mark.parametrize("average", ["macro", "micro", "samples"])
@pytest.mark.parametrize("loaders", [1, 2])
def test_the_smooth_metric_is_that_of_all_images_and_no_mean_of_batches(average, loaders):
    options = {"average": average, "zero_division": "skip", "beta": 2.0}
    module, data = make(loss="soft_fbeta", loss_options=options, multi_label=True), LabelledPixels(SEVERAL * 2)
    with torch.no_grad():
        logits = module.eval()(data.images)
    expected = SoftFBetaLoss("multilabel", **options).metric(logits, data.labels).item()
    if loaders == 1:
        assert logged(module, data)["val/smooth"] == pytest.approx(expected, rel=1e-5)
        return
    half = DataLoader(list(zip(data.images, data.labels, strict=True))[:4], 4)
    found = Trainer(**QUIET).validate(module, [half, data.val_dataloader()], verbose=False)
    assert found[1]["val/smooth/dataloader_idx_1"] == pytest.approx(expected, rel=1e-5)
    assert found[0]["val/smooth/dataloader_idx_0"] != pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("average", ["macro", "samples"])
def test_two_processes_log_the_smooth_metric_of_one(average):
    options = {"average": average, "zero_division": "skip"}
    module, data = make(loss="soft_fbeta", loss_options=options), LabelledPixels([0, 1, 2, 0, 1, 2, 2, 0])
    expected = logged(module, data)["val/smooth"]
    trainer = Trainer(**QUIET | {"strategy": "ddp_fork", "devices": 2})
    found = trainer.validate(module, data, verbose=False)[0]["val/smooth"]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("option", [{"beta": 2.0}, {"average": "micro"}, {"tau": 0.5}, {"class_weight": [1, 2, 3.0]}])
def test_options_reach_the_loss(option):
    images, labels = torch.randn(4, 1, 16, 16), torch.tensor([0, 1, 2, 2])
    module = make(loss="soft_fbeta", loss_options=option).eval()
    expected = SoftFBetaLoss(**option)(module(images), labels)
    assert module.training_step((images, labels), 0) == expected
    assert expected != SoftFBetaLoss()(module(images), labels)


def test_class_weights_reach_a_loss_that_weighs_classes():
    images, labels, weights = torch.randn(4, 1, 16, 16), torch.tensor([0, 1, 2, 2]), [1.0, 2.0, 3.0]
    module = make(loss="soft_fbeta", class_weight=weights).eval()
    expected = SoftFBetaLoss(class_weight=weights)(module(images), labels)
    assert module.training_step((images, labels), 0) == expected


@pytest.mark.parametrize("name", OF_ONE)
def test_soft_targets_go_with_the_surrogates(name):
    images, labels = torch.randn(4, 1, 16, 16), torch.tensor([0, 1, 2, 2])
    smooth = make(label_smoothing=0.3, **options_of(name, False)).eval()
    soft = F.one_hot(labels, 3) * 0.7 + 0.1
    torch.testing.assert_close(smooth.training_step((images, labels), 0), smooth.criterion(smooth(images), soft))
    mixed = make(mixup=0.8, **options_of(name, False))
    assert mixed.training_step((images, labels), 0).isfinite()


def test_no_smoothing_is_evaluated():
    data = LabelledPixels()
    plain, smooth = (make(loss="smooth_accuracy", label_smoothing=each) for each in (0.0, 0.3))
    assert logged(plain, data) == logged(smooth, data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "soft_fbeta", "loss_options": {"gamma": 2}}, "unknown option gamma of loss 'soft_fbeta': expected"),
        ({"loss": "soft_fbeta", "class_weight": "balanced"}, "class_weight 'balanced' is for the losses cross_entropy"),
        ({"loss": "smooth_ap", "class_weight": [1.0] * 3}, "class_weight is for the losses cross_entropy.*'smooth_ap'"),
        ({"loss": "zlpr", "multi_label": True, "pos_weight": 2.0}, "pos_weight is for the losses .*not for 'zlpr'"),
        ({"loss": "zlpr"}, "loss 'zlpr' is for the multilabel task, not for multiclass: expected one of"),
        ({"loss": "asymmetric_single", "mixup": 0.2}, "mixup makes soft targets, which loss 'asymmetric_single' does"),
        ({"loss": "asymmetric_single", "label_smoothing": 0.1}, "label_smoothing makes soft targets, which loss"),
        ({"loss": "soft_fbeta", "multi_label": True, "mixup": 0.2}, "mixup, cutmix and label_smoothing are for one"),
    ],
)
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_what_a_loss_by_name_is_not_for_is_refused_in_one_line(kind, options, message):
    with pytest.raises(ValueError, match=message) as error:
        make(kind, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_have_their_own_running_counts(twin_of):
    module = make(loss="f1_cross_entropy")
    module.use_loss(None, module.make_loss("soft_fbeta", {"zero_division": "skip"}))
    logged(module, LabelledPixels())  # makes metrics that look at the losses
    twin = twin_of(module)
    batch = torch.randn(4, 1, 16, 16), torch.tensor([0, 1, 2, 2])
    assert list(twin.state_dict()) == list(module.state_dict())
    twin.train().training_step(batch, 0)
    assert twin.criterion.running.any()
    assert not module.criterion.running.any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["soft_fbeta", "f1_cross_entropy"])
def test_a_surrogate_learns_the_digits(name):
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "width": 32, "heads": 4, "num_classes": 10}
    module = make(**options_of(name, False) | sizes, lr=3e-3)
    Trainer(**QUIET | {"max_epochs": 25}).fit(module, data := DigitsDataModule(image_size=8))
    assert logged(module, data)["val/f1"] > 0.8


# The command line.


def parsed(*args: str) -> Any:
    """The model that jsonargparse, and so LightningCLI, builds with these options."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model")
    sizes = [f"--model.{name}={value}" for name, value in (VIT | {"num_classes": 3, "in_channels": 1}).items()]
    return parser.instantiate(parser.parse_args(["--model", "zoo.ViTClassifier", *sizes, *args])).model


@pytest.mark.parametrize(
    ("args", "kind", "values"),
    [
        (["--model.loss", "soft_fbeta", "--model.loss_options.beta", "2"], SoftFBetaLoss, {"beta": 2}),
        (["--model.loss=smooth_ap", "--model.loss_options={tau: 0.5}"], SmoothAPLoss, {"tau": 0.5}),
        (["--model.loss", "zoo.losses.SoftFBetaLoss", "--model.loss.beta", "2"], SoftFBetaLoss, {"beta": 2}),
        (["--model.loss=zoo.losses.SoftFBetaLoss", "--model.loss.init_args.tau=2"], SoftFBetaLoss, {"tau": 2}),
        (["--model.loss", "{class_path: zoo.losses.SmoothAPLoss, init_args: {tau: 2}}"], SmoothAPLoss, {"tau": 2}),
        (["--model.loss", "torch.nn.CrossEntropyLoss"], nn.CrossEntropyLoss, {}),
    ],
)
def test_the_command_line_takes_names_options_and_class_paths(args, kind, values):
    criterion = parsed(*args).criterion
    assert type(criterion) is kind
    assert {name: getattr(criterion, name) for name in values} == values


def test_the_command_line_takes_weights():
    module = parsed("--model.class_weight=[1, 2, 3]")
    assert module.hparams["class_weight"] == [1, 2, 3]
    options = ["--model.multi_label=true", "--model.loss=bce", "--model.pos_weight=2", "--model.class_weight=balanced"]
    module = parsed(*options)
    assert module.hparams["pos_weight"] == 2
    assert module.label_weights.balanced == {"classes": True, "positives": False}


# What is logged.


def logged(module: Any, data: Any) -> dict[str, float]:
    return Trainer(**QUIET).validate(module, data, verbose=False)[0]


def test_plain_losses_log_what_they_always_have():
    for kind in ("cross_entropy", "bce", "sigmoid"):
        assert set(logged(make(loss=kind), LabelledPixels())) == {"val/loss", "val/acc", "val/f1"}


@pytest.mark.parametrize("loaders", [1, 2])
def test_weighted_losses_log_the_loss_as_of_one_batch_and_plain_cross_entropy_beside_it(loaders):
    module, data = make(class_weight=[0.2, 1.0, 5.0]), LabelledPixels()
    with torch.no_grad():
        logits = module.eval()(data.images)
    expected = {
        "val/loss": F.cross_entropy(logits, data.labels, torch.tensor([0.2, 1.0, 5.0])).item(),
        "val/cross_entropy": F.cross_entropy(logits, data.labels).item(),
    }
    if loaders == 1:
        found = logged(module, data)
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
        return
    found = Trainer(**QUIET).validate(module, [data.val_dataloader(), data.val_dataloader()], verbose=False)
    for index, each in enumerate(found):
        named = {f"{name}/dataloader_idx_{index}": value for name, value in expected.items()}
        assert {name: each[name] for name in named} == pytest.approx(named, rel=1e-5)


def test_several_labels_log_binary_cross_entropy():
    module, data = make(**BCE, pos_weight=[1.0, 2.0, 3.0]), LabelledPixels(SEVERAL)
    with torch.no_grad():
        logits = module.eval()(data.images)
    found = logged(module, data)
    expected = F.binary_cross_entropy_with_logits(logits, data.labels.float()).item()
    assert found["val/cross_entropy"] == pytest.approx(expected, rel=1e-5)
    assert found["val/loss"] != pytest.approx(expected, rel=1e-3)


def test_an_evaluation_leaves_no_keys_behind():
    module = make(class_weight=[0.2, 1.0, 5.0])
    keys = list(module.state_dict())
    logged(module, LabelledPixels())
    assert list(module.state_dict()) == keys


def test_label_weights_are_a_part_that_stands_alone():
    weights = LabelWeights(2, [1.0, 3.0], 2)
    assert {name: value.tolist() for name, value in weights.of_loss().items()} == {
        "class_weight": [1, 3],
        "pos_weight": [2, 2],
    }
    assert LabelWeights(2).of_loss() == {}
    assert not Path("lightning_logs").exists()
