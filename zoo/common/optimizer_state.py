"""Optimizers' and schedulers' states, carried over to the settings that are asked for when a run is continued.

Plain data in and out: torch's ``state_dict()`` and a record of how everything was configured before the first step
(:func:`described`). A setting that was configured then as it is now keeps what the run has made of it, bit for bit;
one that differs takes the new value. A learning rate that differs keeps its place: on the curve of the schedule where
torch has a formula for it, times what else has changed it; otherwise in proportion to where it starts.
"""

import copy
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Record = dict[str, Any]
Rates = Sequence[Any]  # a learning rate for each group

REMEDY = "continue with the options it was started with, or start a new run from its weights with --model.weights FILE"
KEPT_APART = {"params", "param_names"}


def described(thing: Any, names: Mapping[int, str] | None = None) -> Record:
    """The record of an optimizer or a scheduler: its class and its settings, which ``weights_only`` reads.

    Args:
        thing: As it was configured, before the first step.
        names: Those of an optimizer's parameters, by ``id``. None: of a scheduler.
    """
    if names is None:
        return {"kind": _kind(thing), "state": _settings(thing.state_dict())}
    groups, named, count = getattr(thing, "param_groups", []), [], 0
    for group in groups:
        named.append([names.get(id(parameter), f"#{count + i}") for i, parameter in enumerate(group["params"])])
        count += len(named[-1])
    settings = [_settings({key: value for key, value in group.items() if key not in KEPT_APART}) for group in groups]
    return {"kind": _kind(thing), "groups": settings, "names": named}


def _kind(thing: Any) -> str:
    """The name of a class, with those of what it wraps: ``Lookahead(AdamW)``, ``SequentialLR(LinearLR, StepLR)``."""
    parts = getattr(thing, "_schedulers", None)
    if parts is None:
        parts = [
            part for key in ("base_optimizer", "_base_optimizer") if (part := getattr(thing, key, None)) is not None
        ]
    return type(thing).__name__ + (f"({', '.join(map(_kind, parts[:20]))})" if parts else "")


