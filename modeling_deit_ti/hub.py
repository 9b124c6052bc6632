"""Calls to the Hub that are retried when it fails temporarily."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError

from .errors import first_line


logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")
# In a run's folder: checkpoints (which --hub_strategy pushes by itself), earlier stages, and what names local folders.
NOT_PUSHED = ("checkpoint-*", "last-checkpoint/*", "stage-*", "_*")
WAITS = (1, 4, 16)  # seconds
MAX_WAIT = 300  # seconds that the Hub may ask us to wait: the window of its rate limits
# Too many requests, or the Hub's own trouble. A full quota, an expired token or a missing repository will not pass.
RETRYABLE_STATUS = (408, 429, 500, 502, 503, 504)
# By name: huggingface_hub's client is httpx, or httpx2 from 2.0 on. Failures to connect are not retried: offline,
# waiting does not help.
DROPPED_CONNECTION = ("ReadError", "WriteError", "ReadTimeout", "WriteTimeout", "RemoteProtocolError")


def retrying(call: Callable[[], Answer]) -> Answer:
    """
    The result of a call to the Hub, tried up to four times while it fails for a temporary reason: 429, 5xx, a dropped
    connection. huggingface_hub retries most requests itself, but not commits without Xet, `whoami` and the like, or
    downloads that begin with a 5xx.

    Args:
        call (`Callable`): pushes or downloads; files that have arrived are not sent again.
    """
    for wait in WAITS:
        try:
            return call()
        except Exception as error:
            wait = _wait_after(error, wait)
            if wait is None:
                raise
            logger.warning(f"Hub: {first_line(error)}; retrying in {wait} s")
        time.sleep(wait)
    return call()


def _wait_after(error: BaseException | None, wait: int) -> int | None:
    """Seconds until the same call may succeed: `wait`, or more if the Hub asks for it; `None` if it will not."""
    while error is not None:  # libraries wrap what has happened in their own errors
        if isinstance(error, HfHubHTTPError):
            asked = error.response.headers.get("Retry-After", "")
            asked = min(int(asked), MAX_WAIT) if asked.isdecimal() else 0
            return max(wait, asked) if error.response.status_code in RETRYABLE_STATUS else None
        if type(error).__name__ in DROPPED_CONNECTION:
            return wait
        error = error.__cause__ or error.__context__
    return None
