"""Export of a checkpoint: written beside its place, proved, and named only then."""

import json
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

import zoo
from datamodules import preprocessing
from zoo._lightning import LightningModule
from zoo.checkpoints import read
from zoo.common.classes import ids_of, names_of
from zoo.common.preprocessing import preprocessing_of
from zoo.common.protocols import Exports, Unpredicted
from zoo.serving.export import onnx, pt2, timm_folder
from zoo.serving.export.graph import Graph, create_graph, free_sides, trace
from zoo.serving.export.proof import FailingFileError, Run, differences, times
from zoo.serving.export.report import Report, in_words
from zoo.serving.export.validation import agrees, validate
from zoo.serving.loading import checkpoint_at, module_of

KINDS: dict[str, Any] = {"onnx": onnx, "pt2": pt2}
FORMATS = {name: kind.SUFFIX for name, kind in KINDS.items()} | {"safetensors": timm_folder.SUFFIX}
"""Suffixes of their files; that of ``safetensors`` is a folder's, and may be another."""


def export(
    source: Any,
    path: str | Path,
    format: str = "onnx",
    *,
    variant: str | None = None,
    preprocessing: bool = True,
    data: Any = None,
    module: Any = None,
    overwrite: bool = False,
    tolerance: float | None = None,
    compiled: bool = True,
    limit: int | None = None,
) -> Report:
    """Exports a module for where there is no Lightning, or no Python, and proves that it computes the same.

    The graph takes batches of every size, and images of every size where the network does; its inputs are ``images``
    (B, C, H, W) and, of a detector, ``sizes`` (B, 2) int64, height and width of each before padding. Its outputs have
    names: see the module's ``exports``. All that is needed to use it is in its metadata.

    The file is written beside its place, computed with and compared, and gets its name only if it agrees with the
    module: on random batches of 1, 2 and 5, and, where there is validation data, image by image.

    Args:
        source: A checkpoint, a run's folder, or a module.
        path: The file; for "safetensors" the folder.
        format: "onnx"; "pt2", a program of ``torch.export``; or "safetensors", weights that ``timm.create_model`` reads
            where the architecture is one of timm's.
        variant: What of the module's ``exports`` to take. None: the first.
        preprocessing: Images are uint8, and become normalised floats inside of the graph. False: they are floats, which
            the preprocessing in the metadata has made.
        data: Data module on whose validation split the file is compared with the checkpoint.
        module: For a checkpoint of somebody else's module: its class, or an instance.
        overwrite: Whether a file that is there may be replaced.
        tolerance: Relative difference that is allowed. None: 0 for "pt2", else 5e-6.
        compiled: Whether to measure ``torch.compile`` as well, which takes half a minute.
        limit: Validation images to compare, rounded up to a batch. None: all.

    Raises:
        FileExistsError: If the file is there, and may not be replaced.
        ValueError: For an unknown format or variant; a checkpoint without preprocessing; a network that cannot be
            exported; a file that does not agree.
    """
    check_target(Path(path), format, overwrite)
    subject = Subject.of(source, variant, preprocessing, data, module)
    return write(subject, Path(path), format, overwrite, tolerance, compiled, limit)


def check_target(path: Path, format: str, overwrite: bool) -> None:
    """Raises ValueError or FileExistsError for what could not be written, before anything is computed."""
    if format not in FORMATS:
        near = get_close_matches(format, FORMATS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(FORMATS)}"
        raise ValueError(f"unknown format {format!r}: {hint}")
    if path.suffix != FORMATS[format] and path.suffix in FORMATS.values():
        raise ValueError(f"{path} is not the name of a file of {format}: expected {FORMATS[format]}")
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {path.parent}")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: name another, or overwrite it (overwrite=True, --overwrite)")
    if path.is_dir() and format != "safetensors":
        raise FileExistsError(f"{path} is a folder: name a file")
    if path.exists() and format == "safetensors" and not timm_folder.is_one(path):
        raise FileExistsError(f"{path} is no folder of exported weights: it is not replaced, name another")
    if format == "onnx":
        onnx.check_installed()


