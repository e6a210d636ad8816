"""Phases of losses: what is trained when, what is logged and drawn, and continued runs bit for bit."""

import copy
import logging
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from PIL import Image
from test_resume import Images, Samples, assert_resumes
from torch import nn
from torch.nn import functional as F

from datamodules import DigitsDataModule
from zoo import EfficientNetClassifier, ViTClassifier
from zoo.callbacks import LossSchedule
from zoo.callbacks.loss_schedule import draw
from zoo.losses import SmoothAccuracyLoss, SoftFBetaLoss

QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
QUIET |= {"accelerator": "cpu", "enable_checkpointing": False, "num_sanity_val_steps": 0}
VIT = {"backbone": "vit_tiny_patch16_224", "width": 12, "depth": 1, "heads": 2, "image_size": 8, "patch_size": 4}
F1 = {"loss": "soft_fbeta", "options": {"zero_division": "skip"}}


def make(**options: Any) -> ViTClassifier:
    torch.manual_seed(0)
    return ViTClassifier(**VIT | {"num_classes": 3, "in_channels": 1} | options)


class ThreeLabels(Samples):
    def __getitem__(self, index):
        return super().__getitem__(index)[0], index % 4 % 3


class ThreeClasses(Images):
    """42 images for training, five steps an epoch, and 11 for validation; of four, two are of class 0."""

    def samples(self, split):
        return ThreeLabels(42 if split == "train" else 11)

    def class_counts(self):
        return [21, 11, 10]

    def sample_count(self):
        return 42


