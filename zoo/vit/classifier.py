"""ViTClassifier: a vision transformer with a linear head, and how it is trained."""

import math
from typing import Any, ClassVar, Literal, get_args

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from zoo._lightning import rank_zero_info
from zoo.common import batch as batches
from zoo.common import pictures
from zoo.common.backbones import TakesImages, create_backbone, feature_width, name_of, recompute_activations
from zoo.common.classification import Classifier
from zoo.common.classification_losses import Loss, given_modules
from zoo.common.label_weights import Balanced
from zoo.common.norms import restore_layer_norm_eps, set_layer_norm_eps
from zoo.common.ranges import check_ranges
from zoo.vit.attention import TRANSFORMERS, attention_maps, block_attentions, shows_attention
from zoo.vit.peers import PEERS
from zoo.weights import load as load_weights

Pool = Literal["token", "avg", "map"]
Schedule = Literal["linear", "uniform"]


class ViTClassifier(TakesImages, Classifier):
    """Vision transformer classifier.

    Batch: ``(images (B, C, H, W), labels (B,))``, or labels (B, classes) of 0 and 1 with ``multi_label``. Logs
    ``train/loss``, ``val/loss``, ``val/acc``, ``val/acc5``, ``val/f1`` (macro) and the same for ``test``. Predicts
    class probabilities (B, classes).

    Args:
        backbone: A timm network by name, without the tag of weights; or an ``nn.Module`` from images (B, C, H, W) to
            features (B, D): any timm model, or one that states D as ``num_features``.
        num_classes: Number of classes.
        image_size: Side in pixels, or (height, width). None: the backbone's own. A network whose layers fit images of
            every size, as most convolutional ones, and one that is given as a module, are not changed by it: it states
            what :attr:`input_shape` is.
        patch_size: Side of a patch in pixels. None: the backbone's own.
        in_channels: Channels of the images. Of a module, its own.
        weights: Weights to start from: see :func:`zoo.weights.load`.
        width: Embedding dimension of the transformer. None: the backbone's own.
        depth: Number of blocks. None: the backbone's own.
        heads: Attention heads of a block. None: the backbone's own.
        pool: What the head reads: the class "token", the "avg" of the patch tokens, or attention pooling ("map").
            None: the backbone's own.
        reg_tokens: Register tokens (Darcet et al. 2024). 0: the backbone's own number.
        class_token: False for a ViT without one, whose head then reads the "avg", as an encoder that was pretrained
            without has to be. True: as the backbone is.
        norm_eps: Epsilon of LayerNorm. None: as ``weights`` were trained, if they say so (Hugging Face's config.json,
            a checkpoint of ours), or else the backbone's own.
        drop_path: Stochastic depth, the largest probability to drop a residual branch.
        drop_path_schedule: "linear" from 0 in the first block, or "uniform" over depth (DeiT III).
        layer_scale: Initial LayerScale value (Touvron et al. 2021). None: the backbone's own, usually no LayerScale.
        dropout: Dropout before the head.
        patch_drop: Share of patch tokens dropped in training (Liu et al. 2023, FLIP).
        grad_checkpointing: Recompute blocks in the backward pass: less memory, about a third more time.
        linear_probe: Train the head alone: the backbone is frozen and in evaluation mode, and the head is BatchNorm
            without affine parameters followed by a linear layer (He et al. 2022, appendix A.1).
        multi_label: Whether an image has several labels.
        loss: "cross_entropy", "bce" or "sigmoid", see
            :func:`zoo.common.classification_losses.classification_loss`; a loss of ``zoo.losses`` by name, "soft_fbeta"
            for example; or an ``nn.Module`` from logits (B, classes) and targets to a scalar.
        loss_options: Arguments of a loss of ``zoo.losses`` by name.
        class_weight: Weights of the classes in the loss, one number each, or "balanced" by the training data: see
            :class:`zoo.common.label_weights.LabelWeights`.
        pos_weight: Weight of the positives of several labels, one number for all or each, or "balanced" by the training
            data.
        label_smoothing: Label smoothing (Szegedy et al. 2016), in [0, 1).
        mixup: Alpha of mixup (Zhang et al. 2018); 0 is off.
        cutmix: Alpha of cutmix (Yun et al. 2019); 0 is off. With both on, each batch has one of them.
        head_std: Standard deviation of the head's initial weights, truncated normal.
        head_bias: Initial bias of the head.
        optimizer: Name of an optimizer of timm.
        lr: Learning rate, as it is used: nothing is scaled by batch size.
        weight_decay: Not applied to norms, biases, position embeddings and tokens.
        betas: Betas of the optimizer. None: its own.
        layer_decay: Each block's learning rate is this times the next one's (Clark et al. 2020, BEiT, MAE).
        warmup_epochs: Linear warm-up, in epochs; a half-cosine follows.
        min_lr: Learning rate that the half-cosine ends at.
        compile: Compile the backbone in place.

    Raises:
        ValueError: For an unknown name or choice, with what there is to choose from; for an image that patches do not
            fill; for an option that a given module cannot take; for weights that do not fit.
    """

    layer_norm_eps: ClassVar = True  # norm_eps is LayerNorm's, for zoo.weights to set
    peers: ClassVar = PEERS

    def __init__(
        self,
        backbone: str | nn.Module = "vit_base_patch16_224",
        num_classes: int = 1000,
        image_size: int | tuple[int, int] | None = None,
        patch_size: int | None = None,
        in_channels: int = 3,
        weights: str | None = None,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        pool: Pool | None = None,
        reg_tokens: int = 0,
        class_token: bool = True,
        norm_eps: float | None = None,
        drop_path: float = 0.0,
        drop_path_schedule: Schedule = "linear",
        layer_scale: float | None = None,
        dropout: float = 0.0,
        patch_drop: float = 0.0,
        grad_checkpointing: bool = False,
        linear_probe: bool = False,
        multi_label: bool = False,
        loss: Loss | nn.Module | str = "cross_entropy",
        loss_options: dict[str, Any] | None = None,
        class_weight: Balanced | list[float] | None = None,
        pos_weight: Balanced | float | list[float] | None = None,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        head_std: float = 0.02,
        head_bias: float = 0.0,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        betas: tuple[float, float] | None = None,
        layer_decay: float = 1.0,
        warmup_epochs: float = 0.0,
        min_lr: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone", "weights", *given_modules(loss=loss)])
        self.hparams["backbone"] = name_of(backbone)
        self.make_metrics(loss)
        check_ranges(
            image_size=(image_size, 1, None),
            patch_size=(patch_size, 1, None),
            in_channels=(in_channels, 1, None),
            width=(width, 1, None),
            depth=(depth, 1, None),
            heads=(heads, 1, None),
            reg_tokens=(reg_tokens, 0, None),
            drop_path=(drop_path, 0, 1),
            dropout=(dropout, 0, 1),
            patch_drop=(patch_drop, 0, 1),
            layer_scale=(layer_scale, 0, None),
            head_std=(head_std, 0, None),
            head_bias=(head_bias, -math.inf, None),
            norm_eps=(norm_eps, 0, None),
        )
        given = isinstance(backbone, nn.Module)
        if not class_token:
            pool = pool or "avg"
        self.backbone = create_backbone(
            backbone,
            img_size=None if given else image_size,
            patch_size=patch_size,
            in_chans=None if given else in_channels,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            global_pool=pool,
            class_token=None if class_token else False,
            reg_tokens=reg_tokens or None,
            drop_path_rate=drop_path or None,
            init_values=layer_scale,
            drop_rate=dropout or None,
            patch_drop_rate=patch_drop or None,
        )
        if drop_path_schedule not in get_args(Schedule):
            raise ValueError(f"unknown drop_path_schedule {drop_path_schedule!r}: expected linear or uniform")
        if norm_eps is not None:
            set_layer_norm_eps(self.backbone, norm_eps)
        if given:
            self.settle_images()
        if drop_path_schedule == "uniform":
            drop_uniformly(self.backbone, drop_path)
        if grad_checkpointing:
            recompute_activations(self.backbone)
        width = feature_width(self.backbone)
        self.head = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=head_std) if head_std else nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, head_bias)
        if linear_probe:
            self.backbone.requires_grad_(False)
            self.head = nn.Sequential(nn.BatchNorm1d(width, eps=1e-6, affine=False), self.head)
        if weights is not None:
            rank_zero_info(str(load_weights(self, weights)))
        if compile:
            self.backbone.compile()

    def features(self, images: Tensor) -> Tensor:
        """Pooled embeddings (B, D) of images (B, C, H, W).

        Raises:
            ValueError: For images that the backbone was not built for; for a backbone that returns something else.
        """
        if torch.compiler.is_compiling():
            return self.backbone(images)
        try:
            features = self.backbone(images)
        except (AssertionError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or tuple(images.shape[1:]) == self.input_shape:
                raise
            got, expected = ("x".join(map(str, shape)) for shape in (images.shape[1:], self.input_shape))
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"images are {got}, but the model was built for {expected}: {reason}") from error
        width = feature_width(self.backbone)
        if not isinstance(features, Tensor) or features.shape != (len(images), width):
            got = str(tuple(features.shape)) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"{type(self.backbone).__name__} returns {got} for {len(images)} images: expected pooled features "
                f"({len(images)}, {width})"
            )
        return features

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        restore_layer_norm_eps(self, checkpoint)

    def train(self, mode: bool = True) -> "ViTClassifier":
        super().train(mode)
        if self.hparams.linear_probe:
            self.backbone.eval()
        return self

    @torch.no_grad()
    def attention_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Attention maps over patches, non-negative maps (B, h, w) that sum to 1.

        These are the weights that the network computes, relative and rotary positions included: "last" and "rollout" of
        :func:`zoo.vit.attention.attention_maps`.

        Raises:
            ValueError: For a backbone without such attention: see :func:`shows_attention`.
        """
        attentions = block_attentions(self.backbone, images)
        return attention_maps(self.backbone, attentions, images.shape[-2:])

    def pictures(self, batch: Any) -> dict[str, Tensor]:
        """Predictions, and attention maps if :func:`shows_attention`: images (B, 3, h, w) in [0, 1]."""
        drawn = super().pictures(batch)
        if shows_attention(self.backbone):
            images = batches.images(batch)
            for name, heat in self.attention_maps(images).items():
                drawn[f"attention_{name}"] = pictures.heated(images, heat)
        return drawn


def drop_uniformly(backbone: Any, rate: float) -> None:
    """Gives every block the same drop path probability (DeiT III); timm's own rises linearly with depth.

    Raises:
        ValueError: For a network whose blocks do not have two branches each, as a ViT's have.
    """
    blocks = list(backbone.blocks) if isinstance(backbone, TRANSFORMERS) else []
    if not blocks or not all(hasattr(block, "drop_path1") and hasattr(block, "drop_path2") for block in blocks):
        raise ValueError(
            f"drop_path_schedule 'uniform' is for a ViT's blocks of two branches: {type(backbone).__name__} has none, "
            "take 'linear'"
        )
    for block in blocks:
        for name in ("drop_path1", "drop_path2"):
            setattr(block, name, DropPath(rate) if rate else nn.Identity())
