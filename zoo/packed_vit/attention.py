"""Attention weights and positions of a PackedViT as ``zoo analyze-vit`` asks for them, of images of one size."""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

from zoo.common.packed.packing import Grid, Packing, Patches, patchify
from zoo.packed_vit.blocks import heads


class AttentionWeights(nn.Module):
    """Mixin of PackedViT: :class:`zoo.common.inspection.GivesAttention`."""

    blocks: Any
    forward_features: Callable[[Patches], tuple[Tensor, Packing]]
    merge: int | float | None
    patch_size: tuple[int, int]
    pos_embed: Any
    pos_embed_x: Any
    pos_embed_y: Any
    position_grid: Grid
    prefix: int
    window: int | None
    _turns: Callable[[Packing, torch.device], Tensor | None]

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches, by timm's name."""
        return self.prefix

    @property
    def attends_to_all(self) -> bool:
        """True if each block computes one attention between all tokens of an image: no windows, and none merged."""
        return self.window is None and not self.merge

    def position_table(self) -> Tensor | None:
        """Position embeddings (rows, columns, D) of the patches of the grid that tables are for; None without."""
        rows, columns = self.position_grid
        table: Tensor | None = None
        if self.pos_embed is not None:
            table = self.pos_embed[0, -rows * columns :].unflatten(0, (rows, columns))
        elif self.pos_embed_y is not None and self.pos_embed_x is not None:
            table = self.pos_embed_y[0][:, None] + self.pos_embed_x[0]
        return table

    def block_attentions(self, images: Tensor) -> list[Tensor]:
        """The attention weights (B, heads, N, N) of every block, for N tokens of images (B, C, H, W), float32.

        Kernels never form them: they are computed again, of what each block's first norm gives.
        """
        patches = patchify(images, self.patch_size)
        turns, found = self._turns(Packing.of(patches.grids, self.prefix), images.device), []

        def keep(attn: Any) -> Callable[[nn.Module, Any, Tensor], None]:
            def hook(_: nn.Module, __: Any, tokens: Tensor) -> None:
                query, key, _values = heads(attn, tokens)
                if turns is not None:
                    query, key = (apply_rot_embed_cat(each, turns[:, None], half=True) for each in (query, key))
                query, key = (each.unflatten(0, (len(images), -1)).transpose(1, 2).float() for each in (query, key))
                found.append((attn.head_dim**-0.5 * query @ key.transpose(-2, -1)).softmax(-1))

            return hook

        hooks = [block.norm1.register_forward_hook(keep(block.attn)) for block in self.blocks]
        modes = {part: part.training for part in self.modules()}
        try:
            self.eval()
            self.forward_features(patches)
        finally:
            for part, mode in modes.items():
                part.training = mode
            for hook in hooks:
                hook.remove()
        return found
