"""Plain mistakes: each gets one line that says what is wrong and what would work, and a status; none a traceback."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import zoo
from zoo._lightning import Callback, LightningDataModule, LightningModule, Trainer
from zoo.cli import main

ROOT = Path(zoo.__file__).parent.parent


class Net(LightningModule):
    """A foreign module that logs train/loss, val/loss and val/acc."""

    def __init__(self, lr: float = 0.1, name: str = "", monitor: str | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(4, 2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.layer(batch[0].flatten(1)[:, :4]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.layer(batch[0]).mean())
        self.log("val/acc", 0.5)

    def configure_optimizers(self) -> object:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr)
        if self.hparams.monitor is None:
            return optimizer
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": self.hparams.monitor}}


class Loud(Net):
    """Calls Lightning as it does not want to be called."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.log("train/loss", "much")
        return super().training_step(batch, batch_idx)


class Lacks(Net):
    def __init__(self, num_classes: int = 2) -> None:
        raise ImportError("there is no package for this")


class Rows(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((4,), index / 8), index % 2


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        while True:
            yield torch.zeros(1, 16, 16), 0


class Data(LightningDataModule):
    """Four batches an epoch, or no end of them; two to validate with, or none."""

    def __init__(self, endless: bool = False, val: bool = True) -> None:
        super().__init__()
        self.endless, self.val = endless, val

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Endless() if self.endless else Rows(), batch_size=2)

    def val_dataloader(self) -> DataLoader | list:
        return DataLoader(Rows(), batch_size=4) if self.val else []


class MakesFolder(Callback):
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        os.makedirs("occupied/below")


NAMES = {"model": f"{__name__}.Net", "data": f"{__name__}.Data"}
NET = ["--model", NAMES["model"], "--data", NAMES["data"]]
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
SHORT = [*NET, *QUIET, "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1"]
VIT = [
    "--model=ViTClassifier",
    "--model.backbone=vit_tiny_patch16_224",
    "--model.image_size=16",
    "--model.patch_size=8",
]
VIT += ["--model.in_channels=1", "--model.width=16", "--model.heads=2", "--model.depth=1", "--model.num_classes=2"]


@pytest.fixture(autouse=True)
def _as_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line adds to the path where it stands."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("ZOO_DEBUG", raising=False)


def refused(capsys: pytest.CaptureFixture[str], *args: str, status: int = 2) -> str:
    """The one line that a mistake gets."""
    capsys.readouterr()
    assert main(list(args)) == status
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Seed set to")]
    assert [line for line in lines if line.startswith("zoo: error: ")] == lines[-1:], lines
    return lines[-1].removeprefix("zoo: error: ")


def callbacks(*named: tuple[str, dict[str, object]]) -> str:
    """Takes the place of all callbacks."""
    found = [{"class_path": name, "init_args": settings} for name, settings in named]
    return f"--trainer.callbacks={json.dumps(found)}"


def recipe(**settings: object) -> str:
    Path("recipe.yaml").write_text(yaml.safe_dump(NAMES | settings, sort_keys=False))
    return "recipe.yaml"


# Where a run is written.


def a_file(path: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).touch()


