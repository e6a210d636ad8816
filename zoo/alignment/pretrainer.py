"""ImageTextFusion: an aligner with a fusion of both towers on top, which matches, captions and fills in words.

Li et al. 2021 (ALBEF, arXiv 2107.07651) for contrast before fusion, matching with hard negatives, masked words and
momentum distillation; Li et al. 2022 (BLIP, arXiv 2201.12086) and Yu et al. 2022 (CoCa, arXiv 2205.01917) for
captioning beside them. Other than there:

- No queue of past embeddings: the contrastive loss has the batches of all processes, as large as gradient caching
  allows, with the present weights. The teacher of momentum distillation softens targets alone, and is without dropout.
- One fusion reads in both directions and from left to right, by its mask. BLIP has a self-attention for each.
- The text tower is the aligner's, which starts from scratch: no half of a BERT. It has to be causal to write captions,
  and masked words have the words behind them from the fusion alone.
- Hard negatives are those of a process, without a floor under their weights.
- No CapFilt (BLIP), no attentional pooling (CoCa), no fusion without towers (ViLT): see docs/alignment.md.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from zoo.alignment.aligner import ImageTextAligner
from zoo.alignment.distillation import Teacher, ramp, soft_contrastive_loss
from zoo.alignment.fusion import FusionTransformer, image_features, text_features
from zoo.alignment.generation import beam_search
from zoo.alignment.heads import check_heads, create_head, head_losses, verdicts
from zoo.alignment.positives import Positives
from zoo.alignment.settings import BIAS, Loss, Projection
from zoo.alignment.text import Act, Pool
from zoo.alignment.words import masked_tokens, real_tokens
from zoo.alignment.zero_shot import TEMPLATES
from zoo.common import loaders
from zoo.common.captions import CaptionBatch, read
from zoo.common.precision import MeanMetric
from zoo.common.tokenizers import Tokenizer, words_of


class ImageTextFusion(ImageTextAligner):
    """Image and text towers with a fusion of both, whose heads match, caption and fill in words.

    An aligner: batches, embeddings, zero-shot classification, retrieval, and what is logged and predicted are those of
    :class:`zoo.ImageTextAligner`, with losses of the heads as ``train/loss_matching``, ``train/loss_captioning`` and
    ``train/loss_masking``, each times its weight, and the same for ``val`` and ``test``. ``train/loss`` is the sum,
    ``val/loss`` the contrastive loss alone. A head of weight 0 does not exist.

    Args:
        image_backbone: A timm network by name, or an ``nn.Module`` like it: its ``forward_features`` gives tokens
            (B, T, D) or maps (B, D, H, W), and its ``forward_head`` pools them.
        embed_dim: Dimension of the embeddings.
        matching: Weight of image-text matching: whether an image and a caption are a pair, or a hard negative.
        captioning: Weight of captioning: the next token of a caption, given the image.
        masking: Weight of masked words: some of a caption's tokens, given the image and the others.
        fusion_depth: Number of the fusion's blocks.
        fusion_heads: Attention heads of a block. None: ``text_heads``.
        fusion_dropout: Dropout of the fusion.
        mask_rate: Share of the tokens to mask.
        momentum: Momentum of the teacher, 0.995 in ALBEF, whose similarities and words are targets beside the right
            ones. 0: no teacher. With the softmax loss.
        alpha: Weight of the teacher's targets, reached in a straight line over the first epoch.
        loss: "softmax" or "sigmoid", of the contrast.
        image_size: Side in pixels, or (height, width). None: the backbone's own.
        in_channels: Channels of the images. Of a module, its own.
        image_options: More arguments of the timm network, by timm's names.
        weights: Weights to start from, with a fusion or without: see :func:`zoo.weights.load`.
        image_weights: Weights of the image tower to start from, those of a classifier or masked autoencoder.
        tokenizer: "bytes", "words", "open_clip" or a path; with a mask token for masked words, and start and end tokens
            for captions.
        context_length: Most tokens of a text.
        vocab_size: Number of words for "words". None: the tokeniser's own.
        text_backbone: A :class:`zoo.alignment.text.TextTransformer`. None: one of the sizes below.
        text_width: Width of the text transformer, and of the fusion.
        text_depth: Number of the text transformer's blocks.
        text_heads: Attention heads of a block.
        text_pool: What is embedded of a text: the "end" token, the "mean", the "last" position or the "first".
        text_causal: Let each token see only those before it, as captioning needs.
        text_act: Activation of the text transformer: "gelu", "quick_gelu" or "gelu_tanh". None: as ``weights`` say.
        text_norm_eps: Epsilon of its LayerNorms. None: as ``weights`` say.
        text_mlp_width: Hidden width of its MLPs. None: four times ``text_width``.
        text_mask_padding: Hide padding from the other tokens.
        text_dropout: Dropout of the text transformer.
        image_act: Activation of the image tower. None: as ``weights`` say, or else its own.
        image_norm_eps: Epsilon of its LayerNorms. None: as ``weights`` say, or else its own.
        image_projection: "linear" layer from the image tower's features to embeddings, or "none".
        text_projection: The same of the text tower.
        projection_bias: Bias of the linear layers.
        positives: Positives of the contrast: "paired", "equal" or "entailed". No negative to match is ever an equal
            caption, or one that is true of the image, whatever this is.
        scale_init: Initial factor of the cosines. None: 1/0.07 for softmax, 10 for sigmoid.
        bias_init: Initial bias of the sigmoid loss, or "auto".
        max_scale: Largest scale, None, or "auto": 100 for softmax.
        scale_lr: Learning rate of scale and bias as a multiple of ``lr``.
        chunk: Rows of the batch that the contrastive loss takes at a time. None: all.
        micro_batch: Pairs that the towers take at a time, each computed twice. None: all. The fusion takes all.
        lock_image: Lock the image tower.
        lock_text: Lock the text tower.
        unlock_groups: Last groups of a locked tower that learn all the same.
        unlock_every: Epochs after which one more group learns, and again. None: no more groups.
        layer_decay: Each layer's learning rate is this times the next one's, in both towers.
        class_names: Classes to predict the probabilities of, by name, in the place of embeddings.
        templates: Texts with a place {} for a class name.
        grad_checkpointing: Recompute activations of towers and fusion in the backward pass: less memory, more time.
        optimizer: Name of an optimizer of timm.
        lr: Learning rate, as it is used.
        weight_decay: Not applied to norms, biases, position embeddings, tokens, scale and bias.
        betas: Betas of the optimizer. None: its own.
        eps: Epsilon of the optimizer. None: its own.
        warmup_epochs: Linear warm-up, in epochs; a half-cosine follows.
        min_lr: Learning rate that the half-cosine ends at.
        compile: Compile towers and fusion in place, as ``model.compile()`` does.

    Raises:
        ValueError: As of :class:`zoo.ImageTextAligner`; without a head; for a tower that gives no tokens; for a
            tokeniser or a text tower that a head cannot work with.
    """

    tokenizer: Any  # whose special tokens are there
    fusion: Any
    matching_head: Any
    captioning_head: Any
    masking_head: Any
    teacher: Any
    compiled: ClassVar = ("encode_image", "encode_tokens", "image_features", "text_features", "fuse")
    unpredicted: ClassVar = ("teacher", "captioning_head", "masking_head", "matching_head", "fusion")

    def __init__(
        self,
        image_backbone: str | nn.Module = "vit_base_patch16_224",
        embed_dim: int = 256,
        matching: float = 1.0,
        captioning: float = 1.0,
        masking: float = 1.0,
        fusion_depth: int = 6,
        fusion_heads: int | None = None,
        fusion_dropout: float = 0.0,
        mask_rate: float = 0.15,
        momentum: float = 0.0,
        alpha: float = 0.4,
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
        text_depth: int = 6,
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
        lr: float = 1e-4,
        weight_decay: float = 0.02,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        warmup_epochs: float = 0.0,
        min_lr: float = 0.0,
        compile: bool = False,
    ) -> None:
        given = locals()
        shared = {name: given[name] for name in inspect.signature(ImageTextAligner).parameters}
        super().__init__(**shared | {"weights": None, "compile": False})  # which the fusion has to be there for
        self.heads = check_heads(self.hparams, self.backbone, self.text, self.tokenizer)
        width = self.text.num_features
        self.fusion = FusionTransformer(
            width, self.backbone.num_features, fusion_depth, fusion_heads or text_heads, dropout=fusion_dropout
        )
        self.fusion.set_grad_checkpointing(grad_checkpointing)
        for name in self.heads:
            setattr(self, f"{name}_head", create_head(name, width, self.tokenizer.vocab_size))
        self.val_heads, self.test_heads = (nn.ModuleDict({name: MeanMetric() for name in self.heads}) for _ in range(2))
        self.take_weights(None, weights)
        if momentum:
            fused = ("fusion", "masking_head") if masking else ()
            self.teacher = Teacher(self, ("backbone", "image_projection", "text", "text_projection", *fused))
        if compile:
            self.compile()

    # The technique.

    def image_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Image tokens (B, T, D) and embeddings (B, embed_dim) of images (B, C, H, W)."""
        return image_features(self, images, self.hparams.micro_batch if self.training else None)

    def text_features(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Text tokens (N, L, W) and embeddings (N, embed_dim) of tokens (N, L) int64."""
        return text_features(self, tokens, self.hparams.micro_batch if self.training else None)

    def fuse(self, *args: Any, **kwargs: Any) -> Tensor:
        """Fused text tokens, as of :class:`zoo.alignment.fusion.FusionTransformer`."""
        return self.fusion(*args, **kwargs)

    @torch.no_grad()
    def match(self, images: Tensor, captions: Sequence[str] | Tensor) -> Tensor:
        """Probabilities (N,) that images (N, C, H, W) and as many captions, or tokens (N, L), are pairs; float32.

        Learned from hard negatives: it ranks anew what the embeddings put first, and knows little of the rest.
        """
        self._require("matching", images, captions)
        tokens = captions if isinstance(captions, Tensor) else self.tokens(captions)
        fused, real = self._fused(images, tokens)
        return verdicts(self.matching_head, fused, real).float().softmax(1)[:, 1]

    @torch.no_grad()
    def generate(self, images: Tensor, max_length: int | None = None, beams: int = 1) -> Tensor:
        """Tokens (B, at most max_length) of captions of images (B, C, H, W), filled up with end tokens.

        Keys and values of the images are computed once. Those of the words are not kept: captions are short, and a
        cache would have to go through the text tower as well.

        Args:
            images: Normalised floats.
            max_length: Most tokens, start and end included. None: ``context_length``, which is the most.
            beams: Candidates to keep of each caption; 1 is greedy.
        """
        self._require("captioning")
        tokenizer, longest = self.tokenizer, self.hparams.context_length
        if max_length is not None and max_length > longest:
            raise ValueError(f"max_length is {max_length}: expected at most context_length, {longest}")
        keys_values = self.fusion.read(self.image_features(images)[0])
        owners = torch.arange(len(images), device=images.device).repeat_interleave(beams)

        def next_logits(tokens: Tensor) -> Tensor:
            fused = self.fuse(self.text.hidden(tokens), keys_values, owners=owners, causal=True)
            return self.captioning_head(fused[:, -1])

        forbidden = torch.ones(tokenizer.vocab_size, dtype=torch.bool)
        forbidden[self.words] = forbidden[tokenizer.end_id] = False
        start, end, forbidden = tokenizer.start_id, tokenizer.end_id, forbidden.to(images.device)
        return beam_search(next_logits, len(images), start, end, max_length or longest, beams, forbidden)

    def caption(self, images: Tensor, max_length: int | None = None, beams: int = 1) -> list[str]:
        """Captions of images (B, C, H, W), as of :meth:`generate`."""
        return [self.tokenizer.decode(row) for row in self.generate(images, max_length, beams).tolist()]

    @torch.no_grad()
    def fill(self, images: Tensor, texts: Sequence[str]) -> list[str]:
        """Texts with each "[MASK]" in them filled in, by the likeliest token of each by itself.

        Args:
            images: (N, C, H, W), one for each text.
            texts: N, with "[MASK]" where a token is missing: a word, or with bytes a byte.
        """
        self._require("masking", images, texts)
        tokens = masked_tokens(self.tokenizer, texts, self.hparams.context_length).to(images.device)
        words = self.words.to(images.device)
        likeliest = words[self.masking_head(self._fused(images, tokens)[0])[..., words].argmax(2)]
        filled = torch.where(tokens == self.tokenizer.mask_id, likeliest, tokens)
        return [self.tokenizer.decode(row[real].tolist()) for row, real in zip(filled, self.real(tokens), strict=True)]

    @cached_property
    def words(self) -> Tensor:
        """Tokens (W,) that texts are made of, as of :func:`zoo.common.tokenizers.words_of`, on the CPU."""
        return words_of(self.tokenizer)

    def fit_words(self, texts: Callable[[], Sequence[str]]) -> None:
        """Fits a tokeniser of words, whose :attr:`words` are others then."""
        super().fit_words(texts)
        vars(self).pop("words", None)

    def _require(self, head: str, images: Sequence[Any] | Tensor = (), texts: Sequence[Any] | Tensor = ()) -> None:
        if head not in self.heads:
            raise ValueError(f"{head} is 0: this model was built without that head")
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images and {len(texts)} texts: expected one for each")

    def real(self, tokens: Tensor) -> Tensor:
        """Mask (N, L), true where tokens (N, L) are no padding."""
        return real_tokens(tokens, self.tokenizer.pad_id, self.tokenizer.end_id)

    def _fused(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Fused tokens (N, L, W) of images and as many texts, in both directions, and which are no padding."""
        real = self.real(tokens)
        return self.fuse(self.text.hidden(tokens), self.fusion.read(self.image_features(images)[0]), real), real

    # Training.

    def losses(self, batch: CaptionBatch) -> dict[str, Tensor]:
        """Losses of a batch by name, each times its weight; training descends their sum."""
        tokens, alpha, taught = self.tokens(batch.captions), self.teaching(), None
        images, texts = self.image_features(batch.images), self.text_features(tokens)
        contrastive = self.contrastive_loss(images[1], texts[1], batch, tokens)
        if alpha:
            with torch.no_grad():
                taught, slow_images = image_features(self.teacher, batch.images)
                _, slow_texts = text_features(self.teacher, tokens)
            soft = soft_contrastive_loss(images[1], texts[1], slow_images, slow_texts, self.scale)
            contrastive = (1 - alpha) * contrastive + alpha * soft
        return {"contrastive": contrastive, **head_losses(self, batch, tokens, images, texts, alpha, taught)}

    def teaching(self) -> float:
        """Weight of the teacher's targets in this step: 0 without one, and in evaluation."""
        trainer: Any = self._trainer
        if not (self.hparams.momentum and self.training):
            return 0.0
        if trainer is None or not trainer.training:
            return float(self.hparams.alpha)
        return ramp(self.hparams.alpha, trainer.current_epoch, trainer.fit_loop.batch_idx, trainer.num_training_batches)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.hparams.momentum:
            self.teacher.follow(self, self.hparams.momentum)

    def start_evaluation(self, stage: str) -> None:
        super().start_evaluation(stage)
        loaders.start(self, f"{stage}_heads")

    def evaluation_step(self, batch: Any, batch_idx: int, dataloader_idx: int, stage: str) -> None:
        """Adds the losses of the heads, with the same negatives and masks in every epoch."""
        super().evaluation_step(batch, batch_idx, dataloader_idx, stage)
        found = read(batch, first=True)
        tokens = self.tokens(found.captions)
        images, texts = self.image_features(found.images), self.text_features(tokens)
        generator = torch.Generator(self.device).manual_seed(batch_idx)
        losses = head_losses(self, found, tokens, images, texts, generator=generator)
        metrics = loaders.metric(self, f"{stage}_heads", dataloader_idx)
        for name, loss in losses.items():
            metrics[name].update(loss, len(found.images))
        loaders.log(self, {f"{stage}/loss_{name}": metrics[name] for name in losses})