@dataclass(frozen=True)
class Subject:
    """Module that is exported, and what its checkpoint says of it.

    Attributes:
        module: In evaluation mode, on the CPU, without gradients.
        preprocessing: What is stated of it; None if nothing is.
        inside: Tells whether the graph preprocesses.
        variant: What of the module's exports to take.
        content: The checkpoint's.
        data: Data module to compare on; None if there is none.
        absent: Why there is none.
    """

    module: Any
    preprocessing: Mapping[str, Any] | None
    inside: bool
    variant: str | None
    content: Mapping[str, Any]
    data: Any
    absent: str = "there are none"

    @classmethod
    def of(
        cls, source: Any, variant: str | None, inside: bool, data: Any = None, module: Any = None, **why: str
    ) -> "Subject":
        """Restores a module. Arguments and errors: see :func:`export`."""
        if isinstance(source, LightningModule):
            made, content = deepcopy(source).cpu().eval().requires_grad_(False), dict[str, Any]()
        else:
            file = checkpoint_at(source)
            content = read(file)
            made = module_of(content, file, module)
        stated = content.get("preprocessing") or preprocessing_of(data)
        if inside and stated is None:
            name = type(source).__name__ if isinstance(source, LightningModule) else source
            raise ValueError(
                f"{name} says nothing of preprocessing, with which the graph is to begin: give the data module, or "
                "leave it out (preprocessing=False, --raw)"
            )
        return cls(made.float(), stated, inside, variant, content, data, **why)

    @cached_property
    def graph(self) -> Graph:
        stated, module = self.preprocessing if self.inside else None, self.module
        predicts = isinstance(module, Exports) and self.variant in (None, next(iter(module.exports), None))
        if predicts and isinstance(module, Unpredicted):
            module = deepcopy(module)
            for name in module.unpredicted:  # a program would carry it along
                setattr(module, name, nn.Identity())
        return create_graph(module, self.variant, None if stated is None else preprocessing.create(stated))

    @cached_property
    def program(self) -> ExportedProgram:
        return trace(self.graph)

    @cached_property
    def compiled(self) -> Any:
        """The graph compiled, once for all formats, and after the program: tracing forgets what is compiled."""
        assert self.program
        return torch.compile(self.graph)

    def metadata(self) -> dict[str, Any]:
        """Everything that is to be known of a file but its proof, as plain data."""
        made: Any = self.content.get("provenance") or {}
        packages = ("torch", "torchvision", "timm")
        return {
            "module": self.content.get("module") or type(self.module).__name__,
            "classes": names_of(self.module),
            "category_ids": None if (ids := ids_of(self.module)) is None else list(ids),
            "preprocessing": self.preprocessing,
            "hyperparameters": dict(self.module.hparams),
            "configuration": made.get("config"),
            "provenance": {name: value for name, value in made.items() if name != "config"},
            "versions": {"vision-zoo": zoo.__version__, "python": platform.python_version()}
            | {name: version(name) for name in packages},
        }


