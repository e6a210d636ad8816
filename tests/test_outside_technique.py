"""A technique of somebody else, rotation prediction, in a package of its own: nothing of ours knows of it.

It has taken the five steps of CONTRIBUTING.md, "Adding a technique", but for the line in ``zoo/__init__.py``: step 1 is
``tests/outside/rotnet/pretrainer.py``, step 2 the class attributes and methods there, ``layouts.py`` and ``peers.py``,
step 4 ``digits.yaml``, step 5 this file.
"""

import csv
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import zoo
from datamodules import DigitsDataModule
from zoo import weights
from zoo._lightning import Trainer
from zoo.cli import main

RECIPE = "rotnet/digits.yaml"
CPU = ["--trainer.accelerator=cpu", "--trainer.enable_model_summary=false"]


@pytest.fixture(autouse=True)
def technique(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    """The class, from a copy in the folder in which the test runs."""
    shutil.copytree(Path(__file__).with_name("outside") / "rotnet", tmp_path / "rotnet")
    monkeypatch.syspath_prepend(tmp_path)
    from rotnet import RotationPretrainer

    yield RotationPretrainer
    for name in [name for name in sys.modules if name.split(".")[0] == "rotnet"]:
        del sys.modules[name]


def test_it_is_trained_tested_shown_and_predicts_through_the_command_line(capsys):
    assert main(["fit", "-c", RECIPE, *CPU]) == 0
    said = capsys.readouterr().out
    lines = dict(
        line.rsplit(" ", 1) for line in said.splitlines() if line.startswith(("pictures", "checkpoint", "enc"))
    )
    accuracy = next(line for line in said.splitlines() if line.startswith("test accuracy of rotations "))
    assert float(accuracy.split()[-2]) > 60  # a quarter by chance
    assert "val/acc_rotation 0." in said  # the line of each validation, where nobody watches
    assert Image.open(lines["pictures"]).size > (100, 100)
    assert Path(lines["encoder"]).is_file()
    run = Path("runs/rotnet/digits/version_0")
    trained = ["-c", str(run / "config.yaml"), "--ckpt_path", lines["checkpoint"], *CPU]
    assert main(["test", *trained]) == 0
    assert "test/acc_rotation" in capsys.readouterr().out
    assert main(["predict", *trained]) == 0
    written = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("predictions "))
    rows = list(csv.DictReader(Path(written.removeprefix("predictions ")).read_text().splitlines()))
    assert rows[0].keys() == {"file", "upright", "degrees"}
    assert len(rows) == 540
    assert sum(row["degrees"] == "0" for row in rows) > 270


def test_it_is_loaded_and_exported_from_its_checkpoint(technique, tmp_path):
    assert main(["fit", "-c", RECIPE, *CPU, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]) == 0
    run, data = Path("runs/rotnet/digits/version_0"), DigitsDataModule(batch_size=90)
    with pytest.raises(ValueError, match="is of rotnet.pretrainer.RotationPretrainer, .*: module= is missing"):
        zoo.load(run)
    predictor = zoo.load(run, module=technique)
    images = [Image.effect_noise((side, side), 80) for side in (8, 9, 40)]
    answers = predictor(images)
    batch = predictor.preprocessing.to_float(
        predictor.preprocessing.collate([predictor.preprocessing.read(image) for image in images])
    )
    turns = predictor.module(batch).argmax(1).tolist()
    assert answers == [{"degrees": 90 * turn} for turn in turns]
    report = zoo.export(run, tmp_path / "a.pt2", "pt2", module=technique, data=data, compiled=False)
    assert set(report.differences.values()) == {0.0}
    program = torch.export.load(tmp_path / "a.pt2").module()
    uint8 = predictor.preprocessing.collate([predictor.preprocessing.read(image) for image in images])
    torch.testing.assert_close(program(uint8)["logits"], predictor.module(batch))


