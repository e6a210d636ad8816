"""Handlers of signals, for :class:`zoo.callbacks.PreemptionGuard`, and what may be done within them."""

import os
import select
import signal
import weakref
from contextlib import suppress
from types import FrameType
from typing import Any


class Handler:
    """A signal's handler, from the beginning of a run until Lightning's teardown, or until long after it has left."""

    def __init__(self, guard: Any, trainer: Any, usual: Any) -> None:
        self.guard, self.usual = guard, usual  # a PreemptionGuard, and the handler that was there before
        self.trainer = weakref.ref(trainer)  # a notebook may live long, and wants its memory back
        self.process = os.getpid()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a loader's worker, forked with this handler
            return
        trainer = self.trainer()
        if trainer is None or self.guard.take_note(trainer, number):
            signal.signal(number, self.usual)
            os.kill(os.getpid(), number)


def say(line: str) -> None:
    """Writes a line from within a signal's handler, where the buffers of sys.stderr may be in use."""
    with suppress(OSError):
        os.write(2, f"\n{line}\n".encode())


def let_go_of_terminal() -> None:
    """Leads what is printed into nothing where its reader is gone: an error in a progress bar would end the run."""
    for descriptor in (1, 2):
        watched = select.poll()
        watched.register(descriptor, select.POLLOUT)
        if any(event & select.POLLERR for _, event in watched.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
