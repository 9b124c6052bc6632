"""SIGTERM and Ctrl-C: a run that is told to stop ends in a place from where it can go on."""

import os
import signal
import threading
import time


SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Long enough for the loader's workers to serve the step that is being finished.
WORKER_GRACE_SECONDS = 60


class Interrupted(BaseException):
    """A signal has ended the run. Like `KeyboardInterrupt` it is no error, so `except Exception` lets it pass."""


def name_of(signum: int) -> str:
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name


def interrupt_on_signals() -> None:
    """From here on SIGTERM and Ctrl-C raise [`Interrupted`] in this process, and end its children as ever."""
    process = os.getpid()

    def handle(signum, frame):
        if os.getpid() != process:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        raise Interrupted(f"stopped by {name_of(signum)}.")

    for signum in SIGNALS:
        signal.signal(signum, handle)


class StopRequest:
    """
    Inside this context the first SIGTERM or Ctrl-C is noted in `signum`, for the training loop to stop where it can; a
    second Ctrl-C raises [`Interrupted`] at once.

    Outside the main thread, where Python takes no signal handlers, it does nothing.
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
            signal.signal(signum, handler or signal.SIG_DFL)  # None: it was not set from Python

    def _handle(self, signum: int, frame) -> None:
        if os.getpid() != self._process:
            # A worker of the loader, in a process group that was signalled as a whole.
            signal.alarm(WORKER_GRACE_SECONDS)
            return
        if self.signum:
            # Launchers pass on what the terminal or the scheduler has already sent to all processes.
            if signum == signal.SIGINT and time.monotonic() - self._received_at > 1:
                raise Interrupted("stopped at once by a second Ctrl-C.")
            return
        self.signum, self._received_at = signum, time.monotonic()
        if self.announce:
            # Not print: the signal may have come in the middle of one.
            os.write(2, f"\n{name_of(signum)}: finishing the step, then writing a checkpoint.\n".encode())
