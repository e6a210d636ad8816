"""Ends all processes of a run when one of them fails."""

import atexit
import contextlib
import itertools
import os
import threading
import time
import traceback
import weakref
from typing import Any

from torch import distributed as dist

from zoo._lightning import Callback

_runs = itertools.count(1)  # of this process, whatever their Trainers: each has keys of its own in the store


class FailTogether(Callback):
    """Takes the other ranks down, within seconds, when one fails, whatever they are waiting for.

    Without it they may wait in their next collective operation until its timeout, half an hour by default, and the one
    that failed may wait as well, in a callback that saves on its way out. A thread in each process asks the process
    group's store about once a second. Where a rank has failed, and others have not within a few seconds, each of them
    writes the reason to stderr and ends, as the first to fail would have: with status 1, or that of its SystemExit. The
    same if the store is gone, and with it the process that keeps it (rank 0).

    It does nothing when all ranks fail together, nor with a single process. A rank that is killed, or hangs, has not
    failed in this sense: what has started it (torchrun, SLURM, Lightning's launcher) looks after the first, and the
    timeouts of the process group and the loader after the second.

    It stands before callbacks that save when there is an exception.

    Args:
        grace: Seconds in which the others may fail by themselves.
    """

    every = 1.0
    last = 30.0
    """Seconds that rank 0 waits for the others at the end of a run, and a failed rank for its own end without it."""

    def __init__(self, grace: float = 5.0) -> None:
        if grace < 0:
            raise ValueError(f"grace is {grace}: expected at least 0")
        self.grace = grace
        self._watch: _Watch | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        run = next(_runs)
        if trainer.world_size > 1 and dist.is_available() and dist.is_initialized():
            self._watch = _Watch(self, trainer.global_rank, trainer.world_size, run)
            self._watch.start()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self._watch is not None:
            self._watch.fail(exception)
        self._watch = None  # of this run; the thread lasts until all know

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self._watch is not None:
            self._watch.end()
        self._watch = None


class _Watch(threading.Thread):
    """The thread of one rank, in one run of a Trainer."""

    def __init__(self, times: FailTogether, rank: int, world_size: int, run: int) -> None:
        super().__init__(daemon=True, name="fail-together")
        self.times, self.rank, self.world_size = times, rank, world_size
        # A connection of its own: that of the process group is held while somebody waits for a key.
        store = dist.distributed_c10d._get_default_store().clone()
        self.store = dist.PrefixStore(f"fail_together/{run}", store)
        self.ending = threading.Event()
        self.patient = rank == 0
        """Whether to wait for the others before this thread ends."""
        self.traceback = ""
        _watches.add(self)

    def fail(self, exception: BaseException) -> None:
        """Tells the others that this rank has failed."""
        if self.traceback:  # an exception while another one is dealt with
            return
        self.traceback = "".join(traceback.format_exception(exception))
        code = exception.code if isinstance(exception, SystemExit) else 1
        status = code if isinstance(code, int) and code else 1
        line = traceback.format_exception_only(exception)[-1].strip()
        with contextlib.suppress(dist.DistError):  # the thread will notice as well
            if self.store.add("first", 1) == 1:
                self.store.set("why", f"{status} rank {self.rank} failed: {line}")
            self.store.add("failed", 1)
            # The store may end with rank 0 within this second: not before the others have read why.
            deadline = time.monotonic() + 3 * self.times.every
            while self.rank == 0 and self.store.add("heard", 0) < self.world_size and time.monotonic() < deadline:
                time.sleep(0.02)

    def end(self) -> None:
        """Tells the others that this rank has ended well. Rank 0 waits for them, since the store may end with it."""
        with contextlib.suppress(dist.DistError):
            self.store.add("ended", 1)
        self.ending.set()
        if self.patient:
            self.join(self.times.last)

    def stop(self) -> None:
        self.patient = False
        self.ending.set()
        self.join(self.times.grace)

    def run(self) -> None:
        noticed: float | None = None
        status, why = "1", "rank 0 is gone"
        while True:
            if self.ending.wait(self.times.every):
                if not self.patient:
                    return
                time.sleep(0.01)
            try:
                failed, ended = self.store.add("failed", 0), self.store.add("ended", 0)
                if failed and noticed is None:
                    status, why = self.store.get("why").decode().split(" ", 1)
                    self.store.add("heard", 1)
            except dist.DistError:
                failed, ended = None, 0
            if failed == self.world_size or ended == self.world_size:
                return
            if failed == 0:
                continue
            if noticed is None:
                # Without the store, a rank that has failed cannot know whether the others have: it may still be saving.
                patience = self.times.last if failed is None and self.traceback else self.times.grace
                noticed = time.monotonic()
            if time.monotonic() - noticed >= patience:
                # Neither sys.stderr nor sys.exit: another thread may hold the lock of the one; the other ends a thread.
                os.write(2, f"{self.traceback}rank {self.rank} ends because {why}\n".encode())
                os._exit(int(status))


_watches: weakref.WeakSet[_Watch] = weakref.WeakSet()


@atexit.register
def _stop() -> None:
    """Stops the watches: a thread that comes back from C++ while the interpreter is taken down would abort the process.

    Registered early, this runs late: while the process group is taken down, the threads still watch.
    """
    for watch in list(_watches):
        watch.stop()
