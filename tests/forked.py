"""Python programs as processes of their own, without the seconds that torch and Lightning take to import.

``run`` and ``Popen`` take the commands that those of subprocess take: ``[sys.executable, "-m", "zoo", ...]``, ``"-c"``
and a source, or a script. A server that has imported what programs import and has made one parser, which reads sources
and docstrings once for all, but has done nothing else, forks a process for each; there the program runs as the
interpreter's own, with its folder, environment, streams, signals and status.

Whatever is about the start of an interpreter needs subprocess: what is imported when, and variables that are read then.
"""

import atexit
import ctypes
import fcntl
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, CalledProcessError, CompletedProcess, TimeoutExpired
from types import ModuleType, TracebackType
from typing import IO, Any

import numpy

PRELOADED = (
    *("torchvision", "timm", "sklearn.datasets", "sklearn.neighbors", "sklearn.svm", "tensorboard.summary", "fsspec"),
    *("lightning.pytorch.cli", "torch.utils.tensorboard", "torchmetrics.classification", "rich.progress"),
    *("attrs", "rich.emoji", "PIL.BmpImagePlugin", "PIL.GifImagePlugin", "PIL.JpegImagePlugin"),
)
"""Besides all modules of ours."""


class Popen:
    """A program that runs, with the part of subprocess.Popen's interface that tests use.

    Args:
        command: The interpreter and what it is to run.
        cwd, env, start_new_session: As for subprocess.
        stdin, stdout, stderr: A file or a descriptor, PIPE for stdout; by default those of the tests.
        terminal: Make stdin the terminal that controls the program, which gets a session of its own.
        launches: Fork the Python programs that this one starts as well, within its session.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: str | os.PathLike[str] | None = None,
        env: dict[str, str] | None = None,
        stdin: Any = 0,
        stdout: Any = 1,
        stderr: Any = 2,
        start_new_session: bool = False,
        terminal: bool = False,
        launches: bool = False,
        text: bool = True,
    ) -> None:
        if command[0] != sys.executable:
            raise ValueError(f"only programs of {sys.executable} are forked, not {command[0]}")
        self.args, self.returncode = command, None
        self.stdout: IO[Any] | None = None
        mine = []  # descriptors that are the server's from now on
        if stdin == DEVNULL:
            mine.append(stdin := os.open(os.devnull, os.O_RDONLY))
        if stdout == PIPE:
            reader, stdout = os.pipe()
            mine.append(stdout)
            self.stdout = os.fdopen(reader, "r" if text else "rb")
        if stderr == STDOUT:
            stderr = stdout
        self._status, told = os.pipe()
        request = {"command": command[1:], "cwd": os.fspath(cwd or os.getcwd()), "env": dict(env or os.environ)}
        request |= {"session": start_new_session or terminal, "terminal": terminal, "launches": launches}
        with tempfile.TemporaryFile("w+") as file:
            json.dump(request, file)
            file.flush()
            streams = [stream if isinstance(stream, int) else stream.fileno() for stream in (stdin, stdout, stderr)]
            with _one_at_a_time:
                socket.send_fds(_server(), [b"."], [file.fileno(), told, *streams])
            for descriptor in (*mine, told):
                os.close(descriptor)
            self.pid = int(self._hear())

    def _hear(self) -> str:
        line = b""
        while not line.endswith(b"\n"):
            part = os.read(self._status, 1)
            if not part:
                raise ChildProcessError("the server of forked programs has ended")
            line += part
        return line.decode()

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise TimeoutExpired(self.args, timeout or 0)
            status = int(self._hear())
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) if _adopts else status
            os.close(self._status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> "Popen":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.stdout:
            self.stdout.close()
        self.wait()


def run(
    command: Sequence[str],
    *,
    capture_output: bool = False,
    text: bool = True,
    input: str | None = None,
    timeout: float | None = None,
    check: bool = False,
    **options: Any,
) -> CompletedProcess[Any]:
    """A program that has ended, as of subprocess.run; its output went through files, so that none fills up."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as given:
        if capture_output:
            options |= {"stdout": out, "stderr": err}
        if input is not None:
            given.write(input.encode())
            given.seek(0)
            options["stdin"] = given
        process = Popen(command, **options)
        try:
            status = process.wait(timeout)
        except BaseException:
            process.kill()
            process.wait()
            raise
        texts: list[Any] = [None, None]
        if capture_output:
            for index, file in enumerate((out, err)):
                file.seek(0)
                texts[index] = file.read().decode() if text else file.read()
    if check and status:
        raise CalledProcessError(status, command, *texts)
    return CompletedProcess(command, status, *texts)


class Starting(subprocess.Popen):  # type: ignore[type-arg]
    """To stand in the place of subprocess.Popen: it forks the programs that it can."""

    def __new__(cls, command: Any = None, *more: Any, args: Any = None, **options: Any) -> Any:
        command = command or args
        ours = isinstance(command, list | tuple) and command[0] == sys.executable and not more
        known = options.keys() <= {"cwd", "env", "stdin", "stdout", "stderr", "start_new_session"}
        if ours and known and (command[1] in ("-m", "-c", "-u") or not command[1].startswith("-")):
            return Popen(command, **{name: value for name, value in options.items() if value is not None})
        return super().__new__(cls)


def _server() -> socket.socket:
    """The connection to this process's server, which is started when the first asks for it."""
    global _connection
    if _connection is None:
        _connection, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno())]
            streams = {"stdin": DEVNULL, "stdout": DEVNULL}
            _start(command, pass_fds=[theirs.fileno()], cwd="/", start_new_session=True, **streams)
        atexit.register(_connection.shutdown, socket.SHUT_RDWR)
    return _connection


