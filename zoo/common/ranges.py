"""Range checks of options when a module is built, by name and with what would be in range."""

import math
from collections.abc import Mapping
from typing import Any, get_args

# What all techniques train with, by the name that they all give it: (least, below), as of check_ranges.
TRAINING: dict[str, tuple[float, float | None]] = {
    "lr": (0, None),
    "weight_decay": (0, None),
    "warmup_epochs": (0, None),
    "min_lr": (0, None),
    "betas": (0, 1),
    "momentum": (0, None),
    "eps": (0, None),
}


def check_ranges(**options: tuple[Any, float, float | None]) -> None:
    """Raises ValueError for an option out of its range. NaN and infinity are in none.

    Args:
        options: By name: the value, or several, or None for one that is left to somebody else; the least that is
            allowed, -infinity for every finite number; and what it has to stay below, or None.
    """
    for name, (value, least, below) in options.items():
        for number in value if isinstance(value, tuple | list) else (value,):
            if number is None or (number >= least and (below is None or number < below) and not math.isinf(number)):
                continue
            expected = f"at least {least:g}" if below is None else f"a number in [{least:g}, {below:g})"
            expected = "a finite number" if least == -math.inf or number == math.inf else expected
            raise ValueError(f"{name} is {value}: expected {expected}")


def check_above(**options: tuple[Any, float, float]) -> None:
    """Raises ValueError for an option out of its range, whose lower end is not in it. NaN and infinity are in none.

    Args:
        options: By name: the value, or None for one that is left to somebody else; what it has to be above; and the
            most that is allowed, infinity for every finite number.
    """
    for name, (value, above, most) in options.items():
        if value is not None and not (above < value <= most and value != math.inf):
            end = "" if most == math.inf else f" and at most {most:g}"
            kind = "a finite number" if most == math.inf else "a number"
            raise ValueError(f"{name} is {value}: expected {kind} above {above:g}{end}")


def check_choices(**options: tuple[Any, Any]) -> None:
    """Raises ValueError for an option that is none of its choices.

    Args:
        options: By name: the value, and the ``Literal`` of what may be chosen.
    """
    for name, (value, choices) in options.items():
        if value not in get_args(choices):
            raise ValueError(f"unknown {name} {value!r}: expected {' or '.join(map(str, get_args(choices)))}")


def check_training(hparams: Mapping[str, Any]) -> None:
    """Raises ValueError for an option of optimizer or schedule out of its range, of those that a module has.

    Args:
        hparams: Options by name, others among them.
    """
    check_ranges(**{name: (hparams[name], *limits) for name, limits in TRAINING.items() if name in hparams})
    check_above(**{name: (hparams[name], 0, 1) for name in ("layer_decay", "decay_rate") if name in hparams})
    check_above(**{name: (hparams[name], 0, math.inf) for name in ("decay_epochs",) if name in hparams})
