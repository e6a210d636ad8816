"""Backbones by timm's names, or as modules: what every technique's ``backbone`` argument takes."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import timm
from timm.layers import PatchEmbed, SpaceToDepth, to_2tuple
from torch import nn


class Pixels(nn.Flatten):
    """Images (B, C, H, W) as vectors (B, C * H * W): the backbone of a linear classifier, without parameters.

    Args:
        num_features: C * H * W.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def backbone_of(module: nn.Module) -> nn.Module | None:
    """A module's encoder, its ``backbone``; None if it has none."""
    found = getattr(module, "backbone", None)  # since Python 3.12 a protocol does not see submodules
    return found if isinstance(found, nn.Module) else None


def create_backbone(backbone: str | nn.Module, **options: Any) -> Any:
    """A timm model without its head, or the module that was given. Options that are None are left to the backbone.

    Of a network whose layers fit images of every size, ``img_size`` changes nothing.

    Raises:
        ValueError: For a name that timm does not know, a name with the tag of weights, an option that the model cannot
            take, options for a module, or a module that does not state its width.
    """
    options = {name: value for name, value in options.items() if value is not None}
    model: Any
    if isinstance(backbone, nn.Module):
        if options:
            raise ValueError(f"{', '.join(options)} cannot be set on a backbone that is given as a module: build it so")
        model = backbone
        feature_width(model)
        if hasattr(model, "reset_classifier"):
            model.reset_classifier(0)
        return model
    architecture, _, tag = backbone.partition(".")
    if not timm.is_model(architecture) or (tag and not timm.is_model_pretrained(backbone)):
        known = timm.list_pretrained(f"{architecture}.*") if timm.is_model(architecture) else timm.list_models()
        near = get_close_matches(backbone, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "a module of your own is passed as an object"
        raise ValueError(f"timm has no model {backbone!r}: {hint}")
    current = timm.models.get_deprecated_models().get(architecture) or backbone  # older names stand for weights, too
    if "." in current:
        raise ValueError(
            f"backbone {backbone!r} names weights as well, which are not loaded by it: set "
            f"backbone={current.partition('.')[0]!r} and weights={current!r}"
        )
    try:
        model = timm.create_model(backbone, pretrained=False, num_classes=0, **options)
    except TypeError as error:
        if "'img_size'" not in str(error):
            raise ValueError(f"{backbone} cannot take one of {', '.join(sorted(options))}: {error}") from error
        return create_backbone(backbone, **{name: value for name, value in options.items() if name != "img_size"})
    except Exception as error:  # a size that does not go into its parts ends in whatever these raise
        asked = {{"img_size": "image_size", "in_chans": "in_channels"}.get(k, k): v for k, v in options.items()}
        given = ", ".join(f"{name} {value}" for name, value in asked.items())
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{backbone} cannot be built with {given or 'its own sizes'}: {reason}") from error
    embed = getattr(model, "patch_embed", None)
    if isinstance(embed, PatchEmbed) and embed.img_size is not None:
        (height, width), (patch_h, patch_w) = embed.img_size, embed.patch_size
        if height % patch_h or width % patch_w:
            raise ValueError(f"image_size {height}x{width} is not divisible by the patch size {patch_h}x{patch_w}")
    model.timm_arguments = (architecture, options)
    return model


def name_of(backbone: str | nn.Module) -> str:
    """The name of a backbone for a checkpoint: timm's, or the module's class."""
    if isinstance(backbone, str):
        return backbone
    return f"{type(backbone).__module__}.{type(backbone).__qualname__}"


def feature_width(backbone: nn.Module) -> int:
    """D of the features (B, D) that a backbone without a classifier returns.

    Of timm's networks it is ``head_hidden_size``: several widen their last map, of ``num_features`` channels, behind
    the pooling. A module of one's own states ``num_features``.

    Raises:
        ValueError: If it states neither.
    """
    for name in ("head_hidden_size", "num_features"):
        if isinstance(width := getattr(backbone, name, None), int):
            return width
    raise ValueError(f"{type(backbone).__name__} does not state how many features it gives: set num_features")


def own_image_shape(backbone: nn.Module) -> tuple[int | None, tuple[int, int] | None]:
    """Channels and (height, width) of the images that a backbone was built for, as far as it says so; else None.

    Of networks for images of one size timm keeps the size in ``patch_embed``. For all others it names the size that
    they were trained with, ``pretrained_cfg["input_size"]``; and it names the layer that reads the image.
    """
    config = getattr(backbone, "pretrained_cfg", None) or {}
    embed = getattr(backbone, "patch_embed", None)
    size = getattr(embed, "img_size", None) or (config.get("input_size") or (None, None))[-2:]
    layer: Any = config.get("first_conv")
    layer = layer[0] if isinstance(layer, tuple | list) and layer else layer
    parts: dict[str, Any] = dict(backbone.named_modules())
    first = parts.get(layer or "patch_embed.proj")
    channels = first.in_channels if isinstance(first, nn.Conv2d) else None
    if channels is not None:
        for part in parts.values():
            if isinstance(part, SpaceToDepth):  # before the first convolution, as in TResNet
                channels //= part.bs**2
    return channels, None if None in size else to_2tuple(size)


def recompute_activations(backbone: nn.Module) -> None:
    """Has the backward pass recompute activations, as timm's ``set_grad_checkpointing`` does.

    Raises:
        ValueError: If the backbone cannot.
    """
    try:
        backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError) as error:
        raise ValueError(f"grad_checkpointing: {type(backbone).__name__} cannot recompute, leave it out") from error