_connection: socket.socket | None = None
_adopts = False  # whether what this process's server forks becomes this process's child
_start = subprocess.Popen  # before a test puts ours in its place
_one_at_a_time = threading.Lock()


# What follows runs in the server.

PR_SET_CHILD_SUBREAPER = 36
HEARD = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def _serve(connection: socket.socket, launches: bool = False) -> tuple[str, list[str]]:
    """Forks a process for each request; returns in each of them, with what is to run and its arguments.

    Args:
        connection: With those who ask.
        launches: For a program that launches others: they outlive the connection, and are children of that program,
            which waits for their status, rather than of the server. Else they end with the connection.
    """
    running: dict[int, tuple[int, int]] = {}  # by the descriptor of its end: the number, and where to tell it
    asked = [connection]
    while asked or running:
        for ready in select.select([*asked, *running], [], [])[0]:
            if ready is not connection:
                pid, told = running.pop(ready)
                _tell(told, 0 if launches else os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                os.close(told)
                os.close(ready)
                continue
            message, received, _, _ = socket.recv_fds(connection, 1, 5)
            if not message:  # they have ended
                asked.clear()
                for pid, _ in () if launches else running.values():
                    os.kill(pid, signal.SIGKILL)
                continue
            request, told, *streams = received
            pid = _fork_orphan() if launches else os.fork()
            if pid == 0:
                connection.close()
                for descriptor, (_, other) in running.items():
                    os.close(descriptor)
                    os.close(other)
                os.close(told)
                return _become(request, streams)
            for descriptor in (request, *streams):
                os.close(descriptor)
            running[os.pidfd_open(pid)] = (pid, told)
            _tell(told, pid)
    os._exit(0)


def _fork_orphan() -> int:
    """Forks a process whose parent has ended, so that it becomes the child of the program that adopts orphans."""
    reader, writer = os.pipe()
    middle = os.fork()
    if middle == 0:
        middle = os.getpid()
        pid = os.fork()
        if pid:
            os.write(writer, f"{pid}".encode())
            os._exit(0)
        os.close(reader)
        os.close(writer)
        while os.getppid() == middle:
            time.sleep(0.001)
        return 0
    os.waitpid(middle, 0)
    os.close(writer)
    with os.fdopen(reader) as file:
        return int(file.read())


def _tell(to: int, number: int) -> None:
    with suppress(BrokenPipeError):  # nobody waits for it any more
        os.write(to, f"{number}\n".encode())


def _become(request: int, streams: list[int]) -> tuple[str, list[str]]:
    """Makes this process the one that was asked for, as if it had just been started."""
    with os.fdopen(request) as file:
        file.seek(0)
        asked = json.load(file)
    if asked["session"]:
        os.setsid()
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
    for descriptor in streams:
        os.close(descriptor)
    if asked["terminal"]:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
    if asked["launches"]:
        global _connection, _adopts
        _connection, theirs = socket.socketpair()
        if os.fork() == 0:
            _connection.close()
            for number in (*HEARD, signal.SIGINT):  # what is for the program's group
                signal.signal(number, signal.SIG_IGN)
            return _serve(theirs, launches=True)
        theirs.close()
        _adopts = ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1) == 0
        if not _adopts:
            raise ChildProcessError("a program that launches others has to be able to adopt them")
        for name in ("subprocess", "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"):
            importlib.import_module(name).Popen = Starting  # type: ignore[attr-defined]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in HEARD:
        signal.signal(number, signal.SIG_DFL)
    numpy.random.seed()
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    installed = [path for path in sys.path[1:] if path not in paths]
    given = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = ["", *given, *installed]
    what, *arguments = asked["command"]
    if what == "-u":  # torchrun's
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
        what, *arguments = arguments
    return what, arguments


def _run(what: str, arguments: list[str]) -> None:
    """Runs a program as the interpreter does that is given its command."""
    if what == "-m":
        sys.path[0] = os.getcwd()
        sys.argv[:] = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        return
    sys.modules["__main__"] = main = ModuleType("__main__")
    if what == "-c":
        source, name, sys.argv[:] = arguments[0], "<string>", ["-c", *arguments[1:]]
    else:
        main.__file__ = name = os.path.abspath(what)
        source, sys.argv[:], sys.path[0] = Path(what).read_text("utf-8"), [what, *arguments], os.path.dirname(name)
    exec(compile(source, name, "exec"), main.__dict__)


def _end(what: str, arguments: list[str]) -> None:
    """Runs a program and ends with its status, as the interpreter does, but leaves its memory to the system.

    To take thousands of shared modules apart is most of what a short program would do.
    """
    status, interrupted = 0, False
    try:
        _run(what, arguments)
    except SystemExit as end:
        if isinstance(end.code, int):
            status = end.code & 0xFF
        elif end.code is not None:
            print(end.code, file=sys.stderr)
            status = 1
    except BaseException as error:
        status, interrupted = 1, isinstance(error, KeyboardInterrupt)
        sys.excepthook(type(error), error, error.__traceback__)
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
        atexit._run_exitfuncs()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        if interrupted:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(status)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()  # what is imported stays
    for name in PRELOADED:
        importlib.import_module(name)
    for package in map(importlib.import_module, ("zoo", "datamodules")):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    importlib.import_module("zoo.cli.parser").create("fit", data_required=True)
    for finalizer in weakref.finalize._registry:  # type: ignore[attr-defined]
        finalizer.atexit = False  # to undo what torch's import registers is what a short program would spend most on
    gc.freeze()  # else each process would copy what it only looks at
    gc.enable()
    _end(*_serve(socket.socket(fileno=int(sys.argv[1]))))
