"""Names of a model's outputs. They belong to the model and its checkpoints, and data's labels are matched to them.

A folder numbers its classes in the order of their names, a JSON file by its categories: the same class has another
label in other data. A module that is :class:`NamedClasses` takes its names from the data that it is first trained on,
keeps them in its checkpoints, and from then on reads the labels of any data module with ``classes`` by name.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unicodedata import normalize

import torch
from torch import Tensor

from zoo._lightning import rank_zero_info
from zoo.checkpoints import content_of, hyperparameters_of
from zoo.common.protocols import CountsClasses, HasCategories, HasClasses


def names_of(owner: Any) -> list[str] | None:
    """Class names of a data module or a module, by label: ``owner.classes``, if that is a list of texts."""
    return _names(owner.classes if isinstance(owner, HasClasses) else None)


def ids_of(owner: Any) -> Sequence[int] | None:
    """Category ids of a data module or a module, by label."""
    return owner.category_ids if isinstance(owner, HasCategories) else None


def count_of(data: Any) -> int | None:
    """Number of classes of a data module; None if it has none, or does not say."""
    try:
        return data.num_classes if isinstance(data, CountsClasses) else None
    except AttributeError:  # of unlabelled data; some versions of Python look, and do not ask
        return None


def in_checkpoint(content: Mapping[str, Any]) -> tuple[list[str] | None, list[int] | None]:
    """The names of the outputs and the category ids in a Lightning checkpoint, by label; None for what it has not.

    Where the module has not kept them, they are those of our data module that it was trained on.
    """
    for state in (content, *(state for state in content.values() if isinstance(state, Mapping))):
        if (names := _names(state.get("classes"))) is not None:
            return names, _ids(state.get("category_ids"), len(names))
    return None, None


def classes_of(path: str | Path) -> tuple[list[str] | None, int | None]:
    """Names of a checkpoint's outputs, by label, and the number of classes that it was built for; None if unknown."""
    names, _ = in_checkpoint(content_of(path))
    count = hyperparameters_of(path).get("num_classes")
    return names, count if type(count) is int else None


def matched(data: Sequence[str], model: Sequence[str]) -> list[int] | None:
    """The model's label for each of the data's, by name; None if both have the same names in the same order.

    Raises:
        ValueError: If the model does not know a name, or if one stands for several classes.
    """
    if list(data) == list(model):
        return None
    if unknown := [name for name in dict.fromkeys(data) if name not in model]:
        raise ValueError(
            f"the data has classes that the model does not know: {_some(unknown)}; it knows {_some(model)}. Rename or "
            "leave out what it was not trained on; to train on it, start a new fit with the checkpoint as weights"
        )
    several = Counter(data) | Counter(model)
    if twice := [name for name in dict.fromkeys(data) if several[name] > 1]:
        raise ValueError(
            f"the data's classes are others than the model's, and {_some(twice)} stands for several: give each its name"
        )
    label_of = {name: label for label, name in enumerate(model)}
    return [label_of[name] for name in data]


def category_ids(module: Any, data: Any) -> Sequence[int] | None:
    """Category ids for a results file, by the model's label: the data's category of that name, else the model's.

    Raises:
        ValueError: If the model's category of a class that the data does not have is another class in the data.
    """
    names, ids = names_of(module), ids_of(module)
    theirs, here = names_of(data), ids_of(data)
    if names is None or theirs is None or here is None:
        return ids if here is None else here
    by_name = dict(zip(theirs, here, strict=False))
    found = []
    name_here = {number: name for name, number in by_name.items()}
    for label, name in enumerate(names):
        number = by_name.get(name, None if ids is None else ids[label])
        if number is None or (name not in by_name and number in name_here):
            other = "unknown" if number is None else f"{number}, which is {name_here[number]} in the data"
            raise ValueError(
                f"the data has no class {name}, and the model's category of it is {other}: a file of detections would "
                "mix them up. Predict away from that data, with predict_root and without its annotations"
            )
        found.append(number)
    return found


