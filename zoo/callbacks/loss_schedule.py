"""Phases of a training, each with its loss: cross-entropy first, then a smooth surrogate of the metric."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from zoo._lightning import Callback, rank_zero_info
from zoo.callbacks.run_directory import run_directory
from zoo.common.backbones import name_of
from zoo.common.protocols import ExchangesLoss, HasSmoothMetric

METRICS = {"val/acc": "accuracy", "val/f1": "F1", "val/smooth": "smooth metric"}
"""What is drawn against the left axis, in [0, 1], with its name in the chart."""
CROSS_ENTROPY = "val/cross_entropy"


class LossSchedule(Callback):
    """Changes the loss at an epoch or a step: cross-entropy, then a surrogate of the metric that a model is judged by.

    Surrogates such as soft F1 have next to no gradient where a network knows nothing, so that they are for the end of a
    training (Su 2019, kexue.fm/archives/6620). ``phases: [{epoch: 20, loss: soft_fbeta}]`` trains 20 epochs on the
    module's own loss and the others on soft F1. Weights, optimizer and learning rate go on as they are.

    Throughout, evaluations log the loss of their phase as ``val/loss``, the cross-entropy as ``val/cross_entropy`` and
    the smooth metric of the last phase that has one as ``val/smooth``, beside ``val/acc`` and ``val/f1``. At the end of
    the fit all of them are drawn into ``loss_schedule.png`` in the run's directory, with a line where the loss changes.

    The phase follows from the epoch or the step, so that a continued run has the loss of the uninterrupted one; what
    losses and chart have gathered is in the checkpoint. The weights stay the module's alone: without this callback a
    checkpoint is one of the module with its own loss. Validating and testing on their own measure the last phase's.

    Args:
        phases: Each has the ``epoch`` or the ``step`` (of the optimizer) that it begins with, the same of both for all
            and rising; its ``loss``, a name that the module's own ``loss`` takes, or an ``nn.Module``; and ``options``
            of a loss of ``zoo.losses``. Before the first one the module has its own loss. A classifier's
            ``class_weight`` and ``pos_weight`` are for phases of "cross_entropy", "bce" and "sigmoid".

    Raises:
        ValueError: For phases of another form; for a module whose loss cannot change, or not to that; for a loss with
            parameters, which nothing would train.
    """

    writes = "chart of the losses"

    def __init__(self, phases: Sequence[Mapping[str, Any]]) -> None:
        if not phases:
            raise ValueError("phases are empty: expected one or more, such as {epoch: 20, loss: soft_fbeta}")
        for number, phase in enumerate(phases):
            _check(number, phase)
        units = {"step" if "step" in phase else "epoch" for phase in phases}
        if len(units) == 2:
            raise ValueError("phases begin with epochs and with steps: expected the same for all")
        self.unit = units.pop()
        self.starts = [int(phase[self.unit]) for phase in phases]
        if any(first >= second for first, second in pairwise(self.starts)):
            raise ValueError(
                f"phases begin with {self.unit}s {self.starts}: expected each to begin after the one before"
            )
        self.phases = [dict(phase) for phase in phases]
        self.last_path: Path | None = None
        self.curves: list[dict[str, float]] = []
        """What each validation has measured, by its name, with the ``step`` that it came after."""
        self.began: dict[str, int] = {}
        """The step that each phase began with, by its number, once it has."""
        self._losses: list[Any] = []
        self._smooth: Any = None
        self._phase: int | None = None  # -1: before the first one
        self._folder: Path | None = None

    def at(self, trainer: Any) -> int:
        """The phase that a Trainer is in, from 0; -1 before the first one."""
        now = trainer.global_step if self.unit == "step" else trainer.current_epoch
        return sum(start <= now for start in self.starts) - 1

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if not isinstance(pl_module, ExchangesLoss):
            raise ValueError(
                f"{type(pl_module).__name__} has no loss that can change: LossSchedule is for the zoo's classifiers, "
                "and modules with make_loss and use_loss, see zoo.common.protocols.ExchangesLoss"
            )
        self._losses = [pl_module.make_loss(phase["loss"], phase.get("options")) for phase in self.phases]
        for loss in self._losses:
            if isinstance(loss, nn.Module) and any(True for _ in loss.parameters()):
                raise ValueError(
                    f"loss {type(loss).__name__} has parameters, which a phase does not train: give it to the module"
                )
        self._smooth = next((loss for loss in reversed(self._losses) if isinstance(loss, HasSmoothMetric)), None)
        self._phase, self.curves, self.began = None, [], {}
        end = trainer.max_steps if self.unit == "step" else trainer.max_epochs
        if stage == "fit" and end is not None and 0 <= end <= self.starts[-1] and not trainer.fast_dev_run:
            last = f"{self.unit} {self.starts[-1]}"
            rank_zero_info(f"the loss {_name(self.phases[-1])} begins with {last}, which this fit does not come to")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if isinstance(pl_module, ExchangesLoss):
            pl_module.use_loss(None)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._folder = run_directory(trainer)  # all processes have to ask

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin(pl_module, self.at(trainer), trainer.global_step)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin(pl_module, self.at(trainer), trainer.global_step)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._begin(pl_module, self.at(trainer), trainer.global_step)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        # By the step that comes next, as in a run that continues before this validation.
        in_fit = trainer.state.fn == "fit"
        self._begin(pl_module, self.at(trainer) if in_fit else len(self.phases) - 1, trainer.global_step)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin(pl_module, len(self.phases) - 1, trainer.global_step)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            found = trainer.callback_metrics
            row = {name: float(found[name]) for name in (*METRICS, CROSS_ENTROPY) if name in found}
            self.curves.append({"step": trainer.global_step} | row)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero and self.curves and not trainer.fast_dev_run and self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self.last_path = self._folder / "loss_schedule.png"
            changes = {step: _name(self.phases[int(phase)]) for phase, step in self.began.items()}
            draw(self.last_path, self.curves, changes)

    def _begin(self, module: Any, phase: int, step: int) -> None:
        """Gives the module the loss of a phase, if it has another."""
        if phase == self._phase:
            return
        self._phase = phase
        for loss in (*self._losses, self._smooth):
            if isinstance(loss, nn.Module):
                loss.to(module.device)
        module.use_loss(None if phase < 0 else self._losses[phase], self._smooth)
        if phase >= 0 and str(phase) not in self.began:
            self.began[str(phase)] = step
            rank_zero_info(f"the loss is {_name(self.phases[phase])} from step {step} on")

    def state_dict(self) -> dict[str, Any]:
        states = [loss.state_dict() if isinstance(loss, nn.Module) else {} for loss in self._losses]
        return {"curves": self.curves, "began": self.began, "losses": states, "names": list(map(_name, self.phases))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curves, self.began = list(state_dict["curves"]), dict(state_dict["began"])
        theirs, ours = (", ".join(names) for names in (state_dict["names"], map(_name, self.phases)))
        if theirs != ours:
            raise ValueError(f"phases are {ours}, and the checkpoint's are {theirs}: continue with the same")
        for loss, state in zip(self._losses, state_dict["losses"], strict=True):
            if isinstance(loss, nn.Module):
                loss.load_state_dict(state)


def draw(path: Path, curves: Sequence[Mapping[str, float]], changes: Mapping[int, str]) -> None:
    """Draws metrics and cross-entropy over the steps, with a line where the loss changes.

    Args:
        path: Of the picture; the ending says its format.
        curves: ``step`` and values by name, of each validation; those of :data:`METRICS` are drawn against the left
            axis and :data:`CROSS_ENTROPY`, in nats, against the right one.
        changes: Names of losses by the step that each begins with.
    """
    from matplotlib.figure import Figure  # here: it takes a third of a second to import

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    named = METRICS | {CROSS_ENTROPY: "cross-entropy"}
    for number, (name, text) in enumerate(named.items()):
        points = [(row["step"], row[name]) for row in curves if name in row]
        if points:
            axes, style = (right, "--") if name == CROSS_ENTROPY else (left, "-")
            axes.plot(
                *zip(*points, strict=True), style, color=f"C{number}", marker="os^D"[number], markersize=3, label=text
            )
    for step, text in changes.items():
        left.axvline(step, color="0.4", linewidth=1, linestyle=":")
        left.annotate(f" {text}", (step, 1), xycoords=("data", "axes fraction"), va="bottom", fontsize="small")
    left.set_xlabel("optimizer steps")
    left.set_ylabel("metrics of validation")
    right.set_ylabel("cross-entropy of validation, nats")
    left.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(named), fontsize="small")
    figure.savefig(path, dpi=120)


def _check(number: int, phase: Any) -> None:
    """Raises ValueError for a phase of another form."""
    keys = {"epoch", "step", "loss", "options"}
    if (
        not isinstance(phase, Mapping)
        or not {"loss"} <= phase.keys() <= keys
        or ("epoch" in phase) == ("step" in phase)
    ):
        seen = f"has {', '.join(map(str, phase))}" if isinstance(phase, Mapping) else f"is a {type(phase).__name__}"
        raise ValueError(f"phase {number} {seen}: expected loss, either epoch or step, and perhaps options")
    unit = "step" if "step" in phase else "epoch"
    if type(phase[unit]) is not int or phase[unit] < 0:
        raise ValueError(f"phase {number} begins with {unit} {phase[unit]!r}: expected a whole number of 0 or more")


def _name(phase: Mapping[str, Any]) -> str:
    return name_of(phase["loss"]).rpartition(".")[2]
