"""Predictions in a file, row by row as they come."""

import csv
import heapq
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from zoo import loaders
from zoo._lightning import Callback
from zoo.callbacks.run_directory import run_directory
from zoo.classes import names_of


class WritePredictions(Callback):
    """Writes predictions to a CSV file in the run's directory, in the data's order, and keeps none of them in memory.

    A classifier's probabilities (B, classes) become the columns file, class and probability; several labels an image,
    those of probability 0.5 or more, are joined by "|". Class names are the module's ``classes``, which it has from its
    checkpoint, else those of the data module if there are as many; a class without a name is its number. Values that
    are no probabilities are called score. A module that predicts something else defines ``prediction_rows(outputs)``,
    which gives for each sample one dictionary of columns, or a list of them for as many rows.

    An image that could not be read has a row with empty columns. The file appears when all is predicted; an interrupted
    run leaves none, and an older one as it was. With several processes it is merged in a file system they share.

    Args:
        filename: Name of the file.

    Raises:
        ValueError: For predictions that are neither of these.
    """

    writes = "predictions"

    def __init__(self, filename: str = "predictions.csv") -> None:
        self.filename = filename
        self.last_path: Path | None = None
        self._part: Path | None = None
        self._file: TextIO | None = None
        self._columns: list[str] | None = None
        self._count = self._before = 0

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        folder = run_directory(trainer)  # all ranks have to ask
        folder.mkdir(parents=True, exist_ok=True)
        self.last_path = folder / self.filename
        self._part = folder / f".{self.filename}.rank{trainer.global_rank}"
        self._file = self._part.open("w", newline="", encoding="utf-8", errors="surrogateescape")
        self._columns, self._count, self._before = None, 0, 0

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        predicted = self._entries(pl_module, outputs, trainer.datamodule)
        if not batch_idx:
            self._before = self._count  # in other loaders
        samples = self._samples(trainer, batch_idx, dataloader_idx, len(predicted))
        self._count += len(predicted)
        read = sum(present for _, _, present in samples)
        predicted = predicted if read else []  # of what stands in for a batch that could not be read
        if read != len(predicted):
            raise ValueError(f"{len(predicted)} predictions for {read} images: expected one entry for each image")
        entries = iter(predicted)
        for index, name, present in samples:
            entry = next(entries) if present else None
            if name is not None:
                self._write(dataloader_idx, index, name, entry)

    def _entries(self, module: Any, outputs: Any, data: Any) -> Sequence[Any]:
        """What is to be written of each image: here its rows, as dictionaries of columns."""
        rows = _rows(module, outputs, names_of(module), names_of(data))
        self._columns = self._columns or next((list(found[0]) for found in rows if found), None)
        return rows

    def _write(self, loader: int, index: int, name: str, entry: Any) -> None:
        """Writes an entry, or None for an image that could not be read, to this process's part."""
        assert self._file is not None
        writer = csv.writer(self._file)
        for row in [{}] if entry is None else entry:
            writer.writerow([loader, index, name, *(row.get(column, "") for column in self._columns or [])])

    def _samples(
        self, trainer: Any, batch_idx: int, dataloader_idx: int, count: int
    ) -> list[tuple[int, str | None, bool]]:
        """(index, name, whether it could be read) of a batch's samples; no name where one only fills a rank up."""
        loader = loaders.nth(trainer.predict_dataloaders, dataloader_idx)
        sampler: Any
        dataset: Any
        sampler, dataset = getattr(loader, "sampler", None), getattr(loader, "dataset", None)
        if hasattr(sampler, "batch_indices") and hasattr(dataset, "present"):
            indices = sampler.batch_indices(batch_idx)
            present = {index for index, _ in dataset.present(indices)}
            return [(index, dataset.name(index), index in present) for index in indices]
        # Somebody else's loader: numbered as they come, and round-robin over ranks, as samplers deal them out. What a
        # sampler adds, so that all ranks get the same number, comes after the last.
        numbers = [(self._count + i) * trainer.world_size + trainer.global_rank for i in range(count)]
        sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", sampler)  # where Lightning has put it
        adds = isinstance(sampler, DistributedSampler)
        end = self._before * trainer.world_size + len(sampler.dataset) if adds else math.inf
        return [(number, str(number) if number < end else None, True) for number in numbers]

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        assert self._file is not None
        assert self._part is not None
        assert self.last_path is not None
        self._file.close()
        trainer.strategy.barrier("predictions")
        problem: str | None = None
        if trainer.is_global_zero:
            parts = [self._part.with_name(f".{self.filename}.rank{rank}") for rank in range(trainer.world_size)]
            whole = self._part.with_name(f".{self.filename}")
            try:
                self._merge(parts, whole)
                os.replace(whole, self.last_path)
            except ValueError as error:
                problem = str(error)
            finally:
                whole.unlink(missing_ok=True)
        problem = trainer.strategy.broadcast(problem)  # which all wait for
        self._part.unlink(missing_ok=True)
        if problem is not None:
            raise ValueError(problem)

    def _merge(self, parts: Sequence[Path], whole: Path) -> None:
        _merge(parts, whole, ["file", *(self._columns or [])])

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self._file is not None and self._part is not None:
            self._file.close()
            self._part.unlink(missing_ok=True)


def _rows(
    module: Any, outputs: Any, own: Sequence[str] | None, of_data: Sequence[str] | None
) -> list[list[Mapping[str, Any]]]:
    """The rows of each sample, as dictionaries of columns; ``own`` names the outputs, or else what the data says."""
    if hasattr(module, "prediction_rows"):
        return [rows if isinstance(rows, list) else [rows] for rows in module.prediction_rows(outputs)]
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or not outputs.is_floating_point():
        shape = f"a tensor of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"{type(module).__name__} predicts {shape}, not probabilities (B, classes): "
            "define prediction_rows(outputs) to say what is to be written"
        )
    values = outputs.detach().float().cpu()
    count = values.shape[1]
    classes = [] if own is None and len(of_data or ()) != count else list(own or of_data or ())
    classes += map(str, range(len(classes), count))
    several = bool(module.hparams.get("multi_label", False))
    sums_to_one = bool(torch.isclose(values.sum(1), torch.ones(len(values)), atol=1e-2).all())
    column = "probability" if several or (sums_to_one and bool((values >= 0).all())) else "score"
    rows: list[list[Mapping[str, Any]]] = []
    for scores in values:
        chosen = (scores >= 0.5).nonzero().flatten().tolist() if several else [int(scores.argmax())]
        names = "|".join(classes[index] for index in chosen)
        rows.append([{"class": names, column: "|".join(f"{scores[index].item():.6f}" for index in chosen)}])
    return rows


def _merge(parts: Sequence[Path], whole: Path, header: Sequence[str]) -> None:
    """Merges files that are sorted by loader and index, without reading them into memory."""

    def rows(part: Path) -> Iterator[tuple[int, int, list[str]]]:
        with part.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            for loader, index, *row in csv.reader(file):
                yield int(loader), int(index), row

    with whole.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for _, _, row in heapq.merge(*map(rows, parts), key=lambda row: row[:2]):
            writer.writerow(row + [""] * (len(header) - len(row)))
