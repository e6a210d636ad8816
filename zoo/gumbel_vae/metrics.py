"""Use of the codes over a whole evaluation and all processes: collapse shows here before it does in a loss."""

from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from zoo.common.precision import FullPrecision

Moments = tuple[Tensor, Tensor, Tensor]
"""A count (), the mean of as many values (N,), and the sum of their squared differences from it (N,)."""


class ActiveLatents(FullPrecision, Metric):
    """The number of active categorical latents: those that say something about the image.

    A latent is active if the mutual information I(x; z_n) = H(mean of q(z_n|x) over x) - mean of H(q(z_n|x)) exceeds a
    threshold. It is the categorical counterpart of Burda et al.'s active units (see :class:`ActiveUnits`): 0 if all
    images share one posterior, at most log(categories).

    Args:
        latents: N.
        categories: K.
        threshold: In nats.
    """

    higher_is_better = True
    full_state_update = False
    probabilities: Tensor
    entropies: Tensor
    count: Tensor

    def __init__(self, latents: int, categories: int, threshold: float = 0.01, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_sizes(latents, categories, threshold)
        self.threshold = threshold
        self.add_state("probabilities", torch.zeros(latents, categories, dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("entropies", torch.zeros(latents, dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")

    def update(self, logits: Tensor) -> None:
        """Takes the posterior's logits (B, N, K)."""
        _check_shape("logits", logits, tuple(self.probabilities.shape))
        q = logits.float().softmax(-1)
        self.probabilities += q.sum(0)
        self.entropies += torch.special.entr(q).sum((0, 2))
        self.count += len(q)

    def compute(self) -> Tensor:
        """The number of active latents, as a float; nan before the first image."""
        return torch.where(self.count > 0, (self._information() > self.threshold).sum().float(), torch.nan)

    def information(self) -> Tensor:
        """The mutual information of each latent and the image, (N,) nats. As compute, it is a collective."""
        with self.sync_context(should_sync=self.sync_on_compute):
            return self._information()

    def _information(self) -> Tensor:
        """(N,) nats, nan before the first image."""
        return torch.special.entr(self.probabilities / self.count).sum(1) - self.entropies / self.count


class CodeUsage(FullPrecision, Metric):
    """Codebook perplexity: exp(H) of the codes' frequencies, which is K if all are used alike, and 1 if one is.

    Frequencies are those of all images since the last reset. A batch's perplexity, or its mean over batches, depends on
    the batch size: a few images cannot use many codes.

    Args:
        latents: N.
        categories: K.
        shared: Whether code k means the same wherever it stands, as in an image tokeniser, whose positions share a
            codebook. Frequencies are then those of all positions together.
    """

    higher_is_better = True
    full_state_update = False
    counts: Tensor

    def __init__(self, latents: int, categories: int, shared: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_sizes(latents, categories)
        self.shared = shared
        self.add_state("counts", torch.zeros(latents, categories, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, codes: Tensor) -> None:
        """Takes integer codes (B, N), 0 to K - 1; others are torch's index error."""
        _check_shape("codes", codes, tuple(self.counts.shape[:1]))
        index = codes.to(torch.int64).T
        self.counts.scatter_add_(1, index, torch.ones_like(index))  # bincount would make the host wait

    def compute(self) -> Tensor:
        """The perplexity, 1 to K; that of each latent averaged, unless shared. nan before the first image."""
        return torch.special.entr(self._frequencies()).sum(1).exp().mean()

    def used(self, share: float = 0.0) -> Tensor:
        """The fraction of codes used more often than that share of the time. As compute, it is a collective."""
        with self.sync_context(should_sync=self.sync_on_compute):
            frequencies = self._frequencies()
        return torch.where(frequencies.isnan(), torch.nan, (frequencies > share).float()).mean()

    def _frequencies(self) -> Tensor:
        """(N, K), or (1, K) if shared; nan before the first image."""
        counts = self.counts.sum(0, keepdim=True) if self.shared else self.counts
        return counts.float() / counts.sum(1, keepdim=True)  # of integers it would be the default dtype's


class ActiveUnits(FullPrecision, Metric):
    """The number of active Gaussian latents, whose posterior mean varies: Var_x(E_q[z_n]) above a threshold.

    Burda et al. 2016, "Importance Weighted Autoencoders", arXiv 1509.00519.

    Args:
        latents: N.
        threshold: Of the variance. The paper's is 0.01.
    """

    higher_is_better = True
    full_state_update = True  # the states of two updates are not to be added
    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, latents: int, threshold: float = 0.01, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_sizes(latents, threshold=threshold)
        self.threshold = threshold
        # Moments of each process, merged as in Chan et al. 1983, "Algorithms for Computing the Sample Variance". Sums
        # of squares would lose a small variance beside a large mean, and not every device has float64.
        self.add_state("count", torch.zeros((), dtype=torch.float32), dist_reduce_fx=None)
        self.add_state("mean", torch.zeros(latents, dtype=torch.float32), dist_reduce_fx=None)
        self.add_state("squares", torch.zeros(latents, dtype=torch.float32), dist_reduce_fx=None)

    def update(self, mean: Tensor) -> None:
        """Takes the posterior's means (B, N)."""
        _check_shape("mean", mean, tuple(self.mean.shape))
        if not len(mean):
            return
        variance, average = torch.var_mean(mean.float(), 0, correction=0)
        batch = torch.full_like(self.count, len(mean)), average, variance * len(mean)
        self.count, self.mean, self.squares = _merged((self.count, self.mean, self.squares), batch)

    def compute(self) -> Tensor:
        """The number of active units, as a float; nan before the first image."""
        variance = self._variance()
        return torch.where(variance.isnan().all(), torch.nan, (variance > self.threshold).sum().float())

    def variance(self) -> Tensor:
        """Variance of each unit over images, (N,), divided by their number. As compute, it is a collective."""
        with self.sync_context(should_sync=self.sync_on_compute):
            return self._variance()

    def _variance(self) -> Tensor:
        """(N,), nan before the first image."""
        state = self.count, self.mean, self.squares
        if self.count.ndim:  # gathered: a row for each process
            state = reduce(_merged, zip(*state, strict=True))
        return state[2] / state[0]


def _merged(one: Moments, other: Moments) -> Moments:
    """Merges what both have seen."""
    count = one[0] + other[0]
    share = other[0] / count.clamp(min=1)
    difference = other[1] - one[1]
    return count, one[1] + share * difference, one[2] + other[2] + one[0] * share * difference**2


def _check_sizes(latents: int, categories: int = 2, threshold: float = 0.0) -> None:
    if latents < 1 or categories < 2 or threshold < 0:
        raise ValueError(
            f"latents is {latents}, categories {categories}, threshold {threshold}: expected at least 1, at least 2, "
            "and no negative number"
        )


def _check_shape(name: str, values: Tensor, expected: tuple[int, ...]) -> None:
    if values.shape[1:] != expected:
        raise ValueError(
            f"{name} are {tuple(values.shape)}: the metric was made for (images, {', '.join(map(str, expected))})"
        )
