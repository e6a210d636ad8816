"""Options of the zoo's own commands: a parser, and types of values, whose errors are a line."""

import math
from argparse import ArgumentParser, ArgumentTypeError
from typing import NoReturn

from zoo.cli.mistakes import Mistake


class Arguments(ArgumentParser):
    """An argument parser whose errors are a line."""

    def error(self, message: str) -> NoReturn:
        raise Mistake(message)


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


def percent(text: str) -> float:
    """5% or 0.05."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise ArgumentTypeError(f"{text!r} is no share: expected 5% or 0.05")
    return share
