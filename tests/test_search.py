"""Sweeps of runs, and the two commands that scale a network by them.

Each run is a process, and all but one of them are forked.
"""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from datamodules import DigitsDataModule
from zoo._lightning import LightningDataModule, LightningModule
from zoo.cli import main
from zoo.cli import sweep as sweeps
from zoo.cli.commands.sweep import axis
from zoo.cli.mistakes import Mistake
from zoo.cli.plots import lines
from zoo.cli.sweep import apart, sweep, sweep_seeds, taking_runs_along, write_json
from zoo.efficientnet import CompoundScaling, EfficientNetClassifier, search

RECIPE = "efficientnet/digits_scaling"
SHORT = ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
SHORT += ["--trainer.check_val_every_n_epoch=1", "--trainer.callbacks=null", "--trainer.enable_model_summary=false"]
SHORT += ["--trainer.enable_checkpointing=false", "--data.num_workers=0", "--model.warmup_epochs=0"]
COMMANDS = ("scaling-search", "scaling-compare")


class NoSize(LightningDataModule):
    """Data that cannot be had at another size."""

    num_classes = 10

    def __init__(self, seed: int = 0) -> None:
        super().__init__()

    def train_dataloader(self) -> DataLoader:
        raise NotImplementedError


class TwoTests(DigitsDataModule):
    """The digits, tested twice."""

    def test_dataloader(self) -> list[DataLoader]:
        return [super().test_dataloader(), super().test_dataloader()]


class Foreign(LightningModule):
    """Nothing of the zoo in it."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.layer = nn.Linear(64, num_classes)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/acc", (self.layer(batch[0].flatten(1)).argmax(1) == batch[1]).float().mean())

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        right = (self.layer(batch[0].flatten(1)).argmax(1) == batch[1]).float().mean()
        self.log("test/acc", right * (1 - dataloader_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Tuned(Foreign):
    """Has a learning rate."""

    def __init__(self, num_classes: int = 2, lr: float = 0.1) -> None:
        super().__init__(num_classes)


class Unseeded(DigitsDataModule):
    """The digits, of which nothing is drawn."""

    def __init__(self) -> None:
        super().__init__(num_workers=0)


@pytest.fixture(autouse=True)
def _as_started(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("ZOO_DEBUG", raising=False)


def recipe(**settings) -> str:
    Path("recipe.yaml").write_text(yaml.safe_dump(settings))
    return "recipe.yaml"


def refused(capsys, *args: str, status: int = 2) -> str:
    capsys.readouterr()
    assert main(list(args)) == status
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert err[0].startswith("zoo: error: ")
    return err[0].removeprefix("zoo: error: ")


def finished(folder: Path, name: str, **metrics: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", {"seconds": 1.0, **{key.replace("_", "/"): v for key, v in metrics.items()}})


def rows(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def is_picture(path: Path) -> bool:
    """Neither of one colour nor of the frame alone: there are the series' colours in it."""
    with Image.open(path) as image:
        colours = image.convert("RGB").getcolors(1 << 20)
        saturated = sum(number for number, colour in colours if max(colour) - min(colour) > 60)
        return image.format == "PNG" and min(image.size) > 300 and saturated > 200


# Sweeps.


@pytest.mark.usefixtures("_forked_programs")
def test_a_sweep_runs_what_is_not_finished_and_nothing_else(capsys):
    out = Path("there", "runs")
    configs = [recipe(model="EfficientNetClassifier", data="DigitsDataModule")]
    options = [*SHORT, "--model.image_size=32", "--data.image_size=32", "--trainer.limit_test_batches=2"]
    options += ["--model.phi=-8", "--model.in_channels=1"]
    assert sweep(configs, options, {}, out) == {}
    finished(out, "done", val_acc=0.25)
    (out / "stopped").mkdir()
    (out / "stopped" / "half.ckpt").touch()  # an interrupted run has its directory, and no metrics
    (out / "stopped.log").write_text("Epoch 1\n")
    found = sweep(configs, options, {"done": [], "stopped": ["--seed_everything", "7"]}, out, needs="val/acc")
    assert found["done"] == {"seconds": 1.0, "val/acc": 0.25}
    assert found["stopped"]["seconds"] > 0
    assert {"train/loss", "val/loss", "val/acc", "test/acc"} <= set(found["stopped"])
    kept = json.loads((out / "stopped" / "metrics.json").read_text())
    assert kept | {"seconds": found["stopped"]["seconds"]} == found["stopped"]
    assert json.loads((out / "stopped.json").read_text()) == found["stopped"]
    assert not (out / "done").exists()
    assert not (out / "stopped" / "half.ckpt").exists()
    assert yaml.safe_load((out / "stopped" / "config.yaml").read_text())["seed_everything"] == 7
    assert "test accuracy" in (out / "stopped.log").read_text()
    printed = capsys.readouterr().out.splitlines()
    assert printed[1] == "2 runs, 1 of them finished already"
    assert printed[2].startswith("2 of 2  stopped  val/acc ")
    assert printed[2].endswith(" s, 0 min left")
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert sweep(configs, options, {"stopped": ["--seed_everything", "7"]}, out) == {"stopped": found["stopped"]}
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == stamps


