"""The command that compares losses by the metric that a model is judged by."""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import forked
import pytest
import yaml
from jsonargparse import Namespace

from zoo.cli import main
from zoo.common.study import Recipe
from zoo.vit.compare_losses import ONE, SEVERAL, compare

COMMAND = "compare-losses"
RARE = {"split": "random", "labels": [8, 5, 9], "noise": 0.6}


@pytest.fixture(autouse=True)
def _as_started(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("ZOO_DEBUG", raising=False)


# The table.


def trained(metrics: dict[str, dict[str, list[float]]], several: bool = True, epochs: int = 9):
    """The page of runs with these metrics, and the options that they were trained with."""
    asked: dict[str, list[str]] = {}

    def train(variants, needs):
        assert needs == "test/f1"
        asked.update(variants)
        return {name: metrics[name] for name in variants}

    saver = Namespace(class_path="ModelCheckpoint", init_args=Namespace(monitor="val/f1"))
    trainer = {"max_epochs": epochs, "callbacks": [saver]}
    recipe = Recipe({"multi_label": several}, SimpleNamespace(), trainer, Path("out"), train)
    return compare(recipe, list(metrics)), asked


def rows(lines) -> list[list[str]]:
    found = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in found}) == 1
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found]


def several(f1: list[float], tuned: list[float], loss: float = 0.3, **more: list[float]) -> dict[str, list[float]]:
    return {"test/f1": f1, "test/f1_tuned": tuned, "test/f1_micro": f1, "test/loss": [loss, loss], **more}


def test_the_table_counts_wins_split_by_split_against_the_best_baseline():
    metrics = {
        "bce": several([0.4, 0.5], [0.45, 0.6]),
        "zlpr": several([0.41, 0.4], [0.0, 0.0]),
        "f1_cross_entropy": several([0.5, 0.59], [0.0, 0.0], 7.0, **{"test/cross_entropy": [0.35, 0.25]}),
    }
    page, _ = trained(metrics)
    head, _, bce, tuned, zlpr, weighted = rows(page.lines)
    assert head[4:7] == ["ahead of BCE in", "ahead of BCE, tuned thresholds in", "by"]
    assert bce[1:7] == ["0.450 ± 0.071", "0.450", "0.300", "", "0 of 2", "-0.075 ± 0.025"]
    assert tuned[:6] == ["BCE, tuned thresholds", "0.525 ± 0.106", "", "0.300", "2 of 2", ""]
    assert zlpr[4:6] == ["1 of 2", "0 of 2"]
    assert weighted[3:] == ["0.300", "2 of 2", "1 of 2", "+0.020 ± 0.030", "0.500, 0.590"]
    assert page.lines[-1].startswith(
        "All rows have 9 epochs, and the epoch that is tested is that with the best val/f1."
    )
    assert page.ticks == ["BCE", "BCE, tuned thresholds", "ZLPR", "F1-weighted BCE"]
    expected = [(0, 0.45, stdev([0.4, 0.5])), (1, 0.525, stdev([0.45, 0.6])), (2, 0.405, stdev([0.41, 0.4]))]
    assert [list(point) for point in page.series["baselines"]] == [pytest.approx(list(point)) for point in expected]
    assert [point[0] for point in page.series["smooth metrics"]] == [3]


def test_two_phases_share_the_epochs_of_the_others():
    one = {"test/f1": [0.9], "test/acc": [0.8], "test/loss": [0.2]}
    page, asked = trained(dict.fromkeys(ONE, one), several=False)
    for name, row in ONE.items():
        phases = [word for word in asked[name] if word.startswith("--trainer.callbacks.phases=")]
        expected = [{"epoch": 6, "loss": row.then}]
        assert [json.loads(word.partition("=")[2]) for word in phases] == ([expected] if row.then else [])
        assert not [word for word in asked[name] if "max_epochs" in word]
    assert "All rows have 9 epochs, in two phases 6 and 3, and" in page.lines[-1]
    head, _, *body = rows(page.lines)
    assert head[2] == "accuracy"
    assert [row[:2] for row in body] == [[row.text, "0.900"] for row in ONE.values()]


@pytest.mark.parametrize("known", [SEVERAL, ONE], ids=["several", "one"])
def test_every_loss_differs_from_the_others_in_what_it_sets(known):
    one = {"test/f1": [0.9], "test/acc": [0.8], "test/loss": [0.2], "test/f1_micro": [0.1], "test/f1_tuned": [0.1]}
    _, asked = trained(dict.fromkeys(known, one), several=known is SEVERAL)
    assert len({tuple(options) for options in asked.values()}) == len(known)
    assert all(
        ("--trainer.callbacks+=zoo.callbacks.TunedThresholds" in o) is (known is SEVERAL) for o in asked.values()
    )


