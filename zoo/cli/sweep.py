"""Many runs of one recipe, each ``zoo fit`` in a process of its own; what is finished is kept when it is run again."""

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli.mistakes import MARK, Failure, Mistake

if TYPE_CHECKING:  # what is imported inside of functions would slow every command down
    import subprocess

_running: set["subprocess.Popen[bytes]"] = set()
_ended = threading.Event()
_starting = threading.RLock()  # a signal finds its own thread anywhere


def sweep(
    configs: Sequence[str],
    options: Sequence[str],
    runs: Mapping[str, Sequence[str]],
    out: Path,
    jobs: int = 1,
    needs: str | None = None,
) -> dict[str, dict[str, float]]:
    """Runs what is not finished yet, and returns the metrics of all.

    A run's directory is ``out/NAME``, whatever logger the recipe has, and what it printed ``out/NAME.log``. It is
    finished when ``out/NAME.json`` is there, which holds its metrics; one that was interrupted starts anew.

    Args:
        configs: The recipe's files.
        options: Options of ``zoo fit`` that all runs share.
        runs: By a name that makes a good directory, the options of each.
        out: Where everything goes. It keeps the recipe, so that an edit on the way changes nothing, and the shared
            options.
        jobs: How many runs at a time. Unless OMP_NUM_THREADS is set, they share the CPU's cores.
        needs: The metric that the runs are for, ``val/acc`` for example: the first one without it is a failure.

    Returns:
        By run, the metrics at its end, ``val/acc`` and so on, and ``seconds``, the process's wall time.

    Raises:
        Mistake: If a run fails, or if ``out`` holds runs of something else. Runs beside it are brought to their end.
    """
    from concurrent.futures import ThreadPoolExecutor, as_completed

    out.mkdir(parents=True, exist_ok=True)
    configs = _kept(configs, options, out)
    finished = {name: _read(out / f"{name}.json") for name in runs if (out / f"{name}.json").exists()}
    missing = [name for name in runs if name not in finished]
    print(f"{len(runs)} runs, {len(finished)} of them finished already", flush=True)
    width, start = max(map(len, runs), default=0), time.perf_counter()
    threads = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // jobs, 1))} if jobs > 1 else {}
    run = partial(run_apart, configs, out=out, needs=needs, env=threads | os.environ)
    with taking_runs_along(), ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run, [*options, *runs[name]], name): name for name in missing}
        try:
            for number, future in enumerate(as_completed(futures), 1):
                name = futures[future]
                metrics = finished[name] = future.result()
                found = {key: value for key, value in metrics.items() if key.endswith("/acc") or key == needs}
                shown = ", ".join(f"{key} {value:.4f}" for key, value in found.items())
                left = (time.perf_counter() - start) / number * (len(missing) - number) / 60
                count, seconds = f"{len(finished)} of {len(runs)}", f"{metrics['seconds']:.0f} s"
                print(f"{count}  {name:{width}}  {shown}  {seconds}, {left:.0f} min left", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {name: finished[name] for name in runs}


def sweep_seeds(
    configs: Sequence[str],
    options: Sequence[str],
    variants: Mapping[str, Sequence[str]],
    seeds: int,
    out: Path,
    jobs: int = 1,
    needs: str | None = None,
    data_seeds: Sequence[str] = ("seed",),
) -> dict[str, dict[str, list[float]]]:
    """:func:`sweep` over variants of a recipe and seeds from 0, the model's and the data's alike.

    Args:
        configs, options, out, jobs, needs: As of :func:`sweep`.
        variants: By a name that makes a good directory, the options of each.
        seeds: How many runs of each.
        data_seeds: The arguments of the data that are seeds.

    Returns:
        By variant and metric, one value for each seed. The run of a variant and a seed is called ``VARIANT_seedN``.
    """
    runs = {
        f"{name}_seed{seed}": [
            *(*variant, "--seed_everything", str(seed)),
            *(word for name in data_seeds for word in (f"--data.{name}", str(seed))),
        ]
        for name, variant in variants.items()
        for seed in range(seeds)
    }
    metrics = sweep(configs, options, runs, out, jobs, needs)
    return {
        name: {key: [metrics[f"{name}_seed{seed}"][key] for seed in range(seeds)] for key in metrics[f"{name}_seed0"]}
        for name in variants
    }


@contextmanager
def taking_runs_along() -> Iterator[None]:
    """Makes SIGTERM and Ctrl-C end the runs, too, and lets none begin after them.

    One that went on alone would write into the folder of its successor; and whoever waits for the runs at hand, as a
    pool does, would wait for those that follow in their turn as well.
    """

    def end(number: int, frame: Any) -> None:
        with _starting:
            _ended.set()
            for process in tuple(_running) if number == signal.SIGTERM else ():  # Ctrl-C reaches them by itself
                process.terminate()
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else a shell has put the process aside
        heard.append(signal.SIGINT)
    before = {number: signal.signal(number, end) for number in heard}
    try:
        yield
    finally:
        _ended.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def run_apart(
    configs: Sequence[str], options: Sequence[str], name: str, out: Path, needs: str | None, env: Mapping[str, str]
) -> dict[str, float]:
    """One run, from the start: a process, its log and its metrics."""
    shutil.rmtree(out / name, ignore_errors=True)
    command = [sys.executable, "-m", "zoo", "fit", *(arg for file in configs for arg in ("-c", file)), *options]
    command += [*logged_to(out, name), "--trainer.enable_progress_bar", "false"]
    log, start = out / f"{name}.log", time.perf_counter()
    if status := apart(command, log, env):
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1].removeprefix(MARK) if lines and status > 0 else f"exit status {status}"
        raise Failure(f"{name} failed: {last}; all that it said is in {log}")
    written = out / name / "metrics.json"
    metrics: dict[str, float] = _read(written) if written.exists() else {}
    if not metrics or needs not in (None, *metrics):
        known = f", only {', '.join(metrics)}" if metrics else ""
        raise Failure(f"{name} ended without {needs or 'metrics'}{known}; all that it said is in {log}")
    metrics["seconds"] = time.perf_counter() - start
    write_json(out / f"{name}.json", metrics)
    return metrics


