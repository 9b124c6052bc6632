"""Reports a user's mistake, or a disk that cannot be written to, in one line and without a traceback."""

import contextlib
import errno
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging


# How a run ended, for the scheduler: with a user's mistake, or worth starting again (EX_TEMPFAIL in sysexits.h).
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 75


class UserError(ValueError):
    """A mistake in the user's input. The message, on one line, names it, what was found and what to do about it."""

    def __init__(self, message: str):
        super().__init__(" ".join(line.strip() for line in message.splitlines()))


class StorageError(OSError):
    """Something that a run had to write could not be written. Not the user's mistake, so the exit code is 1."""


def exit_code(command: str, run: Callable[[], int | None]) -> int:
    """
    Runs a command with transformers' messages silenced, and returns its exit code: that of `run`, or of the user's
    mistake or `OSError` that ended it, which is reported.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        return run() or 0
    except (UserError, OSError) as error:
        print(f"{command}: {error}", file=sys.stderr)
        return EXIT_USER_ERROR if isinstance(error, UserError) else 1


# A Hub token, bare or in a header that was refused, and the signature of a URL that needs no token.
SECRET = re.compile(r"(?<=Bearer )[^'\"]+|hf_[A-Za-z0-9]{16,}|(?<=\?)X-Amz-[^\s'\"]+")


def first_line(error: Exception) -> str:
    """
    The error's type and first line, without secrets: libraries explain themselves in many lines, our messages have
    one.
    """
    reason = SECRET.sub("***", str(error).strip().partition("\n")[0].rstrip("."))
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__


def list_some(names: list) -> str:
    """Names for a message: all of them, or the first ten of many."""
    shown = ", ".join(repr(name) for name in names[:10])
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"


@contextlib.contextmanager
def storing(
    folder: str | os.PathLike, advice: str, kind: type[StorageError] | type[UserError] = StorageError
) -> Iterator[None]:
    """
    Reports a full or read-only disk, or an exceeded quota or file-size limit, in one message.

    Args:
        folder (`str` or `os.PathLike`): where the code inside writes.
        advice (`str`): what is intact, and what to do.
        kind (`type`, *optional*, defaults to `StorageError`): what to raise instead of the library's own error;
            `UserError` before training.
    """
    try:
        yield
    except Exception as error:
        reason = _why_not_stored(error)
        if reason is None:
            raise
        raise kind(f"{folder} cannot be written to ({reason}). {advice}") from error


def _why_not_stored(error: BaseException | None) -> str | None:
    """Why a write failed, or `None` if something else did."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            return os.strerror(error.errno)
        if isinstance(error, SafetensorError) and str(error).startswith("Error while serializing"):  # not reading
            return first_line(error)
        # torch's writer only says at which byte it stopped.
        if "PytorchStreamWriter failed" in str(error) or "unexpected pos" in str(error):
            return "torch could not write the whole file; is the disk full?"
        error = error.__cause__ or error.__context__
    return None


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out: the device's, the machine's, or what `ulimit -v` allows."""
    while error is not None:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        # From torch's CPU allocator; from its data loader, about a worker that the kernel has killed to free memory.
        if "can't allocate memory" in str(error) or "killed by signal: Killed" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def check_writable(setting: str, folder: str | os.PathLike) -> None:
    """
    Writes an unnamed file into the folder, or into the closest parent that exists: permissions say nothing about a
    full or read-only disk, and do not stop root.

    Raises:
        UserError: if that fails; the message names the setting.
    """
    existing = Path(folder).absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"\0")
    except OSError as error:
        raise UserError(
            f"{setting} {folder}: nothing can be written there ({existing}: {error.strerror}). Choose a folder on a "
            "disk that is writable and not full."
        ) from error
