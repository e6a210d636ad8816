"""Image tokens of a vision tower: of any timm network, or of one that packs, and which image and place they belong to.

timm's networks give tokens (B, T, D), whose class token and registers come first, or maps (B, D, H, W) or (B, H, W, D).
Maps say their grid. Of tokens it is the patch embedding's own for these images, or else what the network states as its
``reduction``; never a square root, which would be right for square images alone.

The packing's prefix is the class token and registers; connectors leave them out.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from inspect import signature
from typing import Any, Protocol, runtime_checkable

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from zoo.common.backbones import own_image_shape
from zoo.common.packed.packing import Grid, Packing, Patches, patchify


@runtime_checkable
class PackedTower(Protocol):
    """A network over flat tokens of images of any size, such as :class:`zoo.packed_vit.PackedViT`."""

    num_features: int
    patch_size: tuple[int, int]
    prefix: int

    def forward_features(self, patches: Patches) -> tuple[Tensor, Packing]:
        """Tokens (T, num_features), and which image they belong to."""
        ...


@runtime_checkable
class TimmTower(Protocol):
    """A network with timm's way to ask for features before the pooling."""

    num_features: int

    def forward_features(self, images: Tensor) -> Any:
        """Tokens (B, T, num_features), or maps (B, num_features, H, W) or (B, H, W, num_features)."""
        ...


@runtime_checkable
class GivesIntermediates(Protocol):
    """A network with timm's way to ask for what blocks or stages give."""

    def forward_intermediates(self, x: Tensor, indices: list[int], **options: Any) -> list[Any]:
        """Maps (B, D, H, W), or pairs of them with the tokens that stand for no patch, (B, prefix, D)."""
        ...


@runtime_checkable
class StatesPrefix(Protocol):
    """A network that says how many of its first tokens stand for no patch."""

    num_prefix_tokens: int


@runtime_checkable
class StatesGrid(Protocol):
    """A patch embedding that says which grid images of a size become."""

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns for images of (height, width) pixels."""
        ...


def image_tokens(
    backbone: nn.Module, images: Tensor | Sequence[Tensor] | Patches, layer: int | None = None
) -> tuple[Tensor, Packing]:
    """Tokens (T, D) of images, and which image they belong to.

    Args:
        backbone: A timm network, or a :class:`PackedTower`.
        images: Normalised floats (B, C, H, W). A packed tower takes B images (C, H, W) of any sizes, or their patches,
            too.
        layer: Block whose tokens are read, before the final norm; of a network in stages, the stage whose map is. -1 is
            the last, -2 the one before it, which LLaVA reads (Liu et al. 2023, arXiv 2304.08485, section 4.1). What
            comes behind it takes no part, and gets no gradient. None: what the network gives, after its final norm.

    Raises:
        ValueError: For a network that gives neither tokens of a grid nor maps; for images that it does not take; for a
            ``layer`` that it has not, or of a network that does not give layers.
    """
    if isinstance(backbone, PackedTower):
        if layer is not None:
            raise ValueError(f"layer is {layer}: {type(backbone).__name__} gives its last tokens alone; leave it out")
        return backbone.forward_features(
            images if isinstance(images, Patches) else patchify(images, backbone.patch_size)
        )
    return as_tokens(backbone, image_features(backbone, images, layer), images)


def image_features(backbone: nn.Module, images: Any, layer: int | None = None) -> Any:
    """Features of images (B, C, H, W) as a timm network gives them, for :func:`as_tokens`.

    Apart from it, since numbers of images are on the host there, and would be compiled anew one by one.

    Args:
        backbone, images, layer: As of :func:`image_tokens`, which also says what is refused.
    """
    name = type(backbone).__name__
    if not isinstance(images, Tensor) or images.ndim != 4:
        got = f"{tuple(images.shape)}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise ValueError(
            f"images are {got}: {name} takes (B, C, H, W); images of several sizes need PackedViT as the backbone"
        )
    if layer is not None:
        return _intermediate(backbone, images, layer)
    if not isinstance(backbone, TimmTower):
        raise ValueError(
            f"{name} has no forward_features and num_features, so it gives no image tokens: choose another backbone"
        )
    return backbone.forward_features(images)


def as_tokens(backbone: Any, features: Any, images: Any) -> tuple[Tensor, Packing]:
    """Tokens (T, D) of :func:`image_features` of images, and which image they belong to."""
    if isinstance(features, tuple) and features and all(isinstance(each, Tensor) for each in features):
        return _of_map(*features)  # of a layer
    width = backbone.num_features
    if isinstance(features, Tensor) and features.ndim == 4:
        sides = [side for side in (1, 3) if features.shape[side] == width]
        if sides:
            # A map as wide as it has channels: the network says itself where they are.
            last = sides == [3] or (len(sides) == 2 and getattr(backbone, "output_fmt", "NCHW") == "NHWC")
            return _of_map(features.permute(0, 3, 1, 2) if last else features)
    if isinstance(features, Tensor) and features.ndim == 3 and features.shape[2] == width:
        size = (images.shape[2], images.shape[3])
        found = _grid(backbone, features.shape[1], size)
        if found is not None:
            grid, prefix = found
            return features.flatten(0, 1), Packing.of((grid,) * len(images), prefix)
    got = str(tuple(features.shape)) if isinstance(features, Tensor) else f"a {type(features).__name__}"
    instead = "; set layer to -1 to read its last map" if isinstance(backbone, GivesIntermediates) else ""
    raise ValueError(
        f"forward_features of {type(backbone).__name__} gives {got} of images {tuple(images.shape)}: expected tokens "
        f"(B, T, {width}) of a grid, without patch dropout, or maps (B, {width}, H, W){instead}, or choose another "
        "backbone"
    )


def _of_map(features: Tensor, prefix: Tensor | None = None) -> tuple[Tensor, Packing]:
    """Tokens row by row of maps (B, D, H, W), each image's behind its prefix (B, prefix, D)."""
    tokens = features.flatten(2).transpose(1, 2)
    grids = ((features.shape[2], features.shape[3]),) * len(features)
    if prefix is None:
        return tokens.flatten(0, 1), Packing.of(grids)
    return torch.cat([prefix, tokens], dim=1).flatten(0, 1), Packing.of(grids, prefix.shape[1])


