"""Steps of a detector between its technique and a Trainer: losses, average precision, pictures, predictions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo._lightning import LightningModule, rank_zero_info
from zoo.callbacks import WriteDetections
from zoo.checkpoints import SafeLoading
from zoo.common import batch as batches
from zoo.common import loaders, norms, optim, pictures
from zoo.common.classes import NamedClasses, names_of
from zoo.common.compiling import Compilable
from zoo.common.data_protocols import StatesLearnedRanges
from zoo.common.evaluation import Evaluation
from zoo.common.labels import LabelWatch, is_remote
from zoo.common.log import StepLog
from zoo.common.protocols import HasSizeRanges
from zoo.common.ranges import check_ranges
from zoo.common.results import named_detections
from zoo.common.seeding import differ_between_ranks
from zoo.detection import detections
from zoo.detection.batch import image_id_of, images_and_sizes
from zoo.detection.cells import Cells
from zoo.detection.layers import NormedConv
from zoo.detection.maps import Maps
from zoo.detection.metrics import TotalLosses, in_words
from zoo.detection.peers import random_targets
from zoo.detection.postprocessing import Candidates, fixed_nms, in_range, to_original
from zoo.detection.scale.merging import Merge
from zoo.detection.scale.trident import Branches, check_same_branches
from zoo.detection.scale.views import Cost, cost, pad_multiple, parse_views
from zoo.metrics.average_precision import CocoAveragePrecision
from zoo.sharding import Shardable
from zoo.weights import load as load_weights

LOGGED = {"classification": "loss_class"}
"""Names by which losses are logged, where it is not ``loss_NAME``."""


class Detector(SafeLoading, Compilable, Evaluation, Shardable, NamedClasses, LightningModule):
    """The steps of an object detector. It has no constructor: a technique builds its networks itself.

    A subclass sets ``hparams``, builds its networks (:func:`zoo.detection.features.build_features`), calls
    :meth:`finish`, and provides ``forward`` and, of what that returns, the methods below.

    Attributes:
        loss: Losses of a batch by name, float32 scalars, of predictions and targets; training descends their sum.
        loss_sums: The same before they are divided, summed over each image: a named tuple of tensors (B,).
        sums: Its type.
        mean_losses: The losses by name of such sums over all images.
        candidates: What NMS chooses from, of predictions and the sizes of the images.
        make_cells: The cells of maps of given shapes, in images of a size, on a device.
    """

    backbone: Any  # modules; Any, because what they have beyond torch's is timm's
    hparams: Any  # Lightning calls it a mapping, and makes its keys attributes
    prediction_writer: ClassVar = WriteDetections
    metric_text = staticmethod(in_words)
    sums: ClassVar[Any]
    loss: Callable[..., dict[str, Tensor]]
    loss_sums: Callable[..., Any]
    mean_losses: Callable[[Any], dict[str, Tensor]]
    candidates: Callable[..., Candidates]
    make_cells: Callable[..., Cells]
    maps: Maps
    neck: Any
    pruned: Any
    strides: tuple[float, ...]
    trident: Branches | None
    trained_ranges: Mapping[int, tuple[float, float | None]] | None = None  # by short side, where training had some

    def finish(self, weights: str | None) -> None:
        """Ends the constructor: views, metrics and logs, weights to start from, the order in memory, compilation."""
        if self.hparams.views is not None:
            self.hparams["views"] = [view._asdict() for view in parse_views(self.hparams.views, self.strides[-1])]
        check_ranges(tiles_at_once=(self.hparams.tiles_at_once, 1, None))
        self.step_log, self.label_watch = StepLog(), LabelWatch()
        self.val_losses, self.test_losses = TotalLosses(self.sums), TotalLosses(self.sums)
        self._cells: dict[tuple[Any, ...], Cells] = {}
        if weights is not None:
            rank_zero_info(str(load_weights(self, weights)))
        if self.hparams.channels_last:
            self.to(memory_format=torch.channels_last)
        if self.hparams.compile:
            self.compile()

    def features(self, images: Tensor) -> list[Tensor]:
        """The maps (B, channels, h, w) that the head reads, finest first, of images (B, C, H, W).

        With TridentNet they are (branches * B, channels, h, w), see :attr:`branches`.

        Raises:
            ValueError: For images with other channels than ``in_channels``.
        """
        if images.ndim != 4 or images.shape[1] != self.hparams.in_channels:
            channels = self.hparams.in_channels
            raise ValueError(f"images are {tuple(images.shape)}: expected (B, {channels}, H, W), by in_channels")
        if self.hparams.channels_last:
            images = images.to(memory_format=torch.channels_last)
        maps = self.maps(self.backbone, images)
        return self.neck(
            maps if self.trident is None else self.trident.repeated(maps, self.maps.levels, images.shape[0])
        )

    @property
    def branches(self) -> tuple[int, ...]:
        """Numbers of the branches whose maps a batch has now, one behind the other; (0,) without TridentNet."""
        return (0,) if self.trident is None else self.trident.running()

    def detect(
        self,
        images: Any,
        sizes: Sequence[tuple[int, int]] | None = None,
        original_sizes: Sequence[tuple[int, int]] | None = None,
        views: Sequence[Mapping[str, Any]] | None = None,
        merge: Merge | None = None,
    ) -> list[dict[str, Tensor]]:
        """Detections in images, best first.

        Args:
            images: (B, C, H, W), normalised; or what :meth:`forward` gave for them.
            sizes: (height, width) of each image before padding; boxes end there. None: not padded.
            original_sizes: (height, width) of each image before it was resized; boxes are in pixels of these. None: in
                pixels of the images given.
            views: Views of the images (:class:`zoo.detection.scale.views.View`) in place of the module's own; ``[{}]``
                is plain detection, the only one of what :meth:`forward` gave.
            merge: Merging of what views find, in place of the module's own.

        Returns:
            For each image ``boxes`` (n, 4) xyxy float32, ``scores`` (n,) float32, ``labels`` (n,) int64.

        Raises:
            ValueError: For views that are none, or that the network does not take.
            torch.OutOfMemoryError: For a view that needs more memory than there is. It is named.
        """
        images, maps = (images, None) if isinstance(images, Tensor) else (None, images)
        return detections.detect(self, images, maps, sizes, original_sizes, views, merge)

    def cells(self, maps: Any) -> Cells:
        """The cells that raw predictions are for."""
        key = (maps.shapes, maps.image_size, maps.boxes.device)
        if torch.compiler.is_exporting():  # where sizes may be symbols, and tensors have no values to be kept
            return self.make_cells(*key)
        if key not in self._cells:
            if len(self._cells) >= 32:  # images of many sizes: each set of cells is a few MB
                self._cells.clear()
            with torch.inference_mode(False):  # what an evaluation makes, training uses
                self._cells[key] = self.make_cells(*key)
        return self._cells[key]

    @property
    def shares_counts(self) -> bool:
        """Tells whether losses are divided by counts of all ranks: in training on several."""
        trainer: Any = self._trainer
        return trainer is not None and trainer.training and trainer.world_size > 1

    def over_ranks(self, *counts: Tensor) -> tuple[Tensor, ...]:
        """Means over all ranks of numbers, scalars, that each rank has one of."""
        shared = torch.stack(counts)
        # Not by the strategy's reduce, which begins with a barrier: the host would wait for the device in each step.
        torch.distributed.all_reduce(shared)
        return (shared / self.trainer.world_size).unbind()

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of the images that ``zoo cost`` counts for."""
        return self.hparams.in_channels, *to_2tuple(self.hparams.image_size)

    def view_cost(self) -> Cost | None:
        """Cost of an image of ``image_size`` in the module's views; None without."""
        hp, size, multiple = self.hparams, self.input_shape[1:], pad_multiple(self.maps.strides)
        return None if hp.views is None else cost(hp.views, size, None, hp.tiles_at_once, multiple)

    def check_images(self, shape: Sequence[int]) -> None:
        """Raises ValueError for the shape (C, H, W) of images that it does not take."""
        if shape[0] != self.hparams.in_channels:
            got, expected = "x".join(map(str, shape)), self.hparams.in_channels
            raise ValueError(f"images are {got}, but the model was built for {expected} channels")

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Adds a child. Conversions of BatchNorm, and back, end in it: they put each child in anew."""
        super().add_module(name, module)
        if module is not None:
            norms.restore_activations(module)

    def random_targets(self, images: Tensor, generator: torch.Generator) -> list[dict[str, Tensor]]:
        """Targets for images (B, C, H, W) of a batch to measure with."""
        return random_targets(images, self.hparams.num_classes, generator)

    def train(self, mode: bool = True) -> Self:
        """Sets the mode; BatchNorm whose weights are frozen keeps its statistics as well."""
        super().train(mode)
        others = {each.norm for each in self.modules() if isinstance(each, NormedConv)}  # of neck and box head
        for module in batch_norms(self):  # a part of the backbone may be a head
            frozen = self.hparams.freeze_norm and module not in others
            if frozen or (module.weight is not None and not module.weight.requires_grad):
                module.eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.trained_ranges:
            checkpoint["trained_ranges"] = dict(self.trained_ranges)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_same_branches(self.hparams, checkpoint)
        self.trained_ranges = checkpoint.get("trained_ranges")
        super().on_load_checkpoint(checkpoint)

    @torch.no_grad()
    def pictures(self, batch: Any) -> dict[str, Tensor]:
        """Images (B, 3, h, w) in [0, 1] with what is detected in them, and thin, where it is known, what is there."""
        images, sizes, originals = images_and_sizes(batch)
        classes = self.classes or names_of(getattr(self._trainer, "datamodule", None))
        targets = self._own(batches.images_and_targets(batch)[1]) if batches.has_targets(batch) else None
        found = self.detect(images, sizes, originals)
        for detection, size, original in zip(found, sizes, originals, strict=True):
            detection["boxes"] = to_original(detection["boxes"], original, size)
        return {"detections": pictures.boxed(images, found, targets, classes, threshold=0.4)}

    def on_fit_start(self) -> None:
        super().on_fit_start()
        differ_between_ranks(self)
        data = getattr(self._trainer, "datamodule", None)
        self.trained_ranges = data.learned_ranges if isinstance(data, StatesLearnedRanges) else None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, targets = self._checked(batch, batch_idx)
        losses = self.loss(self(images), targets)
        loss = torch.stack(list(losses.values())).sum()
        values = {"train/loss": loss} | {f"train/{LOGGED.get(name, f'loss_{name}')}": losses[name] for name in losses}
        if self.step_log(self, {name: value.detach() for name, value in values.items()}, prog_bar=("train/loss",)):
            self.label_watch.tell(self.hparams.num_classes)
        return loss

    def on_train_end(self) -> None:
        self.label_watch.tell(self.hparams.num_classes)

    def start_evaluation(self, stage: str) -> None:
        loaders.start(self, f"{stage}_losses")
        loaders.start(self, f"{stage}_ap", new=self._new_metric)

    def _new_metric(self) -> CocoAveragePrecision:
        """The metric of an evaluation's detections, by the sizes and classes that the data names."""
        metric = self.detection_metric(getattr(self._trainer, "datamodule", None))
        return metric.to(self.device)  # where Lightning gathers what is logged

    def detection_metric(self, data: Any) -> CocoAveragePrecision:
        """A metric of this detector's detections, by the sizes and classes that a data module names."""
        counted = (1, 10, 100, max(100, self.hparams.max_detections))  # COCO's, and all that may be detected
        classes = self.classes or names_of(data)
        if classes is not None:  # there may be outputs without a name
            classes = [*classes, *(f"label {i}" for i in range(len(classes), self.hparams.num_classes))]
        return CocoAveragePrecision(data.size_ranges if isinstance(data, HasSizeRanges) else None, classes, counted)

    def evaluation_step(self, batch: Any, batch_idx: int, dataloader_idx: int, stage: str) -> None:
        images, targets = self._checked(batch, 0)  # the metric looks at all values, too
        _, sizes, originals = images_and_sizes(batch)
        maps = self(images)
        loaders.metric(self, f"{stage}_losses", dataloader_idx).update(self.loss_sums(maps, targets))
        true = [
            {**target, "boxes": to_original(target["boxes"].float(), size, original)}
            for target, size, original in zip(targets, sizes, originals, strict=True)
        ]
        ap = loaders.metric(self, f"{stage}_ap", dataloader_idx)
        ap.update(detections.detect(self, images, maps, sizes, originals), true)

    def end_evaluation(self, stage: str) -> None:
        """Logs losses and average precision of each loader."""
        for index in loaders.numbers(self._trainer):
            losses, ap = (loaders.metric(self, f"{stage}_{name}", index) for name in ("losses", "ap"))
            loaders.report(self, self._scores(stage, losses, ap), index)

    def _scores(self, stage: str, losses: TotalLosses, ap: CocoAveragePrecision) -> dict[str, Tensor | float]:
        """Losses and average precision by the names they are logged by."""
        parts = self.mean_losses(losses.compute())
        found: dict[str, Any] = {"loss": torch.stack(list(parts.values())).sum()}
        found |= {LOGGED.get(name, f"loss_{name}"): value for name, value in parts.items()}
        found |= {name: value for name, value in ap.compute().items() if stage == "test" or not name.startswith("ar")}
        if stage == "test":
            found |= {f"ap_by_class/{name}": value for name, value in ap.per_class().items()}
        return {f"{stage}/{name}": value for name, value in found.items()}

    def _checked(self, batch: Any, batch_idx: int) -> tuple[Tensor, list[dict[str, Any]]]:
        """Images and targets; labels are looked at on the CPU, on an accelerator in a batch of the number 0 only."""
        images, targets = batches.images_and_targets(batch)
        classes = self.num_labels
        for i, target in enumerate(targets):
            labels = target["labels"]
            if len(labels) and (batch_idx == 0 or not is_remote(labels)):
                low, high = labels.min().item(), labels.max().item()
                if low < 0 or high >= classes:
                    raise ValueError(
                        f"label {low if low < 0 else high} of sample {image_id_of(target, i)} is out of range: "
                        f"num_classes is {classes}, labels run from 0"
                    )
        return images, self._own(targets)

    def _own(self, targets: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Targets with the model's labels."""
        if self.label_table is None:
            return targets
        return [target | {"labels": self.own_labels(target["labels"])} for target in targets]

    def exported_detections(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """Detections of ``detect`` in tensors of fixed shapes, see :func:`zoo.detection.postprocessing.fixed_nms`.

        Raises:
            ValueError: For a module with views or another ``merge`` than "nms", which no exported file has.
        """
        hp = self.hparams
        if hp.views is not None or hp.merge != "nms":
            raise ValueError(
                "views and merge are no part of an exported file: export zoo.load(FILE).module with hparams.views None "
                "and hparams.merge 'nms'"
            )
        candidates = in_range(self.candidates(self(images), sizes), sizes)
        return fixed_nms(*candidates[:3], sizes, hp.score_threshold, hp.nms_threshold, hp.max_detections)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        images, sizes, originals = images_and_sizes(batch)
        found: list[dict[str, Any]] = list(self.detect(images, sizes, originals))
        for detection, about in zip(found, batches.about_images(batch), strict=True):
            if (image_id := image_id_of(about)) is not None:  # a number, or a text
                detection["image_id"] = image_id
        return found

    def named_results(self, outputs: Sequence[Mapping[str, Any]], top: int = 5) -> list[dict[str, Any]]:
        """Results of detections, all of each image: see :func:`zoo.common.results.named_detections`."""
        return [named_detections(found, self.classes, self.category_ids) for found in outputs]

    def configure_optimizers(self) -> Any:
        hp = self.hparams
        optimizer = optim.create_optimizer(
            self, hp.optimizer, hp.lr, hp.weight_decay, layer_decay=hp.layer_decay, betas=hp.betas, momentum=hp.momentum
        )
        milestones = tuple(hp.milestones) if hp.schedule == "steps" else None
        return optim.lightning_schedule(self, optimizer, hp.warmup_epochs, hp.min_lr, milestones=milestones)


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers of a module, frozen ones as well."""
    return [each for each in module.modules() if isinstance(each, _BatchNorm)]
