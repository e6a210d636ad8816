"""Contrastive losses in two processes are those of one big batch, with all gradients, under DistributedDataParallel."""

from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.losses import SigmoidContrastiveLoss, SoftmaxContrastiveLoss
from zoo.losses.gather import _all_rows, _host_group

N, D = 12, 5
LOSSES: dict[str, type[nn.Module]] = {"softmax": SoftmaxContrastiveLoss, "sigmoid": SigmoidContrastiveLoss}


class Pairs(nn.Module):
    """Two towers with a scale and a bias, and the loss of their vectors."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.images, self.texts = nn.Linear(7, D), nn.Linear(4, D)
        self.scale = nn.Parameter(torch.tensor([6.0]))
        if name == "sigmoid":
            self.bias = nn.Parameter(torch.tensor([-2.0]))
        self.loss = LOSSES[name](**options)
        self.double()

    def forward(self, images: Tensor, texts: Tensor, keys: list[tuple[Tensor, Tensor]]) -> Tensor:
        vectors = F.normalize(self.images(images), dim=1), F.normalize(self.texts(texts), dim=1)
        numbers = [self.scale, self.bias] if hasattr(self, "bias") else [self.scale]
        return self.loss(*vectors, *numbers, keys)


def batch(share: slice, keyed: bool) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Inputs of both towers and two alternatives of keys, which make pairs positive across the processes as well."""
    torch.manual_seed(4)
    images, texts = torch.randn(N, 7, dtype=torch.float64), torch.randn(N, 4, dtype=torch.float64)
    captions, facts = torch.randint(4, (N, 1)), torch.randint(2, (N, 2))
    claims = torch.where(torch.rand(N, 2) < 0.3, -1, facts)
    keys = [(captions, captions), (facts, claims)] if keyed else []
    return images[share], texts[share], [(known[share], said[share]) for known, said in keys]


def cases() -> Iterator[tuple[str, bool, int | None]]:
    for name in LOSSES:
        for keyed in (False, True):
            for chunk in (None, 4):
                yield name, keyed, chunk


def results(pairs: nn.Module, share: slice, keyed: bool) -> dict[str, Tensor]:
    loss = pairs(*batch(share, keyed))
    loss.backward()
    found = {name.removeprefix("module."): each.grad for name, each in pairs.named_parameters()}
    return {"loss": loss.detach()} | found


def share_of(rank: int, rows: int = N // 2) -> slice:
    return slice(rank * rows, (rank + 1) * rows)


def refusal(pairs: nn.Module, share: slice, keyed: bool = True) -> str:
    try:
        pairs(*batch(share, keyed))
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def process(rank: int, folder: Path) -> None:
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=2)
    found: dict[Any, Any] = {}
    for name, keyed, chunk in cases():
        pairs = nn.parallel.DistributedDataParallel(Pairs(name, chunk=chunk))
        found[name, keyed, chunk] = results(pairs, share_of(rank), keyed)
    for name in LOSSES:
        pairs = Pairs(name)
        found[name, "unequal"] = refusal(pairs, slice(0, 3 + rank))
        found[name, "none"] = refusal(pairs, slice(0, rank))
        found[name, "keys"] = refusal(pairs, slice(0, 3), keyed=bool(rank))
        found[name, "one each"] = results(nn.parallel.DistributedDataParallel(pairs), share_of(rank, 1), False)
        # Nobody waits for the other: each has another number of batches, of another size.
        for _ in range(1 + rank):
            found[name, "evaluated"] = pairs.eval()(*batch(slice(0, 4 + rank), True)).detach()
        if rank:
            found[name, "own"] = Pairs(name, sync_dist=False)(*batch(slice(0, 5), True)).detach()
    dist.destroy_process_group()
    # As with NCCL: the group takes no tensors of the CPU.
    store = f"file://{folder / 'other'}"
    dist.init_process_group("cuda:gloo", store, timedelta(seconds=60), rank=rank, world_size=2)
    found["sizes"] = _all_rows(torch.tensor([rank + 5]), _host_group(dist.group.WORLD)).tolist()
    dist.destroy_process_group()
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of two processes has found."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.start_processes(process, (folder,), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def compare(found: list[dict[str, Tensor]], whole: dict[str, Tensor]) -> None:
    """Gradients of both processes are those of one, and its loss the mean of theirs."""
    for name, expected in whole.items():
        mean = (found[0][name] + found[1][name]) / 2
        assert torch.allclose(mean, expected, rtol=1e-10, atol=1e-12), name
        if name != "loss":
            assert torch.equal(found[0][name], found[1][name])


@pytest.mark.parametrize(("name", "keyed", "chunk"), list(cases()))
def test_two_processes_have_the_loss_and_the_gradients_of_one_big_batch(found, name, keyed, chunk):
    whole = results(Pairs(name), slice(None), keyed)
    assert all(each.abs().max() > 1e-6 for each in whole.values() if each.numel() > D)
    compare([each[name, keyed, chunk] for each in found], whole)


@pytest.mark.parametrize("name", LOSSES)
def test_a_pair_in_each_process_is_enough(found, name):
    compare([each[name, "one each"] for each in found], results(Pairs(name), slice(0, 2), False))


@pytest.mark.parametrize("name", LOSSES)
def test_unequal_batches_are_refused_in_all_processes(found, name):
    for each in found:
        assert each[name, "unequal"].startswith("processes have batches of 3, 4 pairs")
        assert each[name, "none"].startswith("processes have batches of 0, 1 pairs")
        assert each[name, "keys"].endswith(
            "columns of keys: give image ids, facts and claims to the images of all, or of none"
        )
        assert "\n" not in each[name, "unequal"]


@pytest.mark.parametrize("name", LOSSES)
def test_evaluation_waits_for_nobody(found, name):
    for rank, each in enumerate(found):
        alone = Pairs(name).eval()(*batch(slice(0, 4 + rank), True))
        assert torch.equal(each[name, "evaluated"], alone)
    assert torch.equal(found[1][name, "own"], found[1][name, "evaluated"])


def test_sizes_are_compared_on_the_host_whatever_the_device_of_the_group(found):
    assert [each["sizes"] for each in found] == [[5, 6]] * 2


def test_without_the_others_two_processes_have_other_gradients():
    """What the first test would show if nothing were gathered."""
    whole, *parts = (results(Pairs("softmax"), share, True) for share in (slice(None), share_of(0), share_of(1)))
    mean = (parts[0]["images.weight"] + parts[1]["images.weight"]) / 2
    assert not torch.allclose(mean, whole["images.weight"], rtol=1e-2)


def compiled(rank: int, folder: Path) -> None:
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=2)
    found = []
    for name in LOSSES:
        for program in (lambda pairs: pairs, partial(torch.compile, fullgraph=True, backend="aot_eager")):
            found.append(results(program(Pairs(name)), share_of(rank), True))
    torch._dynamo.reset()
    program = torch.compile(Pairs("softmax"), fullgraph=True, backend="aot_eager")
    torch.save([found, refusal(program, slice(0, 3 + rank))], folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_losses_of_all_processes_compile_whole_and_refuse_unequal_batches(tmp_path):
    torch.multiprocessing.start_processes(compiled, (tmp_path,), nprocs=2, start_method="fork")
    for rank in range(2):
        found, refused = torch.load(tmp_path / f"{rank}.pt")
        assert refused.startswith("processes have batches of 3, 4 pairs")
        for eager, program in zip(found[::2], found[1::2], strict=True):
            for ours, other in zip(program.values(), eager.values(), strict=True):
                assert torch.allclose(ours, other, rtol=1e-10, atol=1e-12)
