"""Callbacks: what they average, measure, draw and write, in runs of a real Trainer."""

import csv
import io
import math
import random
from pathlib import Path

import numpy as np
import pytest
import rich
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from datamodules import DigitsDataModule, ImageFolderDataModule
from zoo import ViTClassifier
from zoo.callbacks import (
    EMA,
    ExportBackbone,
    GradientNorm,
    ProgressBar,
    SavePictures,
    WritePredictions,
)

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
SMALL = {"backbone": "vit_tiny_patch16_224", "num_classes": 10, "image_size": 8, "patch_size": 4, "in_channels": 1}
SMALL |= {"width": 16, "depth": 1, "heads": 2}


class Net(LightningModule):
    """A small network with everything an average has to treat: BatchNorm, a tied weight, a frozen one, an integer."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.first, self.norm, self.second = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("scratch", torch.zeros(1), persistent=False)
        self.validated = []

    def forward(self, x):
        return self.second(self.norm(self.first(x)))

    def training_step(self, batch, batch_idx):
        loss = self(batch[0]).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.first.weight.detach().clone())
        self.log("val/loss", self(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.lr)


def loader(steps: int = 8, batch_size: int = 4) -> DataLoader:
    data = torch.randn(steps * batch_size, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(data), batch_size=batch_size)


def fit(tmp_path: Path, module: LightningModule, *callbacks: Callback, data=None, ckpt_path=None, **options) -> Trainer:
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False} | options
    trainer = Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), **QUIET | options)
    trainer.fit(module, data or loader(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Watch(Callback):
    """The weights after each step, as a loop by hand would see them."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_start(self, trainer, pl_module):
        self.start = snapshot(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.states.append(snapshot(pl_module))


# The moving average.


@pytest.mark.parametrize(("decay", "warmup"), [(0.5, True), (0.99, True), (0.9, False)])
def test_the_average_is_the_recursion_written_by_hand(tmp_path, decay, warmup):
    module, watch = Net(), Watch()
    fit(tmp_path, module, watch, EMA(decay, warmup))
    expected = watch.start
    for n, state in enumerate(watch.states):
        d = min(decay, (1 + n) / (10 + n)) if warmup else decay
        for name, value in state.items():
            expected[name] = d * expected[name] + (1 - d) * value if value.is_floating_point() else value
    assert len(watch.states) == 8
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)
    assert module.norm.num_batches_tracked == 8  # an integer is copied, not averaged
    assert module.second.weight is module.first.weight
    assert not torch.allclose(module.norm.running_mean, watch.states[-1]["norm.running_mean"])


def test_updates_follow_optimizer_steps_not_batches(tmp_path):
    module, watch, ema = Net(), Watch(), EMA(0.5, warmup=False)
    fit(tmp_path, module, watch, ema, accumulate_grad_batches=4)
    assert ema.updates == 2
    expected = watch.start["first.bias"]
    for state in (watch.states[3], watch.states[7]):
        expected = 0.5 * expected + 0.5 * state["first.bias"]
    torch.testing.assert_close(module.first.bias.detach(), expected)
    every_third = EMA(every_n_steps=3)
    fit(tmp_path, Net(), every_third)
    assert every_third.updates == 2  # after steps 3 and 6


def test_a_mask_of_infinite_values_is_copied(tmp_path):
    module, ema = Net(), EMA(0.5, warmup=False)
    module.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    fit(tmp_path, module, ema)
    assert module.mask.tolist() == [0, -math.inf]


def test_validation_sees_the_average_and_training_goes_on_from_the_weights(tmp_path):
    torch.manual_seed(0)
    plain, averaged = Net(), Net()
    averaged.load_state_dict(plain.state_dict())
    watches = Watch(), Watch()
    for module, watch, extra in ((plain, watches[0], []), (averaged, watches[1], [EMA(0.9)])):
        trainer = Trainer(max_epochs=2, logger=False, enable_checkpointing=False, callbacks=[watch, *extra], **QUIET)
        trainer.fit(module, loader(), loader(2))
    for a, b in zip(watches[0].states, watches[1].states, strict=True):
        assert same(a, b)  # averaging changes nothing about training
    assert not torch.equal(plain.validated[-1], averaged.validated[-1])
    torch.testing.assert_close(averaged.validated[-1], averaged.first.weight.detach())


