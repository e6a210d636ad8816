"""Removal of what a run that is not profiled pays for profiling.

Lightning enters a context for every hook of every callback, about eighty in a step with the zoo's defaults, whether
somebody profiles or not. That is a tenth of what ``Trainer.fit`` costs beside a loop written by hand, or more
(``benchmarks/trainer_overhead.py``).
"""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from zoo._lightning import NAMESPACE

if TYPE_CHECKING or NAMESPACE == "lightning":
    from lightning.pytorch.profilers import PassThroughProfiler
else:
    from pytorch_lightning.profilers import PassThroughProfiler

_NOTHING: Any = nullcontext()


class NoProfiler(PassThroughProfiler):
    """Lightning's profiler that does nothing, without making a context each time in which it does."""

    def profile(self, action_name: str) -> Any:
        return _NOTHING


def unprofiled(trainer: Any) -> Any:
    """Takes the costs of profiling away from a Trainer, which it returns; one with a profiler stays as it is."""
    if type(trainer.profiler) is PassThroughProfiler:
        trainer.profiler = NoProfiler()
    return trainer
