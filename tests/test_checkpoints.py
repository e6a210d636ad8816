"""Checkpoints: killed writers, full disks, wrong bytes, hostile pickles, and what a file says of its origin."""

import fcntl
import http.server
import itertools
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import zoo
from datamodules import DigitsDataModule
from zoo.callbacks.provenance import Provenance, provenance
from zoo.checkpoints import AtomicCheckpointIO, SafeLoading, claim, configuration, damage, newest
from zoo.cli.mistakes import on_purpose

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
GOLDEN = Path(__file__).parent / "golden"


class Net(SafeLoading, LightningModule):
    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(size, size)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.1)


def fit(*callbacks, ckpt_path=None, steps=6, plugins=None, **options) -> Trainer:
    plugins = [AtomicCheckpointIO()] if plugins is None else plugins
    trainer = Trainer(**QUIET | {"callbacks": list(callbacks), "plugins": plugins, "max_steps": steps} | options)
    trainer.fit(Net(), DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=2), ckpt_path=ckpt_path)
    return trainer


def small() -> dict[str, Any]:
    return {"state_dict": {"w": torch.randn(50), "b": torch.zeros(2, 2)}, "steps": [torch.arange(3)], "epoch": 3}


def large(megabytes: int) -> dict[str, Any]:
    return {"state_dict": {f"w{i}": torch.ones(1 << 18) for i in range(megabytes)}, "epoch": 0}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def fork(task: Callable[[], Any]) -> int:
    """Runs a task in a child of this process, at once: torch is imported already. Its exit status is 0 if it ends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pytest's own threads do not matter to the child
        child = os.fork()
    if child:
        return child
    try:
        task()
        os._exit(0)
    finally:
        os._exit(1)


def status(child: int) -> int:
    """0 for a child that ended well, and -9 for one that was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def hidden(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir() if file.name.startswith(".")]


# Written whole, or not at all.


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_a_checkpoint_is_whole_whenever_its_writer_is_killed(tmp_path, kills):
    path, left = tmp_path / "last.ckpt", 0
    elsewhere = tempfile.mkdtemp(dir="/dev/shm") if Path("/dev/shm").is_dir() else None

    def save_for_ever():
        tempfile.tempdir = elsewhere or tempfile.tempdir  # where Lightning's own plugin writes first
        checkpoint, writer = large(16), AtomicCheckpointIO()
        while True:
            checkpoint["epoch"] += 1
            writer.save_checkpoint(checkpoint, path)

    for i in itertools.count():
        if i >= kills and (left or i == 20 * kills):
            break
        before = path.stat().st_mtime_ns if path.exists() else 0
        child = fork(save_for_ever)
        while not path.exists() or path.stat().st_mtime_ns == before:
            time.sleep(0.002)
        time.sleep(0.1 * (i % kills) / kills)
        os.kill(child, signal.SIGKILL)
        assert status(child) == -signal.SIGKILL
        assert damage(path) is None
        assert torch.load(path, weights_only=True)["epoch"] > 0
        left += len(hidden(tmp_path))
        assert len(hidden(tmp_path)) <= 1  # what the one before had left is gone
    assert left  # else none was killed in the middle of a file, and nothing has been shown
    AtomicCheckpointIO().save_checkpoint(small(), path)
    assert hidden(tmp_path) == []
    if elsewhere:
        assert os.listdir(elsewhere) == []
        os.rmdir(elsewhere)


