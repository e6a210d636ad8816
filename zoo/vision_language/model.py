"""VisionLanguageModel: a vision tower, a connector, and a language model that reads image tokens among its own.

Liu et al. 2023, "Visual Instruction Tuning" (LLaVA), arXiv 2304.08485, with connectors of LLaVA-1.5, BLIP-2, Qwen-VL,
Idefics2 and InternVL. Other than there, answers are learned from the mean over a batch's answer tokens in float32, and
evaluation finds an answer right where each of its tokens is the likeliest after those before it: what greedy writing
would have written, in one pass.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo._lightning import LightningModule
from zoo.checkpoints import SafeLoading
from zoo.common import optim
from zoo.common.backbones import TakesImages, create_backbone, name_of, recompute_activations
from zoo.common.compiling import Compilable
from zoo.common.conversations import IMAGE_PLACE, ConversationBatch, read
from zoo.common.log import StepLog
from zoo.common.packed import Packing
from zoo.common.ranges import check_ranges, check_training
from zoo.common.seeding import differ_between_ranks
from zoo.common.tokenizers import Tokenizer, create_tokenizer
from zoo.sharding import Shardable
from zoo.vision_language.connectors import create_connector
from zoo.vision_language.evaluation import AnswerEvaluation
from zoo.vision_language.language_models import create_language_model
from zoo.vision_language.parts import take_weights
from zoo.vision_language.reading import ReadsConversations
from zoo.vision_language.sequences import Format, Rows
from zoo.vision_language.stages import TrainsParts
from zoo.vision_language.vision import (
    PackedTower,
    as_tokens,
    dry_run,
    image_features,
    image_tokens,
    unread_parameters,
)
from zoo.vision_language.writing import WritesAnswers


class VisionLanguageModel(
    SafeLoading,
    Compilable,
    AnswerEvaluation,
    WritesAnswers,
    TrainsParts,
    Shardable,
    TakesImages,
    ReadsConversations,
    LightningModule,
):
    """Language model that answers questions about images.

    Batch: ``(images, conversations)``, see :mod:`zoo.common.conversations`: images (N, C, H, W), or a list of images of
    any size for a backbone that takes such; each sample has as many of them as ``<image>`` stands in its prompts, and
    may have none. Answers are learned, prompts are not. Logs ``train/loss``, ``val/loss``, ``val/acc`` and, where the
    data names kinds and subsets, ``val/acc_KIND``, ``val/acc_SUBSET`` and ``val/acc_SUBSET_KIND``; ``test`` also what
    is answered by another sample's images and without any, ``test/shuffled_acc`` and ``test/text_acc``, and which of
    given choices is likeliest, ``test/choice_acc``. Predicts answers.

    Args:
        backbone: Vision tower: a timm network by name, or as a module; or a :class:`zoo.packed_vit.PackedViT`.
        connector: From the tower's tokens to the language model's: "linear", "mlp", "merge", "resampler" or "query",
            see :mod:`zoo.vision_language.connectors`.
        connector_options: More arguments of the connector, by its names.
        language_model: The path of a causal language model of Hugging Face's, or a module as of
            :mod:`zoo.vision_language.language_model`. None: a :class:`zoo.vision_language.CausalTransformer` of the
            sizes below.
        image_size: Side in pixels, or (height, width). None: the backbone's own.
        in_channels: Channels of the images. Of a module, its own.
        image_options: More arguments of the timm network, by timm's names.
        image_tokenizer: What turns images of any size into patches, a :class:`zoo.packed_vit.VisionTokenizer`. None:
            the backbone takes images as they are.
        vision_layer: Block of the tower that is read, from the end: -2 in LLaVA. None: its last features, normalised.
        weights: Weights of a whole model to start from, those of the stage before: see :func:`zoo.weights.load`.
        image_weights: Weights of the vision tower to start from, of an aligner, a classifier or a masked autoencoder.
        connector_weights: Weights of the connector alone, of another stage's checkpoint.
        language_weights: Weights of the language model alone, of another stage's checkpoint, whose tokeniser comes
            along, or of a Llama of Hugging Face's.
        tokenizer: "bytes", "words" (fitted to the data's texts and kept in checkpoints), the path of a tokeniser's
            files, or a tokeniser: see :func:`zoo.common.tokenizers.create_tokenizer`.
        context_length: Most tokens of a sample, those of its images among them.
        vocab_size: Number of words for "words". None: the tokeniser's own.
        language_width: Width of the small language model.
        language_depth: Number of its blocks.
        language_heads: Attention heads of a block.
        language_key_heads: Heads of keys and values, each shared by several heads. None: as many as those.
        language_mlp_width: Hidden width of its MLPs. None: 8/3 of its width.
        language_rope_theta: Base of its rotations; a small one tells near positions better apart, and fewer of them.
        language_dropout: Dropout of the small language model.
        turn: Text of a turn before its answer, with a place {} for the prompt.
        system: Text before the first turn.
        before_image: Text before each image, a token that the tokeniser has.
        behind_image: Text behind each image, likewise.
        prompt: What is asked of images that come without a question, in prediction.
        cut: Cut samples that are longer than ``context_length`` and count them. False: refuse them.
        packed: Pack several samples into a row of ``context_length`` tokens in training, first fit.
        vision_lr: Learning rate of the vision tower. 0: it is frozen; None: ``lr``; as of all three parts.
        connector_lr: Learning rate of the connector.
        language_lr: Learning rate of the language model.
        adapters: Adapters of low rank by part, "backbone", "connector" or "language_model": arguments of peft's
            ``LoraConfig``. They learn in the place of that part's weights.
        grad_checkpointing: Recompute activations of tower and language model in the backward pass.
        optimizer: Name of an optimizer of timm.
        lr: Learning rate, as it is used, of those parts that have none of their own.
        weight_decay: Not applied to norms, biases, position embeddings and tokens.
        betas: Betas of the optimizer. None: its own.
        eps: Epsilon of the optimizer. None: its own.
        warmup_epochs: Linear warm-up, in epochs; a half-cosine follows.
        min_lr: Learning rate that the half-cosine of the fastest part ends at; others end proportionally lower.
        compile: Compile language model and tower in place, as ``model.compile()`` does, but for a tower that packs.

    Raises:
        ValueError: For an unknown name or choice; numbers out of range; a stage in which nothing learns; tokens that
            the tokeniser does not have; weights that do not fit.
    """

    backbone: Any  # modules; Any, because what they have beyond torch's is their own
    connector: Any
    language_model: Any
    hparams: Any
    changeable: ClassVar = ("prompt",)
    compiled: ClassVar[tuple[str, ...]] = ("look", "read_rows")
    exports: ClassVar[Mapping[str, str]] = {}  # answers are written token by token: no graph of an image alone

    def __init__(
        self,
        backbone: str | nn.Module = "vit_base_patch16_224",
        connector: str = "mlp",
        connector_options: Mapping[str, Any] | None = None,
        language_model: str | nn.Module | None = None,
        image_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        image_options: Mapping[str, Any] | None = None,
        image_tokenizer: Callable[[Any], Any] | None = None,
        vision_layer: int | None = None,
        weights: str | None = None,
        image_weights: str | None = None,
        connector_weights: str | None = None,
        language_weights: str | None = None,
        tokenizer: str | Tokenizer | Mapping[str, Any] = "bytes",
        context_length: int = 1024,
        vocab_size: int | None = None,
        language_width: int = 256,
        language_depth: int = 4,
        language_heads: int = 4,
        language_key_heads: int | None = None,
        language_mlp_width: int | None = None,
        language_rope_theta: float = 10000.0,
        language_dropout: float = 0.0,
        turn: str = "{} ",
        system: str = "",
        before_image: str = "",
        behind_image: str = "",
        prompt: str = f"{IMAGE_PLACE} describe the image.",
        cut: bool = False,
        packed: bool = False,
        vision_lr: float | None = 0.0,
        connector_lr: float | None = None,
        language_lr: float | None = 0.0,
        adapters: Mapping[str, Mapping[str, Any]] | None = None,
        grad_checkpointing: bool = False,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        warmup_epochs: float = 0.0,
        min_lr: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        given = ["backbone", "language_model", "image_tokenizer", "tokenizer"]
        sources = ["weights", "image_weights", "connector_weights", "language_weights"]
        self.save_hyperparameters(ignore=[*given, *sources])
        hp = self.hparams
        hp["backbone"] = name_of(backbone)
        hp["language_model"] = language_model if language_model is None else name_of(language_model)
        check_training(hp)
        check_ranges(context_length=(context_length, 2, None), vocab_size=(vocab_size, 1, None))
        check_ranges(image_size=(image_size, 1, None), in_channels=(in_channels, 1, None))
        self.tokenizer = create_tokenizer(tokenizer, vocab_size=vocab_size if isinstance(tokenizer, str) else None)
        hp["tokenizer"] = tokenizer if isinstance(tokenizer, str) else self.tokenizer.state()["kind"]
        self.layout = Format(turn, system, before_image, behind_image)
        if self.tokenizer.end_id is None:
            raise ValueError(f"{type(self.tokenizer).__name__} has no end token, which answers end with")
        self.image_tokenizer = image_tokenizer
        is_module = isinstance(backbone, nn.Module)
        images = {} if is_module else {"img_size": image_size, "in_chans": in_channels}
        self.backbone = create_backbone(backbone, **dict(image_options or {}) | images)
        if is_module:
            self.settle_images()
        self.language_model = create_language_model(language_model, self.tokenizer, hp)
        packing, reads = dry_run(self.backbone, self.input_shape[1:], vision_layer)
        self.connector = create_connector(connector, reads, self.language_model.width, **dict(connector_options or {}))
        self.connector.counts(packing)  # which raises for grids that it does not take
        if grad_checkpointing:
            recompute_activations(self.backbone)
            recompute_activations(self.language_model)
        self.step_log = StepLog()
        self.make_metrics()
        take_weights(self, weights, image_weights, connector_weights, language_weights)
        self.freeze_parts()
        if self.trains("backbone"):
            for parameter in unread_parameters(self.backbone, self.input_shape[1:], vision_layer):
                parameter.requires_grad_(False)  # DistributedDataParallel waits for the gradients of all others
        self.adapt(adapters)
        if compile:
            self.compile()

    # The technique.

    def forward(self, images: Tensor | Sequence[Tensor], conversations: Sequence[Any]) -> Tensor:
        """Logits (A, V) of the answers' tokens, all of the first sample's first, each seen from the one before it.

        Args:
            images: (N, C, H, W), or N images (C, H, W).
            conversations: As in a batch.
        """
        return self.answer_logits(read((images, conversations)))[0]

    def answer_logits(self, batch: ConversationBatch) -> tuple[Tensor, Rows]:
        """Logits (A, V) of a batch's answer tokens, and the rows that they were read of."""
        features, counts = self.encode_images(batch.images)
        rows = self.rows(batch.turns, batch.counts, counts, batch.names)
        return self.read_rows(rows, features), rows

    def encode_images(self, images: Tensor | Sequence[Tensor]) -> tuple[Tensor, tuple[int, ...]]:
        """Tokens (T, W) of images for the language model, one image after another, and how many each has."""
        if not len(images):
            return self._of_no_image(), ()
        tokens, packing = self.see(images)
        return tokens, packing.lengths

    def see(self, images: Any) -> tuple[Tensor, Packing]:
        """Tokens (T, W) of images for the language model, and their packing."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains("backbone")):
            read = images if self.image_tokenizer is None else self.image_tokenizer(images)
            packs = isinstance(self.backbone, PackedTower)
            if packs:
                tokens, packing = image_tokens(self.backbone, read, self.hparams.vision_layer)
            else:
                whole = self._checked(read)
                tokens, packing = as_tokens(self.backbone, self.look(whole), whole)
        return self.connector(tokens, packing)

    def _checked(self, images: Any) -> Any:
        """Images as (B, C, H, W), if they are a list of one size. Raises ValueError for those of another shape."""
        listed = isinstance(images, list | tuple) and all(isinstance(each, Tensor) for each in images)
        shapes = {each.shape for each in images} if listed else {images.shape[1:]} if isinstance(images, Tensor) else ()
        for shape in shapes:
            self.check_images(shape)
        return torch.stack(list(images)) if listed and len(shapes) == 1 else images

    def look(self, images: Any) -> Any:
        """Features of images (B, C, H, W), as a timm network gives them."""
        return image_features(self.backbone, images, self.hparams.vision_layer)

    def _of_no_image(self) -> Tensor:
        """Tokens (0, W), which in training come of a blank image: processes agree on what has gradients."""
        if self.training and (self.trains("connector") or self.trains("backbone")):
            blank = torch.zeros(1, *self.input_shape, device=self.device)
            return self.see(blank)[0][:0]
        return torch.empty(0, self.language_model.width, device=self.device)

    def read_rows(self, rows: Rows, features: Tensor) -> Tensor:
        """Logits (A, V) of the answer tokens in rows, with image tokens (T, W) at their places."""
        hidden = self.language_model(self.embedded(rows, features), rows.positions, rows.segments)
        return self.language_model.logits(hidden.flatten(0, 1)[rows.read])

    def loss(self, logits: Tensor, rows: Rows) -> Tensor:
        """Mean cross-entropy of the answer tokens, a scalar in float32 at least."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, rows.targets, reduction="sum") / max(1, len(rows.targets))

    # Training.

    def training_forward(self, images: Tensor) -> Tensor:
        """Logits of a short answer on each of some images (B, C, H, W), for ``zoo cost``."""
        asked = self.random_targets(images, torch.Generator().manual_seed(0))
        return self(images, asked)

    predicting_forward = training_forward

    def random_targets(self, images: Tensor, generator: torch.Generator) -> list[Any]:
        """Conversations on images (B, C, H, W), to measure with: one answer of a word on each."""
        numbers = torch.randint(10**6, (len(images),), generator=generator).tolist()
        self.fit_words(lambda: ["what is in the image?", *map(str, numbers)])
        return [{"turns": [[f"{IMAGE_PLACE} what is in the image?", str(number)]], "images": 1} for number in numbers]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        differ_between_ranks(self)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(*self.answer_logits(read(batch)))
        self.step_log(self, {"train/loss": loss.detach()}, prog_bar=("train/loss",))
        return loss

    def configure_optimizers(self) -> Any:
        hp, rates = self.hparams, self.rates
        optimizer = optim.create_optimizer(
            self,
            hp.optimizer,
            max(rates.values()),
            hp.weight_decay,
            betas=hp.betas,
            eps=hp.eps,
            lr_scale=self.lr_scales(),
        )
        return optim.lightning_schedule(self, optimizer, hp.warmup_epochs, hp.min_lr)
