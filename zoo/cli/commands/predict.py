"""``zoo predict``: a recipe's data with LightningCLI, or images by a checkpoint alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli import mistakes
from zoo.cli.arguments import Arguments, Command, Line, check_images, positive, with_images
from zoo.cli.commands import train
from zoo.cli.mistakes import Failure, Mistake
from zoo.cli.notice import loading
from zoo.cli.recipes import recipes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from zoo.serving.predictor import Answered, Predictor

USAGE = "CHECKPOINT IMAGE|FOLDER ... [--option VALUE ...]\n       zoo predict " + train.USAGE
TEXT = """\
Predicts images by a checkpoint alone, a .ckpt file or a run's folder, and prints a line an image; or writes predictions
of a recipe's test data, or of a folder, as a part of a run."""
ALONE = "a recipe or a checkpoint, and not both: with a recipe it is --ckpt_path FILE"
FEW = 20
"""So many images have a line each when there is a file as well."""


def _arguments() -> Arguments:
    parser = Arguments("predict", USAGE, TEXT)
    group = parser.add_argument_group("of a checkpoint alone")
    add = group.add_argument
    add("--out", metavar="FILE", type=Path, help="writes what a recipe would: .csv, or .json of a detector")
    add("--overwrite", action="store_true", help="replaces a FILE that is there")
    add("--top", type=positive, default=3, metavar="N", help="classes to name in an image's line (3)")
    add("--tta", choices=["flip", "crops", "crops+flip"], help="averages a classifier over views of each image")
    add("--on-error", choices=["raise", "skip"], default="raise", help="at an image that cannot be read (raise)")
    add("--batch-size", type=positive, default=32, metavar="N", help="images at a time (32)")
    add("--device", help="cpu, cuda and so on; the accelerator, if there is one")
    return parser


def _run(line: Line) -> int:
    if not line.words or not _is_checkpoint(line.words[0]):
        if stray := next((word for word in line.words if word.endswith(".ckpt")), None):
            raise Mistake(f"predict takes {ALONE.replace('FILE', stray)}")
        return train.COMMAND_OF["predict"].run(line)
    if line.configs:
        raise Mistake(f"predict takes {ALONE.replace('FILE', line.words[0])}")
    own = with_images(line, _arguments(), "a checkpoint alone")
    _check(line.words[0], own.images, own.out, own.overwrite)
    with loading():
        from zoo.serving.loading import load
    device = own.device or accelerator()
    predictor = load(line.words[0], tta=own.tta, device=device, batch_size=own.batch_size)
    with mistakes.worded(Failure):
        _predict(predictor, own)
    return 0


def _is_checkpoint(word: str) -> bool:
    """True for a .ckpt file and a folder that holds some; the names of recipes are theirs."""
    if word in recipes():
        return False
    return word.endswith(".ckpt") or (Path(word).is_dir() and next(Path(word).rglob("*.ckpt"), None) is not None)


def _check(checkpoint: str, images: list[str], out: Path | None, overwrite: bool) -> None:
    """Looks at paths, before torch is imported."""
    if not Path(checkpoint).exists():
        raise Mistake(f"there is no checkpoint {checkpoint}")
    if not images:
        raise Mistake(f"images are missing: zoo predict {checkpoint} IMAGE ..., or a folder of them")
    check_images(images)
    if out is not None and out.is_dir():
        raise Mistake(f"--out {out} is a folder: expected a file")
    if out is not None and out.exists() and not overwrite:
        raise Mistake(f"--out {out} is there already: --overwrite replaces it")


def accelerator() -> str:
    """The accelerator, if there is one, else the CPU."""
    import torch

    return str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"


def _predict(predictor: "Predictor", own: Any) -> None:
    """Prints a line for each image, and writes a file where one is asked for."""
    from zoo.serving.predictor import listed

    files = [file for _, file in listed(own.images)]
    names = [_name(Path(own.images[0]), file) if len(own.images) == 1 else str(file) for file in files]
    answers = predictor.batches(files, own.on_error)
    if own.out is None:
        for answered in answers:
            _print(predictor, answered, own.top, names)
        return
    from zoo.callbacks import WritePredictions
    from zoo.common.protocols import NamesPredictionWriter

    module = predictor.module
    writer = module.prediction_writer() if isinstance(module, NamesPredictionWriter) else WritePredictions()
    ending = Path(writer.filename).suffix
    if own.out.suffix != ending:
        raise Mistake(f"--out {own.out}: the predictions of {type(module).__name__} are written as {ending}")

    def printed() -> "Iterator[tuple[list[tuple[int, str | None, bool]], Any]]":
        for answered in answers:
            if len(files) <= FEW:
                _print(predictor, answered, own.top, names)
            numbered = enumerate(answered.errors, answered.first)
            yield [(number, names[number], error is None) for number, error in numbered], answered.outputs

    writer.write_file(own.out, module, printed())
    print(f"{writer.writes} {own.out}")


def _name(given: Path, file: str | None) -> str:
    """Name of a file as a data module has it: below the folder that was given."""
    return Path(str(file)).relative_to(given).as_posix() if given.is_dir() else given.name


def _print(predictor: "Predictor", answered: "Answered", top: int, names: Sequence[str]) -> None:
    results = iter(predictor.results(answered, top))
    for number, error in enumerate(answered.errors, answered.first):
        said = _said(next(results)) if error is None else f"skipped, {error}"
        print(f"{names[number]}: {said}", flush=True)


def _said(result: "Mapping[str, Any]") -> str:
    """A result in a line."""
    if "boxes" in result:
        each = zip(result["labels"], result["scores"], result["boxes"], strict=True)
        found = [f"{label} {100 * score:.1f}% [{', '.join(f'{x:.1f}' for x in box)}]" for label, score, box in each]
        return ", ".join(found) or "nothing detected"
    if "top" in result:
        ranked = ", ".join(f"{each['label']} {100 * each['probability']:.1f}%" for each in result["top"])
        return f"{', '.join(result['labels']) or 'no label'} ({ranked})" if "labels" in result else ranked
    return ", ".join(f"{name} {_shown(value)}" for name, value in result.items())


def _shown(value: Any) -> str:
    """A text as it is, the numbers of a tensor one after another."""
    return value if isinstance(value, str) else " ".join(f"{x:.6g}" for x in value.flatten().tolist())


COMMAND = Command("predict", train.SUMMARIES["predict"], _arguments, _run, train.OPTIONS)
