"""EfficientNetClassifier: a network by the table or by the rule, and its training."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from zoo._lightning import rank_zero_info
from zoo.common import optim
from zoo.common.classification import Classifier
from zoo.common.classification_losses import Loss, given_modules
from zoo.common.label_weights import Balanced
from zoo.common.ranges import check_ranges
from zoo.efficientnet.networks import V2, create_network, recompute_blocks
from zoo.efficientnet.peers import PEERS
from zoo.efficientnet.scaling import PUBLISHED, CompoundScaling, check_resolution
from zoo.weights import describe
from zoo.weights import load as load_weights

Variant = Literal["b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7", "v2_s", "v2_m", "v2_l"]
Family = Literal["efficientnet", "mobilenetv2", "resnet50"]
Padding = Literal["symmetric", "same"]
Schedule = Literal["staircase", "cosine"]


class EfficientNetClassifier(Classifier):
    """Compound-scaled convolutional classifier: EfficientNet B0 to B7, V2, or a network of any size by the rule.

    Batch: ``(images (B, C, H, W), labels (B,))``, or labels (B, classes) of 0 and 1 with ``multi_label``; images of any
    size from the total stride on, which is 32 pixels, and 16 with ``stem_stride=1``. Logs ``train/loss``, ``val/loss``,
    ``val/acc``, ``val/acc5``, ``val/f1`` (macro) and the same for ``test``. Predicts class probabilities (B, classes).

    Args:
        variant: A published network: "b0" to "b7", or EfficientNetV2's "v2_s", "v2_m", "v2_l".
        phi: Compound coefficient of a network by the rule, a real number (:class:`zoo.efficientnet.CompoundScaling`).
            Neither this nor ``variant``: phi 0, which is B0.
        num_classes: Number of classes.
        image_size: Side in pixels, or (height, width), of the images it is meant for. None: the published one, or that
            of phi. The data's own ``image_size`` is set there.
        in_channels: Channels of the images.
        weights: Weights to start from: see :func:`zoo.weights.load`. What padding and epsilon they were trained with is
            known of timm's names, both ``efficientnet_*`` and ``tf_efficientnet_*`` (and of files so called), of files
            of torchvision's and of the package efficientnet_pytorch's, and of Lightning checkpoints. Any other file
            does not say: of a ``tf_efficientnet_*`` network it needs ``padding="same"``, or every output is a little
            wrong. :func:`zoo.weights.load` alone, on a module that is there, changes neither.
        family: Network that phi scales: "efficientnet", "mobilenetv2" or "resnet50".
        depth: Multiplier of the family's own depth, which phi starts from.
        width: Multiplier of the family's own width, which phi starts from.
        alpha: Depth at phi 1, by the rule.
        beta: Width at phi 1, by the rule.
        gamma: Resolution at phi 1, by the rule.
        stem_stride: Stride of the first convolution: 1 for small images, which halves the total stride.
        dropout: Dropout before the head. None: the published one; by phi 0.2 + 0.3 phi / 7, in [0, 0.5].
        drop_path: Stochastic depth (Huang et al. 2016): rises from 0 in the first block; 0.2 is published for all.
        padding: Padding of convolutions: "symmetric", or TensorFlow's "same". None: as ``weights`` were trained, or
            symmetric.
        norm_eps: Epsilon of BatchNorm. None: as ``weights`` were trained, or TensorFlow's 1e-3 for "same", else 1e-5.
        norm_momentum: Share of each batch in BatchNorm's running statistics.
        channels_last: Keep images and weights with channels last in memory, which convolutions are faster on.
        grad_checkpointing: Recompute blocks in the backward pass: less memory, about a third more time.
        multi_label: Whether an image has several labels.
        loss: "cross_entropy", "bce" or "sigmoid", see
            :func:`zoo.common.classification_losses.classification_loss`; a loss of ``zoo.losses`` by name, "soft_fbeta"
            for example; or an ``nn.Module`` from logits (B, classes) and targets to a scalar.
        loss_options: Arguments of a loss of ``zoo.losses`` by name.
        class_weight: Weights of the classes in the loss, one number each, or "balanced" by the training data: see
            :class:`zoo.common.label_weights.LabelWeights`.
        pos_weight: Weight of the positives of several labels, one number for all or each, or "balanced" by the training
            data.
        label_smoothing: Label smoothing (Szegedy et al. 2016), in [0, 1).
        mixup: Alpha of mixup (Zhang et al. 2018); 0 is off.
        cutmix: Alpha of cutmix (Yun et al. 2019); 0 is off. With both on, each batch has one of them.
        optimizer: Name of an optimizer of timm.
        lr: Learning rate, as it is used: the paper's code has 0.016 times the total batch size / 256.
        weight_decay: Not applied to norms and biases.
        momentum: Momentum of the optimizer. None: its own; of "rmsproptf" the paper's, 0.9.
        eps: Epsilon of the optimizer. None: its own; of "rmsproptf" the paper's, 1e-3.
        betas: Betas of the optimizer. None: its own.
        schedule: Learning rate after the warm-up: "staircase", or half a "cosine".
        decay_rate: Factor of each step of the staircase.
        decay_epochs: Epochs between steps of the staircase; fractions count.
        warmup_epochs: Linear warm-up, in epochs.
        min_lr: Learning rate that the cosine ends at.
        compile: Compile the backbone in place.

    Raises:
        ValueError: For an unknown choice, with what there is to choose from; for both ``variant`` and ``phi``; for a
            phi that makes no network; for images smaller than the total stride; for weights that do not fit.
    """

    # Left None they follow from ``weights``, which are not read again when a run goes on.
    from_weights: ClassVar = ("padding", "norm_eps")
    peers: ClassVar = PEERS

    def __init__(
        self,
        variant: Variant | None = None,
        phi: float | None = None,
        num_classes: int = 1000,
        image_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        weights: str | None = None,
        family: Family = "efficientnet",
        depth: float = 1.0,
        width: float = 1.0,
        alpha: float = 1.2,
        beta: float = 1.1,
        gamma: float = 1.15,
        stem_stride: int = 2,
        dropout: float | None = None,
        drop_path: float = 0.2,
        padding: Padding | None = None,
        norm_eps: float | None = None,
        norm_momentum: float = 0.1,
        channels_last: bool = True,
        grad_checkpointing: bool = False,
        multi_label: bool = False,
        loss: Loss | nn.Module | str = "cross_entropy",
        loss_options: dict[str, Any] | None = None,
        class_weight: Balanced | list[float] | None = None,
        pos_weight: Balanced | float | list[float] | None = None,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        optimizer: str = "rmsproptf",
        lr: float = 0.016,
        weight_decay: float = 1e-5,
        momentum: float | None = None,
        eps: float | None = None,
        betas: tuple[float, float] | None = None,
        schedule: Schedule = "staircase",
        decay_rate: float = 0.97,
        decay_epochs: float = 2.4,
        warmup_epochs: float = 0.0,
        min_lr: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["weights", *given_modules(loss=loss)])
        self.make_metrics(loss)
        check_ranges(in_channels=(in_channels, 1, None), norm_eps=(norm_eps, -math.inf, None))
        for name, value, choices in (
            ("variant", variant, (None, *get_args(Variant))),
            ("padding", padding, (None, *get_args(Padding))),
            ("schedule", schedule, get_args(Schedule)),
        ):
            if value not in choices:
                raise ValueError(f"unknown {name} {value!r}: expected one of {', '.join(map(str, choices))}")
        scaling = CompoundScaling(alpha, beta, gamma, family, depth, width, stem_stride=stem_stride)
        if variant is None:
            phi = 0.0 if phi is None else phi
            scaling.check(phi, image_size)
            scale = scaling.at(phi)
            depth, width = depth * scale.depth, width * scale.width
            own_size, own_dropout = scaling.side(phi), min(max(0.2 + 0.3 * phi / 7, 0.0), 0.5)
        else:
            if phi is not None:
                raise ValueError(
                    f"variant {variant!r} and phi {phi:g} are two networks: give variant for the published one, or phi "
                    "for the rule's"
                )
            if scaling != CompoundScaling(stem_stride=stem_stride):
                raise ValueError(
                    f"variant {variant!r} has a family, depth and width of its own, and follows no rule: leave out "
                    "family, depth, width, alpha, beta, gamma, or give phi instead"
                )
            if variant in V2:
                own_size, own_dropout = V2[variant]
            else:
                width, depth, own_size, own_dropout = PUBLISHED[variant]
        trained_padding, trained_eps = (None, None) if weights is None else trained_with(weights, variant)
        padding = padding or trained_padding or "symmetric"
        if norm_eps is None:
            norm_eps = trained_eps or (1e-3 if padding == "same" else 1e-5)
        dropout = own_dropout if dropout is None else dropout
        image_size = own_size if image_size is None else image_size
        check_resolution(image_size, stem_stride)
        # A checkpoint remembers what was settled on, since the weights it follows from are not given once more.
        self.hparams.update(padding=padding, norm_eps=norm_eps, dropout=dropout, image_size=image_size)

        self.backbone = create_network(
            variant if variant in V2 else family,
            depth,
            width,
            in_channels=in_channels,
            stem_stride=stem_stride,
            dropout=dropout,
            drop_path=drop_path,
            padding=padding,
            norm_eps=norm_eps,
            norm_momentum=norm_momentum,
        )
        self.head = nn.Linear(self.backbone.num_features, num_classes)
        # As the paper's code does, which looks at the number of outputs alone.
        nn.init.uniform_(self.head.weight, -(num_classes**-0.5), num_classes**-0.5)
        nn.init.zeros_(self.head.bias)
        if grad_checkpointing and compile:  # a compiled network updates BatchNorm once, whatever it recomputes
            self.backbone.set_grad_checkpointing(True)
        elif grad_checkpointing:
            recompute_blocks(self.backbone, norm_momentum)
        if channels_last:
            self.backbone.to(memory_format=torch.channels_last)
        if weights is not None:
            report = load_weights(self, weights)
            rank_zero_info(f"{report}; padding {padding}, norm_eps {norm_eps:g}")
        if compile:
            self.backbone.compile()

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of the images it is meant for."""
        return self.hparams.in_channels, *to_2tuple(self.hparams.image_size)

    def check_images(self, shape: Sequence[int]) -> None:
        """Raises ValueError for the shape (C, H, W) of images that it does not take."""
        channels, height, width = shape
        if channels != self.hparams.in_channels:
            expected = self.hparams.in_channels
            raise ValueError(f"images are {channels}x{height}x{width}, but the model was built for {expected} channels")
        check_resolution((height, width), self.hparams.stem_stride)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        there = checkpoint.get("hyper_parameters", {})
        for name in self.from_weights if self._trainer is not None else ():
            if name in there and there[name] != self.hparams[name]:
                raise ValueError(
                    f"the checkpoint was trained with {name} {there[name]}, and this module is built with "
                    f"{self.hparams[name]}: the same weights would compute something else; build it with "
                    f"{name}={there[name]!r}"
                )

    def features(self, images: Tensor) -> Tensor:
        """Pooled embeddings (B, D) of images (B, C, H, W).

        Raises:
            ValueError: For images with other channels than ``in_channels``, or smaller than the total stride.
        """
        channels = self.hparams.in_channels
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"images are {tuple(images.shape)}: expected (B, {channels}, H, W), by in_channels")
        self.check_images(images.shape[1:])
        if self.hparams.channels_last:
            images = images.to(memory_format=torch.channels_last)  # contiguous() would leave a single channel as it is
        return self.backbone(images)

    def configure_optimizers(self) -> Any:
        hp = self.hparams
        momentum, eps = hp.momentum, hp.eps
        if hp.optimizer == "rmsproptf":
            momentum, eps = 0.9 if momentum is None else momentum, 1e-3 if eps is None else eps
        optimizer = optim.create_optimizer(
            self, hp.optimizer, hp.lr, hp.weight_decay, betas=hp.betas, momentum=momentum, eps=eps
        )
        staircase = (hp.decay_rate, hp.decay_epochs) if hp.schedule == "staircase" else None
        return optim.lightning_schedule(self, optimizer, hp.warmup_epochs, hp.min_lr, staircase)


def trained_with(weights: str, variant: Variant | None) -> tuple[Padding | None, float | None]:
    """Padding and BatchNorm's epsilon that weights were trained with; None for what they do not say.

    timm's names say which of its two conventions they follow. torchvision pads symmetrically; its B5 to B7, as they
    came from TensorFlow, and its V2 have TensorFlow's epsilon. The package efficientnet_pytorch does as TensorFlow does
    throughout. A checkpoint of :class:`EfficientNetClassifier`, and a file of :func:`zoo.weights.save`, has both.
    """
    path = Path(weights)
    if path.is_file():
        kind, hyperparameters = describe(path)
        if kind == "torchvision":
            return "symmetric", 1e-3 if variant in ("b5", "b6", "b7", *V2) else None
        if kind == "efficientnet_pytorch":
            return "same", 1e-3
        if hyperparameters.get("padding") in get_args(Padding):
            return hyperparameters["padding"], hyperparameters.get("norm_eps")
    return ("same", 1e-3) if path.name.startswith("tf_efficientnet") else (None, None)
