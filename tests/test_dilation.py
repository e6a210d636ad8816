"""The study of dilation: finished runs become a table and a plot by object size, and a mistake gets a line."""

from pathlib import Path

import pytest
import yaml
from test_search import is_picture, refused, rows

from zoo.cli import main
from zoo.cli.sweep import write_json

COMMAND = "dilation-study"
RECIPE = "detection/shapes_one_level"
OUT = Path("runs", COMMAND)


def finish(dilation: int, seed: int, **metrics: float) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    found = {"seconds": 60.0, "val/ap": 0.1, "test/ap_by_class/disc": 0.9}
    found |= {f"test/{name}": value for name, value in metrics.items()}
    write_json(OUT / f"dilation{dilation}_seed{seed}.json", found)


def test_finished_runs_become_a_table_and_a_plot_by_object_size(capsys, monkeypatch):
    drawn = {}
    monkeypatch.setattr("zoo.cli.plots.lines", lambda path, series, *labels: drawn.update(series=series, labels=labels))
    for dilation, small, large in ((1, 0.3, 0.4), (3, 0.1, 0.6)):
        for seed in range(2):
            ap = {"ap": (small + large) / 2, "ap50": 0.7, "ap_8_16": small, "ap_16_32": large + seed / 10}
            finish(dilation, seed, **ap)
    assert main([COMMAND, RECIPE, "--seeds", "2", "--dilations", "1", "3"]) == 0
    printed = capsys.readouterr().out
    assert "4 runs, 4 of them finished already" in printed
    assert rows(printed) == [
        ["dilation", "AP", "8 to 16", "16 to 32", "AP of each seed", "seconds"],
        ["---"] * 6,
        ["1", "35.0 ± 0.0", "30.0 ± 0.0", "45.0 ± 7.1", "35.0, 35.0", "60"],
        ["3", "35.0 ± 0.0", "10.0 ± 0.0", "65.0 ± 7.1", "35.0, 35.0", "60"],
    ]
    assert list(drawn["series"]) == ["8 to 16", "16 to 32"]
    assert drawn["series"]["8 to 16"] == [(1, pytest.approx(30), 0), (3, pytest.approx(10), 0)]
    assert drawn["series"]["16 to 32"] == [
        (d, pytest.approx(ap), pytest.approx(7.07, abs=0.01)) for d, ap in ((1, 45), (3, 65))
    ]
    assert drawn["labels"][:2] == ("dilation of the stage of stride 16", "AP")


@pytest.mark.slow
@pytest.mark.timeout(300)  # two processes
@pytest.mark.usefixtures("_forked_programs")
def test_study_end_to_end(capsys):
    args = ["--model.backbone=test_byobnet", "--model.channels=8", "--model.image_size=64", "--data.image_size=64"]
    args += [f"--data.{split}_size=8" for split in ("train", "val", "test")] + ["--data.num_workers=0"]
    args += ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1"]
    args += ["--trainer.log_every_n_steps=1", "--model.warmup_epochs=0"]
    assert main([COMMAND, RECIPE, "--seeds", "1", "--dilations", "1", "2", *args]) == 0
    _, _, *body = rows(capsys.readouterr().out)
    assert [row[0] for row in body] == ["1", "2"]
    for dilation in (1, 2):
        saved = yaml.safe_load((OUT / f"dilation{dilation}_seed0" / "config.yaml").read_text())
        assert saved["model"]["init_args"]["dilations"] == [dilation]
    assert is_picture(OUT / "plot.png")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["vit/digits"], "the recipe's model has no dilations: take a recipe of FPNDetector or FasterRCNN"),
        ([RECIPE, "--model.trident=true"], "has a branch for each dilation already: add --model.trident false"),
        ([RECIPE, "--dilations", "1", "1"], "dilations are 1, 1: expected numbers from 1 on, each once"),
        ([RECIPE, "--dilations", "0", "1"], "dilations are 0, 1: expected numbers from 1 on, each once"),
        ([RECIPE, "--dilations", "two"], "argument --dilations: invalid int value: 'two'"),
        ([RECIPE, "--dilations"], "argument --dilations: expected at least one argument"),
        ([], f"{COMMAND} needs a recipe: zoo {COMMAND} RECIPE (zoo list)"),
    ],
)
def test_a_mistaken_study_gets_one_line_before_anything_runs(args, expected, capsys):
    assert expected in refused(capsys, COMMAND, *args)
    assert not Path("runs").exists()
