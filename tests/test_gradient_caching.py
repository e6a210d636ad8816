"""Gradient caching has the gradients of the whole batch: with dropout, in two processes, and but for BatchNorm."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from zoo.alignment.caching import in_micro_batches
from zoo.losses import contrastive_softmax_loss

N, SIZE = 12, 4


class Encoder(nn.Module):
    """A tower with dropout, which counts how many rows it is given."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 5))
        self.rows: list[int] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.rows.append(len(inputs))
        return F.normalize(self.layers(inputs), dim=1)

    def encode(self, inputs: Tensor) -> Tensor:
        return self(inputs)


class Pairs(nn.Module):
    """Two towers and the loss of all pairs of a batch; ``cached`` is None for the whole batch at once."""

    def __init__(self, cached: bool | None, dropout: float = 0.3) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.images, self.texts, self.scale = Encoder(dropout), Encoder(dropout), nn.Parameter(torch.tensor([6.0]))
        self.cached = cached
        self.double()

    def encode(self, encoder: Encoder, inputs: Tensor) -> Tensor:
        if self.cached is None:
            return encoder(inputs)
        if self.cached:
            return in_micro_batches(encoder, inputs, SIZE)
        return torch.cat([encoder(part) for part in inputs.split(SIZE)])

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        vectors = self.encode(self.images, images), self.encode(self.texts, texts)
        return contrastive_softmax_loss(*vectors, self.scale)


def batch(share: slice = slice(None)) -> list[Tensor]:
    torch.manual_seed(4)
    return [inputs[share] for inputs in torch.randn(2, N, 7, dtype=torch.float64)]


def results(pairs: nn.Module, inputs: list[Tensor], seed: int = 5) -> list[Tensor]:
    """The loss and all gradients, with a seed for dropout."""
    torch.manual_seed(seed)
    loss = pairs(*inputs)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in pairs.parameters())]


def agree(found: list[Tensor], expected: list[Tensor], within: float = 1e-10) -> bool:
    return all((a - b).abs().max() <= within for a, b in zip(found, expected, strict=True))


def process(rank: int, folder: Path) -> None:
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=2)
    share, found = slice(rank * N // 2, (rank + 1) * N // 2), []
    for cached, dropout in ((True, 0.3), (False, 0.3), (True, 0.0)):
        pairs = nn.parallel.DistributedDataParallel(Pairs(cached, dropout))
        found.append(results(pairs, batch(share), seed=rank))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[list[list[Tensor]]]:
    """What each of two processes has found: cached, kept, and cached without dropout."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.start_processes(process, (folder,), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_gradients_are_those_of_the_whole_batch_with_dropout():
    expected = results(Pairs(cached=False), batch())
    assert agree(results(Pairs(cached=True), batch()), expected)
    assert not agree(results(Pairs(cached=True), batch(), seed=6), expected, within=1e-3)  # dropout is at work


def test_gradients_are_those_of_the_whole_batch_at_once():
    assert agree(results(Pairs(True, dropout=0.0), batch()), results(Pairs(None, dropout=0.0), batch()))


def test_two_processes_have_the_gradients_of_their_batches_with_dropout(found):
    for cached, kept, _ in found:
        assert agree(cached, kept)
    assert not agree(found[0][0][:1], found[1][0][:1], within=1e-3)


def test_two_processes_have_the_gradients_of_one_batch(found):
    loss, *gradients = results(Pairs(None, dropout=0.0), batch())
    for _, _, (_, *theirs) in found:
        assert agree(theirs, gradients)
    assert agree([(found[0][2][0] + found[1][2][0]) / 2], [loss])


def test_autocast_is_the_same_in_both_passes():
    with torch.autocast("cpu", torch.bfloat16):
        expected = results(Pairs(cached=False).float(), [inputs.float() for inputs in batch()])
        found = results(Pairs(cached=True).float(), [inputs.float() for inputs in batch()])
    assert agree(found, expected, within=1e-5)


def test_activations_of_one_micro_batch_are_kept():
    encoder, inputs, kept = Encoder().double(), batch()[0], set()

    def keep(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        embeddings = in_micro_batches(encoder, inputs[:10], SIZE)
    assert kept <= {inputs.untyped_storage().data_ptr()}
    assert encoder.rows == [4, 4, 2]
    embeddings.sum().backward()
    assert encoder.rows == [4, 4, 2, 2, 4, 4]


def test_without_gradients_a_batch_is_encoded_once():
    encoder, inputs = Encoder().double().eval(), batch()[0]
    with torch.no_grad():
        assert torch.equal(in_micro_batches(encoder.encode, inputs, SIZE), encoder(inputs))
    assert encoder.rows == [4, 4, 4, 12]


def test_a_compiled_method_is_looked_into():
    encoder = Encoder().double()
    encoder.layers.insert(1, nn.BatchNorm1d(16))
    with pytest.raises(ValueError, match=r"layers\.1 is a BatchNorm1d in training mode"):
        in_micro_batches(torch.compile(encoder.encode, backend="eager"), batch()[0], SIZE)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(3), nn.SyncBatchNorm(3), BatchNormAct2d(3), nn.LazyBatchNorm2d()])
def test_statistics_of_micro_batches_are_refused(norm):
    network = nn.Sequential(nn.Identity(), norm)
    told = rf"^1 is a {type(norm).__name__} in training mode, .*: take a network without BatchNorm, lock it, or"
    with pytest.raises(ValueError, match=told):
        in_micro_batches(network, torch.rand(4, 3, 2, 2), 2)
    with pytest.raises(ValueError, match="^the encoder is a"):
        in_micro_batches(norm, torch.rand(4, 3, 2, 2), 2)


def test_a_locked_batch_norm_has_no_statistics_to_take():
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3).eval())
    images = torch.rand(4, 3, 2, 2)
    assert torch.allclose(in_micro_batches(network, images, 3), network(images))


def test_what_is_refused():
    with pytest.raises(ValueError, match="size is 0: expected micro batches of 1 row or more"):
        in_micro_batches(nn.Identity(), torch.rand(4, 3), 0)
    with pytest.raises(TypeError, match="encoder is a function: expected a module or a method of one"):
        in_micro_batches(lambda inputs: inputs, torch.rand(4, 3), 2)
