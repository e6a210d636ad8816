"""What every test starts from: an empty directory, one seed, one thread, no network; and what it must leave behind."""

import os

# Before torch is imported, and for the processes that tests start. On tensors this small a second thread costs more
# than it brings, and a process forked after OpenMP has started its threads can hang.
os.environ["OMP_NUM_THREADS"] = "1"
# A pretrained tag must fail here, not download.
os.environ["HF_HUB_OFFLINE"] = "1"

import functools
import gc
import importlib.metadata
import inspect
import logging
import random
import signal
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch.utils.data import BatchSampler, DataLoader

torch.set_num_threads(1)
if not torch.accelerator.is_available():
    # Where torch.compile comes before a process's first gradients, no process that is forked from it may compute any.
    torch.ones((), requires_grad=True).backward()
# Each Trainer asks for installed callbacks, and reads all packages' metadata for it: most of what making one takes.
importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)

# As in a terminal, also where all of this runs in the background or under nohup, which ignore them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# SIGALRM is not among them: it belongs to pytest-timeout.
SIGNALS = [signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]


@pytest.fixture(autouse=True)
def _empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are written to where the program stands: not into the checkout."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _restored_process() -> Iterator[None]:
    """Takes back what a Trainer sets for the whole process, so that no test depends on the one before it.

    The environment holds the seed, and with several processes the rank, their number, the address and the port.
    """
    environment = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    benchmark, dtype = torch.backends.cudnn.benchmark, torch.get_default_dtype()
    rank, told = getattr(rank_zero_only, "rank", None), logging.getLogger("lightning.pytorch").level
    yield
    logging.getLogger("lightning.pytorch").setLevel(told)  # scripts quieten it
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    for number, handler in handlers.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # the call alone takes seconds, the first time
        torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = benchmark
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    # Lightning leaves them wrapped, and all that derive from them, when a hook that makes them fails, and the next hook
    # that does not fail takes the wrapped ones for the original.
    for loader in (*with_subclasses(DataLoader), *with_subclasses(BatchSampler)):
        for name in ("__init__", "__setattr__", "__delattr__"):
            if hasattr(loader.__dict__.get(name), "__wrapped__"):
                setattr(loader, name, inspect.unwrap(loader.__dict__[name]))
            if f"__old{name}" in loader.__dict__:
                delattr(loader, f"__old{name}")
    if rank is not None:  # else Lightning was first imported by the test, and has set it
        rank_zero_only.rank = rank


def with_subclasses(cls: type) -> Iterator[type]:
    yield cls
    for each in cls.__subclasses__():
        yield from with_subclasses(each)


@pytest.fixture
def _forked_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the Python programs that our code starts be forked: see forked.py."""
    monkeypatch.setattr(subprocess, "Popen", forked.Starting)


def longest(item: pytest.Item) -> tuple[bool, float]:
    """What a test says of its time itself: whether it is slow, and the seconds it may take."""
    marker = item.get_closest_marker("timeout")
    return item.get_closest_marker("slow") is not None, float(marker.args[0]) if marker else 0.0


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected stays: to look for garbage among it is a quarter of the time that it takes."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What may take longest goes first, lest it be left over for one process; accelerators are not always there."""
    items.sort(key=longest, reverse=True)
    for item in items:  # a slow one may take three times as long: a machine may be half as quick, and busy
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(360))
    if not torch.accelerator.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an accelerator"))
