"""Differences of a source's network from the one to fill, by which its weights would compute something else here.

Each is found by its name and refused in a line; what may differ, and what is resized, is not looked at.
"""

from torch import Tensor, nn

from zoo.common.protocols import Pruned
from zoo.weights.names import HEADS, POOLING, brief, is_encoder, numbered, relative, unwrapped
from zoo.weights.positions import TABLE, TOKENS
from zoo.weights.reading import Source
from zoo.weights.stated import by_module, options_of

# Parts of an encoder without a number, which change what it computes wherever they are.
PARTS = (*TOKENS, "pos_embed", "patch_embed", "norm_pre", "rel_pos_bias", "rel_pos", "rope")
# What networks keep beside their weights, and can compute.
COMPUTED = ("num_batches_tracked", "relative_position_index", "relative_coords_table", "attn_mask", "k_bias")
# Arguments of our modules that make up for what a source has, by the start of the part's name within a block.
ARGUMENTS = {"ls1": "layer_scale", "ls2": "layer_scale", "gamma_1": "layer_scale", "gamma_2": "layer_scale"}
# Parts whose shape follows from the size of the images, or from the windows that they are cut into.
BY_OFFSET = "attention_bias"  # (heads, offsets)
SIZED = ("pos_embed", "rel_pos", TABLE, BY_OFFSET)


def check_norm_before(module: nn.Module, source: Source) -> None:
    """Compares the norm before the first block, which CLIP's image towers have in the place of their patches' bias.

    Raises:
        ValueError: If one has it and the other has not.
    """
    theirs, own = ({unwrapped(key) for key in state} for state in (source.tensors, module.state_dict()))
    both = theirs & own
    there, here = "norm_pre.weight" in theirs, "norm_pre.weight" in own
    if "blocks.0.norm1.weight" in both and there != here:
        has, lacks = ("has", "does not") if there else ("has no", "does")
        raise ValueError(
            f"{source.name} {has} norm before its first block (norm_pre), as CLIP's image towers have it, and "
            f"{type(module).__name__} {lacks}: take a backbone such as "
            + ("vit_base_patch16_clip_224" if there else "vit_base_patch16_224, or vit_base_patch16_siglip_224")
        )


def check_tokens(module: nn.Module, source: Source, missing: list[str]) -> None:
    """Compares the tokens before the patches, class, distillation and registers; and whether positions are added.

    Args:
        module: To fill.
        source: Translated.
        missing: Names in the module of what the encoder needs and the source does not have.

    Raises:
        ValueError: If they differ, and if they are all that does; registers may begin anew.
    """
    own = module.state_dict()
    inside = {relative(name): value for name, value in own.items() if is_encoder(name, own)}
    theirs = {unwrapped(key): value for key, value in source.tensors.items()}
    if "blocks.0.norm1.weight" not in theirs or {relative(name) for name in missing} - {*TOKENS, "pos_embed"}:
        return
    options = options_of(module)
    name, what = source.name, type(module).__name__
    if "dist_token" in theirs and "dist_token" not in inside:
        raise ValueError(
            f"{name} is of a distilled DeiT, which carries a distillation token, and {what} has none: take a backbone "
            "such as deit_base_distilled_patch16_224, or weights that were not distilled with a token"
        )
    if "dist_token" in inside and "dist_token" not in theirs:
        raise ValueError(
            f"{name} has no distillation token, which the network of {what} carries, a distilled DeiT: take a backbone "
            "such as deit_base_patch16_224, or weights of a distilled DeiT"
        )
    if "cls_token" in theirs and "cls_token" not in inside:
        how = "leave class_token=False out" if options.get("class_token") is False else "take a network that has one"
        raise ValueError(f"{name} has a class token, to which all patches attend, and {what} has none: {how}")
    if "cls_token" in inside and "cls_token" not in theirs:
        how = "build with class_token=False" if "class_token" in options else "take a network without one"
        raise ValueError(f"{name} has no class token, and the network of {what} has one: {how}, and pool by the mean")
    there, here = (tokens["reg_token"].shape[1] if "reg_token" in tokens else 0 for tokens in (theirs, inside))
    if there and there != here:
        how = f"build with reg_tokens={there}" if "reg_tokens" in options else "take a network that has them"
        raise ValueError(
            f"{name} has {there} register tokens, to which all patches attend, and {what} has {here or 'none'}: {how}"
        )
    if ("pos_embed" in theirs) != ("pos_embed" in inside):
        has, lacks = ("it", what) if "pos_embed" in theirs else (what, "it")
        raise ValueError(
            f"{name} does not fit {what}: {has} adds position embeddings to its patches, and {lacks} does not; take "
            "the same backbone"
        )


def check_whole(module: nn.Module, source: Source, used: set[str]) -> None:
    """Looks for parts of the source's encoder that have no place here.

    Args:
        module: To fill.
        source: Translated.
        used: Names in the source of what has a place.

    Raises:
        ValueError: If there are any, but for what pools and classifies.
    """
    own, what = module.state_dict(), type(module).__name__
    gone = module.pruned if isinstance(module, Pruned) else ()
    here = numbered(relative(name) for name in own)
    lists = {part.rpartition(".")[0] for part in here}
    rest = {key: unwrapped(key) for key in source.tensors if key not in used and unwrapped(key) not in gone}
    larger = [
        key
        for key, name in rest.items()
        if any(part not in here and part.rpartition(".")[0] in lists for part in numbered([name]))
    ]
    if larger:
        raise ValueError(
            f"{source.name} is of a larger network than {what}: {brief(larger)} are not part of this one; "
            "build it alike"
        )
    inside = [relative(name) for name in own if is_encoder(name, own)]
    parts = numbered(inside)
    besides = [
        key
        for key, name in rest.items()
        if name.rpartition(".")[2] not in COMPUTED
        and name.split(".")[0] not in (*HEADS, *POOLING)
        and (name.split(".")[0] in PARTS or numbered([name]) & parts)
    ]
    if besides:
        named = next(filter(None, (ARGUMENTS.get(word) for key in besides for word in key.split("."))), None)
        options = options_of(module)
        how = f"build with {named}" if named in options else "take the same backbone"
        raise ValueError(f"{source.name} has what {what} does not compute with, {brief(besides)}: {how}")


def check_heads(module: nn.Module, source: Source) -> None:
    """Compares numbers of attention heads, which do not show in any shape.

    Raises:
        ValueError: If the source says another number than the module has.
    """
    here, options = by_module(module), options_of(module)
    has_decoder = any(unwrapped(key).startswith("decoder.") for key in source.tensors)
    for there, count, option in (
        (source.stated.heads, here.heads, "heads"),
        (source.stated.decoder_heads if has_decoder else None, here.decoder_heads, "decoder_heads"),
    ):
        if there is not None and count is not None and there != count:
            how = f"build with {option}={there}" if option in options else "build it alike"
            raise ValueError(
                f"{source.name} has {there} attention heads ({option}), and {type(module).__name__} has {count}, which "
                f"no shape shows: {how}"
            )


def cause(name: str, value: Tensor, target: Tensor) -> str:
    """Reason why a tensor of an encoder cannot have another shape."""
    leaf = name.rpartition(".")[2]
    same_width = value.shape[-1] == target.shape[-1] or leaf.startswith(BY_OFFSET)
    if leaf.startswith(SIZED) and same_width:
        return (
            "it is made for images of one size, and of this kind it is not resized: build with the source's image_size"
        )
    return "image size, patch size and channels can be adapted, the network's size cannot"
