"""The command line, ``zoo COMMAND``: what needs no torch is answered here, at once; the rest is LightningCLI's.

    zoo fit -c vit/digits --model.lr 3e-4

``recipes.py`` knows the recipes, ``run.py`` is the LightningCLI, ``imports.py`` says what a configuration may name,
``blueprint.py`` reads a configuration without running it, ``mistakes.py`` words what went wrong.
With ``ZOO_DEBUG=1`` every error shows its traceback.
"""

import io
import locale
import os
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import datamodules
import zoo
from zoo.cli import mistakes, recipes
from zoo.cli.arguments import Arguments, percent, positive, seconds
from zoo.cli.mistakes import Mistake, did_you_mean

PACKAGES = {"modules": zoo, "data": datamodules}
"""Whose classes go by their names alone. Nothing else of the zoo knows of the data."""

COMMANDS = {
    "fit": "train, then test",
    "validate": "measure a checkpoint on the validation data",
    "test": "measure a checkpoint on the test data",
    "predict": "write predictions, of the test data or of a folder",
    "benchmark": "how fast a recipe trains and predicts here, and beside others",
    "cost": "parameters and operations of a recipe's model",
    "scaling-search": "find the coefficients of compound scaling for a network and data of yours",
    "scaling-compare": "scale by width, depth, resolution and all three, at equal cost",
    "compare-estimators": "train a GumbelVAE with each gradient estimator, and measure the gradients",
    "list": "modules, data and recipes",
}

USAGE = f"""\
usage: zoo COMMAND [-c RECIPE ...] [--option VALUE ...]

{chr(10).join(f"  {name:18} {line}" for name, line in COMMANDS.items())}

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
  --ckpt_path FILE         the checkpoint to use; with fit, the one to continue from;
                           last: the newest of this model and data
  --seed_everything N      0, unless said otherwise
  --print_config           show the whole configuration and stop
  --strict-imports         for a configuration from a stranger, or from a URL: it may name the classes of the zoo,
                           and of torch.nn, torch.optim and Lightning what needs no trust (or ZOO_STRICT_IMPORTS=1)
  --guards false           without exact resume, preemption, whole checkpoints and the other guards"""


COST = """\
usage: zoo cost RECIPE [-c RECIPE ...] [--option VALUE ...]
       zoo cost --model CLASS [--option VALUE ...]

Prints the parameters of a model, the multiply-accumulates of its forward pass, and the floating-point operations of a
training step, for one image. It takes neither weights nor data, only seconds.

  RECIPE                   by name (zoo list) or a YAML file; several are merged, the last one wins
  --model CLASS            a class of the zoo, or your own by its dotted path, with an input_shape (C, H, W)
  --model.image_size 64    an option of the model; every option of zoo fit may stand here
  --strict-imports         see zoo fit --help"""

BENCHMARK = """\
usage: zoo benchmark RECIPE [axes and options of this command] [--option VALUE ...]
       zoo benchmark compare BEFORE AFTER [--max-regression 5%]

Measures a recipe in a fresh process for every combination of the axes: images a second, the time of a step, memory, the
share of the device's peak, and what limits it. Writes a JSON file a cell, a table and a plot.

  RECIPE                   by name (zoo list) or a YAML file; -c RECIPE as well, several are merged
  --mode MODE ...          step: a loop written by hand, on a batch that stays on the device (the default)
                           fit: Trainer.fit on that batch, with the recipe's callbacks and a logger
                           data: the loader alone; e2e: Trainer.fit on the data; infer: predictions
  --peers [NAME ...]       others that do the same, in the same run; without names all there are
  --out FOLDER             where files, table and plot go (runs/benchmark/RECIPE/version_N)
  --repeats N              processes for each cell, which take turns (3)
  --steps N --seconds S    at least so many steps, and so long, are measured in each (50, 5)
  --limit S                but no longer than this (60)

Axes, each with one value or several:
  --precision 32-true bf16-mixed   --compile false true       --channels-last false true
  --batch-size 64 256              --image-size 160 224       --grad-checkpointing false true
  --num-workers 0 4                --accelerator cpu gpu      --devices 1 2      --strategy ddp

Every other option is one of zoo fit, and goes to all cells. The status is 1 if a cell failed or ran out of memory, or
if none could be measured; a device or a peer's package that is not here is a row, and no failure. That of compare is 1
if a cell has become slower by more than --max-regression and its spread, or is missing or failed in AFTER."""