OBSTACLES: dict[str, tuple[Callable[[], object], str]] = {
    "a file": (lambda: a_file("place"), "place is a file"),
    "below a file": (lambda: (a_file("elsewhere/file"), Path("place").symlink_to("elsewhere")), "place/file is a file"),
    "a dangling link": (
        lambda: Path("place").symlink_to("no/where"),
        "place is a link to no/where, which is not there",
    ),
}
SAVER = ("ModelCheckpoint", {"save_last": True})
PLACES = {
    "TensorBoardLogger": ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=PLACE"],
    "CSVLogger": ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=PLACE"],
    "a list": ['--trainer.logger=[{"class_path":"CSVLogger","init_args":{"save_dir":"PLACE"}}]'],
    "Lightning's": ["--trainer.logger=true", "--trainer.default_root_dir=PLACE"],
    "none": ["--trainer.logger=false", "--trainer.default_root_dir=PLACE", callbacks(SAVER)],
    "dirpath": ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.dirpath=PLACE"],
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_cannot_be_written_is_told_before_anything_runs(
    place: str, obstacle: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make, said = OBSTACLES[obstacle]
    make()
    path = "place/file/runs" if obstacle == "below a file" else "place"
    before = sorted(Path().rglob("*"))
    told = refused(capsys, "fit", *SHORT, *(option.replace("PLACE", path) for option in PLACES[place]))
    assert told.startswith(f"nothing can be written to {path}")
    assert f": {said}; make room there, or set another " in told
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    "make", [lambda: a_file("runs"), lambda: Path("runs").symlink_to("nowhere"), lambda: a_file("runs/Net")]
)
def test_the_default_place_is_no_other(make: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> None:
    make()
    assert refused(capsys, "fit", *SHORT).endswith("make room there, or set another trainer.logger.save_dir")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a file system that takes no files, from root neither")
def test_a_file_system_that_takes_no_files(capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, "fit", *SHORT, "--trainer.logger=false", "--trainer.default_root_dir=/proc/runs")
    assert told.startswith("nothing can be written to /proc/runs: /proc takes no files (")


def test_what_is_not_written_to_may_be_anything() -> None:
    a_file("file")
    assert main(["fit", *SHORT, "--trainer.default_root_dir=file"]) == 0  # the logger has a folder of its own
    a_file("place")
    assert (
        main(["fit", *SHORT, *PLACES["CSVLogger"][:1], "--trainer.logger.save_dir=place", "--trainer.fast_dev_run=1"])
        == 0
    )


def test_a_link_to_a_folder_is_one() -> None:
    Path("elsewhere").mkdir()
    Path("runs").symlink_to("elsewhere")
    assert main(["fit", *SHORT]) == 0
    assert Path("elsewhere/Net/version_0/config.yaml").is_file()


def test_a_folder_that_cannot_be_made_on_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    a_file("occupied")
    told = refused(capsys, "fit", *SHORT, f"--trainer.callbacks+={__name__}.MakesFolder", status=1)
    assert told == "the folder occupied/below cannot be made: Not a directory"


# Metrics.


@pytest.mark.parametrize(
    ("who", "options"),
    [
        ("EarlyStopping", [callbacks(("EarlyStopping", {"monitor": "val/los"}))]),
        ("ModelCheckpoint", [callbacks(("ModelCheckpoint", {"monitor": "val/los"}))]),
        ("ModelCheckpoint", [callbacks(("ModelCheckpoint", {"monitor": "val/los", "save_last": "link"}))]),
        ("ReduceLROnPlateau", ["--model.monitor=val/los"]),
    ],
)
def test_a_mistyped_metric_is_told_with_its_like(
    who: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(capsys, "fit", *SHORT, *options, status=1)
    assert told == f"{who} monitors 'val/los', and there is no such metric; did you mean val/loss?"


@pytest.mark.parametrize("options", [["--data.val=false"], ["--trainer.limit_val_batches=0"]])
def test_a_metric_of_validation_that_is_left_out(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    watch = callbacks(("EarlyStopping", {"monitor": "val/acc"}))
    told = refused(capsys, "fit", *SHORT, watch, *options, status=1)
    assert told == "EarlyStopping monitors 'val/acc', and there is no such metric; there are train/loss"


def test_two_savers_that_are_alike(capsys: pytest.CaptureFixture[str]) -> None:
    saver = ("ModelCheckpoint", {"monitor": "val/acc"})
    told = refused(capsys, "fit", *SHORT, callbacks(saver, saver))
    assert told.startswith("a checkpoint cannot tell two ModelCheckpoint with the same settings apart")


# Numbers.


@pytest.mark.parametrize("value", ["100", "5", "5.0"])
def test_validation_after_more_batches_than_there_are(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, "fit", *SHORT, f"--trainer.val_check_interval={value}", status=1)
    assert told.startswith(f"val_check_interval is {int(float(value))}, and an epoch has 4 training batches: set 4 at")
    assert "check_val_every_n_epoch null" in told
    counted_on = ["--trainer.val_check_interval=5", "--trainer.check_val_every_n_epoch=null"]
    assert main(["fit", *SHORT, "--trainer.max_epochs=2", *counted_on]) == 0


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("accumulate_grad_batches", "0", "expected at least 1"),
        ("accumulate_grad_batches", "-2", "expected at least 1"),
        ("check_val_every_n_epoch", "0", "expected at least 1"),
        ("gradient_clip_val", "-1", "expected at least 0"),
        ("gradient_clip_val", ".nan", "expected at least 0"),
        ("log_every_n_steps", "-1", "expected at least 0"),
        ("min_epochs", "-1", "expected at least 0"),
        ("min_steps", "-1", "expected at least 0"),
        ("num_sanity_val_steps", "-2", "expected at least -1"),
        ("val_check_interval", "0", "without validation: limit_val_batches 0"),
        ("val_check_interval", "0.0", "without validation: limit_val_batches 0"),
        ("max_epochs", "0", "there is nothing to train; zoo validate and zoo test measure weights as they are"),
        ("max_steps", "0", "there is nothing to train"),
        ("limit_train_batches", "0", "there is nothing to train"),
        ("limit_train_batches", "0.0", "there is nothing to train"),
    ],
)
def test_a_number_out_of_range_names_its_option(
    option: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    number = yaml.safe_load(value)
    shown = 0 if number == 0 else number
    told = refused(capsys, "fit", *SHORT, f"--trainer.{option}={value}")
    assert told.startswith(f"trainer.{option} is {shown}: ")
    assert told.endswith(said) or said in told
    lines = ["trainer:", "  max_epochs: 1", "  logger: false", f"  {option}: {value}"]
    lines = [line for line in lines if not line.startswith("  max_epochs: 1") or option != "max_epochs"]
    Path("mine.yaml").write_text("\n".join(lines))
    assert refused(capsys, "fit", "-c", "mine.yaml", *NET, *QUIET) == f"mine.yaml, line {len(lines)}: {told}"


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("max_epochs=-2", "`max_epochs` must be a non-negative integer or -1. You passed in -2."),
        ("max_steps=-2", "`max_steps` must be a non-negative integer or -1 (infinite steps). You passed in -2."),
        ("limit_train_batches=1.5", "invalid value 1.5 for limit_train_batches"),
        ("val_check_interval=-1", "invalid value -1 for val_check_interval"),
        ("devices=0", "`Trainer(devices='0')` value is not a valid input"),
        ("devices=two", "should be an int > 0"),
        ("num_nodes=0", "`num_nodes` must be a positive integer, but got 0."),
        ("fast_dev_run=-1", "fast_dev_run=-1 is not a valid configuration"),
        ("max_time=soon", "is not a valid duration"),
        ("accelerator=tpu", "torch_xla"),
        ("logger.version=3", "trainer.logger.version: of which class? Name it first, as in --trainer.logger CLASS"),
    ],
)
def test_what_the_trainer_refuses_is_a_line_too(option: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, "fit", *SHORT, f"--trainer.{option}")


@pytest.mark.parametrize("name", ["max_steps", "num_nodes", "accumulate_grad_batches", "devices", "strategy"])
def test_nothing_is_no_value_of_most_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, "fit", "-c", recipe(trainer={"max_epochs": 1, name: None}), *QUIET)
    assert told == f"recipe.yaml, line 5: trainer.{name} is null: give it a value, or leave it out"


