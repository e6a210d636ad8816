"""Which values a module gets from a source, in which shapes, or why it gets none."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import adapt_input_conv
from torch import Tensor, nn

from zoo import layouts
from zoo.weights.names import CLASSES, HEADS, brief, is_encoder, is_needed, numbered, place, unwrapped


def fit(module: nn.Module, source: str, state: Mapping[str, Tensor]) -> tuple[dict[str, tuple[str, Tensor]], list[str]]:
    """For names in the module: the name in the source, and the value in the module's shape. And which were resized."""
    own = module.state_dict()
    found: dict[str, str] = {}
    for key in state:
        target = place(key, own)
        if target in found:
            raise ValueError(f"{source} has two tensors for {target}: {found[target]} and {key}")
        if target is not None:
            found[target] = key

    missing = [name for name in own if is_needed(name, own) and name not in found]
    if missing:
        needed = sum(is_needed(name, own) for name in own)
        raise ValueError(
            f"{source} does not fit {type(module).__name__}: {len(missing)} of the encoder's {needed} tensors are "
            f"missing, {brief(missing)}; it holds {brief(list(state))}"
        )
    differs = layouts.other_detector({unwrapped(key): value for key, value in state.items()}, own)
    if differs:
        raise ValueError(f"{source} is of another detector than this: {differs}, or start from the backbone alone")
    used = set(found.values())
    gone = getattr(module, "pruned", ())
    ours = numbered(name.removeprefix("backbone.") for name in own)
    lists = {part.rpartition(".")[0] for part in ours}
    larger = [
        key
        for key in state
        if key not in used
        and unwrapped(key) not in gone
        and any(part not in ours and part.rpartition(".")[0] in lists for part in numbered([unwrapped(key)]))
    ]
    if larger:
        raise ValueError(
            f"{source} is of a larger network than {type(module).__name__}: {brief(larger)} are not part of this one; "
            "build it alike"
        )
    values: dict[str, tuple[str, Tensor]] = {}
    resized = []
    for name, key in found.items():
        value = state[key]
        is_positions = name.endswith("pos_embed") and value.shape[-1] == own[name].shape[-1]
        if value.shape != own[name].shape and (is_encoder(name, own) or is_positions):
            value = _resize(module, source, name, value, state)
            resized.append(name)
        values[name] = key, value
    # A part other than the encoder goes whole or not at all: half a head is worse than none.
    parts: dict[str, list[str]] = {}
    for name in own:
        if not is_encoder(name, own):
            parts.setdefault(CLASSES if name.startswith(f"{CLASSES}.") else name.split(".")[0], []).append(name)
    optional = {CLASSES} if CLASSES in parts else set(HEADS)
    for part, names in parts.items():
        wrong = [name for name in names if name not in values or values[name][1].shape != own[name].shape]
        if wrong and part not in optional and any(name in values for name in names):
            there = f"{tuple(values[wrong[0]][1].shape)} there" if wrong[0] in values else "missing there"
            raise ValueError(
                f"{source} has another {part} than {type(module).__name__}: {wrong[0]} is {there} and "
                f"{tuple(own[wrong[0]].shape)} here; build it alike, or start from the encoder alone"
            )
        if wrong:
            for name in names:
                values.pop(name, None)
    return values, resized


def _resize(module: nn.Module, source: str, name: str, value: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """A tensor of the encoder in the shape that the module has it in.

    Raises:
        ValueError: If only a network of another size could have it.
    """
    parent, _, leaf = name.rpartition(".")
    owner, target = module.get_submodule(parent), module.state_dict()[name]
    if leaf == "pos_embed" and value.ndim == target.ndim == 3 and value.shape[-1] == target.shape[-1]:
        resized = _resize_positions(owner, value, target, state)
        if resized is not None:
            return resized
    elif value.ndim == target.ndim == 4 and len(value) == len(target):  # the kernels of a patch embedding, or of a stem
        is_patches = ".patch_embed." in f".{name}"
        channels = _change_channels(value.float(), target.shape[1])
        if channels is not None and (is_patches or value.shape[2:] == target.shape[2:]):
            return resample_patch_embed(channels, list(target.shape[2:])) if is_patches else channels
    raise ValueError(
        f"{source} does not fit {type(module).__name__}: {name} is {tuple(value.shape)} there and "
        f"{tuple(target.shape)} here; image size, patch size and channels can be adapted, the network's size cannot"
    )


def _resize_positions(owner: Any, value: Tensor, target: Tensor, state: Mapping[str, Tensor]) -> Tensor | None:
    """Position embeddings (1, N, D) for another grid; those of class token and registers stay as they are."""
    grid = getattr(getattr(owner, "patch_embed", owner), "grid_size", None)
    if grid is None:
        return None
    prefix = target.shape[1] - math.prod(grid)
    tokens = [t.shape[1] for key, t in state.items() if key.rpartition(".")[2] in ("cls_token", "reg_token")]
    # Some networks add no positions to these tokens. Which of them this one is shows in what leaves a square.
    for had in dict.fromkeys((sum(tokens), min(1, len(tokens)), 0)):
        if math.isqrt(value.shape[1] - had) ** 2 != value.shape[1] - had:
            continue
        if had > prefix and getattr(owner, "cls_token", None) is not None:
            return None  # the class token itself would have to change
        patches = resample_abs_pos_embed(value[:, had:].float(), list(grid), num_prefix_tokens=0)
        kept = value[:, : min(had, prefix)].float()
        added = torch.zeros(1, prefix - kept.shape[1], value.shape[2])
        return torch.cat([kept, added, patches], dim=1)
    return None


def _change_channels(kernels: Tensor, channels: int) -> Tensor | None:
    """Kernels (D, C, h, w) for another number of channels, such that an image repeated over them looks the same."""
    given = kernels.shape[1]
    if given == channels:
        return kernels
    if given == 1:
        return kernels.expand(-1, channels, -1, -1) / channels
    if channels == 1:
        return kernels.sum(1, keepdim=True)
    return adapt_input_conv(channels, kernels) if given == 3 else None
