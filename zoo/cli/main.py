"""The command line, ``zoo COMMAND``: it finds the command and says what went wrong; all else is the commands'.

    zoo fit vit/digits --model.lr 3e-4

``arguments.py`` reads the line, ``commands/`` has a file a command, ``recipes.py`` knows the recipes. ``parser.py`` and
``plan.py`` read a configuration, ``run.py`` runs it, ``imports.py`` says what it may name, ``mistakes.py`` words what
went wrong. With ``ZOO_DEBUG=1`` every error shows its traceback.
"""

import io
import locale
import os
import select
import signal
import sys
from contextlib import suppress

import zoo
from zoo.cli import arguments, mistakes, names
from zoo.cli.commands import COMMANDS
from zoo.cli.mistakes import Mistake, did_you_mean

EXAMPLES = """\
  zoo fit vit/digits
  zoo test vit/digits --ckpt_path FILE
  zoo predict vit/digits --ckpt_path FILE --data.predict_root FOLDER

zoo COMMAND --help names the options, zoo --version the version."""


def main(args: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 2 for a mistake, 1 for a failure on the way.

    If nobody reads what it prints any more, as behind ``| head -1``, it is silent, and the status is that of a program
    that SIGPIPE has ended, 141.

    Args:
        args: The arguments behind ``zoo``. None: those of the process.
    """
    _use_utf8()
    try:
        return _answered(list(sys.argv[1:] if args is None else args))
    except BrokenPipeError:
        unread = [stream for stream in (1, 2) if _is_unread(stream)]
        if not unread:  # it is not about what was printed
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in unread:
            os.dup2(nowhere, stream)  # Python writes there what it has left when it ends
        os.close(nowhere)
        return 128 + signal.SIGPIPE


def _answered(args: list[str]) -> int:
    try:
        with mistakes.worded(Mistake):
            status = _dispatch(args)
    except SystemExit as end:  # of argparse after a help, whose printing it lets fail
        sys.stdout.flush()
        if _is_unread(1):
            raise BrokenPipeError from end
        raise
    except Mistake as mistake:
        if os.environ.get("ZOO_DEBUG") == "1":
            raise
        print(f"{mistakes.MARK}{mistake}", file=sys.stderr)
        return mistake.status
    sys.stdout.flush()
    return status


def _is_unread(stream: int) -> bool:
    watched = select.poll()
    watched.register(stream, select.POLLOUT)
    return any(event & select.POLLERR for _, event in watched.poll(0))


def _dispatch(args: list[str]) -> int:
    line = arguments.read(args)
    line = line._replace(command=names.command(line.command))
    if line.command == "--version":
        print(f"zoo {zoo.__version__}")
        return 0
    if line.command in ("", "--help", "-h"):
        print(_usage())
        return 0
    if line.words and f"{line.command} {line.words[0]}" in COMMANDS:
        line = line._replace(command=f"{line.command} {line.words[0]}", words=line.words[1:])
    if line.command not in COMMANDS:
        hint = did_you_mean(line.command, COMMANDS) or f"; expected {', '.join(COMMANDS)}"
        raise Mistake(f"unknown command {line.command!r}{hint}")
    command = COMMANDS[line.command]
    if "--help" in line.options or "-h" in line.options:
        print(command.help())
        return 0
    return command.run(line)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {command.name:{width}}  {command.summary}" for command in COMMANDS.values()]
    return "\n".join(["usage: zoo COMMAND [RECIPE ...] [--option VALUE ...]", "", *lines, "", EXAMPLES])


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


if __name__ == "__main__":
    sys.exit(main())
