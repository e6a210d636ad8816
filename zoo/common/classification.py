"""Losses, metrics, pictures and steps of a classifier, between a network and a Trainer."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from timm.data import Mixup
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryAveragePrecision,
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MultilabelAccuracy,
    MultilabelAveragePrecision,
    MultilabelF1Score,
)

from zoo._lightning import LightningModule
from zoo.checkpoints import SafeLoading
from zoo.common import batch as batches
from zoo.common import loaders, norms, optim, pictures
from zoo.common.backbones import name_of
from zoo.common.classes import NamedClasses, names_of
from zoo.common.classification_losses import (
    Exchanged,
    classification_loss,
    create_criterion,
    cross_entropy,
    module_loss,
    watched_metrics,
    weighed_options,
    weight_of,
)
from zoo.common.compiling import Compilable
from zoo.common.evaluation import Evaluation
from zoo.common.label_weights import LabelWeights
from zoo.common.labels import LabelWatch, check_range, is_remote
from zoo.common.log import StepLog
from zoo.common.precision import MeanMetric, Metrics
from zoo.common.protocols import HasSmoothMetric
from zoo.common.ranges import check_ranges, check_training
from zoo.common.results import NamedProbabilities
from zoo.common.seeding import differ_between_ranks
from zoo.sharding import Shardable


def classification_metrics(num_classes: int, multi_label: bool, prefix: str) -> MetricCollection:
    """Top-1 and top-5 accuracy and macro F1; for several labels: accuracy, macro F1 and mean average precision.

    torchmetrics adds up their counts over ranks, so that they are exact under DDP. Average precision keeps all scores.
    """
    metrics: dict[str, Metric | MetricCollection]
    if multi_label and num_classes == 1:  # which torchmetrics' metrics of several labels refuse
        metrics = {"acc": BinaryAccuracy(), "f1": BinaryF1Score(), "ap": BinaryAveragePrecision()}
    elif multi_label:
        metrics = {
            "acc": MultilabelAccuracy(num_classes, average="micro"),
            "f1": MultilabelF1Score(num_classes, average="macro"),
            "ap": MultilabelAveragePrecision(num_classes, average="macro"),
        }
    else:
        metrics = {
            "acc": MulticlassAccuracy(num_classes, average="micro"),
            "f1": MulticlassF1Score(num_classes, average="macro"),
        }
        if num_classes > 5:
            metrics["acc5"] = MulticlassAccuracy(num_classes, average="micro", top_k=5)
    # No groups: torchmetrics would take metrics for one whose counts agree after the first batch, as those of F1 and of
    # top-5 accuracy do if that batch is all right, and from then on would count for one of them only.
    return Metrics(metrics, prefix=prefix, compute_groups=False)


def check_labels(labels: Tensor, num_classes: int, batch_idx: int, multi_label: bool = False) -> None:
    """Raises ValueError for labels that the head has no output for, or of a form that means something else.

    The values are read on the CPU, and on an accelerator in the first batch only: each look makes the host wait.

    Args:
        labels: Classes (B,), integers from 0; with ``multi_label`` (B, num_classes) of 0 and 1, of any dtype.
        num_classes: Number of classes.
        batch_idx: Of the batch that they are of. 0: look at the values, wherever they are.
        multi_label: Several labels an image.
    """
    seen = f"labels are {tuple(labels.shape)} for {num_classes} classes"
    look = labels.numel() and (batch_idx == 0 or not is_remote(labels))
    if multi_label:
        if labels.ndim != 2 or labels.shape[1] != num_classes:
            raise ValueError(f"{seen}, of which an image has several: expected (B, {num_classes}) of 0 and 1")
        if look and not ((labels == 0) | (labels == 1)).all():
            low, high = labels.min().item(), labels.max().item()
            raise ValueError(
                f"labels run from {low:g} to {high:g}: with multi_label each is 0 or 1, and nothing between"
            )
        return
    if labels.ndim != 1:
        hint = ""
        if labels.ndim == 2 and labels.shape[1] == 1:
            hint = ", labels.squeeze(1)"
        elif labels.ndim == 2 and labels.shape[1] == num_classes:
            hint = (
                ", labels.argmax(1) of one-hot ones (mixup and cutmix are the module's own, several labels multi_label)"
            )
        raise ValueError(f"{seen}, of which an image has one: expected (B,), integers from 0{hint}")
    if labels.is_floating_point():
        raise ValueError(f"{seen} and {labels.dtype}: expected integers from 0")
    if look:
        check_range(int(labels.min()), int(labels.max()), num_classes)


class Classifier(SafeLoading, Compilable, Evaluation, Shardable, NamedProbabilities, NamedClasses, LightningModule):
    """The steps of an image classifier. It has no constructor: a technique builds ``backbone`` and ``head`` itself.

    Several loaders of an evaluation are counted apart, as :mod:`zoo.common.loaders` says.

    A subclass sets, in its constructor: ``hparams`` with ``num_classes``, ``multi_label``, ``loss``,
    ``label_smoothing``, ``mixup``, ``cutmix``, ``optimizer``, ``lr``, ``weight_decay``, ``betas``, ``layer_decay``,
    ``warmup_epochs``, ``min_lr``, and if it has them ``loss_options``, ``class_weight``, ``pos_weight``; the modules
    ``backbone`` (images to (B, D) features) and ``head``; and calls :meth:`make_metrics`.
    """

    backbone: Any  # modules; Any, because what they have beyond torch's is timm's
    head: Any
    hparams: Any  # Lightning calls it a mapping, and makes its keys attributes
    exports: ClassVar = {"probabilities": "exported_probabilities"}

    def make_metrics(self, loss: str | nn.Module | None = None) -> None:
        """Checks the choices about labels, and creates loss, metrics, mixup and logs.

        Args:
            loss: A name, or a module, of which ``hparams`` get the name of the class. None: ``hparams["loss"]``.
        """
        hp = self.hparams
        loss = hp.loss if loss is None else loss
        hp["loss"] = name_of(loss)
        least = 1 if hp.multi_label else 2
        if hp.num_classes < least:
            raise ValueError(f"num_classes is {hp.num_classes}: expected at least {least}")
        check_ranges(
            label_smoothing=(hp.label_smoothing, 0, 1),
            mixup=(hp.mixup, 0, None),
            cutmix=(hp.cutmix, 0, None),
        )
        check_training(hp)
        self.criterion = self.make_loss(loss, weighed_options(loss, hp))
        for name in ("class_weight", "pos_weight"):
            if isinstance(hp.get(name), list | tuple):  # of numpy's numbers, say, which a checkpoint must not hold
                hp[name] = [float(weight) for weight in hp[name]]
        self.label_weights = LabelWeights(hp.num_classes, hp.get("class_weight"), hp.get("pos_weight"))
        if hp.multi_label and (hp.mixup or hp.cutmix or hp.label_smoothing):
            raise ValueError("mixup, cutmix and label_smoothing are for one label an image, not for multi_label")
        if hp.loss == "bce" and hp.label_smoothing and (hp.mixup or hp.cutmix):
            raise ValueError(
                "loss 'bce' counts every class of a mixed image as present: it goes with label_smoothing 0"
            )
        self.exchanged: Exchanged | None = None
        self.step_log, self.label_watch = StepLog(), LabelWatch()
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.val_metrics = classification_metrics(hp.num_classes, hp.multi_label, "val/")
        self.test_metrics = classification_metrics(hp.num_classes, hp.multi_label, "test/")
        self.mix = (
            Mixup(hp.mixup, hp.cutmix, label_smoothing=hp.label_smoothing, num_classes=hp.num_classes)
            if hp.mixup or hp.cutmix
            else None
        )

    def read_images(self, batch: Any) -> Any:
        """The images of a batch, as :meth:`features` takes them."""
        return batches.images(batch)

    def features(self, images: Tensor) -> Tensor:
        """Pooled embeddings (B, D) of images (B, C, H, W)."""
        return self.backbone(images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        return self.head(self.features(images))

    def probabilities(self, images: Tensor) -> Tensor:
        """Class probabilities (B, classes), float32: softmax, or a sigmoid for each of several labels."""
        return self.exported_probabilities(images)["probabilities"]

    def exported_probabilities(self, images: Tensor) -> dict[str, Tensor]:
        """Float32 ``logits`` and ``probabilities`` (B, classes) of images (B, C, H, W)."""
        logits = self(images).float()
        return {"logits": logits, "probabilities": logits.sigmoid() if self.hparams.multi_label else logits.softmax(1)}

    @torch.no_grad()
    def pictures(self, batch: Any) -> dict[str, Tensor]:
        """Images (B, 3, h, w) in [0, 1] with the predicted class below them: green if right, red if wrong."""
        images = self.read_images(batch)
        shown = images if isinstance(images, Tensor) else pictures.padded(images)
        classes = self.classes or names_of(getattr(self._trainer, "datamodule", None))
        probability, predicted = self.probabilities(images).max(1)
        captions = [
            f"{pictures.legible_name(classes, index)}: {100 * value:.0f}%"
            for index, value in zip(predicted.tolist(), probability.tolist(), strict=True)
        ]
        right: Sequence[bool | None] = [None] * len(images)
        if batches.has_labels(batch) and not self.hparams.multi_label:
            labels = self.own_labels(batches.images_and_labels(batch, self.read_images)[1])
            right = (predicted == labels).tolist()
            captions = [
                text if is_right else f"{text}\nis {pictures.legible_name(classes, label)}"
                for text, is_right, label in zip(captions, right, labels.tolist(), strict=True)
            ]
        return {"predictions": pictures.captioned(shown, captions, right)}

    def batch_loss(self, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """The mean loss of a batch, which training minimises.

        Args:
            logits: (B, classes).
            targets: As :func:`zoo.common.classification_losses.classification_loss` takes them.
            smoothing: Label smoothing.
        """
        criterion = self.criterion if self.exchanged is None else self.exchanged.loss
        if isinstance(criterion, str):
            return classification_loss(logits, targets, criterion, smoothing, **self.label_weights.of_loss())
        criterion.train(self.training)  # which an exchanged one is not told
        return module_loss(criterion, logits, targets, smoothing)

    def make_loss(self, loss: str | nn.Module, options: Mapping[str, Any] | None = None) -> str | nn.Module:
        """Criterion that :meth:`use_loss` takes, of a loss by name and its options, or a module.

        Raises:
            ValueError: For a loss that does not exist, or does not go with the module's other arguments.
        """
        return create_criterion(loss, options, self.hparams)

    def use_loss(self, loss: str | nn.Module | None, smooth: Any = None) -> None:
        """Trains on another loss from now on. It is no part of the module: neither in its state nor optimized.

        Args:
            loss: Of :meth:`make_loss`. None: the module's own.
            smooth: The loss whose smooth metric evaluation logs. None: the module's own, if it has one.
        """
        is_own = loss is None and smooth is None
        self.exchanged = None if is_own else Exchanged(self.criterion if loss is None else loss, smooth)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Adds a child. Conversions of BatchNorm, and back, end in it: they put each child in anew."""
        super().add_module(name, module)
        if module is not None:
            norms.restore_activations(module)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        trainer: Any = self._trainer
        if stage == "fit" and trainer is not None:  # before callbacks look at the state, and a checkpoint replaces it
            self.label_weights.settle(self, trainer.datamodule)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        differ_between_ranks(self)

    def on_train_start(self) -> None:
        super().on_train_start()
        trainer: Any = self._trainer
        self.label_weights.check_settled(is_continued=trainer.ckpt_path is not None)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = self._images_and_labels(batch, batch_idx)
        if self.mix is not None:
            if len(images) % 2:
                raise ValueError(f"mixup pairs images: {_odd(self._trainer, len(images), batch_idx)}")
            images, labels = self.mix(images.clone(), labels)  # timm mixes in place, and the batch is its owner's
        loss = self.batch_loss(self(images), labels, self.hparams.label_smoothing)
        if self.step_log(self, {"train/loss": loss.detach()}, prog_bar=("train/loss",)):
            self.label_watch.tell(self.num_labels)
        return loss

    def on_train_end(self) -> None:
        self.label_watch.tell(self.num_labels)

    @property
    def _smooth(self) -> Any:
        """The loss whose smooth metric evaluation logs; None for one that has none."""
        found = self.criterion if self.exchanged is None or self.exchanged.smooth is None else self.exchanged.smooth
        return found if isinstance(found, HasSmoothMetric) else None

    @property
    def _is_plain(self) -> bool:
        """Tells whether ``val/loss`` is a cross-entropy as it stands, so that nothing need be logged beside it."""
        plain = isinstance(self.criterion, str) and self.exchanged is None
        return plain and self.label_weights.classes is None and self.label_weights.positives is None

    def start_evaluation(self, stage: str) -> None:
        loaders.start(self, f"{stage}_loss", f"{stage}_metrics")
        if not self._is_plain:
            loaders.start(self, f"{stage}_watched", new=self._new_watched)

    def evaluation_step(self, batch: Any, batch_idx: int, dataloader_idx: int, stage: str) -> None:
        images, labels = self._images_and_labels(batch, 0)  # metrics look at all values, too
        logits = self(images).float()
        mean_loss = loaders.metric(self, f"{stage}_loss", dataloader_idx)
        metrics = loaders.metric(self, f"{stage}_metrics", dataloader_idx)
        found = {f"{stage}/loss": mean_loss, **metrics}
        mean_loss.update(self.batch_loss(logits, labels), weight=self._weight(labels))
        metrics.update(logits, labels.int() if self.hparams.multi_label else labels)
        if not self._is_plain:
            watched = loaders.metric(self, f"{stage}_watched", dataloader_idx)
            watched["cross_entropy"].update(cross_entropy(logits, labels), weight=len(images))
            if "smooth" in watched:
                watched["smooth"].update(logits, labels)
            found |= {f"{stage}/{name}": metric for name, metric in watched.items()}
        loaders.log(self, found)

    def _new_watched(self) -> nn.ModuleDict:
        return watched_metrics(self._smooth, self.hparams.num_classes).to(self.device)

    def _weight(self, labels: Tensor) -> Tensor | int:
        """The weight of a batch in the mean of the loss over an evaluation, as if it were a single batch."""
        criterion = self.criterion if self.exchanged is None else self.exchanged.loss
        weights = self.label_weights.classes
        if criterion != "cross_entropy" or weights is None:
            return len(labels)
        return weight_of(labels, weights)

    def _images_and_labels(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Images, and the model's labels for those of the data, once these are known to be labels."""
        images, labels = batches.images_and_labels(batch, self.read_images)
        check_labels(labels, self.num_labels, batch_idx, self.hparams.multi_label)
        if not self.hparams.multi_label:
            labels = self.label_watch(self, labels, self.num_labels)
        return images, self.own_labels(labels)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.probabilities(self.read_images(batch))

    def configure_optimizers(self) -> Any:
        hp = self.hparams
        optimizer = optim.create_optimizer(
            self, hp.optimizer, hp.lr, hp.weight_decay, layer_decay=hp.layer_decay, betas=hp.betas
        )
        return optim.lightning_schedule(self, optimizer, hp.warmup_epochs, hp.min_lr)


def _odd(trainer: Any, count: int, batch_idx: int) -> str:
    """Advice for a batch that cannot be cut into pairs."""
    size = getattr(trainer.train_dataloader, "batch_size", None) if trainer is not None and trainer.training else None
    if batch_idx and trainer is not None and trainer.is_last_batch and (size is None or size % 2 == 0):
        return f"the last batch of the epoch has {count}, an odd number, set drop_last to true for the training data"
    return f"a batch of {count} is odd, set an even batch_size"
