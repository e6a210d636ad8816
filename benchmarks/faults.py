"""What goes wrong in long runs, done to stock Lightning and to a run with the guards: a table of what became of both.

    python benchmarks/faults.py                              # all, in a quarter of an hour
    python benchmarks/faults.py --only kill --kills 50       # names that begin so; --list names all
    python benchmarks/faults.py --only signal --signals 28   # 28 in all, 4 of each kind

Each run is a process of its own, forked from this one, which never trains; of several processes each has torchrun's
environment variables. Both columns train the same module on the same samples with the same seed and settings: stock
with torch's DataLoader and ``ModelCheckpoint(save_on_exception=True)``, the other with ``zoo.guards.guard``, a data
module of ours, and the same ModelCheckpoint. Both get a timeout of 20 s for collective operations (``--timeout``), in
place of Lightning's half an hour and our ten minutes, and hang as long as that or are killed. What trains is in
benchmarks/runs.py.
"""

import argparse
import http.server
import logging
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import chdir
from functools import partial
from pathlib import Path
from typing import Any

import continued
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from runs import SIZE, Ended, Net, SafeNet, Seen, Settings, data_of, fit, run, saving, trainer_of, wait_for
from side_by_side import where

from zoo.checkpoints import AtomicCheckpointIO, damage, newest

ROOT = Path(__file__).parents[1]
Fault = Callable[[Settings], str]


# Continuing.


class SaveAt(Checkpoint):
    """Saves a checkpoint where a hook is called behind so many batches."""

    def __init__(self, hook: str, batches: int) -> None:
        self.batches = batches
        setattr(self, hook, self.save)

    def save(self, trainer: Any, module: Any, *_: Any) -> None:
        if len(module.seen) == self.batches:
            trainer.save_checkpoint("saved.ckpt")


def twice(before: Seen, after: Seen) -> str:
    """What became of the samples of the epoch that was continued."""
    old, new = ({i for epoch, batch in part if epoch == after[0][0] for i in batch} for part in (before, after))
    return f"{len(old & new)} of {SIZE} samples seen twice, {SIZE - len(old | new)} never"


def resume(settings: Settings, hook: str, batches: int, **options: Any) -> str:
    def both() -> str:
        save = SaveAt(hook, batches)
        whole = fit(settings, save, **options)
        # What continues saves nothing, but has the same callbacks.
        part = fit(settings, SaveAt(hook, -1), ckpt_path="saved.ckpt", **options)
        made = [[t.lightning_module.state_dict(), t.optimizers[0].state_dict()["state"]] for t in (whole, part)]
        same = all(torch.equal(a, b) for a, b in zip(*map(tensors, made), strict=True))
        done, then = whole.lightning_module.seen, part.lightning_module.seen
        order = "" if then == done[batches:] else ", another order of samples"
        return f"{'equal bit for bit' if same else 'weights differ'}{order}; {twice(done[:batches], then)}"

    (ended,) = run(both)
    return ended.result or told(ended)


