"""What is counted of latents: against figures worked out by hand and NumPy, over batches and processes."""

import math
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from zoo.gumbel_vae.metrics import ActiveLatents, ActiveUnits, CodeUsage

LATENTS, CATEGORIES = 3, 4
MAKE: dict[str, Callable[..., Metric]] = {
    "latents": lambda **options: ActiveLatents(LATENTS, CATEGORIES, threshold=0.1, **options),
    "codes": lambda **options: CodeUsage(LATENTS, CATEGORIES, **options),
    "shared": lambda **options: CodeUsage(LATENTS, CATEGORIES, shared=True, **options),
    "units": lambda **options: ActiveUnits(LATENTS, threshold=1.0, **options),
}


def data(name: str, count: int = 41) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    scale = torch.tensor([0.2, 1.0, 3.0])
    if name == "latents":
        return torch.randn(count, LATENTS, CATEGORIES, generator=generator) * scale[:, None]
    if name == "units":
        return torch.randn(count, LATENTS, generator=generator) * scale + 5
    return (torch.rand(count, LATENTS, generator=generator) ** 2 * CATEGORIES).long()


def everything(metric: Metric) -> list[Tensor]:
    found = [metric.compute()]
    if isinstance(metric, ActiveLatents):
        found.append(metric.information())
    elif isinstance(metric, CodeUsage):
        found += [metric.used(), metric.used(0.3)]
    elif isinstance(metric, ActiveUnits):
        found.append(metric.variance())
    return found


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True) for a, b in zip(one, other, strict=True))


# Worked answers.


def test_information_of_posteriors_worked_by_hand():
    """Four images. Latent 0: all posteriors alike. 1: a category each. 2: two and two. 3: half sure of one of two."""
    certain, half = -torch.inf, math.log(3)
    logits = torch.zeros(4, 4, 4)
    logits[:, 0] = torch.tensor([1.0, 0.0, 2.0, -1.0])
    logits[:, 1] = torch.full((4, 4), certain).fill_diagonal_(0)
    logits[:, 2] = torch.tensor([[0.0, certain, certain, certain]] * 2 + [[certain, 0.0, certain, certain]] * 2)
    logits[:, 3] = torch.tensor([[half, 0.0, certain, certain]] * 2 + [[0.0, half, certain, certain]] * 2)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    expected = torch.tensor([0.0, math.log(4), math.log(2), math.log(2) - entropy])
    metric = ActiveLatents(latents=4, categories=4)
    metric.update(logits)
    assert torch.allclose(metric.information(), expected, atol=1e-6)
    assert metric.compute() == 3
    for threshold, active in ((0.5, 2), (1.0, 1), (2.0, 0)):
        metric = ActiveLatents(4, 4, threshold)
        metric.update(logits)
        assert metric.compute() == active


def test_information_does_not_depend_on_what_is_added_to_logits_or_on_their_precision():
    metric, shifted = ActiveLatents(LATENTS, CATEGORIES), ActiveLatents(LATENTS, CATEGORIES)
    logits = data("latents").bfloat16()
    metric.update(logits)
    shifted.update(logits.float() + 100)
    assert torch.allclose(metric.information(), shifted.information(), atol=1e-5)
    assert metric.information().dtype == torch.float32


def test_perplexity_worked_by_hand():
    codes = torch.tensor([[0, 1], [0, 2], [0, 1], [0, 3]])  # one code, and frequencies 1/2, 1/4, 1/4
    metric = CodeUsage(latents=2, categories=4)
    metric.update(codes)
    assert metric.compute().item() == pytest.approx((1 + 2**1.5) / 2)
    assert metric.used() == 4 / 8
    assert metric.used(0.25) == 2 / 8  # 1 and 1/2 are more than that
    assert metric.used(0.99) == 1 / 8
    pooled = CodeUsage(latents=2, categories=4, shared=True)
    pooled.update(codes)
    assert pooled.compute().item() == pytest.approx(2 ** (0.5 * 1 + 0.25 * 2 + 2 * 0.125 * 3))
    assert pooled.used() == 1
    assert pooled.used(0.125) == 2 / 4


