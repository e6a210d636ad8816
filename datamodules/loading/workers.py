"""Loader workers that outlive a preemption's signals until their run has been saved."""

import atexit
import multiprocessing
import os
import signal
import threading
import time
from typing import Any

from torch.utils.data import DataLoader

TERMINAL = [getattr(signal, name) for name in ("SIGINT", "SIGHUP") if hasattr(signal, name)]
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)] + TERMINAL


def default_workers(processes: int = 1) -> int:
    """Number of workers for one process: its share of the cores this program may use, at most 8, one left free."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(8, cores // max(1, processes) - 1))


class Loader(DataLoader[Any]):
    """A DataLoader whose workers are given their first signals only when they can deal with them.

    Between its start and :func:`outlive_signals` a worker would still die of one.
    """

    def __iter__(self) -> Any:
        if not hasattr(signal, "pthread_sigmask"):
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # which workers inherit
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outlive_signals(worker_id: int) -> None:
    """Lets a loader's worker live on when its whole process group or control group gets SIGTERM, SIGINT and so on.

    A terminal sends SIGINT to the group for Ctrl-C, and SIGHUP when it is closed. Otherwise workers die of it at once,
    and the main process meets "DataLoader worker is killed by signal" in the middle of a step, before it can save. What
    the main process sends still ends a worker at once, and a worker ends within two seconds of the main process. A
    ``worker_init_fn`` for any DataLoader, best for a :class:`Loader`::

        Loader(dataset, num_workers=4, worker_init_fn=outlive_signals)

    Under the start methods "spawn" and "forkserver", a worker may have threads before this is called (those of NumPy's
    OpenBLAS). It then gets a process group of its own: a signal to the group does not reach it, one to the control
    group does. Where the system cannot tell who sent a signal (macOS, Windows), a worker outlives a terminal's only.

    Args:
        worker_id: Not used.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    knows = hasattr(signal, "sigtimedwait")
    alone = knows and len(os.listdir("/proc/self/task")) == 1
    for number in TERMINAL if not alone else ():
        signal.signal(number, signal.SIG_IGN)  # no parent sends them
    if not knows:
        return
    if alone:
        # Threads to come inherit the mask; those that are there would take the signals instead of the one below.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    else:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # as they may have come
        os.setpgid(0, 0)
    threading.Thread(target=_watch, args=(parent, SIGNALS if alone else []), daemon=True).start()


def _watch(parent: Any, signals: list[int]) -> None:
    """Ends this process when its parent says so or is gone, whatever the other threads are doing."""
    started_by = os.getppid()  # under "forkserver" not the parent, but it ends with it
    # is_alive alone knows of a parent that was gone before. Under "fork" it may not: siblings share what it looks at.
    while os.getppid() == started_by and parent.is_alive():
        received = signal.sigtimedwait(signals, 1.0)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)


def _end_workers(seconds: float = 5.0) -> None:
    """Ends workers that multiprocessing would wait for without end: such as hang and keep the interpreter's lock."""
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    for process in workers:
        process.terminate()
    deadline = time.monotonic() + seconds
    for process in workers:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()


atexit.register(_end_workers)
