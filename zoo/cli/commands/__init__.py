"""The commands, a file each: name, summary, arguments, and what it does, inside of which alone torch is imported."""

from zoo.cli.arguments import Command
from zoo.cli.commands import benchmark, cost, export, listing, predict, sweep, techniques, train

COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        *(train.COMMAND_OF | {"predict": predict.COMMAND}).values(),
        *benchmark.COMMANDS,
        cost.COMMAND,
        export.COMMAND,
        sweep.command_of(sweep.SWEEP),
        *techniques.of_techniques(),
        listing.COMMAND,
    )
}
