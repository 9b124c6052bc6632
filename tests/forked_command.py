"""`train_hf.py` in a real process of its own, without the seconds that every fresh process needs to import torch.

Run as a program, this file is a server: it imports all that the command needs, then forks a child for each line of
json on its standard input. The child runs train_hf.py as `python train_hf.py` does. `ForkedCommand` is the client.
"""

import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parents[1]
# A run that hangs is killed, and its exit code is then not one that a test expects.
SECONDS = 120


class ForkedCommand:
    """Starts the server, and calls it. `close` ends it."""

    def __init__(self):
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
        )

    def __call__(self, *flags: str, cwd: os.PathLike, env: dict | None = None) -> subprocess.CompletedProcess:
        """`python train_hf.py FLAGS` in that folder, and with these variables on top of the test's."""
        with tempfile.TemporaryDirectory() as folder:
            job = {"flags": flags, "cwd": str(cwd), "env": env or {}, "folder": folder}
            self.server.stdin.write(json.dumps(job) + "\n")
            self.server.stdin.flush()
            code = int(self.server.stdout.readline())
            stdout, stderr = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(["train_hf.py", *flags], code, stdout, stderr)

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()


def serve() -> None:
    """One job after the other; returns in the child of each, which is to become the command."""
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            become_command(**job)
            return
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(code, flush=True)
    os._exit(0)  # the server itself is no run of the command


def become_command(flags: list[str], cwd: str, env: dict[str, str], folder: str) -> None:
    signal.alarm(SECONDS)
    for target, name, mode in ((0, os.devnull, "r"), (1, f"{folder}/stdout", "w"), (2, f"{folder}/stderr", "w")):
        with open(name, mode) as file:
            os.dup2(file.fileno(), target)
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = [str(REPOSITORY / "train_hf.py"), *flags]


def run_command() -> int:
    """Runs the file as the interpreter does, to the exit code."""
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ending:
        if ending.code is None or isinstance(ending.code, int):
            return ending.code or 0
        print(ending.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)
    import train_hf  # noqa: F401  (with all that it imports; the child's run of the file is then short)

    gc.freeze()  # else each child copies the memory of all these objects to look at them
    serve()
    code = run_command()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a fork that takes the interpreter down in order copies it, in seconds
