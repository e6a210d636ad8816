"""Predictions in a file, row by row as they come."""

import contextlib
import csv
import heapq
import math
import os
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from zoo._lightning import Callback
from zoo.callbacks.run_directory import run_directory
from zoo.common import loaders
from zoo.common.classes import names_of
from zoo.common.pictures import class_name
from zoo.common.protocols import KnownOrder, KnownSamples, PredictsRows

Sample = tuple[int, str | None, bool]
"""Number and name of a sample, and whether it could be read."""
FEW_CLASSES = 100
"""So many columns a table may have without being asked for them."""


class WritePredictions(Callback):
    """Writes predictions to a CSV file in the run's directory, in the data's order, and keeps none of them in memory.

    A classifier's probabilities (B, classes) become the columns file, class and probability, those of the most likely
    class, and ``probability_NAME`` for each class, in the outputs' order. Several labels an image, those of probability
    0.5 or more, are joined by "|"; where there is none, class is empty and probability the highest there is. Class
    names are the module's ``classes``, which it has from its checkpoint, else those of the data module if there are as
    many; a class without a name is its number. Values that are no probabilities are called score. A module that
    predicts something else defines ``prediction_rows(outputs)``, which gives for each sample one dictionary of columns,
    or a list of them for as many rows.

    An image that could not be read has a row with all other columns empty. The file appears when all is predicted; an
    interrupted run leaves none, and an older one as it was. With several processes it is merged in a file system they
    share. Runs that predict into one folder at a time do not disturb each other; the last to end writes the file.

    Args:
        filename: Name of the file.
        all_classes: Whether there is a column for each class. None: if there are at most 100.

    Raises:
        ValueError: For predictions that are neither of these.
        OSError: If what another process has written cannot be found.
    """

    writes = "predictions"

    patience = 10.0
    """Seconds in which files of other processes have to appear: a shared file system may show them late."""

    def __init__(self, filename: str = "predictions.csv", all_classes: bool | None = None) -> None:
        self.filename, self.all_classes = filename, all_classes
        self.last_path: Path | None = None
        self._whole = Path(filename)
        self._part: Path | None = None
        self._file: TextIO | None = None
        self._columns: list[str] | None = None
        self._count = self._before = 0

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        folder = run_directory(trainer)  # all ranks have to ask
        run = trainer.strategy.broadcast(uuid.uuid4().hex[:12])  # another one may predict into the same folder
        self.last_path = folder / self.filename
        self._begin(pl_module, trainer.datamodule, folder / f".{self.filename}.{run}", trainer.global_rank)

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        predicted = self._entries(pl_module, outputs, trainer.datamodule)
        if not batch_idx:
            self._before = self._count  # in other loaders
        samples = self._samples(trainer, batch_idx, dataloader_idx, len(predicted))
        self._count += len(predicted)
        # What stands in for a batch that could not be read is nobody's.
        self._add(predicted if any(present for _, _, present in samples) else [], samples, dataloader_idx)

    def write_file(self, path: Path, module: Any, predicted: Iterable[tuple[Sequence[Sample], Any]]) -> None:
        """Writes predictions that no Trainer makes, as they come. The file appears when all are there.

        Args:
            path: The file.
            module: Whose predictions they are.
            predicted: The samples of a batch, numbered from 0, and what ``predict_step`` returned for those of them
                that could be read; None where there are none.

        Raises:
            ValueError: As under a Trainer.
        """
        whole = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
        self._begin(module, None, whole)
        part = self._part_of(0)
        assert self._file is not None
        try:
            with self._file:
                for samples, outputs in predicted:
                    self._add([] if outputs is None else self._entries(module, outputs, None), samples, 0)
            self._merge([part], whole, 0)
            os.replace(whole, path)
        finally:
            _remove(whole)
            _remove(part)
        self.last_path = path

    def _begin(self, module: Any, data: Any, whole: Path, rank: int = 0) -> None:
        """Begins a file: opens the part of a process."""
        self._whole = whole
        self._part = self._part_of(rank)
        self._file = create_file(self._part)
        self._columns, self._count, self._before = None, 0, 0

    def _add(self, predicted: Sequence[Any], samples: Sequence[Sample], loader: int) -> None:
        """Writes the entries of those samples of a batch that could be read, and that the others could not be."""
        read = sum(present for _, _, present in samples)
        if read != len(predicted):
            raise ValueError(f"{len(predicted)} predictions for {read} images: expected one entry for each image")
        entries = iter(predicted)
        for index, name, present in samples:
            entry = next(entries) if present else None
            if name is not None:
                self._write(loader, index, name, entry)

    def _entries(self, module: Any, outputs: Any, data: Any) -> Sequence[Any]:
        """The entries of each image: here its rows, as dictionaries of columns."""
        rows = _rows(module, outputs, names_of(module), names_of(data), self.all_classes)
        self._columns = self._columns or next((list(found[0]) for found in rows if found), None)
        return rows

    def _write(self, loader: int, index: int, name: str, entry: Any) -> None:
        """Writes an entry, or None for an image that could not be read, to this process's part."""
        assert self._file is not None
        writer = csv.writer(self._file)
        for row in [{}] if entry is None else entry:
            writer.writerow([loader, index, name, *(row.get(column, "") for column in self._columns or [])])

    def _samples(self, trainer: Any, batch_idx: int, dataloader_idx: int, count: int) -> list[Sample]:
        """A batch's samples; no name where one only fills a rank up."""
        loader = loaders.nth(trainer.predict_dataloaders, dataloader_idx)
        sampler: Any
        dataset: Any
        sampler, dataset = getattr(loader, "sampler", None), getattr(loader, "dataset", None)
        if isinstance(sampler, KnownOrder) and isinstance(dataset, KnownSamples):
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
        problem: Exception | None = None
        if trainer.is_global_zero:
            parts = [self._part_of(rank) for rank in range(trainer.world_size)]
            files = self._files(trainer)
            try:
                self._wait_for(parts)
                for loader, (whole, _) in enumerate(files):
                    self._merge(parts, whole, loader)
                for whole, file in files:
                    os.replace(whole, file)
            except (OSError, ValueError) as error:
                problem = error
            finally:  # of all ranks: who starts the run may look as soon as this one ends
                for left in (*(whole for whole, _ in files), *parts):
                    _remove(left)
        kind, text = trainer.strategy.broadcast((type(problem), str(problem)))  # which all wait for
        _remove(self._part)
        if issubclass(kind, OSError):
            raise OSError(f"{self.last_path} cannot be written: {text}")
        if issubclass(kind, ValueError):
            raise ValueError(text)

    def _part_of(self, rank: int) -> Path:
        """The path of a process's rows until all are merged."""
        return self._whole.with_name(f"{self._whole.name}.rank{rank}")

    def _wait_for(self, parts: Sequence[Path]) -> None:
        """Returns when the files of all processes are there, and raises FileNotFoundError if they do not appear."""
        end = time.monotonic() + self.patience
        for rank, part in enumerate(parts):
            while not part.exists():
                if time.monotonic() > end:
                    raise FileNotFoundError(
                        f"{part} of rank {rank} is not there; all processes have to write into one folder, in a file "
                        "system they share"
                    )
                time.sleep(0.05)
                with contextlib.suppress(OSError):
                    os.listdir(part.parent)  # has network file systems look again

    def _files(self, trainer: Any) -> list[tuple[Path, Path]]:
        """The files to write, each by the name that it has until it is whole, and by its own."""
        assert self.last_path is not None
        return [(self._whole, self.last_path)]

    def _merge(self, parts: Sequence[Path], whole: Path, loader: int) -> None:
        """Merges the parts of all processes into one file, the first and here only one, which is of all loaders."""
        _merge(parts, whole, ["file", *(self._columns or [])])

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self._file is not None and self._part is not None:
            self._file.close()
            _remove(self._part)


