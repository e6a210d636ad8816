"""Smooth max, one-hot, argmax, step and rounding, each with its limit and its bound.

The formulas of max, one-hot and argmax are those of Su 2019, "Talk on the smoothing of functions" (kexue.fm/archives/
6620); step and rounding are convolved with a kernel, as in kexue.fm/archives/8718. All are differentiable as often as
their kernel. Results are float32 for float16 and bfloat16, float64 for float64.
"""

import math
from typing import Literal

import torch
from torch import Tensor

Kernel = Literal["logistic", "gaussian", "laplace"]


def at_least_float32(x: Tensor, name: str = "x") -> Tensor:
    """Converts half precision to float32, and leaves the rest as it is.

    Raises:
        TypeError: For whole numbers, truth values and complex numbers.
    """
    if not x.is_floating_point():
        raise TypeError(f"{name} is {x.dtype}: a smooth function takes floating point numbers")
    return x if x.dtype == torch.float64 else x.float()


def check_positive(value: float, name: str = "tau") -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} is {value}: it has to be above 0, and finite")


def check_choice(value: str, choices: tuple[str, ...], name: str) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: it has to be one of {', '.join(choices)}")


def check_entries(x: Tensor, dim: int) -> None:
    if x.ndim == 0 or x.shape[dim] == 0:
        raise ValueError(f"x has no entries along dimension {dim}: its shape is {tuple(x.shape)}")


def smooth_max(x: Tensor, sharpness: float = 1.0, dim: int = -1, keepdim: bool = False) -> Tensor:
    """Smooth maximum by log-sum-exp, log(sum exp(K x)) / K with the sharpness K.

    Of n entries, 0 <= smooth_max(x) - max(x) <= log(n) / K: never below the maximum, exact as K grows, and farthest off
    where all entries are equal. Convex, monotone in every entry, and shifted as x is; its gradient is
    ``soft_one_hot(x, 1 / K)``. An entry of -inf counts for nothing.

    Args:
        x: Floating point, (..., n, ...).
        sharpness: K, above 0, in one over the unit of x.
        dim: Where the n entries lie.
        keepdim: Keeps ``dim``, with size 1.

    Raises:
        TypeError: If x is not floating point.
        ValueError: If there are no entries, or for a sharpness that is not above 0.
    """
    x = at_least_float32(x)
    check_positive(sharpness, "sharpness")
    check_entries(x, dim)
    # The maximum is taken out first: what is added to it is not negative, so that the bound holds to the last bit.
    top = _finite_max(x, dim)
    excess = ((x - top) * sharpness).logsumexp(dim, keepdim=True) / sharpness
    result = top + excess
    return result if keepdim else result.squeeze(dim)


def smooth_min(x: Tensor, sharpness: float = 1.0, dim: int = -1, keepdim: bool = False) -> Tensor:
    """Smooth minimum, minus the smooth maximum of -x.

    0 <= min(x) - smooth_min(x) <= log(n) / K, and all else as in :func:`smooth_max`. An entry of +inf counts for
    nothing.
    """
    return -smooth_max(-x, sharpness, dim, keepdim)


def soft_one_hot(x: Tensor, tau: float = 1.0, dim: int = -1) -> Tensor:
    """Smooth one-hot vector of the largest entry, softmax(x / tau).

    With a gap d > 0 between the two largest of n entries, the sum of absolute differences from the one-hot vector is at
    most 2 (n - 1) exp(-d / tau). Entries that tie for the largest share it, whatever tau is, and the gradient vanishes
    as tau does. An entry of -inf gets 0; where all are -inf, there is nothing to choose and the result is NaN.

    Args:
        x: Floating point, (..., n, ...).
        tau: Temperature, above 0, in the unit of x.
        dim: Where the n entries lie.

    Returns:
        As x in shape, not negative, with the sum 1 along ``dim``.

    Raises:
        TypeError: If x is not floating point.
        ValueError: If there are no entries, or for a tau that is not above 0.
    """
    x = at_least_float32(x)
    check_positive(tau)
    check_entries(x, dim)
    # Differences before the division: those to the largest entry are exact where they matter.
    return ((x - _finite_max(x, dim)) / tau).softmax(dim)


def soft_argmax(x: Tensor, tau: float = 1.0, dim: int = -1) -> Tensor:
    """Smooth index of the largest entry, sum_i i softmax(x / tau)_i.

    It is off by at most (n - 1)² exp(-d / tau) with a gap d between the two largest of n entries. It is a mean, and
    means something where neighbouring indices mean similar things, as positions do and classes do not. Two modes give
    an index between them that may be the worst of all: ``[5, 0, 0, 0, 5.01]`` with tau 1 gives 2.01, not 4.

    Args:
        x: Floating point, (..., n, ...).
        tau: Temperature, above 0, in the unit of x.
        dim: Where the n entries lie.

    Returns:
        As x in shape without ``dim``, within [0, n - 1].

    Raises:
        TypeError: If x is not floating point.
        ValueError: If there are no entries, or for a tau that is not above 0.
    """
    return _mean_index(soft_one_hot(x, tau, dim), dim)