@pytest.mark.usefixtures("_forked_programs")
def test_a_failed_run_ends_with_the_line_it_ended_with_and_the_name_of_its_log():
    out = Path("runs")
    config = recipe(model="EfficientNetClassifier", data="DigitsDataModule")
    with pytest.raises(
        Mistake, match="^odd failed: lr of EfficientNetClassifier: expected float, got 'high'"
    ) as caught:
        sweep([config], [], {"odd": ["--model.lr", "high"]}, out)
    assert str(caught.value).endswith(f"; all that it said is in {out / 'odd.log'}")
    assert "zoo: error" not in str(caught.value)
    assert "got 'high'" in (out / "odd.log").read_text()
    assert not (out / "odd.json").exists()
    # Nothing is finished: the mistake may be mended in the same place.
    assert sweep([config], ["--model.lr", "1"], {}, out) == {}


@pytest.mark.usefixtures("_forked_programs")
def test_runs_read_a_copy_of_the_recipe_which_may_be_edited_meanwhile():
    out = Path("runs")
    config = recipe(model="EfficientNetClassifier", data="DigitsDataModule", trainer={"max_epoch": 1})
    with pytest.raises(Mistake, match=r"^one failed: runs/recipe0.yaml, line \d: .*max_epoch"):
        sweep([config], [], {"one": []}, out)
    assert (out / "recipe0.yaml").read_text() == Path(config).read_text()


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_no_run_begins_after_a_signal_to_end(tmp_path, number, raised):
    """Runs that follow each other in a thread of a pool, which is waited for."""
    child = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(60 if sys.argv[2] else 0)"
    begun, faults = tmp_path / "begun", []

    def in_turn(waits: str) -> list[int]:
        found = []
        for number in range(3):
            try:
                found.append(apart([sys.executable, "-c", child, str(begun), waits], tmp_path / f"{number}.log"))
            except Mistake as mistake:
                faults.append(str(mistake))
        return found

    def signals() -> None:
        while not begun.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)
        while number == signal.SIGINT and not sweeps._ended.is_set():
            time.sleep(0.01)
        for process in tuple(sweeps._running) if number == signal.SIGINT else ():  # as a terminal does
            process.send_signal(number)

    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    sender = threading.Thread(target=signals)
    futures = []

    def wait() -> None:
        with taking_runs_along(), ThreadPoolExecutor(1) as pool:
            futures.append(pool.submit(in_turn, "waits"))
            sender.start()
            futures[0].result()

    with pytest.raises(raised):
        wait()
    sender.join()
    assert [status != 0 for status in futures[0].result()] == [True]
    assert faults == ["ended before it began"] * 2
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    assert in_turn("") == [0, 0, 0]  # another sweep of this process


def test_a_sweep_keeps_to_one_recipe_and_its_options():
    out = Path("runs")
    config = recipe(model="EfficientNetClassifier", data="DigitsDataModule")
    sweep([config], ["--model.lr", "1"], {}, out)
    finished(out, "done")
    assert list(sweep([config], ["--model.lr", "1"], {"done": []}, out)) == ["done"]
    with pytest.raises(
        Mistake, match="^runs holds runs of other options, --model.lr 1: choose another --out, or remove"
    ):
        sweep([config], ["--model.lr", "2"], {"done": []}, out)
    recipe(model="EfficientNetClassifier", data="DigitsDataModule", seed_everything=1)  # the same file, changed
    with pytest.raises(Mistake, match="^runs holds runs of another recipe: choose another --out"):
        sweep([config], ["--model.lr", "1"], {"done": []}, out)


def test_a_file_appears_complete_or_not_at_all():
    path = Path("numbers.json")
    write_json(path, {"a": 1.5})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1.5}
    write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert os.listdir() == ["numbers.json"]


