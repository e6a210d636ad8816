"""MAEPretrainer: a plain ViT as encoder, a decoder that is thrown away after training, and their training."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo._lightning import LightningModule, rank_zero_info
from zoo.checkpoints import SafeLoading
from zoo.common import batch as batches
from zoo.common import loaders, optim, pictures
from zoo.common.backbones import name_of
from zoo.common.compiling import Compilable
from zoo.common.evaluation import Evaluation
from zoo.common.log import StepLog, in_words
from zoo.common.norms import restore_layer_norm_eps, set_layer_norm_eps
from zoo.common.precision import MeanMetric
from zoo.common.ranges import check_ranges, check_training
from zoo.common.seeding import differ_between_ranks
from zoo.mae.decoders import Decoder, create_decoder, predicted_patches
from zoo.mae.encoder import check_given, encode_visible, fix_positions, initialize, plain_vit
from zoo.mae.layouts import MAELayout
from zoo.mae.outputs import MAEOutput, Reconstruction
from zoo.mae.patches import (
    denormalize_patches,
    normalize_patches,
    patchify,
    random_masking,
    take,
    unpatchify,
    visible_patches,
)
from zoo.mae.peers import PEERS
from zoo.metrics.knn import LeaveOneOutKNN
from zoo.sharding import Shardable
from zoo.weights import load as load_weights

WORDS = {"acc_knn": "accuracy of nearest neighbours", "loss_visible": "loss of visible patches"}
"""Metrics of its own."""


class MAEPretrainer(SafeLoading, Compilable, Evaluation, Shardable, LightningModule):
    """Masked autoencoder.

    Batch: images (B, C, H, W) in any form that :mod:`zoo.common.batch` reads; what lies beside them is not learned
    from. Logs ``train/loss``; ``val/loss`` over removed and ``val/loss_visible`` over visible patches, each image with
    the same mask in every epoch; where validation data has classes, ``val/acc_knn``, the leave-one-out accuracy of 20
    nearest neighbours by their features. Classes are integers (B,), negative ones not known, that not all differ. The
    same for ``test``; several loaders are counted apart, as :mod:`zoo.common.loaders` says. Predicts pooled features
    (B, D).

    ``ViTClassifier(weights=...)`` starts from a checkpoint of this; ``zoo.weights.save(model.backbone, FILE)`` writes
    the encoder alone, by timm's names.

    Args:
        backbone: A timm ViT by name, which gets the paper's initial weights and fixed sin-cos positions; or a plain
            ``timm.models.vision_transformer.VisionTransformer``, taken as it is with its own size and weights.
        image_size: Side in pixels, or (height, width). For a backbone by name.
        in_channels: Channels of the images.
        mask_ratio: Share of the patches to remove: floor(L * (1 - mask_ratio)) of L stay.
        norm_pix_loss: Whether each patch to be predicted is first given mean 0 and variance 1.
        decoder: "self", the paper's; or "cross", CrossMAE's (:class:`zoo.mae.decoders.CrossDecoder`): less than
            half the time for a small ViT, and as good to fine-tune from; for linear probes nothing is claimed of it.
        decoder_dim: Width of the decoder.
        decoder_depth: Number of the decoder's blocks.
        decoder_heads: Attention heads of a decoder's block; they divide its width.
        weights: Weights to start from: see :func:`zoo.weights.load`.
        predict_ratio: Share of all patches that "cross" predicts in a training step, at most ``mask_ratio``. None:
            0.25. The decoder "self" predicts all that is removed.
        patch_size: Side of a patch in pixels. None: the backbone's own.
        width: Embedding dimension of the encoder. None: the backbone's own.
        depth: Number of the encoder's blocks. None: the backbone's own.
        heads: Attention heads of an encoder's block. None: the backbone's own.
        class_token: Whether the encoder has one, for a backbone by name. Without, features are the mean over patches.
        reg_tokens: Register tokens (Darcet et al. 2024). 0: the backbone's own number.
        norm_eps: Epsilon of LayerNorm, in encoder and decoder. None: as ``weights`` were trained, if they say so
            (Hugging Face's config.json, a checkpoint of ours), or else 1e-6.
        grad_checkpointing: Recompute encoder blocks in the backward pass: less memory, more time.
        optimizer: Name of an optimizer of timm.
        lr: Learning rate, as it is used: the paper's is 1.5e-4 times the total batch size / 256.
        weight_decay: Not applied to norms, biases, position embeddings and tokens.
        betas: Betas of the optimizer. None: its own.
        warmup_epochs: Linear warm-up, in epochs; a half-cosine follows.
        min_lr: Learning rate that the half-cosine ends at.
        compile: Compile in place, as ``model.compile()`` does.

    Raises:
        ValueError: For an unknown name or choice, with what there is to choose from; for a backbone that is no plain
            ViT; for an image that patches do not fill; for a mask that leaves nothing or all; for weights of another
            kind.
    """

    backbone: Any  # modules; Any, because what they have beyond torch's is timm's
    decoder: Any
    hparams: Any  # Lightning calls it a mapping, and makes its keys attributes
    layer_norm_eps: ClassVar = True  # norm_eps is LayerNorm's, for zoo.weights to set
    changeable: ClassVar = ("predict_ratio",)  # while a run goes on: they say how it is evaluated
    unpredicted: ClassVar = ("decoder",)  # parts that no prediction needs
    compiled: ClassVar = ("masked_loss",)
    exports: ClassVar = {"features": "exported_features"}
    foreign_weights: ClassVar = MAELayout()
    peers: ClassVar = PEERS
    watched: ClassVar = ("val/acc_knn",)
    metric_text = staticmethod(partial(in_words, words=WORDS))

    def __init__(
        self,
        backbone: str | nn.Module = "vit_base_patch16_224",
        image_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
        decoder: Decoder = "self",
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        weights: str | None = None,
        predict_ratio: float | None = None,
        patch_size: int | None = None,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        class_token: bool = True,
        reg_tokens: int = 0,
        norm_eps: float | None = None,
        grad_checkpointing: bool = False,
        optimizer: str = "adamw",
        lr: float = 1.5e-4,
        weight_decay: float = 0.05,
        betas: tuple[float, float] | None = (0.9, 0.95),
        warmup_epochs: float = 0.0,
        min_lr: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone", "weights"])
        self.hparams["backbone"] = name_of(backbone)
        check_training(self.hparams)
        check_ranges(
            image_size=(image_size, 1, None),
            in_channels=(in_channels, 1, None),
            patch_size=(patch_size, 1, None),
            width=(width, 1, None),
            depth=(depth, 1, None),
            heads=(heads, 1, None),
            reg_tokens=(reg_tokens, 0, None),
            norm_eps=(norm_eps, 0, None),
            mask_ratio=(mask_ratio, -math.inf, None),  # which of them leave something depends on the patches
            predict_ratio=(predict_ratio, -math.inf, None),
            decoder_dim=(decoder_dim, 1, None),
            decoder_depth=(decoder_depth, 1, None),
            decoder_heads=(decoder_heads, 1, None),
        )
        given = isinstance(backbone, nn.Module)
        sizes: dict[str, Any] = {"patch_size": patch_size, "embed_dim": width, "depth": depth, "num_heads": heads}
        if not given:
            sizes |= {"img_size": image_size, "in_chans": in_channels, "class_token": class_token}
            sizes |= {"global_pool": "token" if class_token else "avg", "fc_norm": False}
        self.backbone = plain_vit(backbone, reg_tokens=reg_tokens or None, **sizes)
        if grad_checkpointing:
            self.backbone.set_grad_checkpointing(True)

        embed = self.backbone.patch_embed
        if given:
            check_given(self.backbone, image_size, in_channels)
        self.hparams["image_size"] = embed.img_size if given else image_size  # for whoever reads the checkpoint
        self.patch_size, self.grid_size = embed.patch_size, embed.grid_size
        if norm_pix_loss and embed.proj.in_channels * math.prod(embed.patch_size) < 2:
            raise ValueError("a patch of one value has no variance: set norm_pix_loss to false, or larger patches")
        self.visible = visible_patches(embed.num_patches, mask_ratio)
        self.decoder = create_decoder(decoder, self.backbone, decoder_dim, decoder_depth, decoder_heads)
        self.predicted = predicted_patches(decoder, embed.num_patches, self.visible, predict_ratio)
        if norm_eps is not None:
            set_layer_norm_eps(self, norm_eps)
        initialize(self.decoder)
        if not given:
            initialize(self.backbone)
            fix_positions(self.backbone)

        self.step_log = StepLog()
        self.val_metrics, self.test_metrics = make_metrics(), make_metrics()
        if weights is not None:
            report = load_weights(self, weights)
            if "backbone.norm.weight" in report.fresh:
                raise ValueError(
                    f"{weights} has no final norm: it is a classifier that pools before it, no pretraining"
                )
            rank_zero_info(str(report))
        if compile:
            self.compile()

    # The technique.

    def forward(self, images: Tensor, noise: Tensor | None = None) -> MAEOutput:
        """Loss, predictions for all patches, and the mask, of images (B, C, H, W).

        Args:
            images: Normalised floats.
            noise: (B, L); the patches of least noise stay visible. None: uniformly random.
        """
        patches, visible, removed = self._mask(images, noise)
        ordered = self.decoder.everywhere(encode_visible(self.backbone, patches, visible), visible, removed)
        order = torch.cat([visible, removed], dim=1)
        prediction = torch.empty_like(ordered).scatter(1, order[:, :, None].expand_as(ordered), ordered)
        mask = torch.ones(order.shape, dtype=torch.float32, device=order.device).scatter(1, visible, 0.0)
        loss = (self._errors(prediction, patches) * mask).sum() / mask.sum()
        return MAEOutput(loss, prediction, mask)

    def masked_loss(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """The loss of :meth:`forward` alone, at less cost; of the decoder "cross", on a random subset."""
        patches, visible, removed = self._mask(images, noise)
        removed = removed[:, : self.predicted]
        prediction = self.decoder(encode_visible(self.backbone, patches, visible), visible, removed)
        return self._errors(prediction, take(patches, removed)).mean()

    def encode(self, images: Tensor) -> Tensor:
        """Tokens (B, prefix + L, D) after the final norm, nothing masked: class token, registers, patches in order."""
        self.check_images(images.shape[1:])
        return self.backbone.forward_features(images)

    def features(self, images: Tensor) -> Tensor:
        """Embeddings (B, D), nothing masked: the class token, or without one the mean over patches."""
        tokens = self.encode(images)
        return tokens[:, self.backbone.num_prefix_tokens :].mean(1) if self.backbone.cls_token is None else tokens[:, 0]

    def exported_features(self, images: Tensor) -> dict[str, Tensor]:
        """The ``features`` (B, D) of :meth:`features`."""
        return {"features": self.features(images)}

    @torch.no_grad()
    def reconstruct(self, images: Tensor, noise: Tensor | None = None) -> Reconstruction:
        """Original, masked image, prediction and their combination, of images (B, C, H, W); noise as of forward."""
        _, prediction, mask = self(images, noise)
        patches, removed = patchify(images, self.patch_size), mask[:, :, None] > 0
        norm_pix = bool(self.hparams.norm_pix_loss)
        prediction = denormalize_patches(prediction, patches) if norm_pix else prediction.float()
        drawn = patches.masked_fill(removed, 0.0), prediction, torch.where(removed, prediction, patches.float())
        masked, prediction, paste = (unpatchify(each, self.patch_size, self.grid_size) for each in drawn)
        return Reconstruction(images, masked, prediction, paste, norm_pix)

    def _mask(self, images: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Patches (B, L, pixels), and the indices of visible and removed ones."""
        self.check_images(images.shape[1:])
        patches = patchify(images, self.patch_size)
        if noise is None:
            noise = torch.rand(patches.shape[:2], dtype=torch.float32, device=images.device)
        elif noise.shape != patches.shape[:2]:
            raise ValueError(f"noise is {tuple(noise.shape)}: expected {tuple(patches.shape[:2])}, one for each patch")
        return patches, *random_masking(noise, self.visible)

    def _errors(self, prediction: Tensor, patches: Tensor) -> Tensor:
        """Mean squared error of each patch, float32."""
        target = normalize_patches(patches) if self.hparams.norm_pix_loss else patches.float()
        return (prediction.float() - target).square().mean(-1)

    # Training.

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of the images it takes."""
        embed = self.backbone.patch_embed
        return embed.proj.in_channels, *embed.img_size

    def check_images(self, shape: Sequence[int]) -> None:
        """Raises ValueError for the shape (C, H, W) of images that it does not take."""
        batches.check_shape(shape, self.input_shape)

    def training_forward(self, images: Tensor) -> Tensor:
        """The loss of a training step, which computes less than :meth:`forward`."""
        return self.masked_loss(images)

    @torch.no_grad()
    def pictures(self, batch: Any) -> dict[str, Tensor]:
        """Images (B, 3, h, w) in [0, 1]: original, masked, prediction and paste side by side."""
        images = batches.images(batch)
        panels = self.reconstruct(images, self._fixed_noise(images, 0))
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        row = torch.cat([panel.clamp(low, high) for panel in panels[:4]], dim=3)
        caption = "original, masked, prediction, paste" + (" (with true mean, std)" if panels[4] else "")
        return {"reconstruction": pictures.captioned(row, [caption] * len(row), [None] * len(row))}

    def _fixed_noise(self, images: Tensor, seed: int) -> Tensor:
        generator = torch.Generator(images.device).manual_seed(seed)
        shape = len(images), self.backbone.patch_embed.num_patches
        return torch.rand(shape, dtype=torch.float32, generator=generator, device=images.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        restore_layer_norm_eps(self, checkpoint)

    def on_fit_start(self) -> None:
        differ_between_ranks(self)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.masked_loss(batches.images(batch))
        self.step_log(self, {"train/loss": loss.detach()}, prog_bar=("train/loss",))
        return loss

    def start_evaluation(self, stage: str) -> None:
        loaders.start(self, f"{stage}_metrics")

    def evaluation_step(self, batch: Any, batch_idx: int, dataloader_idx: int, stage: str) -> None:
        images = batches.images(batch)
        _, prediction, mask = self(images, self._fixed_noise(images, batch_idx))
        errors = self._errors(prediction, patchify(images, self.patch_size))
        metrics = loaders.metric(self, f"{stage}_metrics", dataloader_idx)
        metrics["loss"].update(errors, mask)
        metrics["loss_visible"].update(errors, 1 - mask)
        if batches.has_labels(batch):
            metrics["acc_knn"].update(self.features(images), batches.images_and_labels(batch)[1])
        loaders.log(self, {f"{stage}/{name}": metrics[name] for name in ("loss", "loss_visible")})

    def end_evaluation(self, stage: str) -> None:
        """Logs the accuracy of nearest neighbours, of each loader that has classes."""
        for index in loaders.numbers(self._trainer):
            metric = loaders.metric(self, f"{stage}_metrics", index)["acc_knn"]
            if metric.update_called:
                accuracy = metric.compute()
                if metric.has_classes:
                    loaders.report(self, {f"{stage}/acc_knn": accuracy}, index)
                metric.reset()  # it holds the features of all images

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.features(batches.images(batch))

    def prediction_rows(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Rows of :class:`zoo.callbacks.WritePredictions`: the features of each image, one column each."""
        return [{f"feature{i}": f"{value:.6g}" for i, value in enumerate(row)} for row in outputs.float().tolist()]

    def named_results(self, outputs: Tensor, top: int = 5) -> list[dict[str, Any]]:
        """Results of predictions: the features (D,) of each image."""
        return [{"features": row} for row in outputs]

    def reconstructions(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) with the removed patches as predicted; the same are removed of all."""
        return self.reconstruct(images, self._fixed_noise(images[:1], 0).expand(len(images), -1)).paste

    def configure_optimizers(self) -> Any:
        hp = self.hparams
        optimizer = optim.create_optimizer(self, hp.optimizer, hp.lr, hp.weight_decay, betas=hp.betas)
        return optim.lightning_schedule(self, optimizer, hp.warmup_epochs, hp.min_lr)


def make_metrics() -> Any:
    """Metrics of an evaluation, by the name they are logged as."""
    return nn.ModuleDict({"loss": MeanMetric(), "loss_visible": MeanMetric(), "acc_knn": LeaveOneOutKNN()})
