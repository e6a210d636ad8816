"""An inspection: a command that looks into a trained network and draws what it sees, as a technique declares it.

It does so in its ``commands.py``, beside its studies (:mod:`zoo.common.study`): an :class:`Inspection`. ``zoo.cli``
loads network and images, draws, and writes the files.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


class Dots(NamedTuple):
    """Dots above 1, 2 and so on, from 0 upwards, a line through their means, and a level to compare them with."""

    columns: Sequence[Sequence[float]]  # the values above each; those that are not finite are left out
    x_label: str
    y_label: str  # with units
    dot: str  # what a dot is, for the legend
    level: tuple[float, str]  # with what it is


class Tiles(NamedTuple):
    """A grid of maps in one scale of colours."""

    values: "Tensor"  # (rows, columns, h, w)
    low: float  # the ends of the scale
    high: float
    label: str  # of the scale
    x_label: str
    y_label: str


class Findings(NamedTuple):
    """Figures and numbers of an inspection."""

    figures: "Mapping[str, Dots | Tiles | Tensor]"  # by the name of the file; a tensor is a picture (3, H, W) in [0, 1]
    absent: Mapping[str, str]  # figures that there are not, and why
    numbers: Mapping[str, Any]  # plain data


class Inspection(NamedTuple):
    """A command ``zoo NAME SOURCE [IMAGE ...]``."""

    name: str
    summary: str  # its line in zoo --help
    text: str  # what its own help says that it does
    network: str  # a name of timm's that it takes, for help and messages
    figures: Sequence[str]  # names of all figures that there may be
    run: Callable[..., Findings]  # of a module, and an iterable of images (1, C, H, W) as it takes them, or None


@runtime_checkable
class GivesAttention(Protocol):
    """A network that computes its attention weights itself, for ``zoo analyze-vit``; timm's are looked into."""

    @property
    def attends_to_all(self) -> bool:
        """True if each block computes one attention between all tokens."""

    def block_attentions(self, images: "Tensor") -> "list[Tensor]":
        """Weights (B, heads, N, N) of each block, of images (B, C, H, W); the patches are the last of the N tokens."""

    def position_table(self) -> "Tensor | None":
        """Position embeddings (rows, columns, D) of patches, None without."""
