"""Labels of samples: how often each class occurs, and whether they mean the same as a checkpoint's."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from datamodules.reading.json_values import one_form


def labels_of(samples: Any, owner: str) -> np.ndarray:
    """Labels of samples, of which none is made: (N,) numbers of classes, or (N, labels) of 0 and 1.

    Args:
        samples: See :class:`datamodules.loading.seeding.Samples`; None if there are none.
        owner: The data module's name, for the message.

    Raises:
        ValueError: If the samples do not say their labels.
    """
    found = getattr(samples, "labels", None)
    if found is None:
        raise ValueError(
            f"{owner} cannot count or balance classes, for its training samples have no labels: expected a folder for "
            "each class, or samples with an attribute labels"
        )
    return np.asarray(found, dtype=np.int64)


def counts_of(labels: np.ndarray, classes: int | None = None) -> list[int]:
    """Number of samples of each class; of several labels a sample (N, labels), how many have each.

    Args:
        labels: (N,) or (N, labels), as :func:`labels_of` has them.
        classes: How many classes there are; classes without samples count 0. None: as many as occur.

    Raises:
        ValueError: For a label outside of [0, classes).
    """
    if labels.ndim == 2:
        return np.count_nonzero(labels, axis=0).tolist()
    highest = int(labels.max(initial=-1))
    expected = highest + 1 if classes is None else classes
    if labels.min(initial=0) < 0 or highest >= expected:
        raise ValueError(f"labels run from {labels.min()} to {highest}: expected numbers from 0 to {expected - 1}")
    return np.bincount(labels, minlength=expected).tolist()


def check_same(ours: Sequence[str], theirs: Sequence[str], module: Any) -> None:
    """Raises ValueError if a label of ours means another class in a checkpoint, to a module that goes by labels.

    That is one which learns classes, and does not match their names to its own itself.
    """
    if "num_classes" not in getattr(module, "hparams", ()) or hasattr(module, "classes"):
        return
    forms = [[one_form(str(name)) for name in names] for names in (ours, theirs)]
    wrong = [label for label, (a, b) in enumerate(zip_longest(*forms)) if a != b and label < len(ours)]
    if wrong:
        there = forms[1][wrong[0]] if wrong[0] < len(theirs) else "nothing"
        raise ValueError(
            f"the checkpoint's classes are others than this data's: label {wrong[0]} is {there} there and "
            f"{forms[0][wrong[0]]} here, and {type(module).__name__} goes by labels "
            "(zoo.common.classes.NamedClasses reads them by name)"
        )
