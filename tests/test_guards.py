"""All guards at once, as the command line adds them and as anybody can."""

import math
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.tuner import Tuner
from test_resume import QUIET, Images, Net, assert_same
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from zoo.callbacks import (
    EMA,
    ExactResume,
    FailTogether,
    KeepPreprocessing,
    NonFiniteGuard,
    OptimizerSettings,
    PreemptionGuard,
    Provenance,
)
from zoo.checkpoints import AtomicCheckpointIO, TorchCheckpointIO
from zoo.guards import guard


def kinds(trainer: Trainer) -> list[str]:
    return [type(callback).__name__ for callback in trainer.callbacks]


def test_they_stand_behind_what_changes_weights_and_before_what_saves():
    trainer = guard(Trainer(callbacks=[ModelCheckpoint(), EMA()], logger=False, **QUIET))
    guards = ["NonFiniteGuard", "Provenance", "FailTogether", "ExactResume", "PreemptionGuard"]
    assert kinds(trainer) == [
        "KeepPreprocessing",
        "OptimizerSettings",
        "EMA",
        *guards,
        "ModelCheckpoint",
        "ResumePoint",
    ]
    assert type(trainer.strategy.checkpoint_io) is AtomicCheckpointIO


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"])
def test_the_launcher_that_ends_all_processes_itself_is_not_helped(monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    installed = kinds(guard(Trainer(logger=False, enable_checkpointing=False, **QUIET)))
    assert ("FailTogether" in installed) == (variable != "TORCHELASTIC_RUN_ID")
    saves = ModelCheckpoint(save_on_exception=True)  # the one that failed would wait for the others, and not end
    assert "FailTogether" in kinds(guard(Trainer(callbacks=[saves], logger=False, **QUIET)))
    mine = FailTogether()
    assert mine in guard(Trainer(callbacks=[mine], logger=False, enable_checkpointing=False, **QUIET)).callbacks


@pytest.mark.slow
def test_torchrun_is_such_a_launcher():
    code = "from torch.distributed import is_torchelastic_launched as found; raise SystemExit(0 if found() else 7)"
    Path("asks.py").write_text(code)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "asks.py"]
    assert subprocess.run(run, capture_output=True).returncode == 0
    assert subprocess.run([sys.executable, "asks.py"]).returncode == 7


def test_what_is_there_stays():
    own = [PreemptionGuard(every_n_steps=7), ExactResume(), NonFiniteGuard(3), FailTogether(), Provenance("mine")]
    own += [KeepPreprocessing(), OptimizerSettings()]
    trainer = guard(Trainer(callbacks=own, logger=False, enable_checkpointing=False, **QUIET))
    assert trainer.callbacks == own
    assert kinds(guard(trainer)) == kinds(trainer)

    class Mine(TorchCheckpointIO):
        pass

    trainer = guard(Trainer(plugins=[mine := Mine()], logger=False, **QUIET))
    assert trainer.strategy.checkpoint_io is mine


@pytest.mark.parametrize(("given", "expected"), [({}, 10), ({"timeout": timedelta(minutes=3)}, 3)])
def test_a_collective_operation_has_ten_minutes_unless_somebody_says_otherwise(given, expected):
    trainer = guard(Trainer(strategy=DDPStrategy(**given), devices=2, logger=False, **QUIET))
    assert trainer.strategy._timeout == timedelta(minutes=expected)


