"""The process of a cell: it reads what is asked, measures it, and writes what it found, also when that is a failure."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch
import yaml

from zoo._lightning import rank_zero_only
from zoo.callbacks.provenance import provenance
from zoo.cli import mistakes
from zoo.cli.benchmark import peers
from zoo.cli.benchmark.clock import Goal
from zoo.cli.benchmark.measure import measure
from zoo.cli.plan import Plan, parse
from zoo.cli.sweep import logged_to, write_json


class NoDeviceError(RuntimeError):
    """A cell asks for a device that is not here."""


def answer(asked: Path, found: Path, runs: Path, strict: bool) -> None:
    """Measures a cell and writes ``found``: status, message, and what was found.

    Args:
        asked: The JSON file with the cell.
        found: The JSON file to write.
        runs: A folder for what a run leaves behind.
        strict: See :func:`zoo.cli.plan.parse`.
    """
    setting = json.loads(asked.read_text(encoding="utf-8"))
    content: dict[str, Any]
    try:
        content = {"status": "ok", "message": ""} | _measured(setting, runs, strict)
    except Exception as error:
        cause = mistakes.root_cause(error)
        said = str(cause).split("\n")[0] or type(cause).__name__
        content = {"status": status_of(cause, said, setting["cell"]["peer"]), "message": said}
        if os.environ.get("ZOO_DEBUG") == "1":
            raise
    if getattr(rank_zero_only, "rank", 0) == 0:
        write_json(found, content)


def status_of(cause: BaseException, said: str, peer: str | None) -> str:
    """Status of a cell, in a word. A package that a peer needs may be missing; one that the zoo needs may not."""
    if isinstance(cause, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in said:  # the CPU's words
        return "out of memory"
    if isinstance(cause, NoDeviceError):
        return "no device"
    return "not installed" if isinstance(cause, ImportError) and peer is not None else "failed"


def _measured(setting: dict[str, Any], runs: Path, strict: bool) -> dict[str, Any]:
    options = [*setting["options"], *logged_to(runs, "run"), "--trainer.default_root_dir", str(runs)]
    plan = parse("fit", setting["configs"], options, strict)
    config = yaml.safe_load(plan.resolved())
    _check_devices(plan.config.trainer)
    substitute, differs = _peer(plan, setting)
    found = measure(plan, setting["cell"]["mode"], Goal(**setting["goal"]), substitute)
    made = provenance()
    return {
        "found": found,
        "differs": differs,
        "hardware": hardware(),
        "versions": made["versions"],
        "git": made["git"],
        "config": config,
    }


def _peer(plan: Plan, setting: dict[str, Any]) -> tuple[Any, str | None]:
    """Peer that is measured in the place of the recipe's model, or of its loader."""
    if setting["cell"]["peer"] is None:
        return None, None
    known = peers.peers_of(*plan.class_paths)
    peer = known[setting["cell"]["peer"]]
    if not peers.is_installed(peer):
        raise ImportError(f"{setting['cell']['peer']} needs {peer.needs}: pip install 'vision-zoo[peers]'")
    if setting["cell"]["mode"] == "data":
        return lambda data: peer.build(data), peer.differs
    like = plan.model("meta")
    network, loss = peer.build(like, setting["cell"]["axes"])
    return peers.Other(network, loss, like), peer.differs


def _check_devices(trainer: Any) -> None:
    """Refuses devices that are not here; Lightning says it in several lines, by an error that others raise too."""
    wanted, devices = trainer.accelerator, trainer.devices
    if wanted in ("gpu", "cuda") and not torch.cuda.is_available():
        raise NoDeviceError("there is no GPU that torch can use here: name --accelerator cpu")
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise NoDeviceError("there is no Apple GPU here: name --accelerator cpu")
    on_gpu = wanted in ("gpu", "cuda", "auto") and torch.cuda.is_available()
    if on_gpu and str(devices).isdecimal() and int(devices) > torch.cuda.device_count():
        raise NoDeviceError(f"{devices} GPUs are asked for, and here are {torch.cuda.device_count()}")


def hardware() -> dict[str, Any]:
    """Machine and versions that a figure was measured on, as plain data."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"cpu": f"{cores} cores of {_cpu_name()}", "threads": f"{torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        found["gpu"] = f"{count} x {torch.cuda.get_device_name()}"
        found["cuda"] = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        found["driver"] = _nvidia_smi("driver_version", "driver {}")
        fields = "clocks.sm,power.draw,clocks_throttle_reasons.active"
        found["clocks"] = _nvidia_smi(fields, "clock, power, throttling {}")
        found["fp32"] = f"float32 matmul {torch.get_float32_matmul_precision()}"
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "an unknown CPU"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "an unknown CPU"


def _nvidia_smi(fields: str, text: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return text.format(done.stdout.strip())
