"""Notice at a terminal, while nothing else can be told: the import of torch and Lightning takes seconds."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

LOADING = "loading torch and Lightning ..."


def speaks() -> bool:
    """True in the first of a run's processes, by what torchrun, SLURM or Lightning's launcher tells it."""
    return {os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID")} == {"0"}


@contextmanager
def loading() -> Iterator[None]:
    """Shows on a terminal that something happens, until it has, and then leaves the line as it was."""
    shown = LOADING if sys.stderr.isatty() and speaks() else ""
    sys.stderr.write(shown)
    sys.stderr.flush()
    try:
        yield
    finally:
        sys.stderr.write(f"\r{' ' * len(shown)}\r" if shown else "")
        sys.stderr.flush()
