"""ImageTextAligner: two towers, one space, and how they learn from pairs of images and captions.

Radford et al. 2021 (CLIP), Zhai et al. 2023 (SigLIP), Zhai et al. 2022 (LiT). Other than there, embeddings are
normalised and losses computed in float32 at least, and captions that are cut keep their end token.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from zoo._lightning import LightningModule, rank_zero_info
from zoo.alignment.metrics import ModalityGap
from zoo.alignment.positives import Positives, positive_keys
from zoo.alignment.text import Act, Pool, TextTransformer
from zoo.alignment.towers import check_unlocking, evaluate_locked, locked_names, pooled, projection
from zoo.alignment.waiting import contrastive_sigmoid_loss, contrastive_softmax_loss, create_tokenizer
from zoo.checkpoints import SafeLoading
from zoo.common import batch as batches
from zoo.common import loaders, optim
from zoo.common.backbones import create_backbone, feature_width, name_of, own_image_shape, recompute_activations
from zoo.common.captions import CaptionBatch, read
from zoo.common.compiling import Compilable
from zoo.common.evaluation import Evaluation
from zoo.common.log import StepLog
from zoo.common.precision import MeanMetric
from zoo.common.ranges import check_above, check_choices, check_ranges, check_training
from zoo.common.tokenizers import check_special, tokenize
from zoo.sharding import Shardable
from zoo.weights import load as load_weights

Loss = Literal["softmax", "sigmoid"]
Projection = Literal["linear", "none"]
SCALES: dict[str, float] = {"softmax": 1 / 0.07, "sigmoid": 10.0}
"""Initial scales of the papers."""
LARGEST: dict[str, float | None] = {"softmax": 100.0, "sigmoid": None}
"""Largest scales of the papers."""
BIAS = -10.0
"""Initial bias of SigLIP; with "auto" it stands for one that no batch has been seen for."""


class ImageTextAligner(SafeLoading, Compilable, Evaluation, Shardable, LightningModule):
    """Image and text towers whose embeddings of a pair are close: CLIP, SigLIP, LiT.

    Batch: ``(images (B, C, H, W), captions)``, see :mod:`zoo.common.captions`. Training learns from the first caption
    of each image, evaluation looks at all. Logs ``train/loss``, ``train/scale``, ``train/bias``, ``val/loss`` within
    the batches of a process, ``val/gap``, the distance of the mean embeddings of images and texts (Liang et al. 2022),
    and the same for ``test``. Predicts embeddings (B, embed_dim), unit vectors.

    Args:
        image_backbone: A timm network by name, without the tag of weights; or an ``nn.Module`` from images (B, C, H, W)
            to features (B, D): any timm model, or one that states D as ``num_features``.
        embed_dim: Dimension of the embeddings.
        loss: "softmax" over the batch in both directions (CLIP), or "sigmoid" of each pair (SigLIP).
        image_size: Side in pixels, or (height, width). None: the backbone's own.
        in_channels: Channels of the images. Of a module, its own.
        weights: Weights of a whole aligner to start from: see :func:`zoo.weights.load`.
        image_weights: Weights of the image tower to start from, those of a classifier or masked autoencoder.
        tokenizer: "bytes", "words" (fitted to the training captions and kept in checkpoints), "open_clip", or the path
            of a tokeniser's files.
        context_length: Most tokens of a text; longer ones are cut, and keep their end token.
        vocab_size: Number of words for "words". None: the tokeniser's own.
        text_backbone: An ``nn.Module`` from tokens (N, L) to features (N, D) that states D as ``num_features``. None:
            :class:`zoo.alignment.text.TextTransformer` of the sizes below.
        text_width: Width of the text transformer.
        text_depth: Number of its blocks.
        text_heads: Attention heads of a block.
        text_pool: What is read of a text: the "end" token, the "mean" of all, the "last" position or the "first".
        text_causal: Let each token see only those before it.
        text_act: Activation of the text transformer: "gelu", "quick_gelu" (OpenAI's weights) or "gelu_tanh" (SigLIP).
        text_mask_padding: Hide padding from the other tokens.
        text_dropout: Dropout of the text transformer.
        image_projection: "linear" layer from the image tower's features to embeddings, or "none" (LiT).
        text_projection: The same of the text tower.
        projection_bias: Bias of the linear layers.
        positives: What else than its own caption describes an image: nothing ("paired"), "equal" captions, or
            "entailed" ones, by ``facts`` and ``claims``: see :func:`zoo.alignment.positives.positive_keys`.
        scale_init: Initial factor of the cosines. None: 1/0.07 for softmax, 10 for sigmoid.
        bias_init: Initial bias of the sigmoid loss; "auto": -ln(B - 1) of the first batch, B over all processes, which
            takes effect when a Trainer starts to train.
        max_scale: Largest scale, kept after each step of the optimizer, as its least one, 1. None: neither. "auto":
            100 for softmax, None for sigmoid.
        scale_lr: Learning rate of scale and bias as a multiple of ``lr``.
        chunk: Rows of the batch that the loss takes at a time, so that memory does not grow with the batch's square.
            None: all.
        micro_batch: Pairs that the towers take at a time, each computed twice (Gao et al. 2021, GradCache): the
            gradient is that of the whole batch. None: all.
        lock_image: Lock the image tower: frozen and in evaluation mode (LiT).
        lock_text: Lock the text tower.
        unlock_groups: Last groups of a locked tower, by timm's ``group_matcher``, that learn all the same.
        unlock_every: Epochs after which one more group learns, and again. Meanwhile gradients of all groups are
            computed, so that all processes and compiled code do the same in each epoch. None: no more groups.
        layer_decay: Each layer's learning rate is this times the next one's, in both towers.
        class_names: Classes to predict the probabilities of, by name, in the place of embeddings.
        templates: Texts with a place {} for a class name.
        grad_checkpointing: Recompute activations of both towers in the backward pass: less memory, more time.
        optimizer: Name of an optimizer of timm.
        lr: Learning rate, as it is used: nothing is scaled by batch size.
        weight_decay: Not applied to norms, biases, position embeddings, tokens, scale and bias.
        betas: Betas of the optimizer. None: its own.
        eps: Epsilon of the optimizer. None: its own.
        warmup_epochs: Linear warm-up, in epochs; a half-cosine follows.
        min_lr: Learning rate that the half-cosine ends at.
        compile: Compile both towers in place, as ``model.compile()`` does.

    Raises:
        ValueError: For an unknown name or choice, with what there is to choose from; for numbers out of range; for a
            tokeniser that lacks a token that the text tower needs; for weights that do not fit.
    """

    backbone: Any  # modules; Any, because what they have beyond torch's is timm's
    text: Any
    hparams: Any  # Lightning calls it a mapping, and makes its keys attributes
    changeable: ClassVar = ("class_names", "templates")  # while a run goes on: they say how it is evaluated
    compiled: ClassVar = ("encode_image", "encode_tokens")
    exports: ClassVar = {"embeddings": "exported_embeddings"}

    def __init__(
        self,
        image_backbone: str | nn.Module = "vit_base_patch16_224",
        embed_dim: int = 512,
        loss: Loss = "softmax",
        image_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        weights: str | None = None,
        image_weights: str | None = None,
        tokenizer: str = "bytes",
        context_length: int = 77,
        vocab_size: int | None = None,
        text_backbone: str | nn.Module | None = None,
        text_width: int = 512,
        text_depth: int = 12,
        text_heads: int = 8,
        text_pool: Pool = "end",
        text_causal: bool = True,
        text_act: Act = "gelu",
        text_mask_padding: bool = False,
        text_dropout: float = 0.0,
        image_projection: Projection = "linear",
        text_projection: Projection = "linear",
        projection_bias: bool = False,
        positives: Positives = "paired",
        scale_init: float | None = None,
        bias_init: float | Literal["auto"] = BIAS,
        max_scale: float | Literal["auto"] | None = "auto",
        scale_lr: float = 1.0,
        chunk: int | None = None,
        micro_batch: int | None = None,
        lock_image: bool = False,
        lock_text: bool = False,
        unlock_groups: int = 0,
        unlock_every: int | None = None,
        layer_decay: float = 1.0,
        class_names: Sequence[str] | None = None,
        templates: Sequence[str] = ("a photo of a {}.",),
        grad_checkpointing: bool = False,
        optimizer: str = "adamw",
        lr: float = 5e-4,
        weight_decay: float = 0.2,
        betas: tuple[float, float] | None = (0.9, 0.98),
        eps: float | None = None,
        warmup_epochs: float = 0.0,
        min_lr: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["image_backbone", "text_backbone", "weights", "image_weights"])
        hp = self.hparams
        hp["image_backbone"] = name_of(image_backbone)
        hp["text_backbone"] = None if text_backbone is None else name_of(text_backbone)
        check_choices(loss=(loss, Loss), positives=(positives, Positives))
        check_training(hp)
        check_ranges(
            image_size=(image_size, 1, None),
            in_channels=(in_channels, 1, None),
            embed_dim=(embed_dim, 1, None),
            context_length=(context_length, 1, None),
            bias_init=(None if bias_init == "auto" else bias_init, -math.inf, None),
            max_scale=(None if max_scale == "auto" else max_scale, 1, None),
            scale_lr=(scale_lr, 0, None),
            chunk=(chunk, 1, None),
            micro_batch=(micro_batch, 1, None),
            unlock_groups=(unlock_groups, 0, None),
            unlock_every=(unlock_every, 1, None),
        )
        check_above(scale_init=(scale_init, 0, math.inf))
        given = isinstance(image_backbone, nn.Module)
        self.backbone = create_backbone(
            image_backbone,
            img_size=None if given else image_size,
            in_chans=None if given else in_channels,
        )
        self.tokenizer = create_tokenizer(tokenizer, vocab_size)
        check_special(self.tokenizer, text_pool, text_mask_padding)
        self.text = (
            text_backbone
            if text_backbone is not None
            else TextTransformer(
                self.tokenizer.vocab_size,
                width=text_width,
                depth=text_depth,
                heads=text_heads,
                context_length=context_length,
                pool=text_pool,
                causal=text_causal,
                mask_padding=text_mask_padding,
                act=text_act,
                dropout=text_dropout,
                pad_id=self.tokenizer.pad_id,
                end_id=self.tokenizer.end_id,
            )
        )
        self.image_projection = projection(
            image_projection, feature_width(self.backbone), embed_dim, projection_bias, "image"
        )
        self.text_projection = projection(text_projection, feature_width(self.text), embed_dim, projection_bias, "text")
        scale = SCALES[loss] if scale_init is None else scale_init
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(scale), dtype=torch.float32))
        if loss == "sigmoid":
            bias = BIAS if bias_init == "auto" else bias_init
            self.logit_bias = nn.Parameter(torch.full((1,), bias, dtype=torch.float32))
        self.max_scale = LARGEST[loss] if max_scale == "auto" else max_scale
        self.unlocked = unlock_groups
        check_unlocking(list(self.locked()), unlock_groups, unlock_every)
        self.step_log = StepLog()
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.val_gap, self.test_gap = ModalityGap(embed_dim), ModalityGap(embed_dim)
        if grad_checkpointing:
            recompute_activations(self.backbone)
            recompute_activations(self.text)
        if image_weights is not None:
            rank_zero_info(str(load_weights(self.backbone, image_weights)))
        if weights is not None:
            rank_zero_info(str(load_weights(self, weights)))
        if compile:
            self.compile()

    # The technique.

    def forward(self, images: Tensor, captions: Sequence[str] | Tensor) -> Tensor:
        """Logits (B, N), scale * cosine (+ bias), of images (B, C, H, W) and N texts or tokens (N, L)."""
        logits = self.logit_scale.float().exp() * self.encode_image(images) @ self.encode_text(captions).T
        return logits + self.logit_bias.float() if self.hparams.loss == "sigmoid" else logits

    def encode_image(self, images: Tensor) -> Tensor:
        """Embeddings (B, embed_dim) of images (B, C, H, W), unit vectors in float32 at least."""
        features = pooled(self.backbone(images), self.backbone, len(images), "image")
        return unit(self.image_projection(features))

    def encode_text(self, captions: Sequence[str] | Tensor) -> Tensor:
        """Embeddings (N, embed_dim) of N texts, or of their tokens (N, L); unit vectors in float32 at least."""
        return self.encode_tokens(captions if isinstance(captions, Tensor) else self.tokens(captions))

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Embeddings (N, embed_dim) of tokens (N, L) int64."""
        features = pooled(self.text(tokens), self.text, len(tokens), "text")
        return unit(self.text_projection(features))

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Tokens (N, context_length) int64 of texts, on the module's device."""
        tokens, _ = tokenize(self.tokenizer, captions, self.hparams.context_length)
        return tokens.to(self.device, non_blocking=True)

    def losses(self, batch: CaptionBatch) -> dict[str, Tensor]:
        """Losses of a batch by name, scalars; training descends their sum."""
        tokens = self.tokens(batch.captions)
        images, texts = self.encode_image(batch.images), self.encode_tokens(tokens)
        return {"contrastive": self.contrastive_loss(images, texts, batch, tokens)}

    def contrastive_loss(self, images: Tensor, texts: Tensor, batch: CaptionBatch, tokens: Tensor) -> Tensor:
        """The contrastive loss of embeddings (B, embed_dim) of images and of one text each, with tokens (B, L)."""
        hp = self.hparams
        keys = positive_keys(hp.positives, batch, tokens)
        scale = self.logit_scale.exp()
        if hp.loss == "sigmoid":
            return contrastive_sigmoid_loss(images, texts, scale, self.logit_bias, keys, chunk=hp.chunk)
        return contrastive_softmax_loss(images, texts, scale, keys, chunk=hp.chunk)

    # Training.

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of the images it takes.

        Raises:
            ValueError: If neither ``image_size`` nor the backbone says so.
        """
        channels, size = own_image_shape(self.backbone)
        size = size if self.hparams.image_size is None else to_2tuple(self.hparams.image_size)
        if size is None:
            raise ValueError(f"{type(self.backbone).__name__} does not say what images it takes: set image_size")
        return channels or self.hparams.in_channels, *size

    def locked(self) -> Iterator[tuple[str, nn.Module]]:
        """The towers that are locked, by their side."""
        if self.hparams.lock_image:
            yield "image", self.backbone
        if self.hparams.lock_text:
            yield "text", self.text

    def train(self, mode: bool = True) -> Self:
        """Sets the mode; what is locked stays in evaluation mode."""
        super().train(mode)
        for side, tower in self.locked():
            evaluate_locked(tower, locked_names(tower, self.unlocked, side))
        return self

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = self.losses(read(batch, first=True))
        loss = torch.stack(list(losses.values())).sum()
        values = {"train/loss": loss, "train/scale": self.logit_scale.exp().squeeze()}
        if self.hparams.loss == "sigmoid":
            values["train/bias"] = self.logit_bias.squeeze()
        if len(losses) > 1:
            values |= {f"train/loss_{name}": value for name, value in losses.items()}
        self.step_log(self, {name: value.detach() for name, value in values.items()}, prog_bar=("train/loss",))
        return loss

    def start_evaluation(self, stage: str) -> None:
        loaders.start(self, f"{stage}_loss", f"{stage}_gap")

    def evaluation_step(self, batch: Any, batch_idx: int, dataloader_idx: int, stage: str) -> None:
        found = read(batch)
        tokens = self.tokens(found.captions)
        images, texts = self.encode_image(found.images), self.encode_tokens(tokens)
        first = torch.searchsorted(found.owners, torch.arange(len(images), device=images.device))
        loss, gap = (loaders.metric(self, f"{stage}_{name}", dataloader_idx) for name in ("loss", "gap"))
        loss.update(self.contrastive_loss(images, texts[first], read(batch, first=True), tokens[first]), len(images))
        gap.update(images, texts)
        loaders.log(self, {f"{stage}/loss": loss, f"{stage}/gap": gap})

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.encode_image(batches.images(batch))

    def configure_optimizers(self) -> Any:
        hp = self.hparams
        optimizer = optim.create_optimizer(
            self, hp.optimizer, hp.lr, hp.weight_decay, layer_decay=hp.layer_decay, betas=hp.betas, eps=hp.eps
        )
        return optim.lightning_schedule(self, optimizer, hp.warmup_epochs, hp.min_lr)


def unit(vectors: Tensor) -> Tensor:
    """Vectors (N, D) divided by their length, in float32 at least."""
    return F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)
