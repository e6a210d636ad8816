"""A run that is continued by the command line: from its newest whole state, wherever and however it was kept.

By pairs of place, checkpointing, logger and moment, a run is stopped and continued with ``--ckpt_path last``. It has to
end as the run that was never stopped, bit for bit, to know the same best epoch, and to test that one.
"""

import datetime
import itertools
import json
import os
import random
import shutil
import signal
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from test_resume import assert_same
from torch import nn

from zoo.callbacks import resume_point
from zoo.checkpoints import newest
from zoo.cli import continuing, main

SCORES = (0.2, 0.9, 0.5, 0.4, 0.3, 0.35, 0.1, 0.15)
"""val/score by epoch: the best is that of epoch 1, and after it there is a plateau."""
STEPS = 3  # in an epoch


class Scripted(LightningModule):
    """Dropout, momentum and a schedule, so that a wrong state shows; validation follows a script."""

    def __init__(self, lr: float = 0.1, width: int = 16) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Dropout(0.5), nn.Linear(width, 10))
        self.register_buffer("epoch", torch.tensor(-1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]) + random.random(), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.epoch.fill_(self.current_epoch)
        self.log("val/score", SCORES[self.current_epoch])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/epoch", self.epoch.float())  # that of the checkpoint which is tested

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


class Die(Callback):
    """As ``kill -9`` after a step, or the reclaiming of a machine, as far as files are concerned."""

    def __init__(self, step: int, number: int = 0) -> None:
        self.step, self.number = step, number

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == self.step and self.number:
            os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and not self.number:
            raise KilledError


class KilledError(RuntimeError):
    pass


class NoFolder(Logger):
    """As MLflow's with a database."""

    name = version = None

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        pass

    log_hyperparams = log_metrics


class OneFolder(NoFolder):
    """As W&B's: all runs have one folder, and what is called a version is not."""

    name = "project"
    version = "0"
    save_dir = "tracked"


DATA = ["--data=DigitsDataModule", "--data.image_size=8", "--data.mean=[0.5]", "--data.std=[0.5]", "--data.hflip=0.5"]
DATA += ["--data.num_workers=0"]
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
QUIET += [f"--trainer.limit_train_batches={STEPS}", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1"]
QUIET += ["--trainer.log_every_n_steps=1", "--trainer.num_sanity_val_steps=0"]
RUN = ["fit", "--model=test_continuing.Scripted", *DATA, *QUIET]


def saver(**options: Any) -> str:
    return json.dumps({"class_path": "ModelCheckpoint", "init_args": options})


def logger(name: str, **options: Any) -> str:
    return json.dumps({"class_path": name, "init_args": options})


BEST = {"monitor": "val/score", "mode": "max"}
CHECKPOINTING = {
    "the last epoch": [],
    "the best, a link": [saver(**BEST, save_last="link")],
    "the best, a copy": [saver(**BEST, save_last=True, filename="best")],
    "a folder of one's own": [saver(**BEST, dirpath="ckpts")],
    "the best two": [saver(**BEST, save_top_k=2, save_last="link")],
    "by steps, and the best": [saver(every_n_train_steps=2, save_last=True), saver(**BEST)],
    "by time": [saver(train_time_interval="0:0:1000", save_top_k=-1), saver(**BEST, save_weights_only=True)],
}
MONITORED = {name for name, savers in CHECKPOINTING.items() if any("monitor" in one for one in savers)}
LOGGERS = {
    "TensorBoard": ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=runs", "--trainer.logger.name=me"],
    "CSV": ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs"],
    "true": ["--trainer.logger=true"],
    "none": ["--trainer.logger=false"],
    "a list": [f"--trainer.logger=[{logger('test_continuing.NoFolder')},{logger('CSVLogger', save_dir='runs')}]"],
    "without a folder": ["--trainer.logger=test_continuing.NoFolder"],
    "one folder for all": ["--trainer.logger=test_continuing.OneFolder"],
}
PLACES = ("the same", "moved", "copied", "another working directory")
# The step after which a run dies, and how long the one that continues it goes on, in epochs.
MOMENTS = {
    "in an epoch": (STEPS * 2 + 2, 6),
    "on a plateau": (STEPS * 4 + 1, 6),  # a step behind the end of an epoch
    "asked to end": (STEPS * 3 + 2, 6),  # by SIGTERM
    "finished": (None, 6),
    "longer than before": (None, 8),
}
FIRST = 6  # epochs that the first run was to have


def pairs(*axes: Any) -> list[tuple[str, ...]]:
    """Rows in which every two values of different axes stand together at least once: as few as there can be.

    Of Latin squares: each two columns of ``i, j, i + j, 2i + j, ...`` modulo a prime number hold all pairs of numbers,
    and still do when numbers that an axis lacks become others. In front stand rows that have most pairs no row had yet.
    """
    names, size = [list(axis) for axis in axes], len(axes[0])
    assert size == 7 >= max(map(len, names)), "the first axis is the longest, of a prime number of values"
    squares = [
        [i, *((times * i + j) % size for times in range(len(names) - 1))] for i in range(size) for j in range(size)
    ]
    rows = [tuple(axis[at % len(axis)] for axis, at in zip(names, row, strict=True)) for row in squares]
    wanted = {
        (i, a, j, b)
        for i, j in itertools.combinations(range(len(names)), 2)
        for a in names[i]
        for b in names[j]
    }  # fmt: skip
    chosen = []
    while rows:
        best = max(rows, key=lambda row: len(wanted & _pairs_of(row)))
        rows.remove(best)
        chosen.append(best)
        wanted -= _pairs_of(best)
    assert not wanted
    return chosen


def _pairs_of(row: tuple[str, ...]) -> set[tuple[int, str, int, str]]:
    return {(i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(row)), 2)}


