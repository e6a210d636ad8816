"""Comparison of losses by the metric that one is judged by: ``zoo compare-losses``.

The recipe's model is trained with each loss, with the same epochs, batches, seeds and choice of the checkpoint; a loss
of two phases shares the epochs between them. Which wins is counted split by split, since splits differ by more than
losses do.
"""

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from statistics import mean, stdev
from typing import Any, NamedTuple

from zoo.common.study import Page, Recipe, Results, spread, spread_text


class Row(NamedTuple):
    """A way to train, and what the table calls it."""

    text: str
    model: Mapping[str, str] = {}  # arguments of the model, but for the plain cross-entropy
    data: Mapping[str, str] = {}  # arguments of the data
    then: str | None = None  # the loss of a second phase
    is_baseline: bool = False  # what is to be beaten


SEVERAL = {
    "bce": Row("BCE", is_baseline=True),
    "pos_weight": Row("BCE, pos_weight balanced", {"pos_weight": "balanced"}, is_baseline=True),
    "class_weight": Row("BCE, class_weight balanced", {"class_weight": "balanced"}, is_baseline=True),
    "balance": Row("BCE, balance 1", data={"balance": "1"}, is_baseline=True),
    "asymmetric": Row("asymmetric", {"loss": "asymmetric"}, is_baseline=True),
    "zlpr": Row("ZLPR", {"loss": "zlpr"}, is_baseline=True),
    "soft_f1": Row("soft F1", {"loss": "soft_fbeta"}),
    "bce_then_soft_f1": Row("BCE, then soft F1", then="soft_fbeta"),
    "f1_cross_entropy": Row("F1-weighted BCE", {"loss": "f1_cross_entropy"}),
}
"""For several labels an image, by name; the first is what the others are compared with."""
ONE = {
    "cross_entropy": Row("CE", is_baseline=True),
    "class_weight": Row("CE, class_weight balanced", {"class_weight": "balanced"}, is_baseline=True),
    "balance": Row("CE, balance 1", data={"balance": "1"}, is_baseline=True),
    "smooth_accuracy": Row("smooth accuracy", {"loss": "smooth_accuracy"}),
    "cross_entropy_then_smooth_accuracy": Row("CE, then smooth accuracy", then="smooth_accuracy"),
    "soft_f1": Row("soft F1", {"loss": "soft_fbeta"}),
    "cross_entropy_then_soft_f1": Row("CE, then soft F1", then="soft_fbeta"),
    "f1_cross_entropy": Row("F1-weighted CE", {"loss": "f1_cross_entropy"}),
}
"""The same for one label an image."""
FIRST_PHASE = 2 / 3  # of the epochs


class Found(NamedTuple):
    """Test metrics of a row of the table, one value for each seed."""

    text: str
    f1: Sequence[float]
    second: Sequence[float]  # micro F1 of several labels, accuracy of one
    cross_entropy: Sequence[float]
    is_baseline: bool


def compare(recipe: Recipe, losses: Sequence[str] | None = None) -> Page:
    """Trains and tests a :class:`zoo.ViTClassifier` with each loss.

    Args:
        recipe: The model's. Its Trainer says how long all train, by ``max_epochs``, and its ModelCheckpoint which epoch
            is tested.
        losses: Names out of :data:`SEVERAL` or :data:`ONE`. None: all. The first of them is always trained.

    Raises:
        ValueError: For a loss that is unknown, and a recipe without ``max_epochs`` of at least 2.
    """
    several = bool(recipe.model["multi_label"])
    known = SEVERAL if several else ONE
    rows = {name: known[name] for name in chosen(known, losses)}
    epochs = recipe.trainer.get("max_epochs")
    if not isinstance(epochs, int) or epochs < 2:
        raise ValueError(f"max_epochs is {epochs}: expected at least 2, which phases can share")
    first = max(1, round(FIRST_PHASE * epochs))
    shared = (
        [] if not several or _has(recipe, "TunedThresholds") else ["--trainer.callbacks+=zoo.callbacks.TunedThresholds"]
    )
    variants = {name: [*_options(row, several, first), *shared] for name, row in rows.items()}
    results = recipe.train(variants, "test/f1")
    found = _found(rows, results, several)
    reference, *_ = found
    best = max((row for row in found if row.is_baseline), key=lambda row: mean(row.f1))
    lines = _table(found, reference, best, several)
    lines += ["", _budget(recipe, first, any(row.then for row in rows.values()))]
    return Page(lines, _series(found), "", "macro F1 of the test data", ticks=[row.text for row in found])