@pytest.mark.parametrize("seed", ["-1", "4294967296", "10000000000000000000000"])
def test_a_seed_out_of_range(seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = f"seed_everything is {seed}: expected a whole number from 0 to 4294967295"
    assert refused(capsys, "fit", *SHORT, "--seed_everything", seed) == said
    file = recipe(seed_everything=int(seed))
    assert refused(capsys, "fit", "-c", file, *QUIET) == f"recipe.yaml, line 3: {said}"
    assert refused(capsys, "validate", "-c", file, *QUIET).endswith(said)


@pytest.mark.parametrize("seed", ["abc", "1.5", "", "null"])
def test_a_seed_that_is_no_number(seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "seed_everything: expected bool or int" in refused(capsys, "fit", *SHORT, "--seed_everything", seed)


@pytest.mark.parametrize("seed", ["0", "4294967295", "true", "false"])
def test_the_seeds_that_there_are(seed: str) -> None:
    assert main(["fit", *SHORT, "--trainer.fast_dev_run=1", "--seed_everything", seed]) == 0


# Data without an end.


def test_a_schedule_over_endless_data_asks_for_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    endless = [
        *VIT,
        "--data",
        NAMES["data"],
        "--data.endless=true",
        "--data.val=false",
        *QUIET,
        "--model.warmup_epochs=0",
    ]
    told = refused(capsys, "fit", *endless, "--trainer.max_epochs=1", status=1)
    assert "max_epochs" not in told
    assert "max_steps" in told
    assert "limit_train_batches" in told
    assert main(["fit", *endless, "--trainer.max_epochs=1", "--trainer.max_steps=2"]) == 0
    assert main(["fit", *endless, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]) == 0
    told = refused(capsys, "fit", *endless, "--trainer.max_epochs=-1", status=1)
    assert "set the Trainer's max_epochs or max_steps" in told


# YAML.

NETS = f"model:\n  class_path: {NAMES['model']}\ndata: {NAMES['data']}\n"


LOGGER = "trainer:\n  logger:\n    class_path: CSVLogger\n"
SAVERS = "trainer:\n  callbacks:\n  - class_path: ModelCheckpoint\n    init_args:\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (NETS + "trainer:\n  max_epochs: 1\ntrainer:\n", "line 6: trainer stands there twice, first on line 4"),
        (
            NETS + "trainer:\n  min_steps: 1\n\n  min_steps: 2\n",
            "line 7: min_steps stands there twice, first on line 5",
        ),
        (NETS + '"data": x\n', "line 4: data stands there twice, first on line 3"),
        (NETS + "trainer: {min_steps: 1,\n min_steps: 1}\n", "line 5: min_steps stands there twice, first on line 4"),
        (NETS + SAVERS + "      mode: min\n      mode: max\n", "line 9: mode stands there twice, first on line 8"),
        (NETS + "trainer: &a {min_steps: 1, min_steps: 2}\nx: *a\n", "line 4: min_steps stands there twice"),
        ('{"model": "x",\n "data": "y",\n "model": "z"}', "line 3: model stands there twice, first on line 1"),
        (
            NETS + "trainer:\n",
            "line 4: trainer is empty: expected settings below it, such as max_epochs: 9; or leave it out",
        ),
        (NETS + "trainer: # none\n  # max_epochs: 3\n", "line 4: trainer is empty"),
        (NETS + "trainer: null\n", "line 4: trainer is empty"),
        (NETS + "trainer: []\n", "line 4: trainer is empty"),
        (NETS + "trainer: 3\n", "line 4: trainer is 3: expected settings below it"),
        (NETS + "trainer: [3]\n", "line 4: trainer is a list: expected settings below it"),
        ("trainer:", "line 1: trainer is empty"),
        ("model:\ndata: x\n", "line 1: model is empty: expected a class"),
        ("model: {}\ndata: x\n", "line 1: model is empty: expected a class"),
        ("model: x\ndata:\n", "line 2: data is empty: expected a class"),
        (NETS + "guards:\n", "line 4: guards is empty: expected true or false"),
        (NETS + "seed_everything: ~\n", "line 4: seed_everything is empty: expected a whole number"),
        ("model:\n  class_path: x\n  init_args:\n", "line 3: init_args is empty: expected options below it"),
        ("model:\n  class_path: x\n  init_args: [1]\n", "line 3: init_args is a list: expected options below it"),
        ("model:\n  class_path:\ndata: y\n", "line 2: class_path is empty: expected the name of a class"),
        ("model:\n  class_path: 3\ndata: y\n", "line 2: class_path is 3: expected the name of a class"),
        (NETS + LOGGER + "    init_args:\n", "line 7: init_args is empty"),
        (NETS + "trainer:\n  callbacks:\n  -\n", "line 5: trainer.callbacks: expected class_path: NAME"),
        (NETS + "3: 4\n", "line 4: 3 is no option: expected 'model:', 'data:' and the like"),
    ],
)
def test_a_mistake_in_yaml_names_file_and_line(text: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(text)
    assert refused(capsys, "fit", "-c", "mine.yaml", *QUIET).startswith(f"mine.yaml, {said}")


@pytest.mark.parametrize(
    "settings",
    [
        "trainer: {}\n",
        "trainer:\n  max_steps: 3\n",
        "trainer:\n  <<: {max_epochs: 7, max_steps: 5}\n  max_steps: 3\n",  # what is written wins
        "trainer:\n  <<: {max_epochs: 7}\n  <<: {max_steps: 3}\n",
        "trainer:\n  <<: [{max_epochs: 7}, {max_steps: 3}]\n",
        "ckpt_path:\n",
        "trainer:\n  callbacks:\n  logger:\n",  # the Trainer's own
        "trainer:\n  logger:\n    class_path: CSVLogger\n    init_args: &same {save_dir: x}\n  callbacks:\n"
        "  - {class_path: ModelCheckpoint, init_args: {}}\n",
    ],
)
def test_what_is_no_mistake_in_yaml(settings: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(NETS + settings)
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "-c", "mine.yaml", "--print_config"])
    found = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert found["max_steps"] == (3 if "max_steps" in settings else -1)
    assert found["max_epochs"] == (7 if "max_epochs" in settings else None)