def test_in_a_trainer_of_ones_own_a_run_is_continued_exactly_and_its_checkpoints_say_what_made_them(tmp_path):
    for run, checkpoint in (("whole", None), ("rest", "whole/step=3.ckpt")):
        torch.manual_seed(7)
        module = Net()
        torch.manual_seed(1 if checkpoint is None else 2)
        save = ModelCheckpoint(dirpath=run, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = guard(Trainer(max_epochs=2, callbacks=[EMA(), save], logger=False, **QUIET), config="lr: 1")
        trainer.fit(module, Images(), ckpt_path=checkpoint)
    whole, rest = (torch.load(f"{run}/step=10.ckpt", weights_only=True) for run in ("whole", "rest"))
    assert not Path("rest/step=3.ckpt").exists()
    for part in whole.keys() - {"callbacks", "loops"}:
        assert_same(whole[part], rest[part], part)
    assert whole["provenance"]["config"] == "lr: 1"


def test_a_folder_that_another_process_saves_to_is_refused(tmp_path):
    """That is the plugin's part; here, that the guards switch it on."""
    assert guard(Trainer(logger=False, **QUIET)).strategy.checkpoint_io.exclusive


# What comes after a fit that has failed, in the same process and with the same Trainer: a notebook.


class Fails(LightningModule):
    """Fails in one place in the fourth batch, or before training, until it is mended."""

    def __init__(self, place: str = "") -> None:
        super().__init__()
        self.layer, self.place = nn.Linear(4, 2), place

    def _fail(self, place: str) -> None:
        if place == self.place:
            raise KeyboardInterrupt if place == "interrupt" else ValueError("a fault on purpose")

    def setup(self, stage):
        self._fail("setup")

    def on_fit_start(self):
        self._fail("fit start")

    def on_train_start(self):
        self._fail("train start")

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        if batch_idx != 3:
            return loss
        self._fail("step")
        self._fail("interrupt")
        if self.place.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, self.place))
        if self.place == "weights":
            return loss + Infinite.apply(self.layer.bias).sum()
        return loss * math.nan if self.place in ("loss", "skipped step") else loss

    def on_before_optimizer_step(self, optimizer):
        if self.global_step == 3:
            self._fail("skipped step")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == 3:
            self._fail("batch end")

    def validation_step(self, batch, batch_idx):
        self._fail("validation")
        self.log("val/loss", self.layer(batch).square().mean())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Infinite(torch.autograd.Function):
    """Zero, with an infinite gradient."""

    @staticmethod
    def forward(ctx, x):
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, gradient):
        return torch.full_like(gradient, math.inf)


def fails(place: str = "", seed: int = 3) -> Fails:
    torch.manual_seed(seed)
    return Fails(place)


def batches(count: int) -> DataLoader:
    return DataLoader(torch.randn(2 * count, 4, generator=torch.Generator().manual_seed(0)), batch_size=2)


def failed(folder: Path, module: Fails, guarded: bool = True) -> Trainer:
    """A Trainer whose first fit has failed."""
    saver = ModelCheckpoint(folder, every_n_train_steps=2, save_on_exception=True)
    own = [NonFiniteGuard(skip=1)] if module.place == "skipped step" else []
    options = {"max_epochs": 2, "logger": False, "val_check_interval": 4, "gradient_clip_val": 0.5}
    trainer = Trainer(callbacks=[*own, saver], **QUIET | {"num_sanity_val_steps": 0} | options)
    if guarded:
        guard(trainer)
    with pytest.raises((Exception, SystemExit)):
        trainer.fit(module, batches(8), batches(2))
    return trainer


def untouched(trainer: Trainer) -> bool:
    """Whether a Trainer is as it was before its first fit, apart from what it has counted."""
    plain = type(trainer.strategy).lightning_module_state_dict.__get__(trainer.strategy)
    clips = trainer.gradient_clip_val == 0.5
    return (
        clips
        and trainer.strategy.lightning_module_state_dict == plain
        and trainer.checkpoint_callback.save_on_exception
    )


def fit_again(trainer: Trainer, module: Fails) -> dict[str, Any]:
    trainer.fit(module, batches(8), batches(2))
    return {"weights": module.state_dict(), "momentum": trainer.optimizers[0].state_dict()["state"]}


# Where the guards end a fit, and where one that fails by itself is as far.
SAME_AS = {"loss": "step", "interrupt": "step", "SIGTERM": "batch end", "SIGHUP": "batch end", "SIGINT": "batch end"}
BY_ITSELF = ["setup", "fit start", "train start", "step", "validation", "batch end"]


