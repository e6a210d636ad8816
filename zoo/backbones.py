"""Backbones by timm's names, or as modules: what every technique's ``backbone`` argument takes."""

from difflib import get_close_matches
from typing import Any

import timm
from torch import nn


def create_backbone(backbone: str | nn.Module, **options: Any) -> Any:
    """A timm model without its head, or the module that was given. Options that are None are left to the backbone.

    Raises:
        ValueError: For a name that timm does not know, an option that the model cannot take, or options for a module.
    """
    options = {name: value for name, value in options.items() if value is not None}
    model: Any
    if isinstance(backbone, nn.Module):
        if options:
            raise ValueError(f"{', '.join(options)} cannot be set on a backbone that is given as a module: build it so")
        if not isinstance(getattr(backbone, "num_features", None), int):
            raise ValueError(f"{type(backbone).__name__} does not state how many features it gives: set num_features")
        model = backbone
        if hasattr(model, "reset_classifier"):
            model.reset_classifier(0)
        return model
    architecture, _, tag = backbone.partition(".")
    if not timm.is_model(architecture) or (tag and not timm.is_model_pretrained(backbone)):
        known = timm.list_pretrained(f"{architecture}.*") if timm.is_model(architecture) else timm.list_models()
        near = get_close_matches(backbone, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "a module of your own is passed as an object"
        raise ValueError(f"timm has no model {backbone!r}: {hint}")
    size, patch = options.get("img_size"), options.get("patch_size")
    try:
        model = timm.create_model(backbone, pretrained=False, num_classes=0, **options)
    except TypeError as error:
        raise ValueError(f"{backbone} cannot take one of {', '.join(sorted(options))}: {error}") from error
    except AssertionError as error:
        raise ValueError(
            f"{backbone} cannot be built with image_size {size} and patch_size {patch}: {error}"
        ) from error
    if hasattr(getattr(model, "patch_embed", None), "img_size"):  # PVT's and Hiera's do not say
        (height, width), (patch_h, patch_w) = model.patch_embed.img_size, model.patch_embed.patch_size
        if height % patch_h or width % patch_w:
            raise ValueError(f"image_size {height}x{width} is not divisible by the patch size {patch_h}x{patch_w}")
    return model


def name_of(backbone: str | nn.Module) -> str:
    """What a checkpoint remembers of the backbone: timm's name, or the module's class."""
    if isinstance(backbone, str):
        return backbone
    return f"{type(backbone).__module__}.{type(backbone).__qualname__}"
