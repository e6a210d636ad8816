"""BudgetOrder: what packs hold and how full they are, the same for all ranks, and continued exactly."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from datamodules import BudgetOrder, SeededBatches
from datamodules.loading.budget import first_fit
from datamodules.loading.order import BatchOrder, mix, mixed
from zoo.common.protocols import KnownOrder


def counts(size: int, low: int = 4, high: int = 100, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high + 1, size)


def drawn(epoch, copies, indices):
    """Tokens by key: other ones in each epoch, and for each copy."""
    return 4 + mixed(epoch, copies, indices) % 97


def keys(order: BudgetOrder, epoch: int) -> list[list[tuple[int, int, int]]]:
    order.set_epoch(epoch)
    return [list(batch) for batch in order]


def test_first_fit_is_first_fit():
    # 5 3 | 7 1 | 6 2: the 2 fits the third pack alone
    assert first_fit([5, 7, 3, 6, 1, 2], 8, 9) == [[0, 2], [1, 4], [3, 5]]
    # with one open pack, whatever does not fit completes it
    assert first_fit([5, 7, 3, 6], 8, 1) == [[0], [1], [2], [3]]
    # with two, the fullest goes
    assert first_fit([5, 7, 6, 3], 8, 2) == [[1], [0, 3], [2]]


@pytest.mark.parametrize("tokens", [counts(2000), drawn], ids=["fixed", "drawn"])
def test_packs_keep_to_the_budget_and_use_at_least_98_percent_of_it(tokens):
    order = BudgetOrder(2000, 1024, tokens, seed=3, shuffle=True)
    for epoch in range(3):
        batches = keys(order, epoch)
        assert len(batches) == len(order)
        used = 0
        for batch in batches:
            _, copies, indices = map(np.array, zip(*batch, strict=True))
            total = (tokens(epoch, copies, indices) if callable(tokens) else tokens[indices]).sum()
            assert total <= 1024
            used += int(total)
        assert order.fill(epoch) == used / (len(order) * 1024)
        assert order.fill(epoch) > 0.98
        seen = Counter(index for batch in batches for _, _, index in batch)
        assert len(seen) > 0.98 * 2000
        assert max(seen.values()) <= 2


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_an_epoch_without_overlap_and_have_as_many_batches(world_size):
    orders = [BudgetOrder(500, 300, drawn, rank, world_size, shuffle=True) for rank in range(world_size)]
    whole = BudgetOrder(500, 300, drawn, shuffle=True)
    for epoch in (0, 4):
        of_ranks = [keys(order, epoch) for order in orders]
        assert {len(each) for each in of_ranks} == {len(orders[0])} == {len(whole) // world_size}
        interleaved = [batch for batches in zip(*of_ranks, strict=True) for batch in batches]
        assert interleaved == keys(whole, epoch)[: len(interleaved)]
        assert len({key for batch in interleaved for key in batch}) == sum(map(len, interleaved))


def test_the_order_is_a_function_of_seed_and_epoch():
    assert keys(BudgetOrder(300, 300, drawn, shuffle=True), 5) == keys(BudgetOrder(300, 300, drawn, shuffle=True), 5)
    order = BudgetOrder(300, 300, drawn, shuffle=True)
    assert keys(order, 5) == keys(BudgetOrder(300, 300, drawn, shuffle=True), 5)
    assert keys(order, 5) != keys(order, 6)
    assert keys(order, 5) != keys(BudgetOrder(300, 300, drawn, seed=1, shuffle=True), 5)
    order.set_epoch(2)
    assert order.batch_indices(1, 5) == [index for _, _, index in keys(order, 5)[1]]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_an_evaluation_has_each_sample_once_and_in_order(world_size):
    tokens = counts(83)
    orders = [BudgetOrder(83, 256, tokens, rank, world_size) for rank in range(world_size)]
    batches = [batch for group in zip(*map(list, orders), strict=True) for batch in group]
    assert [index for batch in batches for _, _, index in batch] == list(range(83))
    assert all(batch for batch in batches)
    assert all(tokens[[index for _, _, index in batch]].sum() <= 256 for batch in batches)


def test_in_order_all_epochs_are_the_first():
    order = BudgetOrder(50, 256, drawn)
    assert keys(order, 3) == keys(order, 0)
    assert {key[0] for batch in keys(order, 3) for key in batch} == {0}


def test_a_rank_without_a_share_has_an_empty_batch():
    orders = [BudgetOrder(3, 10, np.array([8, 8, 8]), rank, 2) for rank in range(2)]
    assert [[batch for _, _, batch in each] for order in orders for each in order] == [[0], [2], [1], []]
    assert [order.fill() for order in orders] == [0.6, 0.6]


def test_epochs_are_as_long_when_the_first_was_longer_or_shorter():
    def growing(epoch, copies, indices):
        return np.full(len(indices), 10 + epoch)

    longer = BudgetOrder(100, 40, growing, shuffle=True)  # 4 to a pack, later 3
    assert [len(keys(longer, epoch)) for epoch in (0, 3)] == [25, 25]
    assert len({index for batch in keys(longer, 3) for _, _, index in batch}) == 75

    def shrinking(epoch, copies, indices):
        return np.full(len(indices), 20 if epoch == 0 else 10)

    shorter = BudgetOrder(100, 40, shrinking, shuffle=True)
    first, second = keys(shorter, 0), keys(shorter, 1)
    assert len(first) == len(second) == 50
    copies = Counter(copy for batch in second for _, copy, _ in batch)
    assert copies == {0: 100, 1: 100}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_resumed_epoch_goes_on_with_the_same_batches(world_size):
    before = BudgetOrder(400, 300, drawn, 1, 2, shuffle=True)
    position = before.position(3, 7)
    whole = [
        batch
        for group in zip(keys(BudgetOrder(400, 300, drawn, 0, 2, shuffle=True), 3), keys(before, 3), strict=True)
        for batch in group
    ]
    orders = [BudgetOrder(400, 300, drawn, rank, world_size, shuffle=True) for rank in range(world_size)]
    for order in orders:
        order.resume(position)
        assert order.epoch == 3
        assert order.position(3, order.first_batch(3)) == position
    left = [batch for group in zip(*map(list, orders), strict=True) for batch in group]
    assert [list(batch) for batch in left] == whole[14 : 14 + len(left)]
    assert len(left) >= len(whole) - 14 - world_size
    assert [batch.batch for batch in orders[0]][-1] == len(orders[0]) - 1
    assert len(keys(orders[0], 4)) == len(orders[0])  # the next epoch is whole
    if world_size == 2:
        assert orders[1].position(3, 9) == before.position(3, 9)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"seed": 1}, "seed are 0 in it and 1 here"),
        ({"token_budget": 301}, "token_budget are 300 in it and 301 here"),
        ({"size": 399, "tokens": counts(399)}, "size are 400 in it and 399 here"),
        ({"tokens": counts(400, seed=1)}, "sizes of samples are others"),
    ],
)
def test_another_order_cannot_be_gone_on_with(options, expected):
    usual = {"size": 400, "token_budget": 300, "tokens": counts(400), "shuffle": True}
    position = BudgetOrder(**usual).position(2, 3)
    with pytest.raises(ValueError, match=f"middle of epoch 2, and {expected}"):
        BudgetOrder(**usual | options).resume(position)
    BudgetOrder(**usual | options).resume(BudgetOrder(**usual).position(2, 0))  # whole epochs are no matter


def test_the_two_orders_do_not_go_on_with_each_others_epochs():
    budget, batches = BudgetOrder(400, 300, counts(400), shuffle=True), BatchOrder(400, 8, shuffle=True)
    with pytest.raises(ValueError, match="middle of epoch 1, and token_budget are None in it and 300 here"):
        budget.resume(batches.position(1, 2))
    with pytest.raises(ValueError, match="middle of epoch 1, of batches by a token_budget"):
        batches.resume(budget.position(1, 2))
    budget.resume(batches.position(2, 0))
    batches.resume(budget.position(2, 0))
    assert len(list(batches)) == len(batches)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_sample_beyond_the_budget_is_named(shuffle):
    tokens = counts(20)
    tokens[7] = 300
    with pytest.raises(ValueError, match=r"cat/7.jpg has 300 tokens: expected 1 to 256, the token_budget"):
        BudgetOrder(20, 256, tokens, shuffle=shuffle, names=[f"cat/{i}.jpg" for i in range(20)])
    tokens[7:9] = 0
    with pytest.raises(ValueError, match=r"sample . has 0 tokens \(and 1 more\)"):
        BudgetOrder(20, 256, tokens, shuffle=shuffle)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="token_budget is 0"):
        BudgetOrder(3, 0, counts(3))
    with pytest.raises(ValueError, match="tokens are 2 for 3 samples"):
        BudgetOrder(3, 10, counts(2))


class Squares:
    """Samples that say which they are and what they were drawn to be."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index):
        return index, int(torch.randint(1000, ()))


@pytest.mark.parametrize("workers", [0, 2])
def test_any_data_loader_takes_it(workers):
    order = BudgetOrder(60, 200, counts(60), shuffle=True)
    assert isinstance(order, KnownOrder)
    loader = DataLoader(
        SeededBatches(Squares(), 0), batch_size=None, sampler=order, num_workers=workers, collate_fn=list
    )
    assert len(loader) == len(order)
    made = list(loader)
    assert [[index for index, _ in batch] for batch in made] == [order.batch_indices(i) for i in range(len(order))]
    again = SeededBatches(Squares(), 0)
    assert made == [again[batch] for batch in order]


def test_mixed_is_mix_of_each():
    values = np.array([0, 1, 5, 2**40, 2**62])
    assert mixed(3, -2, values, 9).tolist() == [mix(3, -2, int(value), 9) for value in values]
