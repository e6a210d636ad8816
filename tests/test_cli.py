"""The command line, through the command line: in this process where that proves as much, else in one of its own."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import forked
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import datamodules
import zoo
from zoo._lightning import Callback, LightningDataModule, LightningModule, Trainer
from zoo.cli import main, mistakes, recipes
from zoo.cli.main import COMMANDS

ROOT = Path(zoo.__file__).parent.parent


class ToyClassifier(LightningModule):
    """A foreign classifier: nothing of the zoo in it."""

    def __init__(
        self, num_classes: int = 1000, lr: float = 0.1, weights: str | None = None, act: str | nn.Module = "none"
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["weights", "act"])
        if weights is not None:
            raise FileNotFoundError(weights)
        self.layer = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(1)[:, :64])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test/acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    validation_step = test_step

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).softmax(1)

    def configure_optimizers(self) -> object:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


class Plain(LightningModule):
    """Has no classes, and nothing to test."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layer = nn.Linear(64, width)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.layer(batch[0].flatten(1)).mean()

    def configure_optimizers(self) -> object:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Interrupt(Callback):
    """SLURM's word that the job's time is over, in its second step."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        if batch_idx == 1:
            os.kill(os.getpid(), signal.SIGUSR1)


class Dots(Dataset):
    def __init__(self, broken: bool = False) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.broken:
            datamodules.DigitsDataModule(image_size=-1)
        return torch.full((1, 8, 8), index / 8), index % 4


class ToyData(LightningDataModule):
    """A foreign data module."""

    num_classes: int | None = 4

    def __init__(self, batch_size: int = 4, workers: int = 0, broken: bool = False) -> None:
        super().__init__()
        self.batch_size, self.workers, self.broken = batch_size, workers, broken

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Dots(self.broken), batch_size=self.batch_size, num_workers=self.workers)

    test_dataloader = val_dataloader = predict_dataloader = train_dataloader


class UnlabelledData(ToyData):
    @property
    def num_classes(self) -> int:  # type: ignore[override]
        raise AttributeError("no labels")


class UncountedData(ToyData):
    num_classes = None


TOY = ["--model", "ToyClassifier", "--data", "ToyData"]
DIGITS = ["--data", "DigitsDataModule"]
VIT = ["--model=ViTClassifier", "--model.backbone=vit_tiny_patch16_224", "--model.image_size=8", "--model.patch_size=4"]
VIT += ["--model.in_channels=1", "--model.width=16", "--model.heads=2", "--model.depth=1", "--model.warmup_epochs=0"]
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
SHORT = [*QUIET, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.log_every_n_steps=1"]


@pytest.fixture(autouse=True)
def _as_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line adds to the path where it stands."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("ZOO_DEBUG", raising=False)


def run(*args: str, code: str | None = None, new: bool = False, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["-c", code, *args] if code else ["-m", "zoo", *args]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    start = subprocess.run if new else forked.run
    return start(
        [sys.executable, *command], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, **env}
    )


def refused(capsys: pytest.CaptureFixture[str], *args: str, status: int = 2) -> str:
    """The one line that a mistake gets."""
    capsys.readouterr()
    assert main(list(args)) == status
    lines = [line for line in capsys.readouterr().err.splitlines() if line != "Seed set to 0"]
    assert [line for line in lines if line.startswith("zoo: error: ")] == lines[-1:], lines
    return lines[-1].removeprefix("zoo: error: ")


def config(name: str = "recipe.yaml", **settings: object) -> str:
    Path(name).write_text(yaml.safe_dump(settings))
    return name


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> dict:
    """The configuration that a command line amounts to."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        main([*args, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def only(pattern: str) -> Path:
    (found,) = Path().glob(pattern)
    return found


# What answers at once.


