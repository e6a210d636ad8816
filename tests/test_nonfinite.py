"""NonFiniteGuard: what it stops, what it skips, what it keeps, and that no checkpoint holds what is not finite."""

import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from datamodules import DigitsDataModule
from zoo import ViTClassifier, cli
from zoo.callbacks import EMA, GradientNorm, NonFiniteGuard, NonFiniteLossError
from zoo.callbacks.nonfinite import NonFiniteWeightError

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
EACH = {"every_n_train_steps": 1, "save_top_k": -1, "auto_insert_metric_name": False}


class Net(LightningModule):
    """A small network with BatchNorm, momentum, weight decay and a schedule: all that a skipped step must not touch.

    In the batches ``at`` and on the rank ``on`` it does what ``does`` says: ``nan`` or ``inf`` multiplies the loss;
    ``offset`` adds infinity to it, whose gradients are fine; ``input`` feeds infinity; ``gradient`` leaves the loss
    alone and makes a gradient infinite. None leaves the step out, by Lightning's own way.
    """

    def __init__(self, at: tuple[int, ...] = (), does: str | None = "nan", on: int = 0, fused: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.at, self.does, self.on, self.fused = at, does, on, fused
        self.first, self.norm, self.second = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.register_buffer("mask", torch.full((2,), -math.inf))

    def forward(self, x):
        return self.second(self.norm(self.first(x)))

    def training_step(self, batch, batch_idx):
        images, bad = batch[0], batch_idx in self.at and self.global_rank == self.on
        if bad and self.does is None:
            return None
        loss = self(images * math.inf if bad and self.does == "input" else images).square().mean()
        if bad and self.does in ("nan", "inf"):
            return loss * float(self.does)
        if bad and self.does == "offset":
            return loss + math.inf
        if bad and self.does == "gradient":
            loss = loss + Infinite.apply(self.first.weight).sum() * 0 + Infinite.apply(self.second.bias).sum()
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self(batch[0]).square().mean(), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 0.01, weight_decay=0.1, fused=self.fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class LeavesOut(Net):
    """Lightning's way to leave a step out, as far as it goes: torch fails to clip the values of no gradients."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        if any(parameter.grad is not None for parameter in self.parameters()):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)


class Infinite(torch.autograd.Function):
    """Zero, with an infinite gradient."""

    @staticmethod
    def forward(ctx, x):
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, gradient):
        return torch.full_like(gradient, math.inf)


def loader(steps: int = 8, batch_size: int = 4) -> DataLoader:
    data = torch.randn(steps * batch_size, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(data), batch_size=batch_size)


def fit(tmp_path: Path, module: LightningModule, *callbacks: Callback, data=None, val=None, **options) -> Trainer:
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False} | options
    trainer = Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), **QUIET | options)
    trainer.fit(module, data or loader(), val)
    return trainer


def two(tmp_path: Path, module: LightningModule, *callbacks: Callback, **options) -> Trainer:
    return fit(tmp_path, module, *callbacks, strategy="ddp_fork", devices=2, **options)


def each_step(folder: Path, **options) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "step{step}", **EACH | options)


def saved_steps(folder: Path) -> list[str]:
    return sorted(file.stem for file in folder.glob("step*.ckpt"))


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights, statistics, moments and learning rate; not the mask, since an average of infinities is NaN."""
    module, (optimizer,) = trainer.lightning_module, trainer.optimizers
    floats = {name: value for name, value in module.state_dict().items() if value.is_floating_point()}
    state = {name: value.clone() for name, value in floats.items() if name != "mask"}
    for index, moments in optimizer.state_dict()["state"].items():
        state |= {f"{index}.{name}": value.clone() for name, value in moments.items()}
    return state | {"lr": torch.tensor(optimizer.param_groups[0]["lr"])}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


# A loss stops the run.


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_no_number_stops_the_run_before_it_touches_a_weight(tmp_path, value):
    module = Net(at=(5,), does=value)
    with pytest.raises(
        NonFiniteLossError, match=r"^the loss is (nan|inf) at step 5 \(epoch 0, batch 5\); the batch is in .*$"
    ):
        fit(tmp_path, module, each_step(tmp_path), NonFiniteGuard(), enable_checkpointing=True)
    last = torch.load(tmp_path / "step5.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(module.first.weight, last["first.weight"])
    dumped = torch.load(tmp_path / "nonfinite_rank0.pt", weights_only=True)
    assert (dumped["step"], dumped["epoch"], dumped["batch_idx"], dumped["indices"]) == (5, 0, 5, None)
    assert torch.equal(dumped["batch"][0], list(loader())[5][0])
    assert saved_steps(tmp_path) == [f"step{n}" for n in range(1, 6)]


class DigitsDiverge(ViTClassifier):
    at = 6

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if self.global_step == self.at else loss


SMALL = {"backbone": "vit_tiny_patch16_224", "num_classes": 10, "image_size": 8, "patch_size": 4, "in_channels": 1}
SMALL |= {"width": 16, "depth": 1, "heads": 2}


@pytest.mark.parametrize("every", [None, 4])
def test_the_samples_of_the_batch_are_named_also_when_it_is_past(tmp_path, every):
    """Looked at every fourth batch, as on an accelerator, the loss of step 6 is found after step 7."""
    data = DigitsDataModule(num_workers=0, batch_size=16)
    with pytest.raises(
        NonFiniteLossError, match=r"at step 6 \(epoch 0, batch 6, samples \d+, .*, \.\.\.\); the batch is in"
    ):
        fit(tmp_path, DigitsDiverge(**SMALL), NonFiniteGuard(every), data=data)
    dumped = torch.load(tmp_path / "nonfinite_rank0.pt", weights_only=True)
    order = DigitsDataModule(num_workers=0, batch_size=16).train_dataloader().sampler
    assert dumped["indices"] == order.batch_indices(6, epoch=0)
    samples = data.samples("train")
    images, labels = dumped["batch"]
    assert labels.tolist() == [int(samples[index][1]) for index in dumped["indices"]]
    if every:  # loaded again, so as it comes from the disk
        assert torch.equal(images, torch.stack([samples[index][0] for index in dumped["indices"]]))
        assert dumped["losses"]["step"] == [4, 5, 6, 7]
    assert math.isnan(dumped["losses"]["loss"][-2 if every else -1])


def test_nothing_is_saved_between_two_looks_after_a_loss_that_is_no_number(tmp_path):
    saves = each_step(tmp_path, every_n_train_steps=2)
    with pytest.raises(NonFiniteLossError, match="at step 2 "):
        fit(tmp_path, Net(at=(2,)), saves, NonFiniteGuard(every_n_steps=8), enable_checkpointing=True)
    assert saved_steps(tmp_path) == ["step2"]


def test_a_run_saved_on_exception_is_saved(tmp_path):
    rescue = ModelCheckpoint(tmp_path, save_on_exception=True)
    with pytest.raises(NonFiniteLossError):
        fit(tmp_path, Net(at=(2,)), NonFiniteGuard(), rescue, enable_checkpointing=True)
    assert list(tmp_path.glob("*.ckpt"))


def test_two_processes_stop_together(tmp_path):
    with pytest.raises(Exception, match="not finite at step 2|the loss is nan at step 2"):
        two(tmp_path, Net(at=(2,), on=1), NonFiniteGuard(2))
    assert [file.name for file in tmp_path.glob("*.pt")] == ["nonfinite_rank1.pt"]


class OnRankOne(DigitsDiverge):
    def training_step(self, batch, batch_idx):
        self.at = 3 if self.global_rank == 1 else -1
        return super().training_step(batch, batch_idx)


def test_of_two_processes_the_one_that_met_it_keeps_its_own_samples(tmp_path):
    data = DigitsDataModule(num_workers=0, batch_size=16)
    with pytest.raises(Exception, match="at step 3"):
        two(tmp_path, OnRankOne(**SMALL), NonFiniteGuard(), data=data, log_every_n_steps=4)
    dumped = torch.load(tmp_path / "nonfinite_rank1.pt", weights_only=True)
    order = DigitsDataModule(num_workers=0, batch_size=32).train_dataloader().sampler
    assert dumped["indices"] == order.batch_indices(3, epoch=0)[1::2]
    labels = [int(data.samples("train")[index][1]) for index in dumped["indices"]]
    assert dumped["batch"][1].tolist() == labels


# No checkpoint holds weights that are not finite.


@pytest.mark.parametrize("weights_only", [False, True])
def test_weights_that_a_gradient_has_spoilt_are_not_saved(tmp_path, weights_only):
    saves = each_step(tmp_path, save_weights_only=weights_only)
    with pytest.raises(
        NonFiniteWeightError,
        match=r"^first\.weight is not finite after 4 steps, and not saved: .* smaller learning rate",
    ):
        fit(tmp_path, Net(at=(3,), does="gradient"), saves, NonFiniteGuard(), enable_checkpointing=True)
    assert saved_steps(tmp_path) == ["step1", "step2", "step3"]
    for file in tmp_path.glob("*.ckpt"):  # the mask is infinite on purpose
        state = torch.load(file, weights_only=True)["state_dict"]
        assert [name for name, value in state.items() if not value.isfinite().all()] == ["mask"]


def test_without_checkpoints_the_last_step_is_looked_at_too(tmp_path):
    with pytest.raises(NonFiniteWeightError, match="after 8 steps"):
        fit(tmp_path, Net(at=(7,), does="gradient"), NonFiniteGuard())


@pytest.mark.parametrize("saver", [ModelCheckpoint, OnExceptionCheckpoint])
def test_on_the_way_out_weights_that_are_not_finite_are_not_saved_either(tmp_path, saver):
    """The loss was found at the next look: the weights had already taken the step."""
    rescue = saver(tmp_path, save_on_exception=True) if saver is ModelCheckpoint else saver(tmp_path)
    with pytest.raises((NonFiniteLossError, NonFiniteWeightError)) as error:
        fit(tmp_path, Net(at=(2,)), NonFiniteGuard(every_n_steps=8), rescue, enable_checkpointing=True)
    assert not list(tmp_path.glob("*.ckpt"))
    if saver is ModelCheckpoint:
        assert isinstance(error.value, NonFiniteLossError)  # the first error is the one that is told


def test_two_processes_refuse_to_save_together(tmp_path):
    saves = each_step(tmp_path)
    with pytest.raises(Exception, match=r"NonFiniteWeightError: first\.weight is not finite after 2 steps"):
        two(tmp_path, Net(at=(1,), does="gradient", on=1), NonFiniteGuard(), saves, enable_checkpointing=True)
    assert saved_steps(tmp_path) == ["step1"]


def test_each_fit_of_a_trainer_is_looked_at_and_leaves_the_strategy_as_it_was(tmp_path):
    trainer = fit(tmp_path, module := Net(), NonFiniteGuard())
    given = trainer.strategy.lightning_module_state_dict
    assert given == type(trainer.strategy).lightning_module_state_dict.__get__(trainer.strategy)
    module.at, module.does, trainer.fit_loop.max_epochs = (7,), "gradient", 2
    with pytest.raises(NonFiniteWeightError, match="after 16 steps"):
        trainer.fit(module, loader())


# Skipping.


def skipped(tmp_path: Path, module: LightningModule, *callbacks: Callback, skip: int = 1, times: int = 1, **options):
    with pytest.warns(UserWarning, match="skipped a step") as caught:
        trainer = fit(tmp_path, module, *callbacks, NonFiniteGuard(skip=skip), **options)
    told = [str(warning.message) for warning in caught if "skipped a step" in str(warning.message)]
    assert len(told) == times
    return trainer, told


OPTIONS = {
    "plain": {},
    "clipped by norm": {"gradient_clip_val": 0.1, "with": [GradientNorm]},
    "clipped by value": {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value", "with": [EMA]},
    "bf16-mixed": {"precision": "bf16-mixed", "with": [GradientNorm]},
}


@pytest.mark.parametrize("does", ["nan", "input", "gradient"])
@pytest.mark.parametrize("setting", OPTIONS)
def test_a_skipped_step_changes_nothing_but_the_schedule(tmp_path, does, setting):
    """As if the training step had said, before its forward pass, that there is nothing to learn."""
    options = {"log_every_n_steps": 1} | OPTIONS[setting]
    extra = options.pop("with", [])
    module, without = Net(at=(3,), does=does), LeavesOut(at=(3,), does=None)
    without.load_state_dict(module.state_dict())
    trainer, (told,) = skipped(tmp_path, module, *(kind() for kind in extra), **options)
    expected = fit(tmp_path, without, *(kind() for kind in extra), **options)
    assert_same(state_of(trainer), state_of(expected))
    assert trainer.global_step == 8
    assert trainer.gradient_clip_val == options.get("gradient_clip_val")
    what = "the gradient of first.weight is not finite" if does == "gradient" else "the loss is nan"
    assert f"skipped a step, 1 in a row: {what} at step 3 (epoch 0, batch 3); the batch is in " in told
    dumped = torch.load(tmp_path / "nonfinite_rank0_step3.pt", weights_only=True)
    assert torch.equal(dumped["batch"][0], list(loader())[3][0])


def test_a_step_is_skipped_for_any_of_its_batches(tmp_path):
    """Batch 2 is the first of the second step, whose statistics are those before both of its batches."""
    module, without = Net(at=(2,), does="input"), LeavesOut(at=(2, 3), does=None)
    without.load_state_dict(module.state_dict())
    trainer, (told,) = skipped(tmp_path, module, accumulate_grad_batches=2)
    assert_same(state_of(trainer), state_of(fit(tmp_path, without, accumulate_grad_batches=2)))
    assert "the loss is nan at step 1 (epoch 0, batch 2); the batch is in" in told
    dumped = torch.load(tmp_path / "nonfinite_rank0_step1.pt", weights_only=True)
    assert dumped["losses"]["step"] == [1, 1]
    assert [math.isfinite(loss) for loss in dumped["losses"]["loss"]] == [False, True]


def test_so_many_in_a_row_and_not_one_more(tmp_path):
    trainer, told = skipped(tmp_path, Net(at=(1, 2, 4, 5)), skip=2, times=4)
    assert trainer.global_step == 8
    assert [line.split(":")[0] for line in told] == [f"skipped a step, {n} in a row" for n in (1, 2, 1, 2)]
    message = r"^the loss is nan at step 3 \(epoch 0, batch 3\); the batch is in .*/nonfinite_rank0.pt; 2 steps before"
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(NonFiniteLossError, match=message):
        fit(tmp_path, module := Net(at=(1, 2, 3)), NonFiniteGuard(skip=2))
    assert all(weight.isfinite().all() for weight in module.parameters())
    with pytest.raises(ValueError, match="skip is -1: expected 0 or more"):
        NonFiniteGuard(skip=-1)


def test_a_disk_is_not_filled_with_skipped_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(NonFiniteGuard, "kept", 2)
    data, module = DigitsDataModule(num_workers=0, batch_size=16), DigitsDiverge(**SMALL)
    monkeypatch.setattr(DigitsDiverge, "at", AnyOf(1, 3, 5))
    _, told = skipped(tmp_path, module, data=data, times=3, limit_train_batches=6, limit_val_batches=0)
    assert sorted(file.name for file in tmp_path.glob("*.pt")) == [
        "nonfinite_rank0_step1.pt",
        "nonfinite_rank0_step3.pt",
    ]
    indices = data.train_dataloader().sampler.batch_indices(5, epoch=0)
    assert f"batch 5, samples {', '.join(map(str, indices[:8]))}, ...); 2 batches are saved, this one is not" in told[2]


class AnyOf:
    """Equal to each of some numbers."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def __eq__(self, other: object) -> bool:
        return other in self.numbers

    def __hash__(self) -> int:
        return hash(self.numbers)


def half() -> dict:
    """16-mixed precision, which the Trainer gives to no CPU by its name alone."""
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))]}


@pytest.mark.parametrize("fused", [False, True])
def test_with_16_mixed_precision_the_scaler_does_its_own_skipping(tmp_path, fused):
    """Its first steps overflow on purpose; a loss that is not finite is skipped beside them."""
    module = Net(at=(5,), does="offset", fused=fused)
    weights = Weights()
    trainer, (told,) = skipped(tmp_path, module, weights, **half())
    assert "the loss is inf at step 5 " in told
    assert trainer.global_step == 8
    assert torch.equal(weights.after[5], weights.after[4])
    assert not torch.equal(weights.after[7], weights.after[6])
    quiet = Net(at=(5,), does="gradient", fused=fused)
    fit(tmp_path, quiet, weights := Weights(), NonFiniteGuard(skip=1), **half())
    assert torch.equal(weights.after[5], weights.after[4])
    assert all(weight.isfinite().all() for weight in quiet.parameters())


class Weights(Callback):
    def __init__(self) -> None:
        self.after: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after.append(torch.cat([weight.detach().flatten() for weight in pl_module.parameters()]))


class Compares(Callback):
    """At the end all ranks hold the same: saved by the first for the test, which runs in another process."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        everywhere = pl_module.all_gather(torch.cat([weight.detach().flatten() for weight in pl_module.parameters()]))
        assert torch.equal(everywhere[0], everywhere[1])

    def on_train_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            torch.save(state_of(trainer) | {"steps": torch.tensor(trainer.global_step)}, "state.pt")


@pytest.mark.parametrize("does", ["nan", "input", "gradient"])
def test_two_processes_skip_together(tmp_path, does):
    """The other rank's own loss is fine. Its gradients are not, once they are averaged."""
    with warnings.catch_warnings(action="ignore"):  # both ranks are processes of their own, out of pytest's sight
        two(tmp_path, Net(at=(3,), does=does, on=1), Compares(), NonFiniteGuard(skip=1), gradient_clip_val=0.1)
    found = torch.load("state.pt")
    assert all(value.isfinite().all() for value in found.values())
    assert (found["0.step"], found["steps"]) == (3, 4)
    dumps = sorted(file.name for file in tmp_path.glob("nonfinite*.pt"))
    assert dumps == [f"nonfinite_rank{rank}_step3.pt" for rank in ([0, 1] if does == "gradient" else [1])]


def test_two_processes_stop_together_after_so_many(tmp_path):
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(Exception, match="step 2.*1 steps before it were skip"),
    ):
        two(tmp_path, Net(at=(1, 2), on=1), NonFiniteGuard(skip=1))
    names = ["nonfinite_rank1.pt", "nonfinite_rank1_step1.pt"]
    assert sorted(file.name for file in tmp_path.glob("*.pt")) == names


# The command.


def test_the_command_fails_in_one_line(tmp_path, capsys):
    """A learning rate far too large: the loss of the first step is a number, its weights are none any more."""
    options = ["--model.width", "16", "--model.depth", "1", "--model.heads", "2", "--model.lr", "1e38"]
    options += ["--model.warmup_epochs", "0", "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu"]
    assert cli.main(["fit", "-c", "vit/digits", *options]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("zoo: error: ")]
    assert re.match(
        r"zoo: error: the loss is nan at step 1 \(epoch 0, batch 1, samples \d+, .*\); the batch is in", line
    )
    dumped = torch.load(line.split()[-1], weights_only=True)
    assert (dumped["step"], len(dumped["indices"]), dumped["batch"][0].shape) == (1, 64, (64, 1, 16, 16))
    assert not list(tmp_path.rglob("*.ckpt"))
