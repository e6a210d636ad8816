"""Time of a training step of GumbelVAE, side by side with the same network and `F.gumbel_softmax` by hand.

    python benchmarks/gumbel_vae_speed.py                                             # 28x28 pixels, on the CPU
    python benchmarks/gumbel_vae_speed.py --device cuda --batch-size 1024 --steps 50

Every row takes full steps on the same random binary images: encoder, sample, decoder, binary cross-entropy and KL,
backward, fused Adam. The network is 784-512-256-(32x10)-256-512-784, as in the notebook of Jang et al. Before anything
is timed, ours gets the other's weights, and both have to give the same loss for the same noise.
"""

import argparse
import math
from functools import partial

import torch
import torch.nn.functional as F
from side_by_side import Row, Training, add_arguments, measure, report, where
from torch import Tensor, nn

from zoo import GumbelVAE
from zoo.common import optim

LATENTS, CATEGORIES, HIDDEN, TEMPERATURE = 32, 10, (512, 256), 0.7


class ByHand(nn.Module):
    """What one writes after reading the paper."""

    def __init__(self) -> None:
        super().__init__()
        wide, narrow = HIDDEN
        codes = LATENTS * CATEGORIES
        self.encoder = nn.Sequential(
            nn.Linear(784, wide), nn.ReLU(), nn.Linear(wide, narrow), nn.ReLU(), nn.Linear(narrow, codes)
        )
        self.decoder = nn.Sequential(
            nn.Linear(codes, narrow), nn.ReLU(), nn.Linear(narrow, wide), nn.ReLU(), nn.Linear(wide, 784)
        )

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        logits = self.encoder(2 * x - 1).view(-1, LATENTS, CATEGORIES)
        z = F.gumbel_softmax(logits, tau=TEMPERATURE)
        distortion = F.binary_cross_entropy_with_logits(self.decoder(z.flatten(1)), x, reduction="none").sum(1)
        log_q = F.log_softmax(logits, dim=-1)
        kl = (log_q.exp() * (log_q + math.log(CATEGORIES))).sum((1, 2))
        return (distortion + kl).mean()


def ours() -> GumbelVAE:
    schedule = {"temperature": TEMPERATURE, "temperature_schedule": "constant"}
    return GumbelVAE(LATENTS, CATEGORIES, 28, hidden=HIDDEN, **schedule)


def train_by_hand(device: torch.device, compiled: bool = False) -> Training:
    model = ByHand().to(device)
    if compiled:
        model.compile()
    return Training(model, model, torch.optim.Adam(model.parameters(), lr=1e-3, fused=True))


def train_ours(device: torch.device, compiled: bool = False) -> Training:
    model = ours().to(device)
    if compiled:
        model.compile()

    def loss(images: Tensor) -> Tensor:
        return model.objective(images, *model.knobs().values()).loss.mean()

    return Training(model, loss, optim.create_optimizer(model, "adam", 1e-3, 0.0))


def difference(images: Tensor) -> float:
    """Between the two losses, for the same weights and noise, relative."""
    theirs, own = ByHand().to(images.device), ours().to(images.device)
    own.backbone.layers.load_state_dict(theirs.encoder.state_dict())
    own.decoder.layers.load_state_dict(theirs.decoder.state_dict())
    torch.manual_seed(0)
    expected = theirs(images).item()
    torch.manual_seed(0)
    return abs(own(images).loss.mean().item() - expected) / expected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.set_defaults(batch_size=128, steps=100)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    images = (torch.rand(arguments.batch_size, 1, 28, 28, device=arguments.device) > 0.7).float()
    rows = [
        Row("F.gumbel_softmax by hand", train_by_hand),
        Row("ours", train_ours),
        Row("by hand, compiled", partial(train_by_hand, compiled=True)),
        Row("ours, compiled", partial(train_ours, compiled=True)),
    ]
    print(where(arguments.device, "torch"))
    print(
        f"\nbatch {arguments.batch_size}; with the same weights and noise, losses differ by {difference(images):.0e}\n"
    )
    measure(rows, images, arguments.rounds, arguments.steps)
    report(rows, arguments.batch_size, arguments.device == "cuda")


if __name__ == "__main__":
    main()
