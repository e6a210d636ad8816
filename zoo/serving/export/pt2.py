"""Format ``pt2``: a program of ``torch.export``, which runs where torch is, without this package."""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from zoo.serving.export.graph import quiet

SUFFIX, TOLERANCE = ".pt2", 0.0
KEY = "zoo.json"
"""Name of the metadata among the ``extra_files`` of ``torch.export.load``."""


def write(program: ExportedProgram, path: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Writes a program, whose inputs and outputs have names by themselves."""
    with quiet():
        torch.export.save(program, path)


def attach(metadata: str, path: Path) -> None:
    """Adds metadata to a file, whose program stays as it was proved."""
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{root}/extra/{KEY}", metadata)


def read_metadata(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        name = next((name for name in archive.namelist() if name.endswith(f"/extra/{KEY}")), None)
        return {} if name is None else json.loads(archive.read(name))


class Program:
    """Program out of a file."""

    def __init__(self, path: Path) -> None:
        with quiet():
            self.module: Any = torch.export.load(path).module()

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        return dict(self.module(*inputs))
