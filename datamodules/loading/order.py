"""Order of samples and batches on every process: a pure function of seed and epoch.

A position in this order is a number of samples, the same on all processes, so that a run can be continued from it by
any number of them.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DistributedSampler, SequentialSampler

from datamodules.loading.balance import BalancedEpochs

Key = tuple[int, int, int]
"""(epoch, copy, index) of one sample: all that its random choices depend on besides the seed."""


class Keys(list[Key]):
    """The keys of one rank's share of a batch, and the number of that batch in its epoch."""

    def __init__(self, keys: Iterable[Key], batch: int) -> None:
        super().__init__(keys)
        self.batch = batch


def mix(*values: int) -> int:
    """A 63-bit seed from a few integers, every bit of each mixed in (SplitMix64's finaliser, Steele et al. 2014)."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def mixed(*values: int | np.ndarray) -> np.ndarray:
    """:func:`mix` for arrays (N,) of non-negative integers among the values: int64 (N,)."""
    state = np.zeros(1, dtype=np.uint64)
    for value in values:
        more = value.astype(np.uint64) if isinstance(value, np.ndarray) else np.uint64(value & 0xFFFFFFFFFFFFFFFF)
        state = state + more + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return (state >> np.uint64(1)).astype(np.int64)


class BatchOrder(DistributedSampler[Any], SequentialSampler):
    """Sampler of whole batches: yields this rank's, each a list of keys (epoch, copy, index).

    Training: a permutation by (seed, epoch) is cut into global batches of ``batch_size * world_size``; rank r takes
    every ``world_size``-th sample of each. Evaluation: the samples in their order, cut into as few global batches as
    the batch size allows, of nearly equal size; each sample comes once, and every rank gets the same number of batches,
    so that nothing is counted twice and no rank waits for another.

    It serves any DataLoader, as ``DataLoader(SeededBatches(...), batch_size=None, sampler=BatchOrder(...))``, and, with
    :meth:`position` in a checkpoint and :meth:`resume`, goes on in the middle of an epoch. It is a DistributedSampler
    so that Lightning leaves it in place under distributed strategies, and a SequentialSampler so that
    ``overfit_batches`` does.

    Args:
        size: Number of samples.
        batch_size: Samples per batch on one rank, at most.
        rank, world_size: This process and how many there are.
        seed: Seed of the order.
        shuffle: Whether to permute, anew in each epoch.
        drop_last: Leave out the samples that do not fill the last global batch. Without it, samples are spread as in
            evaluation, and batches may be smaller than ``batch_size``.
        repeats: Each sample comes this often in a row, spread over ranks, the epoch's length unchanged: an epoch then
            sees ``size / repeats`` samples (repeated augmentation, Hoffer et al. 2020, as used by DeiT).
        groups: (size,) the group of each sample, for batches of samples alike (in shape, say). The shuffled order is
            cut into chunks of ``chunk`` batches; each is sorted by group, and its batches are shuffled. Within a chunk,
            only a batch where two groups meet is mixed. Without ``shuffle`` this changes nothing.
        labels: (size,) the class of each sample, or (size, labels) of 0 and 1, for ``balance``.
        balance: How far classes are to come alike in number, from 0, as in the data, to 1, as often as each other: see
            :mod:`datamodules.loading.balance`. The epoch's length is unchanged; a sample that comes several times in it
            is another copy each time. Without ``shuffle`` this changes nothing.
    """

    chunk = 64

    def __init__(
        self,
        size: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = False,
        drop_last: bool = False,
        repeats: int = 1,
        groups: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        balance: float = 0.0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: expected at least 1")
        if repeats < 1:
            raise ValueError(f"repeats is {repeats}: expected at least 1")
        if repeats > 1 and groups is not None:
            raise ValueError(f"repeats is {repeats}: expected 1 where samples are grouped")
        if balance and groups is not None:
            raise ValueError(f"balance is {balance}: expected 0 where samples are grouped")
        self.size, self.batch_size, self.repeats = size, batch_size, repeats
        self.rank, self.world_size, self.seed, self.shuffle = rank, world_size, seed, shuffle
        self.drop_last, self.groups, self.balance = drop_last, groups, balance
        self._balanced: BalancedEpochs | None = None
        if balance:
            if labels is not None and len(labels) != size:
                raise ValueError(f"labels are {len(labels)} for {size} samples: expected one each")
            self._balanced = BalancedEpochs(labels, balance, math.ceil(size / repeats), mix(seed))
        self.total = batch_size * world_size
        """Samples of a global batch, at most."""
        self.batches = self._batches(size, self.total)
        self.epoch = 0
        self._resumed: tuple[int, int, int] = (-1, 0, self.total)  # epoch, samples done of it, total when it began

    def __len__(self) -> int:
        return self.batches

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    # A position in the order.

    def position(self, epoch: int, batch: int) -> dict[str, Any]:
        """Position before a batch of an epoch, for a checkpoint and :meth:`resume`: a few numbers.

        ``samples`` is how many of the epoch's global order come before the batch, whatever the number of processes.
        """
        whole, samples = self._resumed[2] if epoch == self._resumed[0] else self.total, self._start(batch, epoch)
        return {
            "epoch": epoch,
            "samples": samples,
            "total": whole,
            "size": self.size,
            "seed": self.seed,
            "balance": self.balance,
        }

    def resume(self, position: Mapping[str, Any]) -> None:
        """Makes an epoch the current one, behind the samples that are done; the other epochs are whole.

        The order of what is left is that of the run the position is from, also with another number of processes or
        another batch size: it is then cut into batches anew. Batches keep their numbers, so that the epoch still ends
        with the last of ``len(self)``.

        Raises:
            ValueError: In the middle of an epoch, if the samples are not as many, or seed or balance are others.
        """
        epoch, samples = position["epoch"], position.get("samples", 0)
        if position.get("packs"):
            raise ValueError(
                f"the checkpoint is in the middle of epoch {epoch}, of batches by a token_budget, but here is none: "
                "continue with the same token_budget, or from the end of an epoch"
            )
        if samples and (position["size"], position["seed"]) != (self.size, self.seed):
            raise ValueError(
                f"the checkpoint is in the middle of epoch {epoch}, of {position['size']} samples in the order of seed "
                f"{position['seed']}, but here are {self.size} and seed {self.seed}: continue with the same data and "
                "seed, or from the end of an epoch"
            )
        if samples and (before := position.get("balance", 0.0)) != self.balance:
            raise ValueError(
                f"the checkpoint is in the middle of epoch {epoch}, in an order with balance {before}, but here it is "
                f"{self.balance}: continue with the same balance, or from the end of an epoch"
            )
        self.epoch, self._resumed = epoch, (epoch, samples, position.get("total", self.total))

    def first_batch(self, epoch: int) -> int:
        """The number of the batch that an epoch starts with: 0, but of the one that was resumed."""
        return self.batches - self._batches(self.size - self._seen(epoch), self.total)

    def _seen(self, epoch: int) -> int:
        return self._resumed[1] if self._resumed[0] == epoch else 0

    def _batches(self, samples: int, total: int) -> int:
        """Number of batches that some samples make."""
        return samples // total if self.drop_last else math.ceil(samples / total)

    def _start(self, batch: int, epoch: int) -> int:
        """Start of a batch in the global order."""
        first, seen = self.first_batch(epoch), self._seen(epoch)
        return seen + self._boundary(batch - first, self.size - seen, self.total)

    def _boundary(self, batch: int, samples: int, total: int) -> int:
        """Start of a batch among samples that are cut into batches from their first on."""
        if self.drop_last:
            return batch * total
        shorter, longer = divmod(samples, max(1, self._batches(samples, total)))
        return batch * shorter + min(batch, longer)  # the first `longer` batches have one sample more

    # The order.

    def order(self, epoch: int) -> np.ndarray:
        """The samples of one epoch in their global order, over all ranks, as whole batches: (N,) int64.

        Of a resumed epoch it holds those before the position as well.
        """
        return self._order(epoch)[0]

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The global order of one epoch, and which copy of its sample each is."""
        used = self._start(self.batches, epoch)
        draws, repeat = divmod(np.arange(used), self.repeats)
        if not self.shuffle:
            return draws, repeat
        generator = torch.Generator().manual_seed(mix(self.seed, epoch))
        if self._balanced is not None:
            samples, before = self._balanced(epoch)
            draws = torch.randperm(len(samples), generator=generator).numpy()[draws]
            return samples[draws], before[draws] * self.repeats + repeat
        permutation = torch.randperm(self.size, generator=generator).numpy()
        if self.groups is not None:
            total = self._resumed[2] if self._resumed[0] == epoch else self.total
            return self._grouped(permutation, self.groups, total, generator)[:used], repeat
        return permutation[draws], repeat

    def _grouped(self, order: np.ndarray, groups: np.ndarray, total: int, generator: torch.Generator) -> np.ndarray:
        """An order's samples, rearranged within chunks so that batches hold samples of one group, if possible."""
        arranged, batches = order.copy(), self._batches(self.size, total)
        for first in range(0, batches, self.chunk):
            last = min(first + self.chunk, batches)
            starts = [self._boundary(batch, self.size, total) for batch in range(first, last + 1)]
            part = order[starts[0] : starts[-1]]
            part = part[np.argsort(groups[part], kind="stable")]
            taken = 0  # batches differ in size by one, so they are filled in a random order rather than moved
            for batch in torch.randperm(last - first, generator=generator).tolist():
                start, end = starts[batch], starts[batch + 1]
                arranged[start:end] = part[taken : taken + end - start]
                taken += end - start
        return arranged

    # Batches.

    def positions(self, batch: int, epoch: int | None = None) -> range:
        """Positions of this rank's share of a batch in the global order; of the current epoch if none is given."""
        epoch = self.epoch if epoch is None else epoch
        return range(self._start(batch, epoch) + self.rank, self._start(batch + 1, epoch), self.world_size)

    def keys_of_batch(self, batch: int, epoch: int | None = None) -> Keys:
        """Keys of one batch, this rank's; of the current epoch if none is given."""
        epoch = self.epoch if epoch is None else epoch
        return self._keys(batch, epoch, *self._order(epoch))

    def batch_indices(self, batch: int, epoch: int | None = None) -> list[int]:
        """Sample indices of one batch, this rank's; of the current epoch if none is given."""
        return [index for _, _, index in self.keys_of_batch(batch, epoch)]

    def _keys(self, batch: int, epoch: int, order: np.ndarray, copies: np.ndarray) -> Keys:
        mine = self.positions(batch, epoch)
        share = slice(mine.start, mine.stop, mine.step)
        pairs = zip(copies[share].tolist(), order[share].tolist(), strict=True)
        return Keys(((epoch, copy, index) for copy, index in pairs), batch)

    def __iter__(self) -> Iterator[Keys]:  # type: ignore[override]  # whole batches of keys, not indices
        epoch = self.epoch
        order, copies = self._order(epoch)
        for batch in range(self.first_batch(epoch), self.batches):
            yield self._keys(batch, epoch, order, copies)
