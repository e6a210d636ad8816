"""Comparison of gradient estimators: ``zoo compare-estimators``.

Models are trained with each, by one recipe and some seeds, which can be stopped and continued at any time. Then, in
this process, estimators are compared at one and the same model: how far their gradients are from the exact one, how
they scatter, and how long a training step takes.
"""

import json
import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from zoo import weights
from zoo.common import batch as batches
from zoo.common.protocols import HasNats
from zoo.common.study import Page, Recipe, Results, spread, spread_text
from zoo.gumbel_vae import estimators as known
from zoo.gumbel_vae.estimators.exact import MOST_STATES
from zoo.gumbel_vae.gumbel import GumbelVAE
from zoo.gumbel_vae.measure import gradients, last_knobs, relative, step_times


def compare(recipe: Recipe, estimators: Sequence[str] | None = None) -> Page:
    """Trains, tests and measures a :class:`GumbelVAE` with each estimator.

    Args:
        recipe: The model's. If its data module has ``nats()``, log-likelihoods of other models by name, they are shown;
            the Trainer's accelerator is the one that measurements run on as well.
        estimators: Names out of :data:`zoo.gumbel_vae.estimators.ESTIMATORS`. None: all that can do the recipe.
            Gradients are measured at the first one's model of seed 0.

    Returns:
        A table and what belongs to it. What was measured is in ``measured.json``, so that it is not measured again.

    Raises:
        ValueError: For an estimator that is unknown or cannot do the recipe, a recipe without an importance-weighted
            bound or checkpoints, and other arguments that the model refuses.
    """
    arguments = recipe.model
    if arguments["iw_samples"] is None:
        raise ValueError("the importance-weighted bound is compared as well: set iw_samples, --model.iw_samples 1000")
    if recipe.trainer.get("enable_checkpointing") is False:
        raise ValueError("gradients are measured at a checkpoint: leave enable_checkpointing as it is")
    names = suited(arguments, estimators)
    results = recipe.train({name: _as_options(changes(arguments, name)) for name in names}, "test/elbo")
    measured = _measured(recipe, names)
    points = {}
    for name, metrics in results.items():
        points[name] = [(measured["milliseconds"][name], *spread(_losses(metrics)))]
    lines = [*_table(results, measured, arguments["iw_samples"]), "", *_notes(measured)]
    return Page(lines, points, "ms a training step", "-ELBO of the test data, nats an image", log_x=True)


def changes(arguments: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Arguments of a recipe's model that an estimator changes, because it has to or its paper does."""
    changed: dict[str, Any] = {"estimator": name}
    if name == "vimco":  # which has the KL inside
        changed["kl"] = "sampled"
    if name in ("straight_through", "reinmax"):  # a lower temperature only makes them worse: nothing is relaxed
        changed |= {"temperature": 1.0, "temperature_schedule": "constant"}
    if arguments["estimator_samples"] is not None and not hasattr(known.create(name), "samples"):
        changed["estimator_samples"] = None
    return changed


def suited(arguments: Mapping[str, Any], names: Sequence[str] | None) -> list[str]:
    """The estimators that can do a recipe, out of those named. Of all, if none is: the others are printed.

    Raises:
        ValueError: If one that is named is unknown, or cannot.
    """
    model, able = build(arguments, "meta"), []
    for name in dict.fromkeys(known.ESTIMATORS if names is None else names):
        if name not in known.ESTIMATORS:
            near = get_close_matches(name, known.ESTIMATORS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected some of {', '.join(known.ESTIMATORS)}"
            raise ValueError(f"unknown estimator {name!r}; {hint}")
        why = None
        if name == "exact" and model.categories**model.latents > MOST_STATES:
            why = f"{model.latents} latents of {model.categories} categories have more than {MOST_STATES} states"
        try:
            build({**arguments, **changes(arguments, name)}, "meta")
        except ValueError as error:
            why = str(error)
        if why is None:
            able.append(name)
        elif names is None:
            print(f"without {name}: {why}", flush=True)
        else:
            raise ValueError(f"estimator {name!r} cannot do this recipe: {why}")
    return able


def build(arguments: Mapping[str, Any], device: torch.device | str, source: Path | None = None) -> GumbelVAE:
    """A model, uncompiled, with the weights of a checkpoint if there is one."""
    with torch.device(device):
        model = GumbelVAE(**{**arguments, "weights": None, "compile": False})
    if source is not None:
        weights.load(model, source)
    return model


# Measurements.


def _measured(recipe: Recipe, names: Sequence[str]) -> dict[str, Any]:
    """Measurements beside the runs, by name of the estimator where it is one's: from the file, if it is there."""
    arguments, out = recipe.model, recipe.out
    file = out / "measured.json"
    before: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if before.get("estimators") == list(names):  # the first is where gradients were measured, and all took turns
        return before
    found = [path for path in (out / f"{names[0]}_seed0").rglob("*.ckpt") if not path.is_symlink()]
    if not found:
        raise ValueError(f"there is no checkpoint in {out / f'{names[0]}_seed0'}, where gradients would be measured")
    checkpoint = max(found, key=lambda path: path.stat().st_mtime)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None or recipe.trainer.get("accelerator") == "cpu":
        device = torch.device("cpu")
    images = _training_images(recipe.data).to(device)
    models = {name: build({**arguments, **changes(arguments, name)}, device, checkpoint) for name in names}
    print(f"gradients and steps of {len(names)} estimators are measured", flush=True)
    drawn = {name: gradients(model, images, seed=seed) for seed, (name, model) in enumerate(models.items())}
    oracle = next((name for name in ("exact", "local_expectation") if name in drawn), None)
    if oracle is None:
        other = {**arguments, **changes(arguments, "local_expectation"), "kl": "analytic"}
        reference = gradients(build(other, device, checkpoint), images, seed=len(names))
    else:
        reference = drawn[oracle]
    # VIMCO's gradient is that of another objective: it has no bias here, and its own length.
    compared = {name: relative(each, each if name == "vimco" else reference) for name, each in drawn.items()}
    measured = {
        "estimators": list(names),
        "reference": oracle,
        "gradients": {name: {**compared[name], "draws": drawn[name].draws} for name in names},
        "milliseconds": step_times(models, images),
        "checkpoint": str(checkpoint.relative_to(out)),
        "images": len(images),
        "temperatures": {name: float(last_knobs(model)[1]) for name, model in models.items()},
        "device": f"{device}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device),
        "nats": _nats(recipe.data),
    }
    beside = file.with_name(f".{file.name}")
    beside.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, file)  # complete or not at all
    return measured


def _training_images(data: Any) -> Tensor:
    """A batch of training images, as a module would get it, but not augmented."""
    data.prepare_data()
    data.setup("fit")
    with torch.random.fork_rng():
        torch.manual_seed(0)  # a data module that draws pixels does so here
        return batches.images(data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0))


