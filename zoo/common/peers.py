"""Peers: the same training step by others, which ``zoo benchmark --peers`` measures a technique against.

A peer gets the recipe's sizes, optimizer and precision, and the same random batch. It is built as its own library
builds it and as people run it; where that is something else than the zoo's, ``differs`` says so. A technique names its
peers in ``peers``, of :class:`zoo.common.protocols.HasPeers`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.common import batch as batches

TRAINING = ("step", "fit")
"""The benchmark's modes of a peer that is trained alone."""

Built = tuple[nn.Module, Callable[..., Tensor]]
"""A peer's network, and its loss: a function of network and batch."""


class Peer(NamedTuple):
    """Somebody else's implementation of a technique.

    Attributes:
        needs: The module that has to be installed.
        modes: Those of the benchmark it can be measured in.
        differs: What is not the same as in the zoo, in words.
        build: Makes what is measured of the zoo's model, which is on the meta device, and of the cell's axes:
            :data:`Built`. It raises ValueError for a model that has no such peer. For the mode "data" it makes a
            loader of the zoo's data module.
    """

    needs: str
    modes: tuple[str, ...]
    differs: str
    build: Callable[..., Any]


def timm_classifier(build: Callable[..., Built]) -> dict[str, Peer]:
    """A classifier's peer: timm's network of the same name."""
    differs = "timm's network, plain cross-entropy without mixup; NCHW unless asked"
    return {"timm": Peer("timm", (*TRAINING, "infer"), differs, build)}


def timm_network(name: str, model: Any, axes: dict[str, str], **sizes: Any) -> Built:
    """timm's network for a classifier's images and classes, trained as its users do.

    Args:
        name: By which timm makes it.
        model: The zoo's.
        axes: Of the cell; with "channels_last", weights and images lie so in memory.
        sizes: Of the network; None leaves it to timm.
    """
    import timm

    if name not in timm.list_models():
        raise ValueError(f"timm has no network {name!r}: name a recipe with one of its, or --model.variant")
    drop_path = model.hparams.get("drop_path")
    sizes |= {"num_classes": model.hparams.num_classes, "in_chans": model.input_shape[0], "drop_path_rate": drop_path}
    network = timm.create_model(name, **{key: value for key, value in sizes.items() if value is not None})
    last = axes.get("channels_last") == "true"
    if last:
        network.to(memory_format=torch.channels_last)

    def loss(network: nn.Module, batch: Any) -> Tensor:
        images, labels = batches.images_and_labels(batch)
        images = images.to(memory_format=torch.channels_last) if last else images
        return F.cross_entropy(network(images).float(), labels)

    return network, loss