SWEEPS = """\
usage: zoo {command} RECIPE [options of this command] [--option VALUE ...]

{purpose}

  RECIPE                   {recipe}
  --out FOLDER             where runs, table and plot go; run it again to continue (runs/{command})
  --seeds N                runs of each, with seeds from 0 ({seeds})
  --jobs N                 how many run at a time (1)
{own}

Every other option is one of zoo fit, and goes to all runs: --trainer.max_epochs 20"""

SCALED = "a recipe of EfficientNetClassifier; what is scaled is its network, at its phi"
SWEEP_HELP = {
    "scaling-search": {
        "purpose": """\
Trains the recipe's network at twice its cost, scaled by each alpha, beta and gamma of a grid with
alpha * beta^2 * gamma^2 = 2, and says which are the most accurate on the validation data. There are 12 of them with a
step of 0.1; after each run it says how long the others will take.""",
        "recipe": SCALED,
        "seeds": 1,
        "own": "  --step X                 between the betas, and the gammas, that are tried (0.1)",
    },
    "scaling-compare": {
        "purpose": """\
Trains the recipe's network, and that scaled by width, by depth, by resolution and by all three (the recipe's alpha,
beta, gamma) within the same budgets, and compares them on the test data. After each run it says how long the others
will take.""",
        "recipe": SCALED,
        "seeds": 3,
        "own": "  --multiples X ...        budgets, in multiples of the network's own cost, above 1 (2 4 8)",
    },
    "compare-estimators": {
        "purpose": """\
Trains the recipe's model with each gradient estimator and compares bounds on the test data, the time of a training
step, and bias and variance of the gradients at the same weights. After each run it says how long the others will
take.""",
        "recipe": "a recipe of GumbelVAE that sets iw_samples, for the importance-weighted bound",
        "seeds": 3,
        "own": """\
  --estimators NAME ...    which (all that can do the recipe); gradients are measured at a model of the first""",
    },
}
SWEPT = {
    "scaling-search": ("scales an EfficientNetClassifier", ("image_size", "seed")),
    "scaling-compare": ("scales an EfficientNetClassifier", ("image_size", "seed")),
    "compare-estimators": ("trains a GumbelVAE", ("seed",)),
}
"""What each does to which class, and what it sets of the data."""