def _nats(data: Any) -> dict[str, float]:
    """Log-likelihoods of the test data under other models, if the data module knows some for data like this."""
    try:
        return dict(data.nats()) if isinstance(data, HasNats) else {}
    except ValueError as error:
        print(f"without figures of other models: {error}", flush=True)
        return {}


# What is shown.


def _as_options(changed: Mapping[str, Any]) -> list[str]:
    return [f"--model.{key}={'null' if value is None else value}" for key, value in changed.items()]


def _table(results: Results, measured: Mapping[str, Any], samples: int) -> list[str]:
    columns = ["estimator", "unbiased", "-ELBO", f"-log p, {samples} samples", "KL", "active latents", "ms a step"]
    columns += ["gradient variance", "gradient bias", "-ELBO of each seed"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, metrics in results.items():
        losses, gradient = _losses(metrics), measured["gradients"][name]
        bias = f"{gradient['bias']:.3f} ± {gradient['error']:.3f}"
        cells = [
            name,
            "of another bound" if name == "vimco" else "yes" if known.ESTIMATORS[name].unbiased else "no",
            spread_text(losses, 2),
            spread_text([-value for value in metrics["test/log_likelihood"]], 2),
            f"{mean(metrics['test/kl']):.2f}",
            f"{mean(metrics['test/active_latents']):.1f}",
            f"{measured['milliseconds'][name]:.2f}",
            f"{gradient['variance']:.3g}",
            "reference" if name == measured["reference"] else "" if name == "vimco" else bias,
            ", ".join(f"{loss:.2f}" for loss in losses),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _notes(measured: Mapping[str, Any]) -> list[str]:
    """Notes to the table: what its numbers are of, and what else is known of the data."""
    draws = sorted({gradient["draws"] for gradient in measured["gradients"].values()})
    lines = [
        "Nats an image of the test data; training steps in turns, medians, on "
        f"{measured['device']}. Gradients with respect to the encoder of {measured['images']} training images, at "
        f"{measured['checkpoint']} and temperature {_temperature(measured['temperatures'])}, of "
        f"{' to '.join(map(str, dict.fromkeys([draws[0], draws[-1]])))} draws: variance relative to the squared length "
        "of the exact gradient, bias relative to its length. What an unbiased estimator has of it is noise, which is "
        "what stands behind the ±. That of vimco is another gradient, which its variance is relative to."
    ]
    lines += [f"{name} {-value:.2f}" for name, value in measured["nats"].items()]
    return lines


def _temperature(found: Mapping[str, float]) -> str:
    """The recipe's, and whose are others."""
    lowest = min(found.values())
    others = [f"{name} {value:.4g}" for name, value in found.items() if value != lowest]
    return f"{lowest:.4g}" + (f" ({', '.join(others)})" if others else "")


def _losses(metrics: Mapping[str, Sequence[float]]) -> list[float]:
    return [-value for value in metrics["test/elbo"]]