MATRIX = pairs(CHECKPOINTING, LOGGERS, MOMENTS, PLACES)
QUICK = 27
"""Rows that come first, in which most pairs stand, all of moments and places among them; the others are slow."""


def options_of(checkpointing: str, logging: str) -> list[str]:
    """The callbacks of a row: a state is kept after each step, so that a run that dies leaves the step before."""
    callbacks = [*CHECKPOINTING[checkpointing], '{"class_path": "ResumePoint", "init_args": {"minutes": 1.0e-9}}']
    if checkpointing != "the last epoch":
        return [*RUN, *LOGGERS[logging], f"--trainer.callbacks=[{','.join(callbacks)}]"]
    return [*RUN, *LOGGERS[logging], f"--trainer.callbacks=[{callbacks[-1]},{saver()}]"]


def with_(option: list[str], callback: Die) -> list[str]:
    """A row's options, and the callback that ends its first run."""
    args = [f"--trainer.callbacks+={__name__}.Die", f"--trainer.callbacks.step={callback.step}"]
    return [*option, *args, f"--trainer.callbacks.number={int(callback.number)}"]


@pytest.fixture(autouse=True)
def _after_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a state be kept by the clock however long that takes."""
    monkeypatch.setattr(resume_point, "SHARE", 1e9)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """By its length in epochs, the last checkpoint of a run that was never stopped."""
    found, here = {}, Path.cwd()
    for epochs in (6, 8):
        os.chdir(tmp_path_factory.mktemp("uninterrupted"))
        assert main([*options_of("the last epoch", "none"), f"--trainer.max_epochs={epochs}"]) == 0
        found[epochs] = torch.load("runs/Scripted/version_0/checkpoints/last.ckpt", weights_only=True)
    os.chdir(here)
    return found


PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "exact_resume", "epoch", "global_step")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:ModelCheckpoint.*best model")
@pytest.mark.parametrize(
    ("checkpointing", "logging", "moment", "place"),
    [pytest.param(*row, id=", ".join(row), marks=[pytest.mark.slow] * (i >= QUICK)) for i, row in enumerate(MATRIX)],
)
def test_every_pair_of_options(
    checkpointing: str,
    logging: str,
    moment: str,
    place: str,
    uninterrupted: dict[int, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    options, (step, epochs) = options_of(checkpointing, logging), MOMENTS[moment]
    first = [*options, f"--trainer.max_epochs={FIRST}"]
    if moment == "asked to end":
        with pytest.raises(SystemExit, match="143"):
            main(with_(first, Die(step, signal.SIGTERM)))
    elif step is not None:
        with pytest.raises(KilledError):
            main(with_(first, Die(step)))
    else:
        assert main(first) == 0
    runs_before = sorted(path for path in Path().rglob("config.yaml"))
    assert len(runs_before) == 1

    search: list[str] = []
    if place != "the same":
        search = [f"--trainer.default_root_dir={_take_away(place, tmp_path, monkeypatch)}"]
    written = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file() and path.suffix != ".ckpt"}
    places = [Path(), *(Path(one.partition("=")[2]) for one in search)]
    steps = {path.resolve(): _step(path) for place in places for path in place.rglob("*.ckpt")}
    capsys.readouterr()
    caplog.clear()
    again = [*options, f"--trainer.max_epochs={epochs}", *search, "--ckpt_path=last"]
    assert main(again) == 0
    told = capsys.readouterr().out.splitlines()

    # From the newest whole state,
    (line,) = [line for line in caplog.messages if line.startswith("continuing with ")]
    continued = Path(line.removeprefix("continuing with ")).resolve()
    assert steps[continued] == max(steps.values()) == (FIRST * STEPS if step is None else step)
    # bit for bit,
    run = Path(told[-1].removeprefix("run "))
    if moment != "finished":
        end = torch.load(_last(run, checkpointing), weights_only=True)
        for part in PARTS:
            assert_same(uninterrupted[epochs][part], end[part], part)
    # the best is remembered, and tested,
    metrics = json.loads((run / "metrics.json").read_text())
    best = 1.0 if checkpointing in MONITORED else epochs - 1.0
    if checkpointing not in ("by steps, and the best", "by time"):
        assert metrics["test/epoch"] == best
        checkpoint = next(Path(row.removeprefix("checkpoint ")) for row in told if row.startswith("checkpoint "))
        assert checkpoint.exists()
        assert torch.load(checkpoint, weights_only=True)["state_dict"]["epoch"] == best
    # and nothing of the run before was lost.
    for path, content in written.items():
        assert path.read_bytes() == content, path
    if place == "the same":
        assert run != runs_before[0].parent


def _step(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


def _take_away(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts all that a run has left elsewhere, or goes elsewhere; returns where it is now."""
    elsewhere = tmp_path / "elsewhere"
    if place == "another working directory":
        elsewhere.mkdir()
        before = Path.cwd()
        monkeypatch.chdir(elsewhere)
        return before
    elsewhere.mkdir()
    for path in [path for path in Path().iterdir() if path.name != elsewhere.name]:
        if place == "moved":
            shutil.move(path, elsewhere / path.name)
        else:  # files get new times, in an order that says nothing
            shutil.copytree(path, elsewhere / path.name, copy_function=shutil.copy)
            shutil.rmtree(path)
    return elsewhere