@pytest.mark.slow
def test_a_run_without_what_it_was_for_is_a_failure():
    """At the first one, not in the table when all are done; it is started as people have it, and not forked."""
    option = "--trainer.check_val_every_n_epoch=5"
    told = "^run ended without val/acc, only train/loss, .*test/acc.*; all that it said is in runs/run.log$"
    config = recipe(model="EfficientNetClassifier", data="DigitsDataModule")
    options = ["--model.phi=-8", "--model.in_channels=1", "--model.image_size=32", "--data.image_size=32"]
    with pytest.raises(Mistake, match=told):
        sweep([config], [*SHORT, *options, option], {"run": [], "next": []}, Path("runs"), needs="val/acc")
    assert not list(Path("runs").glob("*[!p].json"))


def test_a_fit_leaves_its_numbers_beside_its_configuration(capsys):
    """Those of training and validation, and of all loaders that were tested, as they were printed."""
    args = ["--model", "test_search.Foreign", "--data", "test_search.TwoTests", "--trainer.accelerator=cpu"]
    assert main(["fit", *args, "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1"]) == 0
    out = capsys.readouterr().out.splitlines()
    folder = Path("runs/Foreign/version_0")
    assert (folder / "config.yaml").exists()
    metrics = json.loads((folder / "metrics.json").read_text())
    first, second = (metrics[f"test/acc/dataloader_idx_{index}"] for index in range(2))
    assert first > 0.1 > second == 0
    assert [f"{100 * value:.2f} %" for value in (first, second)] == [
        line.split(maxsplit=2)[2] for line in out if line.startswith("test acc/dataloader_idx_")
    ]
    assert {"train/loss", "val/acc"} <= set(metrics)


# The command that sweeps over options.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model.lr=0.1,0.3", ("model.lr", ["0.1", "0.3"])),
        ("--model.hidden=[8, 4],[16],null", ("model.hidden", ["[8, 4]", "[16]", "null"])),
        ("model.size,data.size=8", ("model.size,data.size", ["8"])),
    ],
)
def test_an_axis_is_an_option_and_its_values(text, expected):
    assert axis(text) == expected


@pytest.mark.parametrize("names", [("0.1", "0.3"), ("rloo", "vimco")])
def test_finished_runs_become_a_table_of_all_metrics_and_a_plot(names, capsys, monkeypatch):
    """Values that are no numbers stand beside each other in the plot. The option may have another word for it."""
    drawn = {}
    monkeypatch.setattr("zoo.cli.plots.lines", lambda path, series, *rest: drawn.update({path.name: (series, rest)}))
    option = "model.lr" if names[0] == "0.1" else "trainer.default_root_dir"
    out = Path("there")
    for number, name in enumerate(names):
        for seed in range(2):
            finished(out, f"{option}={name}_seed{seed}", val_loss=number, test_acc=0.5 + number / 4 + seed / 8)
    typed = "learning_rate" if names[0] == "0.1" else option
    args = ["sweep", "vit/digits", "--over", f"{typed}={','.join(names)}", "--seeds", "2", "--out", "there"]
    assert main(args) == 0
    printed = capsys.readouterr().out
    assert "4 runs, 4 of them finished already" in printed
    assert rows(printed) == [
        [option, "seconds", "val/loss", "test/acc"],
        ["---"] * 4,
        [names[0], "1.0000 ± 0.0000", "0.0000 ± 0.0000", "0.5625 ± 0.0884"],
        [names[1], "1.0000 ± 0.0000", "1.0000 ± 0.0000", "0.8125 ± 0.0884"],
    ]
    assert printed.endswith(f"table {out / 'table.md'}\nplot {out / 'plot.png'}\n")
    series, (x_label, y_label, _, ticks) = drawn["plot.png"]
    assert (x_label, y_label, list(ticks)) == (option, "test/acc", [] if names[0] == "0.1" else [*names])
    assert series["test/acc"] == [
        (0.1 if names[0] == "0.1" else 0, 0.5625, pytest.approx(0.0884, abs=1e-4)),
        (0.3 if names[0] == "0.1" else 1, 0.8125, pytest.approx(0.0884, abs=1e-4)),
    ]
    args[3] = args[3].replace(typed, option)
    assert "holds runs of other options" in refused(capsys, *args, "--model.width", "48")