def test_the_next_writer_removes_what_a_dead_one_left_and_nothing_else(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(small(), path)

    def die_midway():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        AtomicCheckpointIO().save_checkpoint(large(4), path)

    assert status(fork(die_midway)) == -signal.SIGXFSZ
    assert damage(path) is None
    (dead,) = hidden(tmp_path)
    living, other = tmp_path / ".last.ckpt.00c0ffee.tmp", tmp_path / ".somebody.tmp"
    other.touch()
    with living.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        AtomicCheckpointIO().save_checkpoint(small(), path)
        assert set(hidden(tmp_path)) == {living.name, other.name}, dead


@pytest.mark.parametrize("megabytes", [4, 1])
def test_a_full_disk_is_one_line_and_costs_no_older_checkpoint(tmp_path, megabytes):
    path, said = tmp_path / "last.ckpt", tmp_path / "said"
    kept = small()
    AtomicCheckpointIO().save_checkpoint(kept, path)

    def fill():
        # Above a megabyte of tensors by less than torch needs to close the file, or far below four.
        resource.setrlimit(resource.RLIMIT_FSIZE, ((1 << 20) + 1024,) * 2)
        try:
            AtomicCheckpointIO().save_checkpoint(large(megabytes), path)
        except OSError as error:
            said.write_text(f"{error.errno} {on_purpose(error)}")

    assert status(fork(fill)) == 0
    assert said.read_text() == f"27 {path} was not saved: File too large; the checkpoints before it are whole"
    assert hidden(tmp_path) == []
    assert equal(torch.load(path, weights_only=True), kept)


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(OSError, match=r"runs/a/last.ckpt was not saved: Not a directory; the checkpoints") as caught:
        AtomicCheckpointIO().save_checkpoint(small(), tmp_path / "runs/a/last.ckpt")
    assert on_purpose(caught.value)


def test_a_read_only_folder_is_one_line():
    folder = Path(tempfile.mkdtemp())  # tmp_path lies where only this user may look
    said = folder / "said"
    said.touch(0o666)
    said.chmod(0o666)
    folder.chmod(0o555)

    def save():
        if os.geteuid() == 0:  # who may write anywhere
            os.setuid(65534)
        try:
            AtomicCheckpointIO().save_checkpoint(small(), folder / "last.ckpt")
        except OSError as error:
            said.write_text(str(on_purpose(error)))

    try:
        assert status(fork(save)) == 0
        assert said.read_text() == (
            f"{folder}/last.ckpt was not saved: Permission denied; the checkpoints before it are whole"
        )
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_save_that_fails_leaves_nothing_behind(tmp_path):
    with pytest.warns(UserWarning, match="^function is a function"), pytest.raises(AttributeError, match="pickle"):
        AtomicCheckpointIO().save_checkpoint(small() | {"function": lambda: None}, tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_other_ways_to_name_a_file_work_and_remote_ones_are_lightnings(tmp_path):
    checkpoint, writer = small(), AtomicCheckpointIO()
    for path in (str(tmp_path / "deep/er/a.ckpt"), tmp_path / "b.ckpt", f"file://{tmp_path}/c.ckpt", "memory://d.ckpt"):
        writer.save_checkpoint(checkpoint, path)
        assert equal(writer.load_checkpoint(path), checkpoint)
    assert {file.name for file in tmp_path.rglob("*.ckpt")} == {"a.ckpt", "b.ckpt", "c.ckpt"}
    with pytest.raises(TypeError, match="storage_options"):
        writer.save_checkpoint(checkpoint, tmp_path / "b.ckpt", storage_options={})
    writer.remove_checkpoint(tmp_path / "b.ckpt")
    assert not (tmp_path / "b.ckpt").exists()


def test_checksums_are_written_also_where_they_are_switched_off(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        AtomicCheckpointIO().save_checkpoint(small(), tmp_path / "a.ckpt")
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    assert damage(tmp_path / "a.ckpt") is None


def test_a_trainers_checkpoints_are_whole_safe_and_continued(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1, save_last="link")
    assert isinstance(fit(checkpoints).strategy.checkpoint_io, AtomicCheckpointIO)
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]
    for path in tmp_path.iterdir():
        assert damage(path) is None
        assert torch.load(path, weights_only=True)["global_step"] == int(path.resolve().stem.removeprefix("step="))
    assert (tmp_path / "last.ckpt").is_symlink()
    assert newest(tmp_path) == tmp_path / "step=6.ckpt"
    assert fit(ckpt_path=tmp_path / "last.ckpt", steps=8, enable_checkpointing=False).global_step == 8


# Python objects, which would not be read again.


class KeepsState(Callback):
    """State as people write it; what is told of which kinds is in test_plain.py."""

    def state_dict(self):
        return {"best": np.float64(0.5)}


TOLD = r"callback KeepsState: state\['best'\] is a numpy.float64, which cannot be read without running code: keep float"


@pytest.mark.parametrize("address", ["", "file://", "memory://"])
def test_python_objects_are_refused_before_anything_is_written(tmp_path, address):
    checkpoint = small() | {"callbacks": {"KeepsState": KeepsState().state_dict()}}
    path = f"{address}{'' if address == 'memory://' else tmp_path}/refused/a.ckpt"
    with pytest.raises(ValueError, match=rf"was not saved: {TOLD}.*--weights_only false for a run") as caught:
        AtomicCheckpointIO(exclusive=True, weights_only=True).save_checkpoint(checkpoint, path)
    assert on_purpose(caught.value)
    assert list(tmp_path.iterdir()) == []
    AtomicCheckpointIO(weights_only=True).save_checkpoint(small(), path)


def test_python_objects_are_told_when_they_are_saved_first_and_not_after_the_fit(tmp_path):
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = Trainer(**QUIET, callbacks=[KeepsState(), saves], plugins=[AtomicCheckpointIO(weights_only=True)])
    with pytest.raises(ValueError, match=TOLD):
        trainer.fit(Net(), DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=2))
    assert trainer.global_step == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("weights_only", "times"), [(None, 1), (False, 0)])
