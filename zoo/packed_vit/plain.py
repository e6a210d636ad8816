"""Check of the networks of timm's that PackedViT takes over, and conversion of their patch embeddings."""

from typing import Any

from timm.layers import Attention, AttentionPoolLatent, PatchEmbed, to_2tuple
from timm.layers.patch_embed import resample_patch_embed
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn


def check_plain(network: Any) -> None:
    """Raises ValueError for a network that is no plain vision transformer or NaFlexViT of timm, in what it differs."""
    name = type(network).__name__
    if not isinstance(network, VisionTransformer | NaFlexVit):
        raise ValueError(
            f"backbone {name} is no plain vision transformer: expected timm's VisionTransformer or NaFlexVit, such as "
            "vit_small_patch16_224 or naflexvit_base_patch16_gap"
        )
    odd = [
        (type(block).__name__, type(getattr(block, "attn", None)).__name__)
        for block in network.blocks
        if type(block) is not Block or type(block.attn) is not Attention or block.attn.gate is not None
    ]
    if odd:
        raise ValueError(
            f"backbone {name} has blocks of {odd[0][0]} with {odd[0][1]}: expected timm's Block with Attention"
        )
    pool = network.attn_pool
    if pool is None and network.global_pool not in ("token", "avg"):
        raise ValueError(f"backbone {name} pools {network.global_pool!r}: set pool to token, avg or map")
    if pool is not None and (
        type(pool) is not AttentionPoolLatent or pool.latent_len != 1 or pool.pos_embed is not None
    ):
        raise ValueError(f"backbone {name} pools by {type(pool).__name__}: expected one latent query without positions")
    if isinstance(network, NaFlexVit):
        embeds = network.embeds
        unlike = {
            "rotations": network.rope is not None,
            "a norm of its input": embeds.norm_input is not None,
            "a convolution for its patches": not embeds.is_linear,
            "patches with channels first": not embeds.channels_last,
            "align_corners": embeds.pos_embed_align_corners,
            "tables interpolated without antialiasing": not embeds.pos_embed_antialias,
            "tables sampled by grid_sample": embeds.pos_embed_use_grid_sample,
        }
        if found := [what for what, has in unlike.items() if has]:
            raise ValueError(f"backbone {name} has {found[0]}: expected one without")
    elif not isinstance(network.patch_embed, PatchEmbed) or network.patch_embed.proj.stride != to_2tuple(
        network.patch_embed.proj.kernel_size
    ):
        raise ValueError(f"backbone {name} embeds patches by {type(network.patch_embed).__name__}: expected one layer")


def patch_embedding(embeds: Any) -> PatchEmbed:
    """NaFlexViT's embedding of patches as a convolution, which plain vision transformers have."""
    height, width = embeds.patch_size
    embedding = PatchEmbed(
        None,
        (height, width),  # type: ignore[arg-type]  # timm's hint forgets what it takes
        embeds.in_chans,
        embeds.embed_dim,
        bias=embeds.proj.bias is not None,
        strict_img_size=False,
    )
    weight = embeds.proj.weight.detach().unflatten(1, (height, width, embeds.in_chans)).permute(0, 3, 1, 2)
    embedding.proj.weight = nn.Parameter(weight.contiguous())
    embedding.proj.bias = embeds.proj.bias
    embedding.norm = embeds.norm
    return embedding


def embedded(embedding: Any, pixels: Tensor) -> Tensor:
    """Tokens (T, D) of the pixels of patches (T, p * p * C), by a convolution's weights, which are :func:`resampled`.

    Raises:
        ValueError: For patches of another size that are no squares.
    """
    weight, channels = embedding.proj.weight, embedding.proj.in_channels
    height, width = weight.shape[2:]
    if pixels.shape[1] != channels * height * width:
        side = round((pixels.shape[1] // channels) ** 0.5)
        if pixels.shape[1] != side * side * channels:
            raise ValueError(
                f"patches have {pixels.shape[1]} values: expected {channels} channels of squares, or of "
                f"{height}x{width} pixels"
            )
        weight = resampled(weight, (side, side))
    tokens = nn.functional.linear(pixels, weight.permute(0, 2, 3, 1).flatten(1), embedding.proj.bias)
    normed: Tensor = embedding.norm(tokens)
    return normed


def resampled(weight: Tensor, size: tuple[int, int]) -> Tensor:
    """Weights (D, C, h, w) of a patch embedding for patches of another size, in float32.

    The least-squares solution: with R the bilinear resizing of a patch, embeddings of a patch and of the same patch
    resized by R differ as little as they can. Towards larger patches nothing is lost.
    """
    return resample_patch_embed(weight, list(size), interpolation="bilinear", antialias=False)