def test_start_needs_no_torch() -> None:
    code = (
        "import sys; from zoo.cli import main\n"
        "for args in ['--version'], ['--help'], ['list'], [], ['fit', '--help'], ['fit', '-c', 'nowhere'], ['fti']:\n"
        "    main(args)\n"
        "heavy = {'torch', 'lightning', 'pytorch_lightning', 'timm', 'numpy', 'jsonargparse'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = run(code=code, new=True)
    assert done.returncode == 0, done.stderr


def test_version_help_and_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"zoo {zoo.__version__}\n"
    for args in ["--help"], ["-h"], []:
        assert main(args) == 0
        out = capsys.readouterr().out
        assert all(command in out for command in COMMANDS)
    assert main(["predict", "--help"]) == 0
    assert "--data.predict_root" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_of_its_arguments(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: zoo {command}")
    assert max(map(len, out.splitlines())) <= 120
    own = [option for action in COMMANDS[command].arguments()._actions for option in action.option_strings[:1]]
    hidden = {"--cell", "--channels_last", "--grad_checkpointing", "--batch_size", "--image_size", "--num_workers"}
    assert all(option in out for option in own if option not in hidden)
    if command not in ("list", "benchmark compare", "analyze-vit"):
        assert "-c RECIPE" in out
        assert "--strict-imports" in out


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_recipe_may_stand_behind_the_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, command, "vit/digits") == printed(capsys, command, "-c", "vit/digits")
    assert "did you mean vit/digits?" in refused(capsys, command, "vit/digts", "--model.lr", "1")


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = dict(line.split(maxsplit=1) for line in lines if line.startswith("  "))
    for package in (zoo, datamodules):
        for name in package._EXPORTS:
            assert listed[name] == getattr(package, name).__doc__.splitlines()[0]
    shipped = {
        path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in ROOT.glob("configs/*/**/*.yaml")
    }
    assert shipped == {*recipes.recipes(), *recipes.hardware()} <= set(listed)
    assert "defaults" not in listed


def test_whole_help_is_lightnings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--trainer.help"])
    assert "--trainer.accumulate_grad_batches" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args",
    [
        *([], ["--version"], ["--help"], ["list"]),
        *([*command.split(), "--help"] for command in COMMANDS),
        *(
            ["fit", f"--{option}"]
            for option in ("trainer.help", "model.help=ViTClassifier", "data.help=DigitsDataModule")
        ),
        *(["fit", "vit/digits", "--print_config"], ["fti"], ["fit", "vit/digits", "--model.lrr", "1"]),
    ],
    ids=" ".join,
)
def test_what_nobody_reads_ends_quietly_as_by_sigpipe(args: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    wrong = args[:1] == ["fti"] or "--model.lrr" in args
    with tempfile.TemporaryFile("w+") as file:
        streams = {"stdout": file, "stderr": writer} if wrong else {"stdout": writer, "stderr": file}
        status = forked.Popen([sys.executable, "-m", "zoo", *args], **streams).wait()
        file.seek(0)
        assert (file.read(), status) == ("", 128 + signal.SIGPIPE)
    os.close(writer)


# Recipes.


def test_a_shipped_recipe_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    settings = printed(capsys, "fit", "-c", "vit/digits", "--model.lr", "0.5")
    recipe = yaml.safe_load((ROOT / "configs/vit/digits.yaml").read_text())
    assert settings["model"]["class_path"] == "zoo.ViTClassifier"
    assert settings["model"]["init_args"] | recipe["model"]["init_args"] | {"lr": 0.5} == settings["model"]["init_args"]
    assert len(settings["trainer"]["callbacks"]) == len(recipe["trainer"]["callbacks"])  # not the defaults as well


@pytest.mark.parametrize(
    "args",
    [
        ["fit", "-c", "a.yaml", "--config", "b.yaml", "--model.lr", "3"],
        ["fit", "--model.lr", "3", "-c", "a.yaml", "--config=b.yaml"],
        ["-c", "a.yaml", "fit", "--model.lr=3", "-c", "b.yaml"],
        ["-c", "a.yaml", "-c=b.yaml", "fit", "--model.init_args.lr", "3"],
        ["fit", "a.yaml", "b.yaml", "--model.lr", "3"],
        ["fit", "a.yaml", "--model.lr", "3", "-c", "b.yaml"],
    ],
)
def test_recipes_compose_and_options_win(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    model = {"class_path": "ToyClassifier", "init_args": {"lr": 1.0, "num_classes": 4}}
    config("a.yaml", model=model, data="ToyData", trainer={"max_epochs": 1})
    config("b.yaml", model={"init_args": {"lr": 2.0}}, trainer={"max_epochs": 2})
    settings = printed(capsys, *args)
    assert settings["model"]["init_args"] == {"lr": 3.0, "num_classes": 4, "weights": None, "act": "none"}
    assert settings["trainer"]["max_epochs"] == 2


def test_a_recipe_replaces_the_default_callbacks_and_an_option_adds_to_them(capsys: pytest.CaptureFixture[str]) -> None:
    def names(*args: str) -> list[str]:
        settings = printed(capsys, "fit", *TOY, *args)
        return [callback["class_path"].split(".")[-1] for callback in settings["trainer"]["callbacks"]]

    defaults = names()
    assert {"ModelCheckpoint", "LearningRateMonitor", "NonFiniteGuard", "SavePictures"} <= set(defaults)
    assert names("--trainer.callbacks+=RichModelSummary") == [*defaults, "RichModelSummary"]
    assert names("-c", config(trainer={"callbacks": [{"class_path": "ModelSummary"}]})) == ["ModelSummary"]


# Mistakes: one line, what was meant, exit status 2.


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["fti"], "unknown command 'fti'; did you mean fit?"),
        (["fit", "-c", "vit/digts"], "there is no recipe or file 'vit/digts'; did you mean vit/digits?"),
        (["fit", "-c"], "-c needs a recipe or a file"),
        (["fit"], "--data and --model are missing"),
        (["fit", "--model.lr", "1"], "model.lr: of which class? Name a recipe with -c, or --model CLASS"),
        (["fit", "--model", "ToyClasifier"], "model: unknown class 'ToyClasifier'; did you mean ToyClassifier?"),
        (["fit", "--model", "zoo.vit.ViTClasifier"], "did you mean ViTClassifier?"),
        (["fit", "--model", "nowhere.Net"], "model: cannot use class 'nowhere.Net': No module named 'nowhere'"),
        (["fit", "--model", "ToyData"], "model: ToyData is a class, but of another kind"),
        (["fit", *TOY, "--model.lrr", "1"], "ToyClassifier has no option 'lrr'; did you mean lr?"),
        (["fit", *TOY, "--data.bach_size", "1"], "ToyData has no option 'bach_size'; did you mean batch_size?"),
        (["fit", *TOY, "--trainer.max_epoch", "1"], "Trainer has no option 'max_epoch'; did you mean max_epochs?"),
        (["fit", *TOY, "--seed", "1"], "unknown option --seed"),
        (["fit", *TOY, "--trainer.callbacks", "ModelCheckpont"], "did you mean ModelCheckpoint?"),
        (["fit", *TOY, "--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.monitr=x"], "did you mean monitor?"),
        (["fit", *TOY, "--model.lr", "high"], "lr of ToyClassifier: expected float, got 'high'"),
        (["fit", *TOY, "--trainer.max_epochs", "x"], "trainer.max_epochs: expected int or null, got 'x'"),
        (["fit", *TOY, "--trainer.accelerator", "gpuu"], "invalid accelerator name: `accelerator='gpuu'`"),
        (["fit", *VIT, *DIGITS, "--model.loss", "bse"], "unknown loss 'bse': did you mean bce?"),
        (["fit", *VIT, *DIGITS, "--model.backbone", "vit_tinny_patch16_224"], "vit_tiny_patch16_224"),
        (["fit", *VIT, *DIGITS, "--model.image_size", "9"], "image_size 9x9 is not divisible by the patch size 4x4"),
        (["fit", *TOY, "--model.act.class_path", "torch.nn.Relu"], "module 'torch.nn' has no attribute 'Relu'"),
        (["fit", *TOY, "stray"], "unexpected argument 'stray'"),
    ],
)  # fmt: skip
def test_a_typo_gets_one_line(args: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in refused(capsys, *args)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "model:\n  class_path: ToyClassifier\n  init_args:\n    lrr: 1\n",
            "line 4: ToyClassifier has no option 'lrr'",
        ),
        ("model:\n  class_path: ToyClasifier\n", "line 2: model: unknown class 'ToyClasifier'; did you mean"),
        ("model:\n  class_pth: ToyClassifier\n", "line 2: model.class_pth: of which class?"),
        ("modle:\n  class_path: ToyClassifier\n", "line 1: unknown option 'modle'; did you mean model?"),
        ("trainer:\n  max_epoch: 3\n", "line 2: unknown option 'trainer.max_epoch'; did you mean trainer.max_epochs?"),
        ("model:\n  class_path: ToyClassifier\n  init_args: [\n", "line 4: not valid YAML: expected the node content"),
        ("just words", "expected settings such as 'model:' and 'data:', got 'just words'"),
        ("", "expected settings"),
    ],
)
def test_a_typo_in_a_recipe_names_file_and_line(text: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(text)
    told = refused(capsys, "fit", "-c", "mine.yaml", "--data", "ToyData")
    assert told.startswith("mine.yaml")
    assert expected in told
    assert "did you mean mine.yaml?" in refused(capsys, "fit", "-c", "mien.yaml")


def test_exit_status_of_the_process() -> None:
    done = run("fit", "--model", "ViTClasifier", *DIGITS)
    assert done.returncode == 2
    assert done.stderr == "zoo: error: model: unknown class 'ViTClasifier'; did you mean ViTClassifier?\n"


def test_errors_of_ours_get_a_line_and_others_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert "image_size is -1: expected at least 1" in refused(capsys, "fit", *TOY, *DIGITS, "--data.image_size", "-1")
    told = refused(capsys, "fit", *TOY, *SHORT, "--data.broken", "true", status=1)
    assert told == "image_size is -1: expected at least 1"
    told = refused(capsys, "fit", *TOY, *SHORT, "--data.broken", "true", "--data.workers", "1", status=1)
    assert told == "image_size is -1: expected at least 1"
    with pytest.raises(FileNotFoundError, match="gone"):
        main(["fit", *TOY, *SHORT, "--model.weights", "gone"])


def test_a_new_run_reads_no_checkpoint_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be thousands, on a file server; an error names the newest."""
    monkeypatch.setattr("zoo.cli.run.newest", lambda *_: pytest.fail("looked for"))
    assert main(["fit", *TOY, *SHORT]) == 0


def test_debugging_shows_every_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_DEBUG", "1")
    with pytest.raises(mistakes.Mistake, match="did you mean ToyClassifier"):
        main(["fit", "--model", "ToyClasifier"])


def test_a_batch_of_one_pixel_under_batchnorm_is_a_line(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "-c", "efficientnet/digits", "--data.batch_size", "1", "--data.num_workers", "0"]) == 1
    assert "zoo: error: the last feature map of a batch of one small image" in capsys.readouterr().err


def test_on_purpose_means_a_raise_statement_of_ours() -> None:
    def message(call: object) -> str | None:
        try:
            call()  # type: ignore[operator]
        except Exception as error:
            return mistakes.on_purpose(error)
        raise AssertionError

    assert message(lambda: recipes.find("nowhere")) is not None
    assert message(lambda: recipes.find(None)) is None  # type: ignore[arg-type]  # a TypeError that nobody raised
    assert message(lambda: int("x")) is None


# Classes, of ours and of others.


def test_foreign_module_with_our_data_trains_and_is_tested(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--model", "ToyClassifier", *DIGITS, *SHORT]) == 0
    out = capsys.readouterr().out.splitlines()
    run_dir = Path("runs/ToyClassifier/version_0")
    checkpoint = only("runs/ToyClassifier/version_0/checkpoints/epoch*.ckpt")
    assert out[-2:] == [f"checkpoint {checkpoint}", f"run {run_dir}"]
    accuracy = next(line for line in out if line.startswith("test accuracy "))
    assert accuracy.endswith(" %")
    assert "RBF-kernel SVM on the same split 99.44 %" in out
    saved = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert saved["model"]["init_args"]["num_classes"] == 10
    assert torch.load(checkpoint, weights_only=True)["hyper_parameters"]["num_classes"] == 10


def test_our_module_with_foreign_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *VIT, "--data", "ToyData", *SHORT]) == 0
    assert "test accuracy" in capsys.readouterr().out
    assert (
        yaml.safe_load(Path("runs/ViTClassifier/version_0/config.yaml").read_text())["model"]["init_args"][
            "num_classes"
        ]
        == 4
    )


def test_a_module_without_classes_or_test(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--model", "Plain", "--data", "ToyData", *SHORT]) == 0
    assert "accuracy" not in capsys.readouterr().out
    assert main(["fit", "--model", "Plain", "--data", "ToyData", *QUIET, "--trainer.fast_dev_run", "true"]) == 0
    assert capsys.readouterr().out == ""


def test_switching_off_what_a_recipe_has(capsys: pytest.CaptureFixture[str]) -> None:
    off = ["--trainer.logger=false", "--trainer.enable_checkpointing=false"]  # QUIET has the progress bar
    assert main(["fit", *TOY, *SHORT, *off]) == 0
    out = capsys.readouterr().out
    assert "test accuracy" in out
    assert "checkpoint" not in out
    assert out.endswith("run runs/ToyClassifier/version_0\n")


@pytest.mark.slow
def test_one_of_two_processes_speaks() -> None:
    args = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=1"]
    done = run("fit", *VIT, *DIGITS, *args)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy") == done.stdout.count("run runs/ViTClassifier/version_0") == 1


@pytest.mark.parametrize("written", ["9", "1000"])  # 1000 is the model's default, yet somebody wrote it
def test_num_classes_disagree(written: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, "fit", *TOY, "--model.num_classes", written)
    assert f"num_classes is {written} for the model, but ToyData has 4 classes" in told
    recipe = config(model={"class_path": "ToyClassifier", "init_args": {"num_classes": int(written)}}, data="ToyData")
    assert f"is {written} for the model" in refused(capsys, "fit", "-c", recipe)


@pytest.mark.parametrize("data", ["UnlabelledData", "UncountedData"])
def test_data_that_does_not_know_leaves_num_classes(data: str) -> None:
    args = ["fit", "--model", "ToyClassifier", "--data", data, *SHORT, "--model.num_classes", "7"]
    assert main(args) == 0
    saved = torch.load(only("runs/*/version_0/checkpoints/epoch*.ckpt"), weights_only=True)
    assert saved["state_dict"]["layer.weight"].shape[0] == saved["hyper_parameters"]["num_classes"] == 7


# Checkpoints.


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_no_weights_no_measurement(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, command, *TOY)
    assert told == f"{command} needs trained weights: --ckpt_path FILE or --model.weights FILE"
    checkpoints = [Path("runs", name, "version_0", f"{name}.ckpt") for name in ("Other", "ToyClassifier", "Newer")]
    for age, path in enumerate(checkpoints):
        path.parent.mkdir(parents=True)
        torch.save({}, path)
        os.utime(path, (age, age))
    Path("runs/ToyClassifier/cut.ckpt").write_bytes(b"")  # newer than all, and no use
    assert told + f"; the newest checkpoint is {checkpoints[1]}" == refused(capsys, command, *TOY)
    assert refused(capsys, command, "--model", "Plain", "--data", "ToyData").endswith(str(checkpoints[2]))
    assert refused(capsys, command, *TOY, "--ckpt_path", "no.ckpt").startswith(
        "there is no checkpoint no.ckpt; the newest"
    )
    recipe = config(model={"class_path": "ToyClassifier", "init_args": {"weights": "start"}}, data="ToyData")
    assert "needs trained weights" in refused(capsys, command, "-c", recipe)


def test_a_saved_configuration_serves_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *TOY, *SHORT]) == 0
    checkpoint = ["--ckpt_path", str(only("runs/*/version_0/checkpoints/epoch*.ckpt"))]
    saved = "runs/ToyClassifier/version_0/config.yaml"
    for number, command in enumerate(["test", "validate", "predict"], 1):
        # The weights that training started from need not exist any more.
        assert main([command, "-c", saved, *checkpoint, "--model.weights", "gone"]) == 0
        again = f"runs/ToyClassifier/version_{number}/config.{command}.yaml"
        assert set(yaml.safe_load(Path(again).read_text())) == {"seed_everything", "guards", "trainer", "model", "data"}
        assert main(["fit", "-c", again, *checkpoint, "--trainer.fast_dev_run", "true"]) == 0


def test_last_is_the_newest_whole_checkpoint_of_the_same_model_and_data(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    last = ["--ckpt_path", "last"]
    folder = Path("runs/ToyClassifier")
    assert main(["fit", *TOY, *SHORT, *last]) == 0  # a job that may be started anew always says it
    assert f"no checkpoint of this model and data in {folder}: a new run" in caplog.text
    assert main(["fit", *TOY, *SHORT, "--model.act", "other"]) == 0  # newer, and of another model
    ours = only("runs/*/version_0/checkpoints/epoch*.ckpt")
    cut = folder / "version_1" / "cut.ckpt"
    cut.write_bytes(ours.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match=f"{cut} is damaged, it was cut short, or is no checkpoint: taking {ours}"):
        assert main(["fit", *TOY, *SHORT, "--trainer.max_epochs", "2", *last]) == 0
    assert f"continuing with {ours}" in caplog.text
    assert torch.load(only("runs/*/version_2/checkpoints/epoch*.ckpt"), weights_only=True)["epoch"] == 1
    cut.unlink()
    assert main(["test", *TOY, *SHORT, *last]) == 0
    assert f"continuing with {folder}/version_2/checkpoints" in caplog.text
    told = refused(capsys, "test", *TOY, *SHORT, "--model.act", "third", *last)
    assert told.startswith(f"there is no checkpoint of this model and data in {folder}; {folder}/version_")
    assert "is of another: model.act is" in told


def test_a_checkpoint_says_what_made_it_and_guards_can_be_left_out() -> None:
    assert main(["fit", *TOY, *SHORT]) == 0
    checkpoint = torch.load(only("runs/*/version_0/checkpoints/epoch*.ckpt"), weights_only=True)
    written = Path("runs/ToyClassifier/version_0/config.yaml").read_text()
    made = checkpoint["provenance"]
    assert yaml.safe_load(made["config"]) == yaml.safe_load(written)
    assert written.startswith("# ")
    assert written.splitlines()[0] == made["config"].splitlines()[0]  # Lightning's version
    # What Lightning's load_from_checkpoint needs to build a module by the class of its checkpoint.
    hparams = checkpoint["hyper_parameters"]
    assert hparams["_class_path"] == yaml.safe_load(written)["model"]["class_path"]
    assert hparams["_instantiator"].endswith("cli.instantiate_module")
    assert hparams.items() >= {"num_classes": 4, "lr": 0.1}.items()
    assert torch.__version__.startswith(made["versions"]["torch"])
    assert "exact_resume" in checkpoint
    assert checkpoint["module"].endswith(".ToyClassifier")
    assert "preprocessing" not in checkpoint  # the data states none
    assert main(["fit", *TOY, *SHORT, "--guards", "false"]) == 0
    checkpoint = torch.load(only("runs/*/version_1/checkpoints/epoch*.ckpt"), weights_only=True)
    assert not {"exact_resume", "provenance"} & checkpoint.keys()
    assert checkpoint["module"].endswith(".ToyClassifier")


@pytest.mark.parametrize("last", [[], ["--ckpt_path", "last"]])
def test_a_requeued_job_goes_on_with_its_own_checkpoint(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, last: list[str]
) -> None:
    """SLURM keeps a job's number; another job does not take its checkpoint."""
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0"}
    slurm |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("zoo.callbacks.preemption._requeue", lambda: None)
    options = [*TOY, *SHORT, "--data.batch_size=2", "--trainer.limit_train_batches=4"]
    with pytest.raises(SystemExit, match="143"):
        main(["fit", *options, "--trainer.callbacks+=Interrupt"])
    checkpoint = torch.load("runs/slurm-7/hpc_ckpt_1.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    restored = "Restored all states from the checkpoint at runs/slurm-7/hpc_ckpt_1.ckpt"
    assert restored not in caplog.text
    assert main(["fit", *options, *last]) == 0
    assert restored in caplog.text
    done = torch.load(only("runs/*/version_1/checkpoints/epoch*.ckpt"), weights_only=True)
    assert done["global_step"] == 4
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    caplog.clear()
    assert main(["fit", *TOY, *SHORT]) == 0
    assert "Restored all states" not in caplog.text
    assert torch.load(only("runs/*/version_2/checkpoints/epoch*.ckpt"), weights_only=True)["global_step"] == 2


def test_settings_win_over_the_checkpoint() -> None:
    """Stock LightningCLI takes hyperparameters from the checkpoint, and torch the optimizer's settings."""
    assert main(["fit", *TOY, *SHORT]) == 0
    checkpoint = only("runs/*/version_0/checkpoints/epoch*.ckpt")
    resumed = ["fit", *TOY, *SHORT, "--trainer.max_epochs", "2", "--ckpt_path", str(checkpoint)]
    for number, lr in enumerate([0.1, 0.5], 1):
        assert main([*resumed, "--model.lr", str(lr)]) == 0
        saved = torch.load(only(f"runs/*/version_{number}/checkpoints/epoch*.ckpt"), weights_only=True)
        assert saved["hyper_parameters"]["lr"] == lr
        assert saved["epoch"] == 1
        assert saved["lr_schedulers"][0]["base_lrs"] == [lr]
        # Halved after each of two epochs: the schedule goes on where it was.
        assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(lr / 4)


def test_a_checkpoint_of_another_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--model", "Plain", "--data", "ToyData", *SHORT, "--model.width", "5"]) == 0
    checkpoint = only("runs/*/version_0/checkpoints/epoch*.ckpt")
    told = refused(capsys, "test", *TOY, "--model.num_classes", "4", "--ckpt_path", str(checkpoint), status=1)
    assert told.startswith("the checkpoint is not one of this ToyClassifier")


def test_of_lightnings_command_line_only_what_is_public_is_overridden() -> None:
    """And is there: a name that went would leave stock LightningCLI's behaviour, without a word."""
    from zoo.cli.run import LightningCLI, Run

    hooks = {"setup_parser", "parse_arguments", "before_instantiate_classes", "instantiate_classes"}
    ours = {name for name in vars(Run) if not name.startswith("__")}
    assert ours & set(dir(LightningCLI)) == hooks | {"instantiate_trainer"}


def test_predictions_of_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    assert main(["fit", *VIT, *DIGITS, *SHORT]) == 0
    Path("mine").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("L", (20, 12), 128).save(Path("mine", name))
    checkpoint = str(only("runs/*/version_0/checkpoints/epoch*.ckpt"))
    capsys.readouterr()
    args = ["predict", "-c", "runs/ViTClassifier/version_0/config.yaml", "--ckpt_path", checkpoint]
    assert main([*args, "--data.predict_root", "mine"]) == 0
    table = only("runs/ViTClassifier/version_1/*.csv")
    assert str(table) in capsys.readouterr().out.splitlines()[-1]
    assert [Path(line.split(",")[0]).name for line in table.read_text().splitlines()[1:]] == ["a.png", "b.png"]


def test_predict_keeps_nothing_in_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "predict", *TOY)["return_predictions"] is False
    assert printed(capsys, "predict", *TOY)["weights_only"] is True  # Lightning would unpickle what comes from a URL


# Configurations from strangers.

EVIL = "from pathlib import Path\nPath('imported').touch()\nfrom zoo._lightning import LightningModule\n"
EVIL += "class Net(LightningModule):\n    def __init__(self, size: int = 1) -> None:\n        super().__init__()\n"


def test_a_class_of_the_users_own(capsys: pytest.CaptureFixture[str]) -> None:
    """From the current directory, which console scripts do not have on their path; LightningCLI's users expect it."""
    Path("evil_module.py").write_text(EVIL)
    assert str(Path.cwd()) not in sys.path
    settings = printed(capsys, "fit", "--model", "evil_module.Net", *DIGITS)
    assert settings["model"] == {"class_path": "evil_module.Net", "init_args": {"size": 1}}
    assert Path("imported").exists()


def test_strict_imports_by_environment() -> None:
    Path("evil_module.py").write_text(EVIL)
    done = run("fit", "--model", "evil_module.Net", *DIGITS, ZOO_STRICT_IMPORTS="1")
    assert done.returncode == 2
    assert done.stderr.startswith("zoo: error: importing evil_module.Net is not allowed in a configuration: --strict")
    assert not Path("imported").exists()


def test_strict_imports_allow_the_shipped_recipes_and_little_else() -> None:
    """In one process, because importing takes seconds; what is refused once is refused for all of its life."""
    Path("evil_module.py").write_text(EVIL)
    code = (
        "import contextlib, io, json, sys\n"
        "from zoo.cli import main\n"
        "told = {}\n"
        "for args in json.loads(sys.argv[1]):\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):\n"
        "        try: status = main(['fit', '--print_config', *args, '--strict-imports'])\n"
        "        except SystemExit as stop: status = stop.code\n"
        "    told[args[-1]] = [status, err.getvalue()]\n"
        "print(json.dumps(told))"
    )
    hook = ["-c", "vit/digits", "--trainer.callbacks", "LambdaCallback", "--trainer.callbacks.on_fit_start"]
    reexport = "timm.data.loader.partial"  # functools', by the name of one that may use it
    functions = [
        "os.system",
        "torch.hub.load",
        "lightning.pytorch.cli.instantiate_class",
        "zoo.cli.mistakes.os.system",
        reexport,
    ]
    denied = [["--model", "evil_module.Net"], *([*hook, name] for name in functions)]
    allowed = [["-c", name] for name in [*recipes.recipes(), f"file://{recipes.recipes()['vit/digits']}"]]
    told = json.loads(run(json.dumps(allowed + denied), code=code).stdout)
    assert [told[name] for _, name in allowed] == [[0, ""]] * len(allowed)
    for *_, name in denied:
        assert told[name][0] == 2, name
        assert "is not allowed" in told[name][1], name
    assert not Path("imported").exists()


@pytest.mark.parametrize("where", ["-c", "--model", "--data", "in a file"])
def test_a_url_is_refused(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    url = "memory://there/recipe.yaml"
    import fsspec

    with fsspec.open(url, "w") as file:
        file.write("class_path: ToyClassifier\n")
    args = ["-c", config(model=url, data="ToyData")] if where == "in a file" else [where, url]
    told = refused(capsys, "fit", *args)
    assert url in told


def test_jsonargparse_denies_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, "fit", "-c", config(model="os.system", data="ToyData"))
    assert told == "recipe.yaml, line 2: importing os.system is not allowed in a configuration"
