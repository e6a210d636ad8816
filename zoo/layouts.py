"""What other programs call the tensors that have a name here: timm's for encoders, our own for a MAE's decoder."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# The releases of He et al. 2022: an encoder by timm's names, and decoder_blocks.0.norm1.weight and so on beside it.
MAE_RELEASE = (
    (r"(^|\.)mask_token$", r"\1decoder.mask_token"),
    (r"(^|\.)decoder_(blocks|embed|norm|pos_embed)\b", r"\1decoder.\2"),
    (r"(^|\.)decoder_pred\b", r"\1decoder.head"),
)
# transformers' ViT and ViTMAE: version 5, and before it version 4, which nests deeper.
HUGGING_FACE = (
    (r"^vit\.", ""),
    (r"^embeddings\.(cls_token$)", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\b", "patch_embed.proj"),
    (r"^(?:encoder\.layer|layers)\.", "blocks."),
    (r"^layernorm\b", "norm"),
    (r"^decoder\.decoder_layers\.", "decoder.blocks."),
    (r"^decoder\.decoder_(embed|norm|pos_embed)\b", r"decoder.\1"),
    (r"^decoder\.decoder_pred\b", "decoder.head"),
    (r"\.layernorm_before\b", ".norm1"),
    (r"\.layernorm_after\b", ".norm2"),
    (r"\.attention\.(?:attention\.)?(?:q_proj|query)\b", ".attn.qkv.part0"),
    (r"\.attention\.(?:attention\.)?(?:k_proj|key)\b", ".attn.qkv.part1"),
    (r"\.attention\.(?:attention\.)?(?:v_proj|value)\b", ".attn.qkv.part2"),
    (r"\.attention\.(?:o_proj|output\.dense)\b", ".attn.proj"),
    (r"\.intermediate\.dense\b", ".mlp.fc1"),
    (r"(\d)\.output\.dense\b", r"\1.mlp.fc2"),
)


def translate(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """A source's tensors by the names they have here, and what kind of source it is, if that can be told.

    Raises:
        ValueError: If one of the three projections of an attention is missing.
    """
    kinds = []
    if any(key.endswith("embeddings.patch_embeddings.projection.weight") for key in state):
        kinds.append("Hugging Face")
        state = _merged(_renamed(state, HUGGING_FACE))
    elif any("decoder_blocks." in key for key in state):
        state = _renamed(state, MAE_RELEASE)
    names = [f".{name}" for name in state]
    if any(".decoder.blocks." in name for name in names):
        kinds.append("MAE, encoder and decoder")
    elif any(".blocks.0.attn." in name for name in names) and not any(".head." in name for name in names):
        kinds.append("encoder alone")
    return ", ".join(kinds), dict(state)


def _renamed(state: Mapping[str, Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def _merged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries', keys' and values' projections, which are apart there, as the one matrix that they are here."""
    merged = {}
    for key, value in state.items():
        before, _, rest = key.partition(".part")
        if not rest:
            merged[key] = value
        elif rest.startswith("0"):
            parts = [f"{before}.part{index}{rest[1:]}" for index in range(3)]
            if any(part not in state for part in parts):
                raise ValueError(f"{before} lacks one of its three projections, for queries, keys and values")
            merged[before + rest[1:]] = torch.cat([state[part] for part in parts])
    return merged
