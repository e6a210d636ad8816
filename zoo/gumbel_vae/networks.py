"""Encoders and decoders of the autoencoders: multilayer perceptrons, and residual convolutions.

    encoder(images (B, C, H, W)) -> (B, N, P): P numbers for each of N latents
    decoder(latents (B, N, D))   -> (B, M, H, W): M maps, whatever the likelihood calls its parameters

Images are in [0, 1] and are moved to [-1, 1] here. Latents lie in a vector, or in a grid (h, w) in raster order.

The convolutions are those of DALL-E's dVAE (Ramesh et al. 2021, arXiv 2102.12092, appendix A.1) at any size: bottleneck
residual blocks without norms, their outputs scaled down so that signals keep their size however deep the network; a 7x7
convolution first and 1x1 ones where latents begin and end; maximum pooling on the way down, nearest neighbours on the
way up. Deviations: the paper does not say what is inside a block or what the scale is. Here a block is 1x1, 3x3, 3x3,
1x1 at a quarter of the width, and the scale is one over the number of blocks. Latents in a vector, which the paper does
not have, take a linear layer of all positions.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

Network = Literal["mlp", "conv"]
Activation = Literal["relu", "tanh"]
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}
VECTOR_SIDE = 7  # images are halved to at most this before a vector of latents is read off


def create_networks(
    network: Network,
    image_shape: tuple[int, int, int],
    latents: int | tuple[int, int],
    encoder_outputs: int,
    decoder_inputs: int,
    maps: int,
    hidden: Sequence[int],
    activation: Activation,
    dropout: float,
    width: int,
    blocks: int,
) -> tuple[nn.Module, nn.Module]:
    """An encoder and its decoder.

    Args:
        network: "mlp", to which hidden, activation and dropout belong, or "conv", to which width and blocks do.
        image_shape: (C, H, W).
        latents: How many, or their grid (h, w).
        encoder_outputs, decoder_inputs: Numbers for each latent, P and D.
        maps: M, of the decoder.
        hidden: Widths of the encoder's hidden layers; the decoder has them in reverse.
        activation: After each of them.
        dropout: After each activation.
        width: Channels at the images' resolution, doubled with each halving.
        blocks: Residual blocks at each resolution.

    Raises:
        ValueError: For an unknown choice, sizes below 1, or a grid that halving does not lead to.
    """
    count = latents if isinstance(latents, int) else math.prod(latents)
    if min(count, *image_shape) < 1:
        raise ValueError(f"latents is {latents}, the images are {image_shape}: expected at least 1 of everything")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}: expected a share in [0, 1)")
    if network == "mlp":
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}: expected one of {', '.join(ACTIVATIONS)}")
        if min(hidden, default=1) < 1:
            raise ValueError(f"hidden is {list(hidden)}: expected widths of at least 1")
        layers = ACTIVATIONS[activation], dropout
        encoder = MLPEncoder(image_shape, hidden, count, encoder_outputs, *layers)
        return encoder, MLPDecoder(count * decoder_inputs, hidden[::-1], (maps, *image_shape[1:]), *layers)
    if network == "conv":
        if min(width, blocks) < 1:
            raise ValueError(f"width is {width}, blocks {blocks}: expected at least 1 of both")
        sizes = halvings(image_shape[1:], None if isinstance(latents, int) else latents)
        return (
            ConvEncoder(image_shape[0], sizes, latents, encoder_outputs, width, blocks),
            ConvDecoder(sizes, latents, decoder_inputs, maps, width, blocks),
        )
    raise ValueError(f"unknown network {network!r}: expected one of {', '.join(get_args(Network))}")


# Perceptrons.


def perceptron(sizes: Sequence[int], activation: type[nn.Module], dropout: float) -> nn.Sequential:
    """Linear layers from each size to the next, with an activation and dropout between them, none at the end."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()] + ([nn.Dropout(dropout)] if dropout else [])
    layers = layers[: -2 if dropout else -1]
    for layer in layers:
        if isinstance(layer, nn.Linear):  # Glorot and Bengio 2010, as Maddison et al. 2017 start
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class MLPEncoder(nn.Module):
    """(B, C, H, W) -> (B, N, P)."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        hidden: Sequence[int],
        latents: int,
        outputs: int,
        activation: type[nn.Module],
        dropout: float,
    ) -> None:
        super().__init__()
        self.shape = latents, outputs
        self.layers = perceptron([math.prod(image_shape), *hidden, latents * outputs], activation, dropout)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(2 * images.flatten(1) - 1).unflatten(1, self.shape)


class MLPDecoder(nn.Module):
    """(B, N, D) -> (B, M, H, W). ``widest`` is how many values its largest layer has for one of B."""

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        output_shape: tuple[int, int, int],
        activation: type[nn.Module],
        dropout: float,
    ) -> None:
        super().__init__()
        self.shape = output_shape
        self.widest = max(inputs, *hidden, math.prod(output_shape))
        self.layers = perceptron([inputs, *hidden, math.prod(output_shape)], activation, dropout)

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(latents.flatten(1)).unflatten(1, self.shape)


# Convolutions.


def halvings(size: Sequence[int], grid: Sequence[int] | None) -> list[tuple[int, int]]:
    """The sizes (h, w) of the maps, from the images' to the latents', each half of the one before, rounded up.

    Args:
        size: (H, W) of the images.
        grid: Where it ends. None: at most 7 pixels a side.

    Raises:
        ValueError: If halving does not lead to the grid; with those that it leads to.
    """
    sizes = [(size[0], size[1])]
    while (max(sizes[-1]) > VECTOR_SIDE) if grid is None else (sizes[-1] > (1, 1) and sizes[-1] != tuple(grid)):
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    if grid is not None and sizes[-1] != tuple(grid):
        reached = ", ".join(f"{height}x{width}" for height, width in sizes)
        raise ValueError(
            f"a grid of {grid[0]}x{grid[1]} latents is not reached by halving {size[0]}x{size[1]} pixels: {reached}"
        )
    return sizes


class ResidualBlock(nn.Module):
    """x + scale * bottleneck(x); where the number of channels changes, x passes a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, scale: float) -> None:
        super().__init__()
        inner, self.scale = max(outputs // 4, 1), scale
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.layers = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(inputs, inner, 1),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(inner, outputs, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.scale * self.layers(x)


def stage(inputs: int, outputs: int, blocks: int, scale: float) -> nn.Sequential:
    """The blocks of one resolution, the first of which changes the number of channels."""
    return nn.Sequential(*(ResidualBlock(inputs if i == 0 else outputs, outputs, scale) for i in range(blocks)))


class ConvEncoder(nn.Module):
    """(B, C, H, W) -> (B, N, P)."""

    def __init__(
        self,
        in_channels: int,
        sizes: Sequence[tuple[int, int]],
        latents: int | tuple[int, int],
        outputs: int,
        width: int,
        blocks: int,
    ) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(len(sizes))]
        self.vector = isinstance(latents, int)
        self.stem = nn.Conv2d(in_channels, width, 7, padding=3)
        self.stages = nn.ModuleList(
            stage(before, after, blocks, 1 / (blocks * len(sizes))) for before, after in pairwise([width, *widths])
        )
        if isinstance(latents, int):
            self.shape = latents, outputs
            self.head: nn.Module = nn.Linear(widths[-1] * math.prod(sizes[-1]), latents * outputs)
        else:
            self.head = nn.Conv2d(widths[-1], outputs, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(2 * images - 1)
        for number, blocks in enumerate(self.stages):
            x = blocks(F.max_pool2d(x, 2, ceil_mode=True) if number else x)
        x = F.relu(x)
        if self.vector:
            return self.head(x.flatten(1)).unflatten(1, self.shape)
        return self.head(x).flatten(2).transpose(1, 2)


class ConvDecoder(nn.Module):
    """(B, N, D) -> (B, M, H, W). ``widest`` is as of :class:`MLPDecoder`."""

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        latents: int | tuple[int, int],
        inputs: int,
        maps: int,
        width: int,
        blocks: int,
    ) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(len(sizes))]
        self.sizes, self.vector = list(reversed(sizes)), isinstance(latents, int)
        first = widths[-1] // 2 if len(widths) > 1 else width
        channels = [first, *reversed(widths)]
        self.widest = max(
            # What comes into a stage is enlarged first, and has the channels of the stage before.
            max(before, after) * math.prod(size)
            for (before, after), size in zip(pairwise(channels), self.sizes, strict=True)
        )
        if isinstance(latents, int):
            self.stem: nn.Module = nn.Linear(latents * inputs, first * math.prod(sizes[-1]))
        else:
            self.stem = nn.Conv2d(inputs, first, 1)
        self.stages = nn.ModuleList(
            stage(before, after, blocks, 1 / (blocks * len(sizes)))
            for before, after in pairwise([first, *reversed(widths)])
        )
        self.head = nn.Conv2d(width, maps, 1)

    def forward(self, latents: Tensor) -> Tensor:
        smallest = self.sizes[0]
        if self.vector:
            x = self.stem(latents.flatten(1)).unflatten(1, (-1, *smallest))
        else:
            x = self.stem(latents.transpose(1, 2).unflatten(2, smallest))
        for number, (size, blocks) in enumerate(zip(self.sizes, self.stages, strict=True)):
            x = blocks(F.interpolate(x, size=size, mode="nearest") if number else x)
        return self.head(F.relu(x))
