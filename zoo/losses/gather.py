"""Rows of all processes, as contrastive losses compare them, with gradients that flow back to where the rows are from.

Gathering is an operator of its own, so that a compiled program has it in one piece: it also compares the shapes of the
batches on the host, which nothing on the device waits for, because unequal ones would hang or mix up what is gathered.
"""

from collections.abc import Sequence
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

ADVICE = (
    "pairs: a contrastive loss gathers equal ones, set drop_last=True",
    "columns of vectors: the same network has to run in all",
    "columns of keys: give image ids, facts and claims to the images of all, or of none",
)


def gather_rows(vectors: Sequence[Tensor], keys: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], int]:
    """Gathers rows of the default group's processes, in the order of their ranks; without a group, gives them as is.

    A process gets, as the gradient of its vectors, the sum of what all processes' losses have there. A loss that is
    the mean over a process's own rows thus has, once DistributedDataParallel has averaged the parameters' gradients,
    the gradients of the mean over all rows.

    Args:
        vectors: Each (B, D), floating point, with a gradient.
        keys: Each (B, S), int64; S may be 0.

    Returns:
        Vectors, each (N, D), and keys, each (N, S), of all processes, and at which row those of this one begin.

    Raises:
        ValueError: In every process, if their batches differ in shape.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return list(vectors), list(keys), 0
    all_vectors, all_keys = _gather(torch.cat(list(vectors), 1), torch.cat(list(keys), 1))
    first = dist.get_rank() * vectors[0].shape[0]
    return _apart(all_vectors, vectors), _apart(all_keys, keys), first


def _apart(whole: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    return list(whole.split([part.shape[1] for part in parts], 1))


@torch.library.custom_op("zoo::gather_rows", mutates_args=())
def _gather(vectors: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    shape = torch.tensor([[vectors.shape[0], vectors.shape[1], keys.shape[1]]])
    shapes = _all_rows(shape, _host_group(dist.group.WORLD)).T.tolist()
    for found, advice in zip(shapes, ADVICE, strict=True):
        if len(set(found)) > 1:
            raise ValueError(f"processes have batches of {', '.join(map(str, sorted(set(found))))} {advice}")
    return _all_rows(vectors), _all_rows(keys)


@_gather.register_fake
def _(vectors: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    rows = vectors.shape[0] * dist.get_world_size()
    return vectors.new_empty(rows, vectors.shape[1]), keys.new_empty(rows, keys.shape[1])


@torch.library.custom_op("zoo::scatter_sums", mutates_args=())
def _scatter_sums(rows: Tensor) -> Tensor:
    """Sum over processes of what they have for all rows (N, D); of it the part (B, D) that is this process's."""
    parts = list(rows.contiguous().chunk(dist.get_world_size()))
    total = torch.empty_like(parts[0])
    dist.reduce_scatter(total, parts)
    return total


@_scatter_sums.register_fake
def _(rows: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0] // dist.get_world_size(), rows.shape[1])


_gather.register_autograd(lambda ctx, vectors, keys: (_scatter_sums(vectors), None))


def _all_rows(rows: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    size = dist.get_world_size()
    found = rows.new_empty(size * rows.shape[0], *rows.shape[1:])
    if found.numel():
        dist.all_gather(list(found.chunk(size)), rows.contiguous(), group)
    return found


@cache
def _host_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same processes whose collectives take tensors of the CPU; all of them make it at once."""
    if "cpu" in dist.get_backend_config(world):
        return world
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)  # which is not so in processes that are left out
    return group
