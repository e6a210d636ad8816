"""Ends a run that is to make way, or is interrupted: saved, on all ranks, with the exit status of the signal."""

import math
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zoo._lightning import Callback, rank_zero_info, rank_zero_warn
from zoo.callbacks.run_directory import run_directory
from zoo.callbacks.signals import Handler, let_go_of_terminal, say
from zoo.checkpoints import free_path

STATUS = 128 + signal.SIGTERM
IMMUNE = 60  # seconds in which a process that has said it ends takes no further signal
TOGETHER = 1  # second in which several SIGINT are one: terminals, torchrun and launchers each send theirs
RARELY = 100  # steps between agreements, at most: steps may become slower


class Preempted(SystemExit):
    """A signal has ended the run. Where nobody catches it, the program ends with its ``code``.

    Attributes:
        path: The checkpoint, if one was saved.
    """

    def __init__(self, code: int = STATUS, path: str | None = None) -> None:
        super().__init__(code)
        self.path = path


class PreemptionGuard(Callback):
    """Saves a fit that gets SIGTERM, SIGUSR1, SIGHUP or SIGINT (Ctrl-C), and ends the program.

    Signals may come to any process of the run, or to all. Their handlers, which take the place of Lightning's, only
    take note. After optimizer steps and between validation batches the ranks agree, about once a second, in one
    reduction; a single process looks at its note each time. When there is one, all save a checkpoint together and raise
    :class:`Preempted`. Further signals change nothing, but a second Ctrl-C, a second or more after the first, does what
    it would do without this callback: it ends the run at once. A signal that comes with the last step of a fit is kept
    for what the program does next with a Trainer; Ctrl-C ends the fit even then. In ``validate``, ``test`` and
    ``predict`` there is nothing to save, and :class:`Preempted` is raised at once.

    The exit status is 143 for SIGTERM and SIGUSR1, 129 for SIGHUP and 130 for SIGINT. A signal that is ignored when the
    run begins (SIGHUP under nohup, SIGINT in the background of a script) stays ignored. Signals before that, and, about
    a second after a Ctrl-C has ended a run, those behind it, have their usual effect: a notebook's kernel lives on.

    With Lightning's own launcher (``Trainer(devices=2)`` in a plain program), that is the status of the process one has
    started, and 0 that of those it has started. torchrun's own status is 1, whatever its processes end with.

    In a SLURM job, the signal for requeueing (SIGUSR1, or ``requeue_signal`` of the Trainer's SLURMEnvironment) also
    requeues the job, and the checkpoint lies where Lightning looks for it when the job is started anew:
    ``hpc_ckpt_1.ckpt`` (2, 3, ...) in ``default_root_dir``. SIGTERM does not: it may be scancel's, and where SLURM
    preempts it requeues by itself.

    It stands after the callbacks that change weights and before those that save.

    Args:
        every_n_steps: Optimizer steps (in a validation: batches) between agreements of several processes. None: about a
            second's worth, at most 100.
        requeue: Whether the signal for requeueing requeues. None: as the Trainer's SLURMEnvironment says
            (``auto_requeue``, on by default); True: in any SLURM job, for example under torchrun.
        filename: Name of the checkpoint, without ``.ckpt``. It lies beside those of ModelCheckpoint, or else in
            ``checkpoints`` in the run's directory.
    """

    def __init__(
        self, every_n_steps: int | None = None, requeue: bool | None = None, filename: str = "preempted"
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}: expected at least 1")
        if not filename:
            raise ValueError("filename is empty: expected the name of a checkpoint, without .ckpt")
        self.every_n_steps, self.requeue, self.filename = every_n_steps, requeue, filename
        self.received = 0
        """The signal that was received, by this rank or by the one that all agreed on; 0: none."""
        self._interrupted: float | None = None
        self._left: float | None = None
        self._signals: list[int] = []
        self._requeue_signal = 0
        self._auto_requeue = False
        self._parent: int | None = None
        self._step = 0
        self._every, self._count, self._since = 1, 0, 0.0
        self._common: list[float] = []

    # Signals.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        for number in signal.valid_signals() if threading.current_thread() is threading.main_thread() else ():
            handler = signal.getsignal(number)
            if isinstance(handler, Handler) and handler.guard._left is not None:  # of a run that is long over
                signal.signal(number, handler.usual)
        late = self.received == signal.SIGINT and stage == "fit"  # an interrupted fit is not about the next one
        if self._left is not None or late:  # somebody has caught what was raised, and goes on
            self.received, self._left = 0, None
        self._interrupted = None
        environment = trainer._accelerator_connector.cluster_environment
        self._auto_requeue = getattr(environment, "auto_requeue", False)
        default = getattr(signal, "SIGUSR1", signal.SIGTERM)  # Windows knows SIGTERM and SIGINT only
        self._requeue_signal = int(getattr(environment, "requeue_signal", None) or default)
        # If ranks got different ones, the last of them counts: SIGTERM may be somebody who wants no new start, and
        # SIGINT is somebody who is there.
        hangup = getattr(signal, "SIGHUP", signal.SIGTERM)
        order = [self._requeue_signal, default, signal.SIGTERM, hangup, signal.SIGINT]
        self._signals = list(dict.fromkeys(map(int, order)))
        # Lightning's launcher ends the main process with SIGKILL when one of those that it has started fails.
        launched = type(environment).__name__ == "LightningEnvironment" and multiprocessing.parent_process() is None
        launched = launched and trainer.local_rank > 0
        self._parent = os.getppid() if launched else None
        # Called when everything is set up. There is no hook between it and the loops, which start the workers.
        trainer._signal_connector.register_signal_handlers = lambda: self._register(trainer)
        if self.received and stage != "fit":
            raise self._leave(trainer)

    def _register(self, trainer: Any) -> None:
        connector = trainer._signal_connector
        ignored = [number for number in self._signals if signal.getsignal(number) == signal.SIG_IGN]
        type(connector).register_signal_handlers(connector)  # it also remembers what its teardown puts back
        for number in self._signals if threading.current_thread() is threading.main_thread() else ():
            usual = connector._original_handlers.get(number)
            handler = Handler(self, trainer, signal.SIG_DFL if usual is None else usual)
            signal.signal(number, signal.SIG_IGN if number in ignored else handler)

    def take_note(self, trainer: Any, number: int) -> bool:
        """Deals with a signal while a run lasts or has just left; True if its usual effect is to follow."""
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted is not None and now - self._interrupted > TOGETHER:
                return True
            self._interrupted = self._interrupted or now
        elif number == getattr(signal, "SIGHUP", None):
            let_go_of_terminal()
        if self._left is not None:
            return now - self._left > (TOGETHER if self.received == signal.SIGINT else IMMUNE)
        if self.received:
            return False
        self.received = number
        if trainer.state.fn != "fit":
            self._pass_on(trainer)
            raise self._leave(trainer)
        if number == signal.SIGINT and trainer.is_global_zero:
            saved = "" if trainer.fast_dev_run else ", with a checkpoint to continue from"
            say(f"ending after this step{saved}; Ctrl-C again ends at once")
        return False

    def _pass_on(self, trainer: Any) -> None:
        """Tells the processes that the launcher would have told: outside of a fit nobody agrees on anything."""
        if self._parent is not None and self._parent == os.getppid():
            os.kill(self._parent, self.received)
        elif trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(self.received)

    def _leave(self, trainer: Any, path: str | None = None) -> Preempted:
        """The exception to raise. Until the process has ended, or for a while, signals change nothing any more."""
        self._left = time.monotonic()
        for number in self._signals:
            trainer._signal_connector._original_handlers.pop(number, None)
        named = signal.SIGINT, getattr(signal, "SIGHUP", None)
        status = 128 + self.received if self.received in named else STATUS
        return Preempted(status if self._parent is None else 0, path)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self.received == signal.SIGINT and self._left is None:  # it has ended by something else
            self.received = 0
        if not isinstance(exception, KeyboardInterrupt):
            return
        # Lightning ignores SIGINT from here on, and takes that back only where training has begun.
        handlers = trainer._signal_connector._original_handlers
        handlers.setdefault(signal.SIGINT, signal.default_int_handler)
        forked = [one for one in getattr(trainer.strategy.launcher, "procs", []) if hasattr(one, "exitcode")]
        if forked:  # this process has only started those that train: it lets them save, and ends as they do
            trainer.strategy.launcher.kill(signal.SIGINT)
            for one in forked:
                one.join()
            if all(one.exitcode == 128 + signal.SIGINT for one in forked):
                signal.signal(signal.SIGINT, handlers[signal.SIGINT])
                raise Preempted(128 + signal.SIGINT)

    # Agreement.

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # Its own way of agreeing, a broadcast and a wait for the device in each step, is not needed any more.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._step = trainer.global_step

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self._step:  # gradients are still accumulating: a checkpoint would lose them
            return
        self._step = step
        self._agree(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn != "fit":
            return
        self._begin()
        if trainer.world_size > 1:
            # Loaders may give ranks different numbers of batches: agree only at those that all have.
            batches = [n if math.isfinite(n) else 0 for n in trainer.num_val_batches]
            counts = torch.tensor(batches, dtype=torch.float32, device=trainer.strategy.root_device)
            self._common = trainer.strategy.reduce(counts, reduce_op="min").tolist()

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.state.fn != "fit":
            self._look(trainer)
        elif trainer.world_size == 1 or batch_idx < self._common[dataloader_idx]:
            self._agree(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._begin()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Lets all ranks know of a signal that came too late: for what the program does next. SIGINT is for now."""
        if trainer.world_size > 1:
            self._reduce(trainer, 0.0)
        if self.received == signal.SIGINT:
            self._stop(trainer)

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._look(trainer)

    on_predict_batch_end = on_test_batch_end

    def _look(self, trainer: Any) -> None:
        """Raises what the handler raises: that does not get through where Python is in the middle of a destructor."""
        if self.received:
            raise self._leave(trainer)

    def _begin(self) -> None:
        """Starts counting steps and their time anew."""
        self._every, self._count, self._since = self.every_n_steps or 1, 0, time.monotonic()

    def _agree(self, trainer: Any) -> None:
        agreed = self.received
        if trainer.world_size > 1:
            self._count += 1
            if self._count < self._every:
                return
            agreed, seconds = self._reduce(trainer, (time.monotonic() - self._since) / self._count)
            if self.every_n_steps is None:  # the same number on all ranks, since it comes out of the reduction
                self._every = max(1, min(2 * self._every, RARELY, int(1 / max(seconds, 1e-3))))
            self._count, self._since = 0, time.monotonic()
        if agreed:
            self._stop(trainer)

    def _reduce(self, trainer: Any, seconds: float) -> tuple[int, float]:
        """Reduces over ranks: whether one got a signal, which all have then received, and the longest time."""
        place = self._signals.index(self.received) + 1 if self.received else 0
        values = torch.tensor([place, seconds], dtype=torch.float32, device=trainer.strategy.root_device)
        agreed, longest = trainer.strategy.reduce(values, reduce_op="max").tolist()
        # A signal that comes in the meantime is this rank's alone: it waits for the next time.
        if agreed:
            self.received = self._signals[int(agreed) - 1]
        return int(agreed), longest

    # The end.

    def _stop(self, trainer: Any) -> None:
        requeue = self._auto_requeue if self.requeue is None else self.requeue
        requeue = requeue and self.received == self._requeue_signal and "SLURM_JOB_ID" in os.environ
        drawn = "\n" if trainer.progress_bar_callback is not None and os.isatty(2) else ""  # the bar ends no line
        cause, path = f"{drawn}preempted by {signal.Signals(self.received).name} at step {trainer.global_step}", None
        if trainer.fast_dev_run or trainer.sanity_checking:
            rank_zero_info(f"{cause}: there is nothing to save")
        else:
            path = self._path(trainer, requeue)
            trainer.save_checkpoint(path, weights_only=False)  # a whole one; unset, Lightning says so in alarming words
            how = "the requeued job continues with it" if requeue else f"continue with --ckpt_path {path}"
            rank_zero_info(f"{cause}: the checkpoint is {path}; {how}")
        if requeue and trainer.is_global_zero:
            _requeue()
        trainer.strategy.barrier("PreemptionGuard")
        raise self._leave(trainer, path)

    def _path(self, trainer: Any, requeue: bool) -> str:
        if requeue:
            path = trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir)
            return trainer.strategy.broadcast(path)  # the number in it depends on what is there
        folder = getattr(trainer.checkpoint_callback, "dirpath", None)
        if folder is None:
            folder = run_directory(trainer) / "checkpoints"  # all ranks have to ask
        free = free_path(folder, self.filename, partial(_is_continued, trainer)) if trainer.is_global_zero else None
        return str(trainer.strategy.broadcast(free))


def _is_continued(trainer: Any, path: Path) -> bool:
    """Tells whether a checkpoint is the one that this run continues, which its own may replace."""
    return trainer.ckpt_path is not None and Path(trainer.ckpt_path).exists() and path.samefile(trainer.ckpt_path)


def _requeue() -> None:
    """Asks SLURM to start this job anew."""
    array, job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ["SLURM_JOB_ID"]
    if array is not None:
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        rank_zero_warn(f"the job was not requeued, do it with `scontrol requeue {job}`: {error}")
    else:
        rank_zero_info(f"requeued SLURM job {job}")
