"""Protocols of what modules, callbacks, data and the command line may ask of each other.

Each is a protocol: whoever has its members is understood, without deriving from anything of ours. What is not here is
not asked for; what is asked of blocks of weights that are split stands in :mod:`zoo.sharding`.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from zoo.common.data_protocols import (  # noqa: F401  # one door to all of them
    HasBaselines,
    HasImageShape,
    HasKinds,
    HasNats,
    HasSamples,
    HasSizeRanges,
    HasSubsets,
    KnownOrder,
    KnownSamples,
    StatesLearnedRanges,
    StatesPreprocessing,
    TrainsInStages,
)

# Modules: images, outputs and figures.


@runtime_checkable
class HasInputShape(Protocol):
    """A module that states what images it takes, for ``zoo cost`` and ``zoo benchmark``."""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W). It raises ValueError where nobody has said so."""


@runtime_checkable
class ChecksImages(Protocol):
    """A module that knows which images it takes before the first ones have come."""

    def check_images(self, shape: Sequence[int]) -> None:
        """Raises ValueError for the shape (C, H, W) of images that it does not take."""


@runtime_checkable
class TrainsOtherwise(Protocol):
    """A module whose training step computes something else than ``forward``, for ``zoo cost``."""

    def training_forward(self, images: Tensor) -> Any:
        """A training step's forward pass of images (B, C, H, W)."""


@runtime_checkable
class PredictsOtherwise(Protocol):
    """A module whose predictions take more than ``forward``, for ``zoo cost``."""

    def predicting_forward(self, images: Tensor) -> Any:
        """A prediction's forward pass of images (B, C, H, W)."""


@runtime_checkable
class PredictsInViews(Protocol):
    """A module that may predict from several views of an image, for ``zoo cost``."""

    def view_cost(self) -> Any:
        """Passes of an image, ``passes``, and their pixels by those of the image, ``factor``. None without views."""


@runtime_checkable
class DrawsPictures(Protocol):
    """A module that shows what it does, for :class:`zoo.callbacks.SavePictures`."""

    def pictures(self, batch: Any) -> dict[str, Tensor]:
        """Images (B, 3, H, W) in [0, 1] by name, of a batch as steps get it; those to be looked at come first."""


@runtime_checkable
class PredictsRows(Protocol):
    """A module whose predictions are not probabilities (B, classes), for :class:`zoo.callbacks.WritePredictions`."""

    def prediction_rows(self, outputs: Any) -> Sequence[Mapping[str, Any] | list[Mapping[str, Any]]] | None:
        """Rows by column of each sample of what ``predict_step`` returned: one, or a list of them.

        None: they are probabilities (B, classes) after all.
        """


@runtime_checkable
class NamesResults(Protocol):
    """A module that says what it has predicted as plain data, for :func:`zoo.load`."""

    def named_results(self, outputs: Any, top: int = 5) -> Sequence[dict[str, Any]]:
        """Results of each image of what ``predict_step`` returned, by name; a classifier names its ``top`` classes."""


@runtime_checkable
class Reconstructs(Protocol):
    """A module that makes images of what it has understood of images, for :func:`zoo.load`."""

    def reconstructions(self, images: Tensor) -> Tensor:
        """Reconstructions (B, C, H, W) of images of this shape, normalised as these are."""


@runtime_checkable
class GivesProbabilities(Protocol):
    """A module whose predictions of several views of an image may be averaged: class probabilities."""

    def probabilities(self, images: Tensor) -> Tensor:
        """Probabilities (B, classes) of images (B, C, H, W)."""


@runtime_checkable
class UsesThresholds(Protocol):
    """A module that chooses among several labels by thresholds of their probabilities."""

    def use_thresholds(self, thresholds: float | Mapping[str, float]) -> None:
        """Sets them: one for all labels, or by name. It raises ValueError for what is no label or no probability."""


@runtime_checkable
class NamesPredictionWriter(Protocol):
    """A module whose predictions are no table of rows, for ``zoo predict``."""

    prediction_writer: Callable[[], Any]
    """Makes the callback, a :class:`zoo.callbacks.WritePredictions` of another kind."""


@runtime_checkable
class WordsMetrics(Protocol):
    """A module with words of its own for its metrics, for the lines after a fit."""

    def metric_text(self, metric: str, value: float) -> str:
        """``accuracy 99.31 %`` for "acc", the name without the stage; "" for what is not worth a line.

        :func:`zoo.common.log.in_words` makes one of a table of words.
        """


@runtime_checkable
class Watched(Protocol):
    """A module whose progress bar shows another metric than accuracy, average precision or loss."""

    watched: tuple[str, ...]
    """Names such as "val/acc_knn"; the first that is logged is shown."""


@runtime_checkable
class HasPeers(Protocol):
    """A module that ``zoo benchmark --peers`` measures against others.

    Its ``hparams`` have ``optimizer``, ``lr`` and ``weight_decay``, which peers are trained with as well.
    """

    peers: Mapping[str, Any]
    """:class:`zoo.common.peers.Peer` by name."""


@runtime_checkable
class DrawsTargets(Protocol):
    """A module that learns from something else than labels (B,), for the batch that ``zoo benchmark`` measures with."""

    def random_targets(self, images: Tensor, generator: torch.Generator) -> Any:
        """Random targets for images (B, C, H, W), on the CPU."""


