"""Shares of a step's time by kinds of operations: what there is to be made faster."""

import re
import time
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# The first that is found in an operation's name.
KINDS = {
    "convolutions": "conv",
    "attention": "scaled_dot_product|attention",
    "matrix products": "::(add|b|baddb)?mm|_mm$|matmul|linear",
    "compiled code": "CompiledFxGraph|[Tt]riton|inductor",
    "optimizer": "Optimizer|_fused_|_foreach_",
}
REST = "elementwise, norms, copies"
PYTHON = "Python"


def shares(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """The share of each kind of operation in one step, by torch's profiler, the largest first.

    On a CPU it is of the time that the step takes, and what is in no operation of torch's is called Python; on a GPU it
    is of the time that the GPU is busy. Profiling makes small operations longer than they are.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    spent: dict[str, float] = {}
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CPU:  # kernels are those of operations, once more
            kind = kind_of(event.key)
            spent[kind] = spent.get(kind, 0.0) + (event.self_device_time_total if on_gpu else event.self_cpu_time_total)
    total = sum(spent.values())
    if not on_gpu:
        spent[PYTHON] = max(0.0, 1e6 * seconds - total)
        total += spent[PYTHON]
    return {kind: spent[kind] / total for kind in sorted(spent, key=lambda kind: -spent[kind]) if spent[kind]}


def kind_of(operation: str) -> str:
    """Kind of an operation by torch's name, such as ``aten::addmm``."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, operation)), REST)