class NamedClasses:
    """Gives a module's outputs names: ``class Net(NamedClasses, LightningModule)``, with ``hparams.num_classes``.

    Names are taken from the data module of the first fit, if it has ``classes``, and kept in checkpoints. From then on
    data with other classes is read by name, in any order and any subset; with a class that has no output, validating,
    testing and continuing end with a ValueError that names it. A fit that does not continue a checkpoint learns the
    outputs anew, and takes the data's names. Prediction looks at no labels. Data without names is read by its labels.

    The module's steps take their labels from :meth:`own_labels`.

    Attributes:
        classes: The outputs' names, by label. None: not known.
        category_ids: What files of detections call them, if the data says so.
    """

    classes: list[str] | None = None
    category_ids: list[int] | None = None
    hparams: Any
    label_table: Tensor | None = None
    """(classes of the data,) the model's label of each, where they differ."""
    _looked = False

    def own_labels(self, labels: Tensor) -> Tensor:
        """The model's labels for those of the data: (B,) indices, or (B, classes) one number for each class."""
        self._look()
        if self.label_table is None:
            return labels
        table = self.label_table.to(labels.device)
        if labels.ndim < 2:  # a label that the data has no class for stays one that the model has none for
            known = labels.clamp(0, len(table) - 1)
            return torch.where(known == labels, table[known], self.hparams.num_classes)
        own = labels.new_zeros(len(labels), self.hparams.num_classes)
        own[:, table] = labels
        return own

    @property
    def num_labels(self) -> int:
        """Number of classes that the labels at hand are of: the outputs', or those of the data if they differ."""
        self._look()
        return self.hparams.num_classes if self.label_table is None else len(self.label_table)

    def _look(self) -> None:
        """Matches the classes if no hook has, since a subclass has replaced it."""
        if not self._looked and getattr(self, "_trainer", None) is not None:
            self.match_classes()

    def match_classes(self) -> None:
        """Takes the data's names for the outputs if they have none, else looks up which label is which output.

        Raises:
            ValueError: See :func:`matched`.
        """
        trainer: Any = getattr(self, "_trainer", None)
        data = None if trainer is None else trainer.datamodule
        before, self.label_table, names = self.label_table, None, names_of(data)
        self._looked = True
        if names is None or trainer.predicting:
            return
        learns = trainer.state.fn == "fit" and len(names) <= self.hparams.num_classes
        if learns and trainer.ckpt_path is None and self.classes is not None and not set(names) <= set(self.classes):
            rank_zero_info(f"the outputs, until now {_some(self.classes)}, are from now on {_some(names)}")
            self.classes = None
        if self.classes is None and learns:
            self.classes, self.category_ids = names, _ids(ids_of(data), len(names))
        if self.classes is None or (table := matched(names, self.classes)) is None:
            return
        if before is None:
            rank_zero_info(f"the data's classes, {_some(names)}, are matched by name to the model's")
        with torch.inference_mode(False):  # what an evaluation looks up, training uses
            self.label_table = torch.tensor(table, device=self.device)  # type: ignore[attr-defined]

    def on_fit_start(self) -> None:
        self.match_classes()

    # Once more, since a strategy that splits the weights restores after the start, and some data is opened late.

    def on_train_start(self) -> None:
        self.match_classes()

    def on_validation_start(self) -> None:
        self.match_classes()

    def on_test_start(self) -> None:
        self.match_classes()

    def on_predict_start(self) -> None:
        self.match_classes()

    def teardown(self, stage: str) -> None:
        self.label_table, self._looked = None, False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.classes is not None:
            checkpoint |= {"classes": self.classes, "category_ids": self.category_ids}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.take_classes(checkpoint)

    def take_classes(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes the names in a checkpoint for the outputs."""
        names, ids = in_checkpoint(checkpoint)
        fit = names is not None and len(names) <= self.hparams.num_classes
        self.classes, self.category_ids = (names, ids) if fit else (None, None)


def _names(found: Any) -> list[str] | None:
    is_names = isinstance(found, list | tuple) and found and all(isinstance(name, str) for name in found)
    return [normalize("NFC", str(name)) for name in found] if is_names else None


def _ids(found: Any, count: int) -> list[int] | None:
    is_ids = isinstance(found, list | tuple) and len(found) == count and all(isinstance(i, int) for i in found)
    return [int(i) for i in found] if is_ids else None


def _some(names: Sequence[str]) -> str:
    """Names for a message, of many the first ten."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
