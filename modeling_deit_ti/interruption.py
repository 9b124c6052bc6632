"""SIGTERM and Ctrl-C: a run that is told to stop does so where it can be resumed."""

import os
import signal
import threading
import time
from collections.abc import Callable


SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """A signal has ended the run. Like `KeyboardInterrupt`, it is not caught by `except Exception`."""


def name_of(signum: int) -> str:
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name


def interrupt_on_signals() -> None:
    """Makes SIGTERM and Ctrl-C raise [`Interrupted`] in this process; its child processes end as usual."""
    process = os.getpid()

    def handle(signum, frame):
        if os.getpid() != process:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        raise Interrupted(f"stopped by {name_of(signum)}.")

    for signum in SIGNALS:
        signal.signal(signum, handle)


def ignore_signals(worker: int, then: Callable[[int], None] | None = None) -> None:
    """
    A loader's `worker_init_fn`: launchers, terminals and schedulers signal the whole process group, but the workers
    have to serve the step that is being finished. They end when the loader does, or its process.
    """
    for signum in SIGNALS:  # torch has just given SIGTERM a handler of its own, which ends the worker
        signal.signal(signum, signal.SIG_IGN)
    if then is not None:
        then(worker)


class StopRequest:
    """
    A context manager that records the first SIGTERM or Ctrl-C in `signum`, so that the training loop can stop after
    its step. A second Ctrl-C raises [`Interrupted`] at once.

    Does nothing outside the main thread, where Python does not allow signal handlers.

    Args:
        announce (`bool`): whether to print that the signal was received.
    """

    def __init__(self, announce: bool):
        self.announce = announce
        self.signum = 0
        self._received_at = 0.0
        self._process = os.getpid()
        self._previous = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {signum: signal.signal(signum, self._handle) for signum in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler or signal.SIG_DFL)  # None: not set from Python

    def _handle(self, signum: int, frame) -> None:
        if os.getpid() != self._process:  # a worker of the data loader that has not come to `ignore_signals` yet
            return
        if self.signum:
            # Within a second, it is the same signal: launchers repeat what the terminal or scheduler sent to all.
            if signum == signal.SIGINT and time.monotonic() - self._received_at > 1:
                raise Interrupted("stopped at once by a second Ctrl-C.")
            return
        self.signum, self._received_at = signum, time.monotonic()
        if self.announce:
            # Not print: the signal may have interrupted one.
            os.write(2, f"\n{name_of(signum)}: finishing the step, then writing a checkpoint.\n".encode())
