"""Names of other programs for the tensors of vision transformers, whose names here are timm's."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from zoo.weights.names import renamed

# Hugging Face's ViT, ViTMAE, DeiT, BEiT and DINOv2, with and without registers. Files have the names of version 4 of
# transformers; modules in memory have those of version 5.
HUGGING_FACE_PATCHES = "embeddings.patch_embeddings.projection.weight"
HUGGING_FACE = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\b", "patch_embed.proj"),
    (r"^encoder\.relative_position_bias\b", "rel_pos_bias"),
    (r"^(?:encoder\.layer|layers)\.", "blocks."),
    (r"^layernorm\b", "norm"),
    (r"^pooler\.layernorm\b", "fc_norm"),  # BEiT's, behind the mean over patches
    (r"^cls_classifier\b", "head"),
    (r"^distillation_classifier\b", "head_dist"),
    (r"\.layernorm_before\b", ".norm1"),
    (r"\.layernorm_after\b", ".norm2"),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.lambda_([12])$", r".gamma_\1"),
    (r"\.attention\.(?:attention\.)?(?:q_proj|query)\b", ".attn.qkv.part0"),
    (r"\.attention\.(?:attention\.)?(?:k_proj|key)\b", ".attn.qkv.part1"),
    (r"\.attention\.(?:attention\.)?(?:v_proj|value)\b", ".attn.qkv.part2"),
    (r"\.attention\.(?:attention\.)?relative_position_bias\b", ".attn"),
    (r"\.attention\.(?:o_proj|output\.dense)\b", ".attn.proj"),
    (r"\.mlp\.weights_in\b", ".mlp.fc1"),  # SwiGLU: gates, then values
    (r"\.mlp\.weights_out\b", ".mlp.fc2"),
    (r"\.intermediate\.dense\b", ".mlp.fc1"),
    (r"(\d)\.output\.dense\b", r"\1.mlp.fc2"),
)
# The releases of DINOv2, with timm's names but for these.
DINOV2 = (
    (r"(^|\.)register_tokens$", r"\1reg_token"),
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
# lightly wraps a ViT of timm, or of torchvision.
LIGHTLY_WRAPPED = re.compile(r"(^|\.)vit\.(patch_embed\.proj|conv_proj)\.weight$")
LIGHTLY = (
    (r"(^|\.)(?:teacher_)?(backbone\.)vit\.", r"\1\2"),
    (r"^vit\.", ""),
)
# torchvision's ViT.
TORCHVISION_POSITIONS = re.compile(r"(^|\.)encoder\.pos_embedding$")
TORCHVISION = (
    (r"(^|\.)class_token$", r"\1cls_token"),
    (r"(^|\.)conv_proj\.", r"\1patch_embed.proj."),
    (r"(^|\.)encoder\.pos_embedding$", r"\1pos_embed"),
    (r"(^|\.)encoder\.ln\.", r"\1norm."),
    (r"(^|\.)encoder\.layers\.encoder_layer_(\d+)\.", r"\1blocks.\2."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
    (r"(^|\.)heads\.head\.", r"\1head."),
)


def translate(state: Mapping[str, Tensor]) -> tuple[list[str], dict[str, Tensor]]:
    """Tensors of a vision transformer by timm's names, and where they come from, if that can be told.

    Raises:
        ValueError: If one of the three projections of an attention is missing.
    """
    found = next((key for key in state if f".{key}".endswith(f".{HUGGING_FACE_PATCHES}")), None)
    if found is not None:
        prefix = found.removesuffix(HUGGING_FACE_PATCHES)
        return ["Hugging Face"], merged(renamed({key.removeprefix(prefix): state[key] for key in state}, HUGGING_FACE))
    kinds = []
    if any(LIGHTLY_WRAPPED.search(key) for key in state):
        kinds.append("lightly")
        state = renamed(state, LIGHTLY)
    if any(TORCHVISION_POSITIONS.search(key) for key in state):
        kinds.append("torchvision ViT")
        state = renamed(state, TORCHVISION)
    if any(re.search(pattern, key) for key in state for pattern, _ in DINOV2[:2]):
        kinds.append("DINOv2")
        state = renamed(state, DINOV2)
    return kinds, dict(state)


def merged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries', keys' and values' projections, which are apart there, as the one matrix that they are here.

    BEiT's keys have no bias, and here those of queries and values are apart.
    """
    without = all(key.removesuffix("part0.bias") + "part1.bias" not in state for key in state if ".part0.bias" in key)
    result = {}
    for key, value in state.items():
        before, _, rest = key.partition(".part")
        if not rest:
            result[key] = value
        elif without and rest in ("0.bias", "2.bias"):
            result[f"{before.removesuffix('.qkv')}.{'q' if rest[0] == '0' else 'v'}_bias"] = value
        elif rest.startswith("0"):
            parts = [f"{before}.part{index}{rest[1:]}" for index in range(3)]
            if any(part not in state for part in parts):
                raise ValueError(f"{before} lacks one of its three projections, for queries, keys and values")
            result[before + rest[1:]] = torch.cat([state[part] for part in parts])
    return result
