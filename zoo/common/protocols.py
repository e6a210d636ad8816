"""What modules, callbacks, data and the command line may ask of each other.

Each is a protocol: whoever has its members is understood, without deriving from anything of ours. What is not here is
not asked for.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

# Of modules: what they take, and what the command line says of them.


@runtime_checkable
class HasInputShape(Protocol):
    """A module that states what images it takes, for ``zoo cost`` and ``zoo benchmark``.

    Attributes:
        input_shape: (C, H, W). It raises ValueError where nobody has said so.
    """

    @property
    def input_shape(self) -> tuple[int, int, int]: ...


@runtime_checkable
class ForeignWeights(Protocol):
    """A module whose parts other programs know by other names.

    Attributes:
        foreign_weights: What :func:`zoo.weights.load` has to know of them, a :class:`zoo.weights.Layout`.
    """

    foreign_weights: Any


@runtime_checkable
class HasPeers(Protocol):
    """A module that ``zoo benchmark --peers`` measures against others.

    Attributes:
        peers: :class:`zoo.common.peers.Peer` by name.
    """

    peers: Mapping[str, Any]


@runtime_checkable
class DrawsTargets(Protocol):
    """A module that learns from something else than labels (B,), for the batch that ``zoo benchmark`` measures with."""

    def random_targets(self, images: Tensor, generator: torch.Generator) -> Any:
        """What stands beside images (B, C, H, W) in a batch, of random values on the CPU."""


@runtime_checkable
class WordsMetrics(Protocol):
    """A module with words of its own for its metrics, for the lines after a fit."""

    def metric_text(self, metric: str, value: float) -> str:
        """``accuracy 99.31 %`` for "acc", the name without the stage; "" for what is not worth a line.

        :func:`zoo.common.log.in_words` makes one of a table of words.
        """


@runtime_checkable
class Watched(Protocol):
    """A module whose progress bar shows another metric than accuracy, average precision or loss.

    Attributes:
        watched: Names such as "val/acc_knn"; the first that is logged is shown.
    """

    watched: tuple[str, ...]


@runtime_checkable
class NamesPredictionWriter(Protocol):
    """A module whose predictions are no table of rows, for ``zoo predict``.

    Attributes:
        prediction_writer: Makes the callback, a :class:`zoo.callbacks.WritePredictions` of another kind.
    """

    prediction_writer: Callable[[], Any]
