"""The command line, ``zoo COMMAND``. Everything here serves it; nothing of the zoo imports it."""

from zoo.cli.main import main

__all__ = ["main"]
