"""Gradients as random variables, against enumeration, and the command that compares estimators by them and by runs."""

import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import forked
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from zoo.cli import main
from zoo.cli.plots import OUTSIDE, lines
from zoo.cli.sweep import write_json
from zoo.gumbel_vae import GumbelVAE, compare, measure
from zoo.gumbel_vae.estimators import ESTIMATORS

TINY = {"latents": 2, "categories": 3, "image_size": 4, "hidden": [8]}
DIGITS = {"latents": 2, "categories": 3, "image_size": 8, "hidden": [16], "iw_samples": 3}
ARGUMENTS = {"latents": 8, "categories": 8, "kl": "analytic", "estimator_samples": None, "image_size": 8}
COMMAND = "compare-estimators"


@pytest.fixture(autouse=True)
def _as_started(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("ZOO_DEBUG", raising=False)


def vae(estimator: str, **options) -> GumbelVAE:
    """Models of one seed have the same weights, whatever the estimator."""
    torch.manual_seed(1)
    model = GumbelVAE(estimator=estimator, **{**TINY, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)  # posteriors that are neither uniform nor all but certain
    return model


def images(count: int = 6, side: int = 4) -> Tensor:
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(2)).round()


def recipe(model: dict | None = None, **data) -> str:
    settings = {
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "limit_train_batches": 2,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
        },
        "model": {"class_path": "zoo.GumbelVAE", "init_args": {**DIGITS, **(model or {})}},
        "data": {
            "class_path": "DigitsDataModule",
            "init_args": {"batch_size": 50, "mean": [0.0], "std": [1.0], "binarize": "draw", **data},
        },
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(settings))
    return "recipe.yaml"


def finished(folder: Path, name: str, elbo: float, log_likelihood: float, kl: float = 2.0, active: float = 2) -> None:
    """The metrics that a run would leave."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {"elbo": elbo, "log_likelihood": log_likelihood, "kl": kl, "active_latents": active}
    write_json(folder / f"{name}.json", {"seconds": 1.0, **{f"test/{key}": value for key, value in metrics.items()}})


def checkpoint(folder: Path, estimator: str) -> None:
    """The weights that a run would leave."""
    folder.mkdir(parents=True)
    torch.save({"state_dict": vae(estimator, **DIGITS).state_dict()}, folder / "epoch=0.ckpt")
    (folder / "last.ckpt").symlink_to("epoch=0.ckpt")


def refused(capsys, *args: str) -> str:
    capsys.readouterr()
    assert main([COMMAND, *args]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert err[0].startswith("zoo: error: ")
    return err[0].removeprefix("zoo: error: ")


def rows(table: str) -> list[list[str]]:
    found = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in found}) == 1
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found]


# Gradients.


def exact_gradient(model: GumbelVAE, images: Tensor) -> Tensor:
    """Of minus the mean ELBO, by a loop over all states."""
    log_q = model.encode(images).log_softmax(-1)
    loss = (log_q.exp() * (log_q + math.log(model.categories))).sum((-1, -2))
    for state in itertools.product(range(model.categories), repeat=model.latents):
        z = torch.eye(model.categories)[list(state)].expand(1, len(images), -1, -1)
        weight = torch.stack([log_q[:, n, category] for n, category in enumerate(state)]).sum(0).exp()
        loss = loss + weight * model.distortion(z, images)[0]
    found = torch.autograd.grad(loss.mean(), list(model.backbone.parameters()))
    return torch.cat([part.flatten() for part in found]).double()


def test_gradients_against_enumeration():
    """A dropout, a weight of the KL and an unfinished schedule do not matter: what is measured is the bound's."""
    batch, found = images(), {}
    for seed, name in enumerate(("exact", "local_expectation", "rloo", "reinforce", "straight_through")):
        model = vae(name, dropout=0.5, kl_weight=0.3, kl_warmup_steps=9)
        found[name] = measure.gradients(model, batch, draws=250, seed=seed)
    expected = exact_gradient(vae("exact").eval(), batch)
    torch.testing.assert_close(found["exact"].mean, expected, rtol=1e-4, atol=1e-5)
    assert found["exact"].variance == 0
    relative = {name: measure.relative(each, found["exact"]) for name, each in found.items()}
    for name in ("local_expectation", "rloo", "reinforce"):
        assert 0 < relative[name]["bias"] < 2 * relative[name]["error"]
    assert relative["straight_through"]["bias"] > 5 * relative["straight_through"]["error"]
    variances = [relative[name]["variance"] for name in ("exact", "local_expectation", "rloo", "reinforce")]
    assert variances == sorted(variances)


