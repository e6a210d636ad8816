"""What is said while torch is imported: at once, to a terminal alone, and gone when the run's own lines begin."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

import zoo
from zoo.cli.notice import LOADING

ROOT = Path(zoo.__file__).parents[1]

# Ends where torch would be imported, and says when that is.
PROGRAM = """
import sys, time

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(f"torch after {time.process_time()} s", file=sys.stderr, flush=True)
            raise SystemExit(0)

sys.meta_path.insert(0, Stop())
from zoo.cli import main
main(sys.argv[1:])
"""

COMMANDS = [
    ["fit", "-c", "vit/digits"],
    ["validate", "-c", "vit/digits"],
    ["test", "-c", "vit/digits"],
    ["predict", "-c", "vit/digits"],
    ["cost", "vit/digits"],
    ["benchmark", "vit/digits"],
    ["sweep", "vit/digits", "--over", "model.lr=1,2"],
    ["scaling-search", "efficientnet/digits_scaling"],
    ["scaling-compare", "efficientnet/digits_scaling"],
    ["compare-estimators", "gumbel_vae/digits"],
    ["dilation-study", "detection/shapes_one_level"],
    ["compare-losses", "vit/digits_rare_labels"],
    ["analyze-vit", "vit_tiny_patch16_224"],
]


def said(command: list[str], terminal: bool, **env: str) -> str:
    """What a command writes to stderr until it imports torch."""
    ours, theirs = pty.openpty() if terminal else os.pipe()
    run = [sys.executable, "-c", PROGRAM, *command]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "SLURM_PROCID")}
    environment |= {"PYTHONPATH": str(ROOT), **env}
    with subprocess.Popen(run, stderr=theirs, stdout=subprocess.PIPE, env=environment) as process:
        os.close(theirs)
        text = b""
        try:
            while some := os.read(ours, 4096):
                text += some
        except OSError:  # of a terminal that nobody holds any more
            pass
        assert process.stdout is not None
        assert process.stdout.read() == b""
    os.close(ours)
    assert process.returncode == 0, text
    return text.decode()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_terminal_hears_of_it_before_the_import_begins(command: list[str]) -> None:
    text = said(command, terminal=True)
    assert text.startswith(LOADING)
    moment = text.split("torch after ")[1].split(" s")[0]
    assert float(moment) < 0.6  # of this process alone: others may keep it waiting
    assert text.split("\n")[-1] == f"\r{' ' * len(LOADING)}\r"  # nothing is left of it


def test_nobody_else_hears_of_it() -> None:
    assert LOADING not in said(COMMANDS[0], terminal=False)
    assert LOADING not in said(COMMANDS[0], terminal=True, LOCAL_RANK="1")
    assert "loading" not in said(["fit", "-c", "vit/digits", "--lr", "1"], terminal=False)