def test_anchors_are_looked_into_once_and_may_hold_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(NETS + "trainer: &a\n  callbacks: &b\n  - *b\n")
    assert refused(capsys, "fit", "-c", "mine.yaml").startswith("mine.yaml, line 5: ")


@pytest.mark.parametrize(
    ("part", "text", "said"),
    [
        ("--model", "class_path: x\ninit_args: {lr: 1, lr: 2}\n", "line 2: lr stands there twice, first on line 2"),
        ("--trainer", "max_epochs: 1\n\nmax_epochs: 2\n", "line 3: max_epochs stands there twice, first on line 1"),
        ("--trainer.logger", "class_path: CSVLogger\ninit_args:\n", "line 2: init_args is empty"),
        ("--trainer.callbacks", "- class_path: Timer\n  class_path: Timer\n", "line 2: class_path stands there twice"),
        ("--data", "class_path: [\n", "line 2: not valid YAML"),
    ],
)  # fmt: skip
def test_files_that_stand_for_a_part_are_looked_through_as_well(
    part: str, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("parts").mkdir()
    Path("parts/part.yaml").write_text(text)
    assert refused(capsys, "fit", *SHORT, part, "parts/part.yaml").startswith(f"parts/part.yaml, {said}")
    assert refused(capsys, "fit", *SHORT, f"{part}=parts/part.yaml").startswith(f"parts/part.yaml, {said}")
    assert refused(capsys, "fit", *SHORT, part, "parts/prt.yaml") == (
        "there is no file parts/prt.yaml; did you mean part.yaml?"
    )
    inside: object = "parts/part.yaml"
    for name in reversed(part.removeprefix("--").split(".")):
        inside = {name: inside}
    assert refused(capsys, "fit", "-c", recipe(**inside)).startswith(f"parts/part.yaml, {said}")  # type: ignore[arg-type]


def test_a_file_that_is_an_option_of_a_class_is_its_own_matter() -> None:
    Path("names.yaml").write_text("a: 1\na: 2\n")
    file = recipe(model={"class_path": NAMES["model"], "init_args": {"name": "names.yaml"}})
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "-c", file, "--print_config"])


