"""Timing of steps: after a warm-up, without making the device wait, read once at the end."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

BLOCK = 5  # steps between two looks at the clock while it warms up
STEADY = 0.05  # the warm-up ends when two blocks in a row differ by less than this share


class Goal(NamedTuple):
    """Amount that is measured.

    Attributes:
        steps: At least so many,
        seconds: and at least so long,
        limit: but no longer than this, in seconds, once there are ``fewest`` steps. The warm-up may take as long again.
        fewest: Steps below which there is no figure.
    """

    steps: int = 50
    seconds: float = 5.0
    limit: float = 60.0
    fewest: int = 5


class Clock:
    """Times steps, whoever takes them: ``tick`` after each says when it is enough.

    The first steps do not count: they compile, allocate and fill caches. They end when two blocks of five take the same
    time, to 5 %, at the earliest after ten steps. Then as many are timed as make up the goal. On a GPU each of them
    leaves an event behind, and nobody waits for it before the last.

    Args:
        device: Of the model.
        goal: How much to measure.
        agree: Gives every process what the first one says, so that all of them take the same number of steps.
        before: Called when the warm-up is over, to reset what else is counted.
    """

    def __init__(
        self,
        device: torch.device,
        goal: Goal,
        agree: Callable[[Any], Any] = lambda said: said,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self.device, self.goal, self.agree, self.before = device, goal, agree, before
        self.warm_up_steps = 0
        self.left: int | None = None  # of the steps that count; None while it warms up
        self.issued: float | None = None  # seconds the host needs to issue a step, found on a GPU before the timing
        self._blocks: list[float] = []  # seconds a step, of the warm-up's blocks
        self._start = self._block = time.perf_counter()
        self._in_block = 0
        self._marks: list[Any] = []

    def tick(self) -> bool:
        """Counts a step, at its end; True if there are enough."""
        if self.left is not None:
            self._mark()
            self.left -= 1
            return self.left == 0
        self.warm_up_steps += 1
        self._in_block += 1
        if self.warm_up_steps == 1 or self.warm_up_steps % BLOCK == 0:  # the same for every process
            self._end_block()
        return False

    def seconds(self) -> list[float]:
        """Time of each step that counts, in its order."""
        self._synchronize()
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self.device.type == "cuda":
            return [start.elapsed_time(end) / 1e3 for start, end in pairs]
        return [end - start for start, end in pairs]

    def _end_block(self) -> None:
        issued = time.perf_counter() - self._block
        self._synchronize()
        now = time.perf_counter()
        self._blocks.append((now - self._block) / self._in_block)
        self.issued = issued / self._in_block
        steady = len(self._blocks) > 2 and abs(self._blocks[-1] / self._blocks[-2] - 1) < STEADY
        if self.agree(steady or now - self._start > self.goal.limit):
            self.left = self.agree(self._enough(self._blocks[-1]))
            self.before()
            self._mark()
        self._block, self._in_block = time.perf_counter(), 0

    def _enough(self, seconds: float) -> int:
        wanted = max(self.goal.steps, round(self.goal.seconds / seconds))
        return max(self.goal.fewest, min(wanted, round(self.goal.limit / seconds)))

    def _mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile of some steps, in milliseconds."""
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return {"median": 1e3 * statistics.median(seconds), "p10": 1e3 * tenths[0], "p90": 1e3 * tenths[-1]}
