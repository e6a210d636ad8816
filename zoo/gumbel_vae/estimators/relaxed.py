"""Estimators that go through f's own derivative in z. One evaluation, little variance, and a bias.

But for the Gumbel-Softmax, f sees hard samples only, exactly one-hot: the relaxation is in the gradient alone.
"""

from typing import ClassVar

import torch
from torch import Generator, Tensor

from zoo.gumbel_vae.estimators.base import Cost, Estimator, check_samples, draw
from zoo.gumbel_vae.estimators.sampling import conditional_gumbels, gumbel_softmax, straight_through


class GumbelSoftmax(Estimator):
    """f(softmax((logits + g) / temperature)) (Jang et al. 2017, eq. 2; Maddison et al. 2017).

    f is evaluated, in training, at points that are no samples. As the temperature falls the bias does and the variance
    rises.

    Args:
        samples: How many are averaged over.
    """

    name: ClassVar[str] = "gumbel_softmax"
    unbiased: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True

    def __init__(self, samples: int = 1) -> None:
        super().__init__()
        check_samples(self.name, samples, 1)
        self.samples = samples

    def evaluations(self, latents: int, categories: int) -> int:
        return self.samples

    def estimate(self, logits: Tensor, f: Cost, temperature: float | Tensor, generator: Generator | None) -> Tensor:
        return f(gumbel_softmax(logits.expand(self.samples, *logits.shape), temperature, generator=generator)).mean(0)


class StraightThroughGumbel(Estimator):
    """f at the hard sample, with the gradient of the relaxed one of the same noise (Jang et al. 2017, section 2.2)."""

    name: ClassVar[str] = "st_gumbel_softmax"
    unbiased: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True

    def estimate(self, logits: Tensor, f: Cost, temperature: float | Tensor, generator: Generator | None) -> Tensor:
        return f(gumbel_softmax(logits[None], temperature, hard=True, generator=generator))[0]


class StraightThrough(Estimator):
    """f at the hard sample, with the gradient of softmax(logits / temperature) (Bengio et al. 2013).

    Exact where f is linear in every latent, at a temperature of 1.
    """

    name: ClassVar[str] = "straight_through"
    unbiased: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True

    def estimate(self, logits: Tensor, f: Cost, temperature: float | Tensor, generator: Generator | None) -> Tensor:
        hard = draw(logits, 1, generator)
        return f(straight_through(hard, (logits / temperature).softmax(-1)))[0]


class GumbelRao(Estimator):
    """The straight-through Gumbel-Softmax averaged over the noise that gives the same hard sample (Paulus et al. 2021).

    The relaxed sample becomes mean_s softmax((logits + g_s) / temperature), g_s ~ p(g | hard sample), with no gradient
    through g_s. The mean is that of the straight-through Gumbel-Softmax, the variance less, at one evaluation of f.

    Args:
        samples: How many draws of the noise are averaged over.
    """

    name: ClassVar[str] = "gumbel_rao"
    unbiased: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True

    def __init__(self, samples: int = 10) -> None:
        super().__init__()
        check_samples(self.name, samples, 1)
        self.samples = samples

    def estimate(self, logits: Tensor, f: Cost, temperature: float | Tensor, generator: Generator | None) -> Tensor:
        hard = draw(logits, 1, generator)
        noise = conditional_gumbels(logits, hard[0], self.samples, generator)
        soft = ((logits + noise) / temperature).softmax(-1).mean(0)
        return f(straight_through(hard, soft))[0]


class ReinMax(Estimator):
    """A straight-through estimator of second order (Liu et al. 2023): 2 softmax(log pi) - softmax(logits) / 2.

    pi = (softmax(logits / temperature) + hard) / 2 is held fixed, but that the logits may move log pi. Exact where f is
    quadratic, at a temperature of 1; the authors advise against less. It can be worse than straight-through where f is
    far from quadratic.
    """

    name: ClassVar[str] = "reinmax"
    unbiased: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True

    def estimate(self, logits: Tensor, f: Cost, temperature: float | Tensor, generator: Generator | None) -> Tensor:
        hard = draw(logits, 1, generator)
        log_pi = (((logits.detach() / temperature).softmax(-1) + hard) / 2).log()
        # A category that underflows or is masked stays at -inf, with a gradient of 0.
        moved = straight_through(log_pi, logits.masked_fill(logits == -torch.inf, 0.0))
        return f(straight_through(hard, 2 * moved.softmax(-1) - logits.softmax(-1) / 2))[0]