# Others' errors, and what Lightning says.


def test_a_fault_of_somebody_elses_class_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="values cannot be logged"):
        main(["fit", *SHORT, "--model", f"{__name__}.Loud"])
    with pytest.raises(ImportError, match="there is no package for this"):
        main(["fit", *SHORT, "--model", f"{__name__}.Lacks"])


def test_an_image_size_of_nothing_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    digits = ["--data=DigitsDataModule", "--data.image_size=16", *QUIET]
    told = refused(capsys, "fit", *VIT[:-1], *digits, "--model.image_size=0")
    assert told == "image_size is 0: expected at least 1"


def test_nothing_is_advertised(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *SHORT, callbacks()]) == 0  # without a ModelCheckpoint, for which there is an advertisement
    said = caplog.text + "".join(capsys.readouterr())
    assert "max_epochs=1" in said  # what Lightning has to say is said
    assert "Tip:" not in said


# Locales.


def in_a_locale_without_umlauts(commands: list[list[str]]) -> tuple[list[str], str, str]:
    """What each command line ends with, and what they print: in one process, because importing takes seconds."""
    code = (
        f"import sys, json; sys.path.append({str(Path(__file__).parent)!r})\n"
        "from zoo.cli import main\n"
        "for args in json.loads(sys.argv[1]):\n"
        "    try: status = main(args)\n"
        "    except SystemExit as stop: status = stop.code\n"
        "    print('status', status)\n"
    )
    env = os.environ | {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code, json.dumps(commands)], capture_output=True, env=env)
    out, err = done.stdout.decode(), done.stderr.decode()
    return [line.split()[1] for line in out.splitlines() if line.startswith("status ")], out, err


