"""The encoder: any plain ViT of timm, as the paper initialises it, on visible patches only."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, to_2tuple
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.common.backbones import create_backbone, name_of
from zoo.mae.patches import sincos_positions, take


def plain_vit(backbone: str | nn.Module, **options: Any) -> Any:
    """A ViT whose patches are independent of each other until its blocks, without head or pooling of its own.

    Raises:
        ValueError: For anything else; options are those of :func:`zoo.common.backbones.create_backbone`.
    """
    hint = "a masked autoencoder needs a plain ViT such as vit_base_patch16_224, whose patches can be left out"
    try:
        vit = create_backbone(backbone, **options)
    except ValueError as error:
        if error.__cause__ is not None:  # what timm's own constructor says
            raise ValueError(f"{backbone} is no plain ViT, or cannot take its options: {hint} ({error})") from error
        raise
    name = name_of(backbone)
    if not isinstance(vit, VisionTransformer) or hasattr(vit, "dist_token"):
        raise ValueError(f"{name} is a {type(vit).__name__}: {hint}")
    proj = getattr(vit.patch_embed, "proj", None)
    if not isinstance(vit.patch_embed, PatchEmbed) or not isinstance(proj, nn.Conv2d) or vit.dynamic_img_size:
        raise ValueError(f"{name} does not cut its images into patches of a fixed size and number: {hint}")
    vit.attn_pool = None  # type: ignore[assignment]  # what pools is not trained here
    if isinstance(vit.norm, nn.Identity):  # the same norm, behind the mean instead of before
        vit.norm, vit.fc_norm = vit.fc_norm, nn.Identity()
    return vit


def check_given(vit: Any, image_size: int | tuple[int, int], in_channels: int) -> None:
    """Raises ValueError if a backbone that was given is for other images than the arguments say, defaults aside."""
    size, channels = vit.patch_embed.img_size, vit.patch_embed.proj.in_channels
    if to_2tuple(image_size) not in ((224, 224), size):
        raise ValueError(f"image_size is {image_size}, but the backbone given is for {size}: leave it out")
    if in_channels not in (3, channels):
        raise ValueError(f"in_channels is {in_channels}, but the backbone given is for {channels}: leave it out")


@torch.no_grad()
def initialize(module: nn.Module) -> None:
    """Initialises as the released code: Xavier-uniform matrices, the three attention projections taken as one.

    Patch kernels are a matrix, too; tokens are normal with a deviation of 0.02; biases are 0, but the patches' keep
    torch's default.
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif name == "patch_embed":
            nn.init.xavier_uniform_(part.proj.weight.view(len(part.proj.weight), -1))
    for name, parameter in module.named_parameters():
        if name in ("cls_token", "reg_token", "mask_token"):
            nn.init.normal_(parameter, std=0.02)


@torch.no_grad()
def fix_positions(vit: Any) -> None:
    """Fixes the position embeddings to sin-cos ones, which are not trained; class token and registers have 0."""
    if vit.pos_embed is None:
        return
    table = sincos_positions(vit.patch_embed.grid_size, vit.embed_dim)
    vit.pos_embed.copy_(F.pad(table, (0, 0, vit.pos_embed.shape[1] - len(table), 0))[None])
    vit.pos_embed.requires_grad_(False)


def encode_visible(vit: Any, patches: Tensor, visible: Tensor) -> list[Tensor]:
    """Encodes visible patches: the embeddings and every block's output, the last one normalised.

    Args:
        vit: From :func:`plain_vit`.
        patches: (B, L, h*w*C), as of :func:`zoo.mae.patches.patchify`.
        visible: Indices (B, V).

    Returns:
        Depth + 1 tensors (B, prefix + V, D): class token, registers, then patches in the order of ``visible``.
    """
    proj = vit.patch_embed.proj
    weight = proj.weight.permute(0, 2, 3, 1).flatten(1)  # a patch's pixels come in (row, column, channel) order
    tokens = vit.patch_embed.norm(F.linear(take(patches, visible), weight, proj.bias))
    prefix = [token for token in (vit.cls_token, vit.reg_token) if token is not None]
    tokens = torch.cat([*(token.expand(len(tokens), -1, -1) for token in prefix), tokens], dim=1)
    if vit.pos_embed is not None:
        tokens = tokens + _positions(vit, visible)
    tokens = vit.norm_pre(vit.pos_drop(tokens))
    features = [tokens]
    for block in vit.blocks:
        if vit.grad_checkpointing and torch.is_grad_enabled():
            tokens = checkpoint(block, tokens, use_reentrant=False)
        else:
            tokens = block(tokens)
        features.append(tokens)
    return [*features[:-1], vit.norm(tokens)]


def _positions(vit: Any, visible: Tensor) -> Tensor:
    """Position embeddings (B, prefix + V, D); 0 for tokens that have none."""
    table, prefix = vit.pos_embed, vit.num_prefix_tokens
    placed = table.shape[1] - vit.patch_embed.num_patches  # how many tokens before the patches have a position
    first = F.pad(table[:, :placed], (0, 0, 0, prefix - placed))
    return torch.cat([first.expand(len(visible), -1, -1), F.embedding(visible, table[0, placed:])], dim=1)