class Watch(Callback):
    """The loss of each step, and what it would have been by cross-entropy and by the others given."""

    def __init__(self, **losses: nn.Module) -> None:
        self.losses = {"cross_entropy": nn.CrossEntropyLoss(), **losses}
        self.seen: list[str] = []
        self.rows: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with torch.no_grad():
            logits = pl_module(batch[0])
        self.expected = {name: loss(logits, batch[1]) for name, loss in self.losses.items()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = outputs["loss"] * trainer.accumulate_grad_batches  # which Lightning divides by it
        self.seen += [name for name, expected in self.expected.items() if torch.allclose(expected, loss)]

    def on_validation_end(self, trainer, pl_module):
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(schedule: LossSchedule, module: Any = None, data: Any = None, watch: Any = None, **options: Any) -> Watch:
    watch = watch or Watch(soft_fbeta=SoftFBetaLoss(zero_division="skip"))
    trainer = Trainer(callbacks=[schedule, watch], **QUIET | {"max_epochs": 3} | options)
    trainer.fit(module or make(), data or ThreeClasses(), weights_only=True)
    return watch


# What is trained when.


@pytest.mark.parametrize(
    ("phases", "changes"),
    [
        ([{"epoch": 1} | F1], 5),
        ([{"epoch": 0, "loss": "cross_entropy"}, {"epoch": 2} | F1], 10),
        ([{"step": 7} | F1], 7),
        ([{"step": 0} | F1], 0),
        ([{"epoch": 9} | F1], 15),
        ([{"epoch": 1, "loss": SoftFBetaLoss(zero_division="skip")}], 5),
    ],
)
def test_the_loss_changes_when_it_is_to(phases, changes, tmp_path):
    watch = fit(LossSchedule(phases), default_root_dir=tmp_path)
    assert watch.seen == ["cross_entropy"] * changes + ["soft_fbeta"] * (15 - changes)


def test_accumulated_gradients_count_as_one_step(tmp_path):
    watch = fit(LossSchedule([{"step": 2} | F1]), default_root_dir=tmp_path, accumulate_grad_batches=2, max_epochs=1)
    assert watch.seen == ["cross_entropy"] * 4 + ["soft_fbeta"]


def test_several_phases_and_back(tmp_path):
    phases = [{"epoch": 1} | F1, {"epoch": 2, "loss": "smooth_accuracy"}, {"epoch": 3, "loss": "cross_entropy"}]
    watch = Watch(soft_fbeta=SoftFBetaLoss(zero_division="skip"), smooth_accuracy=SmoothAccuracyLoss())
    fit(LossSchedule(phases), watch=watch, default_root_dir=tmp_path, max_epochs=4)
    assert watch.seen[::5] == ["cross_entropy", "soft_fbeta", "smooth_accuracy", "cross_entropy"]


def test_the_optimizer_goes_on(tmp_path):
    steps = []

    class Moments(Callback):
        def on_train_batch_start(self, trainer, *args):
            states = trainer.optimizers[0].state.values()
            steps.append(max((float(state["step"]) for state in states), default=0.0))

    moments = Moments()
    trainer = Trainer(
        callbacks=[LossSchedule([{"epoch": 1} | F1]), moments], **QUIET, max_epochs=2, default_root_dir=tmp_path
    )
    trainer.fit(make(), ThreeClasses())
    assert steps == list(range(10))


def test_after_the_fit_the_module_has_its_own_loss_and_nothing_of_the_others(tmp_path):
    module = make()
    keys, batch = list(module.state_dict()), (torch.randn(2, 1, 8, 8), torch.tensor([0, 1]))
    fit(LossSchedule([{"epoch": 0, "loss": "f1_cross_entropy"}]), module, default_root_dir=tmp_path, max_epochs=1)
    assert list(module.state_dict()) == keys
    expected = F.cross_entropy(module(batch[0]), batch[1])
    torch.testing.assert_close(module.training_step(batch, 0), expected)
    copy.deepcopy(module)


def test_class_weights_go_with_cross_entropy_and_a_surrogate_has_its_own(tmp_path):
    weights = [0.5, 1.0, 2.0]
    own = SoftFBetaLoss(zero_division="skip", class_weight=weights)
    watch = Watch(weighted=nn.CrossEntropyLoss(torch.tensor(weights)), own=own, plain=SoftFBetaLoss(zero_division=0))
    phases = [
        {"epoch": 1, "loss": "soft_fbeta", "options": {"zero_division": 0}},
        {"epoch": 2, "loss": "soft_fbeta", "options": {"zero_division": "skip", "class_weight": weights}},
    ]
    fit(LossSchedule(phases), make(class_weight=weights), watch=watch, default_root_dir=tmp_path)
    assert watch.seen[::5] == ["weighted", "plain", "own"]


# What is logged and drawn.


def test_all_metrics_are_logged_throughout_and_equal_those_of_all_images(tmp_path):
    schedule, module = LossSchedule([{"epoch": 1} | F1]), make()
    watch = fit(schedule, module, default_root_dir=tmp_path, max_epochs=2)
    for row in watch.rows:
        assert {"val/loss", "val/acc", "val/f1", "val/smooth", "val/cross_entropy"} <= row.keys()
    assert watch.rows[0]["val/loss"] == pytest.approx(watch.rows[0]["val/cross_entropy"])
    assert watch.rows[1]["val/loss"] != pytest.approx(watch.rows[1]["val/cross_entropy"], rel=0.1)
    data = ThreeClasses()
    trainer = Trainer(**QUIET, callbacks=[schedule])
    trainer.validate(module, data, verbose=False)
    found = dict(trainer.callback_metrics)
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.val_dataloader()]
    with torch.no_grad():
        logits = torch.cat([module.eval()(images) for images, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    assert len(labels) == 11
    torch.testing.assert_close(found["val/smooth"], SoftFBetaLoss(zero_division="skip").metric(logits, labels))
    torch.testing.assert_close(found["val/cross_entropy"], F.cross_entropy(logits, labels))
    assert schedule.starts == [1]


def test_the_chart_has_every_curve_and_a_line_where_the_loss_changes(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("zoo.callbacks.loss_schedule.draw", lambda *args: drawn.append(args))
    fit(LossSchedule([{"epoch": 1} | F1]), default_root_dir=tmp_path, max_epochs=3)
    ((path, curves, changes),) = drawn
    assert path.name == "loss_schedule.png"
    assert path.parent == tmp_path
    assert [row["step"] for row in curves] == [5, 10, 15]
    assert all(row.keys() == {"step", "val/acc", "val/f1", "val/smooth", "val/cross_entropy"} for row in curves)
    assert changes == {5: "soft_fbeta"}


def test_the_chart_is_a_picture_in_the_runs_directory(tmp_path):
    schedule = LossSchedule([{"epoch": 1} | F1])
    fit(schedule, default_root_dir=tmp_path, max_epochs=2)
    assert schedule.last_path == tmp_path / "loss_schedule.png"
    with Image.open(schedule.last_path) as picture:
        assert picture.size > (400, 300)


def test_a_chart_of_what_there_is(tmp_path):
    draw(tmp_path / "few.png", [{"step": 1, "val/acc": 0.5}], {})
    with Image.open(tmp_path / "few.png") as picture:
        assert picture.size > (400, 300)


def test_changes_are_told_once_each(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    fit(LossSchedule([{"step": 7} | F1]), default_root_dir=tmp_path)
    told = [record.message for record in caplog.records if record.message.startswith("the loss is")]
    assert told == ["the loss is soft_fbeta from step 7 on"]


def test_a_phase_that_the_fit_does_not_come_to_is_told(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    fit(LossSchedule([{"epoch": 3} | F1]), default_root_dir=tmp_path)
    assert "the loss soft_fbeta begins with epoch 3, which this fit does not come to" in caplog.text


# Continued runs.

COUNTED = {"loss": "f1_cross_entropy", "options": {"momentum": 0.9}}
RESUMED = {
    "at an epoch": [{"epoch": 1} | F1],
    "at a step within an epoch": [{"step": 7} | F1],
    "to running counts": [{"step": 3} | COUNTED],
    "between running counts, before a validation": [{"step": 0} | COUNTED, {"step": 5} | COUNTED],
}


@pytest.mark.parametrize(
    "name", [name if name == "to running counts" else pytest.param(name, marks=pytest.mark.slow) for name in RESUMED]
)
def test_a_run_continued_before_at_and_after_the_change_equals_the_uninterrupted_one(tmp_path, name):
    schedules = []

    def callbacks() -> list[Callback]:
        schedules.append(LossSchedule(RESUMED[name]))
        return schedules[-1:]

    def module() -> ViTClassifier:
        return make(drop_path=0.1, class_weight="balanced")

    options = {"module": module, "callbacks": callbacks, "default_root_dir": tmp_path / "runs"}
    assert assert_resumes(tmp_path, ThreeClasses, every=3 if name == "to running counts" else 1, **options) >= 3
    first, *others = schedules
    assert [row["step"] for row in first.curves] == [5, 10]
    assert all(each.curves == first.curves for each in others if each.last_path)
    assert all(each.began == first.began for each in others if each.last_path)


def test_other_phases_than_the_checkpoints_are_refused(tmp_path):
    trainer = Trainer(callbacks=[LossSchedule([{"epoch": 1} | F1])], **QUIET, max_epochs=1, default_root_dir=tmp_path)
    trainer.fit(make(), ThreeClasses())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    torch.load(tmp_path / "one.ckpt", weights_only=True)
    schedule = LossSchedule([{"epoch": 1, "loss": "smooth_accuracy"}])
    other = Trainer(callbacks=[schedule], **QUIET, max_epochs=2, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match="phases are smooth_accuracy, and the checkpoint's are soft_fbeta: continue"):
        other.fit(make(), ThreeClasses(), ckpt_path=tmp_path / "one.ckpt", weights_only=True)


def test_a_checkpoint_is_one_of_the_module_alone(tmp_path):
    schedule = LossSchedule([{"epoch": 0, "loss": "f1_cross_entropy"}])
    trainer = Trainer(callbacks=[schedule], **QUIET, max_epochs=1, default_root_dir=tmp_path)
    trainer.fit(make(), ThreeClasses())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    loaded = ViTClassifier.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    assert loaded.hparams.loss == "cross_entropy"
    assert loaded.state_dict().keys() == make().state_dict().keys()


# Whose modules.


class TwoLosses(LightningModule):
    """Somebody else's module, with losses that can be exchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(64, 3)
        self.use_loss(None)
        self.seen: list[str] = []

    def make_loss(self, loss, options=None):
        return {"l1": F.l1_loss, "l2": F.mse_loss}[loss]

    def use_loss(self, loss, smooth=None):
        self.loss = loss or F.mse_loss

    def training_step(self, batch, batch_idx):
        self.seen.append(self.loss.__name__)
        return self.loss(self.net(batch[0].flatten(1).float()), F.one_hot(batch[1], 3).float())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def test_a_module_of_somebody_else(tmp_path):
    module = TwoLosses()
    trainer = Trainer(
        callbacks=[LossSchedule([{"epoch": 1, "loss": "l1"}])], **QUIET, max_epochs=2, default_root_dir=tmp_path
    )
    trainer.fit(module, ThreeClasses().train_dataloader())
    assert module.seen == ["mse_loss"] * 5 + ["l1_loss"] * 5


class OneLoss(LightningModule):
    def training_step(self, batch, batch_idx): ...

    def configure_optimizers(self): ...


def test_a_module_whose_loss_cannot_change_is_refused(tmp_path):
    trainer = Trainer(callbacks=[LossSchedule([{"epoch": 1} | F1])], **QUIET, max_epochs=1, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match="OneLoss has no loss that can change: LossSchedule is for the zoo's") as error:
        trainer.fit(OneLoss(), ThreeClasses().train_dataloader())
    assert "\n" not in str(error.value)


class LearnedScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, logits, target):
        return F.cross_entropy(logits * self.scale, target)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], "phases are empty"),
        ([{"loss": "bce"}], "phase 0 has loss: expected loss, either epoch or step"),
        ([{"epoch": 1}], "phase 0 has epoch: expected loss, either epoch or step"),
        ([{"epoch": 1, "step": 1, "loss": "bce"}], "either epoch or step"),
        ([{"epoch": 1, "loss": "bce", "beta": 2}], "phase 0 has epoch, loss, beta: expected loss"),
        (["bce"], "phase 0 is a str: expected loss"),
        ([{"epoch": 0.5, "loss": "bce"}], "phase 0 begins with epoch 0.5: expected a whole number of 0 or more"),
        ([{"epoch": 0, "loss": "bce"}, {"step": -1, "loss": "bce"}], "phase 1 begins with step -1: expected a whole"),
        ([{"epoch": 0, "loss": "bce"}, {"step": 9, "loss": "bce"}], "phases begin with epochs and with steps"),
        (
            [{"epoch": 2, "loss": "bce"}, {"epoch": 2, "loss": "bce"}],
            r"phases begin with epochs \[2, 2\]: expected",
        ),
    ],
)
def test_phases_of_another_form_are_refused_in_one_line(phases, message):
    with pytest.raises(ValueError, match=message) as error:
        LossSchedule(phases)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ({"loss": "hinge"}, "unknown loss 'hinge': expected one of cross_entropy, bce, sigmoid, smooth_accuracy"),
        (
            {"loss": "soft_fbeta", "options": {"gamma": 2}},
            "unknown option gamma of loss 'soft_fbeta': expected",
        ),
        ({"loss": LearnedScale()}, "loss LearnedScale has parameters, which a phase does not train"),
    ],
)
def test_losses_that_a_module_cannot_be_trained_on_are_refused_before_the_first_step(phase, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        fit(LossSchedule([{"epoch": 2} | phase]), default_root_dir=tmp_path)
    assert "\n" not in str(error.value)


# Learning.


@pytest.mark.slow
def test_soft_f1_behind_cross_entropy_goes_on_learning_the_digits(tmp_path):
    torch.manual_seed(0)
    options = {"width": 32, "heads": 4, "num_classes": 10, "lr": 3e-3}
    schedule = LossSchedule([{"epoch": 15} | F1])
    watch = fit(schedule, make(**options), DigitsDataModule(image_size=8), default_root_dir=tmp_path, max_epochs=25)
    before, after = watch.rows[14], watch.rows[-1]
    assert after["val/smooth"] > before["val/smooth"]
    assert after["val/f1"] > before["val/f1"] - 0.01
    assert after["val/f1"] > 0.8


def test_an_efficientnet_changes_its_loss_too(tmp_path):
    module = EfficientNetClassifier(phi=-6, num_classes=10, image_size=32, in_channels=1)
    data = DigitsDataModule(image_size=32, batch_size=4)
    seen = []
    use_loss = module.use_loss
    module.use_loss = lambda loss, smooth=None: (seen.append(loss), use_loss(loss, smooth))
    options = {"max_steps": 2, "limit_val_batches": 0, "default_root_dir": tmp_path}
    Trainer(callbacks=[LossSchedule([{"step": 1} | F1])], **QUIET, **options).fit(module, data)
    assert [type(loss).__name__ for loss in seen] == ["NoneType", "SoftFBetaLoss", "NoneType"]