def _last(run: Path, checkpointing: str) -> Path:
    found = newest("ckpts" if checkpointing == "a folder of one's own" else run)
    assert found is not None
    return found


# What makes two runs the same.


def settings(**options: Any) -> dict[str, Any]:
    """A resolved configuration with some options, ``data_root="x"`` for one of the data."""
    parts: dict[str, Any] = {"model": {"class_path": "zoo.ViTClassifier", "init_args": {"depth": 4, "lr": 0.1}}}
    parts["data"] = {"class_path": "datamodules.ImageFolderDataModule", "init_args": {"root": "pets", "hflip": 0.5}}
    for name, value in options.items():
        part, _, option = name.partition("_")
        parts[part]["init_args"][option] = value
    return parts


@pytest.mark.parametrize(
    "changed",
    [
        {"model_lr": 0.2, "model_weight_decay": 0.1, "model_warmup_epochs": 3, "model_optimizer": "sgd"},
        {"data_num_workers": 4, "data_batch_size": 3, "data_cache": "ram", "data_on_error": "skip"},
        {"model_grad_checkpointing": True, "model_compile": True},
        {"model_dropout": 0.0, "data_erase": 0.0},  # of a newer release, and as nobody has set them
    ],
    ids=str,
)
def test_a_run_stays_the_same(changed: dict[str, Any]) -> None:
    assert continuing.differences(settings(**changed), settings()) == []


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"model_depth": 6}, "model.depth is 4 there, 6 here"),
        ({"model_dropout": 0.1}, "model.dropout is 0.0 there, 0.1 here"),  # of a newer release, and set
        ({"data_root": "cats"}, "data.root is pets there, cats here"),
        ({"data_hflip": 0.0}, "data.hflip is 0.5 there, 0.0 here"),
    ],
    ids=str,
)
def test_another_run_is_told_by_what_differs(changed: dict[str, Any], told: str) -> None:
    assert continuing.differences(settings(**changed), settings()) == [told]


