"""`python train_hf.py` in a real process, without the seconds that every fresh process needs to import torch.

Python's fork server imports the command once. Every run is a fork of it that executes train_hf.py from its first line
as `__main__`, with its own flags, folder, output and exit code. A fault makes the run kill or signal itself at a
chosen function call.

As a script (`accelerate launch tests/real_command.py FAULT FLAGS...`), it is the command with a fault given as JSON.
"""

import functools
import importlib
import json
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parents[1]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train_hf"])


class Run:
    """
    A started command.

    Args:
        flags: the command's.
        cwd: the folder it runs in.
        env: environment variables on top of the test's.
        fault (`dict`, *optional*): arguments of [`arm`].
        memory (`int`, *optional*): bytes of address space that it may use, on top of those it starts with.
        patch (`Callable`, *optional*): called first in the new process.
    """

    def __init__(
        self,
        *flags,
        cwd: os.PathLike = REPOSITORY,
        env: dict | None = None,
        fault: dict | None = None,
        memory: int | None = None,
        patch: Callable[[], None] | None = None,
    ):
        self.flags = [str(flag) for flag in flags]
        self._output = tempfile.TemporaryDirectory()
        own = {"flags": self.flags, "cwd": str(cwd), "env": env or {}, "output": self._output.name}
        target = functools.partial(_become_command, **own, fault=fault, memory=memory, patch=patch)
        self._process = FORKS.Process(target=target)
        self._process.start()
        self.pid = self._process.pid

    def kill(self) -> bool:
        """Kills all of its processes with SIGKILL; `False` if it has already ended."""
        if self._process.exitcode is not None:
            return False
        self.signal_group(signal.SIGKILL)
        self._process.join()
        return self._process.exitcode == -signal.SIGKILL

    def signal_group(self, signum: int) -> None:
        os.killpg(self.pid, signum)

    def wait_until_stopped(self) -> None:
        """Waits until it has stopped itself with SIGSTOP."""
        while self._process.exitcode is None and "State:\tT" not in Path(f"/proc/{self.pid}/status").read_text():
            time.sleep(0.05)

    def wait(self, seconds: float = 180) -> subprocess.CompletedProcess:
        """Its exit code (negative for a signal) and its output; if it hangs, it is killed."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self.signal_group(signal.SIGKILL)
            self._process.join()
        return subprocess.CompletedProcess(
            ["train_hf.py", *self.flags], self._process.exitcode, self.said("stdout"), self.said("stderr")
        )

    def said(self, stream: str = "stdout") -> str:
        """What it has written so far."""
        file = Path(self._output.name, stream)
        return file.read_text() if file.exists() else ""


def run(*flags, **options) -> subprocess.CompletedProcess:
    return Run(*flags, **options).wait()


def start_together(processes: int, *flags, env: dict | None = None, **options) -> list[Run]:
    """The command, in several processes that find each other."""
    return [Run(*flags, env=(env or {}) | of_rank, **options) for of_rank in environments(processes)]


def environments(processes: int) -> list[dict[str, str]]:
    """By rank, the variables that let a launcher's processes find each other; none for a single process."""
    if processes == 1:
        return [{}]
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def arm(function: str, call: int = 1, moment: str = "before", signum: int = signal.SIGKILL, rank: int = 0) -> None:
    """
    Makes this process signal itself when it calls a function.

    Args:
        function (`str`): its dotted name, where it is looked up.
        call (`int`): at which call, counted from 1.
        moment (`str`): `before` or `after` the call; `half`: after it, with the file that it wrote cut in half, as if
            the signal had arrived during writing; `failing`: no signal, the call raises an error that gives the time.
        rank (`int`): the rank of the process to signal.
    """
    if int(os.environ.get("RANK", 0)) != rank:
        return
    *path, name = function.split(".")
    for length in range(len(path), 0, -1):
        try:
            owner = importlib.import_module(".".join(path[:length]))
            break
        except ModuleNotFoundError:
            continue
    for attribute in path[length:]:
        owner = getattr(owner, attribute)
    original = getattr(owner, name)
    calls = 0

    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls != call:
            return original(*args, **kwargs)
        if moment == "failing":
            raise RuntimeError(f"a fault of the test at {time.time()}")
        if moment == "before":
            os.kill(os.getpid(), signum)
            return original(*args, **kwargs)
        result = original(*args, **kwargs)
        if moment == "half":
            file = next(Path(arg) for arg in args if isinstance(arg, (str, Path)))
            os.truncate(file, file.stat().st_size // 2)
        os.kill(os.getpid(), signum)
        return result

    setattr(owner, name, wrapper)


def _become_command(
    flags: list[str],
    cwd: str,
    env: dict[str, str],
    output: str,
    fault: dict | None,
    memory: int | None,
    patch: Callable[[], None] | None,
) -> None:
    os.setpgid(0, 0)  # its own process group, with the loader's workers
    for target, name, mode in ((0, os.devnull, "r"), (1, f"{output}/stdout", "w"), (2, f"{output}/stderr", "w")):
        with open(name, mode) as file:
            os.dup2(file.fileno(), target)
    multiprocessing.set_start_method(None, force=True)  # as in a new process; a fork server's starts its own servers
    os.environ.update(env)
    os.chdir(cwd)
    if memory is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if patch is not None:
        patch()
    if fault is not None:
        arm(**fault)
    code = run_command(flags)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # an orderly exit would copy the forked interpreter's memory, which takes seconds


def run_command(flags: list[str]) -> int:
    """Runs the file as the interpreter would, and returns the exit code."""
    sys.argv = [str(REPOSITORY / "train_hf.py"), *flags]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ending:
        return ending.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)
    arm(**json.loads(sys.argv[1]))
    sys.exit(run_command(sys.argv[2:]))
