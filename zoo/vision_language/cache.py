"""Keys and values of what a language model has read, so that each new token is computed alone."""

from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Cache(Protocol):
    """Memory of a language model: made by its ``create_cache``, filled by its calls.

    Attributes:
        batch: Number of rows.
        length: Tokens that it holds of each row, a number on the host.
        capacity: Most of them.
    """

    batch: int
    length: int
    capacity: int

    def rows(self, indices: Tensor) -> Self:
        """A cache of its own with these rows, each as often as it is named: int64 indices (R,)."""
        ...


def check_room(cache: Cache, batch: int, new: int) -> None:
    """Raises ValueError for another number of rows than the cache's, or more new tokens than it has room for."""
    if batch != cache.batch:
        raise ValueError(f"there are {batch} rows for a cache of {cache.batch}: see rows()")
    if cache.length + new > cache.capacity:
        raise ValueError(
            f"the cache holds {cache.length} of at most {cache.capacity} tokens, too many for {new} more: create it "
            "with a larger capacity"
        )


class KeyValueCache:
    """Keys and values of every layer, in memory that is taken once: at a layer's first keys, of their kind and device.

    What is given back are views of that memory: it is for generation and scoring, under ``torch.no_grad``.

    Args:
        depth: Number of layers.
        batch: Rows B.
        capacity: Most tokens of a row.

    Attributes:
        length: Tokens of each row so far, a number on the host.

    Raises:
        ValueError: For no layers, rows or tokens.
    """

    def __init__(self, depth: int, batch: int, capacity: int) -> None:
        for name, value in (("depth", depth), ("batch", batch), ("capacity", capacity)):
            if value < 1:
                raise ValueError(f"{name} is {value}: expected at least 1")
        self.batch, self.capacity, self.length = batch, capacity, 0
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * depth

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer with those of new tokens behind them: (B, heads, length + L, d).

        The length stays until :meth:`advance`, when all layers have taken the tokens.

        Args:
            layer: Index of the layer.
            keys, values: (B, heads, L, d).

        Raises:
            ValueError: For another number of rows, or more tokens than there is room for.
        """
        check_room(self, len(keys), keys.shape[2])
        held = self._layers[layer]
        if held is None:
            shape = (self.batch, keys.shape[1], self.capacity, keys.shape[3])
            held = self._layers[layer] = (keys.new_empty(shape), values.new_empty((*shape[:3], values.shape[3])))
        end = self.length + keys.shape[2]
        for memory, new in zip(held, (keys, values), strict=True):
            memory[:, :, self.length : end] = new
        return held[0][:, :, :end], held[1][:, :, :end]

    def advance(self, new: int) -> None:
        """Counts tokens that every layer has taken."""
        self.length += new

    def rows(self, indices: Tensor) -> Self:
        """A cache of its own with these rows, each as often as it is named, and the same capacity.

        Args:
            indices: (R,) int64, on the device of keys and values.
        """
        made = type(self)(len(self._layers), len(indices), self.capacity)
        made.length = self.length
        made._layers = [
            held and (self._chosen(held[0], indices), self._chosen(held[1], indices)) for held in self._layers
        ]
        return made

    def _chosen(self, memory: Tensor, indices: Tensor) -> Tensor:
        chosen = memory.new_empty((len(indices), *memory.shape[1:]))
        torch.index_select(memory[:, :, : self.length], 0, indices, out=chosen[:, :, : self.length])
        return chosen