def test_classes_and_places_are_compared_by_what_they_are(tmp_path: Path) -> None:
    ours, theirs = settings(), settings()
    theirs["model"]["class_path"] = "zoo.vit.ViTClassifier"  # where a class lies may change
    assert continuing.differences(ours, theirs) == []
    theirs["model"]["class_path"] = "zoo.MAEPretrainer"
    assert continuing.differences(ours, theirs) == ["model is zoo.MAEPretrainer there, zoo.ViTClassifier here"]
    assert continuing.differences({**ours, "data": None}, ours)[0].startswith("data is {'class_path'")
    Path("there/pets").mkdir(parents=True)
    moved = settings(data_root=str(tmp_path / "there/pets"))
    assert continuing.differences(moved, settings(), there=str(tmp_path / "there")) == []
    assert continuing.differences(moved, settings(), there="nowhere") != []


@pytest.mark.parametrize("config", ["[1]", "lr", "", None, {"model": None}, 3])
def test_a_checkpoint_with_no_configuration_in_it_is_of_another_run(config, tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"provenance": {"config": config}, "state_dict": {}, "global_step": 1}, path)
    assert continuing._differing(path, settings(), None) == ["it does not say of what it is"]
    assert continuing.in_folder(tmp_path, "model: null") == path  # the newest of all


def test_what_only_evaluation_reads_may_change() -> None:
    for name, options in {
        "FPNDetector": ("score_threshold", "nms_threshold", "max_detections", "views", "merge", "tiles_at_once"),
        "FasterRCNN": ("score_threshold", "nms_threshold", "max_detections", "views", "merge", "tiles_at_once"),
        "GumbelVAE": ("elbo_samples", "iw_samples"),
        "MAEPretrainer": ("predict_ratio",),
    }.items():
        args = dict.fromkeys(options, 1)
        here, there = ({"model": {"class_path": f"zoo.{name}", "init_args": which}} for which in (args, {}))
        assert continuing.differences(here, there) == []
        assert set(options) <= set(signature(continuing.class_of(f"zoo.{name}")).parameters)


def fit(*options: str, status: int = 0) -> None:
    assert main([*RUN, "--trainer.max_epochs=1", *options]) == status


