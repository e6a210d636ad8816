"""Protocols of what may be asked of data modules and of loaders; :mod:`zoo.common.protocols` has them all."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

# Data modules.


@runtime_checkable
class HasImageShape(Protocol):
    """A data module that knows what images its batches have."""

    @property
    def image_shape(self) -> Sequence[int] | None:
        """(C, H, W); None where they differ."""


@runtime_checkable
class StatesPreprocessing(Protocol):
    """A data module that says what evaluation and prediction do to an image, for a checkpoint to keep."""

    def preprocessing(self) -> Mapping[str, Any]:
        """Plain data, of which ``datamodules.preprocessing.create`` makes the function."""


@runtime_checkable
class HasSamples(Protocol):
    """A data module with loaders for splits that may be empty."""

    def samples(self, split: Any) -> Any:
        """A split's data set, "train", "val", "test" or "predict"; None if there is none."""


@runtime_checkable
class HasCaptions(Protocol):
    """A data module whose training images have captions, to which a tokenizer may be fitted."""

    def captions(self) -> Sequence[str]:
        """All captions of the training images. It raises ValueError where its images have none."""


@runtime_checkable
class HasBaselines(Protocol):
    """A data module that knows how accurate others are on its test split."""

    def baselines(self) -> Mapping[str, float]:
        """Accuracies in [0, 1] by name."""


@runtime_checkable
class HasNats(Protocol):
    """A data module that knows how likely its test split is to others."""

    def nats(self) -> Mapping[str, float]:
        """Log-likelihoods in nats an image by name. It raises ValueError for images as they are here."""


@runtime_checkable
class HasSizeRanges(Protocol):
    """A data module for which average precision by size has other sizes than COCO's."""

    size_ranges: Mapping[str, tuple[float, float]] | None
    """(low, high) in pixels squared by name; None for COCO's."""


@runtime_checkable
class StatesLearnedRanges(Protocol):
    """A data module that shows training images in several sizes, each for objects of its own."""

    @property
    def learned_ranges(self) -> Mapping[int, tuple[float, float | None]] | None:
        """Least and greatest size that is learned, by the short side of a training image; None: all at each."""


@runtime_checkable
class HasSubsets(Protocol):
    """A data module whose evaluation data has parts, of which each sample may say the number."""

    subsets: Sequence[str]
    """Names by number."""


@runtime_checkable
class HasKinds(Protocol):
    """A data module whose samples are of several kinds, of which each may say the name, as questions are."""

    kinds: Sequence[str]


@runtime_checkable
class TrainsInStages(Protocol):
    """A data module whose training images may change from epoch to epoch."""

    def train_in_stages(self, stages: Any) -> None:
        """Takes by first epoch what to change from there on; nothing, to go back."""


# Loaders: their samplers and data sets.


@runtime_checkable
class KnownOrder(Protocol):
    """A sampler of whole batches whose order is a function of the epoch, and can be continued in the midst of one."""

    epoch: int

    def batch_indices(self, batch: int) -> list[int]:
        """Samples of a batch for this process, by number in the data set."""

    def keys_of_batch(self, batch: int, epoch: int) -> Any:
        """Keys that the data set makes that batch of; the last part of each is the sample's number."""

    def first_batch(self, epoch: int) -> int:
        """The number of the batch that an epoch starts with, more than 0 after :meth:`resume`."""

    def resume(self, position: Any) -> None:
        """Goes on behind the samples that a checkpoint's position has done."""


@runtime_checkable
class KnownSamples(Protocol):
    """A data set that names its samples and knows which could be read."""

    def __len__(self) -> int: ...

    def __getitem__(self, keys: Any) -> Any:
        """The samples of a batch's keys."""

    def name(self, index: int) -> str:
        """A sample's file, or its number."""

    def present(self, indices: Sequence[int]) -> list[tuple[int, str]]:
        """(index, name) of those that could be read."""

    def keys_of(self, indices: Sequence[int]) -> Any:
        """Keys that it makes some samples of, as an evaluation before all training."""