def _settings(mapping: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for key, value in mapping.items():
        with suppress(TypeError):  # what is not plain data is neither recorded nor compared
            found[key] = [_settings(part) for part in value] if key == "_schedulers" else _plain(value)
    return found


def _plain(value: Any) -> Any:
    """A copy of plain data without NumPy's scalars and classes of others, which ``weights_only`` does not read."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Counter):  # MultiStepLR's milestones
        return Counter({_plain(key): _plain(number) for key, number in value.items()})
    if isinstance(value, dict):
        return {_plain(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else tuple(map(_plain, value))
    raise TypeError


# Schedulers.


def carried_schedule(saved: dict[str, Any], then: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The state of a scheduler with the settings of now: its attributes that were not configured alike are set anew."""
    state = dict(saved)
    for key, value in now.items():
        if key == "_schedulers":
            state[key] = [carried_schedule(*part) for part in zip(saved[key], then[key], value, strict=True)]
        elif key not in state:
            state[key] = copy.deepcopy(value)
        elif key in then and key != "_last_lr":
            state[key] = _chosen(then[key], value, state[key])
    if "_milestones" in now and not same(then["_milestones"], now["_milestones"]):
        _place(state, now, state["last_epoch"])
    return state


def _place(state: dict[str, Any], now: dict[str, Any], at: int) -> None:
    """Puts the schedules of a sequence where they stand at a step, after its milestones have been moved."""
    if "T_cur" in state and state["last_epoch"] != at:
        raise ValueError(
            "the milestones of SequentialLR differ from the checkpoint's, and CosineAnnealingWarmRestarts cannot be "
            f"moved: {REMEDY}"
        )
    if "last_epoch" in state:
        state["last_epoch"] = at
    milestones = state.get("_milestones", [])
    active = bisect_right(milestones, at)
    for i, (part, fresh) in enumerate(zip(state.get("_schedulers", []), now.get("_schedulers", []), strict=True)):
        if i == active or not milestones:  # those of a ChainedScheduler are all active
            _place(part, fresh, at - [0, *milestones][active])
        elif i > active:
            part.update(copy.deepcopy(fresh))


def _curve(scheduler: Any, state: dict[str, Any]) -> list[Any]:
    """The learning rates that a schedule has at the place where its state stands; none where torch has no formula.

    Only of schedules that change a learning rate step by step: others come to their own curve in the next step.
    """
    parts = getattr(scheduler, "_schedulers", None)
    if parts is not None and "_milestones" in state:
        active = bisect_right(state["_milestones"], state["last_epoch"])
        return _curve(parts[active], state["_schedulers"][active])
    if not hasattr(scheduler, "_get_closed_form_lr"):
        return []
    twin = copy.copy(scheduler)
    vars(twin).update(state)
    return [float(rate) for rate in twin._get_closed_form_lr()]


def _with_rates(state: dict[str, Any], rates: Rates) -> dict[str, Any]:
    """The state of a scheduler that says these are the learning rates that it has set last."""
    parts = {"_schedulers": [_with_rates(part, rates) for part in state.get("_schedulers", [])]}
    last = {"_last_lr": list(rates)}
    return state | {key: value for key, value in (parts | last).items() if key in state}


# Optimizers.


class Schedule(NamedTuple):
    """A scheduler of an optimizer, its state in the checkpoint, and the records of the checkpoint's run and of this."""

    scheduler: Any
    saved: dict[str, Any]
    then: dict[str, Any]
    now: dict[str, Any]


def continued(
    state: dict[str, Any], then: Record, now: Record, schedules: Sequence[Schedule] = ()
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The states of an optimizer and of its schedulers with the settings of now.

    Parameters may be in other groups than they were: their moments follow them by name. Groups that were added during
    the run stay as they are.

    Args:
        state: The optimizer's, as it was saved.
        then: The record of the run that has saved it.
        now: The record of this one.
        schedules: Those that are steps of this optimizer's learning rate.

    Raises:
        ValueError: If other parameters are trained, or if parameters that are one group now have had other settings.
    """
    saved = state["param_groups"]
    if not _sized(saved, then):  # rebuilt during the run
        if len(saved) == len(now["groups"]) and _sized(saved, now):
            return state, [schedule.saved for schedule in schedules]
        raise ValueError(
            f"the checkpoint's optimizer has its parameters in groups of {_sizes(saved)}, and this one in groups of "
            f"{', '.join(str(len(names)) for names in now['names'])}: {REMEDY}"
        )
    states = [carried_schedule(*schedule[1:]) for schedule in schedules]
    rates = _starts(then), _starts(now)
    if len(schedules) == 1:
        scheduler, old = schedules[0].scheduler, schedules[0].saved
        curves = _curve(scheduler, old) or old.get("_last_lr", []), _curve(scheduler, states[0])
        if [len(curve) for curve in curves] == [len(rate) for rate in rates]:
            rates = curves
    groups = _carried_groups(saved, then, now, rates)
    if not same([group.get("lr") for group in saved], reached := [group.get("lr") for group in groups]):
        states = [_with_rates(state, reached) for state in states]
    return _packed(state, groups, then, now), states


def _starts(record: Record) -> Rates:
    """The learning rate of each group where its schedule starts."""
    return [group.get("initial_lr", group.get("lr")) for group in record["groups"]]


def _sized(saved: Sequence[dict[str, Any]], record: Record) -> bool:
    """Tells whether the first groups, behind which some may have been added, have the sizes of the record's."""
    counts = [len(names) for names in record["names"]]
    return [len(group["params"]) for group in saved[: len(counts)]] == counts


def _sizes(groups: Sequence[dict[str, Any]]) -> str:
    return ", ".join(str(len(group["params"])) for group in groups)


def _carried_groups(
    saved: Sequence[dict[str, Any]], then: Record, now: Record, rates: tuple[Rates, Rates]
) -> list[dict[str, Any]]:
    """The groups with the settings of now, without their parameters.

    ``rates`` are the learning rates of the groups of both that correspond: where they start, or where their schedules
    have come to.
    """
    others = [{key: value for key, value in group.items() if key not in KEPT_APART} for group in saved]
    if then["names"] == now["names"]:
        pairs = zip(others, then["groups"], now["groups"], *rates, strict=False)
        return [_carried_group(*each) for each in pairs] + others[len(now["groups"]) :]
    if len(saved) > len(then["groups"]):
        raise ValueError(f"parameters are in other groups than the checkpoint's, and groups were added to it: {REMEDY}")
    groups = []
    for j, sources in enumerate(_sources(then, now)):
        # The first one counts: one whose learning rate was configured as now keeps it bit for bit.
        sources = sorted(sources, key=lambda i: not same(rates[0][i], rates[1][j]))
        options = [
            _carried_group(others[i], then["groups"][i], now["groups"][j], rates[0][i], rates[1][j]) for i in sources
        ]
        for other in options[1:]:
            _require_equal(options[0], other, now["names"][j])
        groups.append(options[0] if options else copy.deepcopy(now["groups"][j]))
    return groups


def _packed(state: dict[str, Any], groups: Sequence[dict[str, Any]], then: Record, now: Record) -> dict[str, Any]:
    """The state with these groups, and the parameters' own states, which are numbered, in their order."""
    saved = state["param_groups"]
    if then["names"] == now["names"]:
        return state | {"param_groups": [old | new for old, new in zip(saved, groups, strict=True)]}
    if now["kind"] == "LBFGS":
        raise ValueError(f"the parameters are in another order than the checkpoint's, which LBFGS depends on: {REMEDY}")
    numbers = {
        name: number
        for names, group in zip(then["names"], saved, strict=True)
        for name, number in zip(names, group["params"], strict=True)
    }
    moments = {key: value for key, value in state["state"].items() if key not in numbers.values()}
    packed, count = [], 0
    for names, group in zip(now["names"], groups, strict=True):
        for i, name in enumerate(names, count):
            if numbers[name] in state["state"]:
                moments[i] = state["state"][numbers[name]]
        packed.append(group | {"params": list(range(count, count + len(names)))})
        count += len(names)
    return state | {"state": moments, "param_groups": packed}


def _carried_group(
    saved: dict[str, Any], then: dict[str, Any], now: dict[str, Any], rate_then: Any, rate_now: Any
) -> dict[str, Any]:
    group = dict(saved)
    for key, value in now.items():
        if key not in group:
            group[key] = copy.deepcopy(value)
        elif key in then and key != "lr":
            group[key] = _chosen(then[key], value, group[key])
    if "lr" in saved and rate_then is not None and rate_now is not None and not same(rate_then, rate_now):
        rate = _rate(float(saved["lr"]), float(rate_then), float(rate_now))
        group["lr"] = torch.full_like(now["lr"], rate) if isinstance(now["lr"], Tensor) else rate
    return group


def _rate(saved: float, then: float, now: float) -> float:
    """The learning rate that stands to ``now`` as the saved one does to ``then``."""
    if abs(then) <= 1e-9 * abs(now):  # at the end of a cosine: it says nothing of what else has changed the rate
        return now
    ratio = saved / then
    return now if math.isclose(ratio, 1, rel_tol=1e-6) else now * ratio


def _sources(then: Record, now: Record) -> list[list[int]]:
    """The groups that the parameters of each group of now were in."""
    places = {name: i for i, names in enumerate(then["names"]) for name in names}
    wanted = {name for names in now["names"] for name in names}
    for names, what in ((places.keys() - wanted, "not trained here"), (wanted - places.keys(), "trained here only")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{min(names)}{more} of the optimizer's parameters {what}, unlike before: {REMEDY}")
    return [sorted({places[name] for name in names}) for names in now["names"]]


def _require_equal(ours: dict[str, Any], theirs: dict[str, Any], names: Sequence[str]) -> None:
    for key in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(key), theirs.get(key)
        close = isinstance(one, float) and isinstance(other, float) and math.isclose(one, other, rel_tol=1e-6)
        if not close and not same(one, other):
            raise ValueError(
                f"parameters that are one group here ({names[0]}, ...) come from groups of the checkpoint whose {key} "
                f"would be {one} and {other}: {REMEDY}"
            )


# Values.


def _chosen(then: Any, now: Any, saved: Any) -> Any:
    """The saved value where it was configured as now, else the new one; of sequences, element by element."""
    if same(then, now):
        return saved
    if all(isinstance(value, list | tuple) and len(value) == len(now) for value in (then, now, saved)):
        return type(now)(_chosen(*each) for each in zip(then, now, saved, strict=True))
    return copy.deepcopy(now)


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, Tensor) or isinstance(theirs, Tensor):
        return isinstance(ours, Tensor) and isinstance(theirs, Tensor) and torch.equal(ours.cpu(), theirs.cpu())
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    return bool(ours == theirs)