def logged_to(folder: Path, name: str) -> list[str]:
    """Options of ``zoo fit`` for a run whose directory is ``folder/name``."""
    place = {"save_dir": folder, "name": "", "version": name, "default_hp_metric": "false"}
    return ["--trainer.logger=TensorBoardLogger", *(f"--trainer.logger.{key}={it}" for key, it in place.items())]


def apart(command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> int:
    """Runs a command to its end, and returns its status; what it prints goes to ``log``.

    Raises:
        Failure: If all runs have been ended: see :func:`taking_runs_along`.
    """
    import subprocess

    with log.open("w", encoding="utf-8") as file:
        with _starting:
            if _ended.is_set():
                raise Failure("ended before it began")
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env)
            _running.add(process)
        try:
            return process.wait()
        finally:
            _running.discard(process)


def _kept(configs: Sequence[str], options: Sequence[str], out: Path) -> list[str]:
    """Copies of the recipe's files, which all runs read, so that none of them is of another recipe.

    Raises:
        Mistake: If there are finished runs of another recipe, or under other options.
    """
    from hashlib import sha256

    texts = [Path(file).read_bytes() if Path(file).is_file() else file.encode() for file in configs]
    now = {"configs": [sha256(text).hexdigest() for text in texts], "options": list(options)}
    record = out / "sweep.json"
    before = _read(record) if record.exists() else None
    if before is None or not any(file != record for file in out.glob("*.json")):
        write_json(record, now)
    elif before != now:
        options_before = f"other options, {' '.join(before['options']) or 'none'}"
        what = options_before if before["configs"] == now["configs"] else "another recipe"
        raise Mistake(f"{out} holds runs of {what}: choose another --out, or remove it")
    kept = list(configs)
    for number, (file, text) in enumerate(zip(configs, texts, strict=True)):
        if Path(file).is_file():  # else it is a URL
            kept[number] = str(out / f"recipe{number}.yaml")
            if before != now:
                Path(kept[number]).write_bytes(text)
    return kept


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def write_json(path: Path, content: Any) -> None:
    """Writes a file that appears complete or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)
