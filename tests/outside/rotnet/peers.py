"""A rotation predictor as one writes it after reading the paper."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.common import batch as batches
from zoo.common.peers import TRAINING, Built, Peer


def _by_hand(model: Any, axes: dict[str, str]) -> Built:
    channels, width = model.hparams.in_channels, model.hparams.width
    convolutions = [nn.Conv2d(channels, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU()]
    convolutions += [nn.Conv2d(2 * width, 4 * width, 3, 2, 1), nn.ReLU()]
    network = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 4))

    def loss(network: nn.Module, batch: Any) -> Tensor:
        images = batches.images(batch)
        turns = torch.randint(4, (len(images),), device=images.device)
        turned = torch.stack([image.rot90(int(turn), (1, 2)) for image, turn in zip(images, turns, strict=True)])
        return F.cross_entropy(network(turned), turns)

    return network, loss


PEERS = {"by-hand": Peer("torch", TRAINING, "one rotation an image, drawn at random", _by_hand)}