@pytest.mark.filterwarnings("ignore:skipped a step", "ignore:Checkpoint directory")
@pytest.mark.parametrize("place", [*BY_ITSELF, *SAME_AS, "weights", "skipped step"])
def test_what_comes_after_a_failed_fit_is_not_judged_by_it(tmp_path, place):
    expected = None
    if place in BY_ITSELF or place in SAME_AS:
        plain = failed(tmp_path / "plain", fails(SAME_AS.get(place, place)), guarded=False)
        expected = fit_again(plain, fails(seed=4))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    trainer = failed(tmp_path / "fit", bad := fails(place))
    found = fit_again(trainer, fails(seed=4))
    if expected:
        assert_same(expected, found)
    assert untouched(trainer)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    if place != "weights":  # its own are spoilt for good
        trainer, bad.place = failed(tmp_path / "same", bad), ""
        fit_again(trainer, bad)
        assert untouched(trainer)

    for stage in ("validate", "test"):
        trainer, good = failed(tmp_path / stage, fails(place)), fails(seed=4)
        getattr(trainer, stage)(good, batches(2), verbose=False)
        assert untouched(trainer)
        trainer.save_checkpoint(tmp_path / f"{stage}.ckpt", weights_only=False)
        assert_same(dict(good.state_dict()), torch.load(tmp_path / f"{stage}.ckpt", weights_only=True)["state_dict"])
        fit_again(trainer, good)


class BadData(Images):
    bad = True

    def setup(self, stage):
        if self.bad:
            raise ValueError("a fault on purpose")


def test_a_fit_that_fails_before_the_guards_are_set_up_leaves_the_next_one_alone(tmp_path):
    trainer, data = failed(tmp_path, fails("weights")), BadData()
    with pytest.raises(ValueError, match="a fault on purpose"):  # and not that weights of before are not finite
        trainer.fit(fails(seed=4), data)
    data.bad = False  # the Trainer keeps it
    fit_again(trainer, fails(seed=4))
    assert untouched(trainer)


def test_a_saver_that_was_kept_from_saving_saves_for_the_next_trainer(tmp_path):
    trainer = failed(tmp_path, fails("weights"))
    assert not list(tmp_path.glob("*step=4*"))
    again = guard(Trainer(max_epochs=1, callbacks=[trainer.checkpoint_callback], logger=False, **QUIET))
    with pytest.raises(ValueError, match="a fault on purpose"):
        again.fit(fails("step"), batches(8))
    assert [file.name for file in tmp_path.glob("*step=3.ckpt")]  # step 2 is due, and step 3 is the exception's


# Lightning's own tools, with the guards and without.