def test_what_needs_no_torch_needs_no_locale() -> None:
    Path("übung.yaml").write_text("model:\n  # größer\n  class_path:\n", "utf-8")
    argument = "übung.yaml".encode().decode("ascii", "surrogateescape")  # as such a process gets it
    found, out, err = in_a_locale_without_umlauts([["list"], ["fit", "-c", argument], ["fit", "-c", "übung"], ["übe"]])
    assert found == ["0", "2", "2", "2"], err
    assert "vit/digits" in out
    assert "übung.yaml, line 3: class_path is empty" in err
    assert "there is no recipe or file 'übung'" in err
    assert "unknown command 'übe'" in err


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_texts_are_read_and_written_as_utf_8_in_every_locale() -> None:
    named = NETS.replace("data:", '  init_args: {name: "Größe ± ×"}\ndata:')
    Path("recipe.yaml").write_text(f"# Ümläute\n{named}", "utf-8")
    fit = ["fit", "-c", "recipe.yaml", *QUIET, "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1"]
    commands = [
        ["fit", "-c", "vit/digits", "--print_config"],
        [*fit, "--print_config"],
        fit,
        ["validate", "-c", "runs/Net/version_0/config.yaml", "--ckpt_path", "last"],
        [*fit, "--model.name", "füß", "--print_config"],
        [*fit, "--model.nme", "füß"],
        [*fit, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=läufe"],
    ]
    found, out, err = in_a_locale_without_umlauts(commands)
    assert found == [*"00000", *"22"], err
    assert out.count("name: Größe ± ×") == 1
    assert out.count("name: füß") == 1
    assert "has no option 'nme'; did you mean name?" in err
    assert "nothing can be written to läufe/Net: this locale does not have its letters" in err
    assert "name: Größe ± ×" in Path("runs/Net/version_0/config.yaml").read_text("utf-8")


def test_arguments_of_a_locale_without_umlauts_are_read_as_utf_8(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["fit", *SHORT, "--model.name", "füß".encode().decode("ascii", "surrogateescape"), "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["name"] == "füß"
