"""Soft ranks, counts, and numbers of distinct classes."""

import torch
from torch import Tensor

from zoo.losses.soft import Kernel, at_least_float32, check_entries, check_positive, smooth_step


def soft_rank(x: Tensor, tau: float = 1.0, dim: int = -1) -> Tensor:
    """Smooth rank of each entry, 1 for the largest: 1 + sum over j != i of sigmoid((x_j - x_i) / tau).

    The ranks of n entries always sum to n (n + 1) / 2. As tau vanishes they are whole, with gaps of at least d between
    entries to (n - 1) exp(-d / tau), and entries that tie get the mean of their ranks. As tau grows all go to
    (n + 1) / 2. Only entries within a few tau of each other have a gradient, so that tau has to follow the spread of x.
    Memory grows with n². (Pairwise, as in Qin et al. 2010, "A general approximation framework for direct optimization
    of information retrieval measures".)

    Args:
        x: Floating point, (..., n, ...). Entries of -inf come last and tie there.
        tau: Temperature, above 0, in the unit of x.
        dim: Where the n entries lie.

    Returns:
        As x in shape, within [1, n], in the opposite order of x.

    Raises:
        TypeError: If x is not floating point.
        ValueError: If there are no entries, or for a tau that is not above 0.
    """
    x = at_least_float32(x)
    check_positive(tau)
    check_entries(x, dim)
    x = x.transpose(dim, -1)
    mine, others = x.unsqueeze(-1), x.unsqueeze(-2)
    # Infinities of one sign tie; their difference would be NaN.
    difference = (others - mine).masked_fill(mine.isinf() & (mine == others), 0.0)
    return (0.5 + smooth_step(difference, tau).sum(-1)).transpose(dim, -1)  # an entry beats itself by half


def soft_count(
    x: Tensor, threshold: float | Tensor = 0.0, tau: float = 1.0, dim: int = -1, kernel: Kernel = "logistic"
) -> Tensor:
    """Smooth number of entries above a threshold, the sum of smooth steps at it.

    As tau vanishes it is the number of entries above the threshold, and one at it counts for 1/2. If all of n entries
    are at least d away from it, it is off by at most n exp(-d / tau).

    Args:
        x: Floating point, (..., n, ...).
        threshold: A number, or a tensor that broadcasts with x.
        tau: Temperature, above 0, in the unit of x.
        dim: Where the n entries lie; of none the count is 0.
        kernel: Of the steps, see :func:`smooth_step`.

    Returns:
        As x in shape without ``dim``, within [0, n].

    Raises:
        TypeError: If x is not floating point.
        ValueError: For a tau that is not above 0, or an unknown kernel.
    """
    return smooth_step(at_least_float32(x) - threshold, tau, kernel).sum(dim)


def soft_count_distinct(probabilities: Tensor) -> Tensor:
    """Expected number of distinct classes of a batch drawn from its probabilities, sum_c (1 - prod_i (1 - p_ic)).

    Within 1 and the smaller of B and C if the rows sum to 1, and the number of classes that occur if they are one-hot.
    It saturates: what a class that is sure to occur in one row gets in others changes nothing, and in a large batch
    all classes are nearly sure to occur. :func:`effective_count` still has a gradient there.

    Args:
        probabilities: (..., B, C), each within [0, 1], such as softmax gives them; C classes that each of B entries has
            independently.

    Returns:
        (...); 0 where B is 0.

    Raises:
        TypeError: If the probabilities are not floating point.
        ValueError: If they have fewer than two dimensions.
    """
    p = _rows_of_classes(probabilities)
    # A sure class would be log(0). The step below 1 keeps its gradient, the product over the other rows.
    sure = (p >= 1).to(p.dtype) * torch.finfo(p.dtype).eps
    missing = torch.log1p(sure - p).sum(-2)
    # Few are counted exactly by expm1, whose derivative vanishes too early.
    return torch.where(missing > -1, -missing.expm1(), 1 - missing.exp()).sum(-1)


def effective_count(probabilities: Tensor) -> Tensor:
    """Effective number of classes in use, exp(entropy of the mean probabilities): the perplexity of a codebook's usage.

    Within 1 and C; the number of classes in use if all of them are used alike, less otherwise, however many rows.

    Args:
        probabilities: (..., B, C), rows that sum to 1.

    Returns:
        (...).

    Raises:
        TypeError: If the probabilities are not floating point.
        ValueError: If they have fewer than two dimensions, or no rows.
    """
    p = _rows_of_classes(probabilities)
    if p.shape[-2] == 0:
        raise ValueError(f"probabilities has no rows: its shape is {tuple(p.shape)}, (..., B, C)")
    mean = p.mean(-2)
    return (-(mean * mean.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(-1)).exp()


def _rows_of_classes(probabilities: Tensor) -> Tensor:
    if probabilities.ndim < 2:
        raise ValueError(f"probabilities has the shape {tuple(probabilities.shape)}: it has to be (..., B, C)")
    return at_least_float32(probabilities, "probabilities")
