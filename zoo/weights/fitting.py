"""Fitting a source's values into a module, in its shapes, or saying why they do not fit."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from timm.layers import resample_patch_embed
from timm.models import adapt_input_conv
from torch import Tensor, nn

from zoo.weights.differences import cause, check_heads, check_norm_before, check_tokens, check_whole
from zoo.weights.layouts import Layout
from zoo.weights.names import brief, is_encoder, is_needed, part_of, place, relative, unwrapped
from zoo.weights.positions import TABLE, Grid, adapt, find_grid, fold
from zoo.weights.reading import Source
from zoo.weights.stated import encoder_of


@dataclass
class Fit:
    """The values that a module gets.

    Attributes:
        values: For names in the module: the name in the source, and the value in the module's shape.
        resized: Those names whose value is not the source's.
        notes: What the source does not say, and was assumed.
    """

    values: dict[str, tuple[str, Tensor]] = field(default_factory=dict)
    resized: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def fit(module: nn.Module, source: Source, layout: Layout) -> Fit:
    """Finds what a module gets from a source whose names are translated by its layout.

    Raises:
        ValueError: If it does not fit, in one line: in what, and how to build the module alike.
    """
    own, state, name = module.state_dict(), source.tensors, type(module).__name__
    found = _matched(source, own, layout)
    missing = [target for target in own if is_needed(target, own) and target not in found]
    check_norm_before(module, source)
    check_tokens(module, source, missing)
    if missing:
        needed = sum(is_needed(target, own) for target in own)
        raise ValueError(
            f"{source.name} does not fit {name}: {len(missing)} of the encoder's {needed} tensors are missing, "
            f"{brief(missing)}; it holds {brief(list(state))}"
        )
    if differs := layout.differences({unwrapped(key): value for key, value in state.items()}, own):
        raise ValueError(f"{source.name} {differs}")
    check_whole(module, source, set(found.values()))
    check_heads(module, source)

    encoder = encoder_of(module)
    theirs = {relative(target): state[key] for target, key in found.items() if is_encoder(target, own)}
    try:
        grid = find_grid(encoder, theirs, source.stated)
    except ValueError as error:
        raise ValueError(f"{source.name} {error}") from error
    done = Fit(notes=[grid.assumed] if grid and grid.assumed else [])
    for target, key in found.items():
        value = _shaped(module, own, source, target, state[key], grid)
        if value is not state[key]:
            done.resized.append(target)
        done.values[target] = key, value
    prefix = "backbone." if encoder is not module else ""
    if f"{prefix}pos_embed" in own:
        for token, value in fold(theirs, own[f"{prefix}pos_embed"], encoder, grid).items():
            done.values[prefix + token] = found[prefix + token], value
            done.resized.append(prefix + token)
    _drop_partial(module, source, layout, done)
    return done


def _matched(source: Source, own: Mapping[str, Tensor], layout: Layout) -> dict[str, str]:
    """Names in the source, by those in the module."""
    found: dict[str, str] = {}
    # A head for each of two tokens, whose outputs are averaged, cannot be one head.
    of_two = any(unwrapped(key) == "dist_token" for key in source.tensors) and "head_dist.weight" not in own
    for key in source.tensors:
        target = place(key, own)
        if target in found:
            raise ValueError(f"{source.name} has two tensors for {target}: {found[target]} and {key}")
        if target is not None and not (
            of_two and not is_encoder(target, own) and part_of(target, layout.optional) in layout.optional
        ):
            found[target] = key
    # BEiT is pretrained with one table for all blocks, and fine-tuned with one for each.
    shared = next((key for key in source.tensors if unwrapped(key) == f"rel_pos_bias.{TABLE}"), None)
    if shared is not None and shared not in found.values():
        found |= {target: shared for target in own if target.endswith(f".attn.{TABLE}") and target not in found}
    return found


def _drop_partial(module: nn.Module, source: Source, layout: Layout, done: Fit) -> None:
    """Leaves out parts other than the encoder that do not fit as a whole: half a head is worse than none.

    Raises:
        ValueError: For half of a part that is no classifier.
    """
    own, values = module.state_dict(), done.values
    parts: dict[str, list[str]] = {}
    for name in own:
        if not is_encoder(name, own):
            parts.setdefault(part_of(name, layout.optional), []).append(name)
    for part, names in parts.items():
        needed = [name for name in names if not name.endswith("num_batches_tracked")]  # frozen BatchNorm has none
        wrong = [name for name in needed if name not in values or values[name][1].shape != own[name].shape]
        if wrong and part not in layout.optional and any(name in values for name in names):
            there = f"{tuple(values[wrong[0]][1].shape)} there" if wrong[0] in values else "missing there"
            raise ValueError(
                f"{source.name} has another {part} than {type(module).__name__}: {wrong[0]} is {there} and "
                f"{tuple(own[wrong[0]].shape)} here; build it alike, or start from the encoder alone"
            )
        for name in names if wrong else []:
            values.pop(name, None)
            done.resized = [other for other in done.resized if other != name]


def _shaped(
    module: nn.Module, own: Mapping[str, Tensor], source: Source, name: str, value: Tensor, grid: Grid | None
) -> Tensor:
    """A tensor in the shape that the module has it in; one of another part than the encoder may keep its own.

    Raises:
        ValueError: If only a network of another size could have it.
    """
    parent, _, leaf = name.rpartition(".")
    owner, target = module.get_submodule(parent), own[name]
    if leaf.startswith("pos_embed") or leaf == TABLE:
        resized = adapt(name, owner, value, target, grid)
        if resized is not None and resized.shape == target.shape:
            return resized
    if value.shape == target.shape or not is_encoder(name, own):
        return value
    if value.ndim == target.ndim == 4 and len(value) == len(target):  # the kernels of a patch embedding, or of a stem
        is_patches = ".patch_embed." in f".{name}"
        channels = _change_channels(value.float(), target.shape[1])
        if channels is not None and (is_patches or value.shape[2:] == target.shape[2:]):
            return resample_patch_embed(channels, list(target.shape[2:])) if is_patches else channels
    raise ValueError(
        f"{source.name} does not fit {type(module).__name__}: {name} is {tuple(value.shape)} there and "
        f"{tuple(target.shape)} here; {cause(name, value, target)}"
    )


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
