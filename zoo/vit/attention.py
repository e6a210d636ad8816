"""Attention weights of vision transformers, as the networks compute them, and maps of where they look."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Attention, AttentionRope
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Beit
from timm.models.eva import Eva, EvaAttention
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import RelPosAttention, VisionTransformerRelPos
from torch import Tensor

from zoo.common.inspection import GivesAttention

# Networks of tokens that keep their number, and the attention in them whose weights, between all tokens, are what its
# output is made of. Others weigh channels, windows or pooled tokens, mix their heads, or subtract two attentions.
TRANSFORMERS = (VisionTransformer, Eva, Beit, VisionTransformerRelPos)
ATTENTIONS = (Attention, AttentionRope, EvaAttention, BeitAttention, RelPosAttention)


def shows_attention(backbone: Any) -> bool:
    """Tells whether each block of a backbone computes one attention between all tokens, which can be seen."""
    if isinstance(backbone, GivesAttention):
        return backbone.attends_to_all
    if not isinstance(backbone, TRANSFORMERS):
        return False
    # A class of one's own that is derived from these may compute something else.
    return all(type(getattr(block, "attn", None)) in ATTENTIONS for block in backbone.blocks)


def block_attentions(backbone: Any, images: Tensor) -> list[Tensor]:
    """The attention weights (B, heads, N, N) of every block, for N tokens, float32.

    Fused attention never forms them. For once each block computes them apart, and passes them to its dropout.

    Raises:
        ValueError: For a backbone that has none: see :func:`shows_attention`.
    """
    if not shows_attention(backbone):
        raise ValueError(f"{type(backbone).__name__} has no attention between all tokens in each block to show")
    if isinstance(backbone, GivesAttention):
        return backbone.block_attentions(images)
    attentions: list[Tensor] = []
    parts = [block.attn for block in backbone.blocks]
    fused = [part.fused_attn for part in parts]
    hooks = [
        part.attn_drop.register_forward_pre_hook(lambda _, args: attentions.append(args[0].float())) for part in parts
    ]
    modes = {part: part.training for part in backbone.modules()}
    try:
        for part in parts:
            part.fused_attn = False
        backbone.eval().forward_features(images)  # not __call__: a compiled network would be compiled again
    finally:
        for part, mode in modes.items():
            part.training = mode
        for part, was_fused, hook in zip(parts, fused, hooks, strict=True):
            part.fused_attn = was_fused
            hook.remove()
    return attentions


def attention_maps(backbone: Any, attentions: Sequence[Tensor], size: Sequence[int]) -> dict[str, Tensor]:
    """Maps over patches (B, h, w), non-negative, that sum to 1: "last" and "rollout".

    "last" is the last block's attention from the class token, the mean over heads. "rollout" follows it through all
    blocks: heads averaged, half of it the residual branch's identity, multiplied up (Abnar and Zuidema 2020). Without a
    class token both are means over the queries.

    Args:
        backbone: The network.
        attentions: Its attention of each block (B, heads, N, N), as :func:`block_attentions` gives it.
        size: Height and width of the images in pixels.
    """
    means = [attention.mean(1) for attention in attentions]
    identity = torch.eye(means[0].shape[-1], device=means[0].device)
    rollout = identity
    for attention in means:
        rollout = (0.5 * attention + 0.5 * identity) @ rollout
    height, width = backbone.patch_embed.dynamic_feat_size(tuple(size))
    prefix, has_token = backbone.num_prefix_tokens, backbone.cls_token is not None

    def on_patches(attention: Tensor) -> Tensor:
        row = attention[:, 0] if has_token else attention.mean(1)
        row = row[:, prefix:]
        return (row / row.sum(1, keepdim=True)).unflatten(1, (height, width))

    return {"last": on_patches(means[-1]), "rollout": on_patches(rollout)}
