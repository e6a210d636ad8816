"""Settings of optimizers and schedulers when a run is continued: what somebody has changed since, and nothing else.

torch restores an optimizer's settings with its moments, so that another learning rate, asked for when a run is
continued, would be ignored. Setting all of them anew would undo what a schedule, a callback or a hand has made of them.
So every checkpoint says what the settings were at the start, and what is configured alike stays the checkpoint's.
"""

from collections.abc import Sequence
from typing import Any

from zoo._lightning import Callback, rank_zero_warn
from zoo.common.optimizer_state import KEPT_APART, REMEDY, Record, Schedule, continued, described, same

KEY = "optimizer_settings"
# What a checkpoint without a record shows. Nothing changes these during a run: where they differ, somebody has asked.
RATES = {"initial_lr", "max_lr", "min_lr"}
SHOWN = RATES | {"foreach", "fused", "capturable", "differentiable"}
SHOWN_BY_SCHEDULERS = {"base_lrs", "max_lrs"}
PROGRESS = {"last_epoch", "best", "num_bad_epochs", "cooldown_counter", "T_cur", "T_i"}


class OptimizerSettings(Callback):
    """Lets settings that were changed win over a checkpoint's, and keeps the others as the run has made them.

    It belongs in front of all other callbacks, some of which change the optimizer or replace the scheduler when a fit
    starts. A learning rate that was changed keeps its place in its schedule; so do parameters that are in other groups
    now (another ``layer_decay``, no more ``weight_decay``). A checkpoint written without this callback keeps its own
    settings, but for a learning rate whose schedule shows that it was started differently.

    Raises:
        ValueError: When a run is continued with another optimizer, other parameters, another kind of schedule, or
            groups of parameters whose settings have come to differ.
    """

    def __init__(self) -> None:
        self._optimizers: list[Any] = []
        self._schedulers: list[Any] = []
        self._configured: dict[str, list[Record]] = {"optimizers": [], "schedulers": []}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:  # built, and mostly not yet restored
        names = {id(p): name.replace("_orig_mod.", "") for name, p in pl_module.named_parameters()}
        self._optimizers = list(trainer.optimizers)
        self._schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self._configured = {
            "optimizers": [described(optimizer, names) for optimizer in self._optimizers],
            "schedulers": [described(scheduler) for scheduler in self._schedulers],
        }
        checkpoint = trainer._checkpoint_connector._loaded_checkpoint
        if checkpoint and not trainer.strategy.restore_checkpoint_after_setup:
            self._carry_over(checkpoint, live=False)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        # A strategy that splits weights has by now filled its optimizers, parameter by parameter; schedulers come next.
        if trainer.state.fn == "fit" and trainer.strategy.restore_checkpoint_after_setup:
            self._carry_over(checkpoint, live=True)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        # Of an optimizer or a scheduler that was replaced during the run, nobody knows how it was configured.
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        found = {
            "optimizers": _still(trainer.optimizers, self._optimizers, self._configured["optimizers"]),
            "schedulers": _still(schedulers, self._schedulers, self._configured["schedulers"]),
        }
        if self._optimizers and any(found["optimizers"]):
            checkpoint[KEY] = found

    def _carry_over(self, checkpoint: dict[str, Any], live: bool) -> None:
        """Changes a checkpoint's states before they are restored; or the optimizers that have been restored."""
        states, schedules = checkpoint.get("optimizer_states"), checkpoint.get("lr_schedulers")
        in_parts = states is None and live  # a folder, of which each process has read its own
        if in_parts:
            states = [{"param_groups": optimizer.param_groups} for optimizer in self._optimizers]
        if states is None or schedules is None:
            return  # weights only: Lightning says so
        record = checkpoint.get(KEY) or {"optimizers": [None] * len(states), "schedulers": [None] * len(schedules)}
        _refuse_others("optimizer", record["optimizers"], self._configured["optimizers"])
        if KEY in checkpoint:
            counted = None not in record["schedulers"]  # one that was added during the run is added again
            _refuse_others("learning rate scheduler", record["schedulers"], self._configured["schedulers"], counted)
        for i, (optimizer, now) in enumerate(zip(self._optimizers, self._configured["optimizers"], strict=True)):
            if "param_groups" not in states[i]:  # configure_optimizers has returned None
                continue
            then = record["optimizers"][i] or _assumed(states[i]["param_groups"], now)
            if in_parts and then["names"] != now["names"]:
                raise ValueError(f"parameters are in other groups than those of the checkpoint, a folder: {REMEDY}")
            own = self._schedules_of(optimizer, schedules, record["schedulers"], KEY in checkpoint)
            states[i], carried = continued(states[i], then, now, list(own.values()))
            for k, state in zip(own, carried, strict=True):
                schedules[k] = state
            if live:
                groups = zip(optimizer.param_groups, states[i]["param_groups"], strict=False)
                for j, (group, settings) in enumerate(groups):
                    group.update({key: value for key, value in settings.items() if key not in KEPT_APART})
                    if "param_names" in group and then["names"] != now["names"]:
                        group["param_names"] = list(now["names"][j])
        if KEY not in checkpoint:
            _tell_differences(states, schedules, self._configured)

    def _schedules_of(
        self, optimizer: Any, states: Sequence[dict[str, Any]], records: Sequence[Record | None], recorded: bool
    ) -> dict[int, Schedule]:
        """The schedules of an optimizer whose settings are known, by their number."""
        found = {}
        for k, (scheduler, saved, then) in enumerate(zip(self._schedulers, states, records, strict=False)):
            now = self._configured["schedulers"][k]["state"]
            settings = then["state"] if then else None if recorded else _assumed_schedule(saved, now)
            if getattr(scheduler, "optimizer", None) is optimizer and settings is not None:
                found[k] = Schedule(scheduler, saved, settings, now)
        return found