def main(args: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 2 for a mistake, 1 for a failure on the way.

    Args:
        args: The arguments behind ``zoo``. None: those of the process.
    """
    _use_utf8()
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


def _use_utf8() -> None:
    """Makes UTF-8 what is read, written and printed in a locale without umlauts, as Python itself does in most of them.

    Recipes are UTF-8. Those who open files without saying so, jsonargparse among them, ask the locale.
    """
    if locale.getencoding().lower().replace("-", "") != "utf8":
        for name in ("C.UTF-8", "en_US.UTF-8"):
            with suppress(locale.Error):
                locale.setlocale(locale.LC_CTYPE, name)
                break
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower().replace("-", "") != "utf8":
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")


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
        texts = {"cost": COST, "benchmark": BENCHMARK, **dict.fromkeys(SWEEP_HELP, SWEEPS)}
        text = texts.get(command, OPTIONS)
        print(text.format(command=command, **SWEEP_HELP.get(command, {})))
    else:
        if command == "benchmark" and options[:1] == ["compare"]:
            return _compare(options[1:])
        if command in ("benchmark", "cost", *SWEEP_HELP) and options and not options[0].startswith("-"):
            configs.insert(0, options.pop(0))  # `zoo cost vit/digits` as well
        files = [recipes.find(config, urls=strict) for config in configs]
        recipes.check_parts(options)
        if command in ("benchmark", *SWEEP_HELP):
            return (_benchmark if command == "benchmark" else partial(_sweep, command))(files, options, strict)
        options = ["--help" if option == "--trainer.help" else option for option in options]
        if command == "cost":  # imports only here: torch and Lightning take seconds
            from zoo.cli import blueprint

            print(blueprint.cost(files, options, strict, PACKAGES.values()))
        else:
            from zoo.cli import run

            run.run(command, files, options, strict, PACKAGES.values())
    return 0


def _sweep(command: str, files: list[str], args: list[str], strict: bool) -> int:
    """Reads the options of a command that trains many models, checks what it trains, and calls it."""
    parser = Arguments(prog=f"zoo {command}", allow_abbrev=False, add_help=False)
    parser.add_argument("--out", type=Path, default=Path("runs", command))
    parser.add_argument("--seeds", type=positive, default=SWEEP_HELP[command]["seeds"])
    parser.add_argument("--jobs", type=positive, default=1)
    if command == "scaling-search":
        parser.add_argument("--step", type=float, default=0.1)
    elif command == "scaling-compare":
        parser.add_argument("--multiples", type=float, nargs="+", default=[2.0, 4.0, 8.0])
    else:
        parser.add_argument("--estimators", nargs="+")
    own, options = parser.parse_known_args(args)
    if not files:
        raise Mistake(f"{command} needs a recipe: zoo {command} RECIPE (zoo list)")
    from zoo.cli import blueprint

    plan = blueprint.read(files, options, strict, PACKAGES.values())
    plan.ask_data()
    model, data, trainer = (plan.config.fit[key] for key in ("model", "data", "trainer"))
    does, sets = SWEPT[command]
    if model.class_path.split(".")[-1] != does.split()[-1]:
        raise Mistake(f"{command} {does}, but the recipe has {model.class_path}")
    if data is None:
        raise Mistake("--data is missing: name a recipe with -c (zoo list)")
    if missing := set(sets) - set(vars(data.init_args)):
        raise Mistake(f"{command} sets the data's {' and '.join(sets)}: {data.class_path} has no {min(missing)}")
    if strict:
        options = [*options, "--strict-imports"]
    arguments, shared = model.init_args.as_dict(), {"configs": files, "options": options, **vars(own)}
    if command == "compare-estimators":
        from zoo.gumbel_vae import compare

        print(compare.compare(arguments, plan.build_data(), trainer=trainer, **shared))
    else:
        from zoo.efficientnet import search

        task = search.search if command == "scaling-search" else search.compare
        print(task(search.base_of(arguments), num_classes=arguments["num_classes"], **shared))
    return 0


def _benchmark(files: list[str], args: list[str], strict: bool) -> int:
    """Reads the options of ``zoo benchmark`` and measures; or is the process of one cell. 1 if a cell failed."""
    if args[:1] == ["--cell"]:
        from zoo.cli.benchmark import process

        asked, found, runs = map(Path, args[1:4])
        process.answer(asked, found, runs, strict, PACKAGES.values())
        return 0
    from zoo.cli.benchmark import cells

    parser = Arguments(prog="zoo benchmark", allow_abbrev=False, add_help=False)
    parser.add_argument("--mode", nargs="+", default=["step"])
    parser.add_argument("--peers", nargs="*")
    parser.add_argument("--out", type=Path)
    for name, default in (("repeats", 3), ("steps", 50)):
        parser.add_argument(f"--{name}", type=positive, default=default)
    parser.add_argument("--seconds", type=partial(seconds, zero=True), default=5.0)
    parser.add_argument("--limit", type=seconds, default=60.0)
    for axis in cells.AXES:
        parser.add_argument(f"--{axis.replace('_', '-')}", f"--{axis}", nargs="+")
    own, options = parser.parse_known_args(args)
    if not files:
        raise Mistake("benchmark needs a recipe: zoo benchmark RECIPE (zoo list)")
    from zoo.cli.benchmark import command

    text, failures = command.run(files, options, strict, PACKAGES.values(), **vars(own))
    print(text)
    return _told("not measured", failures)


def _compare(args: list[str]) -> int:
    """``zoo benchmark compare BEFORE AFTER``: prints the table; 1 if something has become too slow, or is lost."""
    from zoo.cli.benchmark import report

    parser = Arguments(prog="zoo benchmark compare", allow_abbrev=False, add_help=False)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--max-regression", type=percent, default=0.05)
    own = parser.parse_args(args)
    text, slower, lost = report.compare(report.read(own.before), report.read(own.after), own.max_regression)
    print(text)
    return _told("slower than allowed", slower) | _told(f"not measured in {own.after}", lost)


def _told(what: str, lines: list[str]) -> int:
    """Names what went wrong, a line each; the exit status is 1 if something did."""
    for line in lines:
        print(f"zoo: {what}: {line}", file=sys.stderr)
    return 1 if lines else 0


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
        else:  # what a locale without umlauts has made of them; the name of a file has to stay like that
            rest.append(arg.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape"))
    return configs, rest


if __name__ == "__main__":
    sys.exit(main())
