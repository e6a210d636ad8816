"""PackedViTClassifier: PackedViT with a linear head, on images of any size in one batch, and how it is trained."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from zoo._lightning import rank_zero_info
from zoo.common import batch as batches
from zoo.common.backbones import TakesImages, name_of
from zoo.common.classification import Classifier
from zoo.common.classification_losses import Loss, given_modules
from zoo.common.label_weights import Balanced
from zoo.common.norms import restore_layer_norm_eps, set_layer_norm_eps
from zoo.common.packed.packing import Patches
from zoo.common.ranges import check_ranges
from zoo.packed_vit.layouts import PackedLayout
from zoo.packed_vit.network import MLP, Norm, PackedViT, Pool
from zoo.packed_vit.positions import Position
from zoo.packed_vit.tokenizer import VisionTokenizer
from zoo.weights import load as load_weights


class PackedViTClassifier(TakesImages, Classifier):
    """Classifier on a vision transformer over images of any size, packed.

    Batch: ``(images, labels (B,))``, or labels (B, classes) of 0 and 1 with ``multi_label``; images are a list of
    (C, H, W), each of its own size, or a tensor (B, C, H, W). Sides that are no multiples of the patch's, and images of
    fewer or more tokens than allowed, are resized: see :class:`zoo.packed_vit.VisionTokenizer`. Logs and predicts as
    :class:`zoo.ViTClassifier`.

    Args:
        backbone: A plain vision transformer or NaFlexViT of timm, by name, or as a module; or a
            :class:`zoo.packed_vit.PackedViT`.
        num_classes: Number of classes.
        image_size: Side in pixels, or (height, width), of the images that learned positions are made for, and that cost
            and speed are told of. None: the backbone's own.
        patch_size: Side of a patch in pixels. None: the backbone's own.
        in_channels: Channels of the images. Of a module, its own.
        weights: Weights to start from, of a plain vision transformer or a NaFlexViT: see :func:`zoo.weights.load`.
        position: "learned", "absolute", "fractional" or "none": see :mod:`zoo.packed_vit.positions`. None: the
            backbone's own.
        rotary: Whether queries and keys are rotated by row and column.
        window: Side of attention's windows in patches. None: all blocks are global.
        global_blocks: Indices of the blocks that are global beside windows.
        min_tokens: Images of fewer patches are enlarged.
        max_tokens: Images of more patches are shrunk. None: none are.
        width: Embedding dimension. None: the backbone's own.
        depth: Number of blocks. None: the backbone's own.
        heads: Attention heads of a block. None: the backbone's own.
        mlp_ratio: Width of the MLP in embedding dimensions. None: the backbone's own.
        norm: "layer" or "rms". None: the backbone's own.
        mlp: "gelu" or "swiglu". None: the backbone's own.
        pool: What the head reads: the class "token", the "avg" of the patch tokens, or attention pooling ("map").
            None: the backbone's own.
        class_token: Whether there is a class token. None: as the backbone has it.
        reg_tokens: Register tokens (Darcet et al. 2024). None: the backbone's own.
        qk_norm: Whether queries and keys are normalised (Dehghani et al. 2023, ViT-22B). None: as the backbone has it.
        qkv_bias: Whether queries, keys and values have biases. None: as the backbone has it.
        norm_eps: Epsilon of LayerNorm. None: as ``weights`` were trained, if they say so, or else the backbone's own.
        drop_path: Stochastic depth, the largest probability to drop a residual branch of an image.
        layer_scale: Initial LayerScale value (Touvron et al. 2021). None: the backbone's own.
        merge: Tokens that are merged into similar ones in each block, a number, or a share of the image's patches
            (ToMe, Bolya et al. 2023). None: none are.
        patch_drop: Share of patch tokens dropped in training (Liu et al. 2023, PatchDropout). None: the backbone's own.
        grad_checkpointing: Recompute blocks in the backward pass: less memory, about a third more time.
        multi_label: Whether an image has several labels.
        loss: As of :class:`zoo.ViTClassifier`.
        loss_options: Arguments of a loss of ``zoo.losses`` by name.
        class_weight: Weights of the classes in the loss, one number each, or "balanced" by the training data.
        pos_weight: Weight of the positives of several labels, one number for all or each, or "balanced".
        label_smoothing: Label smoothing (Szegedy et al. 2016), in [0, 1).
        head_std: Standard deviation of the head's initial weights, truncated normal.
        optimizer: Name of an optimizer of timm.
        lr: Learning rate, as it is used: nothing is scaled by batch size.
        weight_decay: Not applied to norms, biases, position embeddings and tokens.
        betas: Betas of the optimizer. None: its own.
        layer_decay: Each block's learning rate is this times the next one's (Clark et al. 2020, BEiT, MAE).
        warmup_epochs: Linear warm-up, in epochs; a half-cosine follows.
        min_lr: Learning rate that the half-cosine ends at.
    """

    layer_norm_eps: ClassVar = True  # norm_eps is LayerNorm's, for zoo.weights to set
    foreign_weights: ClassVar = PackedLayout()
    exports: ClassVar = {}  # graphs are of tensors, and a list of images is none

    def __init__(
        self,
        backbone: str | nn.Module = "vit_base_patch16_224",
        num_classes: int = 1000,
        image_size: int | tuple[int, int] | None = None,
        patch_size: int | None = None,
        in_channels: int = 3,
        weights: str | None = None,
        position: Position | None = None,
        rotary: bool = False,
        window: int | None = None,
        global_blocks: Sequence[int] = (),
        min_tokens: int = 1,
        max_tokens: int | None = None,
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
        norm_eps: float | None = None,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        merge: int | float | None = None,
        patch_drop: float | None = None,
        grad_checkpointing: bool = False,
        multi_label: bool = False,
        loss: Loss | nn.Module | str = "cross_entropy",
        loss_options: dict[str, Any] | None = None,
        class_weight: Balanced | list[float] | None = None,
        pos_weight: Balanced | float | list[float] | None = None,
        label_smoothing: float = 0.0,
        head_std: float = 0.02,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        betas: tuple[float, float] | None = None,
        layer_decay: float = 1.0,
        warmup_epochs: float = 0.0,
        min_lr: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone", "weights", *given_modules(loss=loss)])
        self.hparams.update(backbone=name_of(backbone), mixup=0.0, cutmix=0.0)  # these mix images of one size
        self.make_metrics(loss)
        check_ranges(
            image_size=(image_size, 1, None),
            patch_size=(patch_size, 1, None),
            in_channels=(in_channels, 1, None),
            window=(window, 1, None),
            min_tokens=(min_tokens, 1, None),
            max_tokens=(max_tokens, 1, None),
            width=(width, 1, None),
            depth=(depth, 1, None),
            heads=(heads, 1, None),
            reg_tokens=(reg_tokens, 0, None),
            drop_path=(drop_path, 0, 1),
            layer_scale=(layer_scale, 0, None),
            head_std=(head_std, 0, None),
            norm_eps=(norm_eps, 0, None),
        )
        options: dict[str, Any] = {
            "patch_size": patch_size,
            "position": position,
            "rotary": rotary,
            "window": window,
            "global_blocks": tuple(global_blocks),
            "width": width,
            "depth": depth,
            "heads": heads,
            "mlp_ratio": mlp_ratio,
            "norm": norm,
            "mlp": mlp,
            "pool": pool,
            "class_token": class_token,
            "reg_tokens": reg_tokens,
            "qk_norm": qk_norm,
            "qkv_bias": qkv_bias,
            "drop_path": drop_path or None,
            "layer_scale": layer_scale,
            "merge": merge,
            "patch_drop": patch_drop,
            "grad_checkpointing": grad_checkpointing,
        }
        if isinstance(backbone, PackedViT):
            unset = {"rotary": False, "global_blocks": (), "grad_checkpointing": False}
            if asked := [name for name, value in options.items() if value != unset.get(name)]:
                raise ValueError(f"{', '.join(asked)} cannot be set on a PackedViT that is given: build it so")
            self.backbone = backbone
        else:
            self.backbone = PackedViT(backbone, image_size=image_size, in_channels=in_channels, **options)
        if norm_eps is not None:
            set_layer_norm_eps(self.backbone, norm_eps)
        if isinstance(backbone, nn.Module):
            self.settle_images()
        self.tokenizer = VisionTokenizer(self.backbone.patch_size, min_tokens=min_tokens, max_tokens=max_tokens)
        self.head = nn.Linear(self.backbone.num_features, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=head_std) if head_std else nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        if weights is not None:
            rank_zero_info(str(load_weights(self, weights)))

    def read_images(self, batch: Any) -> Tensor | list[Tensor]:
        """The images of a batch: float (B, C, H, W), or a list of (C, H, W), each of its own size."""
        return batches.images_of_any_size(batch)

    def features(self, images: Tensor | Sequence[Tensor] | Patches) -> Tensor:
        """Pooled embeddings (B, D) of images of any size: normalised, resized where they have to be."""
        return self.backbone(images if isinstance(images, Patches) else self.tokenizer(images))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        restore_layer_norm_eps(self, checkpoint)
