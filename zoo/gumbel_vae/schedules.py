"""Temperatures and weights as functions of the step: nothing to save, so that a resumed run goes on where it was.

Steps are those of the optimizer (the Trainer's ``global_step``), counted from 0.
"""

import math
from collections.abc import Callable

Schedule = Callable[[int, float, float, int], float]


def constant(step: int, start: float, end: float, steps: int) -> float:
    """``start`` at every step."""
    return start


def exponential(step: int, start: float, end: float, steps: int) -> float:
    """``start * (end / start)**(step / steps)``, and ``end`` from ``steps`` on; both ends are above 0.

    This is Jang et al. 2017's max(end, start * exp(-r * step)) with the rate r = ln(start / end) / steps.
    """
    return end if step >= steps else start * (end / start) ** (step / steps)


def cosine(step: int, start: float, end: float, steps: int) -> float:
    """Half a cosine from ``start`` at step 0 to ``end`` at ``steps``, and ``end`` from there on.

    Ramesh et al. 2021 (DALL-E, arXiv 2102.12092, appendix A.2) lower the temperature like this and raise the weight of
    the KL, which may start at 0.
    """
    return end if step >= steps else end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


SCHEDULES: dict[str, Schedule] = {"constant": constant, "exponential": exponential, "cosine": cosine}


def check_temperatures(schedule: str, start: float, end: float, steps: int) -> None:
    """Raises ValueError for a schedule that no temperature can follow.

    Raises:
        ValueError: If the schedule is unknown, a temperature is not a finite number above 0, or ``steps`` is below 1.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}: expected one of {', '.join(SCHEDULES)}")
    for name, temperature in (("start", start), ("end", end)):
        if not 0 < temperature < math.inf:
            raise ValueError(
                f"the temperature's {name} is {temperature}: expected a finite number above 0, such as 0.5"
            )
    if steps < 1:
        raise ValueError(f"the temperature reaches its end after {steps} steps: expected at least 1")
