"""RotationPretrainer: a small convolutional network that sees images in four rotations."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rotnet.layouts import RotationLayout
from rotnet.peers import PEERS
from zoo._lightning import LightningModule, rank_zero_info
from zoo.checkpoints import SafeLoading
from zoo.common import batch as batches
from zoo.common import loaders, optim, pictures
from zoo.common.compiling import Compilable
from zoo.common.evaluation import Evaluation
from zoo.common.log import StepLog, in_words
from zoo.common.precision import MeanMetric
from zoo.common.seeding import differ_between_ranks
from zoo.sharding import Shardable
from zoo.weights import load as load_weights


class RotationPretrainer(SafeLoading, Compilable, Evaluation, Shardable, LightningModule):
    """Rotation predictor.

    Batch: square images (B, C, H, H) in any form that :mod:`zoo.common.batch` reads; labels are not learned from. Logs
    ``train/loss``, ``val/loss``, ``val/acc_rotation``, and the same for ``test``. Predicts logits (B, 4) of images as
    they are.

    Args:
        image_size: Side in pixels.
        in_channels: Channels of the images.
        width: Channels of the first convolution; the others have twice and four times as many.
        weights: Weights to start from: see :func:`zoo.weights.load`.
        optimizer, lr, weight_decay: Of the optimizer, a name of timm's.
        warmup_epochs: Linear warm-up, in epochs; a half-cosine follows.
    """

    hparams: Any
    foreign_weights: ClassVar = RotationLayout()
    peers: ClassVar = PEERS
    watched: ClassVar = ("val/acc_rotation",)
    exports: ClassVar = {"rotation": "exported_rotation"}
    metric_text = staticmethod(partial(in_words, words={"acc_rotation": "accuracy of rotations"}))

    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 3,
        width: int = 16,
        weights: str | None = None,
        optimizer: str = "adamw",
        lr: float = 3e-3,
        weight_decay: float = 0.05,
        warmup_epochs: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["weights"])
        sizes = (in_channels, width, 2 * width, 4 * width)
        layers = [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(sizes)]
        self.backbone = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))
        self.head = nn.Linear(4 * width, 4)
        self.step_log = StepLog()
        self.val_metrics, self.test_metrics = make_metrics(), make_metrics()
        if weights is not None:
            rank_zero_info(str(load_weights(self, weights)))

    # The technique.

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 4) of how often images (B, C, H, H) were turned by a right angle."""
        return self.head(self.backbone(images).mean((2, 3)))

    def rotations(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (4B, C, H, H) in all four rotations, and how often each was turned, (4B,)."""
        turns = torch.arange(4, device=images.device).repeat_interleave(len(images))
        return torch.cat([images.rot90(turn, (2, 3)) for turn in range(4)]), turns

    # What the zoo may ask.

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.hparams.in_channels, self.hparams.image_size, self.hparams.image_size

    def check_images(self, shape: Sequence[int]) -> None:
        batches.check_shape(shape, self.input_shape)

    def training_forward(self, images: Tensor) -> Tensor:
        return self(self.rotations(images)[0])

    @torch.no_grad()
    def pictures(self, batch: Any) -> dict[str, Tensor]:
        images, turns = self.rotations(batches.images(batch))
        found = self(images).argmax(1)
        captions = [f"{90 * turn} deg" for turn in found.tolist()]
        return {"rotations": pictures.captioned(images, captions, (found == turns).tolist())}

    def prediction_rows(self, outputs: Tensor) -> list[dict[str, Any]]:
        probabilities = outputs.float().softmax(1).tolist()
        return [{"upright": f"{row[0]:.4f}", "degrees": 90 * row.index(max(row))} for row in probabilities]

    def named_results(self, outputs: Tensor, top: int = 5) -> list[dict[str, Any]]:
        return [{"degrees": 90 * turns} for turns in outputs.argmax(1).tolist()]

    def exported_rotation(self, images: Tensor) -> dict[str, Tensor]:
        return {"logits": self(images)}

    # Steps.

    def on_fit_start(self) -> None:
        differ_between_ranks(self)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, turns = self.rotations(batches.images(batch))
        loss = F.cross_entropy(self(images).float(), turns)
        self.step_log(self, {"train/loss": loss.detach()}, prog_bar=("train/loss",))
        return loss

    def start_evaluation(self, stage: str) -> None:
        loaders.start(self, f"{stage}_metrics")

    def evaluation_step(self, batch: Any, batch_idx: int, dataloader_idx: int, stage: str) -> None:
        images, turns = self.rotations(batches.images(batch))
        logits, metrics = self(images).float(), loaders.metric(self, f"{stage}_metrics", dataloader_idx)
        metrics["loss"].update(F.cross_entropy(logits, turns, reduction="none"))
        metrics["acc_rotation"].update((logits.argmax(1) == turns).float())
        loaders.log(self, {f"{stage}/{name}": metric for name, metric in metrics.items()})

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self(batches.images(batch))

    def configure_optimizers(self) -> Any:
        hp = self.hparams
        optimizer = optim.create_optimizer(self, hp.optimizer, hp.lr, hp.weight_decay)
        return optim.lightning_schedule(self, optimizer, hp.warmup_epochs, 0.0)


def make_metrics() -> nn.ModuleDict:
    return nn.ModuleDict({"loss": MeanMetric(), "acc_rotation": MeanMetric()})