def test_running_sums_are_those_of_the_draws_themselves():
    model, batch = vae("rloo").eval(), images()
    found = measure.gradients(model, batch, draws=20, seed=5)
    torch.manual_seed(5)
    draws = []
    for _ in range(20):
        loss = model.objective(batch, torch.tensor(1.0), torch.tensor(0.5)).loss.mean()
        parts = torch.autograd.grad(loss, list(model.backbone.parameters()))
        draws.append(torch.cat([part.flatten() for part in parts]).double())
    expected = torch.stack(draws)
    torch.testing.assert_close(found.mean, expected.mean(0))
    assert found.variance == pytest.approx(float(expected.var(0).sum()))
    assert found.draws == 20


def test_measuring_disturbs_no_other_random_numbers_and_ends_in_time():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    assert measure.gradients(vae("rloo"), images(), draws=10**9, seconds=0.0).draws == measure.FEWEST
    torch.manual_seed(3)
    measure.gradients(vae("rloo", hidden=[4]), images(), draws=2)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3), expected)


def test_a_running_baseline_is_measured_once_it_has_run():
    """From a baseline of 0 the first gradients would be those of a plain REINFORCE."""
    plain, running = (measure.gradients(vae(name), images(), 30) for name in ("reinforce", "reinforce_baseline"))
    assert running.variance < 0.5 * plain.variance


def test_what_bias_and_variance_are_relative_to():
    reference = measure.Gradients(torch.tensor([3.0, 4.0]).double(), 2.0, 4)
    found = measure.Gradients(torch.tensor([3.0, 5.0]).double(), 50.0, 100)
    expected = {"variance": 50 / 25, "bias": 1 / 5, "error": math.sqrt(0.5 + 0.5) / 5}
    assert measure.relative(found, reference) == pytest.approx(expected)


@pytest.mark.parametrize(("schedule", "expected"), [("constant", 2.0), ("exponential", 0.25), ("cosine", 0.25)])
def test_the_temperature_is_that_at_the_end(schedule, expected):
    model = vae("rloo", temperature=2.0, min_temperature=0.25, temperature_schedule=schedule, kl_weight=6.6)
    assert [float(knob) for knob in measure.last_knobs(model)] == [1.0, expected]


def test_steps_that_are_timed_are_training_steps():
    models = {name: vae(name) for name in ("rloo", "gumbel_softmax")}
    before = {name: [p.clone() for p in model.parameters()] for name, model in models.items()}
    times = measure.step_times(models, images(), steps=3)
    assert list(times) == list(models)
    for name, model in models.items():
        assert times[name] > 0
        assert model.training
        assert all(not torch.equal(p, was) for p, was in zip(model.parameters(), before[name], strict=True))


# Which estimators can do what.


def test_estimators_that_cannot_do_a_recipe_are_left_out_with_a_note(capsys):
    assert compare.suited(ARGUMENTS, None) == [name for name in ESTIMATORS if name not in ("exact", "disarm")]
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "without exact: 8 latents of 8 categories have more than 65536 states"
    assert told[1].startswith("without disarm: estimator 'disarm' is for binary latents: categories is 8")
    assert len(told) == 2
    assert compare.suited(ARGUMENTS | {"latents": 16, "categories": 2}, None) == list(ESTIMATORS)
    assert compare.suited(ARGUMENTS | {"kl": "relaxed", "estimator": "gumbel_softmax"}, None) == [
        "vimco",
        "gumbel_softmax",
    ]
    assert compare.suited(ARGUMENTS, ["vimco", "rloo", "vimco"]) == ["vimco", "rloo"]


def test_a_number_of_samples_goes_to_those_that_take_one(capsys):
    arguments = ARGUMENTS | {"estimator": "rloo", "estimator_samples": 6}
    assert compare.changes(arguments, "rloo") == {"estimator": "rloo"}
    hot = {"temperature": 1.0, "temperature_schedule": "constant"}
    assert compare.changes(arguments, "reinmax") == {"estimator": "reinmax", "estimator_samples": None} | hot
    assert compare.changes(ARGUMENTS, "straight_through") == {"estimator": "straight_through"} | hot
    assert compare.changes(arguments, "vimco") == {"estimator": "vimco", "kl": "sampled"}
    assert "reinmax" in compare.suited(arguments, None)
    assert "rloo" not in compare.suited(arguments | {"estimator": "gumbel_rao", "estimator_samples": 1}, None)
    assert "without rloo: rloo with 1 samples: expected at least 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "names", "told"),
    [
        ({}, ["rlo"], "^unknown estimator 'rlo'; did you mean rloo[?]$"),
        ({}, ["backprop"], "^unknown estimator 'backprop'; expected some of exact, "),
        ({}, ["rloo", "disarm"], "^estimator 'disarm' cannot do this recipe: .*binary"),
        ({}, ["exact"], "^estimator 'exact' cannot do this recipe: 8 latents of 8 categories have more than 65536"),
    ],
)
def test_estimators_that_are_named_have_to_be_able(arguments, names, told):
    with pytest.raises(ValueError, match=told):
        compare.suited(ARGUMENTS | arguments, names)