@runtime_checkable
class Mixes(Protocol):
    """A module that mixes images of a batch, for :class:`zoo.callbacks.ProgressiveLearning`."""

    mix: Any
    """timm's ``Mixup``; None while nothing is mixed."""


@runtime_checkable
class ExchangesLoss(Protocol):
    """A module that may be trained on one loss after another, for :class:`zoo.callbacks.LossSchedule`."""

    def make_loss(self, loss: Any, options: Mapping[str, Any] | None = None) -> Any:
        """Creates what :meth:`use_loss` takes, of a name or an ``nn.Module``. It raises ValueError where it cannot."""

    def use_loss(self, loss: Any, smooth: Any = None) -> None:
        """Trains on a loss from now on, None for the module's own.

        Evaluation logs it as ``val/loss``, and the cross-entropy as ``val/cross_entropy``; where ``smooth``, another of
        :meth:`make_loss`, is a :class:`HasSmoothMetric`, its metric as ``val/smooth``.
        """


@runtime_checkable
class Exports(Protocol):
    """A module whose predictions are a graph of tensors alone, for ``zoo export`` and :mod:`zoo.common.exporting`."""

    exports: Mapping[str, str]
    """Methods by name of the variant, the default one first.

    Each is from images (B, C, H, W), normalised floats, to a dict of tensors, and does what ``torch.export`` follows,
    for every B. One with a parameter ``sizes`` gets (B, 2) int64, height and width of each image before padding, too.
    """


@runtime_checkable
class MeasuresDetections(Protocol):
    """A detector that has a metric for its detections, which another program's may be measured by as well."""

    def detection_metric(self, data: Any) -> Any:
        """A new ``CocoAveragePrecision`` of :mod:`zoo.metrics`, for the classes and sizes that a data module names."""


# Modules: arguments, weights and checkpoints.


@runtime_checkable
class KeepsArguments(Protocol):
    """A module that knows what it was built with, as Lightning's ``save_hyperparameters`` has it."""

    @property
    def hparams(self) -> MutableMapping[str, Any]:
        """Arguments by name."""


@runtime_checkable
class ForeignWeights(Protocol):
    """A module whose parts other programs know by other names."""

    foreign_weights: Any
    """What :func:`zoo.weights.load` has to know of them, a :class:`zoo.weights.Layout`."""


@runtime_checkable
class SetsLayerNorm(Protocol):
    """A module whose argument ``norm_eps`` is LayerNorm's, and follows from weights where it is None."""

    layer_norm_eps: bool


@runtime_checkable
class Pruned(Protocol):
    """A module that has removed parts of its backbone which nothing reads."""

    pruned: frozenset[str]
    """Names of their tensors within the backbone, which files of weights may have."""


@runtime_checkable
class FollowsWeights(Protocol):
    """A module with arguments that follow from ``weights`` where they are None; a checkpoint knows them."""

    from_weights: tuple[str, ...]


@runtime_checkable
class Changeable(Protocol):
    """A module with arguments that may change while a run goes on: they say how it is evaluated."""

    changeable: tuple[str, ...]


@runtime_checkable
class Unpredicted(Protocol):
    """A module with parts that no prediction needs, so that they may be untrained."""

    unpredicted: tuple[str, ...]


# Parts of modules.


@runtime_checkable
class StatesMaps(Protocol):
    """A backbone that returns a list of maps, for a detector; timm's say so in ``feature_info``."""

    strides: Sequence[int]
    """Of each map, in pixels."""
    channels: Sequence[int]


@runtime_checkable
class CreatedByTimm(Protocol):
    """A network that says how timm creates one like it, for weights in timm's format."""

    timm_arguments: tuple[str, Mapping[str, Any]]
    """Name of the architecture, and the arguments of ``timm.create_model`` beside it, without ``num_classes``."""


@runtime_checkable
class HasSmoothMetric(Protocol):
    """A loss that follows from a smooth metric, as those of ``zoo.losses``."""

    def metric(self, logits: Tensor, target: Tensor) -> Tensor:
        """The metric itself, a scalar, of logits (B, classes)."""


# Modules and data: classes.


@runtime_checkable
class HasClasses(Protocol):
    """A module or data module whose classes may have names."""

    classes: Sequence[str] | None
    """By label; None where they are not known."""


@runtime_checkable
class HasCategories(Protocol):
    """A module or data module whose classes have other numbers in files of detections."""

    category_ids: Sequence[int] | None
    """By label; None where they are not known."""


@runtime_checkable
class CountsClasses(Protocol):
    """A data module that knows how many classes its labels are of."""

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None, or an AttributeError, where there are no labels."""


@runtime_checkable
class CountsLabels(Protocol):
    """A data module that knows how often each class occurs in its training samples, for the weights of a loss."""

    def class_counts(self) -> Sequence[int]:
        """Number of training samples of each class, in the order of ``classes``; of several labels, their positives.

        It raises ValueError where samples have no labels.
        """

    def sample_count(self) -> int:
        """Number of training samples: with several labels each, not the sum of the counts."""


# Callbacks.


@runtime_checkable
class WritesFile(Protocol):
    """A callback that writes a file, which the lines after a run name."""

    writes: str
    """What it is, "predictions" for example."""
    last_path: Path | None
    """Where the last one is; None before."""
