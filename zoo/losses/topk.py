"""Soft top-k by thresholding: a mask that sums to k, and the k-th largest value, differentiable to every order.

The mask is F((x_i - t) / tau), with the distribution function F of a symmetric kernel and the one threshold t for which
it sums to k (Su 2024, "ThreTopK", kexue.fm/archives/10373). It lies in [0, 1] and keeps the order of the entries with
every tau, unlike iterated softmax (Su 2019, kexue.fm/archives/6620), whose entries exceed 1, and unlike NeuralSort and
sorting networks, whose masks are not monotone in x.

How t is found deviates from the article, which bisects for one kernel and sorts for the other: sorting alone takes
longer than everything here. Let A be the sum of the mask over all but the k largest entries, and B what the k largest
lack of k. The equation is log A - log B = 0, and since F is log-concave, its left side falls in t / tau with a slope
between -2 (where a gap parts the k largest from the others) and -1/2. So Newton's method needs no bracket: from a
start that is exact for a wide gap and for equal entries on either side, three steps in float32, five in float64, left
a relative error of the sum below 7e-6 and 1e-14 on mixtures of clusters from n = 2 to a million. Their number is fixed,
so that nothing waits for the device.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from zoo.losses.soft import at_least_float32, check_choice, check_positive

Kind = Literal["sigmoid", "laplace"]


def soft_topk(x: Tensor, k: int, tau: float = 1.0, kind: Kind = "sigmoid", dim: int = -1) -> Tensor:
    """Smooth mask of the k largest entries, F((x - t) / tau) with the threshold t for which it sums to k.

    Monotone in the entries, shifted by none that is added to all, and permuted as they are. As tau vanishes it is the
    mask of ``torch.topk``, where the k-th and the next entry differ; with a gap d between them, an entry is off by at
    most n exp(-d / (2 tau)). Entries that tie share what is left for them, whatever tau is.

    Gradients of every order are those of the implicit function: with respect to all of x, (diag(v) - v v' / sum(v)) /
    tau with v = F'((x - t) / tau). They vanish with tau, but for entries that tie for the k-th place.

    Args:
        x: Floating point, (..., n, ...). An entry of -inf is never chosen: if at most k others are left, these get 1.
            One of inf always is, if there are at most k.
        k: How many to choose, 1 <= k < n.
        tau: Temperature, above 0, in the unit of x.
        kind: "sigmoid", the logistic kernel; "laplace", that of exp(-|x|) / 2, with which for k = 1 the mask is
            softmax(x / tau) wherever no entry of it exceeds 1/2.
        dim: Where the n entries lie.

    Returns:
        As x in shape, within [0, 1], with the sum k along ``dim`` (but for rounding, 1e-6 of it in float32); float32
        for half precision.

    Raises:
        TypeError: If x is not floating point.
        ValueError: If k is not within 1 <= k < n, for a tau that is not above 0, or an unknown kind.
    """
    x = at_least_float32(x)
    _check_k(x, k, dim, most=-1)
    check_positive(tau)
    check_choice(kind, tuple(_KINDS), "kind")
    mask: Tensor = _SoftTopK.apply(x, k, tau, kind, dim)
    return mask


def soft_kth_largest(x: Tensor, k: int, tau: float = 1.0, kind: Kind = "sigmoid", dim: int = -1) -> Tensor:
    """Smooth k-th largest entry, the mean of x over the difference of the soft top-k masks of k and k - 1.

    The weights are not negative and sum to 1, so that it is never beyond the smallest and the largest entry. It is
    shifted as x is, and as tau vanishes it is the k-th of ``torch.topk``.

    Args:
        x: Floating point, (..., n, ...). Entries of -inf come last.
        k: 1 for the largest, n for the smallest.
        tau: Temperature, above 0, in the unit of x.
        kind: As in :func:`soft_topk`.
        dim: Where the n entries lie.

    Returns:
        As x in shape without ``dim``; float32 for half precision.

    Raises:
        TypeError: If x is not floating point.
        ValueError: If k is not within 1 <= k <= n, for a tau that is not above 0, or an unknown kind.
    """
    x = at_least_float32(x)
    _check_k(x, k, dim, most=0)
    check_positive(tau)
    check_choice(kind, tuple(_KINDS), "kind")
    x = x.movedim(dim, -1)
    weights = soft_topk(x, k, tau, kind) if k < x.shape[-1] else torch.ones_like(x)
    if k > 1:
        weights = weights - soft_topk(x, k - 1, tau, kind)
    # Differences to the entry itself, which are exact where the weight is.
    entry = x.detach().topk(k, -1).values[..., -1]
    offsets = x - entry.masked_fill(entry.isinf(), 0.0).unsqueeze(-1)
    return entry + (offsets.masked_fill(x.isinf(), 0.0) * weights).sum(-1)


class _SoftTopK(torch.autograd.Function):
    """Soft top-k mask, whose derivatives come from the mask itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, k: int, tau: float, kind: Kind, dim: int) -> Tensor:
        x, kernel, least = x.transpose(dim, -1), _KINDS[kind], _least(x)
        best, index = x.topk(k + 1, -1)
        left_out = best == -torch.inf
        best, index = best.masked_fill(left_out, torch.inf), index[..., :k]
        # Between the k-th entry and the next, or the lowest above -inf: differences are exact where they matter.
        lowest = best.amin(-1, keepdim=True)
        kth = best[..., -2:-1].masked_fill(left_out[..., -2:-1], -torch.inf)
        middle = (lowest / 2).add(kth.maximum(lowest), alpha=0.5).clamp(max=torch.finfo(x.dtype).max)
        odds = (x - middle).div_(tau).exp_().scatter(-1, index, least)  # of all but the k largest, at most 1
        lacking = ((middle - best[..., :k]) / tau).exp().clamp(min=least)  # of the k largest, inverse
        at = _solve(odds, lacking, kernel, steps=3 if x.dtype == torch.float32 else 5)
        chosen = (1 - kernel.distribution(lacking, 1 / at)).masked_fill(left_out[..., :k], 0.0)
        return kernel.distribution(odds, at).scatter(-1, index, chosen).transpose(dim, -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, float, Kind, int], output: Tensor) -> None:
        ctx.save_for_backward(output)
        _, _, ctx.tau, ctx.kind, ctx.dim = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (mask,) = ctx.saved_tensors
        density = _KINDS[ctx.kind].density(mask)
        weighted = density * grad
        mean = weighted.sum(ctx.dim, keepdim=True) / density.sum(ctx.dim, keepdim=True).clamp(min=_least(mask))
        return weighted.addcmul(density, mean, value=-1.0) / ctx.tau, None, None, None, None