def test_mistakes_with_it_are_told_as_with_the_zoos_own(capsys):
    for option, told in (
        ("--model.widht=4", "RotationPretrainer has no option 'widht'"),
        ("--model.in_channels=3", "images are 1x8x8, but the model was built for 3x8x8"),
    ):
        assert main(["fit", "-c", RECIPE, *CPU, option]) == 2
        assert told in capsys.readouterr().err


def test_its_cost_is_that_of_four_rotations(technique, capsys):
    assert main(["cost", RECIPE]) == 0
    said = dict(line.rsplit("  ", 1) for line in capsys.readouterr().out.replace(" an image", "").splitlines()[1:3])
    macs = 16 * 8 * 9 + 4 * 16 * 72 + 32 * 144 + 4 * 32
    assert int(said["forward MACs  "].replace(",", "")) == macs


def test_it_is_benchmarked_beside_its_peer(technique, tmp_path, capsys):
    goal = {"steps": 5, "seconds": 0.0, "limit": 30.0}
    options = ["--trainer.devices", "1", *CPU]
    found = {}
    for peer in (None, "by-hand"):
        cell = {"mode": "step", "peer": peer, "axes": {}}
        asked, answer = tmp_path / "asked.json", tmp_path / "answer.json"
        asked.write_text(json.dumps({"cell": cell, "goal": goal, "configs": [RECIPE], "options": options}))
        assert main(["benchmark", "--cell", str(asked), str(answer), str(tmp_path / "runs")]) == 0
        found[peer] = json.loads(answer.read_text())
    assert [(each["status"], each["message"]) for each in found.values()] == [("ok", "")] * 2
    assert [each["differs"] for each in found.values()] == [None, "one rotation an image, drawn at random"]
    assert all(each["found"]["images_per_second"] > 0 for each in found.values())
    assert found[None]["found"]["flops_per_image"] > 0
    capsys.readouterr()
    assert main(["benchmark", RECIPE, "--peers", "by_hand"]) == 2
    assert "RotationPretrainer has no peer 'by_hand'; did you mean by-hand?" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_whole_benchmark_of_it(capsys):
    """In interpreters of their own, as people have it: other tests of the benchmark fork what it starts."""
    assert main(["benchmark", RECIPE, "--peers", "--repeats", "1", "--steps", "2", "--seconds", "0", *CPU]) == 0
    assert "by-hand" in capsys.readouterr().out


def test_weights_of_another_program_are_loaded_by_their_names(technique, tmp_path):
    torch.manual_seed(1)
    theirs, ours = technique(8, 1, 4), technique(8, 1, 4)
    names = {"backbone.0": "conv1", "backbone.2": "conv2", "backbone.4": "conv3", "head": "rotation"}
    state = {}
    for name, value in theirs.state_dict().items():
        part, _, leaf = name.rpartition(".")
        state[f"{names[part]}.{leaf}"] = value
    torch.save(state, tmp_path / "theirs.pth")
    report = weights.load(ours, tmp_path / "theirs.pth")
    assert str(report) == f"loaded 8 of 8 tensors from {tmp_path / 'theirs.pth'} (rotations of others)"
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    built = technique(8, 1, 4, weights=str(tmp_path / "theirs.pth"))
    assert torch.equal(built.head.weight, theirs.head.weight)
    with pytest.raises(ValueError, match="does not fit RotationPretrainer"):
        weights.load(technique(8, 1, 6), tmp_path / "theirs.pth")


def test_it_learns_in_a_trainer_of_ones_own_on_data_of_ones_own(technique, tmp_path):
    images = torch.zeros(256, 3, 16, 16)
    images[:, :, :4] = 1 + 0.1 * torch.randn(256, 3, 4, 16)  # the sky is bright
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=8, accelerator="cpu", default_root_dir=tmp_path, enable_model_summary=False, **quiet)
    loader = DataLoader(TensorDataset(images), batch_size=32)
    model = technique(image_size=16, width=8)
    trainer.fit(model, loader)
    assert trainer.test(model, loader, verbose=False)[0]["test/acc_rotation"] > 0.95
    predicted = trainer.predict(model, loader)
    assert math.isclose(sum(len(each) for each in predicted), 256)