def test_names_are_drawn_where_there_are_no_numbers():
    lines(Path("plot.png"), {"test/acc": [(0, 50, 2), (1, 70, 1)]}, "model.estimator", "y", False, ["rloo", "vimco"])
    assert is_picture(Path("plot.png"))


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["vit/digits"], "the following arguments are required: --over"),
        (["--over", "model.lr=1"], "sweep needs a recipe: zoo sweep RECIPE (zoo list)"),
        (["vit/digits", "--over", "model.lr"], "argument --over: 'model.lr': expected an option and its values, as in"),
        (["vit/digits", "--over", "model.lr=1,1"], "an option and its values, as in model.lr=0.1,0.3, each once"),
        (["vit/digits", "--over", "model.lr=1", "--over", "model.lr=2"], "argument --over: each option once"),
        (["vit/digits", "--over", "seed_everything=1,2"], "seeds are --seeds N"),
        (["vit/digits", "--over", "gpus=1,2"], "unknown option --gpus: it is --trainer.accelerator cpu or gpu"),
        (["vit/digits", "--over", "model.lrr=1,2"], "ViTClassifier has no option 'lrr'; did you mean lr?"),
        (["vit/digits", "--over", "model.lr=1,high"], "lr of ViTClassifier: expected float, got 'high'"),
    ],
)  # fmt: skip
def test_a_mistaken_sweep_gets_one_line_before_anything_runs(args, expected, capsys):
    assert expected in refused(capsys, "sweep", *args)
    assert not Path("runs").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)  # four processes
@pytest.mark.usefixtures("_forked_programs")
def test_a_sweep_of_a_foreign_model_over_two_options_end_to_end(capsys, monkeypatch):
    """Its data has no seed to set, and with two options there is no plot."""
    tests = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tests), str(tests.parent)]))
    args = ["sweep", recipe(model="test_search.Tuned", data="test_search.Unseeded"), "--seeds", "1", "--jobs", "2"]
    args += ["--over", "model.lr=0.1,0.2", "--over", "trainer.max_epochs=1,2", "--trainer.accelerator=cpu"]
    assert main(args) == 0
    head, _, *body = rows(printed := capsys.readouterr().out)
    assert head[:2] == ["model.lr", "trainer.max_epochs"]
    assert [row[:2] for row in body] == [["0.1", "1"], ["0.1", "2"], ["0.2", "1"], ["0.2", "2"]]
    assert "plot" not in printed
    for lr, epochs, *_ in body:
        name = f"model.lr={lr}-trainer.max_epochs={epochs}_seed0"
        saved = yaml.safe_load(Path("runs/sweep", name, "config.yaml").read_text())
        assert (saved["model"]["init_args"]["lr"], saved["trainer"]["max_epochs"]) == (float(lr), int(epochs))
    assert main(args) == 0
    assert "4 runs, 4 of them finished already" in capsys.readouterr().out


# What is tried.


@pytest.mark.parametrize(("step", "number"), [(0.1, 12), (0.05, 38), (0.4, 3)])
def test_candidates_keep_to_the_constraint(step, number):
    found = search.candidates(step)
    assert len(found) == len(set(found)) == number
    for alpha, beta, gamma in found:
        assert alpha * beta**2 * gamma**2 == pytest.approx(2)
        assert min(alpha, beta, gamma) >= 1
        for factor in (beta, gamma):
            assert (factor - 1) / step == pytest.approx(round((factor - 1) / step))
        CompoundScaling(alpha, beta, gamma)  # can be scaled by
    assert (2.0, 1.0, 1.0) in found
    # What the paper found is near one of the finer grid's, and costs less than it should.
    nearest = min(search.candidates(0.05), key=lambda each: abs(each[1] - 1.1) + abs(each[2] - 1.15))
    assert nearest == pytest.approx((1.2, 1.1, 1.15), abs=0.06)
    assert CompoundScaling(*nearest).cost(1) == pytest.approx(2)
    assert CompoundScaling(1.2, 1.1, 1.15).cost(1) == pytest.approx(1.92, abs=1e-3)


@pytest.mark.parametrize("step", [0, -0.1, 1e-6, math.nan, 0.42, 9])
def test_a_step_that_leaves_no_grid(step):
    with pytest.raises(ValueError, match=f"step is {step}: expected at (least 0.01|most 0.414)"):
        search.candidates(step)


