"""ImageTextAligner: two towers, one space, and how they learn from pairs of images and captions.

Radford et al. 2021 (CLIP), Zhai et al. 2023 (SigLIP), Zhai et al. 2022 (LiT). Other than there, embeddings are
normalised and losses computed in float32 at least, and captions that are cut keep their end token.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from zoo._lightning import LightningModule
from zoo.alignment.caching import in_micro_batches
from zoo.alignment.evaluation import AlignerEvaluation
from zoo.alignment.layouts import CONVENTIONS, TakesWeights, set_conventions
from zoo.alignment.loss_watch import LossWatch
from zoo.alignment.positives import Positives, positive_keys
from zoo.alignment.predictions import ZeroShotPredictions
from zoo.alignment.settings import BIAS, Loss, Projection, check_arguments, max_scale_of, scale_of
from zoo.alignment.text import Act, Pool
from zoo.alignment.towers import LocksTowers, create_projection, create_text_tower, pooled, unit
from zoo.alignment.zero_shot import TEMPLATES, prompts
from zoo.checkpoints import SafeLoading
from zoo.common import batch as batches
from zoo.common import optim
from zoo.common.backbones import TakesImages, create_backbone, name_of, recompute_activations
from zoo.common.captions import CaptionBatch, read
from zoo.common.compiling import Compilable
from zoo.common.log import StepLog
from zoo.common.seeding import differ_between_ranks
from zoo.common.texts import ReadsTexts
from zoo.common.tokenizers import Tokenizer, create_tokenizer
from zoo.losses import contrastive_sigmoid_loss, contrastive_softmax_loss
from zoo.sharding import Shardable


class ImageTextAligner(
    SafeLoading,
    Compilable,
    ZeroShotPredictions,
    AlignerEvaluation,
    Shardable,
    TakesImages,
    ReadsTexts,
    TakesWeights,
    LocksTowers,
    LightningModule,
):
    """Image and text towers whose embeddings of a pair are close: CLIP, SigLIP, LiT.

    Batch: ``(images (B, C, H, W), captions)``, see :mod:`zoo.common.captions`. Training learns from the first caption
    of each image, evaluation looks at all. Logs ``train/loss``, ``train/scale``, ``train/bias``, ``val/loss`` within
    the batches of a process, ``val/gap``, the distance of the mean embeddings of images and texts (Liang et al. 2022),
    ``val/i2t_r1`` and ``val/t2i_r1`` and so on (:class:`zoo.metrics.retrieval.CrossModalRecall`), and the same for
    ``test``. Predicts embeddings (B, embed_dim), unit vectors, or probabilities (B, classes) of classes by their names.

    Args:
        image_backbone: A timm network by name, without the tag of weights; or an ``nn.Module`` from images (B, C, H, W)
            to features (B, D): any timm model, or one that states D as ``num_features``.
        embed_dim: Dimension of the embeddings.
        loss: "softmax" over the batch in both directions (CLIP), or "sigmoid" of each pair (SigLIP).
        image_size: Side in pixels, or (height, width). None: the backbone's own.
        in_channels: Channels of the images. Of a module, its own.
        image_options: More arguments of the timm network, by timm's names, ``{"patch_size": 4}`` say.
        weights: Weights of a whole aligner to start from: see :func:`zoo.weights.load`.
        image_weights: Weights of the image tower to start from, those of a classifier or masked autoencoder.
        tokenizer: "bytes", "words" (fitted to the training captions and kept in checkpoints), "open_clip", or the path
            of a tokeniser's files; or a tokeniser: see :func:`zoo.common.tokenizers.create_tokenizer`.
        context_length: Most tokens of a text; longer ones are cut, and keep their end token.
        vocab_size: Number of words for "words". None: the tokeniser's own.
        text_backbone: An ``nn.Module`` from tokens (N, L) to features (N, D) that states D as ``num_features``. None:
            :class:`zoo.alignment.text.TextTransformer` of the sizes below.
        text_width: Width of the text transformer.
        text_depth: Number of its blocks.
        text_heads: Attention heads of a block.
        text_pool: What is read of a text: the "end" token, the "mean" of all, the "last" position or the "first".
        text_causal: Let each token see only those before it.
        text_act: Activation of the text tower: "gelu", "quick_gelu" (OpenAI's weights) or "gelu_tanh" (SigLIP). None:
            as ``weights`` were trained, if they say so, or else "gelu".
        text_norm_eps: Epsilon of its LayerNorms. None: as ``weights`` say, or else 1e-5.
        text_mlp_width: Hidden width of its MLPs. None: four times ``text_width``.
        text_mask_padding: Hide padding from the other tokens.
        text_dropout: Dropout of the text transformer.
        image_act: Activation of the image tower, as ``text_act``. None: as ``weights`` say, or else its own.
        image_norm_eps: Epsilon of its LayerNorms. None: as ``weights`` say, or else its own.
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
        class_names: Classes to predict the probabilities of, by name, in the place of embeddings. None: those of the
            data that a checkpoint is of, if it knows them. Empty: embeddings are predicted.
        templates: Texts with a place {} for a class name; of several, a class is the mean.
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
    compiled: ClassVar[tuple[str, ...]] = ("encode_image", "encode_tokens")

    def __init__(
        self,
        image_backbone: str | nn.Module = "vit_base_patch16_224",
        embed_dim: int = 512,
        loss: Loss = "softmax",
        image_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        image_options: Mapping[str, Any] | None = None,
        weights: str | None = None,
        image_weights: str | None = None,
        tokenizer: str | Tokenizer | Mapping[str, Any] = "bytes",
        context_length: int = 77,
        vocab_size: int | None = None,
        text_backbone: str | nn.Module | None = None,
        text_width: int = 512,
        text_depth: int = 12,
        text_heads: int = 8,
        text_pool: Pool = "end",
        text_causal: bool = True,
        text_act: Act | None = None,
        text_norm_eps: float | None = None,
        text_mlp_width: int | None = None,
        text_mask_padding: bool = False,
        text_dropout: float = 0.0,
        image_act: Act | None = None,
        image_norm_eps: float | None = None,
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
        templates: Sequence[str] = TEMPLATES,
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
        self.save_hyperparameters(ignore=["image_backbone", "text_backbone", "tokenizer", "weights", "image_weights"])
        hp = self.hparams
        hp["image_backbone"], hp["text_backbone"] = name_of(image_backbone), text_backbone and name_of(text_backbone)
        check_arguments(hp)
        self.tokenizer = create_tokenizer(tokenizer, vocab_size=vocab_size if isinstance(tokenizer, str) else None)
        self.classes = class_names
        prompts(class_names or ("class",), templates)
        hp["tokenizer"] = tokenizer if isinstance(tokenizer, str) else self.tokenizer.state()["kind"]
        given = isinstance(image_backbone, nn.Module)
        images = {} if given else {"img_size": image_size, "in_chans": in_channels}
        self.backbone = create_backbone(image_backbone, **dict(image_options or {}) | images)
        if given:
            self.settle_images()
        self.text = create_text_tower(text_backbone, self.tokenizer, hp)
        set_conventions(self, {name: hp[name] for name in CONVENTIONS})
        self.image_projection = create_projection("image", image_projection, self.backbone, embed_dim, projection_bias)
        self.text_projection = create_projection("text", text_projection, self.text, embed_dim, projection_bias)
        self.logit_scale = nn.Parameter(torch.tensor([math.log(scale_of(hp))], dtype=torch.float32))
        self.register_parameter("logit_bias", None)  # unused, it would stop DistributedDataParallel
        if loss == "sigmoid":
            bias = BIAS if bias_init == "auto" else bias_init
            self.logit_bias = nn.Parameter(torch.tensor([bias], dtype=torch.float32))
        if grad_checkpointing:
            recompute_activations(self.backbone)
            recompute_activations(self.text)
        self.step_log, self.loss_watch = StepLog(), LossWatch()
        self.make_metrics(embed_dim)
        self.take_weights(image_weights, weights)
        self.lock()
        if compile:
            self.compile()

    # The technique.

    def forward(self, images: Tensor, captions: Sequence[str] | Tensor) -> Tensor:
        """Logits (B, N), scale * cosine (+ bias), of images (B, C, H, W) and N texts or tokens (N, L)."""
        logits = self.scale * self.encode_image(images) @ self.encode_text(captions).T
        return logits if self.logit_bias is None else logits + self.logit_bias

    def encode_image(self, images: Tensor) -> Tensor:
        """Embeddings (B, embed_dim) of images (B, C, H, W), unit vectors in float32 at least."""
        features = pooled(self.backbone(images), self.backbone, images.shape[0], "image")
        return unit(self.image_projection(features))

    def encode_text(self, captions: Sequence[str] | Tensor) -> Tensor:
        """Embeddings (N, embed_dim) of N texts, or of their tokens (N, L); unit vectors in float32 at least."""
        return self.encode_tokens(captions if isinstance(captions, Tensor) else self.tokens(captions))

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Embeddings (N, embed_dim) of tokens (N, L) int64."""
        features = pooled(self.text(tokens), self.text, tokens.shape[0], "text")
        return unit(self.text_projection(features))

    @property
    def scale(self) -> Tensor:
        """Factor (1,) of the cosines, one over the temperature."""
        return self.logit_scale.exp()

    def losses(self, batch: CaptionBatch) -> dict[str, Tensor]:
        """Losses of a batch by name, scalars; training descends their sum.

        Args:
            batch: With one caption an image.
        """
        tokens = self.tokens(batch.captions)
        images, texts = self.encode_pairs(batch.images, tokens)
        return {"contrastive": self.contrastive_loss(images, texts, batch, tokens)}

    def encode_pairs(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, embed_dim) of images and of tokens (B, L), in training ``micro_batch`` at a time."""
        size = self.hparams.micro_batch if self.training else None
        if size is None:
            return self.encode_image(images), self.encode_tokens(tokens)
        return in_micro_batches(self.encode_image, images, size), in_micro_batches(self.encode_tokens, tokens, size)

    def contrastive_loss(self, images: Tensor, texts: Tensor, batch: CaptionBatch, tokens: Tensor) -> Tensor:
        """Contrastive loss of pairs, in training over all processes.

        Args:
            images: (B, embed_dim), embeddings.
            texts: (B, embed_dim), those of one caption of each image.
            batch: Images and these captions.
            tokens: (B, L), of these captions.
        """
        hp = self.hparams
        keys = positive_keys(hp.positives, batch, tokens)
        options: dict[str, Any] = {"chunk": hp.chunk, "sync_dist": self.training}
        if self.logit_bias is None:
            return contrastive_softmax_loss(images, texts, self.scale, keys, **options)
        return contrastive_sigmoid_loss(images, texts, self.scale, self.logit_bias, keys, **options)

    # Training.

    def training_forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of images (B, C, H, W) and of as many texts of full length, for ``zoo cost``."""
        tokens = torch.full((len(images), self.hparams.context_length), self.tokenizer.end_id or 0, dtype=torch.int64)
        return self.encode_image(images), self.encode_tokens(tokens.to(images.device))

    def predicting_forward(self, images: Tensor) -> Tensor:
        """Embeddings of images, for ``zoo cost``."""
        return self.encode_image(images)

    def random_targets(self, images: Tensor, generator: torch.Generator) -> list[Any]:
        """Captions of images (B, C, H, W), with facts and claims where these are learned from, to measure with."""
        numbers = torch.randint(10**9, (len(images),), generator=generator).tolist()
        self.fit_words(lambda: list(map(str, numbers)))
        entailed = self.hparams.positives == "entailed"
        return [{"captions": str(n)} | ({"facts": [n], "claims": [[n]]} if entailed else {}) for n in numbers]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        differ_between_ranks(self)

    @torch.no_grad()
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Settles the bias "auto" by the first batch, unless it has been learned already."""
        if self.hparams.loss == "sigmoid" and self.hparams.bias_init == "auto" and not batch_idx:
            self.configure_model()  # under FSDP2 an evaluation leaves weights whole, of which no change would last
            pairs = len(batches.images(batch)) * self.trainer.world_size
            settled = torch.full_like(self.logit_bias, -math.log(max(1, pairs - 1)))
            self.logit_bias.copy_(torch.where(self.logit_bias == BIAS, settled, self.logit_bias))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = self.losses(pairs := read(batch, first=True))
        loss = torch.stack(list(losses.values())).sum()
        values = {"train/loss": loss, "train/scale": self.scale.squeeze()}
        if self.logit_bias is not None:
            values["train/bias"] = self.logit_bias.squeeze()
        if len(losses) > 1:
            values |= {f"train/loss_{name}": value for name, value in losses.items()}
        if self.step_log(self, {name: value.detach() for name, value in values.items()}, prog_bar=("train/loss",)):
            self.loss_watch.tell(self, pairs)
        return loss

    @torch.no_grad()
    def keep_scale(self, *_: Any) -> None:
        """Brings the scale back into its range, as a hook behind each step of an optimizer."""
        if (largest := max_scale_of(self.hparams)) is not None:
            self.logit_scale.clamp_(0, math.log(largest))

    def configure_optimizers(self) -> Any:
        hp = self.hparams
        optimizer = optim.create_optimizer(
            self,
            hp.optimizer,
            hp.lr,
            hp.weight_decay,
            layer_decay=hp.layer_decay,
            betas=hp.betas,
            eps=hp.eps,
            encoders=("backbone", "text"),
            lr_scale=dict.fromkeys(("logit_scale", "logit_bias"), hp.scale_lr),
            apart=self.waiting(),
        )
        optimizer.register_step_post_hook(self.keep_scale)
        return optim.lightning_schedule(self, optimizer, hp.warmup_epochs, hp.min_lr)
