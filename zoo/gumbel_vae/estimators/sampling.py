"""Categorical samples by Gumbel noise: hard, relaxed, and the noise that explains a hard one.

Noise and everything computed with it is in float32 whatever the precision of the logits, or in float64 for such logits:
in float16 exponential noise becomes 0 once in some ten million draws, and NaN what is computed with it.

A logit of -inf masks its category: no sample is of it, and everything is as in the problem without it.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def full_precision(x: Tensor) -> Tensor:
    """Casts to float32, or leaves float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def resolve_infinite(logits: Tensor) -> Tensor:
    """Logits (..., K) in which infinity, which softmax makes NaN of, is written as all the others masked."""
    infinite = logits == torch.inf
    certain = torch.zeros_like(logits).masked_fill(~infinite, -torch.inf)
    return torch.where(infinite.any(-1, keepdim=True), certain, logits)


def one_hot(indices: Tensor, categories: int, dtype: torch.dtype) -> Tensor:
    """Indices (...) as (..., categories). ``F.one_hot`` looks at the values, for which the host would have to wait."""
    return (indices[..., None] == torch.arange(categories, device=indices.device)).to(dtype)


def exponential_noise(like: Tensor, generator: Generator | None = None) -> Tensor:
    """Draws of Exp(1), above 0, shaped like a tensor."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    noise = torch.empty(like.shape, dtype=dtype, device=like.device).exponential_(generator=generator)
    return noise.clamp_min(torch.finfo(dtype).tiny)


def gumbel_noise(like: Tensor, generator: Generator | None = None) -> Tensor:
    """Draws of Gumbel(0, 1), shaped like a tensor: -log of exponential noise, always finite."""
    return -exponential_noise(like, generator).log()


def gumbel_max(logits: Tensor, generator: Generator | None = None) -> Tensor:
    """One-hot samples (..., K) of the distributions softmax(logits): argmax(logits + g) (Jang et al. 2017, eq. 1).

    They have no gradient, and are float32, or float64 for such logits.
    """
    scores = full_precision(logits.detach()) + gumbel_noise(logits, generator)
    return one_hot(scores.argmax(-1), logits.shape[-1], scores.dtype)


def gumbel_softmax(
    logits: Tensor, temperature: float | Tensor = 1.0, hard: bool = False, generator: Generator | None = None
) -> Tensor:
    """Relaxed samples (..., K): softmax((logits + g) / temperature) (Jang et al. 2017, eq. 2).

    Args:
        logits: (..., K), any precision.
        temperature: Above 0. A tensor's value is not looked at: the host would have to wait for it.
        hard: One-hot samples, exactly, with the gradient of the relaxed ones (straight-through; section 2.2).
        generator: None: the default one of the device.

    Returns:
        float32, or float64 for such logits.

    Raises:
        ValueError: For a temperature that is a number and not above 0.
    """
    check_temperature(temperature)
    scores = full_precision(logits) + gumbel_noise(logits, generator)
    relaxed = (scores / temperature).softmax(-1)
    if not hard:
        return relaxed
    return straight_through(one_hot(scores.argmax(-1), logits.shape[-1], scores.dtype), relaxed)


def log_gumbel_softmax(logits: Tensor, temperature: float | Tensor = 1.0, generator: Generator | None = None) -> Tensor:
    """The logarithm of relaxed samples (..., K), accurate where the samples themselves round to 0 or 1.

    Their distribution is Maddison et al. 2017's ExpConcrete (appendix C.3), whose density relaxed bounds need:
    ``torch.distributions.relaxed_categorical.ExpRelaxedCategorical``. Arguments and errors as :func:`gumbel_softmax`.
    """
    check_temperature(temperature)
    return F.log_softmax((full_precision(logits) + gumbel_noise(logits, generator)) / temperature, -1)


def conditional_gumbels(logits: Tensor, hard: Tensor, samples: int = 1, generator: Generator | None = None) -> Tensor:
    """Gumbel noise g given its outcome: draws with argmax(logits + g) = hard, (samples, ..., K), without gradient.

    With E exponential noise and p = softmax(logits), log p + g is -log E_i for the category i that was drawn, and
    -log(E_j / p_j + E_i), which is less, for each other j (Paulus et al. 2021, section 3). Mixed over outcomes drawn
    from p, g is Gumbel(0, 1) again. Of a category that is masked, p_j = 0, the outcome says nothing: g is -log E_j.

    Args:
        logits: (..., K), any precision.
        hard: One-hot (..., K).
        samples: How many draws for each outcome.
        generator: None: the default one of the device.
    """
    log_p = full_precision(logits.detach()).log_softmax(-1)
    masked = log_p == -torch.inf
    log_p = log_p.masked_fill(masked, 0.0)
    log_e = exponential_noise(log_p.expand(samples, *log_p.shape), generator).log()
    log_top = (hard * log_e).sum(-1, keepdim=True)
    others = -torch.logaddexp(log_e - log_p, log_top)
    return torch.where(hard.bool() | masked, -log_e, others) - log_p


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of ``hard``, exactly, by the brackets, with the gradient of ``soft`` (Bengio et al. 2013)."""
    return hard + (soft - soft.detach())


def check_temperature(temperature: float | Tensor) -> None:
    """Refuses numbers that are not above 0; a tensor's value is not looked at."""
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature is {temperature}: expected a number above 0, such as 0.5")