def tensors(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    return [found for part in (state.values() if isinstance(state, dict) else state) for found in tensors(part)]


def more_processes(settings: Settings) -> str:
    def seen(checkpoint: str | None, save: int, batch_size: int) -> Seen:
        data = data_of(settings, batch_size)
        done: Seen = fit(
            settings, SaveAt("on_train_batch_end", save), ckpt_path=checkpoint, data=data
        ).lightning_module.seen
        return done

    whole = run(partial(seen, None, 7, 8))[0].result
    ranks = run(partial(seen, "saved.ckpt", -1, 4), processes=2)
    if any(one.status for one in ranks):
        return told(*ranks)
    both = [(epoch, a + b) for (epoch, a), (_, b) in zip(*(one.result for one in ranks), strict=True)]
    same = [sorted(batch) for _, batch in both] == [sorted(batch) for _, batch in whole[7:]]
    return f"{'the same' if same else 'other'} global batches; {twice(whole[:7], both)}"


def matrix(settings: Settings) -> str:
    if not settings.guards:
        return "see above"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", "tests/test_resume.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return f"bit for bit, or the test fails: {done.stdout.strip().splitlines()[-1].strip('= ')}"


# Ends from outside.


class Slow(pl.Callback):
    """Steps of at least 10 ms; says when they are under way."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        time.sleep(0.01)
        if trainer.global_step == 5:
            Path(f"started{trainer.global_rank}").touch()


def by_signal(settings: Settings, number: int, ranks: int = 1, to: int | None = None) -> str:
    """``to``: the rank that gets the signal. None: the whole group, with the loaders' workers."""

    def train() -> None:
        fit(
            settings,
            Slow(),
            saving(every_n_train_steps=10**6),
            data=data_of(settings, workers=1),
            max_steps=10_000,
            max_epochs=None,
        )

    def send(pids: list[int]) -> None:
        wait_for(*started)
        time.sleep(random.uniform(0, 0.3))
        Path("fault").touch()
        os.kill(-pids[0] if to is None else pids[to], number)

    clean, seconds, first = 0, [], ""
    started = [f"started{rank}" for rank in range(ranks)]
    for _ in range(settings.repeats):
        shutil.rmtree("checkpoints", ignore_errors=True)
        for name in started:
            Path(name).unlink(missing_ok=True)
        ended = run(train, ranks, send, deadline=settings.timeout + 40)
        seconds.append(max(one.seconds for one in ended))
        status = 143 if number in (signal.SIGTERM, signal.SIGUSR1) else 128 + number
        good = all(one.status == status for one in ended) and kept().startswith("checkpoint")
        clean += good
        first = first or ("" if good else f"; {told(*ended, timed=True)}; {kept()}")
    return f"{clean} of {settings.repeats} clean in {min(seconds):.1f} to {max(seconds):.1f} s{first}"


def kill(settings: Settings) -> str:
    path, elsewhere = Path("last.ckpt").resolve(), tempfile.mkdtemp(dir="/dev/shm")
    checkpoint: dict[str, Any] = {"state_dict": {f"w{i}": torch.ones(1 << 18) for i in range(30)}, "epoch": 0}

    def save_for_ever() -> None:
        tempfile.tempdir = elsewhere
        writer = AtomicCheckpointIO() if settings.guards else TorchCheckpointIO()
        while True:
            checkpoint["epoch"] += 1
            writer.save_checkpoint(checkpoint, path)

    def end(pids: list[int], before: int, delay: float) -> None:
        while not path.exists() or path.stat().st_mtime_ns == before:
            time.sleep(0.002)
        time.sleep(delay)
        os.kill(pids[0], signal.SIGKILL)

    corrupt = 0
    for i in range(settings.repeats):
        before = path.stat().st_mtime_ns if path.exists() else 0
        run(save_for_ever, during=partial(end, before=before, delay=0.2 * i / settings.repeats))
        corrupt += damage(path) is not None
    left = sum(file.name.endswith(".tmp") for file in path.parent.iterdir()) + len(os.listdir(elsewhere))
    shutil.rmtree(elsewhere)
    return f"{corrupt} of {settings.repeats} corrupt, {left} temporary files left in the end"


# Files.


def disk_full(settings: Settings) -> str:
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(module: Net) -> None:
        if module.global_step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))

    def train() -> None:
        try:
            fit(settings, saving(every_n_train_steps=2), trouble=fill)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)  # for what this program writes itself

    return f"{told(*run(train))}; {kept()}"