def test_the_base_is_the_network_of_the_recipe():
    for options in (
        {"phi": -4, "image_size": 40, "num_classes": 10, "in_channels": 1},
        {"depth": 0.5, "width": 0.5, "stem_stride": 1, "num_classes": 10},
        {"phi": -2.5, "family": "mobilenetv2", "gamma": 1.2, "num_classes": 10},
    ):
        module = EfficientNetClassifier(**options)
        base = search.base_of(module.hparams | {"image_size": options.get("image_size")})
        shape = (options.get("in_channels", 3), base.image_size, base.image_size)
        assert module.input_shape == shape
        found = base.count(0, num_classes=10)
        assert found.parameters == sum(parameter.numel() for parameter in module.parameters())
        assert (base.alpha, base.gamma) == (1.2, options.get("gamma", 1.15))


def test_results_are_drawn(tmp_path):
    for log_x in (False, True):
        path = tmp_path / f"{log_x}.png"
        lines(path, {"a": [(1, 50, 2), (4, 70, 1)], "b": [(4, 60, 0), (1, 50, 0)]}, "x", "y", log_x)
        assert is_picture(path)


# The commands.


@pytest.mark.usefixtures("_forked_programs")
def test_search_continues_and_names_the_winner(capsys):
    """Two of three candidates are finished, and one of the numbers is the real one of a run."""
    out = Path("runs/scaling-search")
    finished(out, "alpha2_beta1_gamma1_seed0", val_acc=1.0, val_loss=0.5)
    finished(out, "alpha1.02_beta1.4_gamma1_seed0", val_acc=1.0, val_loss=0.25)
    assert main(["scaling-search", "--step", "0.4", "-c", RECIPE, *SHORT, "--trainer.limit_test_batches=2"]) == 0
    printed = capsys.readouterr().out
    metrics = json.loads((out / "alpha1.02_beta1_gamma1.4_seed0.json").read_text())
    saved = yaml.safe_load((out / "alpha1.02_beta1_gamma1.4_seed0" / "config.yaml").read_text())
    (head, _, first, second, third), base = rows(printed), CompoundScaling(1.4**-2 * 2, 1.0, 1.4)
    assert head[:3] == ["alpha", "beta", "gamma"]
    assert [row[:3] for row in (first, second)] == [["1.02", "1.4", "1"], ["2", "1", "1"]]  # by loss where equal
    assert first[6:] == ["100.00 %", "0.2500"]
    assert third[:4] == ["1.02", "1", "1.4", "22"]
    assert third[6:] == [f"{100 * metrics['val/acc']:.2f} %", f"{metrics['val/loss']:.4f}"]
    assert "best: --model.alpha 1.02 --model.beta 1.4 --model.gamma 1\n" in printed
    assert printed.endswith(f"table {out / 'table.md'}\nplot {out / 'plot.png'}\n")
    assert (out / "table.md").read_text().strip() in printed
    assert is_picture(out / "plot.png")
    # The run had the network that the table speaks of.
    model, data = saved["model"]["init_args"], saved["data"]["init_args"]
    assert (model["phi"], model["image_size"], data["image_size"]) == (0, 22, 22)
    assert (model["depth"], model["width"]) == pytest.approx((0.5 * base.alpha, 0.25))
    built = EfficientNetClassifier(**model | {"num_classes": 10, "weights": None})
    assert third[4] == f"{sum(parameter.numel() for parameter in built.parameters()):,}"


@pytest.mark.usefixtures("_forked_programs")
def test_unequal_costs_are_told_before_anything_runs(capsys):
    """Images of 16 pixels are one pixel of the last feature map; those of 17 are four, at more than twice the cost."""
    base = CompoundScaling(depth=0.3, width=0.25, image_size=16, stem_stride=1, in_channels=1)

    def train(variants, needs):
        return sweep_seeds(["nowhere.yaml"], [], variants, 1, Path("runs"), needs=needs)

    with pytest.raises(Mistake, match="^base_seed0 failed: "):
        search.compare(base, train, num_classes=10, multiples=[2])
    first = capsys.readouterr().out.splitlines()[0]
    assert first == (
        "not at equal cost, as the next larger network is beyond the budget: resolution x2 50%, compound x2 50%"
    )