class Tuned(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lr = 1e-2

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


TUNERS: dict[str, tuple[Any, Any]] = {
    "lr_find": (list, lambda trainer, *what: Tuner(trainer).lr_find(*what, num_training=16).suggestion()),
    "scale_batch_size": (list, lambda trainer, *what: Tuner(trainer).scale_batch_size(*what, max_trials=2)),
    "LearningRateFinder": (lambda: [LearningRateFinder(num_training_steps=16)], None),
    "BatchSizeFinder": (lambda: [BatchSizeFinder(max_trials=2)], None),
}


@pytest.mark.parametrize("name", TUNERS)
def test_a_tuner_leaves_the_module_and_the_next_fit_as_without_guards(tmp_path, name, caplog):
    caplog.set_level("ERROR")
    callbacks, tune = TUNERS[name]
    results = []
    for guarded in (False, True):
        torch.manual_seed(7)
        module, data = Tuned(), Images()
        seed_everything(1, verbose=False)
        # Validation draws random numbers, which ExactResume takes back.
        options = {"max_epochs": 2, "limit_val_batches": 0, "logger": False, "enable_checkpointing": False}
        trainer = Trainer(callbacks=callbacks(), default_root_dir=tmp_path, **QUIET | options)
        if guarded:
            guard(trainer)
        before = {key: value.clone() for key, value in module.state_dict().items()}
        found = tune(trainer, module, data) if tune else None
        assert_same(before, dict(module.state_dict()))
        trainer.fit(module, data)
        settings = {"found": found, "lr": module.lr, "batch_size": data.batch_size, "steps": trainer.global_step}
        results.append(settings | {"weights": dict(module.state_dict())})
    assert_same(*results)


class Manual(Net):
    """Two optimizers, the second in every other step, and a schedule that it steps by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization, self.extra = False, nn.Linear(10, 10)

    def training_step(self, batch, batch_idx):
        images, indices = batch
        first, second = self.optimizers()
        out = self.net(images + 0.1 * torch.randn_like(images))
        loss = F.cross_entropy(out, indices % 10)
        self.step_log(self, {"train/loss": loss})
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        if batch_idx % 2:
            second.zero_grad()
            self.manual_backward(self.extra(out.detach()).square().mean())
            second.step()
            self.lr_schedulers().step()

    def configure_optimizers(self):
        first = torch.optim.AdamW(self.net.parameters(), lr=1e-2)
        second = torch.optim.SGD(self.extra.parameters(), lr=0.1, momentum=0.9)
        return [first, second], [torch.optim.lr_scheduler.StepLR(second, 2, 0.5)]


class Sgd(Net):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def swa() -> list[Callback]:
    return [StochasticWeightAveraging(0.01, swa_epoch_start=2, annealing_epochs=2, device=None)]


def stopping() -> list[Callback]:
    return [EarlyStopping("val/loss", patience=2, min_delta=10)]  # nothing is that much better: it stops after epoch 2


TOOLS: dict[str, tuple[type, Any, dict[str, Any]]] = {
    "manual optimization": (Manual, list, {"every_n_train_steps": 1}),
    "StochasticWeightAveraging": (Sgd, swa, {"every_n_epochs": 1}),  # it begins and averages where epochs start
    "EarlyStopping": (Sgd, stopping, {"every_n_epochs": 1}),
}


@pytest.mark.parametrize("name", TOOLS)
def test_a_run_with_a_tool_of_lightnings_is_continued_exactly(tmp_path, name, caplog):
    caplog.set_level("ERROR")
    kind, callbacks, saves = TOOLS[name]

    def run(folder: Path, seed: int, checkpoint: Path | None = None) -> Trainer:
        torch.manual_seed(7)
        module = kind()
        seed_everything(seed, verbose=False)
        saver = ModelCheckpoint(
            folder, "{step:02}", save_top_k=-1, save_on_train_epoch_end="every_n_epochs" in saves, **saves
        )
        options = {"max_epochs": 2 if kind is Manual else 4, "logger": False, "log_every_n_steps": 2}
        trainer = guard(Trainer(callbacks=[*callbacks(), saver], **QUIET | options))
        trainer.fit(module, Images(), ckpt_path=checkpoint, weights_only=True)
        return trainer

    def state(trainer: Trainer) -> dict[str, Any]:
        return {
            "weights": dict(trainer.lightning_module.state_dict()),
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "metrics": dict(trainer.callback_metrics),
            "random": torch.get_rng_state(),
            "steps": (trainer.global_step, trainer.current_epoch),
        }

    whole = run(tmp_path / "whole", seed=1)
    steps = 15 if name == "EarlyStopping" else whole.global_step
    assert whole.global_step == steps
    # The last of a fit; and Lightning's averaging forgets its schedule before the epoch that is for BatchNorm.
    last = 2 if name == "StochasticWeightAveraging" else 1
    paths = sorted((tmp_path / "whole").glob("step=*.ckpt"))[:-last]
    assert len(paths) >= 2
    for path in paths[::2] if kind is Manual else paths:
        found = run(tmp_path / path.stem, 2, path)
        assert_same(state(whole), state(found), path.name)
