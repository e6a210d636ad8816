"""Foreign optimizers and schedules, continued: bit for bit as they were, but for what somebody has asked for since."""

import copy
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    Callback,
    Checkpoint,
    EarlyStopping,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from test_resume import QUIET, Images, assert_same
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn import functional as F
from torch.optim import (
    LBFGS,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    AdamW,
    NAdam,
    Optimizer,
    RMSprop,
)
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from zoo import ViTClassifier
from zoo.callbacks import ExactResume, OptimizerSettings
from zoo.cli.mistakes import on_purpose

EPOCHS, STEPS = 3, 4


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR")


class Net(LightningModule):
    """Two layers whose optimizer and schedule are given, knowing how many steps there are."""

    configure: Callable[[Any, int], Any]

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 10))

    def loss(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1] % 10)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self):
        return type(self).configure(self, int(self.trainer.estimated_stepping_batches))


def net(configure: Callable[[Any, int], Any], kind: type[Net] = Net) -> type[Net]:
    return type("Net", (kind,), {"configure": staticmethod(configure)})


def optimizer(kind: Any, **settings: Any) -> type[Net]:
    return net(lambda module, steps: kind(module.parameters(), **settings))


def stepped(
    schedule: Callable[[Optimizer, int], Any], kind: Any = SGD, each: str = "step", **settings: Any
) -> type[Net]:
    settings = {"lr": 0.1, "momentum": 0.9} | settings if kind is SGD else settings

    def configure(module, steps):
        made = kind(module.parameters(), **settings)
        return {"optimizer": made, "lr_scheduler": {"scheduler": schedule(made, steps), "interval": each}}

    return net(configure)


class TwoOptimizers(Net):
    """Manual optimisation, as adversaries are trained: two optimizers, of which one steps half as often."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for i, made in enumerate(self.optimizers()):
            if batch_idx % (i + 1):
                continue
            self.toggle_optimizer(made)
            made.zero_grad()
            self.manual_backward(self.loss(batch))
            made.step()
            self.untoggle_optimizer(made)
        for schedule in self.lr_schedulers():
            schedule.step()

    def configure_optimizers(self):
        first = Adam(self.net[1].parameters(), 0.01, betas=(0.5, 0.9))
        second = SGD(self.net[4].parameters(), 0.1, momentum=0.9)
        return [first, second], [ExponentialLR(first, 0.9), OneCycleLR(second, 0.3, EPOCHS * STEPS + 1)]


class ByHand(Net):
    """The learning rate is divided by ten at the end of epoch 0."""

    def configure_optimizers(self):
        return SGD(self.parameters(), 0.1, momentum=0.9)

    def on_train_epoch_end(self):
        if self.current_epoch == 0:
            for group in self.trainer.optimizers[0].param_groups:
                group["lr"] *= 0.1


class WeightDecaySchedule(Callback):
    """The weight decay grows with every epoch."""

    def on_train_epoch_start(self, trainer, pl_module):
        for group in trainer.optimizers[0].param_groups:
            group["weight_decay"] = 0.01 * (trainer.current_epoch + 1)


class SetOnce(Callback):
    """The weight decay and the second beta are set within epoch 0."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 3:
            for group in trainer.optimizers[0].param_groups:
                group["weight_decay"], group["betas"] = 0.3, (group["betas"][0], 0.95)


class Watch(Callback):
    """What every step finds: the settings of all optimizers, the states of all schedules, and in the end everything."""

    def __init__(self) -> None:
        self.steps: list[Any] = []
        self.end: Any = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        groups = [[without(group, "params") for group in made.param_groups] for made in trainer.optimizers]
        schedules = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
        self.steps.append(copy.deepcopy([trainer.current_epoch, batch[1].tolist(), groups, schedules]))

    def on_train_end(self, trainer, pl_module):
        states = [made.state_dict() for made in trainer.optimizers]
        schedules = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
        weights = {name: weight.detach() for name, weight in pl_module.named_parameters()}
        self.end = [weights, states, schedules, trainer.global_step, trainer.current_epoch]


def without(group: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in keys}


class SaveAround(Checkpoint):
    """Saves in the middle of each epoch, after its validation and at its end, where ModelCheckpoint does."""

    def save(self, trainer, where):
        if not trainer.sanity_checking:
            trainer.save_checkpoint(f"{trainer.current_epoch}-{where}.ckpt")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            self.save(trainer, "1-middle")

    def on_validation_end(self, trainer, pl_module):
        self.save(trainer, "2-validated")

    def on_train_epoch_end(self, trainer, pl_module):
        self.save(trainer, "3-end")


