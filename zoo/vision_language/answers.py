"""Accuracy of answers, in groups: by kind of question, part of the data and control, all counted on the device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from zoo.common.batch import to_device

CONTROLS = ("", "shuffled", "text")
"""Answers by the sample's own images; by those of another sample; and without any."""


class AnswerAccuracy(Metric):
    """Share of answers that are right, and in groups: see :meth:`compute`.

    Args:
        kinds: Kinds of questions.
        subsets: Parts of the data.
        controls: Ways in which answers are found.
    """

    right: Tensor
    total: Tensor

    def __init__(self, kinds: Sequence[str] = (), subsets: Sequence[str] = (), controls: Sequence[str] = CONTROLS):
        super().__init__()
        self.kinds, self.subsets, self.controls = list(kinds), list(subsets), list(controls)
        shape = len(self.controls), len(self.kinds) + 1, len(self.subsets) + 1  # the last of each: not known
        for name in ("right", "total"):
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self, right: Tensor, kinds: Sequence[str] | None, subsets: Sequence[int] | None, control: str = ""
    ) -> None:
        """Counts answers.

        Args:
            right: (B,) bool, on the device.
            kinds: Kind of each question. None: not known.
            subsets: Number of the part that each is of. None: not known.
            control: Which way.

        Raises:
            ValueError: For a part that there is not.
        """
        number = {kind: index for index, kind in enumerate(self.kinds)}
        rows = [number.get(kind, len(number)) for kind in kinds or [""] * len(right)]
        columns = list(subsets if self.subsets and subsets is not None else [len(self.subsets)] * len(right))
        if wrong := [column for column in columns if not 0 <= column <= len(self.subsets)]:
            raise ValueError(f"subset is {wrong[0]}, and the data has {len(self.subsets)}: {', '.join(self.subsets)}")
        cells = torch.tensor(rows) * (len(self.subsets) + 1) + torch.tensor(columns)
        cells = to_device(cells, right.device)
        way = self.controls.index(control)
        for state, values in (("right", right), ("total", torch.ones_like(right))):
            counts = getattr(self, state)
            flat = counts[way].flatten().index_add(0, cells, values.to(counts.dtype))
            counts[way] = flat.view_as(counts[way])

    def compute(self) -> dict[str, Tensor]:
        """Accuracies in [0, 1] by name, those that something was counted for.

        ``acc`` of all, ``acc_KIND`` of a kind, ``acc_SUBSET`` of a part, ``acc_SUBSET_KIND`` of a kind within it; those
        of controls have their names in front: ``shuffled_acc``.
        """
        found: dict[str, Any] = {}
        for number, control in enumerate(self.controls):
            right, total = self.right[number], self.total[number]
            prefix = f"{control}_acc" if control else "acc"
            cells: dict[str, Any] = {prefix: (slice(None), slice(None))}
            for row, kind in enumerate(self.kinds):
                cells[f"{prefix}_{kind}"] = (row, slice(None))
            for column, subset in enumerate(self.subsets):
                cells[f"{prefix}_{subset}"] = (slice(None), column)
                cells |= {f"{prefix}_{subset}_{kind}": (row, column) for row, kind in enumerate(self.kinds)}
            for name, cell in cells.items():
                counted = total[cell].sum()
                found[name] = torch.where(counted > 0, right[cell].sum() / counted.clamp(min=1), torch.nan)
        return found