# The command.


def test_measurements_and_finished_runs_become_a_table_and_a_plot(capsys):
    """Three estimators' runs of two seeds are finished; measured is at the first one's weights, once."""
    out, names = Path("runs", COMMAND), ["rloo", "straight_through", "vimco"]
    for number, name in enumerate(names):
        for seed in range(2):
            finished(out, f"{name}_seed{seed}", -20.0 - number - seed / 4, -19.0 - number, kl=1.5 + seed, active=seed)
    checkpoint(out / "rloo_seed0" / "checkpoints", "rloo")
    args = [recipe(), "--seeds", "2", "--estimators", *names]
    assert main([COMMAND, *args]) == 0
    printed = capsys.readouterr().out
    assert "6 runs, 6 of them finished already" in printed
    assert "without figures of other models: nats has figures for 8x8 images of 0 and 1 only" in printed
    head, _, *body = rows(printed)
    assert head[2:4] == ["-ELBO", "-log p, 3 samples"]
    assert [row[:2] for row in body] == [["rloo", "yes"], ["straight_through", "no"], ["vimco", "of another bound"]]
    for number, row in enumerate(body):
        both = 20 + number, 20.25 + number
        assert row[2:6] == [f"{mean(both):.2f} ± {stdev(both):.2f}", f"{19 + number:.2f} ± 0.00", "2.00", "0.5"]
        assert row[9] == ", ".join(f"{loss:.2f}" for loss in both)
        assert float(row[6]) > 0
        assert float(row[7]) > 0
    biases = {row[0]: [float(number) for number in row[8].split(" ± ")] for row in body if row[8]}
    assert list(biases) == ["rloo", "straight_through"]
    assert biases["rloo"][0] < 2 * biases["rloo"][1]
    assert biases["straight_through"][0] > 5 * biases["straight_through"][1]
    measured = json.loads((out / "measured.json").read_text())
    assert measured["checkpoint"] == "rloo_seed0/checkpoints/epoch=0.ckpt"
    assert (measured["images"], measured["temperatures"]["rloo"]) == (50, 0.5)
    place = "of 50 training images, at rloo_seed0/checkpoints/epoch=0.ckpt and temperature 0.5 (straight_through 1)"
    assert f"{place}, of 200 draws" in printed
    assert printed.endswith(f"table {out / 'table.md'}\nplot {out / 'plot.png'}\n")
    assert (out / "table.md").read_text().strip() in printed
    with Image.open(out / "plot.png") as picture:
        assert min(picture.size) > 300
    # Again: nothing but table and plot is made, and other seeds need no other measurement.
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.json")}
    assert main([COMMAND, *args]) == 0
    assert rows(capsys.readouterr().out) == [head, ["---"] * 10, *body]
    assert main([COMMAND, args[0], "--seeds", "1", "--estimators", *names]) == 0
    assert [row[2] for row in rows(capsys.readouterr().out)[2:]] == ["20.00", "21.00", "22.00"]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.json")} == stamps
    # Another first estimator means other weights, which are not there.
    told = refused(capsys, args[0], "--seeds", "1", "--estimators", *reversed(names))
    assert told == f"there is no checkpoint in {out / 'vimco_seed0'}, where gradients would be measured"
    assert "holds runs of other options" in refused(capsys, *args, "--model.lr", "1")


def test_many_series_have_their_legend_beside_the_plot():
    """It takes room there, and would hide points inside."""
    widths = []
    for count in (OUTSIDE, OUTSIDE + 1):
        lines(Path("plot.png"), {f"estimator number {i}": [(1 + i, i, 0.5)] for i in range(count)}, "x", "y")
        with Image.open("plot.png") as picture:
            # The frame of the axes: the longest dark horizontal line.
            dark = torch.tensor(list(picture.convert("L").tobytes())).reshape(picture.height, picture.width) < 60
            widths.append(int(dark.sum(1).max()))
    assert widths[1] < 0.8 * widths[0]


