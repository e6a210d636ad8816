"""Order of batches that hold as many samples as fit a budget of tokens: images of any size, packed.

An epoch is packed as a whole, whatever the number of processes, so that a position in it is a number of packs.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DistributedSampler, SequentialSampler

from datamodules.loading.order import Keys, mix

Counts = Callable[[int, np.ndarray, np.ndarray], np.ndarray]
"""Tokens (N,) of samples, by their epoch, copies (N,) and indices (N,): what their keys are made of."""


class Packs(NamedTuple):
    """Packs of samples, one after another.

    Attributes:
        indices: Of the samples, (N,) int64.
        copies: Which copy of its sample each is, (N,) int64.
        ends: Where each pack ends, among the N.
        tokens: Of each pack.
    """

    indices: np.ndarray
    copies: np.ndarray
    ends: tuple[int, ...]
    tokens: tuple[int, ...]


class BudgetOrder(DistributedSampler[Any], SequentialSampler):
    """Sampler of whole batches: yields this rank's, a list of keys (epoch, copy, index) of samples that fit a budget.

    Training: the samples, permuted by (seed, epoch), are put into packs one by one, each into the first of up to
    ``open_packs`` packs that has room for it (greedy packing, first fit, as NaViT packs: Dehghani et al. 2023, arXiv
    2307.06304); where none has, the fullest is complete, and a new one begins. All epochs are as long, for which the
    first one's packs count that are at least half full: of another epoch's packs, that many are taken, the fullest; if
    they are fewer, a second permutation's follow. So an epoch may leave out a few samples, and show a few twice, as
    other copies.

    Evaluation: the samples in their order, each once, put into a pack until the next does not fit. Packs are halved
    until all ranks have as many. All epochs are the first.

    A global batch is ``world_size`` packs that follow each other, one for each rank. The contract is that of
    :class:`datamodules.loading.order.BatchOrder`: a pure function of seed and epoch, with
    :meth:`position` and :meth:`resume`.

    Args:
        size: Number of samples.
        token_budget: Tokens of a batch on one rank, at most.
        tokens: Of each sample, (size,), or a function of (epoch, copies (N,), indices (N,)) where they are drawn anew.
        rank, world_size: This process and how many there are.
        seed: Seed of the order.
        shuffle: Whether to permute, anew in each epoch.
        names: What each sample is called, for errors. None: its number.

    Raises:
        ValueError: For a sample of more tokens than the budget, by name, or of none; also when an epoch draws such.
    """

    open_packs = 32

    def __init__(
        self,
        size: int,
        token_budget: int,
        tokens: np.ndarray | Counts,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = False,
        names: Sequence[Any] | np.ndarray | None = None,
    ) -> None:
        if token_budget < 1:
            raise ValueError(f"token_budget is {token_budget}: expected at least 1")
        if not callable(tokens) and len(tokens) != size:
            raise ValueError(f"tokens are {len(tokens)} for {size} samples: expected one number each")
        self.size, self.token_budget, self.tokens, self.names = size, token_budget, tokens, names
        self.rank, self.world_size, self.seed, self.shuffle = rank, world_size, seed, shuffle
        self.epoch = 0
        self._kept: tuple[int, Packs] | None = None  # the last epoch that was packed
        self._resumed: tuple[int, int] = (-1, 0)  # epoch, packs done of it
        if shuffle:
            _, _, _, filled = self._permuted(0, 0)
            self.packs = sum(2 * count >= token_budget for count in filled)
        else:
            self.packs = len(self.packed(0).ends)
        self.batches = self.packs // world_size

    def __len__(self) -> int:
        return self.batches

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    # A position in the order.

    def position(self, epoch: int, batch: int) -> dict[str, Any]:
        """Position before a batch of an epoch, for a checkpoint and :meth:`resume`: a few numbers."""
        return {"epoch": epoch, "packs": self._start(batch, epoch), **self._identity(epoch)}

    def _identity(self, epoch: int) -> dict[str, Any]:
        """Facts that have to be the same for an epoch to be continued."""
        counts = self._counts(self._as(epoch), np.zeros(self.size, dtype=np.int64), np.arange(self.size))
        return {
            "size": self.size,
            "seed": self.seed,
            "token_budget": self.token_budget,
            "tokens": zlib.crc32(counts.tobytes()),
            "split_for": 1 if self.shuffle else self.world_size,
        }

    def resume(self, position: Mapping[str, Any]) -> None:
        """Makes an epoch the current one, behind the packs that are done; the other epochs are whole.

        In training what is left is the same with another number of processes. Batches keep their numbers, so that the
        epoch still ends with the last of ``len(self)``.

        Raises:
            ValueError: In the middle of an epoch, if the order would be another: by seed, budget, samples or sizes.
        """
        epoch, done = position["epoch"], position.get("packs", position.get("samples", 0))
        if done:
            differ = [(k, position.get(k), v) for k, v in self._identity(epoch).items() if position.get(k) != v]
            if differ:
                name, before, now = differ[0]
                words = {"tokens": "sizes of samples", "split_for": "processes"}.get(name, name)
                told = "others" if name == "tokens" else f"{before} in it and {now} here"
                raise ValueError(
                    f"the checkpoint is in the middle of epoch {epoch}, and {words} are {told}: continue with the "
                    "same, or from the end of an epoch"
                )
        self.epoch, self._resumed = epoch, (epoch, done)

    def first_batch(self, epoch: int) -> int:
        """The number of the batch that an epoch starts with: 0, but of the one that was resumed."""
        return self.batches - (self.packs - self._seen(epoch)) // self.world_size

    def _seen(self, epoch: int) -> int:
        return self._resumed[1] if self._resumed[0] == epoch else 0

    def _start(self, batch: int, epoch: int) -> int:
        """First pack of a batch."""
        return self._seen(epoch) + (batch - self.first_batch(epoch)) * self.world_size

    # The packs.

    def packed(self, epoch: int) -> Packs:
        """All packs of an epoch, over all ranks. Of a resumed epoch, those before the position as well."""
        epoch = self._as(epoch)
        if self._kept is None or self._kept[0] != epoch:
            self._kept = epoch, self._shuffled(epoch) if self.shuffle else self._in_order(epoch)
        return self._kept[1]

    def _as(self, epoch: int) -> int:
        """The epoch that an epoch is made as: in order, the first, since packs go by its sizes."""
        return epoch if self.shuffle else 0

    def fill(self, epoch: int = 0) -> float:
        """Share of the budget that an epoch's packs use, in [0, 1]."""
        packs = self.packed(epoch)
        return sum(packs.tokens) / (len(packs.tokens) * self.token_budget)

    def _counts(self, epoch: int, copies: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Tokens of some samples, none more than the budget."""
        counts = self.tokens(epoch, copies, indices) if callable(self.tokens) else self.tokens[indices]
        counts = np.asarray(counts, dtype=np.int64)
        wrong = np.flatnonzero((counts > self.token_budget) | (counts < 1))
        if len(wrong):
            index, count = int(indices[wrong[0]]), int(counts[wrong[0]])
            name = f"sample {index}" if self.names is None else str(self.names[index])
            also = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise ValueError(
                f"{name} has {count} tokens{also}: expected 1 to {self.token_budget}, the token_budget; raise it, or "
                "have such images made smaller, by a range of tokens or sizes"
            )
        return counts

    def _permuted(self, epoch: int, copy: int) -> tuple[np.ndarray, np.ndarray, list[list[int]], list[int]]:
        """All samples in an order of their own, each as this copy, and packs of their places in it."""
        generator = torch.Generator().manual_seed(mix(self.seed, epoch, copy))
        indices = torch.randperm(self.size, generator=generator).numpy()
        copies = np.full(self.size, copy)
        counts = self._counts(epoch, copies, indices).tolist()
        packs = first_fit(counts, self.token_budget, self.open_packs)
        return indices, copies, packs, [sum(counts[place] for place in pack) for pack in packs]

    def _shuffled(self, epoch: int) -> Packs:
        parts: list[tuple[np.ndarray, np.ndarray, int]] = []
        copy = 0
        while len(parts) < self.packs:
            indices, copies, packs, filled = self._permuted(epoch, copy)
            wanted = self.packs - len(parts)
            fullest = sorted(sorted(range(len(packs)), key=lambda pack: -filled[pack])[:wanted])
            parts += [(indices[packs[pack]], copies[packs[pack]], filled[pack]) for pack in fullest]
            copy += 1
        ends = tuple(accumulate(len(indices) for indices, _, _ in parts))
        indices, copies = (np.concatenate([part[column] for part in parts]) for column in (0, 1))
        return Packs(indices, copies, ends, tuple(count for _, _, count in parts))

    def _in_order(self, epoch: int) -> Packs:
        copies, indices = np.zeros(self.size, dtype=np.int64), np.arange(self.size)
        counts = self._counts(epoch, copies, indices)
        ends, used = [], 0
        for place, count in enumerate(counts.tolist()):
            if used + count > self.token_budget:
                ends.append(place)
                used = 0
            used += count
        ends += [self.size] if self.size else []
        while len(ends) % self.world_size:
            starts = [0, *ends[:-1]]
            length, pack = max((end - start, -pack) for pack, (start, end) in enumerate(zip(starts, ends, strict=True)))
            # Where each pack holds one sample, a rank has none: another's stands in, as in any batch without a share.
            ends.append(self.size) if length < 2 else ends.insert(-pack, starts[-pack] + length // 2)
        sums = np.concatenate([[0], counts.cumsum()])
        tokens = tuple(int(sums[end] - sums[start]) for start, end in zip([0, *ends[:-1]], ends, strict=True))
        return Packs(indices, copies, tuple(ends), tokens)

    # Batches.

    def keys_of_batch(self, batch: int, epoch: int | None = None) -> Keys:
        """Keys of one batch, this rank's; of the current epoch if none is given."""
        epoch = self.epoch if epoch is None else epoch
        packs = self.packed(epoch)
        pack = self._start(batch, epoch) + self.rank
        share = slice(packs.ends[pack - 1] if pack else 0, packs.ends[pack])
        pairs = zip(packs.copies[share].tolist(), packs.indices[share].tolist(), strict=True)
        return Keys(((self._as(epoch), copy, index) for copy, index in pairs), batch)

    def batch_indices(self, batch: int, epoch: int | None = None) -> list[int]:
        """Sample indices of one batch, this rank's; of the current epoch if none is given."""
        return [index for _, _, index in self.keys_of_batch(batch, epoch)]

    def __iter__(self) -> Iterator[Keys]:  # type: ignore[override]  # whole batches of keys, not indices
        epoch = self.epoch
        for batch in range(self.first_batch(epoch), self.batches):
            yield self.keys_of_batch(batch, epoch)


def first_fit(counts: Sequence[int], budget: int, open_packs: int) -> list[list[int]]:
    """Packs of places of some counts, each put into the first pack with room for it; in the order of completion.

    Args:
        counts: Tokens, each at most the budget.
        budget: Tokens of a pack, at most.
        open_packs: How many packs are looked at; where none of them has room, the fullest is complete.
    """
    complete: list[list[int]] = []
    packs: list[list[int]] = []
    room: list[int] = []
    for place, count in enumerate(counts):
        pack = next((pack for pack, left in enumerate(room) if count <= left), len(packs))
        if pack == len(packs):
            if len(packs) == open_packs:
                pack = room.index(min(room))
                complete.append(packs.pop(pack))
                room.pop(pack)
                pack = len(packs)
            packs.append([])
            room.append(budget)
        packs[pack].append(place)
        room[pack] -= count
        if not room[pack]:
            complete.append(packs.pop(pack))
            room.pop(pack)
    return complete + packs