def _check_k(x: Tensor, k: int, dim: int, most: int) -> None:
    n = x.shape[dim] if x.ndim else 1
    if not 1 <= k <= n + most:
        bound = "k < n" if most else "k <= n"
        raise ValueError(f"k is {k}: of n = {n} entries along dimension {dim} it has to be 1 <= {bound}")


def _least(x: Tensor) -> float:
    """A number so small that where it changes a sum, the mask is right to the last bit wherever the threshold lies."""
    return torch.finfo(x.dtype).eps ** 4


def _solve(odds: Tensor, lacking: Tensor, kernel: "_Kernel", steps: int) -> Tensor:
    """Odds of the threshold (..., 1), by Newton's method on log A - log B.

    Args:
        odds: Of the entries that are not among the k largest, (..., n); tiny for the k largest.
        lacking: Inverse odds of the k largest, (..., k).
        kernel: Which.
        steps: How many.
    """
    # The root for a wide gap, and for entries that are equal on either side of it, with the logistic kernel.
    k, n = lacking.shape[-1], odds.shape[-1]
    above, below = odds.sum(-1, keepdim=True), lacking.sum(-1, keepdim=True)
    wide = (above / below).sqrt()
    at = wide * (above / wide * (0.5 / k - 0.5 / (n - k))).asinh().exp()
    for _ in range(steps):
        excess, falls = kernel.total_and_slope(odds, at)
        lack, rises = kernel.total_and_slope(lacking, 1 / at)
        at = at * (excess / lack) ** (1 / (falls + rises))
    return at


class _Kernel(NamedTuple):
    """A kernel in terms of odds, exp((x - m) / tau), and of the odds of its middle.

    Attributes:
        distribution: Its distribution function.
        total_and_slope: The sum (..., 1) of the distribution function, and minus the slope of its logarithm in the
            logarithm of the middle's odds.
        density: The density by the value of the distribution function.
    """

    distribution: Callable[[Tensor, Tensor], Tensor]
    total_and_slope: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    density: Callable[[Tensor], Tensor]


def _logistic(odds: Tensor, at: Tensor) -> Tensor:
    return odds / (odds + at)


def _logistic_total_and_slope(odds: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    mask = odds / (odds + at)
    total = mask.sum(-1, keepdim=True)
    return total, 1 - torch.linalg.vector_norm(mask, dim=-1, keepdim=True).square() / total


def _laplace(odds: Tensor, at: Tensor) -> Tensor:
    return (odds.minimum(at) / at + (1 - at / odds.maximum(at))) / 2


def _laplace_total_and_slope(odds: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    ratio, inverse = odds / at, at / odds
    density = ratio.minimum(inverse).sum(-1, keepdim=True) / 2
    total = density + (1 - inverse).relu().sum(-1, keepdim=True)
    return total, density / total


_KINDS = {
    "sigmoid": _Kernel(_logistic, _logistic_total_and_slope, lambda mask: mask * (1 - mask)),
    "laplace": _Kernel(_laplace, _laplace_total_and_slope, lambda mask: mask.minimum(1 - mask)),
}
