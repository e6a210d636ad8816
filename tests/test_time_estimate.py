"""When a fit will end: said after its first steps, and right, whatever ends it."""

import re
import time
import timeit
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from zoo.callbacks import TimeEstimate, time_estimate
from zoo.cli import main

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
STEP, COMPILE, EPOCH = 0.25, 60.0, 20


class Clock:
    """Time that passes when it is told to. Dates are the machine's."""

    time, localtime, strftime = (staticmethod(getattr(time, name)) for name in ("time", "localtime", "strftime"))

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(time_estimate, "time", found)
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time", found)
    return found


class Net(LightningModule):
    """Compiles in its first step; validation takes the same however many batches it has."""

    def __init__(self, clock: Clock, validation: float = 2.0) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.clock, self.validation = clock, validation
        self.compiled = False

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.clock.now += STEP if self.compiled else COMPILE
        self.compiled = True
        return self.layer(batch).mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.clock.now += self.validation
        self.log("val/loss", -self.clock.now)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Stream(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.zeros(2)


class Watch(Callback):
    """The clock at the end of training, and at each line."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end = pl_module.clock.now


def loader(batches: int = EPOCH) -> DataLoader:
    return DataLoader(torch.zeros(2 * batches, 2), batch_size=2)


def fit(clock: Clock, data: DataLoader | None = None, val: bool = True, validation: float = 2.0, **options):
    """The callback, once a fit with it is over, and when the fit ended."""
    estimate, watch = TimeEstimate(), Watch()
    callbacks = [estimate, watch, *options.pop("callbacks", [])]
    checkpoint = options.pop("ckpt_path", None)
    net = Net(clock, validation)
    trainer = Trainer(accelerator="cpu", callbacks=callbacks, **QUIET | options)
    data = loader() if data is None else data
    trainer.fit(net, data, DataLoader(torch.zeros(1, 2)) if val else None, ckpt_path=checkpoint)
    return estimate, watch.end


BOUNDS = {
    "epochs": {"max_epochs": 30},
    "steps": {"max_steps": 500},
    "steps in an epoch": {"max_epochs": 30, "max_steps": 90},
    "epochs before steps": {"max_epochs": 10, "max_steps": 5000},
    "accumulated": {"max_steps": 60, "accumulate_grad_batches": 4},
    "accumulated epochs": {"max_epochs": 12, "accumulate_grad_batches": 4},
    "limited": {"max_epochs": 40, "limit_train_batches": 15},
    "four validations an epoch": {"max_epochs": 15, "val_check_interval": 0.25},
    "validation every third epoch": {"max_epochs": 30, "check_val_every_n_epoch": 3},
    "validation by steps alone": {"max_epochs": 20, "val_check_interval": 30, "check_val_every_n_epoch": None},
    "no validation": {"max_epochs": 20, "val": False},
    "validation switched off": {"max_epochs": 20, "limit_val_batches": 0},
    "quick validation": {"max_epochs": 20, "validation": 0.01},
    "slow validation": {"max_epochs": 20, "validation": 60.0},
    "one epoch of many steps": {"max_epochs": 1, "data": loader(300)},
    "epochs of a step": {"max_epochs": 60, "data": loader(1), "validation": 0.1},
    "data without a length": {"max_steps": 300, "data": DataLoader(Stream(), 2), "val": False},
    "and validation": {"max_steps": 300, "data": DataLoader(Stream(), 2), "val_check_interval": 50},
}


@pytest.mark.parametrize("case", BOUNDS)
def test_what_it_says_last_comes_true(case: str, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    started = clock.now
    estimate, end = fit(clock, **BOUNDS[case])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("time: ")]
    assert 1 <= len(lines) <= 2
    took, said = end - started, estimate._end - started
    assert said == pytest.approx(took, rel=0.34 if len(lines) == 1 else 0.06)
    assert "250 ms a step" in lines[0]
    assert len(lines) == 2 or "not counted" not in lines[0] or said >= took * 0.74
    assert ("validation" in lines[-1]) == (estimate._validations > 0 or "not counted" in lines[0])


def test_the_first_line_comes_after_some_seconds_of_steps_and_leaves_the_first_step_out(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    class Looks(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if (out := capsys.readouterr().out) and not hasattr(self, "line"):
                self.line, self.steps = out, trainer.global_step

    looks = Looks()
    fit(clock, max_epochs=100, val=False, callbacks=[looks])
    assert looks.steps == 1 + 3 / STEP
    clock_time = time.strftime("%H:%M", time.localtime(time.time() + 2000 * STEP))
    assert looks.line.startswith("time: about 8.3 min, until ")
    assert looks.line.endswith(": 100 epochs of 20 steps at 250 ms a step\n")
    assert abs(int(looks.line.split(":")[2][:2]) - int(clock_time.split(":")[1])) in (0, 1, 59)


def test_validation_is_named_once_it_is_known_and_a_wrong_estimate_is_said_once(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(clock, max_epochs=20, validation=60.0)
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(": 20 epochs of 20 steps at 250 ms a step, validation not counted")
    assert second.endswith(": 19 more epochs of 20 steps at 250 ms a step and 60 s a validation")
    fit(clock, max_epochs=20, validation=0.5)
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_epochs": -1, "max_time": "00:00:05:00"}, r"about 4 min, until \d\d:\d\d: max_time, at 250 ms a step"),
        ({"max_epochs": 9999, "max_time": "00:00:05:00"}, "about 4 min, until .*: max_time, at 250 ms a step"),
        (
            {"max_epochs": 20, "max_time": "00:05:00:00"},
            "about 1.6 min, until .*: 20 epochs of 20 steps at 250",
        ),
        ({"max_epochs": 10**5}, r"about 5.8 days, until \w\w\w \d\d \w\w\w, \d\d:\d\d: 100000 epochs of 20 steps"),
        ({"max_steps": 10**5}, "about 6.9 h, until .*: 99,987 more steps at 250 ms a step"),
    ],
)
def test_what_ends_a_fit_is_said(options: dict, said: str, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    class Enough(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.global_step >= 60

    fit(clock, val=False, callbacks=[Enough()], **options)
    assert re.match("time: " + said, capsys.readouterr().out)


def test_where_nothing_ends_it_that_is_said(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    def stop() -> list[Callback]:
        return [EarlyStopping("val/loss", mode="max", patience=1)]

    for options in ({}, {"data": DataLoader(Stream(), 2), "val_check_interval": 50}):
        fit(clock, max_epochs=-1, callbacks=stop(), **options)
        out = capsys.readouterr().out
        assert out.startswith("time: no end is set, by max_steps or otherwise; 250 ms a step")
        assert len(out.splitlines()) == 1
    fit(clock, max_epochs=1000, callbacks=stop())
    assert capsys.readouterr().out.endswith("; earlier if EarlyStopping says so\n")


def test_of_a_continued_run_it_is_what_is_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    saver = ModelCheckpoint(dirpath=".", filename="half")
    fit(clock, max_epochs=10, val=False, callbacks=[saver], enable_checkpointing=True)
    capsys.readouterr()
    started = clock.now
    estimate, end = fit(clock, max_epochs=30, val=False, ckpt_path="half.ckpt")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(": 20 more epochs of 20 steps at 250 ms a step")
    assert estimate._end - started == pytest.approx(end - started, rel=0.02)


def test_a_fit_of_a_moment_and_what_is_no_fit_say_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    fit(clock, max_steps=8, val=False)
    trainer = Trainer(accelerator="cpu", callbacks=[TimeEstimate(0)], **QUIET)
    trainer.validate(Net(clock), DataLoader(torch.zeros(9, 2)), verbose=False)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="seconds is -1: expected at least 0"):
        TimeEstimate(-1)


def test_of_several_processes_the_first_speaks(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    one = TimeEstimate(0)
    one.on_train_start(SimpleNamespace(is_global_zero=False), None)
    for index in range(9):
        one.on_train_batch_end(SimpleNamespace(), None, None, None, index)
    assert capsys.readouterr().out == ""


def test_a_step_costs_next_to_nothing() -> None:
    one = TimeEstimate(seconds=1e9)
    one.on_train_start(SimpleNamespace(is_global_zero=True), None)
    costs = [timeit.timeit(lambda: one.on_train_batch_end(None, None, None, None, 0), number=1000) for _ in range(5)]
    assert min(costs) / 1000 < 0.01e-3


def test_the_command_line_adds_it_where_progress_is_shown(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(TimeEstimate.__init__, "__defaults__", (0.0,))
    short = ["fit", "-c", "vit/digits", "--trainer.max_epochs=1", "--trainer.limit_train_batches=4"]
    short += ["--model.warmup_epochs=0", "--trainer.log_every_n_steps=1"]
    for shown in ("true", "false"):
        capsys.readouterr()
        assert main([*short, "--trainer.enable_progress_bar", shown]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("time: about ")]
        assert len(lines) == (shown == "true")