def test_python_objects_are_saved_unless_that_is_refused_with_a_warning_at_most(tmp_path, weights_only, times):
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(KeepsState(), saves, plugins=[AtomicCheckpointIO(weights_only=weights_only)], steps=3)
    told = [str(warning.message) for warning in said if re.match(TOLD, str(warning.message))]
    assert len(told) == times
    assert len(list(tmp_path.iterdir())) == 3
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "step=3.ckpt", weights_only=False)["global_step"] == 3


# Damaged, and what is taken instead.


def test_a_wrong_byte_anywhere_is_noticed_or_changes_nothing(tmp_path):
    path, checkpoint = tmp_path / "a.ckpt", small()
    torch.save(checkpoint, path)
    whole, noticed = path.read_bytes(), 0
    # The byte that makes a folder of data/0, among the others.
    flagged = whole.rindex(b"a/data/0") - 46 + 38
    for place in [flagged, *random.sample(range(len(whole)), 200)]:
        content = bytearray(whole)
        content[place] ^= 0x10 if place == flagged else random.choice((1, 16, 128, 255))
        path.write_bytes(content)
        if damage(path) is None:
            assert equal(torch.load(path, weights_only=True), checkpoint), place
        else:
            noticed += 1
        assert place != flagged or noticed == 1
    assert noticed > 80


