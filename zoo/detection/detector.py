"""FPNDetector: a dense detector on any timm backbone, its loss and its detections.

Deviations. FCOS (Tian et al. 2019) and ATSS (Zhang et al. 2020): the score that has to pass ``score_threshold`` is the
one that is reported, the geometric mean of class probability and centerness; the released codes compare the class
probability alone. FCOS: distances pass a ReLU, without the learned factor of each level that the released code has.
RetinaNet (Lin et al. 2017): matches of low quality and L1 in place of smooth L1, both detectron2's. ViTDet (Li et al.
2022): all attention is global, and the head is a dense one. ImageNet's BatchNorm is frozen only if asked for:
``freeze_norm``.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from zoo.common.backbones import name_of
from zoo.common.ranges import check_above, check_ranges
from zoo.detection.assign import assign, parts_of_a_batch
from zoo.detection.base import Detector
from zoo.detection.cells import Anchors, Cells, Head, Targets, anchors_per_cell, make_cells, pad_targets
from zoo.detection.checks import Schedule, check_choices, check_detector
from zoo.detection.features import build_features
from zoo.detection.heads import DenseHead, DenseMaps
from zoo.detection.layouts import DetectorLayout
from zoo.detection.losses import BoxLoss, LossSums, dense_loss, mark_sizes
from zoo.detection.necks import ExtraFrom, Neck
from zoo.detection.peers import PEERS
from zoo.detection.postprocessing import Candidates, pre_nms_top_k
from zoo.detection.scale.merging import Merge
from zoo.detection.scale.ranges import Range
from zoo.detection.scale.trident import by_image, every_branch, original_scales

HeadNorm = Literal["group", "none"]
Normalizer = Literal["batch", "image"]

Outputs = tuple[Tensor, Tensor, Tensor | None]  # logits, boxes and centerness of all cells


class FPNDetector(Detector):
    """Dense object detector on a feature pyramid: FCOS, ATSS or RetinaNet.

    Batch: images (B, C, H, W) of any one size, normalised, and for each a dictionary of ``boxes`` (n, 4) xyxy in pixels
    and ``labels`` (n,) from 0, in any form that :func:`zoo.common.batch.images_and_targets` reads. Optional:
    ``iscrowd`` (n,), regions in which nothing is learned; ``in_range`` (n,), false for objects of a size that is not
    learned here, which are no background either; ``area`` (n,), ``image_id``, ``size``, ``orig_size``, (height, width)
    before padding and before resizing, by which boxes are scored and predicted in pixels of the original image;
    ``scale``, pixels of the batch by one of the original image, where a crop leaves sizes that do not tell. The module
    resizes, pads and normalises nothing.

    One pass in validation gives both, ``val/loss`` with its parts ``val/loss_class``, ``val/loss_box``,
    ``val/loss_centerness``, and ``val/ap``, ``val/ap50``, ``val/ap75`` and those by size, as COCO scores
    (:class:`zoo.metrics.average_precision.CocoAveragePrecision`). The same for ``test``, and there ``test/ar100`` and
    so on, and ``test/ap_by_class/NAME``; ``train/loss`` and its parts. Several loaders are counted apart:
    :mod:`zoo.common.loaders`.

    Args:
        backbone: A timm network by name, with maps at the levels' strides, or a plain ViT, which gets a simple feature
            pyramid; or a module: one of timm's, or one that returns a list of maps and states ``strides`` and
            ``channels``.
        num_classes: Number of classes, K.
        head: "fcos" (Tian et al. 2019, as improved in its released code), "atss" (Zhang et al. 2020) or "retinanet"
            (Lin et al. 2017).
        anchors: Where anchors lie, and how FCOS breaks ties: "centered"; or "torchvision", whose conventions
            its checkpoints need.
        score_threshold: Least score of a detection.
        nms_threshold: IoU above which NMS drops the lower of two detections of a class.
        max_detections: Most detections of an image, after NMS.
        weights: Weights to start from, of the backbone alone or of a whole detector: see :func:`zoo.weights.load`.
        in_channels: Channels of the images.
        image_size: Side in pixels, or (height, width), that ``zoo cost`` counts for and a ViT's position embeddings are
            made for. Images of every size are taken.
        neck: "fpn"; or "single", one level alone, to compare with.
        levels: Finest and coarsest level; level l has a stride of 2**l pixels. None: (3, 7); for "single" (4, 4).
        channels: Channels of neck and head.
        head_depth: Convolutions of each of the head's two towers.
        head_norm: "group" or "none". None: none for "retinanet", else group.
        extra_from: Input of the levels coarser than the backbone's: "output", the pyramid's own coarsest map, or
            "backbone", the backbone's, as in RetinaNet's paper.
        box_loss: "giou" or "l1". None: l1 for "retinanet", else giou.
        weighted: Whether a cell's box loss counts by its centerness, for "fcos" and "atss".
        center_radius: Points of an object lie at most so many strides from its centre, for "fcos".
        normalizer: Divisor of the training loss: "batch", the sum over all cells of all ranks by the number of those
            with an object, as evaluation has it over all of the data; "image", each image's by its own, as
            torchvision's RetinaNet.
        top_candidates: Pre-NMS top-k: detections of a level that NMS compares, at most.
        views: Views of each image in evaluation and prediction, mappings with the keys of
            :class:`zoo.detection.scale.views.View`: ``[{}, {"tile": 512, "valid_range": [0, 96]}]`` is the image beside
            tiles of it, ``[{}, {"scale": 2}, {"flip": True}]`` a pyramid. Losses are of the image alone, and so is
            what is exported. None: that one.
        merge: How what is found in views becomes detections: "nms"; "soft_nms", "soft_vote" or "weighted", weighted
            boxes fusion, for views of one valid range: scores fall with each that did not find the object. See
            :mod:`zoo.detection.scale.merging`.
        tiles_at_once: Tiles in a batch, so that memory does not grow with an image.
        freeze_norm: Whether the backbone's BatchNorm keeps its statistics and weights. Without it they are trained;
            ``Trainer(sync_batchnorm=True)`` shares them over ranks.
        norm_eps: Epsilon of the backbone's BatchNorm: 0, with ``freeze_norm``, is what torchvision's COCO weights of
            its first RetinaNet were trained with. None: the backbone's own.
        frozen_stages: Number of the backbone's first stages that are not trained, the stem being the first; their
            BatchNorm keeps its statistics.
        grad_checkpointing: Recompute the backbone in the backward pass: less memory, more time.
        trident: TridentNet (Li et al. 2019): branches of the stage that gives level 4, with the same weights and other
            dilations: see :mod:`zoo.detection.scale.trident`. Train it with ``freeze_norm``, as the paper, where the
            backbone begins with weights.
        dilations: Of each branch. None: (1, 2, 3). Without ``trident`` one number for the whole stage, as in the
            paper's pilot study, or None for the backbone's own.
        scale_aware: Whether each branch learns and detects objects of its valid range alone. False is how TridentNet
            Fast is trained.
        valid_ranges: For each branch the least and the greatest square root of an object's area, in pixels of the
            original image; null: there is none. None: the paper's, [0, 90], [30, 160] and [90, null].
        branch: The branch that alone is evaluated, at the cost of a network without branches, for objects of all sizes:
            1 of three in TridentNet Fast. None: all, each within its range, and one NMS.
        channels_last: Keep images and weights in the memory order that convolutions are faster in.
        optimizer: Name of an optimizer of timm.
        lr: Learning rate, as it is used.
        weight_decay: Not applied to norms and biases.
        momentum: Momentum of the optimizer. None: its own.
        betas: Betas of the optimizer. None: its own.
        layer_decay: Layer decay of the backbone's learning rates: see :func:`zoo.common.optim.parameter_groups`.
        schedule: Learning rate after the warm-up: "cosine", or "steps", a tenth of it from each milestone on.
        milestones: Epochs at which the schedule "steps" lowers the learning rate.
        warmup_epochs: Linear warm-up, in epochs; fractions count.
        min_lr: Learning rate that the cosine ends at.
        compile: Compile in place: the networks, and the loss as one graph.

    Raises:
        ValueError: For an unknown name or choice, with what there is to choose from; for levels that the backbone does
            not have; for weights of another kind.
    """

    # While a run goes on: they say how it is evaluated.
    changeable: ClassVar = (
        *("score_threshold", "nms_threshold", "max_detections", "branch", "views", "merge", "tiles_at_once"),
    )
    exports: ClassVar = {"detections": "exported_detections", "maps": "exported_maps"}
    sums: ClassVar = LossSums
    compiled: ClassVar = ("_local_loss", "_dense_loss")  # assignment and loss as one graph, the same for all sizes
    foreign_weights: ClassVar = DetectorLayout()
    peers: ClassVar = PEERS

    def __init__(
        self,
        backbone: str | nn.Module = "resnet50",
        num_classes: int = 80,
        head: Head = "fcos",
        anchors: Anchors = "centered",
        score_threshold: float = 0.05,
        nms_threshold: float = 0.6,
        max_detections: int = 100,
        weights: str | None = None,
        in_channels: int = 3,
        image_size: int | tuple[int, int] = 800,
        neck: Neck = "fpn",
        levels: tuple[int, int] | None = None,
        channels: int = 256,
        head_depth: int = 4,
        head_norm: HeadNorm | None = None,
        extra_from: ExtraFrom = "output",
        box_loss: BoxLoss | None = None,
        weighted: bool = True,
        center_radius: float = 1.5,
        normalizer: Normalizer = "batch",
        top_candidates: int = 1000,
        views: Sequence[Mapping[str, Any]] | None = None,
        merge: Merge = "nms",
        tiles_at_once: int = 8,
        freeze_norm: bool = False,
        norm_eps: float | None = None,
        frozen_stages: int = 0,
        grad_checkpointing: bool = False,
        trident: bool = False,
        dilations: Sequence[int] | None = None,
        scale_aware: bool = True,
        valid_ranges: Sequence[Range] | None = None,
        branch: int | None = None,
        channels_last: bool = True,
        optimizer: str = "sgd",
        lr: float = 0.01,
        weight_decay: float = 1e-4,
        momentum: float | None = None,
        betas: tuple[float, float] | None = None,
        layer_decay: float = 1.0,
        schedule: Schedule = "cosine",
        milestones: Sequence[float] = (8, 11),
        warmup_epochs: float = 0.0,
        min_lr: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone", "weights"])
        self.hparams["backbone"] = name_of(backbone)
        per_cell = anchors_per_cell(head)
        head_norm = head_norm or ("none" if head == "retinanet" else "group")
        self.box_loss: BoxLoss = box_loss or ("l1" if head == "retinanet" else "giou")
        chosen = {"anchors": Anchors, "neck": Neck, "extra_from": ExtraFrom, "normalizer": Normalizer, "merge": Merge}
        check_choices(self.hparams, **chosen)
        check_choices({"head_norm": head_norm, "box_loss": self.box_loss}, head_norm=HeadNorm, box_loss=BoxLoss)
        check_detector(self.hparams)
        check_ranges(top_candidates=(top_candidates, 1, None), head_depth=(head_depth, 0, None))
        check_above(center_radius=(center_radius, 0, math.inf))
        if self.box_loss == "l1" and head == "fcos":
            raise ValueError("box_loss 'l1' is of deltas, and head 'fcos' predicts distances: take 'giou'")
        build_features(self, backbone, levels or ((4, 4) if neck == "single" else (3, 7)), extra_from)
        self.head = DenseHead(
            channels,
            num_classes,
            per_cell,
            head_depth,
            head_norm,
            centerness=head != "retinanet",
            positive_boxes=head == "fcos",
            levels=len(self.strides) if head == "atss" else 0,
        )
        self.finish(weights)

    # The technique.

    def forward(self, images: Tensor) -> DenseMaps:
        """Raw predictions for images (B, C, H, W).

        Raises:
            ValueError: For images with other channels than ``in_channels``.
        """
        features = self.features(images)
        logits, boxes, centerness = self.head(features)
        shapes = tuple((each.shape[2], each.shape[3]) for each in features)
        return DenseMaps(logits, boxes, centerness, shapes, (images.shape[2], images.shape[3]), self.branches)

    def training_forward(self, images: Tensor) -> DenseMaps:
        """A training step's forward pass of images (B, C, H, W), of all branches."""
        with every_branch(self.trident):
            return self(images)

    def loss(self, maps: DenseMaps, targets: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The losses of a batch, float32 scalars; training descends their sum.

        Args:
            maps: Of :meth:`forward`.
            targets: For each image ``boxes`` (n, 4) xyxy in pixels of these images, ``labels`` (n,) from 0, and
                optionally ``iscrowd`` and ``in_range`` (n,).

        Returns:
            "classification", "box" and, but for "retinanet", "centerness".
        """
        if not self.shares_counts or self.hparams.normalizer == "image":
            return self._local_loss(*self._inputs(maps, targets))
        sums = self.loss_sums(maps, targets).total()
        positives, box_weight = self.over_ranks(sums.positives, sums.box_weight)
        return self.mean_losses(sums._replace(positives=positives, box_weight=box_weight))

    def loss_sums(self, maps: DenseMaps, targets: Sequence[Mapping[str, Any]]) -> LossSums:
        """Sums of the losses of each image, which :meth:`loss` divides."""
        return self._dense_loss(*self._inputs(maps, targets))

    def mean_losses(self, sums: LossSums) -> dict[str, Tensor]:
        """The losses by name of sums over all images."""
        return sums.mean(self.hparams.head)

    def _inputs(self, maps: DenseMaps, targets: Sequence[Mapping[str, Any]]) -> tuple[Outputs, Cells, Targets, int]:
        """The arguments of the loss, and the number of parts in which its batch is matched."""
        outputs = (maps.logits, maps.boxes, maps.centerness)
        cells, padded = self.cells(maps), pad_targets(targets, maps.logits.device)
        padded = padded._replace(labels=self.label_watch(self, padded.labels, self.hparams.num_classes))
        if self.trident is not None:
            scales = original_scales(targets, maps.image_size, maps.logits.device)
            padded = self.trident.targets(padded, scales, maps.branches)
        if self.compiled[0] in self.__dict__:
            mark_sizes(outputs, cells, padded)
        return outputs, cells, padded, parts_of_a_batch(cells, padded)

    def _dense_loss(self, outputs: Outputs, cells: Cells, targets: Targets, parts: int) -> LossSums:
        hp = self.hparams
        match = assign(hp.head, cells, targets, hp.anchors, hp.center_radius, parts)
        return dense_loss(hp.head, *outputs, match, cells, targets, self.box_loss, hp.weighted)

    def _local_loss(self, outputs: Outputs, cells: Cells, targets: Targets, parts: int) -> dict[str, Tensor]:
        """The loss of one process: nobody else's objects count."""
        sums, head = self._dense_loss(outputs, cells, targets, parts), self.hparams.head
        if self.hparams.normalizer == "image":
            return {name: of_images.mean() for name, of_images in sums.mean(head).items()}
        return sums.total().mean(head)

    def make_cells(self, shapes: tuple[tuple[int, int], ...], image_size: tuple[int, int], device: Any) -> Cells:
        """Cells of maps of such shapes: see :func:`zoo.detection.cells.make_cells`."""
        return make_cells(self.hparams.head, shapes, self.strides, image_size, self.hparams.anchors, device)

    def exported_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Raw predictions: ``logits`` (B, N, K), ``boxes`` (B, N, 4), and ``centerness`` (B, N) where there is one.

        Of branches each has its N, one branch behind the other.
        """
        maps = self(images)
        found = {"logits": maps.logits, "boxes": maps.boxes, "centerness": maps.centerness}
        return {name: by_image(each, len(maps.branches)) for name, each in found.items() if each is not None}

    def candidates(self, maps: DenseMaps, sizes: Any = None) -> Candidates:
        """The candidates of :func:`zoo.detection.postprocessing.pre_nms_top_k`, whatever sizes the images have."""
        outputs = (maps.logits, maps.boxes, maps.centerness)
        found = pre_nms_top_k(self.hparams.head, *outputs, self.cells(maps), self.hparams.top_candidates)
        return found if self.trident is None else self.trident.candidates(found, maps.branches)