def damaged(settings: Settings, cut: bool) -> str:
    def first() -> None:
        fit(settings, saving(every_n_train_steps=4, save_top_k=-1), max_steps=8)

    def second() -> int:
        # The zoo command's `--ckpt_path last`, and Lightning's.
        path = newest("checkpoints") if settings.guards else "last"
        started: list[int] = []
        trouble = lambda module: started.append(module.global_step)  # noqa: E731
        fit(settings, saving(), ckpt_path=path, trouble=trouble, max_steps=10)
        return started[0]

    run(first)
    files = {path.stat().st_ino: path for path in Path("checkpoints").glob("*.ckpt")}  # one may have two names
    for path in files.values():
        found = torch.load(path, weights_only=True)
        if found["global_step"] == 8:
            content = bytearray(path.read_bytes())
            content[content.index(found["state_dict"]["net.0.weight"].numpy().tobytes()) + 3] ^= 0x40
            path.write_bytes(content[: len(content) // 2] if cut else content)
    (ended,) = run(second)
    if ended.status != 0:
        return told(ended)
    return f"continues from step {ended.result}" + (
        ", with the wrong weights" if ended.result == 8 else ", the one before"
    )


def hostile(settings: Settings) -> str:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    def load() -> None:
        os.environ["TORCH_HOME"] = str(Path("cache").resolve())
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            kind = SafeNet if settings.guards else Net
            kind.load_from_checkpoint(f"http://127.0.0.1:{server.server_port}/hostile.ckpt")

    content = {"state_dict": Net().state_dict(), "callbacks": Evil(), "pytorch-lightning_version": pl.__version__}
    torch.save(content, "hostile.ckpt")
    (ended,) = run(load)
    return f"{'its code was run' if Path('executed').exists() else 'nothing was run'}; {told(ended)}"


class Evil:
    """Leaves a mark where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def one_folder(settings: Settings) -> str:
    def other() -> None:
        fit(settings, saving(every_n_train_steps=2), max_steps=4)

    def task() -> Ended:
        done: list[Ended] = []

        def start(module: Net) -> None:
            if module.global_step == 3:  # saves there already, and still runs
                Path("other").mkdir()
                with chdir("other"):
                    Path("checkpoints").symlink_to("../checkpoints")
                    done.extend(run(other))

        fit(settings, saving(every_n_train_steps=2), trouble=start, max_steps=6)
        return done[0]

    (first,) = run(task)
    second = first.result
    names = ", ".join(sorted(path.name for path in Path("checkpoints").glob("*.ckpt")))
    return f"the second run: {told(second)}; there lie {names}" if second else told(first)


# Failures inside.


def not_finite(settings: Settings) -> str:
    def spoil(module: Net) -> None:
        module.factor = float("nan") if module.global_step == 7 else 1.0

    (ended,) = run(lambda: str(fit(settings, saving(every_n_train_steps=2), trouble=spoil)))
    path = newest("checkpoints")
    state = torch.load(path, weights_only=True)["state_dict"].values() if path else []
    finite = all(tensor.isfinite().all() for tensor in state)
    return f"{told(ended)}; {kept()}, weights {'finite' if finite else 'NaN'}"


def one_rank_fails(settings: Settings) -> str:
    def fail(module: Net) -> None:
        if module.global_step == 5 and module.global_rank == 1:
            Path("fault").touch()
            raise ValueError("a fault of rank 1 alone")

    def train() -> None:
        fit(settings, saving(every_n_train_steps=2), trouble=fail, data=data_of(settings, batch_size=4))

    return told(*run(train, processes=2, deadline=settings.timeout + 60), timed=True)


def worker(settings: Settings, hangs: bool) -> str:
    def trouble(index: int) -> None:
        if index == 17:
            Path("fault").touch()
            if hangs:
                time.sleep(1000)
            os.kill(os.getpid(), signal.SIGKILL)

    def train() -> None:
        data = data_of(settings, workers=2, trouble=trouble, loader_timeout=5.0)
        fit(settings, saving(every_n_train_steps=1), data=data)

    return f"{told(*run(train, deadline=20), timed=True)}; {kept()}"


def evaluation(settings: Settings) -> str:
    def validate() -> dict[str, float]:
        data = data_of(settings, batch_size=4, validation=33)
        given = data.get("datamodule") or data["val_dataloaders"]
        found = trainer_of(settings).validate(Net(), given, verbose=False)[0]
        return {name: round(value, 3) for name, value in found.items()}

    ranks = run(validate, processes=2)
    if any(one.status for one in ranks):
        return told(*ranks)
    return f"{ranks[0].result['count']:.0f} counted, mean {ranks[0].result['mean']:.3f}"


# The table.


def told(*ended: Ended, timed: bool = False) -> str:
    """How processes have ended, and, if it says something, how long after the fault."""
    seconds = max(one.seconds for one in ended)
    if any(one.status is None for one in ended):
        return f"hangs, killed after {seconds:.0f} s"
    statuses = ", ".join(str(one.status) for one in ended)
    error = next((one.error for one in ended if one.error), "")
    error = re.sub(r"^(?:\w+\.)+(\w+: )", r"\1", error.replace(f"{os.getcwd()}/", "").replace("|", "/"))
    error = error if len(error) < 200 else f"{error[:200]}..."
    return f"status {statuses}" + (f" after {seconds:.1f} s" if timed else "") + (f", {error}" if error else "")


def kept() -> str:
    """What lies in the folder of checkpoints."""
    files = list(Path("checkpoints").glob("*.ckpt"))
    if bad := [file.name for file in files if damage(file)]:
        return f"damaged: {', '.join(bad)}"
    steps = [torch.load(file, weights_only=True)["global_step"] for file in files]
    return f"checkpoint of step {max(steps)}" if steps else "no checkpoint"


FAULTS: dict[str, tuple[str, Fault]] = {
    "resume_middle": ("resumed mid-epoch", partial(resume, hook="on_train_batch_end", batches=7)),
    "resume_epoch": ("resumed at an epoch's end", partial(resume, hook="on_train_epoch_end", batches=5)),
    "resume_validation": (
        "resumed after a validation mid-epoch",
        partial(resume, hook="on_validation_end", batches=7, val_check_interval=2),
    ),
    "resume_accumulating": (
        "resumed while gradients accumulate",
        partial(resume, hook="on_train_batch_end", batches=8, accumulate_grad_batches=2),
    ),
    "resume_processes": ("resumed by two processes, saved by one", more_processes),
    "plateau": ("killed on a plateau, the best kept, with save_last: link", continued.plateau),
    "best_new_folder": ("continued in another folder, best before: epoch 1", continued.new_folder),
    "best_moved": ("a finished run that was moved, continued", continued.moved),
    "settings_lr": (
        "continued with a learning rate of 0.02 for 0.01, which was divided by ten by hand",
        partial(continued.settings_of_optimizer, lr=2e-2),
    ),
    "settings_groups": (
        "continued with biases that do not decay, and so in a group of their own",
        partial(continued.settings_of_optimizer, split=True),
    ),
    "state": ("a callback's state that checkpoints may not hold", continued.state),
    "resume_matrix": ("resumed everywhere: tests/test_resume.py", matrix),
    "signal_term": ("SIGTERM, one process and its worker", partial(by_signal, number=signal.SIGTERM)),
    "signal_usr1": ("SIGUSR1, one process and its worker", partial(by_signal, number=signal.SIGUSR1)),
    "signal_term_group": ("SIGTERM to all of two processes", partial(by_signal, number=signal.SIGTERM, ranks=2)),
    "signal_term_rank1": ("SIGTERM to rank 1 of 2", partial(by_signal, number=signal.SIGTERM, ranks=2, to=1)),
    "signal_usr1_rank1": ("SIGUSR1 to rank 1 of 2", partial(by_signal, number=signal.SIGUSR1, ranks=2, to=1)),
    "signal_int_group": ("Ctrl-C in the terminal of two processes", partial(by_signal, number=signal.SIGINT, ranks=2)),
    "signal_hup": ("SIGHUP, one process and its worker", partial(by_signal, number=signal.SIGHUP)),
    "kill": ("kill -9 while a checkpoint is saved, TMPDIR on another file system", kill),
    "disk_full": ("disk full from step 4 on", disk_full),
    "damaged_byte": ("a byte of the newest checkpoint is wrong", partial(damaged, cut=False)),
    "damaged_cut": ("the newest checkpoint is cut short", partial(damaged, cut=True)),
    "not_finite": ("the loss becomes NaN at step 7", not_finite),
    "rank_fails": ("an exception on rank 1 of 2", one_rank_fails),
    "worker_hangs": ("a loader's worker hangs (loader_timeout 5 s in place of 300)", partial(worker, hangs=True)),
    "worker_killed": ("a loader's worker is killed", partial(worker, hangs=False)),
    "evaluation": ("33 samples evaluated by two processes, mean 16", evaluation),
    "hostile": ("a checkpoint from a URL that runs code", hostile),
    "one_folder": ("two runs save to one folder", one_folder),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="faults whose names begin so")
    parser.add_argument("--list", action="store_true", help="their names")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--signals", type=int, default=20, help="signals in all")
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds of a collective operation")
    arguments = parser.parse_args()
    if arguments.list:
        print(*FAULTS, sep="\n")
        return
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    kinds = sum(name.startswith("signal") for name in FAULTS)
    print(f"{where('cpu', 'torch', 'lightning')}\ncommand: python {' '.join(sys.argv)}\n")
    print("| fault | stock Lightning | with the guards |\n|---|---|---|")
    for name, (title, fault) in FAULTS.items():
        if not name.startswith(tuple(arguments.only)):
            continue
        repeats = arguments.kills if name == "kill" else max(1, arguments.signals // kinds)
        cells = []
        for guards in (False, True):
            # On the disk, not in /tmp, which may be memory.
            with tempfile.TemporaryDirectory(dir=".", ignore_cleanup_errors=True) as folder, chdir(folder):
                cells.append(fault(Settings(guards, repeats, arguments.timeout)))
        print(f"| {title} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
