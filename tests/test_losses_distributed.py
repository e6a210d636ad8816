"""Losses in two processes are those of one big batch, with all gradients, under DistributedDataParallel."""

from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from zoo.losses import (
    F1WeightedCrossEntropy,
    SoftConfusionLoss,
    SoftFBetaLoss,
    sum_over_ranks,
)

C = 4
SHARES = (slice(0, 6), slice(6, 16))  # of unequal size: means over each would not be means over all
AVERAGES = ("macro", "micro", "samples")


def losses() -> Iterator[tuple[str, nn.Module]]:
    """By a name that says which batch they take."""
    for task in ("binary", "multiclass", "multilabel"):
        for average in AVERAGES if task != "binary" else ("macro",):
            for momentum in (None, 0.8) if average != "samples" else (None,):
                options = {"sync_dist": True, "momentum": momentum, "num_classes": C}
                yield task, SoftFBetaLoss(task, average, zero_division="skip", **options)
                yield task, F1WeightedCrossEntropy(task, average, **options)
        for name in ("mcc", "kappa", "iou"):
            yield task, SoftConfusionLoss(name, task, sync_dist=True, zero_division=0)


def batch(task: str, step: int) -> tuple[Tensor, Tensor]:
    """Inputs of a network and targets, some of which do not count; positives of the last class are all in one share."""
    torch.manual_seed(step)
    inputs = torch.randn(16, 5, dtype=torch.float64)
    if task == "multiclass":
        target = torch.randint(C, (16,))
        target[SHARES[0]] %= C - 1
        target[3] = target[8] = -100
    else:
        target = (torch.rand(16, C) < 0.4).long()
        target[SHARES[0], -1] = 0
        target[3], target[8, 1] = -100, -100
        if task == "binary":
            target = target[:, -1]
    return inputs, target


def train(loss: nn.Module, network: nn.Module, task: str, share: slice, forward: nn.Module) -> list[Tensor]:
    """Losses and gradients of three steps, and the running counts."""
    found = []
    for step in range(3):
        inputs, target = batch(task, step)
        network.zero_grad()
        logits = forward(inputs[share])
        value = loss(logits[:, -1] if task == "binary" else logits, target[share])
        value.backward()
        found += [value.detach(), *(parameter.grad.clone() for parameter in network.parameters())]
        with torch.no_grad():
            for parameter in network.parameters():
                parameter -= 0.5 * parameter.grad
    return [*found, *loss.buffers()]


def network() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, C)).double()


def process(rank: int, folder: Path) -> None:
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=len(SHARES))
    results = []
    for task, loss in losses():
        net = network()
        results.append(train(loss, net, task, SHARES[rank], nn.parallel.DistributedDataParallel(net)))
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_loss_and_the_gradients_of_one_big_batch(tmp_path):
    torch.multiprocessing.start_processes(process, (tmp_path,), nprocs=2, start_method="fork")
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for index, (task, loss) in enumerate(losses()):
        net = network()
        expected = train(loss, net, task, slice(None), net)
        for found in shares:
            for ours, whole in zip(found[index], expected, strict=True):
                assert torch.allclose(ours, whole, rtol=1e-6, atol=1e-9), loss


def alone(rank: int, folder: Path) -> None:
    """One process evaluates more batches than the other, which must not make it wait, and trains without the other."""
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=2)
    inputs, target = batch("multilabel", 0)
    values = []
    for loss in (SoftFBetaLoss("multilabel", sync_dist=True), F1WeightedCrossEntropy("multilabel", momentum=None)):
        for _ in range(1 + rank):
            values.append(loss.eval()(inputs[:, :C], target))
            values.append(loss.train().metric(inputs[:, :C], target))
    if rank:
        values.append(SoftFBetaLoss("multilabel", sync_dist=False)(inputs[:, :C], target))
    torch.save(values, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_evaluation_waits_for_nobody(tmp_path):
    torch.multiprocessing.start_processes(alone, (tmp_path,), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert second[:2] == second[2:4] == first[:2]
    assert second[4:6] == second[6:8] == first[2:4]
    assert second[8] == second[0]


def derivatives(rank: int, folder: Path) -> None:
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=2)
    x = torch.tensor([2.0, 3.0])[rank].requires_grad_()
    total = sum_over_ranks(x) ** 3
    (first,) = torch.autograd.grad(total, x, create_graph=True)
    (second,) = torch.autograd.grad(first, x)
    torch.save([total.detach(), first.detach(), second], folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_sums_over_processes_have_derivatives(tmp_path):
    """(x + y)³ is 125; a process's gradient is that of both processes' losses, 2 · 3 · 25, its derivative 4 · 6 · 5."""
    torch.multiprocessing.start_processes(derivatives, (tmp_path,), nprocs=2, start_method="fork")
    for rank in range(2):
        assert [value.item() for value in torch.load(tmp_path / f"{rank}.pt")] == [125.0, 150.0, 120.0]


def compiled(rank: int, folder: Path) -> None:
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=2)
    inputs, target = batch("multilabel", rank)
    found = []
    for cls in (SoftFBetaLoss, F1WeightedCrossEntropy):
        for program in (lambda loss: loss, partial(torch.compile, fullgraph=True, backend="aot_eager")):
            logits = inputs[:, :C].clone().requires_grad_()
            loss = program(cls("multilabel", momentum=0.9, sync_dist=True, num_classes=C))
            value = loss(logits, target)
            value.backward()
            found += [value.detach(), logits.grad]
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_losses_of_all_processes_compile_whole(tmp_path):
    torch.multiprocessing.start_processes(compiled, (tmp_path,), nprocs=2, start_method="fork")
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for eager, program in ((0, 2), (1, 3), (4, 6), (5, 7)):
            assert torch.allclose(found[eager], found[program])


def test_without_sums_two_processes_have_other_gradients():
    """What the first test would show if nothing were added up."""
    loss = SoftFBetaLoss("multilabel", zero_division="skip")
    nets = [network() for _ in range(3)]
    pairs = zip((slice(None), *SHARES), nets, strict=True)
    whole, *parts = (train(loss, net, "multilabel", share, net)[1] for share, net in pairs)
    assert not torch.allclose(whole, sum(parts) / 2, rtol=1e-2)


def test_a_sum_over_no_other_process_is_the_value():
    x = torch.ones(3)
    assert sum_over_ranks(x) is x