def _grid(backbone: TimmTower, tokens: int, size: tuple[int, int]) -> tuple[Grid, int] | None:
    """Rows and columns of so many tokens of an image of (height, width), and how many come before; None if none fit."""
    grids: list[Grid] = []
    parts = dict(backbone.named_children()) if isinstance(backbone, nn.Module) else {}
    for part in (parts.get("patch_embed"), parts.get("embeds")):
        if isinstance(part, StatesGrid):
            rows, columns = part.dynamic_feat_size(size)
            grids.append((int(rows), int(columns)))
    stated = getattr(backbone, "feature_info", None)
    if isinstance(stated, list) and stated:
        (height, width), (tall, wide) = size, to_2tuple(stated[-1]["reduction"])
        grids += [(height // tall, width // wide), (-(-height // tall), -(-width // wide))]
    # Some with a class token, such as VOLO, do not state it.
    prefixes = (backbone.num_prefix_tokens,) if isinstance(backbone, StatesPrefix) else (0, 1)
    fitting = ((grid, prefix) for prefix in prefixes for grid in grids if prefix + grid[0] * grid[1] == tokens)
    return next(fitting, None)


def _intermediate(backbone: nn.Module, images: Tensor, layer: int) -> tuple[Tensor, ...]:
    """The map of a layer, and maybe the tokens before it."""
    name = type(backbone).__name__
    if not isinstance(backbone, GivesIntermediates):
        raise ValueError(f"layer is {layer}: {name} gives its last tokens alone; leave it out")
    options = {"norm": False, "stop_early": True, "output_fmt": "NCHW", "intermediates_only": True}
    prefix = backbone.num_prefix_tokens if isinstance(backbone, StatesPrefix) else 0
    if prefix and "return_prefix_tokens" in signature(backbone.forward_intermediates).parameters:
        options["return_prefix_tokens"] = True
    try:
        (found,) = backbone.forward_intermediates(images, indices=[layer], **options)
    except AssertionError as error:  # timm's, for layers out of range and for sizes
        shape = tuple(images.shape)
        raise ValueError(f"layer is {layer}: {name} does not give it of images {shape}: {error}") from error
    return (found,) if isinstance(found, Tensor) else tuple(found)


def dry_run(backbone: nn.Module, image_size: int | tuple[int, int], layer: int | None = None) -> tuple[Packing, int]:
    """The packing of one image's tokens, and their width, found by running a black image in evaluation mode.

    Args:
        backbone: See :func:`image_tokens`; on the meta device it costs nothing.
        image_size: Side in pixels, or (height, width).
        layer: See :func:`image_tokens`.

    Raises:
        ValueError: See :func:`image_tokens`.
    """
    tokens, packing = _dry_tokens(backbone, image_size, layer, torch.no_grad())
    return packing, tokens.shape[1]


def _dry_tokens(
    backbone: nn.Module, image_size: int | tuple[int, int], layer: int | None, gradients: AbstractContextManager[Any]
) -> tuple[Tensor, Packing]:
    first = next((each for each in backbone.parameters() if each.is_floating_point()), torch.empty(0))
    channels = own_image_shape(backbone)[0] or 3
    image = torch.zeros(1, channels, *to_2tuple(image_size), dtype=first.dtype, device=first.device)
    modes = {part: part.training for part in backbone.modules()}
    backbone.eval()  # batch norm takes no statistics of it, and nothing is dropped
    try:
        with gradients:
            return image_tokens(backbone, image, layer)
    finally:
        for part, mode in modes.items():
            part.training = mode


def unread_parameters(
    backbone: nn.Module, image_size: int | tuple[int, int], layer: int | None = None
) -> list[nn.Parameter]:
    """Parameters that image tokens do not depend on, those of a pooling or of blocks behind the layer that is read.

    Args:
        backbone, image_size, layer: As of :func:`dry_run`.
    """
    tokens = _dry_tokens(backbone, image_size, layer, torch.enable_grad())[0]
    learning = [each for each in backbone.parameters() if each.requires_grad]
    found = torch.autograd.grad(tokens.sum(), learning, allow_unused=True)
    return [each for each, gradient in zip(learning, found, strict=True) if gradient is None]


def tokens_of(backbone: nn.Module, image_size: int | tuple[int, int], layer: int | None = None) -> int:
    """Number of tokens of one image, class token and registers left out, by :func:`dry_run`."""
    return dry_run(backbone, image_size, layer)[0].counts[0]