def test_every_checkpoint_holds_the_average_and_the_weights_whenever_it_is_written(tmp_path):
    """After a step, after validation, at the end, after it, and of weights alone."""

    class AtTheEnd(Callback):
        def on_train_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "end.ckpt")

        def on_validation_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "validating.ckpt")
            trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)

    module, watch, ema = Net(), Watch(), EMA(0.9)
    each = ModelCheckpoint(tmp_path, "step{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False)
    trainer = Trainer(
        max_epochs=1, logger=False, callbacks=[AtTheEnd(), watch, ema, each], default_root_dir=tmp_path, **QUIET
    )
    trainer.fit(module, loader(), loader(2))
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    average = snapshot(module)
    for name in ("step8", "validating", "end", "after"):
        saved = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        assert same(saved["current_model_state"], watch.states[-1]), name
        assert same(saved["state_dict"], average), name
    assert same(torch.load(tmp_path / "weights.ckpt", weights_only=True)["state_dict"], average)
    middle = torch.load(tmp_path / "step4.ckpt", weights_only=True)
    assert same(middle["current_model_state"], watch.states[3])
    assert not same(middle["state_dict"], watch.states[3])


def test_a_continued_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    def run(name: str, epochs: int, ckpt_path=None, ema=True) -> tuple[Net, Trainer]:
        torch.manual_seed(0)
        module = Net()
        trainer = fit(tmp_path, module, *([EMA(0.9)] if ema else []), max_epochs=epochs, ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        return module, trainer

    whole, _ = run("whole", 4)
    run("half", 2)
    continued, _ = run("continued", 4, tmp_path / "half.ckpt")
    assert same(snapshot(whole), snapshot(continued))
    saved = [torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("whole", "continued")]
    assert same(saved[0]["current_model_state"], saved[1]["current_model_state"])
    assert [state["callbacks"]["EMA"] for state in saved] == [{"updates": 32}] * 2
    # A run without an average can be continued with one.
    run("plain", 2, ema=False)
    late, _ = run("late", 3, tmp_path / "plain.ckpt")
    assert not same(snapshot(late), snapshot(whole))


def test_testing_a_checkpoint_takes_the_average_as_it_is(tmp_path):
    module, ema = Net(), EMA(0.9)
    trainer = fit(tmp_path, module, ema)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    average = snapshot(module)
    again = Net()
    trainer = Trainer(logger=False, callbacks=[EMA(0.9)], default_root_dir=tmp_path, **QUIET)
    trainer.validate(again, loader(2), ckpt_path=tmp_path / "a.ckpt", verbose=False, weights_only=True)
    assert same(snapshot(again), average)


def test_an_error_while_validating_does_not_mix_the_two_up(tmp_path):
    class Breaks(Net):
        def validation_step(self, batch, batch_idx):
            raise ArithmeticError("on purpose")

    module, watch = Breaks(), Watch()
    rescue = OnExceptionCheckpoint(tmp_path, "rescue")
    trainer = Trainer(
        max_epochs=1, logger=False, callbacks=[watch, EMA(0.9), rescue], default_root_dir=tmp_path, **QUIET
    )
    with pytest.raises(ArithmeticError):
        trainer.fit(module, loader(), loader(2))
    saved = torch.load(tmp_path / "rescue.ckpt", weights_only=True)
    assert same(saved["current_model_state"], watch.states[-1])
    assert not same(saved["state_dict"], watch.states[-1])


def test_what_cannot_be_averaged_is_refused(tmp_path):
    with pytest.raises(ValueError, match="decay is 1.5"):
        EMA(1.5)
    with pytest.raises(ValueError, match="every_n_steps is 0"):
        EMA(every_n_steps=0)
    with pytest.raises(ValueError, match=r"float32 weights, but .* is torch\.bfloat16: use bf16-mixed"):
        fit(tmp_path, Net(), EMA(), precision="bf16-true")

    class FSDPStrategy(type(Trainer(logger=False, enable_checkpointing=False, **QUIET).strategy)):
        pass

    trainer = Trainer(logger=False, enable_checkpointing=False, **QUIET)
    trainer.strategy.__class__ = FSDPStrategy
    with pytest.raises(ValueError, match="FSDPStrategy splits them"):
        EMA().setup(trainer, Net(), "fit")


# The gradient's norm.


class Norms(Callback):
    """The norm of the gradients, by hand, before they are clipped."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
        self.norms.append(torch.cat(gradients).norm().item())


@pytest.mark.parametrize(
    "clip", [{}, {"gradient_clip_val": 1e-3}, {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}]
)
def test_the_norm_of_the_gradients_is_logged_at_logging_steps(tmp_path, clip):
    norms, logger = Norms(), CSVLogger(tmp_path, name="", version="")
    module = Net()
    fit(tmp_path, module, norms, GradientNorm(), logger=logger, log_every_n_steps=3, **clip)
    rows = [row for row in csv.DictReader((tmp_path / "metrics.csv").open()) if row.get("train/grad_norm")]
    assert [int(row["step"]) for row in rows] == [2, 5]
    assert [float(row["train/grad_norm"]) for row in rows] == pytest.approx([norms.norms[2], norms.norms[5]], rel=1e-5)


def test_looking_at_the_norm_changes_no_clipping(tmp_path):
    states = []
    for extra in ([], [GradientNorm()]):
        torch.manual_seed(0)
        module = Net()
        fit(tmp_path, module, *extra, gradient_clip_val=0.05, log_every_n_steps=1)
        states.append(snapshot(module))
    assert same(*states)


# Pictures.


class Draws(Net):
    def __init__(self) -> None:
        super().__init__()
        self.drawn = []

    def test_step(self, batch, batch_idx):
        torch.rand(1)

    def pictures(self, batch):
        self.drawn.append(len(batch[0]))
        torch.rand(3), random.random(), np.random.rand()
        return {"main": torch.rand(len(batch[0]), 3, 8, 8), "other": torch.zeros(len(batch[0]), 3, 8, 8)}


def test_pictures_are_files_and_in_tensorboard_and_leave_chance_alone(tmp_path):
    def run(*callbacks):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        logger = TensorBoardLogger(tmp_path, name="", version=f"with{len(callbacks)}")
        trainer = Trainer(max_epochs=4, logger=logger, callbacks=list(callbacks), enable_checkpointing=False, **QUIET)
        trainer.fit(module := Draws(), loader(), loader(2))
        trainer.test(module, loader(2), verbose=False)
        return torch.rand(1), random.random(), np.random.rand()

    pictures = SavePictures(every_n_epochs=2, max_images=3)
    assert run() == run(pictures)
    folder = tmp_path / "with1" / "images"
    expected = {f"{moment}_{name}.png" for moment in ("epoch001", "epoch003", "test") for name in ("main", "other")}
    assert {file.name for file in folder.iterdir()} == expected
    assert pictures.last_path == folder / "test_main.png"
    with Image.open(pictures.last_path) as image:
        assert image.size == (2 * 8 + 3 * 2, 2 * 8 + 3 * 2)  # three images in two rows, two pixels between them
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = events.EventAccumulator(str(tmp_path / "with1"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in log.Images("epoch/main")] == [16, 32]
    shown = Image.open(io.BytesIO(log.Images("test/main")[0].encoded_image_string))
    difference = np.asarray(shown, dtype=int) - np.asarray(Image.open(folder / "test_main.png"), dtype=int)
    assert np.abs(difference).max() <= 1  # the two round in their own ways


def test_a_module_without_pictures_is_left_alone(tmp_path):
    trainer = Trainer(max_epochs=1, logger=False, callbacks=[SavePictures()], default_root_dir=tmp_path, **QUIET)
    trainer.fit(Net(), loader(), loader(2))
    assert not (tmp_path / "images").exists()
    with pytest.raises(ValueError, match="every_n_epochs is 0"):
        SavePictures(0)


# Predictions.


def predict(tmp_path: Path, module: LightningModule, data, callback=None, **options) -> list[list[str]]:
    writer = callback or WritePredictions()
    trainer = Trainer(logger=False, callbacks=[writer], default_root_dir=tmp_path, **QUIET | options)
    trainer.predict(module, data, return_predictions=False)
    return list(csv.reader((tmp_path / writer.filename).open()))


def folder_of_images(root: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((8, 8), number * 8, dtype=np.uint8)
        Image.fromarray(pixels).save(root / name)
    return root


def test_one_row_an_image_with_its_file_class_and_probability(tmp_path):
    names = ["a/x.png", "a/y.png", "b/z.png", "b/ä, ö.png"]
    root = folder_of_images(tmp_path / "images", names)
    data = ImageFolderDataModule(root, predict_root=root, image_size=8, channels=1, batch_size=3, num_workers=0)
    module = ViTClassifier(**SMALL | {"num_classes": 2}).eval()
    header, *rows = predict(tmp_path, module, data)
    assert header == ["file", "class", "probability", "probability_a", "probability_b"]
    assert sorted(row[0] for row in rows) == sorted(names)
    assert {row[1] for row in rows} <= {"a", "b"}
    assert all(0.5 <= float(row[2]) <= 1 for row in rows)
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["predictions.csv"]


def test_the_rows_are_the_modules_probabilities_in_the_datas_order(tmp_path):
    data = DigitsDataModule(num_workers=0, batch_size=100)
    module = ViTClassifier(**SMALL).eval()
    _, *rows = predict(tmp_path, module, data)
    samples = data.samples("test")
    images = torch.stack([samples[index][0] for index in range(len(samples))])
    images = data.on_after_batch_transfer(images, 0)
    with torch.no_grad():
        probability, index = module.probabilities(images).max(1)
    assert [row[0] for row in rows] == [data.predict_dataloader().dataset.name(i) for i in range(540)]
    assert [row[1] for row in rows] == [data.classes[i] for i in index.tolist()]
    assert [float(row[2]) for row in rows] == pytest.approx(probability.tolist(), abs=2e-6)
    with torch.no_grad():
        expected = module.probabilities(images)
    assert torch.tensor([[float(value) for value in row[3:]] for row in rows]).allclose(expected, atol=1e-6)


def test_two_processes_write_what_one_writes(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    module = ViTClassifier(**SMALL).eval()
    alone = predict(tmp_path / "one", module, DigitsDataModule(num_workers=0, batch_size=70))
    both = predict(
        tmp_path / "two", module, DigitsDataModule(num_workers=0, batch_size=35), strategy="ddp_fork", devices=2
    )
    assert [row[:2] for row in both] == [row[:2] for row in alone]
    assert len(both) == 541
    assert [file.name for file in (tmp_path / "two").iterdir()] == ["predictions.csv"]


def test_unreadable_images_have_a_row_too(tmp_path):
    root = folder_of_images(tmp_path / "images", ["1.png", "2.png", "3.png"])
    (root / "2.png").write_bytes(b"no image")
    data = ImageFolderDataModule(
        folder_of_images(tmp_path / "labelled", [f"{c}/{i}.png" for c in "abcdefghij" for i in range(3)]),
        predict_root=root,
        image_size=8,
        channels=1,
        batch_size=2,
        num_workers=0,
        on_error="skip",
    )
    with pytest.warns(UserWarning, match="1 of 3 images could not be read"):
        _, *rows = predict(tmp_path, ViTClassifier(**SMALL).eval(), data)
    assert [row[0] for row in rows] == ["1.png", "2.png", "3.png"]
    assert rows[1][1:] == [""] * 12
    assert all(rows[0])


def test_several_labels_an_image(tmp_path):
    module = ViTClassifier(**SMALL | {"num_classes": 3}, multi_label=True, loss="sigmoid").eval()
    nn.init.zeros_(module.head.weight)
    module.head.bias.data = torch.tensor([2.0, -2.0, 1.0])
    _, *rows = predict(tmp_path, module, DataLoader(torch.rand(2, 1, 8, 8)))
    expected = ["0|2", "0.880797|0.731059", "0.880797", "0.119203", "0.731059"]
    assert rows == [["0", *expected], ["1", *expected]]


class Predicts(Net):
    def __init__(self, value) -> None:
        super().__init__()
        self.value = value

    def predict_step(self, batch, batch_idx):
        return self.value


def test_other_modules_say_themselves_what_is_written_or_are_asked_to(tmp_path):
    class Boxes(Predicts):
        def prediction_rows(self, outputs):
            return [[{"box": box, "score": 0.5} for box in boxes] for boxes in outputs]

    data = loader(1, batch_size=2)
    rows = predict(tmp_path, Boxes([["a", "b"], []]), data)
    assert rows == [["file", "box", "score"], ["0", "a", "0.5"], ["0", "b", "0.5"]]
    rows = predict(tmp_path, Predicts(torch.tensor([[3.0, -1.0], [0.0, 2.0]])), data)
    assert rows[0] == ["file", "class", "score", "score_0", "score_1"]
    assert rows[1:] == [["0", "0", "3.000000", "3.000000", "-1.000000"], ["1", "1", "2.000000", "0.000000", "2.000000"]]
    before = (tmp_path / "predictions.csv").read_bytes()
    with pytest.raises(
        ValueError, match=r"Predicts predicts dict, not probabilities \(B, classes\): define prediction_rows"
    ):
        predict(tmp_path, Predicts({}), data)
    with pytest.raises(ValueError, match="1 predictions for 540 images|3 predictions for 60 images"):
        predict(tmp_path, Predicts(torch.zeros(3, 2)), DigitsDataModule(num_workers=0))
    assert (tmp_path / "predictions.csv").read_bytes() == before  # what failed has replaced nothing
    assert [file.name for file in tmp_path.iterdir()] == ["predictions.csv"]


# The progress bar.


def test_without_a_terminal_a_line_for_each_validation(tmp_path, capsys):
    trainer = Trainer(
        max_epochs=4, logger=False, callbacks=[ProgressBar()], default_root_dir=tmp_path, check_val_every_n_epoch=2,
        enable_checkpointing=False, **QUIET | {"enable_progress_bar": True},
    )  # fmt: skip
    trainer.fit(Net(), loader(), loader(2))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert [line.split("  ")[0] for line in lines] == ["epoch 2/4", "epoch 4/4"]
    assert all("lr 1.00e-01" in line and "val/loss" in line for line in lines)


def test_on_a_terminal_the_bar_shows_learning_rate_and_loss_and_no_version(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # which is how rich is told that it writes to a terminal
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(rich, "_console", None)  # one for all of a process, which is not to colour what others print

    class Shows(Net):
        def training_step(self, batch, batch_idx):
            loss = self(batch[0]).square().mean()
            self.log("train/loss", loss, prog_bar=True)
            return loss

    trainer = Trainer(
        max_epochs=1, logger=CSVLogger(tmp_path), callbacks=[bar := ProgressBar()], enable_checkpointing=False,
        **QUIET | {"enable_progress_bar": True},
    )  # fmt: skip
    trainer.fit(Shows(), loader())
    assert bar.is_enabled
    shown = capsys.readouterr().out
    assert "lr: 1.00e-01" in shown
    assert "train/loss: " in shown
    assert "v_num" not in shown
    assert "8/8" in shown


# The encoder in a file.


def test_the_backbone_is_written_at_the_end_of_a_fit(tmp_path):
    sizes = {"image_size": 8, "patch_size": 4, "in_channels": 1, "width": 16, "depth": 1, "heads": 2}
    model, export = ViTClassifier("vit_tiny_patch16_224", num_classes=10, **sizes), ExportBackbone()
    fit(tmp_path, model, export, data=DigitsDataModule(), max_steps=2, limit_val_batches=0)
    assert export.last_path == tmp_path / "encoder.safetensors"
    written = load_file(export.last_path)
    assert written.keys() == model.backbone.state_dict().keys()
    assert all(torch.equal(value, written[name]) for name, value in model.backbone.state_dict().items())


def test_a_module_without_a_backbone_is_refused_before_it_trains(tmp_path):
    with pytest.raises(ValueError, match="Net has no backbone to write: leave ExportBackbone out"):
        fit(tmp_path, Net(), ExportBackbone())
    with pytest.raises(ValueError, match="expected one that ends in .safetensors"):
        ExportBackbone("encoder.pth")