def test_a_file_cut_short_anywhere_is_noticed(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save(small(), path)
    whole = path.read_bytes()
    for length in [0, 1, len(whole) - 1, *random.sample(range(len(whole)), 50)]:
        path.write_bytes(whole[:length])
        assert damage(path) == ("it is empty" if length == 0 else "it was cut short, or is no checkpoint")


def test_what_is_no_checkpoint_is_damaged(tmp_path):
    path = tmp_path / "a.ckpt"
    path.write_text("state_dict: {}")
    assert damage(path) == "it was cut short, or is no checkpoint"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/notes.txt", "an archive, but of something else")
    assert "it cannot be read" in damage(path)
    assert damage(tmp_path / "b.ckpt") == "No such file or directory"


def test_a_distributed_checkpoint_is_whole_with_what_is_written_last(tmp_path):
    folder = tmp_path / "step=2.ckpt"
    folder.mkdir()
    (folder / "__0_0.distcp").touch()
    assert damage(folder) == "it has no .metadata"
    (folder / ".metadata").touch()
    assert damage(folder) == "it has no meta.pt"
    torch.save({"epoch": 0, "provenance": {"config": "seed: 1"}}, folder / "meta.pt")
    assert damage(folder) is None
    assert newest(tmp_path) == folder
    assert configuration(folder) == "seed: 1"


def test_the_newest_whole_checkpoint_is_taken_with_a_warning_for_each_damaged_one(tmp_path):
    names = ["version_0/a.ckpt", "version_1/b.ckpt", "version_1/c.ckpt", "version_1/d.ckpt"]
    for age, name in enumerate(reversed(names)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        torch.save({"provenance": {"config": name}}, path)
        os.utime(path, ns=(0, 10**18 - age))
    a, b, c, d = (tmp_path / name for name in names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest(tmp_path) == d
        assert newest(tmp_path, lambda path: configuration(path) == names[0]) == a
        assert newest(tmp_path / "version_0") == a
        assert newest(tmp_path, lambda path: False) is None
        assert newest(tmp_path / "none") is None
    (tmp_path / "last.ckpt").symlink_to(d)
    for path in (c, d):
        path.write_bytes(path.read_bytes()[:-100])
    os.utime(c, ns=(0, 10**18 + 1))
    with pytest.warns(UserWarning, match="is damaged") as said:
        assert newest(tmp_path) == b
    reason = "is damaged, it was cut short, or is no checkpoint: taking"
    assert [str(warning.message) for warning in said] == [f"{d} {reason} {b}", f"{c} {reason} {b}"]
    a.unlink()
    b.unlink()
    with pytest.warns(UserWarning, match="there is no whole one in") as said:
        assert newest(tmp_path) is None
    assert len(said) == 2


def test_to_continue_from_a_damaged_checkpoint_is_one_line_that_names_a_whole_one(tmp_path):
    fit(ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1), steps=4)
    path = tmp_path / "step=4.ckpt"
    content = bytearray(path.read_bytes())
    content[content.index(torch.load(path)["state_dict"]["layer.weight"].numpy().tobytes())] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)  # torch does not notice
    line = r"step=4.ckpt is damaged, .*data/\d+ in it is not .*; the newest whole one beside it is .*step=2.ckpt$"
    with pytest.raises(ValueError, match=line) as caught:
        fit(ckpt_path=path)
    assert on_purpose(caught.value)
    with pytest.raises(ValueError, match=line) as caught:
        Net.load_from_checkpoint(path)
    assert on_purpose(caught.value)


# Nothing is unpickled.


class Evil:
    """Leaves a mark where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.fixture
def server(tmp_path: Path, monkeypatch) -> Iterator[tuple[str, Path]]:
    """Files under an address of this machine, and the folder they are taken from."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args: Any) -> None:
            pass

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}", folder
        serving.shutdown()
        thread.join()


@pytest.mark.parametrize("scheme", ["", "file://", "memory://", "http://"])
def test_a_hostile_checkpoint_executes_nothing_wherever_it_lies(tmp_path, server, scheme):
    address, folder = server
    hostile = {"state_dict": Net().state_dict(), "hyper_parameters": {}, "pytorch-lightning_version": "2.6.6"}
    torch.save(hostile | {"callbacks": Evil()}, file := folder / "evil.ckpt")
    path = {"http://": f"{address}/evil.ckpt", "memory://": "memory://evil.ckpt"}.get(scheme, f"{scheme}{file}")
    if scheme == "memory://":
        import fsspec

        fsspec.filesystem("memory").pipe("evil.ckpt", file.read_bytes())
    line = r"evil.ckpt holds Python objects, which can run code, and is not read.*weights_only=False$"
    for read in (
        lambda: Net.load_from_checkpoint(path),
        lambda: Net.load_from_checkpoint(path, weights_only=None),
        lambda: AtomicCheckpointIO().load_checkpoint(path),
        lambda: fit(ckpt_path=path, enable_checkpointing=False),
    ):
        with pytest.raises(ValueError, match=line) as caught:
            read()
        assert on_purpose(caught.value)
    assert damage(file) is None
    assert configuration(file) is None
    assert not Path("executed").exists()
    Net.load_from_checkpoint(path, weights_only=False)  # somebody has asked for it
    assert Path("executed").exists()


@pytest.mark.parametrize("name", sorted(zoo._EXPORTS))
def test_no_module_of_the_zoo_unpickles_what_an_address_sends(server, name):
    address, folder = server
    torch.save({"state_dict": {}, "callbacks": Evil()}, folder / "evil.ckpt")
    with pytest.raises(ValueError, match="evil.ckpt holds Python objects"):
        getattr(zoo, name).load_from_checkpoint(f"{address}/evil.ckpt")
    assert not Path("executed").exists()


