"""``zoo export``: a checkpoint as files that other programs run, each proved to compute the same."""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.cli import mistakes, names, recipes
from zoo.cli.arguments import RECIPE, STRICT, Arguments, Command, Line, positive, tolerance
from zoo.cli.mistakes import Failure, Mistake, did_you_mean
from zoo.cli.notice import loading

FORMATS = ("onnx", "pt2", "safetensors")
TEXT = """\
Exports a checkpoint for where there is no Lightning, or no Python. A file has its name only once it has been computed
with, and compared with the checkpoint: on random batches, and on the validation data of a recipe, or of the run's
configuration, which is in the checkpoint. One that does not agree is not written."""
DATA = (
    (RECIPE[0], "of the validation data, in place of the checkpoint's configuration; -c RECIPE as well"),
    ("--data.root FOLDER", "an option of the data, where it lies elsewhere now"),
    STRICT,
)


def _arguments() -> Arguments:
    parser = Arguments("export", "CHECKPOINT [RECIPE ...] [--option VALUE ...]", TEXT)
    add = parser.add_argument_group("options").add_argument
    told = "onnx; pt2, a program of torch.export; safetensors, for timm.create_model: one or several (onnx)"
    add("--format", metavar="NAME", nargs="+", default=["onnx"], help=told)
    add("--out", metavar="FILE", type=Path, help="where it goes, if it is one (beside the checkpoint, by its name)")
    add("--variant", metavar="NAME", help="what of the model to export, maps of a detector for example (predictions)")
    add("--raw", action="store_true", help="the graph takes normalised floats; else uint8, which it normalises itself")
    add("--overwrite", action="store_true", help="replaces what is there")
    add("--no-compile", action="store_true", help="does not measure torch.compile, which takes half a minute")
    add("--limit", metavar="N", type=positive, help="validation images to compare, rounded up to a batch (all)")
    add("--tolerance", metavar="X", type=tolerance, help="relative difference that is allowed (0 for pt2, else 5e-6)")
    return parser


def _run(line: Line) -> int:
    """Exports a checkpoint in one format after the other, and prints the proof of each."""
    own, options = _arguments().parse_known_args(line.options)
    if not line.words:
        raise Mistake("export needs a checkpoint: zoo export CHECKPOINT, a .ckpt file or a run's folder")
    for name in own.format:
        if name not in FORMATS:
            hint = did_you_mean(name, FORMATS) or f": expected one of {', '.join(FORMATS)}"
            raise Mistake(f"unknown format {name!r}{hint}")
    if own.out is not None and len(own.format) > 1:
        raise Mistake(f"--out {own.out} is one file, and there are {len(own.format)} formats: leave it out")
    if not Path(line.words[0]).exists():
        raise Mistake(f"there is no checkpoint {line.words[0]}")
    files = [recipes.find(name, urls=line.strict) for name in (*line.words[1:], *line.configs)]
    options = names.understood(options, files, line.command) if files else options
    with loading():
        from zoo.serving.export.exporting import FORMATS as SUFFIXES
        from zoo.serving.export.exporting import Subject, check_target, write
        from zoo.serving.loading import checkpoint_at
    checkpoint = checkpoint_at(line.words[0])
    variant = "" if own.variant is None else f".{own.variant}"
    targets = {name: own.out or checkpoint.with_suffix(f"{variant}{SUFFIXES[name]}") for name in own.format}
    for name, path in targets.items():
        check_target(path, name, own.overwrite)
    data, absent = _data(checkpoint, files, options, line.strict)
    subject = Subject.of(checkpoint, own.variant, not own.raw, data, absent=absent)
    for name, path in targets.items():
        with mistakes.worded(Failure):
            print(write(subject, path, name, own.overwrite, own.tolerance, not own.no_compile, own.limit), flush=True)
    return 0


def _data(checkpoint: Path, files: Sequence[str], options: Sequence[str], strict: bool) -> tuple[Any, str]:
    """The data module of a recipe, or of the configuration in a checkpoint; or why there is none.

    That of a checkpoint may name the classes of the zoo and its libraries only, as under ``--strict-imports``.
    """
    from zoo.checkpoints import configuration
    from zoo.cli.plan import parse

    given = bool(files or options)
    config = None if files else configuration(checkpoint)
    if config is None and not files:
        if given:
            raise Mistake(f"{options[0]}: of which data? {checkpoint} has no configuration, name a recipe with -c")
        return None, "the checkpoint has no configuration, which would name them"
    try:
        with tempfile.TemporaryDirectory() as folder:
            if config is not None:
                files = [str(Path(folder, "checkpoint.yaml"))]
                Path(files[0]).write_text(config, encoding="utf-8")
                options = names.understood(options, files, "export")
            plan = parse("fit", list(files), list(options), strict or config is not None)
            return (None, "the configuration has no data") if plan.config.data is None else (plan.data(), "")
    except (Mistake, OSError, ValueError, ImportError) as error:
        if given:
            raise
        said = str(mistakes.root_cause(error)).splitlines()[0]
        return None, re.sub(r"^\S*checkpoint.yaml, line \d+: ", "", said)


COMMAND = Command(
    "export", "a checkpoint as ONNX, torch.export program or timm's weights, proved", _arguments, _run, DATA
)
