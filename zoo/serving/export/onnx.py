"""Format ``onnx``, by torch's exporter of ``torch.export`` programs; onnxruntime computes what a file is proved by."""

import json
import re
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from zoo.serving.export.graph import quiet, reason

SUFFIX, TOLERANCE = ".onnx", 5e-6
KEY = "zoo"
"""Name of the metadata among the model's ``metadata_props``."""
LARGEST = 2**31 - 1  # bytes that Protocol Buffers take
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
DIMENSIONS = {"images": {0: "batch", 2: "height", 3: "width"}, "sizes": {0: "batch"}}


def check_installed() -> None:
    """Raises ValueError where a package of the extra is missing."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ValueError(f"format onnx needs {' and '.join(missing)}: pip install 'vision-zoo[export]'")


def write(program: ExportedProgram, path: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Writes a program's model, with inputs and outputs by name.

    Raises:
        ValueError: For what ONNX has no operator for, and a model that is larger than its files may be.
    """
    try:
        with quiet():
            made = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=list(inputs), output_names=list(outputs)
            )
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ValueError(f"ONNX cannot say what the network does: {reason(cause)}") from error
    assert made is not None
    model = made.model_proto
    name_dimensions(model.graph)
    if (size := model.ByteSize()) > LARGEST:
        raise ValueError(f"the model has {size / 1e9:.1f} GB, and a file of ONNX at most 2: take format pt2")
    path.write_bytes(model.SerializeToString())


def name_dimensions(graph: Any) -> None:
    """Names the dimensions that are free, in place of torch's symbols, and makes numbers of those that are not."""
    names: dict[str, str] = {}
    for given in graph.input:
        for number, name in DIMENSIONS[given.name].items():
            symbol = given.type.tensor_type.shape.dim[number].dim_param
            if symbol and not symbol.isdecimal():
                names.setdefault(symbol, name)
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if said := dimension.dim_param:
                said = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), said)
                if said.isdecimal():
                    dimension.dim_value = int(said)
                else:
                    dimension.dim_param = said


def attach(metadata: str, path: Path) -> None:
    """Adds metadata to a file, whose model stays as it was proved: messages that follow each other are merged."""
    onnx: Any = import_module("onnx")
    more = onnx.ModelProto()
    onnx.helper.set_model_props(more, {KEY: metadata})
    with path.open("ab") as file:
        file.write(more.SerializeToString())


def read_metadata(path: Path) -> dict[str, Any]:
    onnx: Any = import_module("onnx")
    found = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    return json.loads(found.get(KEY, "{}"))


class Program:
    """Model out of a file, on onnxruntime and the CPU."""

    def __init__(self, path: Path) -> None:
        runtime: Any = import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors
        self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = [given.name for given in self.session.get_inputs()]
        self.outputs = [given.name for given in self.session.get_outputs()]

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        arrays = {name: each.numpy() for name, each in zip(self.inputs, inputs, strict=True)}
        found = self.session.run(None, arrays)
        return {name: torch.from_numpy(each) for name, each in zip(self.outputs, found, strict=True)}
