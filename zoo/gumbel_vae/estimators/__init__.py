"""Estimators of the gradient of E[f(z)] for z drawn from categorical or Bernoulli distributions, and for Gaussian z.

All have one method, ``expectation(logits, f, temperature)``: its value is a plain average of f over samples, its
gradient the estimator's, with respect to the logits and to whatever else f depends on::

    estimator = create("rloo", samples=4)
    loss = estimator.expectation(logits, lambda z: -log_likelihood(decoder(z), images)).mean()

What each costs and how far it is off, against exact enumeration, is measured by ``benchmarks/estimators_bias.py``.

Sources, in the order of the table below:

- Titsias and Lázaro-Gredilla, "Local Expectation Gradients for Black Box Variational Inference", NeurIPS 2015
- Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning", 1992
- Mnih and Gregor, "Neural Variational Inference and Learning in Belief Networks", ICML 2014, arXiv 1402.0030
- Kool et al., "Buy 4 REINFORCE Samples, Get a Baseline for Free!", ICLR workshop 2019
- Dong et al., "DisARM: An Antithetic Gradient Estimator for Binary Latent Variables", NeurIPS 2020, arXiv 2006.10680
- Mnih and Rezende, "Variational Inference for Monte Carlo Objectives", ICML 2016, arXiv 1602.06725
- Jang et al., "Categorical Reparameterization with Gumbel-Softmax", ICLR 2017, arXiv 1611.01144
- Maddison et al., "The Concrete Distribution", ICLR 2017, arXiv 1611.00712
- Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013, arXiv 1308.3432
- Paulus et al., "Rao-Blackwellizing the Straight-Through Gumbel-Softmax Gradient Estimator", ICLR 2021,
  arXiv 2010.04838
- Liu et al., "Bridging Discrete and Backpropagation: Straight-Through and Beyond", NeurIPS 2023, arXiv 2304.08612
"""

import inspect

from zoo.gumbel_vae.estimators.base import Cost, Estimator
from zoo.gumbel_vae.estimators.exact import Exact, LocalExpectation
from zoo.gumbel_vae.estimators.gaussian import GaussianPathwise, GaussianScoreFunction
from zoo.gumbel_vae.estimators.relaxed import GumbelRao, GumbelSoftmax, ReinMax, StraightThrough, StraightThroughGumbel
from zoo.gumbel_vae.estimators.sampling import (
    conditional_gumbels,
    gumbel_max,
    gumbel_noise,
    gumbel_softmax,
    log_gumbel_softmax,
)
from zoo.gumbel_vae.estimators.score import RLOO, VIMCO, DisARM, Reinforce, ReinforceBaseline

__all__ = [
    "ESTIMATORS",
    "RLOO",
    "VIMCO",
    "Cost",
    "DisARM",
    "Estimator",
    "Exact",
    "GaussianPathwise",
    "GaussianScoreFunction",
    "GumbelRao",
    "GumbelSoftmax",
    "LocalExpectation",
    "ReinMax",
    "Reinforce",
    "ReinforceBaseline",
    "StraightThrough",
    "StraightThroughGumbel",
    "conditional_gumbels",
    "create",
    "gumbel_max",
    "gumbel_noise",
    "gumbel_softmax",
    "log_gumbel_softmax",
]

ESTIMATORS: dict[str, type[Estimator]] = {
    estimator.name: estimator
    for estimator in (
        Exact,
        LocalExpectation,
        Reinforce,
        ReinforceBaseline,
        RLOO,
        DisARM,
        VIMCO,
        GumbelSoftmax,
        StraightThroughGumbel,
        StraightThrough,
        GumbelRao,
        ReinMax,
    )
}


def create(name: str, samples: int | None = None) -> Estimator:
    """The estimator of that name, out of :data:`ESTIMATORS`.

    Args:
        name: "rloo", "gumbel_softmax", ...
        samples: Only for those that take it. None: the estimator's own default.

    Raises:
        ValueError: For an unknown name, for samples where the estimator takes none, and for too few.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"unknown estimator {name!r}: expected one of {', '.join(ESTIMATORS)}")
    if samples is None:
        return ESTIMATORS[name]()
    takers = [each for each, kind in ESTIMATORS.items() if "samples" in inspect.signature(kind).parameters]
    if name not in takers:
        raise ValueError(
            f"estimator {name!r} has no number of samples to choose: leave it out, or use {', '.join(takers)}"
        )
    return ESTIMATORS[name](samples=samples)