@pytest.mark.slow
@pytest.mark.timeout(300)  # ten processes
@pytest.mark.usefixtures("_forked_programs")
def test_comparison_end_to_end(capsys):
    """By four ways: five runs, and none when it is called again."""
    out = Path("elsewhere")
    args = ["--out", str(out), "-c", RECIPE, "--multiples", "4", "--seeds", "1", *SHORT]
    args += ["--trainer.limit_val_batches=1", "--trainer.limit_test_batches=2"]
    assert main(["scaling-compare", "--jobs", "2", *args]) == 0
    printed = capsys.readouterr().out
    head, _, *body = rows(printed)
    assert head[-3:] == ["test accuracy", "each seed", "test loss"]
    ways = ("width", "depth", "resolution", "compound")
    assert [row[:2] for row in body] == [["base", ""], *([way, "x4"] for way in ways)]
    unit = int(body[0][6].replace(",", ""))
    for way, budget, depth, width, side, _, macs, accuracy, each, loss in body:
        name = "_".join(filter(None, (way, budget)))
        ended = json.loads((out / f"{name}_seed0.json").read_text())
        assert loss == f"{ended['test/loss']:.4f}"
        assert each == f"{100 * ended['test/acc']:.2f}"
        assert accuracy == f"{100 * ended['test/acc']:.2f} %"
        times = float(budget[1:] or 1)
        assert 0.8 * times * unit <= int(macs.replace(",", "")) <= times * unit
        scaled = {"width": float(width) > 1, "depth": float(depth) > 1, "resolution": int(side) > 16}
        assert all(scaled[dimension] == (way in (dimension, "compound")) for dimension in scaled)
        saved = yaml.safe_load((out / f"{name}_seed0" / "config.yaml").read_text())
        assert saved["seed_everything"] == saved["data"]["init_args"]["seed"] == 0
        assert saved["data"]["init_args"]["image_size"] == int(side)
    assert is_picture(out / "plot.png")
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert main(["scaling-compare", *args]) == 0
    assert "5 runs, 5 of them finished already" in (again := capsys.readouterr().out)
    assert rows(again) == [head, ["---"] * 10, *body]
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.json")} == stamps
    assert "holds runs of other options" in refused(capsys, "scaling-compare", *args, "--model.lr", "1")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["-c", RECIPE, "--seeds", "0"], "argument --seeds: '0' is not a whole number of at least 1"),
        (["-c", RECIPE, "--jobs", "two"], "argument --jobs: 'two' is not a whole number of at least 1"),
        ([], " RECIPE (zoo list)"),
        (["-c", "efficientnet/digit"], "no recipe or file 'efficientnet/digit'; did you mean efficientnet/digits?"),
        (["-c", "vit/digits"], " scales an EfficientNetClassifier, but the recipe has zoo.ViTClassifier"),
        (["-c", RECIPE, "--model.variant=b1"], "variant b1 is a network of the table: scale phi, or depth and width"),
        (["-c", RECIPE, "--model.image_size", "[16, 24]"], "image_size is (16, 24): the images that are scaled"),
        (["-c", RECIPE, "--model.phi", "-3"], "phi is -3.0: a stage of 16 channels would vanish; the least phi is 0.0"),
        (["-c", RECIPE, "--model.lrr", "1"], "EfficientNetClassifier has no option 'lrr'; did you mean lr?"),
        (["-c", RECIPE, "--data", "test_search.NoSize"], "image_size and seed: test_search.NoSize has no image_size"),
        (["-c", RECIPE, "--data.image_size", "-1"], "image_size is -1: expected at least 1"),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_line_before_anything_runs(command, args, expected, capsys):
    assert expected in refused(capsys, command, *args)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["scaling-search", "--step", "9"], "step is 9.0: expected at most 0.414"),
        (["scaling-search", "--step", "x"], "argument --step: invalid float value: 'x'"),
        (["scaling-search", "--multiples", "2"], "unknown option --multiples"),
        (["scaling-compare", "--multiples", "0.1"], "multiples are 0.1: expected all above 1"),
        (["scaling-compare", "--multiples", "2", "1"], "multiples are 2, 1: expected all above 1"),
        (["scaling-compare", "--multiples"], "argument --multiples: expected at least one argument"),
    ],
)
def test_a_wrong_option_of_one_command(args, expected, capsys):
    assert expected in refused(capsys, *args, "-c", RECIPE)
    assert not Path("runs").exists()


def test_a_recipe_without_data(capsys):
    config = recipe(model="EfficientNetClassifier")
    assert "--data is missing" in refused(capsys, "scaling-search", "-c", config)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_at_once(command):
    code = (
        "import sys; from zoo.cli import main\n"
        f"main(['{command}', '-c', '{RECIPE}', '--help'])\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for option in ("RECIPE [options", "--out FOLDER", "--seeds N", "--jobs N", f"runs/{command}"):
        assert option in done.stdout
    assert ("--step X" in done.stdout, "--multiples X" in done.stdout) == (
        command == COMMANDS[0],
        command == COMMANDS[1],
    )
    assert all(len(line) <= 120 for line in done.stdout.splitlines())
