"""Score-function estimators: costs of hard samples times the gradient of their log-probability. All are unbiased.

f needs no derivative in z. What is multiplied by grad log q(z) is called the advantage: a cost, less what was expected
without knowing this sample.
"""

import math
from typing import ClassVar

import torch
from torch import Generator, Tensor

from zoo.common.precision import FullPrecision
from zoo.gumbel_vae.estimators.base import Cost, Estimator, add_gradient, check_samples, draw, log_prob


class Reinforce(Estimator):
    """f(z) grad log q(z) (Williams 1992): unbiased, with a variance that grows with the square of f's mean."""

    name: ClassVar[str] = "reinforce"
    unbiased: ClassVar[bool] = True

    def estimate(self, logits: Tensor, f: Cost, temperature: float | Tensor, generator: Generator | None) -> Tensor:
        z = draw(logits, 1, generator)
        costs = f(z)
        return add_gradient(costs[0], (costs.detach() * log_prob(logits, z))[0])


class ReinforceBaseline(FullPrecision, Estimator):
    """(f(z) - b) grad log q(z), with b a moving average of the mean costs of previous batches (Mnih and Gregor 2014).

    The average is corrected for its start at 0, and never knows the current costs, which would bias the gradient. It is
    in the state dict, so that a resumed run goes on with it, and moves only while gradients are on. Costs that are not
    finite leave it as it is. It is float32 or wider, whatever the precision.

    Args:
        decay: How much of the average stays after each batch, in [0, 1).
    """

    name: ClassVar[str] = "reinforce_baseline"
    unbiased: ClassVar[bool] = True
    average: Tensor
    weight: Tensor

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}: expected a number from 0 to below 1, such as 0.9")
        self.decay = decay
        self.register_buffer("average", torch.zeros((), dtype=torch.float32))
        # Of all batches so far: 0, then 1 - decay, approaching 1.
        self.register_buffer("weight", torch.zeros((), dtype=torch.float32))

    def estimate(self, logits: Tensor, f: Cost, temperature: float | Tensor, generator: Generator | None) -> Tensor:
        z = draw(logits, 1, generator)
        costs = f(z)
        baseline = self.average / self.weight.clamp_min(torch.finfo(self.weight.dtype).tiny)
        value = add_gradient(costs[0], ((costs.detach() - baseline) * log_prob(logits, z))[0])
        if torch.is_grad_enabled():
            self.update(costs.detach().mean())
        return value

    @torch.no_grad()
    def update(self, cost: Tensor) -> None:
        """Moves the average towards the mean cost of a batch."""
        for buffer, target in ((self.average, cost.to(self.average.dtype)), (self.weight, torch.ones_like(cost))):
            moved = buffer.lerp(target.to(buffer.dtype), 1 - self.decay)
            buffer.copy_(torch.where(cost.isfinite(), moved, buffer))


class RLOO(Estimator):
    """1/k sum_i (f(z_i) - mean_{j != i} f(z_j)) grad log q(z_i) (Kool et al. 2019): the baseline is the other samples.

    Adding a constant to f changes nothing. The default among the unbiased estimators.

    Args:
        samples: k, at least 2. The variance falls as 1 / (k - 1).
    """

    name: ClassVar[str] = "rloo"
    unbiased: ClassVar[bool] = True

    def __init__(self, samples: int = 4) -> None:
        super().__init__()
        check_samples(self.name, samples, 2)
        self.samples = samples

    def evaluations(self, latents: int, categories: int) -> int:
        return self.samples

    def estimate(self, logits: Tensor, f: Cost, temperature: float | Tensor, generator: Generator | None) -> Tensor:
        z = draw(logits, self.samples, generator)
        costs = f(z)
        value = costs.mean(0)
        # f_i - mean_{j != i} f_j = (f_i - mean_j f_j) * k / (k - 1), and the k cancels.
        advantage = (costs - value).detach() / (self.samples - 1)
        return add_gradient(value, (advantage * log_prob(logits, z)).sum(0))


class DisARM(Estimator):
    """1/2 (f(b) - f(b')) (-1)^b' 1[b != b'] sigmoid(abs(phi)) for Bernoulli latents (Dong et al. 2020).

    phi are log-odds, b = 1[u < sigmoid(phi)] and b' = 1[1 - u < sigmoid(phi)] antithetic samples from one uniform u.
    Logits may come as log-odds (B, N) or for 2 categories (B, N, 2). Where phi is infinite, b and b' are the same.
    """

    name: ClassVar[str] = "disarm"
    unbiased: ClassVar[bool] = True
    binary_only: ClassVar[bool] = True

    def evaluations(self, latents: int, categories: int) -> int:
        return 2

    def estimate(self, logits: Tensor, f: Cost, temperature: float | Tensor, generator: Generator | None) -> Tensor:
        phi = logits[..., 1] - logits[..., 0]
        u = torch.rand(phi.shape, dtype=phi.dtype, device=phi.device, generator=generator)
        p = phi.detach().sigmoid()
        pair = ((torch.stack([u, 1 - u]) < p) | (phi == torch.inf)).to(phi.dtype)  # 1 - u may be 1
        costs = f(torch.stack([1 - pair, pair], -1))
        half_difference = (costs[0] - costs[1]).detach()[:, None] / 2
        gradient = half_difference * (pair[0] - pair[1]) * phi.detach().abs().sigmoid()  # b - b' = (-1)^b' 1[b != b']
        return add_gradient(costs.mean(0), (gradient * phi.masked_fill(phi.isinf(), 0.0)).sum(-1))


class VIMCO(Estimator):
    """The multi-sample bound -log 1/k sum_i exp(-f(z_i)), with a baseline for each sample (Mnih and Rezende 2016).

    With f = log q(z) - log p(x, z) this is minus the importance-weighted bound of Burda et al. 2016. So, unlike all the
    others, neither value nor gradient are those of E[f(z)]; the gradient is unbiased for E of this value. Sample i's
    advantage is the value less what it would be with f(z_i) replaced by the mean of the other costs, which is their
    weights' geometric mean.

    Args:
        samples: k, at least 2.
    """

    name: ClassVar[str] = "vimco"
    unbiased: ClassVar[bool] = True

    def __init__(self, samples: int = 5) -> None:
        super().__init__()
        check_samples(self.name, samples, 2)
        self.samples = samples

    def evaluations(self, latents: int, categories: int) -> int:
        return self.samples

    def estimate(self, logits: Tensor, f: Cost, temperature: float | Tensor, generator: Generator | None) -> Tensor:
        k = self.samples
        z = draw(logits, k, generator)
        log_weights = -f(z)  # (k, B)
        value = math.log(k) - log_weights.logsumexp(0)
        fixed = log_weights.detach()
        others = (fixed.sum(0) - fixed) / (k - 1)
        own = torch.eye(k, dtype=torch.bool, device=z.device)[:, :, None]
        without = math.log(k) - torch.where(own, others, fixed).logsumexp(1)  # (i, j, B) to (i, B)
        return add_gradient(value, ((value.detach() - without) * log_prob(logits, z)).sum(0))
