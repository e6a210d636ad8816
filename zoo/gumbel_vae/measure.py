"""Gradients of a GumbelVAE as random variables: bias, variance, and the time that a step takes with them."""

import time
from collections.abc import Mapping
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.common import optim
from zoo.gumbel_vae.gumbel import GumbelVAE
from zoo.gumbel_vae.schedules import SCHEDULES

DRAWS, STEPS, FEWEST = 200, 50, 10
SECONDS = 60.0  # for one estimator's gradients, and for the steps of all: then there may be fewer, but FEWEST


class Gradients(NamedTuple):
    """Draws of a gradient: their mean (P,) float64, their variance, summed over the P parameters, and their number."""

    mean: Tensor
    variance: float
    draws: int


def gradients(
    model: GumbelVAE, images: Tensor, draws: int = DRAWS, seconds: float = SECONDS, seed: int = 0
) -> Gradients:
    """The gradient of the mean objective of images, drawn again and again, with respect to the encoder's parameters.

    The model is in evaluation mode, as dropout is no matter of the estimator; the temperature is that at the end of its
    schedule, the weight of the KL 1.

    Args:
        model: Its estimator is the one that is measured.
        images: (B, C, H, W) in [0, 1], on the model's device.
        draws: How many.
        seconds: After which there may be fewer, but 10.
        seed: Of the noise. Two estimators' draws are independent if it differs.
    """
    model.eval()
    parameters, knobs = list(model.backbone.parameters()), last_knobs(model)
    total, squares, count = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64), 0.0, 0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(FEWEST if list(model.estimator.buffers()) else 0):  # a running mean arrives where it belongs
            model.objective(images, *knobs)
        end = time.perf_counter() + seconds
        while count < draws and (count < FEWEST or time.perf_counter() < end):
            found = torch.autograd.grad(model.objective(images, *knobs).loss.mean(), parameters)
            gradient = torch.cat([part.flatten() for part in found]).cpu().double()
            # Welford 1962: no difference of large sums, and exactly 0 if all draws are the same.
            count, deviation = count + 1, gradient - total
            total += deviation / count
            squares += float(deviation @ (gradient - total))
    return Gradients(total, squares / (count - 1), count)


def relative(found: Gradients, reference: Gradients) -> dict[str, float]:
    """Variance of a gradient relative to the squared length of a reference, and bias relative to its length.

    The bias is the length of the difference of two means, and so never 0: of an unbiased estimator it is about its
    ``error``, the root of the expected square of what is noise in it.
    """
    length = float(reference.mean.norm())
    noise = found.variance / found.draws + reference.variance / reference.draws
    bias = float((found.mean - reference.mean).norm())
    return {"variance": found.variance / length**2, "bias": bias / length, "error": noise**0.5 / length}


def step_times(models: Mapping[str, GumbelVAE], images: Tensor, steps: int = STEPS) -> dict[str, float]:
    """Median milliseconds of a training step by name: objective, gradient and optimizer, in turns. It trains them."""
    optimizers: dict[str, Any] = {}
    times: dict[str, list[float]] = {name: [] for name in models}
    for name, model in models.items():
        hp = model.train().hparams
        optimizers[name] = optim.create_optimizer(model, hp.optimizer, hp.lr, hp.weight_decay, betas=hp.betas)
    end = time.perf_counter() + SECONDS
    for turn in range(steps + 2):  # two to warm up
        if turn >= FEWEST and time.perf_counter() > end:
            break
        for name, model in models.items():
            _wait(images.device)
            start = time.perf_counter()
            optimizers[name].zero_grad()
            model.objective(images, *last_knobs(model)).loss.mean().backward()
            optimizers[name].step()
            _wait(images.device)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: median(taken[2:]) for name, taken in times.items()}


def last_knobs(model: GumbelVAE) -> tuple[Tensor, Tensor]:
    """Weight of the KL, 1, and temperature at the end of its schedule."""
    hp = model.hparams
    schedule = SCHEDULES[hp.temperature_schedule]
    temperature = schedule(hp.temperature_steps, hp.temperature, hp.min_temperature, hp.temperature_steps)
    return model._scalar(1.0), model._scalar(temperature)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
