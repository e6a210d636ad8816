"""Graph of an exported file: a module's variant, with what is done to images before it, and its program for torch."""

import inspect
import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils._sympy.numbers import int_oo

from datamodules import transforms
from datamodules.preprocessing import Preprocessing
from zoo.common.exporting import Variant
from zoo.common.protocols import HasInputShape

SEED = 20_240  # of the images that are traced and compared with


class Graph(nn.Module):
    """Graph of images (B, C, H, W) to named outputs: preprocessing of tensors, then a variant of a module's exports.

    Args:
        variant: Of a module in evaluation mode.
        preprocessing: Of uint8 images. None: images are normalised floats.
    """

    def __init__(self, variant: Variant, preprocessing: Preprocessing | None) -> None:
        super().__init__()
        self.variant, self.preprocessing = variant, preprocessing

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs."""
        return tuple(inspect.signature(self.forward).parameters)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.variant(self.prepared(images))

    def prepared(self, images: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Normalised floats of images, 0 where they are padded."""
        if self.preprocessing is None:
            return images
        threshold: Any = "threshold" if self.preprocessing.binarize else None  # what is drawn is 0 or 1 already
        images = transforms.finish(
            transforms.to_float(images), self.preprocessing.mean, self.preprocessing.std, threshold
        )
        return images if sizes is None else torch.where(within(images, sizes), images, 0.0)

    def example(self, count: int, size: tuple[int, int] | None = None) -> tuple[Tensor, ...]:
        """Random inputs, of a batch of so many images. Errors: see :func:`input_shape`."""
        channels, height, width = input_shape(self.variant.module)
        shape, generator = (count, channels, *(size or (height, width))), torch.Generator().manual_seed(SEED + count)
        if self.preprocessing is None:
            return (torch.randn(shape, generator=generator),)
        return (torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),)


class GraphOfSizes(Graph):
    """Graph that is told how large each image is before its padding: ``sizes`` (B, 2), (height, width), int64."""

    def forward(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return self.variant(self.prepared(images, sizes), sizes if self.variant.needs_sizes else None)

    def example(self, count: int, size: tuple[int, int] | None = None) -> tuple[Tensor, ...]:
        (images,) = super().example(count, size)
        whole = torch.tensor(images.shape[2:]).repeat(count, 1)
        return images, whole - whole // 4 * torch.arange(count)[:, None].fmod(2)  # every second one is padded


def create_graph(module: Any, variant: str | None, preprocessing: Preprocessing | None) -> Graph:
    """Graph of a variant; one that pads, by its preprocessing or by its own method, takes the sizes of images.

    Raises:
        ValueError: For a module that exports nothing, and an unknown variant.
    """
    network = Variant(module, variant)
    pads = preprocessing is not None and preprocessing.kind == "fit"
    graph = (GraphOfSizes if pads or network.needs_sizes else Graph)(network, preprocessing)
    return graph.eval().requires_grad_(False)


def input_shape(module: Any) -> tuple[int, int, int]:
    """(C, H, W) of images that a module takes.

    Raises:
        ValueError: If it does not say.
    """
    if not isinstance(module, HasInputShape):
        raise ValueError(f"{type(module).__name__} does not say what images it takes: it needs an input_shape")
    return module.input_shape


def within(images: Tensor, sizes: Tensor) -> Tensor:
    """Mask (B, 1, H, W) of the pixels that are no padding."""
    rows, columns = (torch.arange(side, device=images.device) for side in images.shape[2:])
    inside = (rows < sizes[:, :1])[:, :, None] & (columns < sizes[:, 1:])[:, None, :]
    return inside[:, None]


def trace(graph: Graph) -> ExportedProgram:
    """Program of a graph, for batches of every size, and images of every size that the network takes.

    Raises:
        ValueError: If torch cannot export it, with what in the network is in the way.
    """
    failed: Exception | None = None
    for side in (Dim.AUTO, Dim.STATIC):  # some networks compute with sizes what torch cannot follow
        shapes: dict[str, Any] = {"images": {0: Dim.DYNAMIC, 2: side, 3: side}, "sizes": {0: Dim.DYNAMIC}}
        torch.compiler.reset()  # else the graph of a loop in another export is found, with its sizes
        try:
            with torch.no_grad(), quiet():
                program = torch.export.export(
                    graph, graph.example(2), dynamic_shapes={name: shapes[name] for name in graph.inputs}, strict=False
                )
            if side is Dim.STATIC or not is_bounded(program):
                return program
        except Exception as error:  # of whatever the network does
            failed = error
    assert failed is not None
    raise ValueError(f"{type(graph.variant.module).__name__} cannot be exported: {reason(failed)}") from failed


def reason(error: BaseException) -> str:
    """First line of an error that names the thing, and of one of torch's the line of code that it comes from."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = next((line for line in lines if line.startswith("- ")), lines[0] if lines else type(error).__name__)
    library = Path(torch.__file__).parent
    hidden = (str(library), __file__, "<")
    frames = traceback.extract_tb(error.__traceback__)
    where = next((frame for frame in reversed(frames) if not frame.filename.startswith(hidden)), None)
    if where is None or str(where.line).startswith("raise "):  # on purpose, in words that say it all
        place = ""
    else:
        place = f" ({Path(where.filename).name}, line {where.lineno}: {where.line})"
    sentence = re.split(r"[.]\s", named.removeprefix("- "))[0]
    return f"{sentence}{place}"


def is_bounded(program: ExportedProgram) -> bool:
    """Tells whether a program takes images up to a size only, as where the last map has one cell at the traced size."""
    return any(bounds.upper < int_oo for bounds in program.range_constraints.values())


def free_sides(program: ExportedProgram) -> tuple[bool, bool]:
    """Tells of height and width whether they may differ from those traced."""
    (images,) = (node for node in program.graph.nodes if node.op == "placeholder" and node.target == "images")
    height, width = images.meta["val"].shape[2:]
    return not is_concrete_int(height), not is_concrete_int(width)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what torch's exporters print and log by themselves: what matters of it is in their errors."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)