@pytest.mark.slow
@pytest.mark.timeout(300)  # four processes, of which one is stopped
@pytest.mark.usefixtures("_forked_programs")
def test_comparison_end_to_end(capsys):
    """The real runs of two estimators and seeds; it goes on where it stopped, and measures once."""
    out = Path("elsewhere")
    args = [recipe(binarize="threshold"), "--out", str(out), "--seeds", "2", "--estimators", "exact", "gumbel_softmax"]
    command = [sys.executable, "-m", "zoo", COMMAND, *args]
    with forked.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while not (out / "exact_seed0.json").exists() and process.poll() is None:
            time.sleep(0.05)
        process.terminate()
    assert process.returncode != 0
    first = {path: path.stat().st_mtime_ns for path in out.glob("*_seed?.json")}
    assert 1 <= len(first) < 4
    assert main([COMMAND, *args]) == 0
    printed = capsys.readouterr().out
    assert f"4 runs, {len(first)} of them finished already" in printed
    assert "gumbel_softmax_seed1  test/elbo -" in printed
    head, _, *body = rows(printed)
    for name, row in zip(("exact", "gumbel_softmax"), body, strict=True):
        runs = [json.loads((out / f"{name}_seed{seed}.json").read_text()) for seed in range(2)]
        losses = [-metrics["test/elbo"] for metrics in runs]
        assert row[2] == f"{mean(losses):.2f} ± {stdev(losses):.2f}"
        assert row[3].startswith(f"{-mean(metrics['test/log_likelihood'] for metrics in runs):.2f} ± ")
        assert row[4] == f"{mean(metrics['test/kl'] for metrics in runs):.2f}"
        assert row[5] == f"{mean(metrics['test/active_latents'] for metrics in runs):.1f}"
        assert row[9] == ", ".join(f"{loss:.2f}" for loss in losses)
        for seed in range(2):
            saved = yaml.safe_load((out / f"{name}_seed{seed}" / "config.yaml").read_text())
            assert saved["model"]["init_args"]["estimator"] == name
            assert saved["seed_everything"] == saved["data"]["init_args"]["seed"] == seed
    assert (body[0][7], body[0][8]) == ("0", "reference")
    assert float(body[1][8].split(" ± ")[0]) > 0
    assert first.items() <= {path: path.stat().st_mtime_ns for path in out.glob("*_seed?.json")}.items()
    (baseline,) = (line for line in printed.splitlines() if line.startswith("independent pixels "))
    assert float(baseline.split()[-1]) > 15
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert main([COMMAND, *args]) == 0
    assert rows(capsys.readouterr().out) == [head, ["---"] * 10, *body]
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.json")} == stamps


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["vit/digits"], "compare-estimators trains a GumbelVAE, but the recipe has zoo.ViTClassifier"),
        ([], "compare-estimators needs a recipe: zoo compare-estimators RECIPE (zoo list)"),
        (["recipe.yaml", "--estimators", "gumbel_sofmax"], "'gumbel_sofmax'; did you mean gumbel_softmax?"),
        (["recipe.yaml", "--estimators"], "argument --estimators: expected at least one argument"),
        (["recipe.yaml", "--estimators", "disarm"], "'disarm' cannot do this recipe: estimator 'disarm' is for binary"),
        (["recipe.yaml", "--model.iw_samples", "null"], "is compared as well: set iw_samples, --model.iw_samples 1000"),
        (["recipe.yaml", "--model.categories", "1"], "categories is 1: expected at least 2"),
        (["recipe.yaml", "--model.latent", "9"], "GumbelVAE has no option 'latent'; did you mean latents?"),
        (["recipe.yaml", "--data.image_size", "-1"], "image_size is -1: expected at least 1"),
        (["recipe.yaml", "--trainer.enable_checkpointing=false"], "leave enable_checkpointing as it is"),
        (["recipe.yaml", "--seeds", "0"], "argument --seeds: '0' is not a whole number of at least 1"),
        (["recipe.yaml", "--multiples", "2"], "unknown option --multiples"),
    ],
)
def test_a_mistake_gets_one_line_before_anything_runs(args, expected, capsys):
    recipe()
    assert expected in refused(capsys, *args)
    assert not Path("runs").exists()


def test_help_answers_at_once():
    code = f"import sys; from zoo.cli import main\nmain(['{COMMAND}', '--help'])\nsys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    for option in ("RECIPE [options", "of GumbelVAE", "--estimators NAME", "--seeds N", f"runs/{COMMAND}"):
        assert option in done.stdout
    assert "--step" not in done.stdout
    assert all(len(line) <= 120 for line in done.stdout.splitlines())
