"""Signals and failing ranks: what a run saves, how it ends, and what is left of it."""

import json
import multiprocessing
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.multiprocessing import ProcessExitedException
from torch.utils.data import DataLoader

from datamodules.loading.workers import Loader, outlive_signals
from zoo.callbacks import ExactResume, preemption
from zoo.callbacks.fail_together import FailTogether
from zoo.callbacks.preemption import Preempted, PreemptionGuard

ROOT = Path(__file__).resolve().parents[1]
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(autouse=True)
def _hangup() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, handler)


class Net(LightningModule):
    """Sends a signal to its own process where it is told to: {"train": batch} and so on."""

    def __init__(self, rank: int = 0, number: int = signal.SIGTERM, **places: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.rank, self.number, self.places = rank, number, places
        self.seen = []

    def _step(self, stage, batch, batch_idx):
        self.seen.append((stage, batch_idx))
        if self.places.get(stage) == batch_idx and self.global_rank == self.rank:
            os.kill(os.getpid(), self.number)
            self.seen.append((stage, "after"))
        return self.layer(batch).mean()

    def training_step(self, batch, batch_idx):
        return self._step("train", batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self._step("validate", batch, batch_idx)

    def test_step(self, batch, batch_idx):
        self._step("test", batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        return self._step("predict", batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader(batches: int = 12) -> DataLoader:
    return DataLoader(torch.randn(2 * batches, 4), batch_size=2)


def trainer(*callbacks: Callback, **options) -> Trainer:
    options = {"max_epochs": 1, "enable_checkpointing": False, "num_sanity_val_steps": 0} | options
    return Trainer(callbacks=list(callbacks), **QUIET | options)


# One process.

STATUS = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGHUP: 129, signal.SIGINT: 130}


@pytest.mark.parametrize("number", STATUS)
def test_a_signal_ends_a_fit_after_the_optimizer_step_saved_and_with_its_status(number):
    run = trainer(PreemptionGuard(), accumulate_grad_batches=4)
    net = Net(train=5, number=number)
    with pytest.raises(Preempted) as ended:
        run.fit(net, loader())
    assert ended.value.code == STATUS[number]
    assert net.seen[-1] == ("train", 7)  # batches 5 to 7 belong to the second step
    assert ended.value.path == str(Path("checkpoints", "preempted.ckpt").resolve())
    saved = torch.load(ended.value.path, weights_only=True)
    assert saved["global_step"] == 2
    again, net = trainer(PreemptionGuard(), accumulate_grad_batches=4), Net()
    again.fit(net, loader(), ckpt_path=ended.value.path, weights_only=True)
    assert again.global_step == 3


def test_the_checkpoint_lies_beside_those_of_model_checkpoint_and_says_how_to_go_on(tmp_path, caplog):
    run = trainer(PreemptionGuard(filename="stopped"), ModelCheckpoint("kept"), enable_checkpointing=True)
    with caplog.at_level("INFO"), pytest.raises(Preempted) as ended:
        run.fit(Net(train=3), loader())
    assert ended.value.path == str(tmp_path / "kept" / "stopped.ckpt")
    line = f"preempted by SIGTERM at step 4: the checkpoint is {ended.value.path}; continue with --ckpt_path"
    assert line in caplog.text


class Again(Callback):
    """Sends another signal while the first one's checkpoint is made, and while its exception is on the way."""

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        os.kill(os.getpid(), signal.SIGTERM)

    def on_exception(self, trainer, pl_module, exception):
        os.kill(os.getpid(), signal.SIGTERM)


def test_further_signals_change_nothing_until_the_process_has_ended():
    with pytest.raises(Preempted) as ended:
        trainer(PreemptionGuard(), Again()).fit(Net(train=3), loader())
    os.kill(os.getpid(), signal.SIGTERM)  # Lightning has put everything back
    assert torch.load(ended.value.path, weights_only=True)["global_step"] == 4


def test_after_a_fit_that_ended_well_the_handlers_are_those_from_before():
    signal.signal(signal.SIGUSR1, handler := lambda *_: None)
    trainer(PreemptionGuard()).fit(Net(), loader(1))
    assert signal.getsignal(signal.SIGUSR1) is handler
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("number", STATUS)
def test_a_signal_that_is_ignored_stays_ignored(number):
    signal.signal(number, signal.SIG_IGN)
    run = trainer(PreemptionGuard())
    run.fit(Net(train=3, number=number), loader())
    assert run.global_step == 12
    run.test(Net(test=1, number=number), loader(2), verbose=False)
    assert signal.getsignal(number) == signal.SIG_IGN


class Noisy(Net):
    """Depends on a random number in each step."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch + torch.rand(1), batch_idx)


def test_a_run_that_was_interrupted_is_continued_exactly():
    def run(checkpoint=None, **places) -> Net:
        torch.manual_seed(7)
        module = Noisy(number=signal.SIGINT, **places)
        guards = ExactResume(), PreemptionGuard()
        trainer(*guards).fit(module, DataLoader(torch.ones(24, 4), 2), ckpt_path=checkpoint, weights_only=True)
        return module

    whole = run()
    with pytest.raises(Preempted) as ended:
        run(train=5)
    rest = run(ended.value.path)
    assert rest.seen == [("train", batch) for batch in range(6, 12)]
    assert all(map(torch.equal, whole.parameters(), rest.parameters()))


# Ctrl-C.

SAYS = "Ctrl-C again ends at once"


class Impatient(Net):
    """Presses Ctrl-C twice in the fourth step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 3 and self.places:
            os.kill(os.getpid(), signal.SIGINT)
            self.seen.append("went on")
        return loss


def test_several_interrupts_at_a_time_are_one_and_it_says_at_once_what_it_does(capfd):
    with pytest.raises(Preempted) as ended:
        trainer(PreemptionGuard()).fit(net := Impatient(number=signal.SIGINT, train=3), loader())
    assert torch.load(ended.value.path, weights_only=True)["global_step"] == 4
    assert net.seen[-1] == "went on"
    assert capfd.readouterr().err.count(SAYS) == 1


def test_a_second_interrupt_ends_at_once_and_leaves_nothing_for_what_comes_next(monkeypatch, capfd):
    monkeypatch.setattr(preemption, "TOGETHER", 0)
    run = trainer(PreemptionGuard(), ModelCheckpoint("kept"), enable_checkpointing=True)
    with pytest.raises(SystemExit) as ended:
        run.fit(net := Impatient(number=signal.SIGINT, train=3), loader())
    assert (type(ended.value), ended.value.code) == (SystemExit, 1)  # Lightning's
    assert net.seen[-1] == ("train", "after")
    assert not list(Path.cwd().rglob("*.ckpt"))
    assert SAYS in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run.validate(Net(), loader(2), verbose=False)
    run.fit(net := Net(), loader())
    assert net.seen[-1] == ("train", 11)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)  # it comes with one of the next instructions


@pytest.mark.parametrize("own", [True, False])
def test_after_an_interrupted_fit_an_interrupt_has_its_usual_effect(monkeypatch, own):
    heard = []
    if own:
        signal.signal(signal.SIGINT, handler := lambda number, frame: heard.append(number))
    usual = signal.getsignal(signal.SIGINT)
    with pytest.raises(Preempted):
        trainer(PreemptionGuard()).fit(Net(train=3, number=signal.SIGINT), loader())
    os.kill(os.getpid(), signal.SIGINT)  # torchrun's, behind the terminal's
    monkeypatch.setattr(preemption, "TOGETHER", 0)
    if own:
        os.kill(os.getpid(), signal.SIGINT)
        assert heard == [signal.SIGINT]
        assert usual is handler
    else:
        with pytest.raises(KeyboardInterrupt):
            press()
    assert signal.getsignal(signal.SIGINT) is usual
    with pytest.raises(Preempted):  # another fit listens again
        trainer(PreemptionGuard()).fit(Net(train=3, number=signal.SIGINT), loader())


def test_an_interrupt_before_training_does_not_make_later_ones_unheard():
    """Lightning ignores SIGINT while it cleans up, and takes that back only once it has set its own handlers."""

    class Interrupted(Net):
        def setup(self, stage):
            press()

    with pytest.raises(SystemExit) as ended:
        trainer(PreemptionGuard()).fit(Interrupted(), loader())
    assert ended.value.code == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_outside_of_the_main_thread_no_handler_is_set():
    numbers = [*STATUS, signal.SIGUSR2]
    handlers, seen = [signal.getsignal(number) for number in numbers], []

    class Looks(Net):
        def training_step(self, batch, batch_idx):
            seen.append([signal.getsignal(number) for number in numbers])
            return super().training_step(batch, batch_idx)

    thread = threading.Thread(target=lambda: trainer(PreemptionGuard()).fit(Looks(), loader(2)))
    thread.start()
    thread.join()
    assert seen == [handlers] * 2


def test_a_terminal_that_is_gone_takes_no_run_with_it(capfd):
    """What is printed to it would raise an error, in a progress bar as well."""
    reader, writer = os.pipe()
    os.close(reader)
    kept = os.dup(1)

    class Prints(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx >= 3:
                os.write(1, b"step")
            return loss

    os.dup2(writer, 1)
    try:
        with pytest.raises(Preempted) as ended:
            trainer(PreemptionGuard()).fit(Prints(train=3, number=signal.SIGHUP), loader())
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(writer)
    assert torch.load(ended.value.path, weights_only=True)["global_step"] == 4


def test_a_signal_ends_a_validation_within_a_fit():
    net = Net(validate=1, number=signal.SIGUSR1)
    with pytest.raises(Preempted) as ended:
        trainer(PreemptionGuard()).fit(net, loader(2), loader(5))
    assert net.seen[-2:] == [("validate", 1), ("validate", "after")]
    assert torch.load(ended.value.path, weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("options", [{"fast_dev_run": 3}, {"num_sanity_val_steps": 3}])
def test_where_nothing_is_worth_saving_nothing_is_saved(options):
    with pytest.raises(Preempted) as ended:
        trainer(PreemptionGuard(), **options).fit(Net(train=0, validate=0), loader(4), loader(4))
    assert ended.value.code == 143
    assert ended.value.path is None
    assert not list(Path.cwd().rglob("*.ckpt"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_outside_of_a_fit_a_signal_ends_the_program_at_once(stage, number, capfd):
    net = Net(number=number, **{stage: 1})
    with pytest.raises(Preempted) as ended:
        getattr(trainer(PreemptionGuard()), stage)(net, loader(4))
    assert ended.value.code == STATUS[number]
    assert SAYS not in capfd.readouterr().err
    assert net.seen[-1] == (stage, 1)


class AtTrainEnd(Callback):
    def __init__(self, number: int = signal.SIGTERM) -> None:
        self.number = number

    def on_train_end(self, trainer, pl_module):
        if trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), self.number)


def test_a_signal_too_late_for_a_fit_ends_what_comes_after_it():
    run, net = trainer(AtTrainEnd(), PreemptionGuard()), Net()
    run.fit(net, loader(2))
    with pytest.raises(Preempted):
        run.test(net, loader(2))
    assert ("test", 0) not in net.seen


def test_an_interrupt_too_late_for_a_fit_ends_it_saved_all_the_same():
    """A program may go on with another Trainer, which would not know."""
    run = trainer(AtTrainEnd(signal.SIGINT), PreemptionGuard())
    with pytest.raises(Preempted) as ended:
        run.fit(Net(), loader(2))
    assert ended.value.code == 130
    assert torch.load(ended.value.path, weights_only=True)["global_step"] == 2


# SLURM.


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of one process, and a scontrol that writes down what it is asked."""
    job = {"NTASKS": "1", "JOB_ID": "1234", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_NAME": "train"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    command = tmp_path / "bin" / "scontrol"
    command.parent.mkdir()
    command.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ncat {tmp_path}/status 2> /dev/null && exit 1\nexit 0\n'
    )
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    return tmp_path / "asked"


def test_slurm_requeues_the_job_and_the_same_program_continues(slurm):
    with pytest.raises(Preempted) as ended:
        trainer(PreemptionGuard()).fit(Net(train=3, number=signal.SIGUSR1), loader())
    assert ended.value.code == 143
    assert slurm.read_text() == "requeue 1234\n"
    net, run = Net(), trainer(PreemptionGuard())
    run.fit(net, loader(), weights_only=True)
    assert len(net.seen) == 8  # of 12 steps, four were done
    assert run.global_step == 12


@pytest.mark.parametrize(
    ("number", "options"),
    [(signal.SIGTERM, {}), (signal.SIGINT, {}), (signal.SIGHUP, {}), (signal.SIGUSR1, {"requeue": False})],
    ids=["SIGTERM", "SIGINT", "SIGHUP", "not asked"],
)
def test_slurm_does_not_requeue_what_may_be_cancelled_or_is_not_wanted(slurm, number, options):
    with pytest.raises(Preempted) as ended:
        trainer(PreemptionGuard(**options)).fit(Net(train=3, number=number), loader())
    assert not slurm.exists()
    assert ended.value.path.endswith("preempted.ckpt")


def test_slurm_requeues_a_task_of_an_array_by_the_signal_its_environment_names(slurm, monkeypatch):
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
    environment = SLURMEnvironment(requeue_signal=signal.SIGUSR2)
    with pytest.raises(Preempted):
        trainer(PreemptionGuard(), plugins=[environment]).fit(Net(train=3, number=signal.SIGUSR2), loader())
    assert slurm.read_text() == "requeue 77_5\n"


def test_a_job_that_cannot_be_requeued_is_saved_all_the_same(slurm):
    Path("status").write_text("slurm is not well")
    with (
        pytest.warns(UserWarning, match="not requeued, do it with `scontrol requeue 1234`"),
        pytest.raises(Preempted) as e,
    ):
        trainer(PreemptionGuard()).fit(Net(train=3, number=signal.SIGUSR1), loader())
    assert torch.load(e.value.path, weights_only=True)["global_step"] == 4


# Two processes.


class Noted(PreemptionGuard):
    """Writes down how each rank leaves."""

    def _leave(self, trainer, path=None):
        ended = super()._leave(trainer, path)
        content = {"code": ended.code, "step": trainer.global_step, "seen": trainer.lightning_module.seen[-1]}
        Path(f"left{trainer.global_rank}").write_text(json.dumps(content))
        return ended


def left() -> list[dict]:
    return [json.loads(Path(f"left{rank}").read_text()) for rank in (0, 1)]


def test_all_ranks_leave_at_the_same_step_when_one_gets_a_signal():
    run = trainer(Noted(every_n_steps=3), devices=2, strategy="ddp_fork")
    with pytest.raises(ProcessExitedException, match="143"):
        run.fit(Net(train=3, rank=1), loader(24))
    assert left() == [{"code": 143, "step": 6, "seen": ["train", 5]}] * 2
    assert torch.load("checkpoints/preempted.ckpt", weights_only=True)["global_step"] == 6


class Interrupts(Net):
    """Presses Ctrl-C where the one who sits at the terminal sees the process that has started the others."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 3 and self.global_rank == 1:
            os.kill(os.getppid(), signal.SIGINT)
        return super().training_step(batch, batch_idx)


def test_who_has_forked_the_ranks_waits_for_them_and_ends_as_they_do():
    run = trainer(Noted(every_n_steps=3), devices=2, strategy="ddp_fork")
    with pytest.raises(Preempted) as ended:
        run.fit(Interrupts(), loader(400))
    assert ended.value.code == 130
    assert left()[0]["step"] == left()[1]["step"] < 400
    assert [leaving["code"] for leaving in left()] == [130, 130]
    assert torch.load("checkpoints/preempted.ckpt", weights_only=True)["global_step"] == left()[0]["step"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Late(Callback):
    """A signal for rank 1, behind what it has to say in a reduction and before the answer."""

    def on_train_start(self, trainer, pl_module):
        reduce, times = trainer.strategy.reduce, iter(range(9))

        def interrupted(*args, **kwargs):
            agreed = reduce(*args, **kwargs)
            if trainer.global_rank == 1 and next(times) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return agreed

        trainer.strategy.reduce = interrupted


def test_a_signal_during_an_agreement_waits_for_the_next():
    run = trainer(Late(), Noted(every_n_steps=3), devices=2, strategy="ddp_fork")
    with pytest.raises(ProcessExitedException, match="143"):
        run.fit(Net(), loader(24))
    assert left() == [{"code": 143, "step": 9, "seen": ["train", 8]}] * 2


class Uneven(Net):
    """Gives rank 1 a validation batch more."""

    def val_dataloader(self):
        return loader(4 + self.global_rank)


@pytest.mark.parametrize(("rank", "batch"), [(0, 2), (1, 4)], ids=["a batch that both have", "one that rank 1 has"])
def test_ranks_with_different_numbers_of_validation_batches_agree_all_the_same(rank, batch):
    options = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False, "max_epochs": 2}
    with pytest.raises(ProcessExitedException, match="143"):
        trainer(Noted(every_n_steps=1), **options).fit(Uneven(rank, validate=batch), loader(2))
    step, seen = (2, ["validate", "after"]) if rank == 0 else (3, ["train", 0])
    assert [(leaving["code"], leaving["step"]) for leaving in left()] == [(143, step)] * 2
    assert left()[rank]["seen"] == seen


class Count(Callback):
    def setup(self, trainer, pl_module, stage):
        reduce, self.calls = trainer.strategy.reduce, 0

        def counted(values, *args, **kwargs):
            self.calls += values.numel() == 2  # Lightning compares the lengths of loaders
            return reduce(values, *args, **kwargs)

        trainer.strategy.reduce = counted

    def on_fit_end(self, trainer, pl_module):
        Path(f"calls{trainer.global_rank}").write_text(str(self.calls))


def test_quick_steps_are_agreed_on_rarely_and_slow_ones_each_time(monkeypatch):
    """Steps take as long as they say, however busy the machine is."""
    monkeypatch.setattr(preemption, "time", Passing())
    for pause, expected in ((0.001, range(5, 20)), (0.6, range(5, 6))):
        steps = 250 if pause < 0.1 else 4
        trainer(Count(), PreemptionGuard(), devices=2, strategy="ddp_fork").fit(Slow(pause), loader(2 * steps))
        calls = [int(Path(f"calls{rank}").read_text()) for rank in (0, 1)]
        assert calls[0] == calls[1]
        assert calls[0] in expected  # one more at the end


class Passing:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


class Slow(Net):
    def __init__(self, pause: float) -> None:
        super().__init__()
        self.pause = pause

    def training_step(self, batch, batch_idx):
        preemption.time.now += self.pause
        return super().training_step(batch, batch_idx)


def test_failing_together_does_nothing_where_nobody_fails(monkeypatch):
    monkeypatch.setattr(FailTogether, "last", 1e6)  # rank 0 would wait
    trainer(FailTogether(), devices=2, strategy="ddp_fork").fit(Net(), loader(4))
    trainer(FailTogether()).fit(Net(), loader(2))
    assert not [thread for thread in threading.enumerate() if thread.name == "fail-together"]


# Workers.


class Sleepy(torch.utils.data.Dataset):
    def __init__(self, asleep: int = -1) -> None:
        self.asleep = asleep

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> int:
        if index == self.asleep:
            time.sleep(600)
        return index


def test_workers_outlive_the_signals_of_others_but_not_their_parents_and_not_their_parent():
    batches = iter(
        DataLoader(Sleepy(asleep=19), num_workers=2, worker_init_fn=outlive_signals, persistent_workers=True)
    )
    for _ in range(10):  # both workers have come that far
        next(batches)
    workers = batches._workers
    for name in ("TERM", "USR1", "USR2", "INT", "HUP"):
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
    for _ in range(9):
        next(batches)
    assert all(worker.is_alive() for worker in workers)
    workers[1].terminate()  # it sleeps, in C
    workers[1].join(60)
    assert workers[1].exitcode == 0
    batches._workers_status[1] = False
    batches._shutdown_workers()


def test_workers_that_have_just_started_outlive_signals_too():
    for _ in range(5):
        batches = iter(Loader(Sleepy(), num_workers=2, worker_init_fn=outlive_signals))
        workers = [str(worker.pid) for worker in batches._workers]
        for name in ("TERM", "INT", "HUP"):
            subprocess.run(["kill", f"-{name}", *workers], check=True)  # by another process than their parent
        assert len(list(batches)) == 20
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])  # here they come as before


class InterruptsWorkers(Net):
    """Sends the workers of its loader what a terminal sends to all."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 1:
            workers = [str(process.pid) for process in multiprocessing.active_children()]
            assert len(workers) == 2
            for name in ("INT", "HUP"):
                subprocess.run(["kill", f"-{name}", *workers], check=True)
        return super().training_step(batch, batch_idx)


def test_workers_of_any_loader_outlive_a_terminals_signals_where_they_are_forked():
    run = trainer(PreemptionGuard())
    run.fit(InterruptsWorkers(), DataLoader(torch.randn(60, 4), 2, num_workers=2))
    assert run.global_step == 30


# Programs. Those that Lightning starts take seconds to import it, on a busy machine a minute, so that most are slow.

program_test = pytest.mark.timeout(600)

PROGRAM = """
import json, os, sys, time, warnings
from datetime import timedelta
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from datamodules.loading.workers import outlive_signals
from zoo.callbacks.fail_together import FailTogether
from zoo.callbacks.preemption import PreemptionGuard

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
options = json.loads(sys.argv[1])


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        time.sleep(0.02)
        if self.global_rank == 0:  # a terminal that is closed tells the first process, which tells the others
            print(".", end="", flush=True)
        if batch_idx == 5:
            Path(f"pid{self.global_rank}.new").write_text(str(os.getpid()))
            os.replace(f"pid{self.global_rank}.new", f"pid{self.global_rank}")
        if batch_idx == 10 and "fails" in options:
            if self.global_rank == options["fails"]:
                raise ValueError("a fault on purpose")
            time.sleep(600)
        return self.layer(batch).mean()

    test_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


if __name__ == "__main__":
    devices, workers = options["devices"], options["workers"]
    trainer = Trainer(
        accelerator="cpu", devices=devices, logger=False, enable_progress_bar=False, enable_model_summary=False,
        strategy=DDPStrategy(timeout=timedelta(seconds=100)) if devices > 1 else "auto", max_epochs=1,
        callbacks=[PreemptionGuard(), FailTogether(), ModelCheckpoint(save_on_exception="saves" in options)],
    )
    init = outlive_signals if workers else None
    data = DataLoader(torch.randn(40000, 4), 2, num_workers=workers, worker_init_fn=init)
    getattr(trainer, options.get("stage", "fit"))(Net(), data)
"""


def alive(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:  # ended in the meantime
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(entry.name))
    return found


class Program:
    """A program in a folder and a session of its own, which has come to its sixth step."""

    def __init__(
        self,
        folder: Path,
        devices: int = 1,
        workers: int = 0,
        prefix: tuple[str, ...] = (),
        terminal: bool = False,
        **options,
    ) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "program.py").write_text(PROGRAM)
        command = [
            sys.executable,
            *prefix,
            "program.py",
            json.dumps({"devices": devices, "workers": workers} | options),
        ]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.folder = folder
        self.output = (folder / "output").open("w+")
        self.terminal, inner = os.openpty() if terminal else (None, None)
        out = self.output if inner is None else inner
        streams = {"stdin": subprocess.DEVNULL if inner is None else inner, "stdout": out, "stderr": out}
        self.process = forked.Popen(
            command,
            cwd=folder,
            env=environment,
            **streams,
            start_new_session=True,
            terminal=terminal,
            launches=devices > 1,
        )
        if inner is not None:
            os.close(inner)
        places = [folder / f"pid{rank}" for rank in range(devices)]
        until(lambda: all(place.exists() for place in places) or self.process.poll() is not None)
        assert all(place.exists() for place in places), self.text()
        self.pids = [int(place.read_text()) for place in places]

    def text(self) -> str:
        return (self.folder / "output").read_text()

    def signal(self, number: int, to: str) -> None:
        if to == "group":
            os.killpg(self.process.pid, number)
        else:
            os.kill({"main": self.process.pid, "rank 1": self.pids[-1]}[to], number)

    def end(self) -> int:
        """Its exit status, once nothing is left of it."""
        try:
            until(lambda: self.process.poll() is not None and not alive(self.process.pid))
            remaining = alive(self.process.pid)
        finally:
            for pid in alive(self.process.pid):
                os.kill(pid, signal.SIGKILL)
            self.process.wait()
        assert not remaining, self.text()
        return self.process.returncode

    def saved(self) -> int:
        """The step of its checkpoint, the same that its message names."""
        step = torch.load(self.folder / "checkpoints" / "preempted.ckpt", weights_only=True)["global_step"]
        if self.terminal is not None:
            return step
        assert re.search(rf"preempted by SIG\w+ at step {step}:", self.text()), self.text()
        return step


def until(condition, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


@program_test
def test_a_signal_to_the_group_ends_a_program_and_its_workers_saved(tmp_path):
    program = Program(tmp_path, workers=2)
    program.signal(signal.SIGINT, "group")
    assert program.end() == 130, program.text()
    assert program.saved() >= 5
    assert "Error" not in program.text()


@program_test
def test_a_signal_to_one_rank_ends_all_that_lightning_has_started(tmp_path):
    program = Program(tmp_path, devices=2)
    program.signal(signal.SIGUSR1, "rank 1")
    assert program.end() == 143, program.text()
    assert program.saved() >= 5


@program_test
def test_rank_0_that_fails_takes_down_one_that_does_not_listen(tmp_path):
    program = Program(tmp_path, devices=2, fails=0)
    assert program.end() == 1
    assert "ValueError: a fault on purpose" in program.text()
    assert "rank 1 ends because rank 0 failed: ValueError: a fault on purpose" in program.text()


@pytest.mark.slow
@program_test
def test_a_rank_that_fails_and_then_waits_for_the_others_ends_with_them(tmp_path):
    program = Program(tmp_path, devices=2, fails=1, saves=True)
    assert program.end() != 0  # Lightning's launcher may come before us, with SIGKILL
    assert "rank 1 ends because rank 1 failed: ValueError: a fault on purpose" in program.text()
    assert "Traceback" in program.text()


@pytest.mark.slow
@program_test
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_agent_of_torchrun_saves_the_run(tmp_path, number):
    prefix = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")
    program = Program(tmp_path, devices=2, prefix=prefix)
    program.signal(number, "main")
    assert program.end() == 1  # the agent's own, whatever its processes end with
    assert program.saved() >= 5


@pytest.mark.slow
@program_test
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("closes", [False, True], ids=["Ctrl-C", "closed"])
def test_ctrl_c_in_a_terminal_and_a_terminal_that_is_closed_save_the_run(tmp_path, closes, devices):
    program = Program(tmp_path, devices=devices, workers=1, terminal=True)
    if closes:
        os.close(program.terminal)
    else:
        os.write(program.terminal, b"\x03")
    assert program.end() == (129 if closes else 130)
    assert program.saved() >= 5


@pytest.mark.slow
@program_test
@pytest.mark.parametrize("to", ["group", "rank 1"])
def test_a_signal_ends_a_test_on_two_ranks(tmp_path, to):
    program = Program(tmp_path, devices=2, stage="test")
    program.signal(signal.SIGTERM, to)
    assert program.end() == 143, program.text()


@pytest.mark.slow
@program_test
@pytest.mark.parametrize(("processes", "to"), [(1, "main"), (1, "group"), (2, "main"), (2, "group"), (2, "rank 1")])
@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 2), (signal.SIGUSR1, 0)], ids=["SIGTERM", "SIGUSR1"])
def test_a_signal_leaves_a_checkpoint_143_and_nothing_else(tmp_path, number, processes, workers, to):
    """Both signals, with workers and without, but not all four of them: a process that starts takes long.

    benchmarks/faults.py sends twenty, and says what stock Lightning does.
    """
    program = Program(tmp_path, processes, workers)
    program.signal(number, to)
    assert program.end() == 143, program.text()
    assert program.saved() >= 5
    assert "Error" not in program.text()
