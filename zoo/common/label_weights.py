"""Weights of classes and of positives in a classifier's loss: numbers, or what balances the training data."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from zoo.common.precision import FullPrecision
from zoo.common.protocols import CountsLabels

Balanced = Literal["balanced"]
NUMBERS = "numbers, one for each class"


class LabelWeights(FullPrecision):
    """Weights (classes,) of a loss, float32: of classes, and of a label's positives against its negatives.

    "balanced" follows from the training data, by :meth:`settle` before a fit, and is kept by checkpoints under
    ``classes`` and ``positives``. Numbers are an argument's, and are in no state dict.

    Args:
        num_classes: Number of classes.
        class_weight: One number for each class, 0 or more; "balanced", images / (classes * images of the class), of
            the classes that occur (King and Zeng 2001), so that their mean over the images is 1, and 0 for the others.
        pos_weight: One number for all labels or one for each, 0 or more; "balanced", negatives / positives, and 1 for
            a label that all images have or none.

    Raises:
        ValueError: For weights of another number, negative ones, and all of them 0.
    """

    classes: Tensor | None
    positives: Tensor | None

    def __init__(
        self,
        num_classes: int,
        class_weight: Balanced | Sequence[float] | None = None,
        pos_weight: Balanced | float | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.num_classes, self._counted = num_classes, False
        self.balanced = {"classes": class_weight == "balanced", "positives": pos_weight == "balanced"}
        pos_weight = [pos_weight] * num_classes if isinstance(pos_weight, int | float) else pos_weight
        for name, option, given in (("classes", "class_weight", class_weight), ("positives", "pos_weight", pos_weight)):
            # Zeros, which no loss could be made of, stand for what is not known yet.
            found = torch.zeros(num_classes) if self.balanced[name] else _checked(option, given, num_classes)
            self.register_buffer(name, found, persistent=self.balanced[name])
        self._known = not any(self.balanced.values())

    def of_loss(self) -> dict[str, Tensor]:
        """The weights that there are, by the argument of :func:`zoo.common.classification_losses.classification_loss`.

        Raises:
            ValueError: If they are to balance data that nobody has counted.
        """
        if not self._known:  # looked at once, since on a device the host waits
            if not all(getattr(self, name).any() for name, asked in self.balanced.items() if asked):
                raise self._unsettled()
            self._known = True
        found = {"class_weight": self.classes, "pos_weight": self.positives}
        return {option: weights for option, weights in found.items() if weights is not None}

    def settle(self, module: Any, data: Any) -> None:
        """Balances the weights by the data of a fit, if it can count; in ``setup``, before a checkpoint replaces them.

        Args:
            module: The classifier, a :class:`zoo.common.classes.NamedClasses`.
            data: The Trainer's data module, or None.
        """
        self._counted = isinstance(data, CountsLabels)
        if self._counted and any(self.balanced.values()):
            self.balance(module, data)

    def check_settled(self, is_continued: bool) -> None:
        """Raises ValueError if a fit balances by data of another fit that it does not continue; as training starts."""
        if any(self.balanced.values()) and not self._counted and not is_continued:
            raise self._unsettled()

    def _unsettled(self) -> ValueError:
        return ValueError(
            f"{self._asked} 'balanced' needs a data module that counts the labels of its training data, by "
            f"class_counts and sample_count: give it one in a fit, or give {NUMBERS}"
        )

    @property
    def _asked(self) -> str:
        names = {"class_weight": "classes", "pos_weight": "positives"}
        return " and ".join(option for option, name in names.items() if self.balanced[name])

    def balance(self, module: Any, data: Any) -> None:
        """Sets the weights that are to be balanced by the labels of some training data.

        Args:
            module: Whose classes the data's are matched to.
            data: The data module, which is :class:`zoo.common.protocols.CountsLabels`.

        Raises:
            ValueError: For data without labels, or with more classes.
        """
        module.match_classes()
        try:
            theirs = torch.tensor(list(data.class_counts()), dtype=torch.float64)
        except ValueError as error:
            raise ValueError(f"{self._asked} 'balanced': {error}: give {NUMBERS}") from error
        if len(theirs) > self.num_classes or not theirs.any():
            raise ValueError(
                f"{self._asked} 'balanced': the training data has {int(theirs.sum())} labels of {len(theirs)} classes, "
                f"and num_classes is {self.num_classes}: give {NUMBERS}"
            )
        table = module.label_table
        counts = theirs.new_zeros(self.num_classes)
        counts[torch.arange(len(theirs)) if table is None else table.cpu()] = theirs
        if self.balanced["classes"] and self.classes is not None:
            weights = counts.sum() / ((counts > 0).sum() * counts)
            self.classes.copy_(weights.where(counts > 0, 0))
        if self.balanced["positives"] and self.positives is not None:
            images = data.sample_count()
            weights = (images - counts) / counts
            self.positives.copy_(weights.where((counts > 0) & (counts < images), 1))


def _checked(option: str, given: Any, num_classes: int) -> Tensor | None:
    """Weights as a tensor, once they are a loss's."""
    if given is None:
        return None
    if isinstance(given, str) or not isinstance(given, Sequence):
        seen = repr(given) if isinstance(given, str | int | float) else f"a {type(given).__name__}"
        raise ValueError(f"{option} is {seen}: expected 'balanced' or {NUMBERS}")
    if len(given) != num_classes:
        raise ValueError(f"{option} has {len(given)} numbers for {num_classes} classes: give one for each class")
    if not all(weight >= 0 and math.isfinite(weight) for weight in given):
        raise ValueError(f"{option} is {list(given)}: expected finite numbers of 0 or more")
    if not any(given):
        raise ValueError(f"{option} is 0 for every class, so that nothing is learned: expected a number above 0")
    return torch.tensor(list(given), dtype=torch.float32)