def soft_argmax_2d(x: Tensor, tau: float = 1.0) -> Tensor:
    """Smooth row and column of the largest entry of a map, the means of both over softmax(x / tau).

    As :func:`soft_argmax`, with the same warning: of a map with two peaks it finds neither.

    Args:
        x: Floating point, (..., rows, columns).
        tau: Temperature, above 0, in the unit of x.

    Returns:
        (..., 2), row and column, from 0.

    Raises:
        TypeError: If x is not floating point.
        ValueError: If x is not a map or is empty, or for a tau that is not above 0.
    """
    if x.ndim < 2:
        raise ValueError(f"x has the shape {tuple(x.shape)}: a map has rows and columns, (..., rows, columns)")
    chosen = soft_one_hot(x.flatten(-2), tau).unflatten(-1, x.shape[-2:])
    return torch.stack([_mean_index(chosen.sum(-1), -1), _mean_index(chosen.sum(-2), -1)], -1)


def smooth_step(x: Tensor, tau: float = 1.0, kernel: Kernel = "logistic") -> Tensor:
    """Smooth step from 0 to 1 at 0: the step convolved with a kernel, which is the kernel's distribution function.

    It differs from the step by F(-|x| / tau), at most exp(-|x| / tau) for all kernels, and is 1/2 at 0.

    Args:
        x: Floating point, of whatever shape.
        tau: Scale of the kernel, above 0, in the unit of x.
        kernel: "logistic", sigmoid(x / tau); "gaussian", the normal distribution function; "laplace", exp(x / tau) / 2
            below 0, which is differentiable once there.

    Returns:
        As x in shape, within [0, 1] and monotone.

    Raises:
        TypeError: If x is not floating point.
        ValueError: For a tau that is not above 0, or an unknown kernel.
    """
    check_positive(tau)
    check_choice(kernel, tuple(_DISTRIBUTIONS), "kernel")
    return _DISTRIBUTIONS[kernel](at_least_float32(x) / tau)


def smooth_round(x: Tensor, tau: float = 0.1, kernel: Kernel = "logistic") -> Tensor:
    """Smooth rounding to whole numbers: the sum of :func:`smooth_step` at every half, round(x) convolved with a kernel.

    As tau vanishes it is round(x), but at the halves, where it is x. As tau grows it is x, from about 1 on; its error
    is odd around whole numbers and halves, so that both are fixed points for all tau. Monotone, and
    smooth_round(x + 1) = smooth_round(x) + 1.

    Args:
        x: Floating point, of whatever shape.
        tau: Scale of the kernel, above 0. Time and memory grow with it, up to 2, but for the Laplace kernel.
        kernel: As in :func:`smooth_step`.

    Returns:
        As x in shape.

    Raises:
        TypeError: If x is not floating point.
        ValueError: For a tau that is not above 0, or an unknown kernel.
    """
    x = at_least_float32(x)
    check_positive(tau)
    check_choice(kernel, tuple(_REACH), "kernel")
    whole = x.detach().round()
    rest = x - whole
    if kernel == "laplace":
        # The steps above and below are two geometric series: sinh(rest / tau) / (2 sinh(1 / (2 tau))).
        up, down = ((sign * rest - 0.5) / tau for sign in (1, -1))
        return whole + (up.exp() - down.exp()) / (-2 * math.expm1(-1 / tau))
    if tau >= 2:  # the first harmonic of what is left is below 1e-16
        return x
    # Steps farther away than the kernel's reach are 0 or 1. Each pair, above and below, is odd in the rest.
    halves = torch.arange(1 + math.ceil(_REACH[kernel] * tau), dtype=x.dtype, device=x.device) + 0.5
    step, rest = _DISTRIBUTIONS[kernel], rest.unsqueeze(-1)
    return whole + (step((rest - halves) / tau) - step((-rest - halves) / tau)).sum(-1)


def _finite_max(x: Tensor, dim: int) -> Tensor:
    """The largest entry, or 0 if it is infinite; without gradient, since it is taken out and put back."""
    top = x.detach().amax(dim, keepdim=True)
    return top.masked_fill(top.isinf(), 0.0)


def _mean_index(weights: Tensor, dim: int) -> Tensor:
    index = torch.arange(weights.shape[dim], dtype=weights.dtype, device=weights.device)
    return (weights.movedim(dim, -1) * index).sum(-1)


def laplace_distribution(x: Tensor) -> Tensor:
    """Distribution function of the Laplace distribution of scale 1: exp(x) / 2 below 0, 1 - exp(-x) / 2 above."""
    tail = (-x.abs()).exp() / 2
    return torch.where(x > 0, 1 - tail, tail)


_DISTRIBUTIONS = {"logistic": torch.sigmoid, "gaussian": torch.special.ndtr, "laplace": laplace_distribution}
_REACH = {"logistic": 40.0, "gaussian": 9.0, "laplace": 40.0}
"""Where a kernel's distribution function is below half an ulp of 1 in float64."""
