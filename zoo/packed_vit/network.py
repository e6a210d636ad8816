"""PackedViT: timm's vision transformer over images of any size, as flat tokens without padding.

The parts are timm's, with timm's names, so that weights of any plain vision transformer of timm and of its NaFlexViT
fit as they are: patch embedding, tokens, blocks, norms and attention pooling. What is here is how they are run: on flat
tokens, each image attending to itself (:mod:`zoo.common.packed.attention`), positions by each image's grid
(:mod:`zoo.packed_vit.positions`), and windows.

Window attention as Qwen2.5-VL has it (Bai et al. 2025, arXiv 2502.13923, section 2.1.1): blocks attend within windows,
but for a few global ones. Tokens are put in the windows' order once, before the first block; an order within an image
changes nothing for a global block.

Deviations: stochastic depth drops a branch for an image, as in timm, and not for a token. A class token or registers
would be in no window or in all, which no paper defines: with windows they are refused.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from timm.layers import Mlp, RmsNorm, RotaryEmbeddingCat, SwiGLU, to_2tuple, trunc_normal_
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from zoo.common.backbones import create_backbone
from zoo.common.packed.packing import Grid, Packing, Patches, patchify
from zoo.packed_vit.attention import AttentionWeights
from zoo.packed_vit.blocks import attention_pooled, run_blocks
from zoo.packed_vit.dropping import check_drop, kept_tokens, own_drop
from zoo.packed_vit.layouts import PackedLayout
from zoo.packed_vit.merging import check_merge, run_merging
from zoo.packed_vit.plain import check_plain, embedded, patch_embedding
from zoo.packed_vit.positions import Position, interpolated, looked_up, rotations, stretched, unturned

Pool = Literal["token", "avg", "map"]
Norm = Literal["layer", "rms"]
MLP = Literal["gelu", "swiglu"]
NORMS: dict[str, Any] = {"rms": RmsNorm}
MLPS: dict[str, Any] = {"gelu": Mlp, "swiglu": SwiGLU}


class PackedViT(AttentionWeights):
    """Vision transformer over flat tokens of images of any size. ``forward(images)`` gives features (B, num_features).

    Args:
        backbone: A plain vision transformer or NaFlexViT of timm, by name or as a module, whose parts it takes over.
        position: See :mod:`zoo.packed_vit.positions`. None: the backbone's own.
        image_size: Side in pixels, or (height, width), of the images that tables are made for, and that absolute
            positions reach. None: the backbone's own.
        rotary: Whether queries and keys are rotated by row and column.
        rotary_temperature: Base of the rotations' wavelengths.
        preserve_aspect: Whether tables are stretched alike along both axes. None: the backbone's own.
        interpolation: Of a learned table, "bicubic" or "bilinear". None: the backbone's own.
        window: Side of the windows in patches. None: all blocks are global.
        global_blocks: Indices of the blocks that are global beside windows.
        patch_size: Side of a patch in pixels. None: the backbone's own.
        in_channels: Channels of the images. Of a module, its own.
        width: Embedding dimension. None: the backbone's own.
        depth: Number of blocks. None: the backbone's own.
        heads: Attention heads. None: the backbone's own.
        mlp_ratio: Width of the MLP in embedding dimensions. None: the backbone's own.
        norm: "layer" or "rms". None: the backbone's own.
        mlp: "gelu" or "swiglu". None: the backbone's own.
        pool: What :meth:`pool` reads: the class "token", the "avg" of the patches, or attention pooling ("map"). None:
            the backbone's own.
        class_token: Whether there is a class token. None: as the backbone has it.
        reg_tokens: Register tokens. None: the backbone's own.
        qk_norm, qkv_bias: Whether queries and keys are normalised, and have biases. None: as the backbone has it.
        layer_scale: Initial LayerScale value. None: the backbone's own.
        merge: Tokens merged in each block, or below 1 their share of an image's: see :mod:`zoo.packed_vit.merging`.
        patch_drop: Share of patches left out in training: see :mod:`zoo.packed_vit.dropping`. None: the backbone's own.
        drop_path: Stochastic depth, the largest probability to drop a residual branch of an image.
        grad_checkpointing: Recompute blocks in the backward pass.

    Raises:
        ValueError: For a backbone that is no plain vision transformer, in what it differs; for an unknown choice; for
            options that do not go together.
    """

    foreign_weights: ClassVar = PackedLayout()
    position: Position
    preserve_aspect: bool
    interpolation: str

    def __init__(
        self,
        backbone: str | nn.Module = "vit_small_patch16_224",
        *,
        position: Position | None = None,
        image_size: int | tuple[int, int] | None = None,
        rotary: bool = False,
        rotary_temperature: float = 10_000.0,
        preserve_aspect: bool | None = None,
        interpolation: Literal["bicubic", "bilinear"] | None = None,
        window: int | None = None,
        global_blocks: Sequence[int] = (),
        patch_size: int | None = None,
        in_channels: int = 3,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        mlp_ratio: float | None = None,
        norm: Norm | None = None,
        mlp: MLP | None = None,
        pool: Pool | None = None,
        class_token: bool | None = None,
        reg_tokens: int | None = None,
        qk_norm: bool | None = None,
        qkv_bias: bool | None = None,
        layer_scale: float | None = None,
        merge: int | float | None = None,
        patch_drop: float | None = None,
        drop_path: float | None = None,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("position", position, get_args(Position)),
            ("interpolation", interpolation, ("bicubic", "bilinear")),
            ("norm", norm, get_args(Norm)),
            ("mlp", mlp, get_args(MLP)),
            ("pool", pool, get_args(Pool)),
        ):
            if value is not None and value not in choices:
                raise ValueError(f"unknown {name} {value!r}: expected one of {', '.join(choices)}")
        given = isinstance(backbone, nn.Module)
        network = create_backbone(
            backbone,
            img_size=None if given else image_size,
            patch_size=patch_size,
            in_chans=None if given and in_channels == 3 else in_channels,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=mlp_ratio,
            norm_layer=NORMS.get(norm or ""),
            mlp_layer=None if mlp is None else MLPS[mlp],
            act_layer=nn.SiLU if mlp == "swiglu" else None,  # timm would hand its GELU to the gate
            global_pool=pool,
            class_token=class_token,
            reg_tokens=reg_tokens,
            qk_norm=qk_norm,
            qkv_bias=qkv_bias,
            init_values=layer_scale,
            drop_path_rate=drop_path,
        )
        check_plain(network)
        self._adopt(network)
        if position is not None:
            self.position = position
        self._set_positions(None if image_size is None else to_2tuple(image_size), given)
        self.preserve_aspect = self.preserve_aspect if preserve_aspect is None else preserve_aspect
        self.interpolation = interpolation or self.interpolation
        head_width = self.blocks[0].attn.head_dim
        if rotary and head_width % 4:
            raise ValueError(f"rotary with heads of {head_width} channels: expected a multiple of 4")
        self.rotary = (
            RotaryEmbeddingCat(head_width, temperature=rotary_temperature, in_pixels=False, rotate_half=True)
            if rotary
            else None
        )
        self.window, self.global_blocks = window, tuple(global_blocks)
        self._check_windows()
        self.merge = merge
        self.patch_drop: float = own_drop(network.patch_drop) if patch_drop is None else patch_drop
        check_merge(merge, rotary, window)
        check_drop(self.patch_drop, window)
        self.grad_checkpointing = grad_checkpointing

    def _adopt(self, network: Any) -> None:
        """Takes over the parts of a network, by the names of timm's plain vision transformer."""
        flexible = isinstance(network, NaFlexVit)
        embeds = network.embeds if flexible else network
        self.num_features: int = network.num_features
        self.patch_embed = patch_embedding(embeds) if flexible else network.patch_embed
        self.patch_size = to_2tuple(self.patch_embed.proj.kernel_size)
        self.cls_token, self.reg_token = embeds.cls_token, embeds.reg_token
        self.prefix: int = network.num_prefix_tokens
        self.pos_drop, self.norm_pre, self.blocks = embeds.pos_drop, network.norm_pre, network.blocks
        self.norm, self.fc_norm, self.attn_pool = network.norm, network.fc_norm, network.attn_pool
        self.global_pool: str = network.global_pool
        self.pools_prefix: bool = network.pool_include_prefix
        self.embeds_prefix = not flexible and not network.no_embed_class
        """Whether a learned table has entries for class token and registers."""
        self.preserve_aspect, self.interpolation = False, "bicubic"
        self.position = "none"
        self.pos_embed = self.pos_embed_y = self.pos_embed_x = None
        self.position_grid: Grid = (0, 0)
        if not flexible:
            if network.pos_embed is not None:
                self.position, self.pos_embed = "learned", network.pos_embed
            self.position_grid = network.patch_embed.grid_size
            return
        self.preserve_aspect, self.interpolation = embeds.pos_embed_ar_preserving, embeds.pos_embed_interp_mode
        if embeds.pos_embed_type == "learned":
            self.position, self.position_grid = "learned", tuple(embeds.pos_embed.shape[1:3])
            self.pos_embed = nn.Parameter(embeds.pos_embed.detach().flatten(1, 2))
        elif embeds.pos_embed_type == "factorized":
            self.position = "fractional"
            self.pos_embed_y, self.pos_embed_x = embeds.pos_embed_y, embeds.pos_embed_x
            self.position_grid = self.pos_embed_y.shape[1], self.pos_embed_x.shape[1]

    def _set_positions(self, size: tuple[int, int] | None, given: bool) -> None:
        """Makes the tables that the kind of positions needs, anew where there are none of this kind and size."""
        embed, same = self.patch_embed, True
        if size is not None:
            grid = size[0] // self.patch_size[0], size[1] // self.patch_size[1]
            if min(grid) < 1 or size != (grid[0] * self.patch_size[0], grid[1] * self.patch_size[1]):
                by, patch = (f"{a}x{b}" for a, b in (size, self.patch_size))
                raise ValueError(f"image_size is {by}: expected multiples of the patch size {patch}")
            same = grid == self.position_grid
            has = self.pos_embed if self.position == "learned" else self.pos_embed_y
            if given and not same and self.position != "none" and has is not None:
                raise ValueError(f"image_size is {size}, but the backbone given has positions of its own: leave it out")
            self.position_grid = grid
        # What others read: weights, of which grid positions are; and what measures, which images are usual.
        embed.strict_img_size = False
        embed.grid_size, embed.num_patches = self.position_grid, self.position_grid[0] * self.position_grid[1]
        embed.img_size = tuple(a * b for a, b in zip(self.position_grid, self.patch_size, strict=True))

        def table(*shape: int) -> nn.Parameter:
            return nn.Parameter(trunc_normal_(torch.empty(1, *shape, self.num_features), std=0.02))

        rows, columns = self.position_grid
        if self.position == "learned":
            if self.pos_embed is None or not same:
                self.embeds_prefix = False
                self.pos_embed = table(rows * columns)
            self.pos_embed_y = self.pos_embed_x = None
        elif self.position == "none":
            self.pos_embed = self.pos_embed_y = self.pos_embed_x = None
        else:
            if self.pos_embed_y is None or not same:
                self.pos_embed_y, self.pos_embed_x = table(rows), table(columns)
            self.pos_embed = None

    def _check_windows(self) -> None:
        if self.window is None:
            if self.global_blocks:
                raise ValueError(f"global_blocks is {self.global_blocks} without a window: all blocks are global")
            return
        if self.window < 1:
            raise ValueError(f"window is {self.window}: expected at least 1 patch")
        if self.prefix:
            raise ValueError(
                f"window is {self.window} with {self.prefix} tokens for no patch, class token and registers, which "
                "are in no window: set class_token to false, reg_tokens to 0, and pool to avg or map"
            )
        wrong = [index for index in self.global_blocks if not 0 <= index < len(self.blocks)]
        if wrong:
            raise ValueError(f"global_blocks has {wrong[0]}: expected 0 to {len(self.blocks) - 1}")

    def forward(self, images: Tensor | Sequence[Tensor] | Patches, patch_size: int | None = None) -> Tensor:
        """Features (B, num_features) of images (B, C, H, W), of a list of (C, H, W), or of their patches.

        Args:
            images: Normalised, with sides that are multiples of the patch's.
            patch_size: Side of the patches to cut images into: see :meth:`embed`. None: the network's own.
        """
        if not isinstance(images, Patches):
            images = patchify(images, self.patch_size if patch_size is None else patch_size)
        return self.pool(*self.forward_features(images))

    def forward_features(self, patches: Patches) -> tuple[Tensor, Packing]:
        """Tokens (T, D) behind the last norm, and which image they belong to."""
        packing = Packing.of(patches.grids, self.prefix)
        tokens = self.norm_pre(self.pos_drop(self.embed(patches, packing)))
        turns = self._turns(packing, tokens.device)
        recompute = self.grad_checkpointing and self.training and torch.is_grad_enabled()
        if self.patch_drop and self.training:
            kept, packing = kept_tokens(packing, self.patch_drop, tokens.device)
            tokens, turns = tokens[kept], None if turns is None else turns[kept]
        if self.merge:
            tokens, packing = run_merging(self.blocks, tokens, packing, self.merge, recompute)
        else:
            tokens = run_blocks(self.blocks, tokens, packing, turns, self.window, self.global_blocks, recompute)
        return self.norm(tokens), packing

    def embed(self, patches: Patches, packing: Packing) -> Tensor:
        """Tokens (T, D) of patches, with positions and with the tokens that stand for no patch.

        Patches of another size than the network's own are embedded by its weights, resampled by pseudo-inverse
        (FlexiViT, Beyer et al. 2023, arXiv 2212.08013, section 3.4): see :func:`zoo.packed_vit.plain.resampled`.
        """
        if len(patches.pixels) != sum(packing.counts):
            raise ValueError(
                f"there are {len(patches.pixels)} patches for grids of {sum(packing.counts)} in all: expected as many"
            )
        tokens = embedded(self.patch_embed, patches.pixels)
        prefix = [token[0] for token in (self.cls_token, self.reg_token) if token is not None]
        first = torch.cat(prefix) if prefix else tokens.new_empty(0, tokens.shape[1])
        if self.pos_embed is not None:
            table = self.pos_embed[0]
            if self.embeds_prefix:
                first, table = first + table[: self.prefix], table[self.prefix :]
            table = table.unflatten(0, self.position_grid)
            tokens = tokens + interpolated(table, patches.grids, self.interpolation, self.preserve_aspect)
        elif self.pos_embed_y is not None and self.pos_embed_x is not None:
            rows, columns = self.pos_embed_y[0], self.pos_embed_x[0]
            if self.position == "absolute":
                tokens = tokens + looked_up(rows, columns, patches.grids)
            else:
                tokens = tokens + stretched(rows, columns, patches.grids, self.preserve_aspect)
        return packing.with_prefix(tokens, first)

    def _turns(self, packing: Packing, device: torch.device) -> Tensor | None:
        if self.rotary is None or packing.grids is None:
            return None
        of_patches = rotations(self.rotary, packing.grids)
        still = unturned(self.rotary.dim, device).expand(self.prefix, -1)
        return packing.with_prefix(of_patches, still)

    def pool(self, tokens: Tensor, packing: Packing, weights: Tensor | None = None) -> Tensor:
        """Features (B, num_features) of tokens (T, D).

        Args:
            tokens: (T, D).
            packing: Of the tokens.
            weights: How many patches each token stands for, (T,). None: the packing's sizes.
        """
        weights = packing.sizes if weights is None else weights
        if self.pools_prefix and self.global_pool != "token":
            packing = Packing(packing.lengths)  # as if all tokens stood for patches
        if self.attn_pool is not None:
            kept = packing.patch_indices(tokens.device) if packing.prefix else slice(None)
            bias = None if weights is None else weights[kept].log()
            features = attention_pooled(self.attn_pool, tokens[kept], packing.counts, bias)
        elif self.global_pool == "token":
            features = tokens[torch.tensor(packing.starts).to(tokens.device, non_blocking=True)]
        else:
            features = packing.mean(tokens, weights).to(tokens.dtype)
        return self.fc_norm(features)

    # What timm's networks say of themselves, for optimizers and for whoever unlocks a tower.

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers by names, from patches to pooling, for learning rates by layer."""
        stem = "^cls_token|reg_token|pos_embed|patch_embed|norm_pre"
        return {"stem": stem, "blocks": [(r"^blocks\.(\d+)", None), ("^norm", (99999,))]}  # as timm's

    def no_weight_decay(self) -> set[str]:
        """Names of positions and tokens."""
        return {"cls_token", "reg_token", "pos_embed", "pos_embed_y", "pos_embed_x"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Has the backward pass recompute blocks, or not."""
        self.grad_checkpointing = enable

    def extra_repr(self) -> str:
        """Positions, windows and pooling, which no part says."""
        return f"position={self.position}, window={self.window}, pool={self.global_pool}"
