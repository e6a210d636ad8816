"""The order of a data module's samples: batches of as many, or of as many as fit a budget of tokens."""

from typing import Any

import numpy as np

from datamodules._lightning import rank_zero_info
from datamodules.loading.budget import BudgetOrder
from datamodules.loading.labels import labels_of
from datamodules.loading.order import BatchOrder


def order_of(data: Any, samples: Any, split: str) -> BatchOrder | BudgetOrder:
    """The order of a split's samples on this process.

    Args:
        data: A :class:`datamodules.base.ImageDataModule`.
        samples: Of the split; with a ``token_budget``, they have a ``sizing``.
        split: "train" is shuffled.

    Raises:
        ValueError: If they do not fill a batch on each process; for a sample of more tokens than the budget.
    """
    trainer, training = data.trainer, split == "train"
    rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
    shuffle = training and not getattr(trainer, "overfit_batches", 0)
    order: BatchOrder | BudgetOrder
    if data.token_budget is not None:
        order = by_tokens = _by_tokens(samples, data.token_budget, rank, world_size, data.seed, shuffle)
        smallest, what = f"{data.token_budget} tokens", "token_budget"
        fitting = max(1, data.token_budget * by_tokens.packs // world_size)
    else:
        order = BatchOrder(
            len(samples),
            data.batch_size,
            rank,
            world_size,
            data.seed,
            shuffle=shuffle,
            drop_last=training and data.drop_last,
            repeats=data.repeats if training else 1,
            groups=data.groups(samples) if training else None,
            labels=labels_of(samples, type(data).__name__) if training and data.balance else None,
            balance=data.balance if training else 0.0,
        )
        smallest, what = str(data.batch_size), "batch_size"
        fitting = max(1, len(samples) // world_size)
    if len(order) == 0 or len(samples) < world_size:
        raise ValueError(
            f"{len(samples)} {split} samples do not fill one batch of {smallest} on {world_size} processes: "
            f"set {what} to {fitting} or less"
        )
    return order


def _by_tokens(samples: Any, token_budget: int, rank: int, world_size: int, seed: int, shuffle: bool) -> BudgetOrder:
    """The order by a budget of tokens. In training it says in a line how full batches are."""

    def tokens(epoch: int, copies: np.ndarray, indices: np.ndarray) -> np.ndarray:
        counts: np.ndarray = samples.sizing.tokens(samples, epoch, copies, indices)
        return counts

    names = getattr(samples, "names", None)
    order = BudgetOrder(len(samples), token_budget, tokens, rank, world_size, seed, shuffle, names)
    if shuffle and order.packs:
        packs = order.packed(0)
        rank_zero_info(
            f"data: {order.packs:,} batches of up to {token_budget:,} tokens, of which {order.fill(0):.1%} are used; "
            f"{len(packs.indices) / len(packs.ends):.1f} images each"
        )
    return order
