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
# torchvision's EfficientNets, V2 as well, but for what is within blocks.
TORCHVISION = (
    (r"(^|\.)features\.0\.0\.", r"\1conv_stem."),
    (r"(^|\.)features\.0\.1\.", r"\1bn1."),
    (r"(^|\.)features\.\d+\.0\.weight$", r"\1conv_head.weight"),
    (r"(^|\.)features\.\d+\.1\.(\w+)$", r"\1bn2.\2"),
    (r"(^|\.)classifier\.1\.", r"\1classifier."),
)
# It numbers the layers of a block. Which they are shows in how many there are: a convolution alone, a fused inverted
# residual, a depthwise separable block, an inverted residual.
TORCHVISION_BLOCK = re.compile(
    r"(?P<before>(?:.*\.)?)features\.(?P<block>(?P<stage>\d+)\.\d+)\.block\.(?P<layer>\d+)\.(?P<part>\w+)\.(?P<rest>\w+)"
)
TORCHVISION_LAYERS = {
    1: ("conv",),
    2: ("conv_exp", "conv_pwl"),
    3: ("conv_dw", "se", "conv_pw"),
    4: ("conv_pw", "conv_dw", "se", "conv_pwl"),
}


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
    elif any(TORCHVISION_BLOCK.fullmatch(key) for key in state):
        kinds.append("torchvision")
        state = _renamed(_named_blocks(state), TORCHVISION)
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


def _named_blocks(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's blocks, by the names that their layers have here."""
    matches = {key: TORCHVISION_BLOCK.fullmatch(key) for key in state}
    lengths: dict[str, int] = {}
    for found in filter(None, matches.values()):
        lengths[found["block"]] = max(lengths.get(found["block"], 0), int(found["layer"]) + 1)
    named = {}
    for key, value in state.items():
        match = matches[key]
        if match and (layers := TORCHVISION_LAYERS.get(lengths[match["block"]])):
            index = int(match["layer"])
            name = layers[index]
            if name == "se":
                name = {"fc1": "se.conv_reduce", "fc2": "se.conv_expand"}.get(match["part"], name)
            elif match["part"] == "1":
                name = f"bn{index + 1 - layers[:index].count('se')}"  # behind each convolution, counted from 1
            stage = int(match["stage"]) - 1
            key = f"{match['before']}blocks.{stage}.{match['block'].rpartition('.')[2]}.{name}.{match['rest']}"
        named[key] = value
    return named


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