def test_two_addresses_with_the_same_file_name_are_two_checkpoints(server):
    address, folder = server
    nets = {name: Net() for name in ("a", "b")}
    for name, net in nets.items():
        (folder / name).mkdir()
        trainer = Trainer(**QUIET, plugins=[AtomicCheckpointIO()])
        trainer.strategy.connect(net)
        trainer.save_checkpoint(folder / name / "last.ckpt", weights_only=True)
    for name, net in nets.items():
        found = Net.load_from_checkpoint(f"{address}/{name}/last.ckpt")
        assert equal(found.state_dict(), net.state_dict())
    with pytest.raises(OSError, match=r"none.ckpt could not be fetched: HTTP Error 404") as caught:
        Net.load_from_checkpoint(f"{address}/none.ckpt")
    assert on_purpose(caught.value)


def test_loading_is_as_lightnings_in_all_else(tmp_path):
    trainer = Trainer(**QUIET)
    trainer.strategy.connect(net := Net(size=3))
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert equal(Net.load_from_checkpoint(tmp_path / "a.ckpt").state_dict(), net.state_dict())
    with (tmp_path / "a.ckpt").open("rb") as file:
        assert Net.load_from_checkpoint(file, map_location="cpu").hparams.size == 3
    with pytest.raises(RuntimeError, match="size mismatch"):
        Net.load_from_checkpoint(tmp_path / "a.ckpt", size=5)
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        net.load_from_checkpoint(tmp_path / "a.ckpt")


# Where a checkpoint comes from.