def create_file(path: Path, patience: float = 10.0) -> TextIO:
    """A new file to write in, in a folder that others may be making, or clearing away, at the same time.

    However often they clear it, it is made again until ``patience`` seconds are over: a count of attempts would be used
    up by one who clears in a loop. The last error is raised then, and a file in the folder's place is one at once.
    """
    end = time.monotonic() + patience
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("w", newline="", encoding="utf-8", errors="surrogateescape")
        except (FileNotFoundError, FileExistsError):  # mkdir's, for a folder that goes while it looks at it
            if path.parent.is_file() or time.monotonic() > end:
                raise
            time.sleep(0.001)  # whoever clears is let past


def _remove(path: Path) -> None:
    """Removes a file, if it is there and can be removed: what is left over of it harms nobody."""
    with contextlib.suppress(OSError):
        path.unlink()


def _rows(
    module: Any, outputs: Any, own: Sequence[str] | None, of_data: Sequence[str] | None, all_classes: bool | None
) -> list[list[Mapping[str, Any]]]:
    """The rows of each sample, as dictionaries of columns; ``own`` names the outputs, or else what the data says."""
    if isinstance(module, PredictsRows) and (found := module.prediction_rows(outputs)) is not None:
        return [rows if isinstance(rows, list) else [rows] for rows in found]
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or not outputs.is_floating_point():
        shape = f"a tensor of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"{type(module).__name__} predicts {shape}, not probabilities (B, classes): "
            "define prediction_rows(outputs) to say what is to be written"
        )
    values = outputs.detach().float().cpu()
    count = values.shape[1]
    classes = own or (of_data if of_data and len(of_data) == count else None)
    several = bool(module.hparams.get("multi_label", False))
    sums_to_one = bool(torch.isclose(values.sum(1), torch.ones(len(values)), atol=1e-2).all())
    column = "probability" if several or (sums_to_one and bool((values >= 0).all())) else "score"
    if all_classes is None:
        all_classes = count <= FEW_CLASSES
    names = [class_name(classes, index) for index in range(count)]
    often = Counter(names)
    columns = [f"{column}_{name if often[name] == 1 else index}" for index, name in enumerate(names)]
    rows: list[list[Mapping[str, Any]]] = []
    for scores, best in zip(values.tolist(), values.argmax(1).tolist(), strict=True):
        chosen = [index for index, score in enumerate(scores) if score >= 0.5] if several else [best]
        row = {"class": "|".join(names[index] for index in chosen)}
        row[column] = "|".join(f"{scores[index]:.6f}" for index in chosen or [best])
        row |= {name: f"{score:.6f}" for name, score in zip(columns, scores, strict=True)} if all_classes else {}
        rows.append([row])
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
