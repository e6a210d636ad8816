"""Forked programs are as those of subprocess, and do not know of each other."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import forked
import pytest

BOTH = pytest.mark.parametrize("run", [subprocess.run, forked.run], ids=["subprocess", "forked"])
PYTHON = [sys.executable, "-c"]


@BOTH
@pytest.mark.parametrize(
    ("source", "status", "told"),
    [
        ("pass", 0, ""),
        ("import sys; sys.exit()", 0, ""),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit(-1)", 255, ""),
        ("import sys; sys.exit('gone')", 1, "gone"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT, "KeyboardInterrupt"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import os; os._exit(7)", 7, ""),
    ],
)
def test_a_program_ends_as_it_would(run, source, status, told):
    done = run([*PYTHON, source], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, "")
    assert (done.stderr.splitlines() or [""])[-1] == told


@BOTH
def test_what_is_left_to_the_end_is_done(run):
    source = "import atexit, threading, time\natexit.register(print, 'exit')\nprint('program', end=' ')\n"
    source += "threading.Thread(target=lambda: (time.sleep(0.1), print('thread', end=' '))).start()"
    assert run([*PYTHON, source], capture_output=True, text=True).stdout == "program thread exit\n"


@BOTH
def test_folder_environment_arguments_and_input_are_those_given(run, tmp_path, monkeypatch):
    monkeypatch.setenv("GIVEN", "no")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "script.py").write_text("import sys; print(__name__, __file__, sys.argv, sys.path[0])")
    (tmp_path / "there" / "neighbour.py").write_text("NAME = __name__")
    environment = {**os.environ, "GIVEN": "yes", "PYTHONPATH": "there"}
    source = "import os, sys, neighbour; print(os.getcwd(), os.environ['GIVEN'], sys.argv, sys.stdin.read(), __name__)"
    done = run([*PYTHON, source, "-x", "é"], capture_output=True, text=True, env=environment, input="né")
    assert done.stdout == f"{tmp_path} yes ['-c', '-x', 'é'] né __main__\n", done.stderr
    done = run([sys.executable, "there/script.py", "1"], capture_output=True, text=True)
    there = tmp_path / "there"
    assert done.stdout == f"__main__ {there}/script.py ['there/script.py', '1'] {there}\n", done.stderr
    done = run([sys.executable, "-m", "neighbour"], capture_output=True, text=True, cwd=there)
    assert done.returncode == 0, done.stderr
    done = run([sys.executable, "-m", "neighbour"], capture_output=True, text=True)
    assert (done.returncode, "No module named" in done.stderr) == (1, True)


@BOTH
def test_a_program_starts_with_the_usual_signals_streams_and_descriptors(run):
    names = "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGPIPE", "SIGALRM"
    source = "import os, signal, sys, threading, multiprocessing as m\n"
    source += f"print([str(signal.getsignal(getattr(signal, n))) for n in {names}], signal.pthread_sigmask(0, []))\n"
    source += "print(sys.stdin.read() == '', len(os.listdir('/proc/self/fd')), len(os.listdir('/proc/self/task')))\n"
    source += "print(m.get_start_method(), m.parent_process(), threading.current_thread() is threading.main_thread())"
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    told = run([*PYTHON, source], **options).stdout.splitlines()
    usual = "<built-in function default_int_handler>", *["0"] * 5, "1", "0"
    assert told == [f"{list(usual)} set()", "True 4 1", "fork None True"]  # the folder that is listed is the fourth


def test_what_a_program_changes_the_next_does_not_see():
    change = "import torch, zoo, logging, random; zoo.changed = 1; torch.set_default_dtype(torch.float64)\n"
    change += "torch.manual_seed(3); logging.getLogger('lightning').setLevel(7); import this"
    look = "import sys, torch, zoo, logging; print(hasattr(zoo, 'changed'), torch.get_default_dtype(), 'this' in "
    look += "sys.modules, torch.initial_seed() == 3, logging.getLogger('lightning').level == 7)"
    assert forked.run([*PYTHON, change], capture_output=True).returncode == 0
    assert forked.run([*PYTHON, look], capture_output=True).stdout == "False torch.float32 False False False\n"
    draw = "import random, numpy; print(random.random(), numpy.random.rand())"
    first, second = (forked.run([*PYTHON, draw], capture_output=True).stdout.split() for _ in range(2))
    assert not set(first) & set(second)


def test_torch_is_there_and_trains_and_forks_workers():
    source = "import sys, time; print('torch' in sys.modules, 'lightning.pytorch' in sys.modules)\n"
    source += "import torch; x = torch.ones(2, requires_grad=True); x.sum().backward(); print(x.grad.tolist())\n"
    source += "print(len(list(torch.utils.data.DataLoader(range(4), num_workers=2))), torch.get_num_threads())"
    done = forked.run([*PYTHON, source], capture_output=True)
    assert done.stdout.splitlines() == ["True True", "[1.0, 1.0]", "4 1"], done.stderr


def test_a_running_program_is_asked_told_and_ended(tmp_path):
    source = "import time; print('ready', flush=True); time.sleep(600)"
    with forked.Popen([*PYTHON, source], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout.readline() == "ready\n"
        assert os.getsid(process.pid) == process.pid
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        with forked.Popen([*PYTHON, "pass"]) as other:  # ends before it
            assert other.wait() == 0
        process.terminate()
    assert process.returncode == process.poll() == -signal.SIGTERM
    process.kill()  # nobody is there
    waits = iter((1, 4, 16, 64))  # until it has come that far, on a busy machine
    while not Path("pid").exists():
        with pytest.raises(subprocess.TimeoutExpired):
            forked.run(
                [*PYTHON, f"import os, time; print(os.getpid(), file=open('pid', 'w')); {source}"], timeout=next(waits)
            )
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("pid").read_text()), 0)
    with pytest.raises(subprocess.CalledProcessError):
        forked.run([*PYTHON, "import sys; sys.exit(1)"], check=True)
    with pytest.raises(ValueError, match="only programs of .*python.* are forked, not ls"):
        forked.run(["ls"])


def test_a_terminal_controls_its_program():
    outer, inner = os.openpty()
    source = "import os, sys, time; print(os.isatty(0), os.tcgetpgrp(0) == os.getpid())\ntime.sleep(600)"
    process = forked.Popen([*PYTHON, source], stdin=inner, stdout=inner, stderr=inner, terminal=True)
    os.close(inner)
    told = b""
    while not told.endswith(b"\n"):
        told += os.read(outer, 100)
    assert told == b"True True\r\n"
    os.write(outer, b"\x03")
    assert process.wait() == -signal.SIGINT
    os.close(outer)


def test_several_run_at_a_time():
    """Each waits for all of them."""
    source = "import os, sys, time; open(sys.argv[1], 'w').close()\n"
    source += "while not {'0', '1', '2', '3'} <= set(os.listdir()): time.sleep(0.01)"
    statuses = []

    def one(number: int) -> None:
        statuses.append(forked.run([*PYTHON, source, str(number)], timeout=100).returncode)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [0, 0, 0, 0]


def test_what_a_program_starts_is_forked_in_its_session_and_outlives_it():
    """As with Lightning's launcher: ranks share a session, hear its signals, and may end after the first."""
    source = "import os, signal, subprocess, sys, time; print(os.getsid(0), 'torch' in sys.modules, flush=True)\n"
    source += "if len(sys.argv) < 2: child = subprocess.Popen([sys.executable, '-c', PROGRAM, 'child'])\n"
    source += "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(3))\n"
    source += "try: open(f'ready{len(sys.argv)}', 'w').close(); time.sleep(600)\n"
    source += "finally: len(sys.argv) < 2 or (time.sleep(0.5), print('late', flush=True))"
    program = f"PROGRAM = {source!r}\nexec(PROGRAM)"
    options = {"start_new_session": True, "launches": True, "stdout": subprocess.PIPE}
    process = forked.Popen([*PYTHON, program], **options)
    while not (Path("ready1").exists() and Path("ready2").exists()):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGUSR1)
    assert process.wait() == 3
    session = f"{process.pid} True\n"
    assert process.stdout.read() == f"{session}{session}late\n"  # until all have ended
    process.stdout.close()
    look = "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import sys; sys.exit(5)'])\n"
    look += "print(child.wait(), subprocess.run(['echo', 'real'], capture_output=True).stdout)"
    assert forked.run([*PYTHON, look], capture_output=True, launches=True).stdout == "5 b'real\\n'\n"


def test_what_a_program_starts_is_its_child_by_torchrun_too():
    look = "import os, sys; print(os.getppid(), 'torch' in sys.modules, sys.stdout.write_through, sys.argv, flush=True)"
    source = f"LOOK = {look + '; os.kill(os.getpid(), 9)'!r}\n"
    source += "import os, subprocess, sys, torch.distributed.elastic.multiprocessing.subprocess_handler as torchruns\n"
    source += "print(os.getpid(), flush=True)\n"
    source += "print(subprocess.Popen([sys.executable, '-c', LOOK], stdout=None).wait(), flush=True)\n"
    source += "started = torchruns.SubprocessHandler(sys.executable, ('-u', '-c', LOOK), {}, None, None, 0, None)\n"
    source += "print(started.proc.wait())"
    done = forked.run([*PYTHON, source], capture_output=True, launches=True)
    pid, *told = done.stdout.splitlines()
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    assert told == [f"{pid} True {unbuffered} ['-c']", "-9", f"{pid} True True ['-c']", "-9"], done.stderr
