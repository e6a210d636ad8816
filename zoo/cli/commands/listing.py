"""``zoo list``."""

from functools import partial

from zoo.cli import recipes
from zoo.cli.arguments import Arguments, Command, Line


def _run(line: Line) -> int:
    print(recipes.overview())
    return 0


_arguments = partial(Arguments, "list", "", "Prints the modules, the data and the recipes that there are, a line each.")
COMMAND = Command("list", "modules, data and recipes", _arguments, _run)
