"""A batch from all over a loader's data, which in a folder of classes is sorted by them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from zoo.common.protocols import KnownSamples


def evenly(size: int, count: int) -> list[int]:
    """The middles of ``count`` equal parts of ``range(size)``, or all of it if there are no more."""
    count = min(size, count)
    return [(2 * part + 1) * size // (2 * count) for part in range(count)]


def spread_batch(loader: Any, count: int) -> Any | None:
    """A batch of samples evenly spread over all that a loader's sampler goes through, the same at every call.

    It is made as the loader makes its own, and not larger; where that has workers, in one of its own, since data sets
    may open files that must not be open when others are forked. On every process it is the same.

    Args:
        loader: Of the zoo's data modules, or a ``DataLoader`` with a data set that has a length.
        count: How many samples, at most.

    Returns:
        The batch as the loader's ``collate_fn`` makes it, on the CPU; None where only the loader itself can tell what
        is in a batch: streams, samplers of whole batches, samples without batches.
    """
    dataset: Any = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return None
    generator = torch.Generator().manual_seed(0)  # a loader seeds its workers with it
    if isinstance(dataset, KnownSamples):  # they are seeded one by one, and may be made here
        order: Any = loader.sampler
        keys = dataset.keys_of(evenly(len(dataset), min(count, len(order.batch_indices(0)))))
        settings: Any = {"batch_size": None, "sampler": [keys], "collate_fn": loader.collate_fn, "generator": generator}
        return next(iter(DataLoader(loader.dataset, **settings)))
    batch_sampler = getattr(loader.batch_sampler, "_batch_sampler", loader.batch_sampler)  # Lightning's, in prediction
    if type(batch_sampler) is not BatchSampler:
        return None
    indices = _indices(batch_sampler.sampler, dataset)
    if not indices:
        return None
    chosen = [indices[place] for place in evenly(len(indices), min(count, batch_sampler.batch_size))]
    workers = min(1, loader.num_workers)
    made = DataLoader(
        dataset,
        batch_sampler=[chosen],
        collate_fn=loader.collate_fn,
        num_workers=workers,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if workers else None,
        timeout=loader.timeout if workers else 0,
        generator=generator,
    )
    return next(iter(made))


def _indices(sampler: Any, dataset: Any) -> Sequence[int] | None:
    """The indices a sampler goes through, in ascending order; None if it does not tell, or not by number."""
    whole = type(sampler) in (SequentialSampler, RandomSampler) or isinstance(sampler, DistributedSampler)
    source: Any = getattr(sampler, "data_source", getattr(sampler, "dataset", None))
    if whole and source is dataset:
        return range(len(source))
    if not hasattr(sampler, "__len__"):  # it may have no end
        return None
    found = list(sampler)
    return sorted(found) if all(type(index) is int for index in found) else None


def first_loader(loaders: Any) -> Any:
    """The first of a Trainer's loaders, which may be one, a list or a dict of them."""
    while isinstance(loaders, list | tuple | Mapping) and loaders:
        loaders = next(iter(loaders.values())) if isinstance(loaders, Mapping) else loaders[0]
    return loaders