def chosen(known: Mapping[str, Row], names: Sequence[str] | None) -> list[str]:
    """The names of losses to train, in the order of the table.

    Raises:
        ValueError: For a name that is unknown.
    """
    for name in names or ():
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected some of {', '.join(known)}"
            raise ValueError(f"unknown loss {name!r}; {hint}")
    reference = next(iter(known))
    return [name for name in known if names is None or name in (reference, *names)]


def _options(row: Row, several: bool, first: int) -> list[str]:
    plain = {"loss": "bce" if several else "cross_entropy"}
    plain |= {"loss_options": "null", "class_weight": "null", "pos_weight": "null"}
    options = [f"--model.{name}={value}" for name, value in (plain | dict(row.model)).items()]
    options += [f"--data.{name}={value}" for name, value in row.data.items()]
    if row.then is not None:
        phases = json.dumps([{"epoch": first, "loss": row.then}])
        options += ["--trainer.callbacks+=zoo.callbacks.LossSchedule", f"--trainer.callbacks.phases={phases}"]
    return options


def _has(recipe: Recipe, name: str) -> bool:
    """Tells whether a recipe's Trainer has a callback of that name."""
    callbacks: Any = recipe.trainer.get("callbacks") or []
    return any(each.class_path.rpartition(".")[2] == name for each in callbacks)


def _found(rows: Mapping[str, Row], results: Results, several: bool) -> list[Found]:
    """Rows of the table, one for each that was trained, and behind the first that with tuned thresholds."""
    found = []
    for name, row in rows.items():
        metrics = results[name]
        second = metrics["test/f1_micro" if several else "test/acc"]
        # The loss itself is logged alone where it is the plain cross-entropy.
        cross_entropy = metrics.get("test/cross_entropy", metrics["test/loss"])
        found.append(Found(row.text, metrics["test/f1"], second, cross_entropy, row.is_baseline))
        if several and not found[1:]:
            found.append(Found(f"{row.text}, tuned thresholds", metrics["test/f1_tuned"], (), cross_entropy, True))
    return found


def _table(found: Sequence[Found], reference: Found, best: Found, several: bool) -> list[str]:
    columns = ["loss", "macro F1", "micro F1" if several else "accuracy", "cross-entropy"]
    columns += [f"ahead of {reference.text} in", f"ahead of {best.text} in", "by", "macro F1 of each seed"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in found:
        gains = [a - b for a, b in zip(row.f1, best.f1, strict=True)]
        cells = [
            row.text,
            spread_text(row.f1, 3),
            f"{mean(row.second):.3f}" if row.second else "",
            f"{mean(row.cross_entropy):.3f}",
            "" if row is reference else _wins(row, reference),
            "" if row is best else _wins(row, best),
            "" if row is best else _mean_text(gains),
            ", ".join(f"{value:.3f}" for value in row.f1),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _wins(row: Found, other: Found) -> str:
    return f"{sum(a > b for a, b in zip(row.f1, other.f1, strict=True))} of {len(row.f1)}"


def _mean_text(values: Sequence[float]) -> str:
    """A mean with its standard error, where there are several values."""
    error = f" ± {stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{mean(values):+.3f}{error}"


def _budget(recipe: Recipe, first: int, in_phases: bool) -> str:
    """Sentence on what all rows have in common, and what the numbers of the table are."""
    trainer = recipe.trainer
    epochs = trainer["max_epochs"]
    monitors = [each.get("init_args", {}).get("monitor") for each in trainer.get("callbacks") or []]
    monitor = next(filter(None, monitors), None)
    phases = f", in two phases {first} and {epochs - first}" if in_phases else ""
    tested = f"that with the best {monitor}" if monitor else "the last"
    return (
        f"All rows have {epochs} epochs{phases}, and the epoch that is tested is {tested}. Macro F1 with the standard "
        "deviation over the seeds; what it is ahead by, with the standard error of the mean."
    )


def _series(found: Sequence[Found]) -> dict[str, list[tuple[float, float, float]]]:
    """Points of the plot, of what is to be beaten and of the others."""
    places = list(enumerate(found))
    groups = {"baselines": True, "smooth metrics": False}
    series = {
        name: [(float(x), *spread(row.f1)) for x, row in places if row.is_baseline is is_baseline]
        for name, is_baseline in groups.items()
    }
    return {name: points for name, points in series.items() if points}
