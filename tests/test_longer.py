"""Runs that are continued for longer than they were meant to last, beside those that were as long from the first."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from test_resume import LISTS, Images, Net, assert_same, train

from zoo.callbacks import EMA


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR")


class ByStep(Net):
    """A schedule that does not ask how long the run is."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ByEpoch(Net):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


class Plateau(Net):
    """Divides its learning rate in nearly every update, so that none can be missed."""

    interval, frequency, monitor = "epoch", 1, "val/loss"

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.9, patience=0, threshold=0.5)
        schedule = {"scheduler": schedule, "interval": self.interval, "frequency": self.frequency}
        return {"optimizer": optimizer, "lr_scheduler": schedule | {"monitor": self.monitor}}


class PlateauOfSteps(Plateau):
    interval, monitor = "step", "train/loss"

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.trainer.callback_metrics["train/loss"] = loss.detach()
        return loss


class PlateauOfTwoEpochs(Plateau):
    frequency = 2


class Stop(Callback):
    """Ends the run after a step, within an epoch."""

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step == 7


SHORT, LONG = {"max_steps": 7, "max_epochs": -1}, {"max_steps": 20, "max_epochs": -1}
CASES: dict[str, tuple[type, dict[str, Any], dict[str, Any]]] = {
    "steps": (ByStep, SHORT, LONG),
    "steps, schedule of epochs": (ByEpoch, SHORT, LONG),
    "steps, to the end of an epoch": (ByEpoch, SHORT | {"max_steps": 10}, LONG),
    "steps, then epochs": (ByStep, SHORT, {"max_epochs": 4}),
    "steps of two batches": (ByStep, SHORT | {"max_steps": 4}, LONG | {"max_steps": 10}),
    "steps, validated last": (ByStep, SHORT | {"max_steps": 8}, LONG),
    "epochs": (ByEpoch, {"max_epochs": 2}, {"max_epochs": 4}),
    "told to stop": (ByStep, {"max_epochs": 4}, {"max_epochs": 4}),
    "plateau of epochs": (Plateau, {"max_epochs": 2}, {"max_epochs": 4}),
    "plateau of epochs, steps": (Plateau, SHORT | {"max_steps": 8}, LONG),
    "plateau of every second epoch": (PlateauOfTwoEpochs, {"max_epochs": 3}, {"max_epochs": 4}),
    "plateau of steps": (PlateauOfSteps, SHORT | {"max_steps": 8}, LONG),
    "plateau of steps, epochs": (PlateauOfSteps, {"max_epochs": 2}, {"max_epochs": 4}),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "steps of two batches": {"accumulate_grad_batches": 2},
    "steps, validated last": {"val_check_interval": 3},
    "plateau of steps": {"val_check_interval": 3},
    "plateau of epochs, steps": {"val_check_interval": 3},
}


class SaveAfterwards(Callback):
    """As somebody who calls trainer.save_checkpoint when the fit is over."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def teardown(self, trainer, pl_module, stage):
        trainer.save_checkpoint(self.folder / "99-afterwards.ckpt")


@pytest.mark.parametrize("name", CASES)
def test_a_run_continued_for_longer_equals_one_that_was_as_long_from_the_first(tmp_path, name):
    module, short, long = CASES[name]
    options = {"module": module, "callbacks": lambda: [EMA(0.9)]} | OPTIONS.get(name, {})
    (expected,) = train(tmp_path / "whole", Images(), seed=1, **options, **long)
    stops = {"callbacks": lambda: [EMA(0.9), *([Stop()] if name == "told to stop" else []), SaveAfterwards(tmp_path)]}
    train(tmp_path / "short", Images(), seed=1, **options | stops, **short)
    paths = [*sorted((tmp_path / "short").glob("*.ckpt")), tmp_path / "99-afterwards.ckpt"]
    assert len(paths) > 8
    for path in paths[:-4:3] + paths[-4:]:
        # What it saves meanwhile is test_resume.py's.
        (found,) = train(tmp_path / path.stem, Images(), seed=2, checkpoint=path, saves=False, **options, **long)
        for part in LISTS:
            rest = expected[part][len(expected[part]) - len(found[part]) :]
            assert_same(rest, found[part], f"{path.name}: {part}")
        assert_same(expected["state"], found["state"], f"{path.name}: ")


NUMBERS: dict[str, Any] = {"float": 0.5, "int": 3, "bool": True, "float64": np.float64(0.25), "int64": np.int64(7)}
NUMBERS |= {"tensor": torch.tensor(2.0), "half": torch.tensor(2.0, dtype=torch.float16)}


class Numbers(Callback):
    """Puts numbers of any kind among the metrics, where Lightning keeps tensors, and looks what it finds there."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def on_train_batch_end(self, trainer, *args):
        trainer.callback_metrics.update(NUMBERS | {"no number": object()})

    def on_train_epoch_end(self, trainer, *args):
        for name in (*NUMBERS, "no number"):  # Record keeps the others
            del trainer.callback_metrics[name]

    def on_train_batch_start(self, trainer, *args):
        self.found = self.found or dict(trainer.callback_metrics)


def test_numbers_among_the_metrics_break_no_checkpoint_and_come_back_as_what_they_were(tmp_path):
    train(tmp_path / "whole", Images(), seed=1, callbacks=lambda: [Numbers()], max_epochs=1)
    numbers = Numbers()
    for path in sorted((tmp_path / "whole").glob("*batch*.ckpt"))[1:3]:
        numbers.found = {}
        train(tmp_path / path.stem, Images(), seed=2, checkpoint=path, callbacks=lambda: [numbers], max_epochs=1)
        found = {name: numbers.found[name] for name in NUMBERS}
        assert found == NUMBERS
        assert [type(found[name]) for name in ("float", "int", "bool", "float64", "int64")] == [
            float,
            int,
            bool,
            float,
            int,
        ]
        assert found["half"].dtype == torch.float16
        assert "no number" not in numbers.found
