"""Balanced epochs: how often each class comes, and which of its samples, as a function of seed and epoch.

A class with n samples gets a share of the epoch proportional to ``n ** (1 - balance)``. 0 is the data as it is
(instance-balanced sampling), 1 gives every class the same share (class-balanced), 0.5 is square-root sampling (Mahajan
et al. 2018, "Exploring the Limits of Weakly Supervised Pretraining"); the exponent is q of Kang et al. 2020,
"Decoupling Representation and Classifier for Long-Tailed Recognition", equation 1. Classes without samples are
left out. Where a sample has several labels, each set of labels that occurs is a class (the label powerset of Tsoumakas
and Katakis 2007), and so is the empty set.

Nothing is drawn with replacement. A class's share, seldom a whole number, is rounded down or up so that an epoch has as
many samples as ever and, over epochs, neither way is favoured: systematic sampling with one starting point for all
classes, which moves on by the golden ratio from epoch to epoch. A class's samples stand in one random circle. An epoch
takes up where the one before has stopped, so that each comes as often as the others of its class, give or take one,
within an epoch and over all epochs so far.
"""

import numpy as np
import torch

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: of all steps, the one that spreads points on a circle most evenly


class BalancedEpochs:
    """The samples of each epoch, classes more or less alike in number. Whoever asks shuffles them.

    Args:
        labels: (N,) class of each sample, integers; or (N, labels) 0 and 1, of several labels.
        balance: From 0, frequencies as in the data, to 1, all the same.
        size: Samples of an epoch.
        seed: Seed of the circles and of the rounding, from 0 to 2^64 - 1.

    Raises:
        ValueError: If ``balance`` is out of range, or samples have no labels.
    """

    def __init__(self, labels: np.ndarray | None, balance: float, size: int, seed: int) -> None:
        if not 0 <= balance <= 1:
            raise ValueError(f"balance is {balance}: expected 0 (as in the data) to 1 (classes alike)")
        if labels is None:
            raise ValueError(f"balance is {balance}: expected 0 for samples without labels")
        self.size = size
        axis = None if labels.ndim == 1 else 0  # of sets of labels
        _, classes, self.counts = np.unique(labels, axis=axis, return_inverse=True, return_counts=True)
        classes = classes.reshape(-1)  # which numpy 2.0 returns as a column for an axis
        circle = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).numpy()
        self._members = circle[np.argsort(classes[circle], kind="stable")]
        self._first = np.cumsum(self.counts) - self.counts  # where among the members each class begins
        # Where each class ends on a line as long as the epoch, in whole samples and the rest.
        weights = self.counts.astype(np.float64) ** (1 - balance)
        ends = np.append(weights.cumsum()[:-1] / weights.sum() * size, size)
        self._whole = np.floor(ends).astype(np.int64)
        self._rest = ends - self._whole
        self._start = np.uint64(seed)

    def drawn(self, epoch: int) -> np.ndarray:
        """Samples of each class in the epochs before this one, (classes,) int64."""
        steps = (np.arange(epoch, dtype=np.uint64) + self._start) * np.uint64(GOLDEN)  # modulo 2^64
        points = np.sort((steps >> np.uint64(11)) / 2.0**53)
        rounded_up = epoch - np.searchsorted(points, 1 - self._rest)
        return np.diff(epoch * self._whole + rounded_up, prepend=0)

    def __call__(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples of an epoch, (size,) int64, class by class, and how often each has come before in it."""
        before = self.drawn(epoch)
        quotas = self.drawn(epoch + 1) - before
        first, counts, done = (np.repeat(each, quotas) for each in (self._first, self.counts, before))
        turn = np.arange(self.size) - np.repeat(np.cumsum(quotas) - quotas, quotas)  # of the class, in this epoch
        return self._members[first + (done + turn) % counts], turn // counts
