"""Calls of the Hub that outlive its bad moments."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx

from .errors import first_line


logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")
WAITS = (1, 4, 16)  # seconds
MAX_WAIT = 300  # seconds that the Hub may ask for: the window of its rate limits
# Too many requests, or trouble of the Hub's own. A full quota, an expired token or a missing repository will not pass.
PASSING_STATUS = (408, 429, 500, 502, 503, 504)
# Not a connection that cannot be made: offline, it helps nobody to wait.
CUT_CONNECTION = (
    *(httpx.ReadError, httpx.WriteError, httpx.ReadTimeout, httpx.WriteTimeout, httpx.RemoteProtocolError),
)


def persistently(call: Callable[[], Answer]) -> Answer:
    """
    What a call of the Hub gives, made up to four times if what it fails of may pass: 429, 5xx, a cut connection.

    huggingface_hub repeats most of its requests by itself; not so a commit (without Xet), a question such as who one
    is, or a download that is answered by 5xx or reset.

    Args:
        call (`Callable`): may be made again whatever it has done already, as pushes and downloads may: files that have
            arrived are not sent again.
    """
    for wait in WAITS:
        try:
            return call()
        except Exception as error:
            wait = _wait_after(error, wait)
            if wait is None:
                raise
            logger.warning(f"Hub: {first_line(error)}; trying again in {wait} s")
        time.sleep(wait)
    return call()


def _wait_after(error: BaseException | None, wait: int) -> int | None:
    """Seconds until the same call may succeed, `wait` or what the Hub asks for; `None` if it will not."""
    while error is not None:  # libraries wrap what has happened in errors of their own
        if isinstance(error, HfHubHTTPError):
            asked = error.response.headers.get("Retry-After", "")
            asked = min(int(asked), MAX_WAIT) if asked.isdecimal() else 0
            return max(wait, asked) if error.response.status_code in PASSING_STATUS else None
        if isinstance(error, CUT_CONNECTION):
            return wait
        error = error.__cause__ or error.__context__
    return None