@pytest.mark.parametrize("epochs", [None, 1, -1])
def test_a_budget_that_phases_cannot_share_is_refused(epochs):
    with pytest.raises(ValueError, match=f"max_epochs is {epochs}: expected at least 2, which phases can share"):
        trained({"bce": several([0.4], [0.4])}, epochs=epochs)


# The command.


def recipe(**data) -> str:
    backbone = {"class_path": "zoo.common.backbones.Pixels", "init_args": {"num_features": 64}}
    model = {"backbone": backbone, "num_classes": 3, "image_size": 8, "in_channels": 1, "multi_label": True}
    saver = {"monitor": "val/f1", "mode": "max", "save_weights_only": True}
    settings = {
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 3,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "callbacks": [{"class_path": "ModelCheckpoint", "init_args": saver}],
        },
        "model": {"class_path": "zoo.ViTClassifier", "init_args": model | {"loss": "bce", "lr": 0.02}},
        "data": {"class_path": "DigitsDataModule", "init_args": RARE | {"batch_size": 200} | data},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(settings))
    return "recipe.yaml"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["mae/digits"], "compare-losses trains a ViTClassifier, but the recipe has zoo.MAEPretrainer"),
        (["recipe.yaml", "--losses", "soft_f2"], "unknown loss 'soft_f2'; did you mean soft_f1?"),
        (
            ["recipe.yaml", "--losses", "smooth_accuracy"],
            "unknown loss 'smooth_accuracy'; expected some of bce, ",
        ),
        (["recipe.yaml", "--trainer.max_epochs", "1"], "max_epochs is 1: expected at least 2, which phases can share"),
        (["recipe.yaml", "--model.quux", "1"], "ViTClassifier has no option 'quux'"),
    ],
)
def test_a_mistake_of_the_comparison_gets_one_line_before_anything_runs(args, expected, capsys):
    recipe()
    assert main([COMMAND, *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert not Path("runs").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)  # a process for each of a dozen runs, of which one is stopped
@pytest.mark.usefixtures("_forked_programs")
def test_losses_compared_end_to_end(capsys):
    """Every loss for several labels; it goes on where it stopped, each seed has its split, and the table is theirs."""
    args = [recipe(), "--seeds", "2", "--out", "elsewhere"]
    out = Path("elsewhere")
    command = [sys.executable, "-m", "zoo", COMMAND, *args]
    with forked.Popen(command, stdout=subprocess.PIPE, launches=True) as process:
        while not (out / "bce_seed1.json").exists() and process.poll() is None:
            time.sleep(0.05)
        process.terminate()
    assert process.returncode != 0
    first = {path: path.stat().st_mtime_ns for path in out.glob("*_seed?.json")}
    assert main([COMMAND, *args]) == 0
    printed = capsys.readouterr().out
    assert f"{2 * len(SEVERAL)} runs, {len(first)} of them finished already" in printed
    assert "min left" in printed
    head, _, *body = rows(printed.splitlines())
    assert [row[0] for row in body][2:] == [row.text for row in SEVERAL.values()][1:]
    for name, row in zip(SEVERAL, [body[0], *body[2:]], strict=True):
        runs = [json.loads((out / f"{name}_seed{seed}.json").read_text()) for seed in range(2)]
        assert row[-1] == ", ".join(f"{metrics['test/f1']:.3f}" for metrics in runs)
        assert row[2] == f"{mean(metrics['test/f1_micro'] for metrics in runs):.3f}"
        for seed in range(2):
            saved = yaml.safe_load((out / f"{name}_seed{seed}" / "config.yaml").read_text())
            assert saved["seed_everything"] == saved["data"]["init_args"]["split_seed"] == seed
            assert set(json.loads((out / f"{name}_seed{seed}" / "thresholds.json").read_text())) == {"8", "5", "9"}
    runs = [json.loads((out / f"bce_seed{seed}.json").read_text()) for seed in range(2)]
    assert body[1][-1] == ", ".join(f"{metrics['test/f1_tuned']:.3f}" for metrics in runs)
    assert first.items() <= {path: path.stat().st_mtime_ns for path in out.glob("*_seed?.json")}.items()
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert main([COMMAND, *args]) == 0
    assert rows(capsys.readouterr().out.splitlines()) == [head, ["---"] * len(head), *body]
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.json")} == stamps
    assert all((out / name).is_file() for name in ("table.md", "plot.png"))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("_forked_programs")
def test_losses_compared_for_one_label_an_image(capsys):
    args = [recipe(labels="digit"), "--seeds", "1", "--model.multi_label=false", "--model.num_classes=10"]
    assert main([COMMAND, *args, "--model.loss=cross_entropy"]) == 0
    _, _, *body = rows(capsys.readouterr().out.splitlines())
    assert [row[0] for row in body] == [row.text for row in ONE.values()]
    for name, row in zip(ONE, body, strict=True):
        metrics = json.loads(Path(f"runs/{COMMAND}/{name}_seed0.json").read_text())
        assert row[1:3] == [f"{metrics[key]:.3f}" for key in ("test/f1", "test/acc")]
