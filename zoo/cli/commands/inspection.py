"""Inspections of techniques: figures of a network out of a checkpoint, or of timm's, and of what it does to images."""

import json
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli import plots
from zoo.cli.arguments import Arguments, Command, Line, check_images, positive, with_images
from zoo.cli.commands.predict import accelerator
from zoo.cli.mistakes import Mistake
from zoo.cli.notice import loading
from zoo.cli.recipes import recipes
from zoo.common.inspection import Dots, Findings, Inspection, Tiles

if TYPE_CHECKING:
    from torch import Tensor

LIMIT = 128
"""Images, as Dosovitskiy et al. 2021 averaged over (appendix D.7)."""
NUMBERS = "numbers.json"
WEIGHTS = (".pth", ".pt", ".safetensors", ".bin")


def command_of(inspection: Inspection) -> Command:
    """The command that an inspection is."""
    return Command(inspection.name, inspection.summary, partial(_arguments, inspection), partial(_run, inspection))


def _arguments(inspection: Inspection) -> Arguments:
    end = (
        f"SOURCE is a checkpoint, a .ckpt file or a run's folder; or a network of timm, as {inspection.network}, with\n"
        "random weights unless its name has a tag of pretrained ones, which timm fetches, or --weights names some. An\n"
        "IMAGE is a file, or a folder, of which the images at all depths are taken, sorted."
    )
    parser = Arguments(inspection.name, "SOURCE [IMAGE|FOLDER ...] [--option VALUE ...]", inspection.text, end)
    told = f"where PNG files and {NUMBERS} go, in place of those that are there (runs/{inspection.name})"
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=Path("runs", inspection.name), help=told)
    parser.add_argument("--weights", metavar="FILE", help="of a network of timm: see zoo.weights.load")
    parser.add_argument("--limit", metavar="N", type=positive, default=LIMIT, help=f"images at most ({LIMIT})")
    parser.add_argument("--device", help="cpu, cuda and so on; the accelerator, if there is one")
    return parser


def _run(inspection: Inspection, line: Line) -> int:
    """Loads the network, lets the inspection look at it, and writes what it has found."""
    name = inspection.name
    if line.configs or (line.words and line.words[0] in recipes()):
        given = (*line.configs, *line.words)[0]
        raise Mistake(f"{name} takes no recipe, which has no weights: name a run of {given}, or a network of timm")
    if not line.words:
        raise Mistake(f"{name} needs a SOURCE: a checkpoint, a run's folder, or a network of timm's by name")
    own = with_images(line, _arguments(inspection), name)
    source = line.words[0]
    checkpoint = _is_checkpoint(source)
    if checkpoint and own.weights:
        raise Mistake(f"--weights is for a network of timm: {source} has its own")
    if Path(source).suffix in WEIGHTS:
        raise Mistake(
            f"{source}: weights alone do not say of which network they are: "
            f"zoo {name} {inspection.network} --weights {source}"
        )
    if own.out.exists() and not own.out.is_dir():
        raise Mistake(f"--out {own.out} is a file: expected a folder")
    check_images(own.images)
    with loading():
        import torch

        import_module("zoo.serving.loading")  # and with it all that takes long
    module, said, stated = _of_checkpoint(source, bool(own.images)) if checkpoint else _of_timm(source, own.weights)
    device = own.device or accelerator()
    try:
        module = module.to(torch.device(device)).eval()
    except (RuntimeError, AssertionError) as error:
        raise Mistake(f"device {device} cannot be used: {str(error).splitlines()[0]}") from error
    print(f"{source}: {said}", flush=True)
    images = _images(module, own.images, stated, own.limit, device) if own.images else None
    found = inspection.run(module, images)
    about = {"source": source, "weights": said} | ({"preprocessing": stated} if own.images else {})
    _write(inspection, found, own.out, about)
    return 0


def _is_checkpoint(source: str) -> bool:
    return source.endswith(".ckpt") or Path(source).exists() or "/" in source


def _of_checkpoint(source: str, needs_preprocessing: bool) -> tuple[Any, str, Any]:
    """The module of a checkpoint, what it is, and the preprocessing of its images, where that is asked for."""
    from zoo.checkpoints import read
    from zoo.serving.loading import checkpoint_at, module_of, preprocessing_in

    path = checkpoint_at(source)
    content = read(path)
    module = module_of(content, path)
    stated = preprocessing_in(content, path) if needs_preprocessing else None
    return module, f"{type(module).__name__} of {path.name}", stated


def _of_timm(source: str, weights: str | None) -> tuple[Any, str, Any]:
    """A network of timm, what its weights are, and the preprocessing that they were trained with."""
    import timm
    import torch

    from zoo.common.backbones import create_backbone, own_image_shape
    from zoo.weights import load

    name, _, tag = source.partition(".")
    torch.manual_seed(0)
    network = create_backbone(name if tag and timm.is_model_pretrained(source) else source)
    if tag and weights:
        raise Mistake(f"{source} names weights as well: leave out .{tag}, or --weights")
    said = "random weights, of seed 0"
    if tag or weights:
        said = str(load(network, weights or source))
    own = timm.get_pretrained_cfg(source) if tag else None
    config = timm.data.resolve_data_config(pretrained_cfg=own.to_dict() if own else network.pretrained_cfg)
    channels, size = own_image_shape(network)
    stated = {
        "kind": "crop",
        "channels": channels or 3,
        "image_size": list(size or config["input_size"][1:]),
        "crop_ratio": config["crop_pct"],
        **{key: config[key] for key in ("interpolation", "mean", "std")},
    }
    return network, said, stated


def _images(module: Any, files: list[str], stated: Any, limit: int, device: str) -> "Iterator[Tensor]":
    """Images as the module takes them, one at a time: those of detectors have their own sizes."""
    from torch import Tensor

    import datamodules.preprocessing
    from zoo.common import batch as batches
    from zoo.common.protocols import ChecksImages
    from zoo.serving.predictor import listed

    preprocessing = datamodules.preprocessing.create(stated)
    if preprocessing.input_shape is not None and isinstance(module, ChecksImages):
        module.check_images(preprocessing.input_shape)
    for number, (image, _) in enumerate(islice(listed(files), limit)):
        sample = preprocessing.collate([preprocessing.read(image, number)])
        found = batches.images_of_any_size(preprocessing.to_float(sample))
        yield (found if isinstance(found, Tensor) else found[0][None]).to(device)


def _write(inspection: Inspection, found: Findings, out: Path, about: dict[str, Any]) -> None:
    """Writes figures and numbers, removes those of an earlier call that there are not now, and says both."""
    from torchvision.utils import save_image

    out.mkdir(parents=True, exist_ok=True)
    width = max(map(len, inspection.figures))
    for name in inspection.figures:
        path, figure = out / f"{name}.png", found.figures.get(name)
        if figure is None:
            path.unlink(missing_ok=True)
            print(f"{name:{width}}  none: {found.absent[name]}")
            continue
        if isinstance(figure, Dots):
            plots.dots(path, figure)
        elif isinstance(figure, Tiles):
            plots.tiles(path, figure)
        else:
            save_image(figure, path)
        print(f"{name:{width}}  {path}")
    numbers = {**about, **found.numbers, "absent": dict(found.absent)}
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in numbers.items()]
    (out / NUMBERS).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{'numbers':{width}}  {out / NUMBERS}")
