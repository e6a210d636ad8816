"""Commands of techniques: the studies and inspections that they declare."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import zoo
from zoo.cli.arguments import Command
from zoo.cli.commands import inspection, sweep
from zoo.common.inspection import Inspection
from zoo.common.study import Study


def of_techniques() -> list[Command]:
    """The commands in techniques' files ``commands.py``, which are read by themselves: their packages import torch."""
    found: list[Study | Inspection] = []
    for technique in dict.fromkeys(zoo._EXPORTS.values()):
        file = Path(zoo.__file__).parent / technique / "commands.py"
        spec = spec_from_file_location(f"zoo.{technique}.commands", file) if file.is_file() else None
        if spec is not None and spec.loader is not None:
            module = module_from_spec(spec)
            spec.loader.exec_module(module)
            found += module.COMMANDS
    return [inspection.command_of(each) if isinstance(each, Inspection) else sweep.command_of(each) for each in found]
