"""Gradients by enumeration: of all states, or of one latent at a time."""

from typing import ClassVar

import torch
from torch import Generator, Tensor

from zoo.gumbel_vae.estimators.base import Cost, Estimator, add_gradient, draw, log_prob
from zoo.gumbel_vae.estimators.sampling import one_hot

MOST_STATES = 2**16


class Exact(Estimator):
    """E[f(z)] itself: sum over all K^N states z of q(z) f(z), for small problems and as an oracle.

    Its value is exact as well.
    """

    name: ClassVar[str] = "exact"
    unbiased: ClassVar[bool] = True

    def evaluations(self, latents: int, categories: int) -> int:
        return categories**latents

    def estimate(self, logits: Tensor, f: Cost, temperature: float | Tensor, generator: Generator | None) -> Tensor:
        B, N, K = logits.shape
        if K**N > MOST_STATES:
            raise ValueError(
                f"{N} latents of {K} categories have {K}^{N} states, and exact evaluates f at each, at most "
                f"{MOST_STATES}: use local_expectation or rloo"
            )
        # A state's number, written with base K, has the categories of its latents as digits.
        place = K ** torch.arange(N, device=logits.device)
        digits = torch.arange(K**N, device=logits.device)[:, None] // place % K
        z = one_hot(digits, K, logits.dtype)[:, None].expand(-1, B, -1, -1)
        probability, costs = log_prob(logits, z).exp(), f(z)
        # A state that is masked has no cost to count, not even one that is infinite.
        return (probability * torch.where(probability > 0, costs, 0.0)).sum(0)


class LocalExpectation(Estimator):
    """Exact sums over each latent, the others kept as sampled (Titsias and Lázaro-Gredilla 2015, section 3).

    With v_nc = f(z with latent n set to category c), the gradient with respect to the logits of latent n is
    p_n * (v_n - <p_n, v_n>): that of <p_n, v_n> with v held fixed. N * K + 1 evaluations, and little variance.
    """

    name: ClassVar[str] = "local_expectation"
    unbiased: ClassVar[bool] = True

    def evaluations(self, latents: int, categories: int) -> int:
        return latents * categories + 1

    def estimate(self, logits: Tensor, f: Cost, temperature: float | Tensor, generator: Generator | None) -> Tensor:
        _, N, K = logits.shape
        z = draw(logits, 1, generator)
        # With gradients first, so that no weight that autocast keeps was cast without (torch 2.14 keeps none of these).
        value = f(z)[0]
        with torch.no_grad():
            categories = torch.eye(K, dtype=z.dtype, device=z.device)[:, None]
            values = []
            for n in range(N):
                states = z.repeat(K, 1, 1, 1)
                states[:, :, n] = categories
                values.append(f(states))
            v = torch.stack(values, 1).permute(2, 1, 0)  # (K, N, B) to (B, N, K)
        q = logits.softmax(-1)
        return add_gradient(value, (q * torch.where(q > 0, v, 0.0)).sum((1, 2)))  # v of what is masked may be infinite