def test_another_run_is_not_continued_and_it_is_said_why(caplog, capsys) -> None:
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs"]
    fit(*logger)
    fit(*logger, "--model.width=8", "--ckpt_path=last")
    told = next(line for line in caplog.messages if "a new run" in line)
    assert told.startswith("no checkpoint of this model and data in runs/Scripted: a new run; runs/Scripted")
    assert "is of another: model.width is 16 there, 8 here. To continue that: --ckpt_path runs/" in told
    caplog.clear()
    fit(*logger, "--model.lr=0.01", "--data.batch_size=32", "--trainer.max_epochs=2", "--ckpt_path=last")
    assert any(line.startswith("continuing with runs/Scripted/version_0/") for line in caplog.messages)
    assert main(["test", *RUN[1:], *logger, "--model.width=4", "--ckpt_path=last"]) == 2
    assert "there is no checkpoint of this model and data in runs/Scripted; " in capsys.readouterr().err


# What --ckpt_path takes.


def test_words_and_folders(caplog, capsys) -> None:
    options = [*LOGGERS["none"], f"--trainer.callbacks=[{saver(**BEST)}]"]
    fit(*options, "--trainer.max_epochs=4")
    run = Path("runs/Scripted/version_0")
    for asked, epoch in {
        "last": 3,
        "best": 1,
        str(run): 3,
        str(run / "checkpoints"): 3,
        "runs": 3,
        str(next((run / "checkpoints").glob("epoch=1*"))): 1,
    }.items():
        capsys.readouterr()
        assert main(["test", *RUN[1:], *options, f"--ckpt_path={asked}"]) == 0
        assert f"{epoch:.1f}" in "".join(capsys.readouterr().out.split()), asked
    fit(*options, "--trainer.max_epochs=5", f"--ckpt_path={run}")
    assert any(
        "Restored all states from the checkpoint at runs/Scripted/version_0/" in line for line in caplog.messages
    )


def test_mistaken_paths_are_a_line(capsys, monkeypatch) -> None:
    Path("empty").mkdir()
    Path("dangling.ckpt").symlink_to("gone")
    for asked, told in {
        "": "--ckpt_path is empty: name a checkpoint, a run's folder, or last",
        "lst": "there is no checkpoint lst; did you mean last?",
        "bst": "there is no checkpoint bst; did you mean best?",
        "nowhere.ckpt": "there is no checkpoint nowhere.ckpt",
        "hpc": "there is no checkpoint of a requeued job, hpc_ckpt_N.ckpt, in runs",
        "registry:mine": "--ckpt_path registry:mine needs the package litmodels: pip install litmodels",
        "empty": "there is no whole checkpoint in the folder empty: name a .ckpt file, or a run's folder",
        "dangling.ckpt": "dangling.ckpt is a link to gone, which is not there",
        "best": "there is no checkpoint of this model and data in runs",
    }.items():
        for command in ("fit", "test"):
            capsys.readouterr()
            assert main([command, *RUN[1:], *LOGGERS["none"], f"--ckpt_path={asked}"]) == 2
            assert capsys.readouterr().err.splitlines()[-1] == f"zoo: error: {told}", asked
    assert not Path("runs").exists()


def test_a_damaged_newest_is_passed_over_for_the_one_before(caplog) -> None:
    options = [*LOGGERS["none"], f"--trainer.callbacks=[{saver(save_top_k=-1)}]"]
    fit(*options, "--trainer.max_epochs=2")
    folder = Path("runs/Scripted/version_0/checkpoints")
    for path in (folder / "last.ckpt", folder / "epoch=1-step=6.ckpt"):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="epoch=1-step=6.ckpt is damaged.*taking.*epoch=0-step=3.ckpt"):
        fit(*options, "--ckpt_path=last", "--trainer.max_epochs=2")


# A directory for each run.


def test_a_version_that_is_there_is_refused(capsys) -> None:
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs", "--trainer.logger.version=3"]
    fit(*logger)
    fit(*logger, status=2)
    told = "zoo: error: the run runs/Scripted/version_3 is there already: leave the logger's version out"
    assert capsys.readouterr().err.splitlines()[-1].startswith(told)


