"""``zoo benchmark``: what is measured, how, beside whom, and what is said of it."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import zoo
from zoo.cli import main, recipes
from zoo.cli.benchmark import cells, operations, peers, process, report
from zoo.cli.benchmark.cells import Cell
from zoo.cli.benchmark.clock import Clock, Goal, percentiles
from zoo.cli.benchmark.measure import Waits, limit_of, random_batch
from zoo.cli.benchmark.peaks import PEAKS, peak_of
from zoo.cli.commands import benchmark
from zoo.common.peers import Peer

CPU = torch.device("cpu")


def row(
    rates=(100.0,), mode="step", peer=None, spread=0.0, status="ok", message="", axes=None, **found
) -> dict[str, object]:
    """A cell's file, with as many runs as rates."""
    step = {"median": 10.0, "p10": 10 * (1 - spread / 2), "p90": 10 * (1 + spread / 2)}
    runs = [
        {"images_per_second": rate, "step_ms": step, "memory_gib": {"process": 1.0}, "device": "cpu", "limit": "device"}
        | {"processes": 1, **found}
        for rate in rates
    ]
    cell = {"mode": mode, "peer": peer, "axes": axes or {}}
    return {"schema": 1, "cell": cell, "status": status, "message": message, "runs": runs}


# The clock.