def _still(current: Sequence[Any], built: Sequence[Any], records: Sequence[Record]) -> list[Record | None]:
    """The records of those that are still what was built; None in the place of others."""
    known = [i < len(built) and one is built[i] for i, one in enumerate(current)]
    return [records[i] if is_known else None for i, is_known in enumerate(known)]


def _refuse_others(what: str, then: Sequence[Record | None], now: Sequence[Record], counted: bool = True) -> None:
    pairs = zip(then, now, strict=False)
    if (counted and len(then) != len(now)) or any(one and one["kind"] != other["kind"] for one, other in pairs):
        theirs, ours = (", ".join(one["kind"] if one else "an unknown one" for one in ones) for ones in (then, now))
        raise ValueError(
            f"{what}: the checkpoint has {theirs or 'none'}, from which {ours or 'none'} cannot go on: {REMEDY}"
        )


def _assumed(saved: Sequence[dict[str, Any]], now: Record) -> Record:
    """The record that a checkpoint lacks: everything was configured as it is now, unless it shows."""
    groups = []
    for theirs, ours in zip(saved, now["groups"], strict=False):
        lacked, lacking = _differing(theirs, ours)
        if "lr" in ours and lacked and lacking:
            raise ValueError(
                f"optimizer: the checkpoint's has {', '.join(lacked)}, and {now['kind']} has {', '.join(lacking)} "
                f"instead, so that it cannot go on from its state: {REMEDY}"
            )
        shown = SHOWN - RATES if "swa_lr" in theirs else SHOWN  # StochasticWeightAveraging sets them
        groups.append(ours | {key: theirs[key] for key in ours.keys() & theirs.keys() & shown})
    return now | {"groups": groups + now["groups"][len(groups) :]}


def _assumed_schedule(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, Any] | None:
    """The same of a scheduler; None if it is of another kind, and left to torch."""
    parts, ours = saved.get("_schedulers", []), now.get("_schedulers", [])
    assumed = [_assumed_schedule(*each) for each in zip(parts, ours, strict=False)]
    if len(parts) != len(ours) or None in assumed or all(_differing(saved, now)):
        return None
    shown = {key: saved[key] for key in now.keys() & saved.keys() & SHOWN_BY_SCHEDULERS}
    return now | shown | ({"_schedulers": assumed} if ours else {})


def _differing(saved: dict[str, Any], now: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Settings that each has and the other lacks. Both: two kinds, since a newer version of torch only adds some."""
    pairs = (saved.keys() - now.keys(), now.keys() - saved.keys())
    theirs, ours = (sorted(k for k in keys - SHOWN - KEPT_APART if not k.startswith("_")) for keys in pairs)
    return theirs, ours


def _tell_differences(states: Sequence[Any], schedules: Sequence[Any], now: dict[str, list[Record]]) -> None:
    """Says which settings of a checkpoint without a record stay, though others are configured here."""
    moved = SHOWN | KEPT_APART | {"lr"}
    if any(state.get("cycle_momentum") for state in schedules):
        moved |= {"momentum", "betas"}
    pairs = [
        (theirs, ours, moved - {"lr"} if not schedules and "initial_lr" not in theirs else moved)
        for state, record in zip(states, now["optimizers"], strict=True)
        for theirs, ours in zip(state.get("param_groups", []), record["groups"], strict=False)
    ]
    pairs += [
        (theirs, ours["state"], PROGRESS | SHOWN_BY_SCHEDULERS)
        for theirs, ours in zip(schedules, now["schedulers"], strict=False)
    ]
    found = {
        f"{key} {theirs[key]} (here {ours[key]})": None
        for theirs, ours, ignored in pairs
        for key in sorted(theirs.keys() & ours.keys() - ignored)
        if not key.startswith("_") and not same(theirs[key], ours[key])
    }
    if found:
        rank_zero_warn(
            "the checkpoint does not say how its optimizer was configured, so that its settings stay: "
            + ", ".join(found)
        )
