"""A categorical VAE as one writes it after reading the paper, which GumbelVAE is measured against."""

import math
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.common import batch as batches
from zoo.common.peers import TRAINING, Built, Peer


class HandWrittenVAE(nn.Module):
    """Perceptrons, ``F.gumbel_softmax`` and the closed-form KL, on images in [0, 1] as Bernoulli probabilities."""

    def __init__(self, pixels: int, hidden: tuple[int, ...], latents: int, categories: int, temperature: float) -> None:
        super().__init__()
        self.latents, self.categories, self.temperature = latents, categories, temperature
        self.encoder = self._layers(pixels, *hidden, latents * categories)
        self.decoder = self._layers(latents * categories, *reversed(hidden), pixels)

    def _layers(self, *sizes: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    def forward(self, images: Tensor) -> Tensor:
        """The negative ELBO in nats, mean over a batch (B, C, H, W)."""
        x = images.flatten(1)
        logits = self.encoder(2 * x - 1).view(-1, self.latents, self.categories)
        z = F.gumbel_softmax(logits, tau=self.temperature)
        distortion = F.binary_cross_entropy_with_logits(self.decoder(z.flatten(1)), x, reduction="none").sum(1)
        log_q = F.log_softmax(logits, dim=-1)
        kl = (log_q.exp() * (log_q + math.log(self.categories))).sum((1, 2))
        return (distortion + kl).mean()


def _hand_written_vae(model: Any, axes: dict[str, str]) -> Built:
    hp = model.hparams
    if hp.network != "mlp" or hp.likelihood != "bernoulli" or not isinstance(hp.latents, int):
        raise ValueError("the hand-written VAE is of perceptrons and Bernoulli pixels: leave it out of --peers here")
    network = HandWrittenVAE(math.prod(model.input_shape), tuple(hp.hidden), hp.latents, hp.categories, hp.temperature)
    return network, lambda network, batch: network(batches.images(batch))


PEERS = {
    "by-hand": Peer(
        "torch", TRAINING, "F.gumbel_softmax at a constant temperature, one sample an image", _hand_written_vae
    )
}