def git(folder: Path, *command: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", "-C", folder, *identity, *command], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_a_checkpoint_says_what_made_it(tmp_path):
    config = "seed_everything: 0\nmodel: {class_path: Net}\n"
    fit(ModelCheckpoint(tmp_path, "a"), Provenance(config))
    path = tmp_path / "a.ckpt"
    found = torch.load(path, weights_only=True)["provenance"]
    assert (
        found["versions"] | {"vision-zoo": zoo.__version__, "numpy": __import__("numpy").__version__}
        == (found["versions"])
    )
    assert {"python", "torch", "torchvision", "lightning", "timm", "torchmetrics", "jsonargparse"} < (
        found["versions"].keys()
    )
    assert found["git"]["here"] is None
    assert configuration(path) == config
    fit(ModelCheckpoint(tmp_path, "b"), Provenance())
    assert configuration(tmp_path / "b.ckpt") is None
    fit(ModelCheckpoint(tmp_path, "c"))
    assert configuration(tmp_path / "c.ckpt") is None


def test_the_revision_is_that_of_the_beginning(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    assert provenance()["git"]["here"] is None  # no commit yet
    (tmp_path / "model.py").write_text("lr = 1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "notes").touch()
    assert provenance()["git"]["here"] == {"commit": commit, "changed": False}
    made = Provenance()
    trainer = fit(ModelCheckpoint(tmp_path, "a", every_n_train_steps=2, save_top_k=-1), made, steps=2)
    (tmp_path / "model.py").write_text("lr = 2")
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    for name in ("a.ckpt", "b.ckpt"):
        assert not torch.load(tmp_path / name, weights_only=True)["provenance"]["git"]["here"]["changed"]
    assert provenance()["git"]["here"] == {"commit": commit, "changed": True}
    # The repository that a .venv lies in is not the zoo's.
    monkeypatch.setattr(zoo, "__file__", str(tmp_path / "__init__.py"))
    assert provenance()["git"]["zoo"] is None
    monkeypatch.setenv("PATH", "")
    assert provenance()["git"]["here"] is None


# One run to a folder.


def test_a_folder_belongs_to_one_living_process(tmp_path):
    ready, hold = os.pipe(), os.pipe()
    path, said = tmp_path / "last.ckpt", tmp_path / "said"

    def save_and_stay():
        AtomicCheckpointIO(exclusive=True).save_checkpoint(small(), path)
        AtomicCheckpointIO(exclusive=True).save_checkpoint(small(), path)  # of a new Trainer in the same process

        def outlive():
            os.read(hold[0], 1)

        os.close(hold[1])
        fork(outlive)  # as the worker of a loader does
        os.write(ready[1], b".")
        time.sleep(60)

    child = fork(save_and_stay)
    os.read(ready[0], 1)
    written = path.stat().st_mtime_ns
    with pytest.raises(RuntimeError, match=rf"another run saves .* \(process {child} on .*\): give this one") as caught:
        AtomicCheckpointIO(exclusive=True).save_checkpoint(small(), path)
    assert on_purpose(caught.value)
    assert path.stat().st_mtime_ns == written
    with pytest.raises(RuntimeError, match=rf"\(process {child} on"):  # to have been refused takes nothing from it
        claim(tmp_path)
    os.kill(child, signal.SIGKILL)
    assert status(child) == -signal.SIGKILL
    AtomicCheckpointIO(exclusive=True).save_checkpoint(small(), path)
    claim(tmp_path)

    def refused():
        try:
            claim(tmp_path)
        except RuntimeError as error:
            said.write_text(str(error))

    assert status(fork(refused)) == 0
    assert f"process {os.getpid()} on" in said.read_text()
    for end in (*ready, *hold):
        os.close(end)


def test_a_folder_of_this_process_is_that_of_its_children_too_but_of_one_at_a_time(tmp_path):
    """As in a notebook: a fit here, then one on two processes that are forked."""
    claim(tmp_path)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def save():
        theirs.send(_claimed_by_us(tmp_path))
        theirs.recv()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pytest's own threads do not matter to the child
        child = context.Process(target=save)
        child.start()
        assert ours.recv() == ""
        sibling = context.Process(target=lambda: theirs.send(_claimed_by_us(tmp_path)))
        sibling.start()
        assert f"(process {os.getpid()} on" in ours.recv()
        sibling.join()
        ours.send("end")
        child.join()
        next_one = context.Process(target=lambda: theirs.send(_claimed_by_us(tmp_path)))
        next_one.start()
        assert ours.recv() == ""
        next_one.join()


def test_a_folder_of_a_child_whose_parent_is_gone_is_its_own(tmp_path):
    orphan = tmp_path / "orphan"
    context = multiprocessing.get_context("fork")

    def parent():
        claim(tmp_path)

        def save():
            claim(tmp_path)
            orphan.write_text(str(os.getpid()))
            time.sleep(60)

        context.Process(target=save).start()
        while not orphan.exists():
            time.sleep(0.01)
        os._exit(0)

    assert status(fork(parent)) == 0
    child = int(orphan.read_text())
    with pytest.raises(RuntimeError, match="another run saves"):
        claim(tmp_path)
    os.kill(child, signal.SIGKILL)
    for _ in range(6000):
        with suppress(RuntimeError):
            claim(tmp_path)
            break
        time.sleep(0.01)
    claim(tmp_path)


def _claimed_by_us(folder: Path) -> str:
    try:
        claim(folder)
    except RuntimeError as error:
        return str(error)
    return ""


# Of earlier versions. Made by version 0.1.0:
#   zoo fit -c vit/digits --model.width 8 --model.depth 1 --model.heads 2 --trainer.max_epochs 2
#       --trainer.limit_train_batches 3 --trainer.limit_val_batches 1


def test_a_checkpoint_of_version_0_1_0_loads():
    path = GOLDEN / "vit_digits_0.1.0.ckpt"
    assert damage(path) is None
    model = zoo.ViTClassifier.load_from_checkpoint(path, weights_only=True).eval()
    assert model(torch.zeros(1, *model.input_shape)).shape == (1, 10)
    assert configuration(path) is None  # it does not say yet


def test_a_checkpoint_of_version_0_1_0_is_continued(tmp_path):
    path = GOLDEN / "vit_digits_0.1.0.ckpt"
    model = zoo.ViTClassifier.load_from_checkpoint(path, warmup_epochs=1)
    options = {"limit_train_batches": 3, "limit_val_batches": 1, "max_epochs": 3, "num_sanity_val_steps": 0}
    options |= {"callbacks": ModelCheckpoint(tmp_path), "plugins": AtomicCheckpointIO()}
    trainer = Trainer(**QUIET, **options)
    trainer.fit(model, DigitsDataModule(image_size=16, batch_size=64), ckpt_path=path)
    after = torch.load(newest(tmp_path), weights_only=True)
    assert (trainer.current_epoch, after["global_step"], after["optimizer_states"][0]["state"][0]["step"]) == (3, 9, 9)
