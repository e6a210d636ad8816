"""What benchmarks/faults.py does things to: a small run, stock or with the guards, in processes of its own."""

import os
import pickle
import signal
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric, SumMetric

from datamodules.base import ImageDataModule
from zoo.checkpoints import SafeLoading
from zoo.guards import guard

SIZE = 40  # training samples: five batches of 8
Seen = list[tuple[int, list[int]]]
"""Epoch and samples of each batch."""


class Settings(NamedTuple):
    """guards: whether a run has them; repeats: how often a fault by chance is tried; timeout: of collectives, in s."""

    guards: bool
    repeats: int
    timeout: float


# What trains.


class Samples(Dataset[tuple[Tensor, int]]):
    """Values with noise, drawn anew each time, and the sample's number, with which ``trouble`` is called first."""

    def __init__(self, size: int, trouble: Callable[[int], None] | None = None) -> None:
        self.size, self.trouble = size, trouble

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.trouble is not None:
            self.trouble(index)
        return index / SIZE + 0.1 * torch.randn(16), index


class Data(ImageDataModule):
    """The same samples by one of our data modules."""

    def __init__(self, training: Samples, others: Samples, batch_size: int, workers: int) -> None:
        super().__init__(batch_size=batch_size, num_workers=workers)
        self.training, self.others = training, others

    def samples(self, split: str) -> Any:
        return self.training if split == "train" else self.others


class Net(pl.LightningModule):
    """A small network with dropout; its validation draws at random. ``trouble`` is called before each step."""

    def __init__(self, trouble: Callable[["Net"], None] | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, 1))
        self.trouble, self.factor = trouble, 1.0
        self.seen: Seen = []
        self.mean, self.count = MeanMetric(), SumMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        values, indices = batch
        self.seen.append((self.current_epoch, indices.tolist()))
        if self.trouble is not None:
            self.trouble(self)
        return self.factor * self.net(values).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        torch.rand(1)
        self.mean.update(batch[1].float())
        self.count.update(torch.ones(len(batch[1])))
        self.log_dict({"mean": self.mean, "count": self.count})

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class SafeNet(SafeLoading, Net):
    """The same, with our way to load a checkpoint."""


def saving(**options: Any) -> ModelCheckpoint:
    """Lightning's callback, set up with care."""
    return ModelCheckpoint("checkpoints", "{step}", save_on_exception=True, save_last=True, **options)


def trainer_of(settings: Settings, *callbacks: Any, **options: Any) -> Any:
    """A Trainer for the processes that :func:`run` has started."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        options["strategy"] = DDPStrategy(timeout=timedelta(seconds=settings.timeout))
    options = {"max_epochs": 3, "num_sanity_val_steps": 0, "logger": False} | options
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", devices=world_size, callbacks=list(callbacks), **quiet, **options)
    return guard(trainer) if settings.guards else trainer


def data_of(
    settings: Settings,
    batch_size: int = 8,
    workers: int = 0,
    trouble: Callable[[int], None] | None = None,
    validation: int = 16,
    loader_timeout: float = 300.0,
) -> dict[str, Any]:
    """What ``Trainer.fit`` takes of data: torch's loaders, or our data module."""
    training, others = Samples(SIZE, trouble), Samples(validation)
    if settings.guards:
        data: Any = Data(training, others, batch_size, workers)
        data.loader_timeout = loader_timeout
        return {"datamodule": data}
    loader = DataLoader(training, batch_size, shuffle=True, num_workers=workers)
    return {"train_dataloaders": loader, "val_dataloaders": DataLoader(others, batch_size)}


def fit(
    settings: Settings,
    *callbacks: Any,
    trouble: Callable[[Net], None] | None = None,
    ckpt_path: str | Path | None = None,
    data: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Trains from the same seed, and returns the Trainer."""
    pl.seed_everything(1, verbose=False)
    trainer = trainer_of(settings, *callbacks, **options)
    trainer.fit(Net(trouble), ckpt_path=ckpt_path, **(data or data_of(settings)))
    return trainer


# Processes.


class Ended(NamedTuple):
    """A process that has ended.

    Attributes:
        status: As the shell has it; negative: the signal that ended it; None: it had to be killed.
        seconds: Since the file ``fault`` was touched last.
        result: What its task returned.
        error: The line of the exception it raised, or the last one it wrote.
    """

    status: int | None
    seconds: float
    result: Any = None
    error: str = ""


def run(
    task: Callable[[], Any],
    processes: int = 1,
    during: Callable[[list[int]], None] | None = None,
    deadline: float = 120.0,
) -> list[Ended]:
    """Runs a task in forked processes, a process group of their own, and says how each has ended.

    Args:
        task: What each does. What it prints goes to ``rank0.log``.
        processes: How many; several have torchrun's environment variables.
        during: Called with the process ids meanwhile.
        deadline: Seconds after which what still runs is killed, once ``during`` has returned.
    """
    Path("fault").touch()
    port, pids = _free_port(), list[int]()
    for rank in range(processes):
        for name in (f"rank{rank}.said", f"rank{rank}.log"):
            Path(name).unlink(missing_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads of this process do not matter to the child
            pid = os.fork()
        if pid == 0:
            try:
                os.setpgid(0, pids[0] if pids else 0)
                _child(task, rank, processes, port)
            finally:
                os._exit(70)
        with suppress(OSError):  # it may have ended already
            os.setpgid(pid, pids[0] if pids else pid)
        pids.append(pid)
    if during is not None:
        during(pids)
    last = time.time() + deadline
    ends: dict[int, tuple[int | None, float]] = {}
    while len(ends) < processes:
        for pid in [pid for pid in pids if pid not in ends]:
            done, code = os.waitpid(pid, os.WNOHANG)
            if done:
                ends[pid] = os.waitstatus_to_exitcode(code), time.time()
            elif time.time() > last:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                ends[pid] = None, time.time()
        time.sleep(0.01)
    with suppress(ProcessLookupError):
        os.killpg(pids[0], signal.SIGKILL)  # workers that are left
    start, ended = Path("fault").stat().st_mtime, []
    for rank, pid in enumerate(pids):
        said, log = Path(f"rank{rank}.said"), Path(f"rank{rank}.log")
        if said.exists():
            result, error = pickle.loads(said.read_bytes())
        else:  # it ended on the spot, with its reason as the last line
            result, error = None, (["", *log.read_text().split("\n")[:-1]] if log.exists() else [""])[-1]
        ended.append(Ended(ends[pid][0], ends[pid][1] - start, result, error))
    return ended


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _child(task: Callable[[], Any], rank: int, processes: int, port: int) -> None:
    result, error, status = None, "", 0
    if processes > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": processes}
        names |= {"LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in names.items()} | {"TORCHELASTIC_RUN_ID": "faults"}
    with Path(f"rank{rank}.log").open("a", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            result = task()
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException as raised:
            lines = "".join(traceback.format_exception_only(raised)).strip().splitlines()
            error, status = next(line for line in lines if line), 1
            traceback.print_exc()
        Path(f"rank{rank}.said").write_bytes(pickle.dumps((result, error)))
        os._exit(status)


def wait_for(*names: str, seconds: float = 120.0) -> None:
    """Waits until the files are there.

    Raises:
        TimeoutError: If they are not.
    """
    last = time.monotonic() + seconds
    while not all(Path(name).exists() for name in names):
        if time.monotonic() > last:
            raise TimeoutError(f"no {' and '.join(names)} after {seconds} s")
        time.sleep(0.01)
