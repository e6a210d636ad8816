"""The command line, ``zoo COMMAND``: what needs no torch is answered here, at once; the rest is LightningCLI's.

    zoo fit -c vit/digits --model.lr 3e-4

``zoo/recipes.py`` knows the recipes, ``zoo/run.py`` is the LightningCLI, ``zoo/mistakes.py`` words what went wrong.
With ``ZOO_DEBUG=1`` every error shows its traceback.
"""

import os
import sys

import datamodules
import zoo
from zoo import mistakes, recipes
from zoo.mistakes import Mistake, did_you_mean

PACKAGES = {"modules": zoo, "data": datamodules}
"""Whose classes go by their names alone. Nothing else of the zoo knows of the data."""

COMMANDS = {
    "fit": "train, then test",
    "validate": "measure a checkpoint on the validation data",
    "test": "measure a checkpoint on the test data",
    "predict": "write predictions, of the test data or of a folder",
    "list": "modules, data and recipes",
}

USAGE = f"""\
usage: zoo COMMAND [-c RECIPE ...] [--option VALUE ...]

{chr(10).join(f"  {name:10} {line}" for name, line in COMMANDS.items())}

  zoo fit -c vit/digits
  zoo test -c vit/digits --ckpt_path FILE
  zoo predict -c vit/digits --ckpt_path FILE --data.predict_root FOLDER

zoo COMMAND --help names the options, zoo --version the version."""

OPTIONS = """\
usage: zoo {command} [-c RECIPE ...] [--option VALUE ...]

  -c RECIPE                a recipe by name (zoo list) or a YAML file; several are merged, the last one wins
  --model CLASS            a class of the zoo, or your own by its dotted path; --model.help CLASS lists its options
  --data CLASS             the same for data; --data.help CLASS
  --model.lr 3e-4          an option of the model; options win over recipes and over checkpoints
  --data.batch_size 32     an option of the data; --data.predict_root FOLDER is what predict reads
  --trainer.max_epochs 9   an argument of Lightning's Trainer; --trainer.help lists all
  --ckpt_path FILE         the checkpoint to use; with fit, the one to continue from
  --seed_everything N      0, unless said otherwise
  --print_config           show the whole configuration and stop
  --strict-imports         for a configuration from a stranger, or from a URL: it may name the classes of the zoo,
                           torch, torchvision, timm, torchmetrics and lightning only (or ZOO_STRICT_IMPORTS=1)"""


def main(args: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 2 for a mistake, 1 for a failure on the way.

    Args:
        args: The arguments behind ``zoo``. None: those of the process.
    """
    try:
        return _dispatch(list(sys.argv[1:] if args is None else args))
    except Exception as error:
        cause = mistakes.root_cause(error)
        message = str(cause) if isinstance(cause, Mistake) else mistakes.on_purpose(cause)
        if os.environ.get("ZOO_DEBUG") == "1":
            raise
        if message is None:
            raise cause from None
        print(f"zoo: error: {message}", file=sys.stderr)
        return 1 if mistakes.was_running(error) else 2


def _dispatch(args: list[str]) -> int:
    configs, rest = _split(args)
    strict = "--strict-imports" in rest or os.environ.get("ZOO_STRICT_IMPORTS", "0") not in ("", "0")
    rest = [arg for arg in rest if arg != "--strict-imports"]
    command, options = (rest[0], rest[1:]) if rest else ("--help", [])
    if command == "--version":
        print(f"zoo {zoo.__version__}")
    elif command in ("--help", "-h"):
        print(USAGE)
    elif command == "list":
        print(recipes.overview(PACKAGES))
    elif command not in COMMANDS:
        hint = did_you_mean(command, COMMANDS) or f"; expected {', '.join(COMMANDS)}"
        raise Mistake(f"unknown command {command!r}{hint}")
    elif "--help" in options or "-h" in options:
        print(OPTIONS.format(command=command))
    else:
        files = [recipes.find(config, urls=strict) for config in configs]
        from zoo.run import run  # only here: it takes seconds to import torch and Lightning

        options = ["--help" if option == "--trainer.help" else option for option in options]
        run(command, files, options, strict, PACKAGES.values())
    return 0


def _split(args: list[str]) -> tuple[list[str], list[str]]:
    """The configurations named by ``-c``, before or after the command, and everything else."""
    configs, rest, arguments = [], [], iter(args)
    for arg in arguments:
        name, equals, value = arg.partition("=")
        if name in ("-c", "--config"):
            value = value if equals else next(arguments, "")
            if not value:
                raise Mistake(f"{name} needs a recipe or a file; see zoo list")
            configs.append(value)
        else:
            rest.append(arg)
    return configs, rest


if __name__ == "__main__":
    sys.exit(main())