def fit(module: type[Net], checkpoint: str | Path | None = None, **options: Any) -> Watch:
    torch.manual_seed(7 if checkpoint is None else 8)
    watch, more = Watch(), options.pop("callbacks", list)()
    save = [SaveAround()] if options.pop("save", checkpoint is None) else []
    defaults = {"max_epochs": EPOCHS, "limit_train_batches": STEPS, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    trainer = Trainer(
        callbacks=[OptimizerSettings(), watch, *more, ExactResume(), *save],
        logger=False,
        enable_checkpointing=bool(save),
        **QUIET | defaults | options,
    )
    trainer.fit(module(), Images(), ckpt_path=checkpoint, weights_only=True)
    return watch


def sequence(made: Optimizer, steps: int) -> Any:
    warm = SequentialLR(made, [LinearLR(made, 0.1, total_iters=2), ConstantLR(made, 0.5, total_iters=2)], [2])
    return SequentialLR(made, [warm, CosineAnnealingLR(made, steps - 6), StepLR(made, 2)], [4, 9])


def chain(made: Optimizer, steps: int) -> Any:
    return ChainedScheduler([LinearLR(made, 0.1, total_iters=3), ExponentialLR(made, 0.8)])


class Ramp:
    """A callable object, whose attributes LambdaLR keeps in its state."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, step: int) -> float:
        return min(1.0, (step + 1) / self.length)


def plateau(metric: str, each: str, frequency: int = 1, **options: Any) -> type[Net]:
    def configure(module, steps):
        made = SGD(module.parameters(), 0.5, momentum=0.9)
        schedule = ReduceLROnPlateau(made, factor=0.5, patience=0, threshold=0.5, **options)
        setting = {"scheduler": schedule, "monitor": metric, "interval": each, "frequency": frequency}
        return {"optimizer": made, "lr_scheduler": setting}

    return net(configure)


def grouped(module: Any, steps: int) -> Any:
    groups = [{"params": module.net[1].parameters(), "lr": 0.1}, {"params": module.net[4].parameters(), "lr": 0.02}]
    made = AdamW(groups, betas=(0.85, 0.99))
    schedule = OneCycleLR(made, [0.03, 0.02], total_steps=steps + 1)
    return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


FOREIGN: dict[str, tuple[type[Net], dict[str, Any]]] = {
    "OneCycleLR, SGD with momentum": (stepped(lambda o, n: OneCycleLR(o, 0.3, n + 1)), {}),
    "OneCycleLR, AdamW in two groups": (net(grouped), {}),
    "CyclicLR, SGD with momentum": (stepped(lambda o, n: CyclicLR(o, 0.01, 0.1, step_size_up=3)), {}),
    "CyclicLR, Adam's betas": (stepped(lambda o, n: CyclicLR(o, 0.001, 0.01, 4), Adam), {}),
    "CyclicLR, exp_range": (stepped(lambda o, n: CyclicLR(o, 0.01, 0.1, 2, mode="exp_range", gamma=0.9)), {}),
    "SequentialLR, nested": (stepped(sequence), {}),
    "ChainedScheduler": (stepped(chain), {}),
    "ReduceLROnPlateau each epoch": (plateau("val/loss", "epoch"), {}),
    "ReduceLROnPlateau each second epoch": (plateau("val/loss", "epoch", 2), {}),
    "ReduceLROnPlateau each step": (plateau("train/loss", "step", cooldown=1), {}),
    "CosineAnnealingWarmRestarts": (stepped(lambda o, n: CosineAnnealingWarmRestarts(o, 2, T_mult=2)), {}),
    "CosineAnnealingLR": (stepped(lambda o, n: CosineAnnealingLR(o, n, eta_min=1e-3)), {}),
    "LambdaLR of a function": (stepped(lambda o, n: LambdaLR(o, lambda step: 0.9**step)), {}),
    "LambdaLR of an object": (stepped(lambda o, n: LambdaLR(o, Ramp(n))), {}),
    "MultiplicativeLR": (stepped(lambda o, n: MultiplicativeLR(o, lambda step: 0.9)), {}),
    "MultiStepLR": (stepped(lambda o, n: MultiStepLR(o, [3, 7, 7, 12])), {}),
    "StepLR each epoch": (stepped(lambda o, n: StepLR(o, 1), each="epoch"), {}),
    "ExponentialLR": (stepped(lambda o, n: ExponentialLR(o, 0.9), RMSprop, lr=0.01, centered=True, momentum=0.5), {}),
    "PolynomialLR": (stepped(lambda o, n: PolynomialLR(o, n, power=2.0)), {}),
    "LBFGS": (optimizer(LBFGS, lr=0.5, max_iter=3, history_size=4, line_search_fn="strong_wolfe"), {}),
    "two optimizers, by hand": (TwoOptimizers, {}),
    "a learning rate divided by hand": (ByHand, {}),
    "a weight decay scheduled by a callback": (
        optimizer(AdamW, lr=0.01),
        {"callbacks": lambda: [WeightDecaySchedule()]},
    ),
    "settings set once by a callback": (optimizer(AdamW, lr=0.01), {"callbacks": lambda: [SetOnce()]}),
    "SGD with Nesterov's momentum": (optimizer(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01), {}),
    "AdamW with betas": (optimizer(AdamW, lr=0.01, betas=(0.8, 0.95), amsgrad=True), {}),
    "a learning rate that is a tensor": (optimizer(Adam, lr=torch.tensor(0.01), foreach=False), {}),
    "Adagrad": (optimizer(Adagrad, lr=0.1, lr_decay=0.01), {}),
    "RMSprop": (optimizer(RMSprop, lr=0.01, momentum=0.5), {}),
    "NAdam": (optimizer(NAdam, lr=0.01), {}),
    "Adadelta": (optimizer(Adadelta), {}),
    "timm's Lookahead": (net(lambda module, n: create_optimizer_v2(module, "lookahead_adamw", lr=0.01)), {}),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_optimizers_are_continued_as_if_they_had_never_stopped(name):
    """From the middle of each epoch, from after its validation, and from its end."""
    module, options = FOREIGN[name]
    whole = fit(module, **options)
    assert len(list(Path().glob("?-?-*.ckpt"))) == 3 * EPOCHS
    for path in ("0-1-middle.ckpt", "0-3-end.ckpt", "1-2-validated.ckpt", "1-3-end.ckpt", "2-1-middle.ckpt"):
        rest = fit(module, path, **options)
        assert rest.steps
        assert_same(whole.steps[len(whole.steps) - len(rest.steps) :], rest.steps, path)
        assert_same(whole.end, rest.end, path)


# What is asked for.


def first(rest: Watch, optimizer: int = 0) -> list[dict[str, Any]]:
    """The groups of an optimizer in the first step."""
    return rest.steps[0][2][optimizer]


def settings(rest: Watch, *keys: str) -> list[tuple[Any, ...]]:
    return [tuple(group[key] for key in keys) for group in first(rest)]


def decayed(lr: float) -> type[Net]:
    return net(lambda module, n: two_groups(module, lr))


def two_groups(module: Any, lr: float) -> Any:
    groups = [{"params": module.net[1].parameters(), "lr": lr / 10}, {"params": module.net[4].parameters()}]
    made = SGD(groups, lr=lr, momentum=0.9)
    return {"optimizer": made, "lr_scheduler": ExponentialLR(made, 0.5)}


def cyclic(betas: tuple[float, float]) -> type[Net]:
    return stepped(lambda o, n: CyclicLR(o, 0.001, 0.01, 4, base_momentum=0.7), Adam, betas=betas)


def by_hand(lr: float, weight_decay: float = 0.0) -> type[Net]:
    made = {"configure_optimizers": lambda self: SGD(self.parameters(), lr, momentum=0.9, weight_decay=weight_decay)}
    return type("ByHand", (ByHand,), made)


ASKED: dict[str, tuple[type[Net], type[Net], dict[str, Any], tuple[str, ...], list[tuple[Any, ...]]]] = {
    "lr": (optimizer(SGD, lr=0.1), optimizer(SGD, lr=0.5), {}, ("lr", "momentum"), [(0.5, 0)]),
    "lr of groups, with a schedule": (decayed(0.1), decayed(0.4), {}, ("lr", "initial_lr"), [(0.02, 0.04), (0.2, 0.4)]),
    "lr that was divided by hand": (by_hand(0.1), by_hand(0.4), {}, ("lr", "momentum"), [(0.04, 0.9)]),
    "lr of 0": (optimizer(SGD, lr=0.0), optimizer(SGD, lr=0.5), {}, ("lr",), [(0.5,)]),
    "momentum, with lr divided by hand": (
        by_hand(0.1),
        type("ByHand", (ByHand,), {"configure_optimizers": lambda self: SGD(self.parameters(), 0.1, momentum=0.5)}),
        {},
        ("lr", "momentum"),
        [(0.010000000000000002, 0.5)],
    ),
    "weight decay": (
        optimizer(AdamW, lr=0.01, weight_decay=0.05),
        optimizer(AdamW, lr=0.01, weight_decay=0.2),
        {},
        ("weight_decay", "betas"),
        [(0.2, (0.9, 0.999))],
    ),
    "weight decay, with betas set by a callback": (
        optimizer(AdamW, lr=0.01, weight_decay=0.05),
        optimizer(AdamW, lr=0.01, weight_decay=0.2),
        {"callbacks": lambda: [SetOnce()]},
        ("weight_decay", "betas"),
        [(0.2, (0.9, 0.95))],
    ),
    "lr, with weight decay set by a callback": (
        optimizer(AdamW, lr=0.01),
        optimizer(AdamW, lr=0.02),
        {"callbacks": lambda: [SetOnce()]},
        ("lr", "weight_decay"),
        [(0.02, 0.3)],
    ),
    "the second of the betas, the first in its cycle": (
        cyclic((0.9, 0.999)),
        cyclic((0.9, 0.95)),
        {},
        ("lr", "betas"),
        [(0.01, (0.7, 0.95))],
    ),
    "a flag": (optimizer(AdamW, foreach=False), optimizer(AdamW, foreach=True), {}, ("foreach",), [(True,)]),
    "a tensor in place of a number": (
        optimizer(Adam, lr=0.1, foreach=False),
        optimizer(Adam, lr=torch.tensor(0.2), foreach=False),
        {},
        ("lr",),
        [(torch.tensor(0.2),)],
    ),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_is_asked_for_wins_and_the_rest_stays(name):
    before, after, options, keys, expected = ASKED[name]
    fit(before, **options)
    rest = fit(after, "0-3-end.ckpt", **options | {"callbacks": list})
    for found, wanted in zip(settings(rest, *keys), expected, strict=True):
        for one, other in zip(found, wanted, strict=True):
            assert type(one) is type(other)
            exact = isinstance(one, torch.Tensor)  # which approx does not compare, if it has no dimension
            assert torch.equal(one, other) if exact else one == pytest.approx(other, rel=1e-12), keys


def test_a_run_that_was_changed_once_goes_on_as_it_was_changed():
    fit(decayed(0.1), max_epochs=1)
    whole = fit(decayed(0.3), "0-3-end.ckpt", save=True)
    rest = fit(decayed(0.3), "1-3-end.ckpt")
    assert_same(whole.steps[STEPS:], rest.steps)
    assert_same(whole.end, rest.end)


def test_another_of_several_optimizers_is_not_touched():
    class Changed(TwoOptimizers):
        def configure_optimizers(self):
            (one, other), schedules = super().configure_optimizers()
            other.param_groups[0]["weight_decay"] = 0.1
            return [one, other], schedules

    whole = fit(TwoOptimizers)
    rest = fit(Changed, "1-1-middle.ckpt")
    expected = whole.steps[STEPS + 2]
    assert rest.steps[0][2][0] == expected[2][0]
    assert rest.steps[0][2][1] == [expected[2][1][0] | {"weight_decay": 0.1}]
    assert rest.steps[0][3] == expected[3]


# Parameters in other groups.

VIT = {"backbone": "vit_tiny_patch16_224", "num_classes": 64, "image_size": 8, "patch_size": 4, "in_channels": 1}
VIT |= {"width": 8, "depth": 2, "heads": 2, "warmup_epochs": 1}


def vit(**options: Any) -> Any:
    return lambda: ViTClassifier(**VIT | options)


class Moments(Callback):
    """The first moments of every parameter when training starts."""

    def on_train_start(self, trainer, pl_module):
        state = trainer.optimizers[0].state
        self.found = {name: copy.deepcopy(state[p]) for name, p in pl_module.named_parameters()}


def by_name(groups: list[dict[str, Any]]) -> dict[str, tuple[float, ...]]:
    keys = ("lr", "initial_lr", "weight_decay")
    return {name: tuple(group[key] for key in keys) for group in groups for name in group["param_names"]}


REGROUPED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"weight_decay": 0.0}),
    ({"weight_decay": 0.0}, {"lr": 0.01}),
    ({}, {"layer_decay": 0.75}),
    ({"layer_decay": 0.75}, {}),
    ({"layer_decay": 0.75}, {"layer_decay": 0.5, "weight_decay": 0.0, "lr": 0.01}),
]


@pytest.mark.parametrize(("before", "after"), REGROUPED, ids=str)
def test_parameters_in_other_groups_keep_their_moments_and_their_place_in_the_schedule(before, after):
    expected = [by_name(step[2][0]) for step in fit(vit(**after), max_epochs=2).steps[STEPS + 2 :]]
    fit(vit(**before), max_epochs=2)  # whose checkpoints are continued
    moments = Moments()
    rest = fit(vit(**after), "1-1-middle.ckpt", max_epochs=2, callbacks=lambda: [moments])
    for found, wanted in zip([by_name(step[2][0]) for step in rest.steps], expected, strict=True):
        assert found.keys() == wanted.keys()
        for name in found:
            assert found[name] == pytest.approx(wanted[name], rel=1e-9), name
    saved = torch.load("1-1-middle.ckpt", weights_only=True)["optimizer_states"][0]
    names = [name for group in saved["param_groups"] for name in group["param_names"]]
    assert len(names) == len(moments.found)
    for i, name in enumerate(names):
        assert_same(moments.found[name], saved["state"][i], name)
    assert len(rest.steps[0][3][0]["base_lrs"]) == len(first(rest))


# What cannot go on.

LINE = ": continue with the options it was started with, or start a new run from its weights with --model.weights FILE"


def one_group(module: Any, steps: int) -> Any:
    made = SGD(module.parameters(), lr=0.1, momentum=0.9)
    return {"optimizer": made, "lr_scheduler": ExponentialLR(made, 0.5)}


def uneven(module: Any, steps: int) -> Any:
    made = SGD(
        [{"params": module.net[1].parameters(), "momentum": 0.5}, {"params": module.net[4].parameters()}], lr=0.1
    )
    return {"optimizer": made, "lr_scheduler": ExponentialLR(made, 0.5)}


class DividesOne(Callback):
    """Divides the learning rate of one group."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        trainer.optimizers[0].param_groups[0]["lr"] *= 0.5


class Unfreezes(BaseFinetuning):
    """Adds the first layer in epoch 1."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[1])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[1], optimizer, lr=0.03)


def trainable(module: Any, steps: int) -> Any:
    return SGD([parameter for parameter in module.parameters() if parameter.requires_grad], lr=0.1, momentum=0.9)


def in_groups(module: Any, steps: int) -> Any:
    return SGD([{"params": [parameter]} for parameter in module.net[4].parameters()], lr=0.1, momentum=0.9)


SWAPPED = net(lambda module, n: SGD([*module.net[4].parameters(), *module.net[1].parameters()], lr=0.1))
REFUSED: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "another optimizer": (
        optimizer(SGD, lr=0.1),
        optimizer(AdamW),
        {},
        "optimizer: the checkpoint has SGD, from which AdamW cannot go on",
    ),
    "the zoo's": (vit(), vit(optimizer="sgd"), {}, "optimizer: the checkpoint has AdamW, from which SGD cannot go on"),
    "another one within": (
        net(lambda module, n: create_optimizer_v2(module, "lookahead_adamw", lr=0.01)),
        net(lambda module, n: create_optimizer_v2(module, "lookahead_sgd", lr=0.01)),
        {},
        r"the checkpoint has Lookahead\(AdamW\), from which Lookahead\(SGD\) cannot go on",
    ),
    "more optimizers": (
        optimizer(Adam),
        TwoOptimizers,
        {},
        "optimizer: the checkpoint has Adam, from which Adam, SGD cannot go on",
    ),
    "another schedule": (
        stepped(lambda o, n: StepLR(o, 2)),
        stepped(lambda o, n: ExponentialLR(o, 0.9)),
        {},
        "learning rate scheduler: the checkpoint has StepLR, from which ExponentialLR cannot go on",
    ),
    "another sequence": (
        stepped(sequence),
        stepped(lambda o, n: SequentialLR(o, [LinearLR(o), StepLR(o, 2)], [2])),
        {},
        r"has SequentialLR\(SequentialLR\(LinearLR, ConstantLR\), CosineAnnealingLR, StepLR\), from which "
        r"SequentialLR\(LinearLR, StepLR\) cannot go on",
    ),
    "no schedule": (
        stepped(lambda o, n: StepLR(o, 2)),
        optimizer(SGD, lr=0.1),
        {},
        "learning rate scheduler: the checkpoint has StepLR, from which none cannot go on",
    ),
    "fewer parameters": (
        optimizer(SGD, lr=0.1),
        net(lambda module, n: SGD(module.net[4].parameters(), lr=0.1)),
        {},
        "net.1.bias and 1 more of the optimizer's parameters not trained here, unlike before",
    ),
    "more parameters": (
        net(lambda module, n: SGD([module.net[1].weight, *module.net[4].parameters()], lr=0.1)),
        optimizer(SGD, lr=0.1),
        {},
        "net.1.bias of the optimizer's parameters trained here only, unlike before",
    ),
    "learning rates that have come apart": (
        decayed(0.1),
        net(one_group),
        {"callbacks": lambda: [DividesOne()]},
        r"parameters that are one group here \(net.1.weight, ...\) come from groups of the checkpoint whose lr "
        r"would be 0.05 and 0.00078125",
    ),
    "groups that were added": (
        net(trainable),
        net(in_groups),
        {"callbacks": lambda: [Unfreezes()], "max_epochs": 2},
        "parameters are in other groups than the checkpoint's, and groups were added to it",
    ),
    "LBFGS in another order": (
        optimizer(LBFGS),
        net(lambda module, n: LBFGS([*module.net[4].parameters(), *module.net[1].parameters()])),
        {},
        "the parameters are in another order than the checkpoint's, which LBFGS depends on",
    ),
    "a sequence of restarts, moved": (
        stepped(lambda o, n: SequentialLR(o, [LinearLR(o), CosineAnnealingWarmRestarts(o, 2)], [2])),
        stepped(lambda o, n: SequentialLR(o, [LinearLR(o), CosineAnnealingWarmRestarts(o, 2)], [3])),
        {},
        "the milestones of SequentialLR differ from the checkpoint's, and CosineAnnealingWarmRestarts cannot be moved",
    ),
}


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_go_on_is_refused_in_a_line(name):
    before, after, options, told = REFUSED[name]
    fit(before, **options)
    with pytest.raises(ValueError, match=f"{told}{LINE}$") as refused:
        fit(after, "1-1-middle.ckpt", **options)
    assert "\n" not in str(refused.value)
    assert on_purpose(refused.value) == str(refused.value)  # the command line prints nothing else


def test_groups_whose_settings_are_merged_go_on():
    """A momentum of each group, asked to be one: what is asked for wins."""
    fit(net(uneven))
    rest = fit(net(one_group), "1-3-end.ckpt")
    assert settings(rest, "lr", "momentum") == [(0.025, 0.9)]
    assert len(rest.end[1][0]["param_groups"]) == 1


# Checkpoints without a record.


def stripped(path: str) -> str:
    """A checkpoint as one of an older release, or of stock Lightning."""
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["optimizer_settings"]
    torch.save(checkpoint, "old.ckpt")
    return "old.ckpt"


@pytest.mark.parametrize(
    "name", ["OneCycleLR, AdamW in two groups", "SequentialLR, nested", "settings set once by a callback"]
)
def test_an_old_checkpoint_is_continued_as_lightning_does(name):
    module, options = FOREIGN[name]
    whole = fit(module, **options)
    with pytest.warns(UserWarning, match="does not say how") if "once" in name else nullcontext():
        rest = fit(module, stripped("0-3-end.ckpt"), **options)
    assert_same(whole.steps[STEPS:], rest.steps)
    assert_same(whole.end, rest.end)


SHOWN: dict[str, tuple[Any, Any, int]] = {
    "ExponentialLR": (decayed(0.1), decayed(0.4), 0),
    "LambdaLR": (vit(), vit(lr=0.01), 0),
    "OneCycleLR": (
        stepped(lambda o, n: OneCycleLR(o, 0.3, n + 1)),
        stepped(lambda o, n: OneCycleLR(o, 0.6, n + 1)),
        0,
    ),
    "CyclicLR": (stepped(lambda o, n: CyclicLR(o, 0.01, 0.1, 3)), stepped(lambda o, n: CyclicLR(o, 0.01, 0.4, 3)), 1),
}


@pytest.mark.parametrize("name", SHOWN)
def test_another_learning_rate_wins_over_an_old_checkpoint_whose_schedule_shows_it(name):
    before, after, late = SHOWN[name]
    whole = fit(after)
    fit(before)
    rest = fit(after, stripped("0-3-end.ckpt"))
    steps = (watch.steps[-2 * STEPS + late :] for watch in (rest, whole))
    rates, expected = ([group["lr"] for step in each for group in step[2][0]] for each in steps)
    assert len(rest.steps) == 2 * STEPS
    assert rates == pytest.approx(expected)
    assert rest.end[2][0]["base_lrs"] == whole.end[2][0]["base_lrs"]


def test_other_settings_of_an_old_checkpoint_stay_and_are_told():
    fit(stepped(lambda o, n: StepLR(o, 2), momentum=0.9, weight_decay=0.1))
    told = r"so that its settings stay: momentum 0.9 \(here 0.5\), weight_decay 0.1 \(here 0\), step_size 2 \(here 3\)"
    with pytest.warns(UserWarning, match=told):
        rest = fit(stepped(lambda o, n: StepLR(o, 3), momentum=0.5), stripped("1-3-end.ckpt"))
    assert settings(rest, "momentum", "weight_decay") == [(0.9, 0.1)]
    fit(optimizer(SGD, lr=0.1))
    with pytest.warns(UserWarning, match=r"so that its settings stay: lr 0.1 \(here 0.2\)"):
        assert settings(fit(optimizer(SGD, lr=0.2), stripped("1-3-end.ckpt")), "lr") == [(0.1,)]


OLD = {
    "another optimizer": (
        optimizer(SGD, lr=0.1),
        optimizer(Adam),
        "the checkpoint's has dampening, momentum, nesterov, and Adam has amsgrad, betas",
    ),
    "more optimizers": (
        optimizer(Adam),
        TwoOptimizers,
        "the checkpoint has an unknown one, from which Adam, SGD cannot",
    ),
    "other groups": (
        vit(),
        vit(weight_decay=0.0),
        "has its parameters in groups of 22, 10, and this one in groups of 32",
    ),
}


@pytest.mark.parametrize("name", OLD)
def test_an_old_checkpoint_that_cannot_go_on_is_refused_in_a_line(name):
    before, after, told = OLD[name]
    fit(before)
    with pytest.raises(ValueError, match=told) as refused:
        fit(after, stripped("1-3-end.ckpt"))
    assert str(refused.value).endswith(LINE)


# Beside others.


def test_what_replaces_schedules_and_adds_groups_is_left_alone():
    """From where Lightning itself continues them: the ends of epochs."""
    swa = {"callbacks": lambda: [StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=2)]}
    cases = [
        (net(trainable), {"callbacks": lambda: [Unfreezes()]}),
        (optimizer(SGD, lr=0.1), swa),
        (stepped(lambda o, n: ExponentialLR(o, 0.8), each="epoch"), swa),
    ]
    for kind, options in cases:
        whole = fit(kind, **options)
        for path, done in (("0-3-end.ckpt", STEPS), ("1-3-end.ckpt", 2 * STEPS)):
            rest = fit(kind, path, **options)
            for found, expected in zip(rest.steps, whole.steps[done:], strict=True):
                assert_same(found, expected, path)
        record = torch.load("1-3-end.ckpt", weights_only=True)["optimizer_settings"]
        if options is swa:
            assert record["schedulers"] == [None]
            rest = fit(kind, stripped("1-3-end.ckpt"), **options)
            assert_same(rest.steps[0][2:], whole.steps[2 * STEPS][2:])
        else:
            assert record["optimizers"][0]["names"] == [["net.4.weight", "net.4.bias"]]


def test_early_stopping_stops_where_it_would_have():
    options = {"callbacks": lambda: [EarlyStopping("val/loss", patience=0, min_delta=10.0)]}
    whole = fit(optimizer(SGD, lr=0.1), **options)
    assert len(whole.steps) == 2 * STEPS
    assert_same(whole.end, fit(optimizer(SGD, lr=0.1), "0-3-end.ckpt", **options).end)


def test_a_tuner_finds_a_learning_rate_and_the_run_starts_with_it():
    module = net(lambda module, n: SGD(module.parameters(), lr=module.lr))()
    module.lr = 0.1
    trainer = Trainer(
        callbacks=[OptimizerSettings(), ExactResume(), SaveAround()],
        max_epochs=6,
        logger=False,
        **QUIET,
    )
    Tuner(trainer).lr_find(module, Images(), num_training=20, min_lr=1e-4)
    assert module.lr != 0.1
    trainer.fit(module, Images())
    record = torch.load("0-3-end.ckpt", weights_only=True)["optimizer_settings"]
    assert record["optimizers"][0]["groups"][0]["lr"] == module.lr


def test_no_optimizer_and_only_weights():
    fit(net(lambda module, n: None))
    fit(net(lambda module, n: None), "0-3-end.ckpt")
    trainer = Trainer(max_epochs=1, limit_train_batches=1, callbacks=[OptimizerSettings()], logger=False, **QUIET)
    trainer.fit(optimizer(SGD, lr=0.1)(), Images())
    trainer.save_checkpoint("weights.ckpt", weights_only=True)
    assert "optimizer_settings" not in torch.load("weights.ckpt", weights_only=True)
    with pytest.raises(KeyError, match="checkpoint contains only the model"):
        fit(optimizer(SGD, lr=0.1), "weights.ckpt")
    trainer.save_checkpoint("after.ckpt")  # after the fit
    assert torch.load("after.ckpt", weights_only=True)["optimizer_settings"]["optimizers"][0]["kind"] == "SGD"
    trainer.validate(optimizer(AdamW)(), Images(), ckpt_path="after.ckpt", verbose=False, weights_only=True)


def test_no_step_pays_for_it():
    hooks = {name for name in vars(OptimizerSettings) if name.startswith("on_")}
    assert hooks == {"on_fit_start", "on_load_checkpoint", "on_save_checkpoint"}


SPLIT = """
import sys

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

sys.path.insert(0, sys.argv[1])
import test_optimizer_settings as tests
from zoo.callbacks import ExactResume, OptimizerSettings

PARTS = "parts"
ASKED = {"lr": 0.01, "weight_decay": 0.2}
RUNS = {
    "whole": ("fsdp2", None, {}),
    "same": ("fsdp2", "whole", {}),
    "asked": ("fsdp2", "whole", ASKED),
    "regrouped": ("fsdp2", "whole", {"layer_decay": 0.75, "lr": 0.01}),
    "regrouped-ddp": ("ddp", "whole", {"layer_decay": 0.75, "lr": 0.01}),
    "parts": (PARTS, None, {}),
    "parts-asked": (PARTS, "parts", ASKED),
    "parts-regrouped": (PARTS, "parts", {"weight_decay": 0.0}),
}
for name, (strategy, start, options) in RUNS.items():
    torch.manual_seed(1)
    watch = tests.Watch()
    save = ModelCheckpoint(dirpath=name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [OptimizerSettings(), watch, ExactResume(), save]
    if strategy == PARTS:
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer = Trainer(devices=2, strategy=strategy, max_epochs=2, callbacks=callbacks, logger=False, **tests.QUIET)
    module, checkpoint = tests.vit(**{"width": 64} | options)(), f"{start}/step=2.ckpt" if start else None
    try:
        trainer.fit(module, tests.Images(), ckpt_path=checkpoint, weights_only=True)
        found = [tests.by_name(step[2][0]) for step in watch.steps]
    except ValueError as error:
        found = str(error)
    weights = {key: getattr(p, "full_tensor", lambda: p)().detach() for key, p in module.named_parameters()}
    torch.save([found, weights], f"{name}{trainer.global_rank}.pt")
"""


@pytest.mark.slow
def test_weights_that_are_split_between_processes(tmp_path):
    Path("split.py").write_text(SPLIT)
    done = forked.run([sys.executable, "split.py", str(Path(__file__).parent)], capture_output=True, launches=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        runs = {path.name[:-4]: torch.load(path, weights_only=True) for path in Path().glob(f"*{rank}.pt")}
        whole = runs["whole"][0][2:]
        assert len(whole) == 2
        assert_same(runs["same"], [whole, runs["whole"][1]])
        for name in ("asked", "parts-asked"):
            for found, before in zip(runs[name][0], whole, strict=True):
                for key, (lr, initial, decay) in before.items():
                    assert found[key] == (pytest.approx(10 * lr), 10 * initial, 0.2 if decay else 0.0), key
        assert_same(runs["asked"][1], runs["parts-asked"][1])
        ddp = runs["regrouped-ddp"]
        assert len({lr for lr, _, _ in ddp[0][0].values()}) == 4
        for found, expected in zip(runs["regrouped"][0], ddp[0], strict=True):
            assert all(found[key] == pytest.approx(expected[key]) for key in expected)
        for key, weight in ddp[1].items():
            assert torch.allclose(runs["regrouped"][1][key], weight, atol=1e-6), key
        assert runs["parts-regrouped"][0].startswith(
            "parameters are in other groups than those of the checkpoint, a folder"
        )
