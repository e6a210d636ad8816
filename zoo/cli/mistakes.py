"""Wording of mistakes: a line, what was probably meant, and no traceback."""

import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import TracebackType

import yaml

PACKAGES = ("zoo", "datamodules")
MARK = "zoo: error: "
LIBRARIES = ("lightning", "pytorch_lightning", "lightning_fabric", "timm")
"""Whose errors about what they are given are for the user to read."""
NOT_FOREIGN = {*PACKAGES, *LIBRARIES, *sys.stdlib_module_names, "lightning_utilities", "jsonargparse", "torch"}
# Who looks for a metric by its name, and what Lightning says when there is none.
MONITORS = {
    "EarlyStopping": r"Early stopping conditioned on metric `(.+?)` which is not available\..*following: (.*)",
    "ModelCheckpoint": r"`ModelCheckpoint\(monitor='(.+?)'\)` could not find the monitored key .*?metrics: \[(.*?)\]",
    "ReduceLROnPlateau": r"ReduceLROnPlateau conditioned on metric (.+?) which is not available\..*are: \[(.*?)\]",
}

WORKER_DIED = (
    "a worker of the data's loader was killed or has died, most often because memory ran out: set a smaller "
    "--data.num_workers or --data.batch_size; with --data.num_workers 0 it fails with an error of its own"
)
# What libraries find out on the way, in words that say what to do.
REWORDED = {
    r"DataLoader worker \(pid.*?\) (?:is killed by signal|exited unexpectedly)": WORKER_DIED,
    r"DataLoader timed out after (\S+) seconds": (
        "the data's loader had no batch for {} seconds: a worker hangs, or its disk or network does; with "
        "--data.num_workers 0 one sees where, and a class's loader_timeout sets how long is waited"
    ),
    r"Missing key in checkpoint state_dict: optimizer_\d+\.param_groups": (
        "the optimizer's parameters are in other groups than those of the checkpoint, a folder: continue with the "
        "options it was started with, or start a new run from its weights with --model.weights FILE"
    ),
    # load_state_dict answers a checkpoint of another network with a page of parameter names.
    r"Error\(s\) in loading state_dict for (\w+):\s*(.{,120})": (
        "the checkpoint is not one of this {}; to start a new run from its weights: zoo fit --model.weights FILE. "
        "{} ..."
    ),
    r"Expected more than 1 value per channel when training": (  # torch's BatchNorm
        "the last feature map of a batch of one small image has a single pixel, which leaves BatchNorm nothing to "
        "normalise by: set a larger batch_size or image_size, and drop_last for the rest of an epoch"
    ),
    r"\s*`val_check_interval` \((\d+)\) must be less than or equal to .*? \((\d+)\)": (
        "val_check_interval is {0}, and an epoch has {1} training batches: set {1} at most, or a share such as 0.5; "
        "with check_val_every_n_epoch null, batches are counted on from epoch to epoch"
    ),
    r"Found more than one stateful callback of type `(\w+)`": (
        "a checkpoint cannot tell two {} with the same settings apart: leave one out, or change them"
    ),
}


class Mistake(Exception):
    """A wrong argument or configuration. Its text is all that the user needs to see.

    Attributes:
        status: Exit status of the command.
    """

    status = 2


class Failure(Mistake):
    """The end of something that was running: a fit, a test, a run of a sweep."""

    status = 1


