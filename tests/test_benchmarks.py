"""The benchmark scripts: what they reckon by formula is what torch counts. Their figures are never asserted."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo import MAEPretrainer
from zoo.cli.mistakes import Mistake
from zoo.detection.scale.views import parse_views
from zoo.gumbel_vae import estimators

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


@pytest.mark.parametrize(("size", "published"), [("small", 13.01), ("base", 19.56), ("large", 41.51), ("huge", 97.12)])
def test_the_papers_arithmetic_is_what_torch_counts_in_the_plain_forward_pass(size, published):
    pytest.importorskip("transformers")
    from mae_speed import SIZES, forward_flops, peer

    assert forward_flops(size) / 1e9 == pytest.approx(published, abs=0.006)
    with torch.device("meta"):
        model, _ = peer(size, compiled=False)
        images, noise = torch.empty(1, 3, 224, 224), torch.empty(1, (224 // SIZES[size][3]) ** 2)
    with FlopCounterMode(display=False) as counter:
        model(images, noise=noise)
    assert counter.get_total_flops() == pytest.approx(forward_flops(size), rel=1e-6)


@pytest.mark.parametrize(("decoder", "share"), [("self", 0.955), ("cross", 0.36)])
def test_training_does_less_than_the_paper(decoder, share):
    pytest.importorskip("transformers")
    from mae_speed import forward_flops

    with torch.device("meta"):
        model, images = MAEPretrainer("vit_small_patch16_224", decoder=decoder), torch.empty(64, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        model.masked_loss(images)
    assert counter.get_total_flops() / 64 / forward_flops("small") == pytest.approx(share, abs=0.005)


def test_what_is_compared_of_detectors_has_one_loss():
    from detection_speed import losses_alone, train_ours, train_theirs

    device = torch.device("cpu")
    rows = [row.make(device) for row in losses_alone(device) if "compiled" not in row.name]
    theirs, ours = (row.loss(torch.zeros(1)).item() for row in rows)
    assert ours == pytest.approx(theirs, rel=1e-6)
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    theirs, ours = train_theirs("resnet18", True, device), train_ours("resnet18", True, 64, device)
    assert ours.loss(images).item() == pytest.approx(theirs.loss(images).item(), rel=1e-4)


class StubbedGrid:
    """benchmarks/detection_scale.py with runs that take no time.

    Attributes:
        started: Names of the runs, as they started.
        failing: Those that fail.
    """

    def __init__(self, monkeypatch) -> None:
        import detection_scale

        self.script, self.started, self.failing = detection_scale, [], set()
        self.monkeypatch = monkeypatch
        rows = {
            "plain": detection_scale.Row("plain", "detection/shapes_one_level"),
            "other": detection_scale.Row("other", "detection/shapes_pyramid"),
            "views": detection_scale.Row("views", "detection/shapes_one_level", of="plain", options=["--model.x=1"]),
            "on": detection_scale.Row("on", "detection/shapes_one_level", after="plain"),
            "on_views": detection_scale.Row("on, views", "detection/shapes_one_level", of="on"),
        }
        monkeypatch.setattr(detection_scale, "ROWS", rows)
        monkeypatch.setattr(detection_scale, "measured", self.measured)

    def measured(self, run, options, out) -> dict[str, float]:
        self.started.append(run.name)
        if run.name in self.failing:
            raise Mistake("lr of FPNDetector: expected float")
        if not self.script.ROWS[run.row].of:
            run.checkpoint(out).parent.mkdir(parents=True, exist_ok=True)
            run.checkpoint(out).touch()
        ap = {"plain": 0.2, "other": 0.5, "views": 0.3, "on": 0.4, "on_views": 0.6}[run.row] + run.seed / 25
        sizes = {"test/ap_8_16": 0.0, "test/ap_16_32": ap / 2, "test/ap_by_class/disc": 1.0}
        seconds = {"train/seconds": 90.0 + run.seed * 20, "test/seconds": 2.5}
        return {"test/ap": ap, "test/ap50": 0.75, "test/ap75": 0.25, **sizes, **seconds}

    def __call__(self, *args: str) -> int:
        self.started.clear()
        self.monkeypatch.setattr(sys, "argv", ["detection_scale.py", "--out", "there", *args])
        return self.script.main()


@pytest.fixture
def grid(monkeypatch, tmp_path) -> StubbedGrid:
    monkeypatch.chdir(tmp_path)
    return StubbedGrid(monkeypatch)


def test_the_grid_of_detectors_is_a_table_and_a_plot_by_object_size(grid, capsys):
    assert grid("--seeds", "0", "1", "--splits", "all") == 0
    names = ["plain", "views", "on", "on_views", "other"]  # what needs a checkpoint comes when it is there
    assert grid.started == [f"{name}_all_seed{seed}" for seed in range(2) for name in names]
    printed = capsys.readouterr().out
    head = "|  | AP | AP50 | AP75 | 8 to 16 px | 16 to 32 px | training s | test s | seeds |"
    assert [line for line in printed.splitlines() if line.startswith("|")] == [
        head,
        "|---|---|---|---|---|---|---|---|---|",
        "| plain | 22.0 ± 2.8 | 75.0 ± 0.0 | 25.0 ± 0.0 | 0.0 ± 0.0 | 11.0 ± 1.4 | 100 | 2.5 | 2 |",
        "| other | 52.0 ± 2.8 | 75.0 ± 0.0 | 25.0 ± 0.0 | 0.0 ± 0.0 | 26.0 ± 1.4 | 100 | 2.5 | 2 |",
        "| views | 32.0 ± 2.8 | 75.0 ± 0.0 | 25.0 ± 0.0 | 0.0 ± 0.0 | 16.0 ± 1.4 |  | 2.5 | 2 |",
        "| on | 42.0 ± 2.8 | 75.0 ± 0.0 | 25.0 ± 0.0 | 0.0 ± 0.0 | 21.0 ± 1.4 | 200 | 2.5 | 2 |",
        "| on, views | 62.0 ± 2.8 | 75.0 ± 0.0 | 25.0 ± 0.0 | 0.0 ± 0.0 | 31.0 ± 1.4 |  | 2.5 | 2 |",
    ]
    assert Path("there", "table.md").read_text() == printed
    assert Path("there", "all.png").stat().st_size > 1000
    assert not Path("there", "held_out.png").exists()


def test_the_grid_goes_on_with_what_is_missing(grid, capsys):
    assert grid("--seeds", "0", "--rows", "plain") == 0
    assert grid.started == ["plain_all_seed0", "plain_held_out_seed0"]
    assert grid("--seeds", "0", "--rows", "views") == 0  # which needs the other's checkpoint, and finds it
    assert grid.started == ["views_all_seed0", "views_held_out_seed0"]
    assert "4 runs, 2 of them finished already" in capsys.readouterr().err
    assert grid("--seeds", "0", "--rows", "views") == 0
    assert grid.started == []
    assert "Sizes of 32 to 64 pixels held out of training:" in capsys.readouterr().out


def test_the_grid_makes_again_the_checkpoints_that_are_gone_and_needed(grid):
    assert grid("--seeds", "0", "--splits", "all", "--rows", "on") == 0
    assert grid.started == ["plain_all_seed0", "on_all_seed0"]
    shutil.rmtree(Path("there", "runs"))
    assert grid("--seeds", "0", "--splits", "all", "--rows", "on") == 0  # its metrics are there
    assert grid.started == []
    assert grid("--seeds", "0", "--splits", "all", "--rows", "on_views") == 0
    assert grid.started == ["plain_all_seed0", "on_all_seed0", "on_views_all_seed0"]
    assert grid("--seeds", "0", "--splits", "all") == 0  # checkpoints are there again
    assert grid.started == ["views_all_seed0", "other_all_seed0"]


def test_the_grid_refuses_runs_of_other_settings(grid, capsys):
    """Its own options, those of a row, and the recipe: also where only the checkpoint is of another one."""
    assert grid("--seeds", "0", "--splits", "all", "--model.lr=1") == 0
    rows = grid.script.ROWS
    changed = {"plain": rows["plain"]._replace(recipe="detection/shapes_pyramid")}
    for others, args in (({}, ["--model.lr=2"]), ({"views": rows["views"]._replace(options=[])}, ["--model.lr=1"])):
        grid.monkeypatch.setattr(grid.script, "ROWS", rows | others)
        with pytest.raises(SystemExit) as end:
            grid("--seeds", "0", "--splits", "all", *args)
        assert end.value.code == 2
        assert grid.started == []
        said = capsys.readouterr().err.splitlines()[-1]
        assert "is of other settings than" in said
        assert "remove it, or choose another --out" in said
    grid.monkeypatch.setattr(grid.script, "ROWS", rows | changed)
    Path("there", "plain_all_seed0.json").unlink()
    with pytest.raises(SystemExit):
        grid("--seeds", "0", "--splits", "all", "--model.lr=1")
    assert "views_all_seed0.json is of other settings than views has now" in capsys.readouterr().err


def test_a_failure_in_the_grid_costs_no_other_run(grid, capsys):
    grid.failing.add("plain_all_seed0")
    assert grid("--seeds", "0", "1", "--splits", "all") == 1
    assert not {"views_all_seed0", "on_all_seed0", "on_views_all_seed0"} & {*grid.started}
    said = capsys.readouterr()
    assert said.err.splitlines()[-4:] == [
        "plain_all_seed0: lr of FPNDetector: expected float",
        "views_all_seed0: not run, as plain_all_seed0 failed",
        "on_all_seed0: not run, as plain_all_seed0 failed",
        "on_views_all_seed0: not run, as on_all_seed0 failed",
    ]
    assert "| plain | 24.0 |" in said.out  # of the seed that did not fail
    assert "| other | 52.0 ± 2.8 |" in said.out
    grid.failing.clear()
    assert grid("--seeds", "0", "1", "--splits", "all") == 0
    assert grid.started == ["plain_all_seed0", "views_all_seed0", "on_all_seed0", "on_views_all_seed0"]


def test_what_is_compared_of_autoencoders_has_one_loss():
    from gumbel_vae_speed import difference

    assert difference((torch.rand(16, 1, 28, 28) > 0.7).float()) < 1e-6


def test_the_table_of_estimators_has_a_row_for_each(capsys, monkeypatch):
    import estimators_bias

    monkeypatch.setattr(sys, "argv", ["estimators_bias.py", "--draws", "200"])
    estimators_bias.main()
    printed = capsys.readouterr().out
    for name in estimators.ESTIMATORS:
        assert f"| {name}" in printed


def test_objects_in_large_images_are_found_once_and_by_their_class():
    from large_images import matched

    target = {"boxes": torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]]), "labels": torch.tensor([1, 2])}
    boxes = torch.tensor([[0.0, 0, 10, 9], [0, 0, 9, 10], [20, 0, 30, 10], [20, 0, 30, 10], [20, 0, 30, 4]])
    labels, scores = torch.tensor([1, 1, 1, 2, 2]), torch.tensor([0.9, 0.8, 0.7, 0.6, 0.2])
    found = {"boxes": boxes, "labels": labels, "scores": scores}
    assert matched(found, target) == (2, 2)
    assert matched({name: values[:0] for name, values in found.items()}, target) == (0, 0)
    assert matched(found, {name: values[:0] for name, values in target.items()}) == (0, 4)


def test_ways_to_look_at_large_images_are_views_of_the_detector():
    from large_images import WAYS, views

    shown = [parse_views(views(way, 4096, 128, 512, 0.25), 32) for way in WAYS]
    assert [[view.scale for view in each] for each in shown] == [[1 / 32], [1], [1], [1, 1 / 32]]
    assert [each[0].tile for each in shown] == [None, None, 512, 512]
    assert shown[3][1].valid_range == (128, None)


def test_rows_of_alignment_show_what_they_have():
    from alignment_shapes import table

    plain = {
        "test/acc_seen": [0.95, 0.97],
        "test/acc_unseen": [0.6, 0.6],
        "train/loss": [1.0, 1.5],
        "seconds": [90, 110],
    }
    swapped = {"test/swap_acc_seen": [0.75, 0.85], "train/loss": [2.0, 2.0], "seconds": [100, 100]}
    head = "|  | accuracy, seen | unseen | swap test, seen | training loss | seconds |"
    assert table({"softmax": plain, "two_objects": swapped}) == [
        head,
        "|---|---|---|---|---|---|",
        "| softmax, entailed captions too | 96.0 ± 1.4 | 60.0 ± 0.0 |  | 1.25 ± 0.35 | 100 ± 14 |",
        "| softmax, two objects |  |  | 80.0 ± 7.1 | 2.00 ± 0.00 | 100 ± 0 |",
    ]
