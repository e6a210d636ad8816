"""FasterRCNN: a two-stage detector on any timm backbone, its losses and its detections.

Deviations from the paper (Ren et al. 2015), all of them torchvision's and detectron2's as well: both stages are trained
at once, anchors that leave the image take part, and regions are pooled by RoIAlign. From torchvision's: an object that
no anchor overlaps gets none, there all of them; anchors and regions mostly inside a crowd region are not background,
there crowds are objects; places lie about centres of cells, and pooling is aligned, but for ``anchors="torchvision"``.
From detectron2's: each cell of a pooled region is read at 2x2 points, there at more in large regions; smooth L1 is
squared near 0, but for ``box_loss="l1"``. On an accelerator, NMS of the proposals in training ends after a fixed number
of rounds: :func:`zoo.detection.two_stage.proposals.suppress_in_rounds`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from zoo.common.backbones import name_of
from zoo.common.ranges import check_ranges
from zoo.detection.assign import assign, parts_of_a_batch
from zoo.detection.base import Detector
from zoo.detection.cells import Anchors, Cells, Targets, pad_targets
from zoo.detection.checks import Schedule, check_choices, check_detector, check_shares
from zoo.detection.features import build_features
from zoo.detection.layers import NeckNorm
from zoo.detection.losses import mark_sizes
from zoo.detection.necks import AnyNeck
from zoo.detection.peers import TWO_STAGE_PEERS
from zoo.detection.postprocessing import Candidates
from zoo.detection.scale.merging import Merge
from zoo.detection.scale.trident import by_image, every_branch, original_scales
from zoo.detection.two_stage.box_heads import BoxHead, build_heads, region_candidates
from zoo.detection.two_stage.layouts import TwoStageLayout
from zoo.detection.two_stage.losses import RegionLossSums, proposal_losses, region_losses
from zoo.detection.two_stage.pooling import COARSEST_POOLED, pool_regions
from zoo.detection.two_stage.proposals import Proposals, RegionMaps, anchor_sides, image_ends, proposal_cells, propose
from zoo.detection.two_stage.sampling import Samples, match_regions, priorities, sample, take
from zoo.detection.two_stage.stage import backbone_and_stage

BoxLoss = Literal["smooth_l1", "l1"]
BETAS = {"smooth_l1": 1 / 9, "l1": 0.0}


class FasterRCNN(Detector):
    """Two-stage object detector: region proposals, and a head that classifies and refines them (Ren et al. 2015).

    Batch, predictions and scores are those of :class:`zoo.FPNDetector`. The losses are ``val/loss`` with its parts
    ``val/loss_rpn_objectness``, ``val/loss_rpn_box``, ``val/loss_class`` and ``val/loss_box``; ``train/loss`` and so on
    likewise. In training anchors and regions are drawn at random; in evaluation they are the same for an image each
    time, whatever batch it is in.

    Args:
        backbone: A timm network by name, or a module, as of :class:`zoo.FPNDetector`.
        num_classes: Number of classes, K.
        score_threshold: Least score of a detection.
        nms_threshold: IoU above which NMS drops the lower of two detections of a class.
        max_detections: Most detections of an image, after NMS.
        weights: Weights to start from, of the backbone alone or of a whole detector: see :func:`zoo.weights.load`.
        in_channels: Channels of the images.
        image_size: Side in pixels, or (height, width), that ``zoo cost`` counts for and a ViT is made for.
        neck: "fpn"; "single", one level alone, to compare with; or "none", a map of the backbone as it is.
        levels: Finest and coarsest level; level l has a stride of 2**l pixels. Those beyond 5 are subsampled, and have
            proposals alone. None: (2, 6); for "single" and "none" (4, 4).
        channels: Channels of neck, head of the proposals and convolutions of the box head "conv".
        neck_norm: "none"; or "batch", BatchNorm behind the convolutions of a feature pyramid.
        rpn_depth: Convolutions of the head of the proposals.
        box_head: "mlp", two fully connected layers on regions of 7x7; "conv", four convolutions with BatchNorm and one
            such layer; or "stage", the backbone's last stage on regions of 14x14, with ``neck="none"``: see
            :class:`zoo.detection.two_stage.stage.StageBoxHead`.
        head_width: Width of the fully connected layers of the box head.
        class_agnostic: Whether a region has one box, not one for each class.
        anchors: Where anchors lie, and how regions are pooled: "centered", around centres of cells; or "torchvision",
            around their corners, sides rounded, as its checkpoints need.
        anchor_sizes: Sides in pixels of the squares that anchors are as large as, one for each level; of one level
            alone, all of its own. None: eight strides of each level; of one level 2, 4, 8, 16 and 32 strides.
        box_loss: "smooth_l1", squared below 1/9, or "l1".
        pre_nms_top_k: Anchors of a level that NMS of the proposals compares, at most, in training and in evaluation.
        post_nms_top_k: Proposals of an image, at most, in training and in evaluation.
        proposal_nms: IoU above which NMS drops the lower of two proposals of a level.
        rpn_samples: Anchors of an image that the first stage learns from.
        rpn_positive: Share of these, at most, with an object.
        region_samples: Regions of an image that the second stage learns from.
        region_positive: Share of these, at most, with an object.
        learn_targets: Whether the objects themselves are regions to learn from, beside the proposals.
        views: Views of each image in evaluation and prediction: see :class:`zoo.FPNDetector`. None: the image alone.
        merge: How what is found in views becomes detections: "nms", "soft_nms", "soft_vote" or "weighted".
        tiles_at_once: Tiles in a batch, so that memory does not grow with an image.
        freeze_norm: Whether the backbone's BatchNorm keeps its statistics and weights. Without it they are trained.
        norm_eps: Epsilon of the backbone's BatchNorm; 0 with ``freeze_norm`` alone. None: the backbone's own.
        frozen_stages: Number of the backbone's first stages that are not trained, the stem being the first.
        grad_checkpointing: Recompute the backbone in the backward pass: less memory, more time.
        trident: TridentNet: branches of the stage that gives level 4, which differ in dilation.
        dilations: Of each branch, (1, 2, 3) if None; without ``trident`` one for the whole stage.
        scale_aware: Whether each branch learns and detects objects of its valid range alone.
        valid_ranges: Least and greatest size for each branch. None: the paper's. See :class:`zoo.FPNDetector`.
        branch: The branch that alone is evaluated, 1 in TridentNet Fast. None: all of them.
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
        compile: Compile in place: the networks, and the loss of each stage as one graph.

    Raises:
        ValueError: For an unknown name or choice, with what there is to choose from; for levels that the backbone does
            not have; for weights of another kind.
    """

    # While a run goes on: they say how it is evaluated.
    changeable: ClassVar = (
        *("score_threshold", "nms_threshold", "max_detections", "branch", "views", "merge", "tiles_at_once"),
    )
    exports: ClassVar = {"detections": "exported_detections", "proposals": "exported_proposals"}
    sums: ClassVar = RegionLossSums
    foreign_weights = TwoStageLayout()
    peers: ClassVar = TWO_STAGE_PEERS
    compiled: ClassVar = ("_proposal_sums", "_region_sums")  # each one graph, the same for all sizes
    rpn: Any  # modules, of build_heads
    box_head: Any
    cls_out: Any
    box_out: Any

    def __init__(
        self,
        backbone: str | nn.Module = "resnet50",
        num_classes: int = 80,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
        weights: str | None = None,
        in_channels: int = 3,
        image_size: int | tuple[int, int] = 800,
        neck: AnyNeck = "fpn",
        levels: tuple[int, int] | None = None,
        channels: int = 256,
        neck_norm: NeckNorm = "none",
        rpn_depth: int = 1,
        box_head: BoxHead = "mlp",
        head_width: int = 1024,
        class_agnostic: bool = False,
        anchors: Anchors = "centered",
        anchor_sizes: Sequence[float] | None = None,
        box_loss: BoxLoss = "smooth_l1",
        pre_nms_top_k: tuple[int, int] = (2000, 1000),
        post_nms_top_k: tuple[int, int] = (2000, 1000),
        proposal_nms: float = 0.7,
        rpn_samples: int = 256,
        rpn_positive: float = 0.5,
        region_samples: int = 512,
        region_positive: float = 0.25,
        learn_targets: bool = True,
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
        valid_ranges: Sequence[tuple[float, float | None]] | None = None,
        branch: int | None = None,
        channels_last: bool = True,
        optimizer: str = "sgd",
        lr: float = 0.02,
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
        check_choices(self.hparams, anchors=Anchors, neck=AnyNeck, neck_norm=NeckNorm, merge=Merge)
        check_choices(self.hparams, box_head=BoxHead, box_loss=BoxLoss)
        check_detector(self.hparams)
        counts = ("pre_nms_top_k", "post_nms_top_k", "head_width", "rpn_depth", "rpn_samples", "region_samples")
        check_ranges(**{name: (self.hparams[name], 1, None) for name in counts})
        check_shares(self.hparams, "proposal_nms", "rpn_positive", "region_positive")
        levels = levels or ((2, 6) if neck == "fpn" else (4, 4))
        stage = None
        if box_head == "stage":  # which the backbone then loses
            backbone, stage = backbone_and_stage(backbone, self.hparams, levels)
            self.foreign_weights = TwoStageLayout(stage.place)
        build_features(self, backbone, levels, "subsampled", neck_norm)
        self.sides = anchor_sides(anchor_sizes, self.strides)
        self.pooled = max(1, min(len(self.strides), COARSEST_POOLED - levels[0] + 1))
        build_heads(self, stage)
        self.train()  # but for what is frozen
        self.finish(weights)

    # The technique.

    def forward(self, images: Tensor) -> RegionMaps:
        """Raw predictions of the first stage, and the maps that the second reads, for images (B, C, H, W).

        Raises:
            ValueError: For images with other channels than ``in_channels``.
        """
        features = self.features(images)
        objectness, boxes = self.rpn(features)
        shapes = tuple((each.shape[2], each.shape[3]) for each in features)
        return RegionMaps(objectness, boxes, tuple(features), shapes, (images.shape[2], images.shape[3]), self.branches)

    def predict_regions(self, features: Sequence[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Raw predictions of the second stage: logits (B, R, K + 1), background last, and deltas (B, R, K * 4).

        Args:
            features: Maps of all levels.
            boxes: Regions (B, R, 4) xyxy in pixels.
        """
        features, strides = features[: self.pooled], self.strides[: self.pooled]
        aligned = self.hparams.anchors != "torchvision"
        pooled = pool_regions(features, boxes, strides, self.box_head.pool_size, aligned)
        hidden = self.box_head(pooled)
        places = (-1, boxes.shape[1])
        return self.cls_out(hidden).unflatten(0, places), self.box_out(hidden).unflatten(0, places)

    def loss(
        self, maps: RegionMaps, targets: Sequence[Mapping[str, Any]], samples: Samples | None = None
    ) -> dict[str, Tensor]:
        """The losses of a batch, float32 scalars; training descends their sum.

        Args:
            maps: Of :meth:`forward`.
            targets: For each image ``boxes`` (n, 4) xyxy in pixels of these images, ``labels`` (n,) from 0, and
                optionally ``iscrowd`` (n,), and ``size``, (height, width) before padding, where proposals end.
            samples: What to learn from. None: drawn in training; in evaluation the same each time.

        Returns:
            "rpn_objectness", "rpn_box", "classification" and "box".
        """
        sums = self.loss_sums(maps, targets, samples).total()
        if self.shares_counts:
            anchors, regions = self.over_ranks(sums.anchors, sums.regions)
            sums = sums._replace(anchors=anchors, regions=regions)
        return sums.mean()

    def loss_sums(
        self, maps: RegionMaps, targets: Sequence[Mapping[str, Any]], samples: Samples | None = None
    ) -> RegionLossSums:
        """Sums of the losses of each image, which :meth:`loss` divides."""
        cells, padded = self.cells(maps), pad_targets(targets, maps.boxes.device)
        padded = padded._replace(labels=self.label_watch(self, padded.labels, self.hparams.num_classes))
        sizes = [target.get("size", maps.image_size) for target in targets]
        wanted = None
        if self.trident is not None:
            scales = original_scales(targets, maps.image_size, maps.boxes.device)
            padded = self.trident.targets(padded, scales, maps.branches)
            wanted = partial(self.trident.wanted, scales=scales, running=maps.branches)
        proposals = self.proposals(maps, sizes, not self.training, wanted)
        count = maps.objectness.shape[1], proposals.scores.shape[1] + padded.labels.shape[1]
        anchors, regions = samples or [priorities(maps.boxes, each, self.training) for each in count]
        if self.compiled[0] in self.__dict__:
            mark_sizes((maps.objectness, maps.boxes, *proposals, anchors, regions), cells, padded)
            for each in maps.features:
                torch._dynamo.maybe_mark_dynamic(each, [0, 2, 3])
        drawn, parts = samples is None, parts_of_a_batch(cells, padded)
        first = self._proposal_sums(maps.objectness, maps.boxes, cells, padded, anchors, drawn, parts)
        second = self._region_sums(maps.features, proposals, padded, regions, drawn)
        return RegionLossSums(*first[:2], *second[:2], first[2], second[2])

    def mean_losses(self, sums: RegionLossSums) -> dict[str, Tensor]:
        """The losses by name of sums over all images."""
        return sums.mean()

    def _proposal_sums(
        self, objectness: Tensor, boxes: Tensor, cells: Cells, targets: Targets, chosen: Tensor, drawn: bool, parts: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of the first stage. ``chosen`` are the anchors to learn from, or by ``drawn`` priorities of all."""
        hp = self.hparams
        match = assign("rpn", cells, targets, parts=parts)
        if drawn:
            chosen = sample(match, chosen, hp.rpn_samples, hp.rpn_positive)
        return proposal_losses(objectness, boxes, match, chosen, cells, targets, BETAS[hp.box_loss])

    def _region_sums(
        self, features: Sequence[Tensor], proposals: Proposals, targets: Targets, chosen: Tensor, drawn: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of the second stage. ``chosen`` are the regions to learn from, or by ``drawn`` priorities of all."""
        hp = self.hparams
        regions = match_regions(proposals, targets, hp.learn_targets)
        if drawn:
            chosen = chosen[:, : regions.match.shape[1]]
            chosen = sample(regions.match, chosen, hp.region_samples, hp.region_positive)
        regions, there = take(regions, chosen)
        logits, deltas = self.predict_regions(features, regions.boxes)
        return region_losses(logits, deltas, regions, there, targets, BETAS[hp.box_loss])

    def make_cells(self, shapes: tuple[tuple[int, int], ...], image_size: tuple[int, int], device: Any) -> Cells:
        """Anchors of maps of such shapes: see :func:`zoo.detection.two_stage.proposals.proposal_cells`."""
        return proposal_cells(self.sides, shapes, self.strides, image_size, self.hparams.anchors, device)

    def proposals(self, maps: RegionMaps, sizes: Any = None, waits: bool = True, wanted: Any = None) -> Proposals:
        """The proposals of a batch, as many as in training or in evaluation, by the mode: see :func:`propose`.

        Args:
            maps: Of :meth:`forward`.
            sizes: (height, width) of each image before padding, at which proposals end. None: not padded.
            waits, wanted: See :func:`propose`.
        """
        hp, mode = self.hparams, 0 if self.training else 1
        ends = image_ends([maps.image_size] if sizes is None else sizes, maps.boxes.device)
        if sizes is not None and len(maps.branches) > 1:  # the number of images is no constant of an export
            ends = ends.repeat(len(maps.branches), 1, 1)
        counts = hp.pre_nms_top_k[mode], hp.post_nms_top_k[mode]
        return propose(maps, self.cells(maps), ends, *counts, hp.proposal_nms, waits, wanted)

    def candidates(self, maps: RegionMaps, sizes: Any = None) -> Candidates:
        """Boxes and scores of each proposal and class; in an image of few proposals the last have a score of 0."""
        proposals = self.proposals(maps, sizes)
        found = region_candidates(proposals, *self.predict_regions(maps.features, proposals.boxes))
        return found if self.trident is None else self.trident.candidates(found, maps.branches)

    def exported_proposals(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """Proposals in tensors of fixed shapes, best first: ``boxes`` (B, R, 4), ``scores`` (B, R), 0 where none is."""
        proposals = self.proposals(maps := self(images), sizes)
        found = {"boxes": proposals.boxes, "scores": proposals.scores.sigmoid()}
        return {name: by_image(each, len(maps.branches)) for name, each in found.items()}

    # Both stages, which forward does not run: how many regions there are is known.

    def training_forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """A training step's forward pass of images (B, C, H, W), of all branches and of regions that are none."""
        with every_branch(self.trident):
            return self._both_stages(images, self.hparams.region_samples)

    def predicting_forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """An evaluation's, likewise."""
        return self._both_stages(images, self.hparams.post_nms_top_k[1])

    def _both_stages(self, images: Tensor, regions: int) -> tuple[Tensor, Tensor]:
        maps = self(images)
        return self.predict_regions(maps.features, maps.boxes.new_zeros(len(maps.boxes), regions, 4))