@contextmanager
def worded(kind: type[Mistake]) -> Iterator[None]:
    """Turns what is raised for the user to read into a mistake of a kind; everything else keeps its traceback."""
    try:
        yield
    except kind:
        raise
    except Exception as error:
        cause = root_cause(error)
        message = str(cause) if isinstance(cause, Mistake) else on_purpose(cause)
        if message is not None:
            raise kind(message) from error
        if cause is error or os.environ.get("ZOO_DEBUG") == "1":
            raise
        raise cause from None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean X?``, or nothing if nothing is close."""
    near = get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def has_no_option(owner: str, option: str, options: list[str], aliases: Mapping[str, str] | None = None) -> str:
    """The answer to an option that a class does not have: its like, or else all that there are.

    Args:
        owner: The class.
        option: What was asked for.
        options: What there is.
        aliases: Other words for some of them, which a typing error may be of as well.
    """
    words = dict(zip(options, options, strict=True)) | dict(aliases or {})
    near = get_close_matches(option, words, n=1)
    hint = f"; did you mean {words[near[0]]}?" if near else f": it has {', '.join(options)}"
    return f"{owner} has no option {option!r}{hint}"


def explain(message: str, owner: str | None, options: list[str], classes: dict[str, list[str]]) -> tuple[str, str]:
    """One line for an error message of jsonargparse, and the word that was wrong.

    Args:
        message: jsonargparse's message.
        owner: Name of the class whose options were parsed, if they were a class's.
        options: The options that there are.
        classes: Names of the known classes for some options: ``{"model": ["ViTClassifier", ...], ...}``.
    """
    of_owner = f" of {owner}" if owner else ""
    if found := re.match(r"unrecognized arguments: ([^\s=]+)", message):
        if not found[1].startswith("-"):
            return f"unexpected argument {found[1]!r}; recipes come first, or behind -c", found[1]
        return f"unknown option {found[1]}{did_you_mean(found[1], [f'--{option}' for option in options])}", found[1]
    if found := re.match(r"(?:Group '(?P<group>\S+)'.*)?[Oo]ption '(?P<option>[\w.]+)'", message):
        option = ".".join(filter(None, (found["group"], found["option"])))
        if owner in ("LightningModule", "LightningDataModule"):
            kind = "model" if owner == "LightningModule" else "data"
            return f"{kind}.{option}: of which class? Name a recipe with -c, or --{kind} CLASS", option
        roots = {known.split(".")[0] for known in options}
        if option.split(".")[0] not in roots:
            option, options = option.split(".")[0], sorted(roots)
        if owner:
            return has_no_option(owner, option, [name for name in options if name != "help"]), option.split(".")[-1]
        return f"unknown option {option!r}{did_you_mean(option, options)}", option.split(".")[-1]
    if found := re.match(r"the following arguments are required: (.+)", message):
        missing = " and ".join("--" + name.split(".", 1)[-1] for name in found[1].split(", "))
        return f"{missing} {'is' if ' and ' not in missing else 'are'} missing: name a recipe with -c (zoo list)", ""
    if found := re.search(r"Importing '([\w.]+)' is not allowed, denied by the '(.+?)' entry", message):
        why = ": --strict-imports allows the zoo and its libraries only" if found[2] == "*" else ""
        return f"importing {found[1]} is not allowed in a configuration{why}", found[1]
    if not (found := re.match(r"Parser key \"([\w.]+)\":", message)):
        return " ".join(message.split()), ""
    key = found[1]
    if found := re.search(r"Expected a dot import path string: (\S+)", message):
        near = did_you_mean(found[1], classes.get(key, []))
        if any(found[1] in names for names in classes.values()):
            return f"{key}: {found[1]} is a class, but of another kind", found[1]
        return f"{key}: unknown class {found[1]!r}{near or '; a class of your own needs its dotted path'}", found[1]
    if found := re.search(r"Problem with given class_path '([\w.]+)':\s+(.*)", message):
        near = did_you_mean(found[1].split(".")[-1], classes.get(key, []))
        return f"{key}{of_owner}: cannot use class {found[1]!r}: {found[2]}{near}", found[1]
    if "Subclass types expect one of" in message:
        return f"{key}{of_owner}: expected class_path: NAME and its init_args", key
    if found := re.search(r"NestedArg\(key='(.+?)'", message):  # an option of a class, and the class is not known
        return f"{key}.{found[1]}: of which class? Name it first, as in --{key} CLASS --{key}.{found[1]} VALUE", key
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    types = re.search(r"Subtypes: \[(.*)\]|Expected an? (.*?)\. Got", message)
    if value is None or types is None:
        return f"{key}{of_owner}: {' '.join(message.split()[3:])}", key
    choices = [choice for literal in re.findall(r"Literal\[(.*?)\]", message) for choice in literal.split(", ")]
    near = did_you_mean(value[1], [choice.strip("'") for choice in dict.fromkeys(choices)])
    return f"{key}{of_owner}: expected {_plain(types[1] or types[2])}, got {value[1]!r}{near}", key


def _plain(types: str) -> str:
    """Types as a person writes them: ``<class 'int'>, typing.Literal['a', 'b'], <class 'NoneType'>``."""
    types = re.sub(r"<class '(.*?)'>", r"\1", types).replace("NoneType", "null")
    types = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", types)
    types = re.sub(r"Literal\[(.*?)\]", r"\1", types)
    return re.sub(r", (?![^\[]*\])", " or ", types)  # but for the comma of tuple[int, int]


def locate(word: str, configs: list[str], overrides: list[str]) -> str:
    """``file, line 3: `` where a configuration file says the word, or nothing if an option on the command line does.

    Args:
        word: A word as it stands in the file, or the way to a key, ``trainer.callbacks`` for example.
        configs, overrides: The files, and the options on the command line.
    """
    if word and not any(word in override for override in overrides):
        for config in reversed(configs):
            text = Path(config).read_text(encoding="utf-8") if Path(config).is_file() else ""
            for number, line in enumerate(text.splitlines(), 1):
                if re.search(rf"\b{re.escape(word)}\b", line.split("#")[0]):
                    return f"{config}, line {number}: "
            if line_of_key := _line_of(word.split("."), yaml.compose(text, Loader=yaml.SafeLoader)):
                return f"{config}, line {line_of_key}: "
    return ""


def _line_of(way: list[str], node: yaml.Node | None) -> int | None:
    """The line of the key at the end of a way through mappings."""
    line = None
    for name in way:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        key, node = next(((key, value) for key, value in pairs if key.value == name), (None, None))
        line = None if key is None else key.start_mark.line + 1
    return line


def on_purpose(error: BaseException) -> str | None:
    """The message of an exception that was raised for the user to read, by this project or a library; else None."""
    said, frames = str(error), traceback.extract_tb(error.__traceback__)
    for who, pattern in MONITORS.items():
        if found := re.match(pattern, said, re.DOTALL):
            there = [name for name in re.findall(r"['`](.+?)['`]", found[2]) if name not in ("epoch", "step")]
            hint = did_you_mean(found[1], there) or f"; there are {', '.join(there) or 'none'}"
            return f"{who} monitors {found[1]!r}, and there is no such metric{hint}"
    for pattern, text in REWORDED.items():
        if found := re.match(pattern, said):
            return text.format(*found.groups())
    if _is_ours(frames[-1].filename) and _was_raised(error):
        return said
    # A DataLoader re-raises what happened in a worker with the worker's traceback as its message.
    if found := re.match(r"Caught (\w+) in DataLoader worker process", said):
        raised = re.findall(r'File "(.+?)", line \d+, in .*\n +(.*)', said)[-1:]
        if raised and _is_ours(raised[0][0]) and raised[0][1].startswith("raise"):
            return re.split(rf"\n(?:[\w.]+\.)?{found[1]}: ", said)[-1].strip()
    # A worker that dies while a batch is being taken from it.
    receiving = any(frame.filename.endswith("torch/multiprocessing/reductions.py") for frame in frames)
    if isinstance(error, ConnectionError | EOFError) and receiving:
        return WORKER_DIED
    if isinstance(error, UnicodeEncodeError) and error.encoding == "ascii":
        return f"this locale does not have the letters of {error.object}: set PYTHONUTF8=1"
    if isinstance(error, OSError) and frames[-1].name in ("makedirs", "mkdir"):
        return f"the folder {error.filename} cannot be made: {error.strerror}"
    if type(error).__name__ == "MisconfigurationException" or _is_a_librarys(error):
        return " ".join(said.split())
    return None


def _is_a_librarys(error: BaseException) -> bool:
    """True if a library's ``raise`` raised it, and nobody else's class, which may be to blame, was on the way."""
    frames = traceback.walk_tb(error.__traceback__)
    packages = [str(frame.f_globals.get("__name__")).split(".")[0] for frame, _ in frames]
    return packages[-1] in LIBRARIES and _was_raised(error) and set(packages) <= NOT_FOREIGN


def _was_raised(error: BaseException) -> bool:
    """True if a ``raise`` statement of the innermost function raised it, and not something that it called."""
    from dis import opname

    last: TracebackType | None = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def _is_ours(filename: str) -> bool:
    root = Path(__file__).parents[2]
    return any(Path(filename).is_relative_to(root / package) for package in PACKAGES)


def root_cause(error: Exception) -> Exception:
    """Error of a class's constructor: jsonargparse wraps it in what it says about types."""
    wrapped = ("Does not validate against any of the Union", "Problem with given class_path")
    while str(error).startswith(wrapped) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error
