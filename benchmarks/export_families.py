"""Exports a network of every file of timm that has classifiers, and compares what comes out, as a table in Markdown.

    python benchmarks/export_families.py [FAMILY ...]

Of ``ViTClassifier(name)`` with random weights: the largest difference of torch's program and of the ONNX file on
onnxruntime from the module, relative to the largest logit, over batches of 1, 2 and 5 images, traced with 2; which
sides of the images are free; or the line that says why there is no graph. Each network has a process of its own, and
at most TIMEOUT seconds.
"""

import multiprocessing
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import timm
import torch

import zoo
from zoo.serving.export import onnx
from zoo.serving.export.graph import create_graph, free_sides, trace

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from test_families import FAMILIES, SMALLER

TIMEOUT = 600  # seconds
HEAD = f"""timm {timm.__version__}, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}

| file of timm | network | torch.export | free sides | ONNX | seconds |
|---|---|---|---|---|---|"""


def main() -> None:
    print(HEAD, flush=True)
    for family in sys.argv[1:] or FAMILIES:
        queue: Any = multiprocessing.SimpleQueue()
        process = multiprocessing.Process(target=survey, args=(family, queue))
        process.start()
        process.join(TIMEOUT)
        late = process.is_alive()
        process.kill()
        found = []
        while not queue.empty():
            found.append(queue.get())
        found += [f"more than {TIMEOUT} s" if late else ""] * (len(found) < 4)
        print(f"| {family} | `{FAMILIES[family]}` | {' | '.join(found)} |", flush=True)


def survey(family: str, queue: Any) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = time.perf_counter()
    module = zoo.ViTClassifier(FAMILIES[family], num_classes=3, image_size=SMALLER.get(family), head_std=1)
    graph = create_graph(module.eval(), None, None)
    try:
        program = trace(graph)
        queue.put(f"{worst(graph, program.module()):.1e}")
        queue.put(" ".join(name for name, free in zip(("height", "width"), free_sides(program), strict=True) if free))
        with tempfile.TemporaryDirectory() as folder:
            onnx.write(program, Path(folder) / "model.onnx", graph.inputs, ("logits", "probabilities"))
            queue.put(f"{worst(graph, onnx.Program(Path(folder) / 'model.onnx')):.1e}")
        queue.put(f"{time.perf_counter() - start:.0f}")
    except ValueError as error:
        queue.put(str(error).replace("|", "\\|"))


@torch.no_grad()
def worst(graph: Any, other: Any) -> float:
    """The largest difference of logits over batches, relative to the largest logit of each."""
    differences = []
    for batch in (1, 2, 5):
        expected, found = (each(*graph.example(batch))["logits"] for each in (graph, other))
        differences.append(((found - expected).abs().max() / expected.abs().max()).item())
    return max(differences)


if __name__ == "__main__":
    main()
