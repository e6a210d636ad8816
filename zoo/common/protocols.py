"""What modules, callbacks, data and the command line may ask of each other.

Each is a protocol: whoever has its members is understood, without deriving from anything of ours. What is not here is
not asked for.
"""

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class ForeignWeights(Protocol):
    """A module whose parts other programs know by other names.

    Attributes:
        foreign_weights: What :func:`zoo.weights.load` has to know of them, a :class:`zoo.weights.Layout`.
    """

    foreign_weights: Any
