"""The continuous case, z ~ N(mean, deviation^2): pathwise, and for comparison the score function. Both are unbiased."""

import torch
from torch import Generator, Tensor, nn

from zoo.gumbel_vae.estimators.base import Cost, add_gradient, check_samples, checked_costs
from zoo.gumbel_vae.estimators.sampling import full_precision


class GaussianPathwise(nn.Module):
    """f(mean + deviation * noise) (Kingma and Welling, "Auto-Encoding Variational Bayes", ICLR 2014, section 2.4).

    Args:
        samples: How many are averaged over.
    """

    def __init__(self, samples: int = 1) -> None:
        super().__init__()
        check_samples("the pathwise estimator", samples, 1)
        self.samples = samples

    def expectation(self, mean: Tensor, deviation: Tensor, f: Cost, generator: Generator | None = None) -> Tensor:
        """The mean of f over samples, (B,), with the gradient through them.

        Args:
            mean: (B, D).
            deviation: (B, D), above 0.
            f: Takes z (S, B, D), float32 but for float64 arguments, and returns costs (S, B).
            generator: None: the default one of the device.

        Raises:
            ValueError: For costs of another shape, or without a gradient.
        """
        z = draw_gaussian(mean, deviation, self.samples, generator)
        return checked_costs("the pathwise estimator", z, f(z)).mean(0)


class GaussianScoreFunction(nn.Module):
    """f(z) grad log N(z; mean, deviation^2) (Williams 1992), of more variance: f needs no derivative.

    For f(z) = z^2 the gradient with respect to the mean has the variance m^4 / d^2 + 14 m^2 + 15 d^2 with a mean m and
    a deviation d, and 4 d^2 pathwise.

    Args:
        samples: How many are averaged over.
    """

    def __init__(self, samples: int = 1) -> None:
        super().__init__()
        check_samples("the score function estimator", samples, 1)
        self.samples = samples

    def expectation(self, mean: Tensor, deviation: Tensor, f: Cost, generator: Generator | None = None) -> Tensor:
        """Estimates as :meth:`GaussianPathwise.expectation` does, of costs that need no gradient."""
        mean, deviation = full_precision(mean), full_precision(deviation)
        z = draw_gaussian(mean, deviation, self.samples, generator).detach()
        costs = checked_costs("the score function estimator", z, f(z))
        log_density = -(((z - mean) / deviation).square() / 2 + deviation.log()).sum(-1)  # but for a constant
        return add_gradient(costs.mean(0), (costs.detach() * log_density).mean(0))


def draw_gaussian(mean: Tensor, deviation: Tensor, samples: int, generator: Generator | None) -> Tensor:
    """Samples (S, B, D), pathwise."""
    mean, deviation = full_precision(mean), full_precision(deviation)
    noise = torch.randn((samples, *mean.shape), dtype=mean.dtype, device=mean.device, generator=generator)
    return mean + deviation * noise
