"""Schedules and groups carried over to other settings, without a Trainer: where they would be had it always been so."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_optimizer_settings import Ramp, chain
from test_resume import assert_same
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import (
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

from zoo.common.optimizer_state import Schedule, continued, described


class Loop:
    """An optimizer and its schedule on two weights, without a Trainer."""

    def __init__(self, lr: float, schedule: Callable[[Optimizer], Any], kind: Any = SGD, **options: Any) -> None:
        self.weights = {name: nn.Parameter(torch.ones(2)) for name in ("one", "other")}
        groups = [{"params": [self.weights["one"]], "lr": lr}, {"params": [self.weights["other"]], "lr": lr / 2}]
        self.made = kind(groups, **options)
        self.schedule = schedule(self.made)
        self.record = described(self.made, {id(weight): name for name, weight in self.weights.items()})
        self.settings = described(self.schedule)["state"]

    def run(self, steps: int) -> list[list[float]]:
        rates = []
        for _ in range(steps):
            rates.append([group["lr"] for group in self.made.param_groups])
            sum(weight.sum() for weight in self.weights.values()).backward()
            self.made.step()
            self.schedule.step()
        return rates

    def continued(self, other: "Loop") -> "Loop":
        """This one, where the other stands."""
        saved = copy.deepcopy(other.schedule.state_dict())
        schedule = Schedule(self.schedule, saved, other.settings, self.settings)
        state, (progress,) = continued(copy.deepcopy(other.made.state_dict()), other.record, self.record, [schedule])
        self.made.load_state_dict(state)
        self.schedule.load_state_dict(progress)
        return self


def flat(rates: list[list[float]]) -> list[float]:
    return [rate for pair in rates for rate in pair]


def warmed(warm: int, total: int) -> Callable[[Optimizer], Any]:
    def schedule(made):
        parts = [LinearLR(made, 0.2, total_iters=warm), CosineAnnealingLR(made, total - warm), ConstantLR(made, 0.3)]
        return SequentialLR(made, parts, [warm, total])

    return schedule


# A schedule, another one that is asked for, both learning rates, and in how many steps it is on the other's curve.
CHANGED: dict[str, tuple[Any, Any, tuple[float, float], int]] = {
    "CosineAnnealingLR, longer": (lambda o: CosineAnnealingLR(o, 5), lambda o: CosineAnnealingLR(o, 12), (0.1, 0.1), 0),
    "CosineAnnealingLR, floor": (
        lambda o: CosineAnnealingLR(o, 12),
        lambda o: CosineAnnealingLR(o, 12, eta_min=0.01),
        (0.1, 0.1),
        0,
    ),
    "CosineAnnealingLR, lr above a floor": (
        lambda o: CosineAnnealingLR(o, 12, eta_min=0.01),
        lambda o: CosineAnnealingLR(o, 12, eta_min=0.01),
        (0.1, 0.3),
        0,
    ),
    "PolynomialLR, longer": (lambda o: PolynomialLR(o, 4), lambda o: PolynomialLR(o, 12, 2.0), (0.1, 0.2), 0),
    "LinearLR": (lambda o: LinearLR(o, 0.1, total_iters=3), lambda o: LinearLR(o, 0.5, total_iters=7), (0.1, 0.1), 0),
    "ConstantLR": (lambda o: ConstantLR(o, 0.1, 3), lambda o: ConstantLR(o, 0.4, 6), (0.1, 0.1), 0),
    "StepLR": (lambda o: StepLR(o, 2), lambda o: StepLR(o, 3, gamma=0.5), (0.1, 0.3), 0),
    "MultiStepLR": (lambda o: MultiStepLR(o, [2, 5]), lambda o: MultiStepLR(o, [2, 8, 8]), (0.1, 0.1), 0),
    "ExponentialLR": (lambda o: ExponentialLR(o, 0.9), lambda o: ExponentialLR(o, 0.5), (0.1, 0.1), 0),
    "SequentialLR, longer": (warmed(2, 6), warmed(4, 11), (0.1, 0.2), 0),
    "SequentialLR, shorter": (warmed(4, 11), warmed(2, 6), (0.1, 0.1), 0),
    "ChainedScheduler, lr": (lambda o: chain(o, 0), lambda o: chain(o, 0), (0.1, 0.3), 0),
    "MultiplicativeLR, lr": (
        lambda o: MultiplicativeLR(o, lambda step: 0.9),
        lambda o: MultiplicativeLR(o, lambda step: 0.9),
        (0.1, 0.3),
        0,
    ),
    "LambdaLR": (
        lambda o: LambdaLR(o, lambda step: 0.9**step),
        lambda o: LambdaLR(o, lambda step: 0.5**step),
        (0.1, 0.3),
        1,
    ),
    "LambdaLR of an object": (lambda o: LambdaLR(o, Ramp(3)), lambda o: LambdaLR(o, Ramp(9)), (0.1, 0.1), 1),
    "OneCycleLR, longer and higher": (
        lambda o: OneCycleLR(o, [0.1, 0.05], 12),
        lambda o: OneCycleLR(o, [0.3, 0.15], 20, pct_start=0.5),
        (0.1, 0.1),
        1,
    ),
    "CyclicLR": (
        lambda o: CyclicLR(o, [0.01, 0.005], 0.1, 3),
        lambda o: CyclicLR(o, [0.02, 0.01], 0.4, 5, mode="triangular2"),
        (0.1, 0.1),
        1,
    ),
    "CosineAnnealingWarmRestarts": (
        lambda o: CosineAnnealingWarmRestarts(o, 4),
        lambda o: CosineAnnealingWarmRestarts(o, 4, eta_min=0.001),
        (0.1, 0.3),
        1,
    ),
}


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("name", CHANGED)
def test_a_schedule_that_was_changed_goes_on_as_if_it_had_always_been_so(name):
    before, after, (lr, asked), late = CHANGED[name]
    for at in range(11):
        old = Loop(lr, before, momentum=0.9)
        old.run(at)
        new, whole = Loop(asked, after, momentum=0.9), Loop(asked, after, momentum=0.9)
        new.continued(old)
        assert new.schedule.get_last_lr() == [group["lr"] for group in new.made.param_groups]
        rates, expected = new.run(11 - at), whole.run(11)[at:]
        momentum = [group["momentum"] for group in new.made.param_groups]
        assert flat(rates[late:]) == pytest.approx(flat(expected[late:]), rel=1e-9, abs=1e-12), at
        if len(rates) > late:
            assert momentum == pytest.approx([group["momentum"] for group in whole.made.param_groups], rel=1e-9)


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_a_part_of_a_sequence_that_is_put_off_begins_anew():
    def restarts(milestone):
        return lambda o: SequentialLR(o, [LinearLR(o), CosineAnnealingWarmRestarts(o, 3)], [milestone])

    old = Loop(0.1, restarts(2))
    old.run(4)
    rates = Loop(0.1, restarts(7)).continued(old).run(8)
    assert flat(rates) == pytest.approx(flat(Loop(0.1, restarts(7)).run(12)[4:]))


def test_a_hand_and_a_schedule_are_both_kept():
    old = Loop(0.1, lambda o: CosineAnnealingLR(o, 8))
    old.run(3)
    for group in old.made.param_groups:
        group["lr"] *= 0.5
    rates = Loop(0.2, lambda o: CosineAnnealingLR(o, 12)).continued(old).run(6)
    expected = Loop(0.2, lambda o: CosineAnnealingLR(o, 12)).run(9)[3:]
    assert flat(rates) == pytest.approx([rate / 2 for rate in flat(expected)])


@pytest.mark.parametrize("at", [0, 1, 4, 5, 11])
def test_nothing_is_touched_where_nothing_has_changed(at):
    old, new = (Loop(0.1, warmed(3, 9), Adam, weight_decay=0.1) for _ in range(2))
    old.run(at)
    old.made.param_groups[1].update(weight_decay=0.3, lr=0.07)
    before = copy.deepcopy([old.made.state_dict(), old.schedule.state_dict()])
    new.continued(old)
    assert_same([new.made.state_dict(), new.schedule.state_dict()], before)


def test_what_is_handed_over_is_not_shared():
    old, new = Loop(0.1, lambda o: MultiStepLR(o, [2])), Loop(0.2, lambda o: MultiStepLR(o, [2, 4]))
    given = copy.deepcopy([old.made.state_dict(), old.schedule.state_dict(), new.record, new.settings])
    state, schedule = old.made.state_dict(), old.schedule.state_dict()
    schedules = [Schedule(new.schedule, schedule, old.settings, new.settings)]
    made, (progress,) = continued(state, old.record, new.record, schedules)
    made["param_groups"][0]["lr"] = 9.0
    progress["base_lrs"][0] = progress["milestones"][7] = 9
    assert_same([state, schedule, new.record, new.settings], given)


def test_a_plateau_that_is_asked_for_anew_forgets_the_best_of_the_other_kind():
    def with_mode(mode):
        return lambda o: ReduceLROnPlateau(o, mode, patience=3, min_lr=[0.01, 0.02])

    old = Loop(0.1, with_mode("min"))
    for metric in (0.5, 0.6):
        old.schedule.step(metric)
    same_kind = Loop(0.1, lambda o: ReduceLROnPlateau(o, "min", patience=5)).continued(old).schedule
    assert (same_kind.best, same_kind.num_bad_epochs, same_kind.patience, same_kind.min_lrs) == (0.5, 1, 5, [0, 0])
    assert Loop(0.1, with_mode("max")).continued(old).schedule.best == -math.inf


def test_there_and_back_is_where_it_was():
    before, after = Loop(0.1, lambda o: ExponentialLR(o, 0.9), Adam), Loop(0.1, lambda o: ExponentialLR(o, 0.9), Adam)
    before.run(3)
    swapped = copy.deepcopy(after.record)
    swapped["groups"], swapped["names"] = swapped["groups"][::-1], swapped["names"][::-1]
    there, _ = continued(before.made.state_dict(), before.record, swapped)
    assert there["state"][0] is before.made.state_dict()["state"][1]
    back, _ = continued(there, swapped, before.record)
    assert_same(back, before.made.state_dict())


def test_the_record_is_plain_data():
    weight = nn.Parameter(torch.ones(2))
    made = SGD([{"params": [weight], "lr": np.float64(0.1), "momentum": np.float32(0.5), "hook": print}])
    record = described(made, {})
    assert record["names"] == [["#0"]]
    assert type(record["groups"][0]["lr"]) is float
    assert type(record["groups"][0]["momentum"]) is float
    assert "hook" not in record["groups"][0]
    torch.save([record, described(MultiStepLR(made, [2, 2]))], "record.pt")
    loaded = torch.load("record.pt", weights_only=True)
    assert_same(loaded[0], record)
    assert loaded[1]["state"]["milestones"] == {2: 2}