class Time:
    """In the place of a module's own: seconds pass when somebody sleeps, however busy the machine is."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> Time:
    found = Time()
    for module in ("clock", "measure"):
        monkeypatch.setattr(f"zoo.cli.benchmark.{module}.time", found)
    return found


def ticks(clock: Clock, seconds: float = 0.0, sleep=time.sleep) -> int:
    """How many steps it takes to have enough."""
    for count in range(1, 10_000):
        sleep(seconds)
        if clock.tick():
            return count
    raise AssertionError("never enough")


def test_the_clock_times_what_is_asked_for_after_a_warm_up():
    clock = Clock(CPU, Goal(steps=7, seconds=0.0))
    taken = ticks(clock, 0.002)
    found = clock.seconds()
    assert len(found) == 7
    assert clock.warm_up_steps >= 10
    assert taken == clock.warm_up_steps + 7
    assert min(found) >= 0.002


def test_a_long_first_step_is_not_counted(passing):
    clock = Clock(CPU, Goal(steps=5, seconds=0.0))
    passing.sleep(0.3)
    clock.tick()
    ticks(clock, 0.002, passing.sleep)
    assert clock.seconds() == pytest.approx([0.002] * 5)


def test_the_clock_goes_on_for_as_long_as_is_asked_for(passing):
    clock = Clock(CPU, Goal(steps=1, seconds=0.2))
    ticks(clock, 0.002, passing.sleep)
    assert sum(clock.seconds()) == pytest.approx(0.2)


def test_beyond_the_limit_a_few_slow_steps_are_enough():
    clock = Clock(CPU, Goal(steps=1000, seconds=100.0, limit=0.01, fewest=3))
    assert ticks(clock, 0.02) == 1 + 3
    assert clock.warm_up_steps == 1


def test_every_process_takes_the_steps_that_the_first_one_says():
    said = []

    def first(value):
        said.append(value)
        return value

    leader = Clock(CPU, Goal(steps=9, seconds=0.0), agree=first)
    taken = ticks(leader, 0.001)
    heard = iter(said)
    follower = Clock(CPU, Goal(steps=1000, seconds=0.0, limit=0.0), agree=lambda value: next(heard))
    assert ticks(follower) == taken
    assert next(heard, None) is None


def test_percentiles_of_the_numbers_from_1_to_11():
    assert percentiles([n / 1e3 for n in range(1, 12)]) == pytest.approx({"median": 6, "p10": 2, "p90": 10})


# What devices can do.


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989.4),
        ("NVIDIA H100 PCIe", "bf16-true", 756.4),
        ("NVIDIA H200", "16-mixed", 989.4),
        ("NVIDIA GH200 480GB", "bf16-mixed", 989.4),
        ("NVIDIA A100-SXM4-40GB", "bf16-mixed", 312),
        ("NVIDIA A10", "bf16-mixed", 125),
        ("NVIDIA GeForce RTX 4090", "bf16-mixed", 165.2),
        ("NVIDIA L40S", "32-true", 91.6),
        ("Tesla V100-SXM2-16GB", "16-mixed", 125),
    ],
)
def test_dense_peaks(name, precision, tflops):
    rate, source = peak_of(name, precision)
    assert rate == tflops * 1e12
    assert f"{tflops:g} TFLOP/s" in source


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("NVIDIA A10G", "bf16-mixed"),
        ("NVIDIA Something 9000", "32-true"),
        ("Tesla T4", "bf16-mixed"),
        ("NVIDIA H100 80GB HBM3", "64-true"),
    ],
)
def test_nothing_is_guessed(name, precision):
    assert peak_of(name, precision) is None


def test_tf32_counts_where_torch_may_use_it():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert peak_of("NVIDIA A100-SXM4-80GB", "32-true")[0] == 156e12
    finally:
        torch.set_float32_matmul_precision(before)
    assert peak_of("NVIDIA A100-SXM4-80GB", "32-true")[0] == 19.5e12


def test_no_peak_is_one_with_sparsity():
    """Tensor cores multiply 16-bit numbers twice as fast as TF32 ones; sparse figures beside dense ones would show."""
    for name, peak in PEAKS.items():
        if peak.bf16 and peak.tf32:
            assert peak.bf16 / peak.tf32 == pytest.approx(2, rel=0.03), name


# What is measured.


@pytest.mark.parametrize(
    ("found", "limit"),
    [
        ({"waiting": 0.2}, "data"),
        ({"waiting": 0.01}, "device"),
        ({"issued_ms": 9.5}, "host"),
        ({"issued_ms": 3.0}, "device"),
        ({"issued_ms": 9.5, "waiting": 0.5}, "data"),
        ({}, "device"),
    ],
)
def test_what_a_run_waits_for(found, limit):
    assert limit_of({"step_ms": {"median": 10.0}, **found}) == limit


def test_time_spent_on_the_next_batch_is_counted_and_nothing_else(passing):
    waits = Waits()
    for action in ("[_TrainingEpochLoop].train_dataloader_next", "run_training_batch"):
        waits.start(action)
        passing.sleep(0.02)
        waits.stop(action)
    assert waits.seconds == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("aten::mm", "matrix products"),
        ("aten::convolution_backward", "convolutions"),
        ("aten::mkldnn_convolution", "convolutions"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("## Call CompiledFxGraph fpmvgpmhciafvv ##", "compiled code"),
        ("triton_poi_fused_add_0", "compiled code"),
        ("aten::_fused_adamw_", "optimizer"),
        ("Optimizer.step#RMSpropTF.step", "optimizer"),
        ("aten::native_layer_norm", "elementwise, norms, copies"),
        ("aten::comm_of_no_kind", "elementwise, norms, copies"),
    ],
)
def test_kinds_of_operations(operation, kind):
    assert operations.kind_of(operation) == kind


@pytest.mark.parametrize(
    ("call", "operands", "kind"),
    [
        (torch.ones(1024, 1024).matmul, [torch.ones(1024, 1024)], "matrix products"),
        (nn.functional.conv2d, [torch.ones(1, 64, 64, 64), torch.ones(64, 64, 3, 3)], "convolutions"),
        (time.sleep, [0.05], "Python"),
    ],
)
def test_what_a_step_spends_its_time_in(call, operands, kind):
    # The operands stand outside: on some machines filling fresh memory takes longer than a product of what is in it.
    def step():
        return call(*operands)

    step()  # what is set up in the first is not a part of it
    for _ in range(5):  # a busy machine may stop any of them in the middle of something else
        found = operations.shares(step, CPU)
        assert sum(found.values()) == pytest.approx(1)
        if next(iter(found)) == kind:
            return
    pytest.fail(f"most of its time is {next(iter(found))}, not {kind}: {found}")


def test_what_is_less_than_a_twentieth_is_not_said():
    found = {**row(), "runs": [{**row()["runs"][0], "operations": {"attention": 0.7, "Python": 0.26, "rest": 0.04}}]}
    assert "Of the time of `step zoo`: attention 70 %, Python 26 %." in report.notes([found])


def test_a_random_batch_is_what_the_module_takes():
    images, labels = random_batch(zoo.ViTClassifier("vit_tiny_patch16_224", num_classes=7, image_size=32), 64, CPU)
    assert images.shape == (64, 3, 32, 32)
    assert images.min() >= 0
    assert images.max() <= 1
    assert labels.unique().tolist() == list(range(7))


def test_a_detectors_random_batch_has_boxes_inside_of_its_images():
    model = zoo.FPNDetector("test_resnet", num_classes=3, image_size=(64, 96))
    images, targets = random_batch(model, 2, CPU)
    assert images.shape == (2, 3, 64, 96)
    for target in targets:
        x, y, right, bottom = target["boxes"].unbind(1)
        assert target["boxes"].shape == (8, 4)
        assert (x >= 0).all()
        assert (y >= 0).all()
        assert (right <= 96).all()
        assert (bottom <= 64).all()
        assert (right - x >= 6).all()
        assert target["labels"].max() < 3
    assert model.training_step((images, targets), 0).isfinite()


def test_cells_are_every_combination_with_the_peers_beside():
    found = cells.cells(
        ["step", "data"], {"precision": ["32-true", "bf16-mixed"]}, {"timm": ("step", "fit"), "torchvision": ("data",)}
    )
    names = [(cell.mode, cell.peer, cell.axes["precision"]) for cell in found]
    assert names == [
        ("step", None, "32-true"),
        ("step", "timm", "32-true"),
        ("step", None, "bf16-mixed"),
        ("step", "timm", "bf16-mixed"),
        ("data", None, "32-true"),
        ("data", "torchvision", "32-true"),
        ("data", None, "bf16-mixed"),
        ("data", "torchvision", "bf16-mixed"),
    ]
    assert len({cell.name for cell in found}) == len(found)


def test_a_cell_is_options_of_zoo_fit():
    cell = Cell("step", None, {"image_size": "64", "compile": "true"})
    assert cells.options_of(cell, ["--model.image_size", "--model.compile"]) == [
        *("--trainer.devices", "1"),
        *("--model.image_size", "64"),
        *("--model.compile", "true"),
    ]
    assert cells.options_of(Cell("fit", None, {"devices": "2"}), ["--trainer.devices"]) == ["--trainer.devices", "2"]


# Peers do the same work.


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def peer_of(model, name, **axes) -> peers.Other:
    network, loss = model.peers[name].build(model, axes)
    return peers.Other(network, loss, model)


def test_timms_networks_are_as_large():
    vit = zoo.ViTClassifier("vit_tiny_patch16_224", num_classes=10, image_size=32, patch_size=8, depth=2)
    efficientnet = zoo.EfficientNetClassifier("b0", num_classes=10, image_size=32)
    for model in (vit, efficientnet):
        peer = peer_of(model, "timm")
        assert parameters(peer) == parameters(model)
        images, labels = random_batch(model, 2, CPU)
        assert peer.training_step((images, labels), 0).isfinite()
        assert peer.predict_step((images, labels), 0).shape == (2, 10)


def test_channels_last_is_the_peers_too_where_it_is_asked_for():
    model = zoo.EfficientNetClassifier("b0", num_classes=10, image_size=32)
    for asked, expected in (("true", True), ("false", False)):
        weight = peer_of(model, "timm", channels_last=asked).network.conv_stem.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == expected


def test_huggingfaces_autoencoder_is_as_large():
    pytest.importorskip("transformers")
    sizes = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 4, "depth": 2}
    model = zoo.MAEPretrainer("vit_tiny_patch16_224", image_size=32, patch_size=8, **sizes)
    peer = peer_of(model, "huggingface")
    assert peer.network.config._attn_implementation == "sdpa"
    trained = [sum(p.numel() for p in each.parameters() if p.requires_grad) for each in (peer, model)]
    assert trained[0] == trained[1]
    assert peer.training_step(random_batch(model, 2, CPU), 0).isfinite()


@pytest.mark.parametrize("head", ["fcos", "retinanet"])
def test_torchvisions_detector_is_as_large(head):
    model = zoo.FPNDetector("resnet18", num_classes=5, image_size=64, head=head, anchors="torchvision")
    peer = peer_of(model, "torchvision")
    assert parameters(peer) == pytest.approx(parameters(model), rel=0.01)
    assert peer.training_step(random_batch(model, 2, CPU), 0).isfinite()


def test_the_hand_written_vae_gives_the_zoos_loss_for_the_same_noise():
    model = zoo.GumbelVAE(
        4, 3, 8, hidden=(16, 8), temperature=0.7, min_temperature=0.7, temperature_schedule="constant"
    )
    network = peer_of(model, "by-hand").network
    model.backbone.layers.load_state_dict(network.encoder.state_dict())
    model.decoder.layers.load_state_dict(network.decoder.state_dict())
    images = (torch.rand(6, 1, 8, 8) > 0.5).float()
    torch.manual_seed(0)
    theirs = network(images)
    torch.manual_seed(0)
    torch.testing.assert_close(model(images).loss.mean(), theirs)


def test_a_peer_has_the_optimizer_of_the_model_it_stands_for():
    model = zoo.EfficientNetClassifier("b0", num_classes=10, optimizer="sgd", lr=0.3, momentum=0.8)
    optimizer = peer_of(model, "timm").configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    assert {group["lr"] for group in optimizer.param_groups} == {0.3}
    assert {group["momentum"] for group in optimizer.param_groups} == {0.8}


def test_a_peer_that_is_not_installed_is_known_as_such():
    there, not_there = (Peer(name, ("step",), "", lambda: None) for name in ("torch", "no_such_package"))
    assert peers.is_installed(there)
    assert not peers.is_installed(not_there)


def test_a_peer_that_is_not_installed_is_a_row_that_names_the_extra(monkeypatch, tmp_path):
    known = zoo.ViTClassifier.peers["timm"]._replace(needs="no_such_package")
    monkeypatch.setattr(zoo.ViTClassifier, "peers", {"timm": known})
    setting = {"cell": Cell("step", "timm", {})._asdict(), "goal": {}, "options": ["--trainer.devices", "1"]}
    asked, found = tmp_path / "asked.json", tmp_path / "found.json"
    asked.write_text(json.dumps(setting | {"configs": [recipes.find("vit/digits")]}))
    process.answer(asked, found, tmp_path, False)
    told = "timm needs no_such_package: pip install 'vision-zoo[peers]'"
    assert json.loads(found.read_text()) == {"status": "not installed", "message": told}


@pytest.mark.parametrize(
    ("error", "peer", "status"),
    [
        (ImportError("no package"), "timm", "not installed"),
        (ImportError("no package"), None, "failed"),  # the recipe's own
        (process.NoDeviceError("no GPU"), None, "no device"),
        (torch.OutOfMemoryError("CUDA out of memory"), None, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), "timm", "out of memory"),
        (ValueError("wrong"), "timm", "failed"),
    ],
)
def test_what_became_of_a_cell(error, peer, status):
    assert process.status_of(error, str(error), peer) == status
    assert status in {*cells.FAILED, *cells.NOT_HERE}


# What is said of it.


def test_a_ratio_smaller_than_its_spread_is_not_printed():
    assert report.ratio_text(row([130, 131, 129]), row([100, 101, 99])) == "1.3×"
    assert report.ratio_text(row([104, 90, 110]), row([100, 100, 100])) == "within 20 %"
    assert report.ratio_text(row([110.0], spread=0.3), row([100.0], spread=0.3)) == "within 33 %"
    assert report.ratio_text(row([110.0], spread=0.02), row([100.0], spread=0.02)) == "1.1×"


def test_runs_of_the_same_round_belong_together():
    """A machine that becomes slower and slower: every round says 2, whatever the rates."""
    assert report.ratio(row([200, 100, 50]), row([100, 50, 25])) == (2, 0)


def test_the_table_has_a_row_for_what_failed():
    rows = [
        row([100.0, 100.0]),
        row([150.0, 150.0], peer="timm"),
        row(status="out of memory", message="killed", rates=[], axes={"batch_size": "9"}),
    ]
    lines = report.table(rows).splitlines()
    assert len(lines) == 2 + 3
    assert lines[2].endswith("| 1 |  |")
    assert lines[3].endswith("| 1.5× |  |")
    assert "| out of memory: killed |" in lines[4]


def test_the_trainer_is_compared_with_the_loop_written_by_hand():
    rows = [row([100, 100]), row([90, 90], peer="timm"), row([98, 98], mode="fit"), row([45, 45], "fit", "timm")]
    found = [line.split(" | ")[-1].strip(" |") for line in report.table(rows).splitlines()[2:]]
    assert found == ["", "", "0.98×", "0.5×"]


def test_utilisation_is_flops_over_the_peak_of_all_devices():
    known = {"device": "cuda", "flops_per_image": 3e9, "peak_flops": 1e12, "peak_source": "a datasheet", "processes": 2}
    assert report.utilisation(row([100.0], **known)) == "15.0 %"
    assert report.utilisation(row([100.0], **known | {"peak_flops": None})) == "n/a"
    assert report.utilisation(row([100.0])) == "n/a"
    assert report.notes([row([100.0], **known)]) == ["Peak: a datasheet."]


def write(folder: Path, *rows) -> Path:
    folder.mkdir()
    for number, each in enumerate(rows):
        (folder / f"{number}.json").write_text(json.dumps(each))
    return folder


def test_compare_ends_with_1_for_what_became_slower(tmp_path, capsys):
    before = write(tmp_path / "a", row([100, 101]), row([50, 50], mode="fit"))
    after = write(tmp_path / "b", row([80, 81]), row([50, 50], mode="fit"), row([7, 7], mode="infer"))
    assert main(["benchmark", "compare", str(before), str(after)]) == 1
    said = capsys.readouterr()
    assert "| step zoo | 100.5 | 80.5 | 0.801× |" in said.out
    assert "| fit zoo | 50 | 50 | within 0 % |" in said.out
    assert "| infer zoo | not measured | 7 |" in said.out
    assert said.err == "zoo: slower than allowed: step zoo: 20 % slower\n"
    assert main(["benchmark", "compare", str(before), str(after), "--max-regression", "25%"]) == 0


def test_what_is_within_the_spread_has_not_become_slower(tmp_path):
    before, after = write(tmp_path / "a", row([100, 120])), write(tmp_path / "b", row([90, 110]))
    assert main(["benchmark", "compare", str(before), str(after), "--max-regression", "1%"]) == 0


MISSING = {"rates": [], "message": "why"}  # has no runs


@pytest.mark.parametrize(
    ("before", "after", "lost"),
    [
        (row(), row(), None),
        (row(), None, "missing"),
        (row(), row(status="failed", **MISSING), "failed: why"),
        (row(), row(status="out of memory", **MISSING), "out of memory: why"),
        (row(), row(status="no device", **MISSING), "no device: why"),
        (row(), row(status="not installed", **MISSING), "not installed: why"),
        (row(status="failed", **MISSING), row(), None),
        (row(status="failed", **MISSING), row(status="failed", **MISSING), "failed: why"),
        (row(status="failed", **MISSING), None, "missing"),
        (row(status="no device", **MISSING), row(), None),
        (row(status="no device", **MISSING), row(status="no device", **MISSING), None),
        (row(status="not installed", **MISSING), None, None),
        (row(status="not installed", **MISSING), row(status="failed", **MISSING), "failed: why"),
        (None, row(status="failed", **MISSING), None),  # nothing that there was is lost
    ],
)
def test_compare_ends_with_1_for_what_is_lost_and_names_it(tmp_path, capsys, before, after, lost):
    beside = row([50, 50], mode="fit")
    folders = [
        write(tmp_path / name, beside, *filter(None, [each])) for name, each in zip("ab", (before, after), strict=True)
    ]
    assert main(["benchmark", "compare", *map(str, folders)]) == (0 if lost is None else 1)
    said = capsys.readouterr()
    assert said.err == ("" if lost is None else f"zoo: not measured in {folders[1]}: step zoo: {lost}\n")
    assert said.out.count("\n") == 2 + 1 + (before is not None or after is not None)


def test_compare_names_every_cell_that_is_lost_and_every_slower_one(tmp_path, capsys):
    old = [row(mode=mode, axes={"precision": precision}) for mode in ("step", "fit") for precision in ("32", "16")]
    new = [row([10], "step", axes={"precision": "32"}), row(status="failed", axes={"precision": "16"}, **MISSING)]
    before, after = write(tmp_path / "a", *old), write(tmp_path / "b", *new)
    assert main(["benchmark", "compare", str(before), str(after)]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "zoo: slower than allowed: step zoo precision 32: 90 % slower",
        f"zoo: not measured in {after}: step zoo precision 16: failed: why",
        f"zoo: not measured in {after}: fit zoo precision 32: missing",
        f"zoo: not measured in {after}: fit zoo precision 16: missing",
    ]


@pytest.mark.parametrize(
    ("statuses", "failed"),
    [
        (["ok", "ok"], []),
        (["ok", "no device", "not installed"], []),
        (["ok", "failed"], ["failed"]),
        (["ok", "out of memory", "no device"], ["out of memory"]),
        (["no device", "not installed"], ["no device", "not installed"]),  # there is not a figure
        (["failed", "not installed"], ["failed", "not installed"]),
    ],
)
def test_what_is_not_here_is_no_failure_unless_there_is_nothing_else(statuses, failed):
    rows = [row([1.0] if status == "ok" else [], status=status, message="why") for status in statuses]
    assert report.failures(rows) == [f"step zoo: {status}: why" for status in failed]


def test_a_plot_is_named_where_it_was_drawn_and_none_is_left_from_before(tmp_path):
    failed = row([], status="failed", message="why")
    assert benchmark._written([row(), failed], tmp_path).splitlines()[-1] == f"plot {tmp_path / 'plot.png'}"
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert benchmark._written([failed], tmp_path).splitlines()[-1] == f"table {tmp_path / 'table.md'}"
    assert not (tmp_path / "plot.png").exists()
    assert (tmp_path / "table.md").read_text() == report.table([failed]) + "\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "expected a folder that zoo benchmark has written"), ("{", "is no JSON"), ('{"schema": 99}', "is no cell")],
)
def test_compare_says_what_is_wrong_with_a_file(tmp_path, capsys, content, said):
    good, bad = write(tmp_path / "good", row()), tmp_path / "bad"
    bad.mkdir()
    if content:
        (bad / "x.json").write_text(content)
    assert main(["benchmark", "compare", str(good), str(bad)]) == 2
    assert said in capsys.readouterr().err


# The command.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["vit/digit"], "there is no recipe or file 'vit/digit'; did you mean vit/digits?"),
        ([], "benchmark needs a recipe"),
        (["vit/digits", "--mode", "stp"], "unknown mode 'stp'; did you mean step?"),
        (["vit/digits", "--percision", "bf16-mixed"], "unknown option --percision; did you mean precision?"),
        (["vit/digits", "--model.lrr", "1"], "no option 'lrr'"),
        (["vit/digits", "--precision", "bf17"], "precision"),
        (["vit/digits", "--channels-last", "true"], "ViTClassifier has no channels_last: leave --channels-last out"),
        (["vit/digits", "--peers", "tim"], "ViTClassifier has no peer 'tim'; did you mean timm?"),
        (["vit/digits", "--peers", "--mode", "data"], "there is no peer of ViTClassifier for --mode data"),
        (["vit/digits", "--out", "other"], "other holds fit.json of another benchmark: name another --out"),
        (["vit/digits", "--mode", "fit", "--out", "other"], "other holds fit.json of another benchmark"),
        *((["vit/digits", "--repeats", size], f"{size!r} is not a whole number") for size in ("0", "-1", "1.5", "nan")),
        *((["vit/digits", "--steps", size], f"{size!r} is not a whole number") for size in ("0", "-5", "x")),
        *((["vit/digits", "--seconds", time], "expected seconds, 0 or more") for time in ("-1", "nan", "inf", "x")),
        *(
            (["vit/digits", "--limit", time], "expected seconds, more than 0")
            for time in ("0", "-2", "nan", "inf", "x")
        ),
        (["vit/digits", "--batch-size", "64", "0"], "--data.batch_size is 0: expected at least 1"),
        (["vit/digits", "--batch-size", "-1"], "--data.batch_size is -1: expected at least 1"),
        (["vit/digits", "--data.batch_size", "0"], "--data.batch_size is 0: expected at least 1"),
        (["empty.yaml"], "--data.batch_size is 0: expected at least 1"),
        (["vit/digits", "--image-size", "0"], "--model.image_size is 0: expected at least 1"),
        (["detection/shapes", "--model.image_size", "[64, 0]"], "--model.image_size is (64, 0): expected at least 1"),
        (["vit/digits", "--num-workers", "-1"], "--data.num_workers is -1: expected at least 0"),
        (["vit/digits", "--devices", "1", "0"], "--trainer.devices is 0: expected at least 1"),
        (["vit/digits", "--devices", "-1"], "--trainer.devices is -1: expected at least 1"),
        (["vit/digits", "--devices", "two"], "--trainer.devices is two: expected a number, devices as in 0,1, or auto"),
        (["vit/digits", "--trainer.devices", "2"], "--trainer.devices: here it is an axis, --devices"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(arguments, said, capsys):
    digits = {"class_path": "DigitsDataModule", "init_args": {"batch_size": 0}}
    Path("empty.yaml").write_text(json.dumps({"model": "ViTClassifier", "data": digits}))
    write(Path("other").absolute(), row(mode="fit")).joinpath("0.json").rename("other/fit.json")
    assert main(["benchmark", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not Path("runs").exists()


def test_each_benchmark_has_a_folder_of_its_own():
    file = recipes.find("vit/digits")
    assert benchmark.new_folder(file) == Path("runs/benchmark/vit/digits/version_0")
    Path("runs/benchmark/vit/digits/version_0").mkdir(parents=True)
    assert benchmark.new_folder(file) == Path("runs/benchmark/vit/digits/version_1")
    assert benchmark.new_folder("somewhere/mine.yaml") == Path("runs/benchmark/mine/version_0")


QUICK = ["--repeats", "1", "--steps", "5", "--seconds", "0", "--limit", "20"]


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(zoo.__file__).parents[1]))


@pytest.mark.usefixtures("_installed", "_forked_programs")
def test_what_cannot_be_measured_is_a_row_and_the_rest_is_measured(capsys):
    options = ["--accelerator", "cpu", *(["cuda"] if not torch.cuda.is_available() else [])]
    assert main(["benchmark", "vit/digits", *QUICK, *options, "--out", "found"]) == 0
    said = capsys.readouterr().out
    cpu = json.loads(Path("found/step-accelerator=cpu.json").read_text())
    assert cpu["status"] == "ok"
    run = cpu["runs"][0]
    assert run["steps"] == 5
    assert run["images_per_second"] == pytest.approx(64e3 / run["step_ms"]["median"])
    assert run["flops_per_image"] > 1e6
    assert cpu["config"]["model"]["class_path"] == "zoo.ViTClassifier"
    assert {"torch", "vision-zoo", "python"} <= set(cpu["versions"])
    assert "cores" in cpu["hardware"]["cpu"]
    assert Path("found/table.md").read_text().strip() in said
    assert Path("found/plot.png").stat().st_size > 1000
    if not torch.cuda.is_available():
        assert "no device: there is no GPU that torch can use here: name --accelerator cpu" in said


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("_installed", "_forked_programs")
@pytest.mark.parametrize("fails", ["always", pytest.param("compiled", marks=pytest.mark.slow)])
def test_a_cell_that_fails_ends_with_1_and_no_plot_is_drawn_of_nothing(fails, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command line adds to it where it stands
    Path("broken_here.py").write_text(
        "from torch import nn, optim\n"
        "from zoo._lightning import LightningModule\n"
        "class Broken(LightningModule):\n"
        "    input_shape = (1, 16, 16)\n"
        "    def __init__(self, compile: bool = False, always: bool = True, num_classes: int = 10) -> None:\n"
        "        super().__init__()\n"
        "        self.layer, self.breaks = nn.Linear(256, num_classes), compile or always\n"
        "    def forward(self, images):\n"
        "        return self.layer(images.flatten(1))\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        if self.breaks:\n"
        "            raise RuntimeError('broken on purpose')\n"
        "        return nn.functional.cross_entropy(self(batch[0]), batch[1])\n"
        "    def configure_optimizers(self):\n"
        "        return optim.SGD(self.parameters(), lr=0.1)\n"
    )
    options = ["--model", "broken_here.Broken", "--model.always", str(fails == "always")]
    if fails == "compiled":
        options += ["--compile", "false", "true"]
    Path("found").mkdir()
    Path("found/plot.png").touch()  # of an earlier try
    Path("mine.yaml").write_text("data: {class_path: DigitsDataModule, init_args: {image_size: 16}}")
    assert main(["benchmark", "mine.yaml", *QUICK, "--accelerator", "cpu", *options, "--out", "found"]) == 1
    said = capsys.readouterr()
    name = "step zoo accelerator cpu" if fails == "always" else "step zoo compile true accelerator cpu"
    assert said.err.splitlines()[-1] == f"zoo: not measured: {name}: failed: broken on purpose"
    assert "| failed: broken on purpose |" in said.out
    assert ("plot found/plot.png" in said.out) == Path("found/plot.png").exists() == (fails == "compiled")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("_installed", "_forked_programs")
def test_every_mode_is_measured():
    modes = ["--mode", *cells.MODES]
    assert main(["benchmark", "vit/digits", *QUICK, *modes, "--out", "found"]) == 0
    rows = {path.stem: json.loads(path.read_text()) for path in Path("found").glob("*.json")}
    assert set(rows) == set(cells.MODES)
    assert {name: each["message"] for name, each in rows.items() if each["status"] != "ok"} == {}
    assert rows["e2e"]["runs"][0]["waiting"] > 0
    assert rows["data"]["runs"][0]["megabytes_per_second"] > 0


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("_installed", "_forked_programs")
def test_two_processes_are_measured_and_too_large_a_batch_is_a_row():
    axes = ["--devices", "2", "--batch-size", "64", "10000000000", "--accelerator", "cpu", "--strategy", "ddp"]
    assert main(["benchmark", "vit/digits", *QUICK, *axes, "--out", "found"]) == 1
    rows = [json.loads(path.read_text()) for path in Path("found").glob("*.json")]
    small, large = sorted(rows, key=lambda row: len(row["cell"]["axes"]["batch_size"]))
    run = small["runs"][0]
    assert run["processes"] == 2
    assert run["images_per_second"] == pytest.approx(2 * 64e3 / run["step_ms"]["median"])
    assert large["status"] == "out of memory"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("_installed", "_forked_programs")
def test_a_peer_is_measured_beside_the_zoo(capsys):
    assert main(["benchmark", "mae/digits", *QUICK, "--peers", "--out", "found"]) == 0
    rows = [json.loads(path.read_text()) for path in Path("found").glob("*.json")]
    assert [(row["status"], row["message"]) for row in rows] == [("ok", "")] * 2
    peer = next(row for row in rows if row["cell"]["peer"])
    assert f"{peer['cell']['peer']}: {peer['differs']}." in capsys.readouterr().out


def test_torchvisions_loader_reads_the_same_folder(tmp_path):
    from PIL import Image

    from datamodules import ImageFolderDataModule

    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (40, 30), (number * 40, 0, 0)).save(tmp_path / "train" / name / f"{number}.png")
    data = ImageFolderDataModule(str(tmp_path), image_size=16, batch_size=4, num_workers=0, val_fraction=0.25)
    data.prepare_data()
    data.setup("fit")
    loader = peers.LOADERS["ImageFolderDataModule"]["torchvision"].build(data)
    assert isinstance(loader, DataLoader)
    images, labels = next(iter(loader))
    assert images.shape == (4, 3, 16, 16)
    assert images.is_floating_point()
    assert set(labels.tolist()) <= {0, 1}
