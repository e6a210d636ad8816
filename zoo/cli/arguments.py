"""The line that was typed, the options of the zoo's own commands, and the help made from them; errors are a line."""

import math
import os
from argparse import Action, ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from zoo.cli import names, recipes
from zoo.cli.mistakes import Mistake, did_you_mean
from zoo.cli.notice import loading

if TYPE_CHECKING:
    from zoo.cli.plan import Plan

RECIPE = (
    "RECIPE",
    "a recipe by name (zoo list) or a YAML file, before all options; several are merged, the last one wins. "
    "-c RECIPE and --config RECIPE do the same, anywhere",
)
STRICT = (
    "--strict-imports",
    "for a configuration from a stranger, or from a URL: it may name the classes of the zoo, and of torch.nn, "
    "torch.optim and Lightning what needs no trust (or ZOO_STRICT_IMPORTS=1)",
)


class Line(NamedTuple):
    """A command line in parts."""

    command: str  # empty if there is none
    words: list[str]  # directly behind it: recipes
    configs: list[str]  # those named with -c, before or after the command
    options: list[str]  # everything else
    strict: bool  # whether a configuration may name the classes of the zoo and its libraries only


def read(args: Sequence[str]) -> Line:
    """The parts of a command line. What was typed is read nowhere else."""
    configs, rest, arguments = [], [], iter(args)
    strict = os.environ.get("ZOO_STRICT_IMPORTS", "0") not in ("", "0")
    for arg in arguments:
        name, equals, value = arg.partition("=")
        if name in ("-c", "--config"):
            value = value if equals else next(arguments, "")
            if not value:
                raise Mistake(f"{name} needs a recipe or a file; see zoo list")
            configs.append(value)
        elif arg == "--strict-imports":
            strict = True
        else:
            rest.append(arg)
    command, behind = "".join(rest[:1]), rest[1:]
    count = next((index for index, arg in enumerate(behind) if arg.startswith("-")), len(behind))
    # What a locale without umlauts has made of them; the name of a file has to stay like that.
    command, *options = (
        arg.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape") for arg in (command, *behind[count:])
    )
    return Line(command, behind[:count], configs, options, strict)


class Arguments(ArgumentParser):
    """An argument parser whose errors are a line."""

    def __init__(self, command: str, usage: str, text: str, end: str = "") -> None:
        layout: Any = partial(RawDescriptionHelpFormatter, max_help_position=28, width=118)
        usage = usage.replace("%", "%%")
        super().__init__(f"zoo {command}", f"zoo {command} {usage}", text, end, formatter_class=layout, add_help=False)
        self.allow_abbrev = False

    def error(self, message: str) -> NoReturn:
        raise Mistake(message)


class Command(NamedTuple):
    """A command. Nothing of it imports torch before it runs."""

    name: str
    summary: str  # its line in zoo --help
    arguments: Callable[[], Arguments]  # a parser of its own arguments
    run: Callable[[Line], int]  # does it, and returns the exit status
    passed_on: Sequence[tuple[str, str]] = ()  # what others read, as in ("--model CLASS", "a class"), for the help

    def help(self) -> str:
        """Text of ``zoo NAME --help``, made from its arguments."""
        parser = self.arguments()
        group = parser.add_argument_group("recipe and options of zoo fit") if self.passed_on else parser
        for told, text in self.passed_on:
            name, _, value = told.partition(" ")
            how: dict[str, Any] = {"metavar": value, "nargs": None if value else 0} if name.startswith("-") else {}
            group.add_argument(name, action=Action, help=text, **how)
        return parser.format_help().rstrip()


class Asked(NamedTuple):
    """Request to a command about a recipe."""

    files: list[str]  # the recipe's, or URLs
    options: list[str]  # of zoo fit
    own: dict[str, Any]  # values of the command's own arguments
    strict: bool  # see Line

    @classmethod
    def by(cls, line: Line, parser: Arguments, recipe_required: bool = True) -> "Asked":
        """Reads a line by the parser of a command.

        Raises:
            Mistake: For a recipe that is not there, a part of one that is no YAML, a wrong value, or an option that no
                class of the zoo has.
        """
        files = [recipes.find(name, urls=line.strict) for name in (*line.words, *line.configs)]
        own, options = parser.parse_known_args(line.options)
        recipes.check_parts(options)
        if recipe_required and not files:
            raise Mistake(f"{line.command} needs a recipe: zoo {line.command} RECIPE (zoo list)")
        options = names.understood(options, files, line.command)
        options = ["--help" if option == "--trainer.help" else option for option in options]
        return cls(files, options, vars(own), line.strict)

    def plan(self, *more: str) -> "Plan":
        """The recipe as ``zoo fit`` would run it, under more options. It may lack data."""
        with loading():
            from zoo.cli.plan import parse

        return parse("fit", self.files, [*self.options, *more], self.strict)

    def shared(self) -> list[str]:
        """Options for processes that are to do the same."""
        return [*self.options, *(["--strict-imports"] if self.strict else [])]


def with_images(line: Line, parser: Arguments, what: str) -> Namespace:
    """Reads a line of a command that takes no recipe, but a word and images behind it: its options and ``images``.

    Args:
        line: The line; ``line.words[0]`` is the word.
        parser: That of the command.
        what: Whose options they are, for a message.

    Raises:
        Mistake: For a wrong value, or an option that the command does not have.
    """
    parser.add_argument("images", nargs="*")
    behind = line.words[1:]
    own, unknown = parser.parse_known_args([*line.options, "--", *behind] if behind else line.options)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        name = unknown[0].partition("=")[0]
        hint = did_you_mean(name, known) or f": there are {', '.join(known)}"
        raise Mistake(f"unknown option {name} of {what}{hint}")
    return own


def check_images(images: Sequence[str]) -> None:
    """Raises Mistake for images or folders of them that are not there."""
    for image in images:
        if not Path(image).exists():
            raise Mistake(f"there is no image or folder {image}")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def seconds(text: str, zero: bool = False) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf or (number == 0 and not zero):
        raise ArgumentTypeError(f"{text!r} is no time: expected seconds, {'0 or more' if zero else 'more than 0'}")
    return number


def tolerance(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise ArgumentTypeError(f"{text!r} is no difference: expected a number of at least 0, such as 1e-5")
    return number


def percent(text: str) -> float:
    """5% or 0.05."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise ArgumentTypeError(f"{text!r} is no share: expected 5% or 0.05")
    return share
