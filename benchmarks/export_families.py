"""Exports a network of every file of timm that has classifiers, and compares what comes out, as a table in Markdown.

    python benchmarks/export_families.py [FAMILY ...]

Of ``ViTClassifier(name)`` with random weights: the largest difference of torch's program and of the ONNX file on
onnxruntime from the module, relative to the largest logit, over batches of 1, 2 and 5 images, traced with 2; which
sides of the images stayed free; or the line of torch that says why there is no graph. Each network has a process of
its own, and at most TIMEOUT seconds.
"""

import io
import multiprocessing
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import timm
import torch
from torch.export import Dim

import zoo
from zoo.common.exporting import Variant

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from test_families import FAMILIES, SMALLER

TIMEOUT = 400  # seconds
LARGEST = 60_000_000  # parameters
HEAD = f"""timm {timm.__version__}, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}

| file of timm | network | torch.export | ONNX | free sides | seconds |
|---|---|---|---|---|---|"""


def main() -> None:
    print(HEAD, flush=True)
    for family in sys.argv[1:] or FAMILIES:
        queue: Any = multiprocessing.Queue()
        process = multiprocessing.Process(target=survey, args=(family, queue))
        process.start()
        process.join(TIMEOUT)
        if process.is_alive():
            process.kill()
            process.join()
        found = []
        while not queue.empty():
            found.append(queue.get())
        print(f"| {family} | `{FAMILIES[family]}` | {' | '.join(found) or 'died'} |", flush=True)


@torch.no_grad()
def survey(family: str, queue: Any) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = time.perf_counter()
    with torch.device("meta"):
        size = sum(each.numel() for each in timm.create_model(FAMILIES[family]).parameters())
    if size > LARGEST:
        return queue.put(f"left out: {size / 1e6:.0f} M parameters")
    module = zoo.ViTClassifier(FAMILIES[family], num_classes=3, image_size=SMALLER.get(family), head_std=1).eval()
    network = Variant(module).eval().requires_grad_(False)
    inputs = {batch: torch.randn(batch, *module.input_shape) for batch in (2, 1, 5)}
    expected = {batch: network(images)["logits"] for batch, images in inputs.items()}
    try:
        shapes = ({0: Dim.DYNAMIC, 2: Dim.AUTO, 3: Dim.AUTO},)
        program = torch.export.export(network, (inputs[2],), dynamic_shapes=shapes)
    except Exception as error:  # of whatever the network does
        return queue.put(first_line(error))
    graph = program.module()
    queue.put(f"{worst({batch: graph(inputs[batch])['logits'] for batch in inputs}, expected):.1e}")
    sides = next(node for node in program.graph.nodes if node.target == "images").meta["val"].shape[2:]
    free = " ".join(name for name, side in zip(("height", "width"), sides, strict=True) if not isinstance(side, int))
    try:
        file = io.BytesIO()
        torch.onnx.export(program, dynamo=True, verbose=False).save(file)
        session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
        found = {batch: torch.from_numpy(session.run(None, {"images": inputs[batch].numpy()})[0]) for batch in inputs}
        queue.put(f"{worst(found, expected):.1e}")
    except Exception as error:  # of whatever the exporter or onnxruntime cannot do
        queue.put(first_line(error))
    queue.put(free)
    queue.put(f"{time.perf_counter() - start:.0f}")
    return None


def worst(found: dict[int, torch.Tensor], expected: dict[int, torch.Tensor]) -> float:
    """The largest difference over batches, relative to the largest value of each."""
    return max(((found[n] - each).abs().max() / each.abs().max()).item() for n, each in expected.items())


def first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if line.strip().startswith("- ")), lines[0]).strip()[:200].replace("|", "/")


if __name__ == "__main__":
    main()