@pytest.mark.parametrize("logger", ["CSV", "without a folder"])
def test_forked_processes_write_to_one_directory_and_name_it(logger, capsys) -> None:
    options = [*LOGGERS[logger], "--trainer.strategy=ddp_fork", "--trainer.devices=2"]
    for number in range(2):
        fit(*options)
        run = Path(capsys.readouterr().out.splitlines()[-1].removeprefix("run "))
        assert run.name == f"version_{number}"
        assert {path.name for path in run.iterdir()} >= {"config.yaml", "metrics.json", "checkpoints"}
        assert (run / "checkpoints/last.ckpt").exists()
    assert len(list(Path("runs").rglob("config.yaml"))) == 2


# What is printed can be used, and what a checkpoint may not hold is said in time.


def test_a_printed_configuration_runs_and_serves_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--model.width=16", "--model.heads=2", "--model.depth=1", "--model.warmup_epochs=0"]
    small += [*QUIET, "--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1"]
    for command in ("fit", "validate", "predict"):  # by whatever command it was printed
        capsys.readouterr()
        with pytest.raises(SystemExit, match="0"):
            main([command, "-c", "vit/digits", *small, "--print_config"])
        text = capsys.readouterr().out
        assert "num_classes" not in text  # a default, which comes from the data
        Path("mine.yaml").write_text(text)
        assert main(["fit", "-c", "mine.yaml"]) == 0
        run = Path(capsys.readouterr().out.splitlines()[-1].removeprefix("run "))
        assert yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["num_classes"] == 10
    for command in ("validate", "test", "predict"):
        assert main([command, "-c", "mine.yaml", f"--ckpt_path={run}"]) == 0
    with pytest.raises(SystemExit, match="0"):  # what somebody has set stays
        main(["fit", "-c", "vit/digits", "--model.num_classes=10", "--print_config"])
    assert "num_classes: 10" in capsys.readouterr().out


class KeepsState(Callback):
    """State with a NumPy scalar and a date, as people write it."""

    def state_dict(self) -> dict[str, Any]:
        return {"best": np.float64(0.5), "when": datetime.datetime(2024, 1, 1)}


class Number(Callback):
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.callback_metrics["my/score"] = 0.5


def test_state_that_a_checkpoint_may_not_hold_is_said_when_it_is_saved_first(capsys) -> None:
    options = [*LOGGERS["none"], f"--trainer.callbacks=[{saver()},{logger(f'{__name__}.KeepsState')}]"]
    fit(*options, status=1)
    told = capsys.readouterr().err.splitlines()[-1].removeprefix("zoo: error: the checkpoint was not saved: ")
    assert told.startswith("callback KeepsState: state['best'] is a numpy.float64, which cannot be read")
    assert "float(...)" in told
    assert not any(Path("runs").rglob("*.ckpt"))
    fit(*options, "--weights_only=false")  # which the test after the fit knows of as well
    out = capsys.readouterr().out
    assert "test epoch 0.0000" in out
    assert out.splitlines()[-1] == "run runs/Scripted/version_1"


def test_a_plain_number_among_the_metrics_is_saved_and_comes_back(caplog) -> None:
    options = [*LOGGERS["none"], f"--trainer.callbacks=[{saver()},{logger(f'{__name__}.Number')}]"]
    fit(*options)
    fit(*options, "--trainer.max_epochs=2", "--ckpt_path=last")
    assert json.loads(Path("runs/Scripted/version_1/metrics.json").read_text())["my/score"] == 0.5


@pytest.mark.slow
def test_spawned_processes_write_to_one_directory_and_name_it() -> None:
    options = ["-c", "vit/digits", "--model.width=16", "--model.heads=2", "--model.depth=1", "--trainer.max_epochs=1"]
    options += [*QUIET, "--trainer.strategy=ddp_spawn", "--trainer.devices=2", "--trainer.check_val_every_n_epoch=1"]
    done = forked.run([sys.executable, "-m", "zoo", "fit", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = Path(done.stdout.splitlines()[-1].removeprefix("run "))
    assert run == Path("runs/vit/digits/version_0")
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "metrics.json", "checkpoints"}
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
