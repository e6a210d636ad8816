"""Names that people type: understood where they can mean one thing, answered where they could mean two.

What is understood is rewritten, and said in a line, so that what is written is what runs. A name is understood if it is
that of one option alone, whose class is one of the zoo's, so that its options are known; or another word for such an
option that takes the same values. All of it comes before torch is imported, and so does the answer to an option that
none of these classes has.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType

from zoo.cli import recipes, signatures
from zoo.cli.mistakes import Mistake, has_no_option
from zoo.cli.notice import speaks

PACKAGES = {"model": recipes.PACKAGES["modules"], "data": recipes.PACKAGES["data"]}
OWNERS = (*PACKAGES, "trainer")

COMMANDS = {
    "train": "fit",
    "val": "validate",
    "validation": "validate",
    "infer": "predict",
    "inference": "predict",
    "ls": "list",
    "bench": "benchmark",
    "flops": "cost",
    "version": "--version",
    "-V": "--version",
    "help": "--help",
}
"""Other words for commands."""

UNCLEAR_COMMANDS = dict.fromkeys(
    ("eval", "evaluate", "evaluation"),  # of timm and DETR it is the validation data, of others the test data
    "zoo test measures a checkpoint on the test data, zoo validate on the validation data",
)
UNCLEAR_COMMANDS |= dict.fromkeys(("finetune", "fine-tune"), "zoo fit --model.weights FILE starts from weights")
UNCLEAR_COMMANDS |= dict.fromkeys(("resume", "continue"), "zoo fit --ckpt_path last continues the newest run")

MODEL = {"learning_rate": "lr", "wd": "weight_decay", "img_size": "image_size", "in_chans": "in_channels"}
DATA = {
    **dict.fromkeys(("bs", "batch"), "batch_size"),
    **dict.fromkeys(("workers", "n_workers"), "num_workers"),
    **dict.fromkeys(("data_dir", "data_path", "data_root"), "root"),
    "img_size": "image_size",
}
TRAINER = {
    **dict.fromkeys(("epochs", "num_epochs", "n_epochs", "num_train_epochs"), "max_epochs"),
    **dict.fromkeys(("steps", "num_steps", "train_steps"), "max_steps"),
    **dict.fromkeys(("nodes", "nnodes"), "num_nodes"),
    **dict.fromkeys(("accumulate", "grad_accum", "gradient_accumulation_steps"), "accumulate_grad_batches"),
}
ALIASES = {"model": MODEL, "data": DATA, "trainer": TRAINER}
"""Other words for options, where the option of that name takes the same values."""

ROOT = {
    **dict.fromkeys(("resume", "resume_from", "resume_from_checkpoint"), "ckpt_path"),  # which continues a run
    **{name: name for name in ("ckpt_path", "print_config", "seed_everything", "weights_only")},  # also with dashes
}
"""Other words for what belongs to no class."""

_DEVICES = "it is --trainer.accelerator cpu or gpu, and --trainer.devices N, how many"
_PRECISION = "it is --trainer.precision 16-mixed, bf16-mixed or another of the Trainer's"
_PLACE = "logs and checkpoints go below --trainer.logger.save_dir, or without a logger below --trainer.default_root_dir"
_RECIPE = "a recipe stands behind the command, as in zoo fit vit/digits"
ANSWERS = {
    "seed": "--seed_everything N seeds the model and its training, --data.seed N the order of the data",
    **dict.fromkeys(
        ("gpu", "gpus", "device", "cpu", "cuda", "num_gpus"), _DEVICES
    ),  # gpus=0 was the CPU, "0" the first
    **dict.fromkeys(("amp", "fp16", "bf16", "half", "mixed_precision"), _PRECISION),
    **dict.fromkeys(("out", "output", "output_dir", "log_dir", "logdir", "save_dir", "out_dir"), _PLACE),
    **dict.fromkeys(("recipe", "cfg"), _RECIPE),
    **dict.fromkeys(("arch", "model_name", "net"), "it is --model CLASS, and of most classes --model.backbone NAME"),
    **dict.fromkeys(("pretrained", "finetune", "init_from"), "--model.weights FILE starts from weights"),
    **dict.fromkeys(("grad_clip", "clip_grad"), "it is --trainer.gradient_clip_val, of the norm unless told otherwise"),
    "no_guards": "it is --guards false",
    "tta": "test-time augmentation goes with a checkpoint alone, zoo predict CHECKPOINT IMAGE ... --tta flip",
    "strict_imports": "it is --strict-imports",
    "b": "--data.batch_size N is the batch, --model.backbone NAME the network",
    "e": "it is --trainer.max_epochs N",
    "j": "it is --data.num_workers N",
}
"""Names that could mean two things, or whose values are others here."""

MEASURES = ("validate", "test", "predict")
CHECKPOINT = ("ckpt", "checkpoint", "checkpoint_path", "ckpt_file", "load")
"""Understood where a checkpoint is measured. A fit could continue its run, or start another from its weights."""
CONTINUE_OR_START = "--ckpt_path FILE continues its run, --model.weights FILE starts a new one from its weights"


def command(word: str) -> str:
    """The command that a word means, said in a line if it is another word for it.

    Raises:
        Mistake: For a word that could mean two things.
    """
    if word in UNCLEAR_COMMANDS:
        raise Mistake(f"unknown command {word!r}: {UNCLEAR_COMMANDS[word]}")
    if word in COMMANDS:
        _say(word, COMMANDS[word])
    return COMMANDS.get(word, word)


def understood(options: Sequence[str], files: Sequence[str], command: str) -> list[str]:
    """The options as LightningCLI knows them. Those of the command's own are no longer among them.

    Args:
        options: As they were typed.
        files: The configurations, which say what classes there are.
        command: What is done with them: for ``fit`` a checkpoint is another thing than for ``test``.

    Raises:
        Mistake: For a name that could mean two things, and an option that a class of the zoo does not have.
    """
    if not options and not files and command in (*MEASURES, "fit", "cost"):
        missing = "--model is" if command == "cost" else "--data and --model are"
        raise Mistake(f"{missing} missing: name a recipe with -c (zoo list)")
    known = Known(options, files)
    return [_understood(option, following, known, command) for option, following in pairwise([*options, "--"])]


class Known:
    """Options of model, data and Trainer, known without importing them.

    ``classes`` has a name each, None where it is somebody else's or unclear, and nothing where none is named.
    """

    def __init__(self, options: Sequence[str], files: Sequence[str]) -> None:
        self.classes: dict[str, str | None] = {"trainer": "Trainer"}
        self._modules: dict[str, str] = {}
        for part, package in PACKAGES.items():
            named = {_ours(package, name) for name in (*_in_files(part, files), *_in_options(part, options))}
            if named:
                found = named.pop() if len(named) == 1 else None  # of several, the order would decide
                self.classes[part] = found and found[1]
                self._modules[part] = found[0] if found else ""

    def options(self, part: str) -> list[str] | None:
        """The options of a part; None if they cannot be known."""
        name = self.classes.get(part)
        if name is None:
            return None
        return _trainer() if part == "trainer" else signatures.options(self._modules[part], name)

    def meant(self, part: str, name: str) -> str | None:
        """The option of a part that a name means, of a class that has it."""
        name = name.replace("-", "_")
        there = self.options(part) or []
        return next((option for option in (name, ALIASES[part].get(name)) if option in there), None)

    @property
    def foreign(self) -> bool:
        """True if there is a class of which nothing is known: every name may be an option of it."""
        return any(self.options(part) is None for part in self.classes)


def _understood(typed: str, following: str, known: Known, command: str) -> str:
    head, equals, value = typed.partition("=")
    if not re.fullmatch(r"--?[A-Za-z][\w.-]*\+?", head) or head == "-h":
        return typed
    part, dot, option = head.lstrip("-").partition(".")
    if head.startswith("--") and part in OWNERS:
        meant = _of_class(part, option, known) if option else None
    elif dot:
        if part in ("optimizer", "optim", "lr_scheduler", "scheduler"):
            raise Mistake(f"unknown option {head}: a model has its own optimizer and schedule, as in --model.lr")
        meant = None
    else:
        meant = _of_nobody(head, known, command)
        if meant == "ckpt_path" and not equals and following.startswith("-"):
            raise Mistake(f"{head} needs a checkpoint: --ckpt_path FILE, or last, the newest of this model and data")
    if meant is None or f"--{meant}" == head:
        return typed
    _say(head, f"--{meant}")
    return f"--{meant}{equals}{value}"


def _of_class(part: str, option: str, known: Known) -> str | None:
    """Meaning of ``--PART.OPTION``; None to leave it as it is."""
    words = option.split(".")
    inner = words[words[0] == "init_args" :]
    there = known.options(part)
    if there is None or not inner or inner[0] in ("class_path", "dict_kwargs", "help"):
        return None
    name, plus, _ = inner[0].partition("+")
    if name in there:
        return None
    if meant := known.meant(part, name):
        return ".".join([part, meant + plus, *inner[1:]])
    raise Mistake(_unknown(part, name, there, known))


def _unknown(part: str, name: str, there: list[str], known: Known) -> str:
    """The answer to an option that a class does not have: where it belongs, its like, or all that there are."""
    owner = str(known.classes[part])
    elsewhere = [f"--{other}.{known.meant(other, name)}" for other in OWNERS if known.meant(other, name)]
    if elsewhere:
        return f"{owner} has no option {name!r}; did you mean {' or '.join(elsewhere)}?"
    if name in ANSWERS:
        return f"{owner} has no option {name!r}: {ANSWERS[name]}"
    return has_no_option(owner, name, there, {alias: to for alias, to in ALIASES[part].items() if to in there})


def _of_nobody(head: str, known: Known, command: str) -> str | None:
    """Meaning of an option that names no class; None to leave it as it is."""
    name = head.lstrip("-").replace("-", "_")
    if name in ROOT:
        return ROOT[name]
    if name in CHECKPOINT:
        if command in MEASURES:
            return "ckpt_path"
        raise Mistake(f"unknown option {head}: {CONTINUE_OR_START}")
    if name in ANSWERS:
        raise Mistake(f"unknown option {head}: {ANSWERS[name]}")
    found = [f"{part}.{option}" for part in OWNERS if (option := known.meant(part, name))]
    choices = " or ".join(f"--{option}" for option in found)
    if len(found) > 1:
        raise Mistake(f"unknown option {head}: {choices}, or both?")
    if found and (known.foreign or not head.startswith("--")):
        raise Mistake(f"unknown option {head}; did you mean {choices}?")
    return found[0] if found else None


def _in_files(part: str, files: Sequence[str]) -> Iterator[str]:
    """The classes that configurations name for a part; an empty name for what cannot be told."""
    for file in files:
        value = "" if "://" in file else recipes.parsed(Path(file).read_text(encoding="utf-8")).get(part)
        if isinstance(value, dict):
            value = value.get("class_path")
        if value is not None:
            yield str(value)


def _in_options(part: str, options: Sequence[str]) -> Iterator[str]:
    """The same of options."""
    for option, following in pairwise([*options, ""]):
        name, equals, value = option.partition("=")
        if name in (f"--{part}", f"--{part}.class_path"):
            yield value if equals else following


def _ours(package: ModuleType, name: str) -> tuple[str, str] | None:
    """Module and name of a class of a package, for its name with or without a path."""
    module, _, name = name.rpartition(".")
    if module in ("", package.__name__):
        module = f"{package.__name__}.{package._EXPORTS[name]}" if name in package._EXPORTS else ""
    found = signatures.find_class(module, name) if module.split(".")[0] == package.__name__ else None
    return found and (found[0], name)


@cache
def _trainer() -> list[str] | None:
    """The options of Lightning's Trainer; both of its packages ship the same."""
    paths = ("lightning.pytorch.trainer.trainer", "pytorch_lightning.trainer.trainer")
    return next(filter(None, (signatures.options(path, "Trainer") for path in paths)), None)


def _say(typed: str, meant: str) -> None:
    if speaks():
        print(f"zoo: {typed} is {meant}", file=sys.stderr)
