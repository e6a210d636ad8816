"""The interface of estimators: one method, and what it asks of logits and costs."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from zoo.gumbel_vae.estimators.sampling import check_temperature, full_precision, gumbel_max, resolve_infinite

Cost = Callable[[Tensor], Tensor]
"""Samples z (S, B, N, K), or (S, B, N) for Bernoulli logits, to costs (S, B)."""


class Estimator(nn.Module):
    """An estimator of the gradient of E[f(z)], z ~ softmax(logits) or sigmoid(logits).

    Attributes:
        name: As :func:`zoo.gumbel_vae.estimators.create` and error messages call it.
        unbiased: Whether its mean is the exact gradient, with respect to the logits.
        differentiable: Whether f has to be differentiable in z.
        binary_only: Whether there have to be two categories.
    """

    name: ClassVar[str]
    unbiased: ClassVar[bool]
    differentiable: ClassVar[bool] = False
    binary_only: ClassVar[bool] = False

    def evaluations(self, latents: int, categories: int) -> int:
        """The number of evaluations of f for each image."""
        return 1

    def expectation(
        self, logits: Tensor, f: Cost, temperature: float | Tensor = 1.0, generator: Generator | None = None
    ) -> Tensor:
        """The mean of f over samples, (B,), with the estimator's gradient.

        The gradient is with respect to the logits, and to whatever else f depends on. Noise is drawn in float32, and z
        is float32, whatever the precision, but for logits in float64; f runs in the precision of the caller.

        Args:
            logits: (B, N, K) for N categorical latents of K categories, or (B, N) for Bernoulli ones: log-odds of 1.
                -inf masks a category: value and gradient are those of the problem without it, its own gradient is 0.
                So are infinite log-odds: that latent is certain. Of each latent, one category has to be left.
            f: Takes z (S, B, N, K), or (S, B, N) of zeros and ones for Bernoulli latents; returns costs (S, B).
            temperature: Above 0; only some estimators use it. A 0-dimensional tensor's value is not looked at, and lets
                a compiled step take another one without being compiled again.
            generator: None: the default one of the device.

        Raises:
            ValueError: For logits of another shape, fewer than 2 categories or more than the estimator can do, a
                temperature that is a number and not above 0, costs of another shape, and costs without a gradient where
                the estimator needs one.
        """
        check_temperature(temperature)
        if logits.ndim not in (2, 3):
            raise ValueError(
                f"logits are {tuple(logits.shape)}: expected (B, N, K) for categorical latents, or (B, N) for Bernoulli"
            )
        bernoulli = logits.ndim == 2
        full = full_precision(logits)
        if bernoulli:
            full = torch.stack([torch.zeros_like(full), full], -1)
        full = resolve_infinite(full)
        K = full.shape[-1]
        if K < 2:
            raise ValueError(f"logits {tuple(logits.shape)} have {K} category: expected at least 2, or (B, N) log-odds")
        if self.binary_only and K != 2:
            raise ValueError(
                f"{self.name} is for Bernoulli latents, logits {tuple(logits.shape)} have {K} categories: "
                "use log-odds (B, N), 2 categories, or another estimator, such as rloo"
            )

        def cost(z: Tensor) -> Tensor:
            return checked_costs(self.name, z, f(z[..., 1] if bernoulli else z))

        return self.estimate(full, cost, temperature, generator)

    def estimate(self, logits: Tensor, f: Cost, temperature: float | Tensor, generator: Generator | None) -> Tensor:
        """The estimate that :meth:`expectation` returns, of categorical logits in full precision and checked costs."""
        raise NotImplementedError


def checked_costs(name: str, z: Tensor, costs: Tensor) -> Tensor:
    """Costs (S, B) of samples (S, B, ...) in full precision, for the estimator of that name.

    Raises:
        ValueError: For costs of another shape, and for costs without a gradient although the samples have one.
    """
    if costs.shape != z.shape[:2]:
        raise ValueError(f"f returned costs {tuple(costs.shape)}: expected one for each sample, {tuple(z.shape[:2])}")
    if z.requires_grad and not costs.requires_grad:
        others = ", ".join(
            each.name for each in Estimator.__subclasses__() if not (each.differentiable or each.binary_only)
        )
        raise ValueError(
            f"{name} needs a cost that is differentiable in z, and what f returned has no gradient: use one of {others}"
        )
    return full_precision(costs)


def draw(logits: Tensor, samples: int, generator: Generator | None) -> Tensor:
    """Hard samples (S, B, N, K) of logits (B, N, K), without gradient."""
    return gumbel_max(logits.expand(samples, *logits.shape), generator)


def log_prob(logits: Tensor, z: Tensor) -> Tensor:
    """log q(z) in nats of hard samples z (S, B, N, K) under logits (B, N, K), or (N, K): (S, B).

    -inf where z is of a category whose logit is -inf. Relaxed samples weigh the categories' logarithms.
    """
    log_q = logits.log_softmax(-1)
    masked = log_q == -torch.inf
    found = (z * log_q.masked_fill(masked, 0.0)).sum((-2, -1))  # 0 times -inf would be NaN, and so would its gradient
    return found.masked_fill(((z > 0) & masked).any(-1).any(-1), -torch.inf)


def add_gradient(value: Tensor, surrogate: Tensor) -> Tensor:
    """``value`` as it is, with the gradient of ``value + surrogate``: what is added is exactly 0."""
    return value + (surrogate - surrogate.detach())


def check_samples(name: str, samples: int, fewest: int) -> None:
    """Refuses too few samples."""
    if samples < fewest:
        raise ValueError(f"{name} with {samples} samples: expected at least {fewest}")