def write(
    subject: Subject,
    path: Path,
    format: str,
    overwrite: bool = False,
    tolerance: float | None = None,
    compiled: bool = True,
    limit: int | None = None,
) -> Report:
    """Exports what was restored. Arguments and errors: see :func:`export`."""
    check_target(path, format, overwrite)
    if format == "safetensors":
        return _write_weights(subject, path, tolerance, limit)
    graph, program, kind = subject.graph, subject.program, KINDS[format]
    tolerance = kind.TOLERANCE if tolerance is None else tolerance
    with torch.no_grad():
        outputs = graph(*graph.example(2))
    with staged(path) as file:
        kind.write(program, file, graph.inputs, list(outputs))
        run, free = kind.Program(file), free_sides(program)
        with agreeing(path):
            found = differences(graph, run, free)
        _check(subject, path, found, tolerance)
        validation, notes = _validated(subject, path, run, free, tolerance, limit)
        seconds, said = times(graph, run, subject.compiled if compiled else None)
        size = file.stat().st_size
        report = Report(path, format, graph.variant.name, found, tolerance, validation, seconds, size, (*notes, *said))
        inputs = zip(graph.inputs, graph.example(2), strict=True)
        metadata = subject.metadata() | {
            "variant": graph.variant.name,
            "preprocessing_inside": subject.inside,
            "inputs": [_described(name, each, free) for name, each in inputs],
            "outputs": [_described(name, each, (False, False)) for name, each in outputs.items()],
            "proof": report.proof(),
        }
        kind.attach(json.dumps(metadata, default=str), file)
    return report


def _write_weights(subject: Subject, path: Path, tolerance: float | None, limit: int | None) -> Report:
    tolerance = timm_folder.TOLERANCE if tolerance is None else tolerance
    weights = timm_folder.Weights(subject.module)
    with staged(path) as folder:
        weights.write(folder, subject.preprocessing or {})
        found = timm_folder.differences(weights, folder)
        _check(subject, path, found, tolerance)
        validation, notes = None, [weights.note]
        if weights.classifies and subject.inside:
            run = timm_folder.Program(folder, subject.graph)
            validation, said = _validated(subject, path, run, (False, False), tolerance, limit)
            notes += said
        size = sum(file.stat().st_size for file in folder.iterdir())
        report = Report(path, "safetensors", weights.part, found, tolerance, validation, {}, size, tuple(notes))
        timm_folder.attach(json.dumps(subject.metadata() | {"proof": report.proof()}, default=str, indent=2), folder)
    return report


def _check(subject: Subject, path: Path, found: Mapping[str, float], tolerance: float) -> None:
    worst = max(found, key=lambda batch: found[batch])
    if not found[worst] <= tolerance:
        raise DisagreementError(
            f"{path} was not written: it computes something else than {type(subject.module).__name__}, of {worst} with "
            f"a relative difference of {found[worst]:.1e}, {tolerance:.1e} allowed"
        )


def _validated(
    subject: Subject, path: Path, run: Run, free: tuple[bool, bool], tolerance: float, limit: int | None
) -> tuple[dict[str, Any] | None, list[str]]:
    """The validation of a file, or why there is none."""
    try:
        if subject.data is None:
            raise ValueError(subject.absent)
        with agreeing(path):
            found = validate(subject.graph, run, subject.data, free, limit)
    except DisagreementError:
        raise
    except (OSError, ValueError) as error:
        return None, [f"not compared on validation images: {error}"]
    if not agrees(found, tolerance):
        raise DisagreementError(f"{path} was not written, since it predicts something else: {in_words(found)}")
    return found, []


class DisagreementError(ValueError):
    """A file that does not do what its module does, and was not written."""


@contextmanager
def agreeing(path: Path) -> Iterator[None]:
    """Context in which a file that fails is one that does not agree."""
    try:
        yield
    except FailingFileError as error:
        raise DisagreementError(f"{path} was not written: {error}") from error


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A place beside a file's own, whose content gets the file's name if nothing goes wrong."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        place = Path(folder, path.name)
        yield place
        if path.is_dir():  # which nothing can be put in place of
            os.replace(path, Path(folder, "before"))
        os.replace(place, path)


def _described(name: str, example: torch.Tensor, free: tuple[bool, bool]) -> dict[str, Any]:
    """Name, type and shape of an input or output, whose free sides have names."""
    shape: list[int | str] = ["batch", *example.shape[1:]]
    for side, word in enumerate(("height", "width")):
        if free[side] and example.ndim == 4:
            shape[2 + side] = word
    return {"name": name, "dtype": str(example.dtype).removeprefix("torch."), "shape": shape}