def strict_size(backbone: Any) -> tuple[int, int] | None:
    """(height, width) of the only images that a backbone takes; None if it takes others, or does not tell."""
    embed = getattr(backbone, "patch_embed", None)
    return embed.img_size if isinstance(embed, PatchEmbed) and embed.strict_img_size else None


class TakesImages:
    """States the images of a module: ``class Net(TakesImages, LightningModule)``, with a ``backbone``.

    Its ``hparams`` have ``image_size``, a side or (height, width) in pixels, or None, and ``in_channels``.
    """

    backbone: Any
    hparams: Any

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of the images it takes.

        Raises:
            ValueError: If neither ``image_size`` nor the backbone says so.
        """
        channels, size = own_image_shape(self.backbone)
        size = size if self.hparams.image_size is None else to_2tuple(self.hparams.image_size)
        if size is None:
            raise ValueError(f"{type(self.backbone).__name__} does not say what images it takes: set image_size")
        return channels or self.hparams.in_channels, *size

    def check_images(self, shape: Sequence[int]) -> None:
        """Raises ValueError for the shape (C, H, W) of images that it does not take, as far as the backbone tells."""
        channels, size = own_image_shape(self.backbone)[0], strict_size(self.backbone)
        if (channels or shape[0]) != shape[0] or (size or tuple(shape[1:])) != tuple(shape[1:]):
            got, expected = ("x".join(map(str, each)) for each in (shape, self.input_shape))
            raise ValueError(f"images are {got}, but the model was built for {expected}")

    def settle_images(self) -> None:
        """Compares ``image_size`` and ``in_channels`` with the images that a given module was built for.

        The size that it says replaces ``image_size``, for whoever reads the checkpoint.

        Raises:
            ValueError: If they differ.
        """
        hp, (channels, _), size = self.hparams, own_image_shape(self.backbone), strict_size(self.backbone)
        if channels is not None and hp.in_channels not in (3, channels):
            raise ValueError(f"in_channels is {hp.in_channels}, but the backbone given is for {channels}: leave it out")
        if size is not None and hp.image_size is not None and to_2tuple(hp.image_size) != size:
            raise ValueError(f"image_size is {hp.image_size}, but the backbone given is for {size}: leave it out")
        hp["image_size"] = size or hp.image_size