def test_all_codes_alike_are_a_perplexity_of_their_number_and_one_code_is_one():
    codes = torch.arange(64)[:, None].expand(64, 5) % 8
    for shared in (False, True):
        metric = CodeUsage(5, 8, shared)
        metric.update(codes.int())
        assert metric.compute().item() == pytest.approx(8)
        metric.reset()
        metric.update(torch.full((10, 5), 7))
        assert metric.compute().item() == pytest.approx(1)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_variance_is_numpys_beside_any_mean(offset):
    means = (offset + torch.tensor([0.02, 0.2, 0.0]) * torch.randn(20_000, 3)).float()
    expected = np.var(means.double().numpy(), axis=0)
    metric = ActiveUnits(3)
    for batch in means.split(7):  # some thousands of updates
        metric.update(batch)
    assert np.allclose(metric.variance().numpy(), expected, rtol=2e-3, atol=1e-6)
    assert metric.compute() == 1
    naive = (means**2).mean(0) - means.mean(0) ** 2  # what this test would not let pass
    assert (abs(naive[1] - expected[1]) > 1e-3 * expected[1]) == bool(offset)


# Batches and processes.


@pytest.mark.parametrize("name", MAKE)
def test_batches_make_no_difference(name):
    values = data(name)
    alone, batches, halves = (MAKE[name]() for _ in range(3))
    alone.update(values)
    for size, part in zip([1, 20, 0, 20], values.split([1, 20, 0, 20]), strict=True):
        assert len(part) == size
        batches.update(part)
    for part in values.chunk(2):
        of_batch = halves(part)  # forward: updates, and says what this batch alone is
        other = MAKE[name]()
        other.update(part)
        assert torch.allclose(of_batch, other.compute())
    assert same(everything(alone), everything(batches))
    assert same(everything(alone), everything(halves))


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.filterwarnings("ignore:.*before the ``update`` method")
def test_nothing_was_seen_or_all_is_forgotten(name):
    metric, fresh = MAKE[name](), MAKE[name]()
    assert all(value.isnan().all() for value in everything(metric))
    metric.update(data(name))
    first = everything(metric)
    assert not any(value.isnan().any() for value in first)
    metric.update(data(name, 7))
    metric.reset()
    assert all(value.isnan().all() for value in everything(metric))
    metric.update(data(name))
    fresh.update(data(name))
    assert same(first, everything(metric))
    assert same(first, everything(fresh))


def process(rank: int, folder: Path, shares: list[slice]) -> None:
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", store, timedelta(seconds=30), rank=rank, world_size=len(shares))
    results = {}
    for name, make in MAKE.items():
        metric = make()
        if len(part := data(name)[shares[rank]]):
            for batch in part.split(8):
                metric.update(batch)
        own = make(sync_on_compute=False)
        own.update(part)
        results[name] = everything(metric) * 2 + everything(metric), everything(own)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("shares", [(slice(0, 30), slice(30, 41)), (slice(0, 0), slice(0, 41))], ids=["both", "one"])
@pytest.mark.filterwarnings("ignore:.*before the ``update`` method")
def test_two_processes_say_what_one_says(tmp_path, shares):
    torch.multiprocessing.start_processes(process, (tmp_path, list(shares)), nprocs=2, start_method="fork")
    for rank, share in enumerate(shares):
        results = torch.load(tmp_path / f"{rank}.pt")
        for name, make in MAKE.items():
            alone, own = make(), make()
            alone.update(data(name))
            own.update(data(name)[share])
            assert same(results[name][0], everything(alone) * 3)
            assert same(results[name][1], everything(own))


# What is refused.


@pytest.mark.parametrize(
    "make",
    [
        lambda: ActiveLatents(0, 4),
        lambda: ActiveLatents(3, 1),
        lambda: ActiveLatents(3, 4, threshold=-0.1),
        lambda: CodeUsage(3, 1),
        lambda: ActiveUnits(0),
        lambda: ActiveUnits(3, threshold=-1.0),
    ],
)
def test_wrong_choices(make):
    with pytest.raises(ValueError, match="expected at least 1, at least 2, and no negative number$"):
        make()


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("latents", torch.zeros(5, 4, 3), r"logits are \(5, 4, 3\): the metric was made for \(images, 3, 4\)"),
        ("codes", torch.zeros(5), r"codes are \(5,\): the metric was made for \(images, 3\)"),
        ("units", torch.zeros(5, 1), r"mean are \(5, 1\): the metric was made for \(images, 3\)"),
    ],
)
def test_values_of_other_sizes_are_refused_and_not_broadcast(name, values, message):
    with pytest.raises(ValueError, match=message):
        MAKE[name]().update(values)


@pytest.mark.parametrize("code", [-1, CATEGORIES])
def test_a_code_that_does_not_exist_is_not_counted_as_another_latents(code):
    with pytest.raises(RuntimeError, match=f"index {code} is out of bounds"):
        MAKE["codes"]().update(torch.tensor([[0, code, 0]]))
