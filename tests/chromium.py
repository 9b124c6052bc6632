"""A headless Chromium, by the WebDriver protocol of its own chromedriver."""

import contextlib
import functools
import http.server
import json
import re
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path


FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


class Chromium:
    """One window."""

    def __init__(self, port: int, profile: str):
        self.session = f"http://127.0.0.1:{port}/session"
        options = {"goog:chromeOptions": {"args": [*FLAGS, f"--user-data-dir={profile}"]}}
        self.session += "/" + self.send("", {"capabilities": {"alwaysMatch": options}})["sessionId"]

    def send(self, command: str, body: dict):
        request = urllib.request.Request(self.session + command, json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["value"]

    def open(self, url: str) -> None:
        self.send("/url", {"url": url})

    def run(self, script: str):
        """What a script returns."""
        return self.send("/execute/sync", {"script": script, "args": []})

    def wait_for(self, script: str, seconds: float = 60):
        """What a script returns, once it is true."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"{script}: the page says {self.run('return document.body.innerText')}"
            time.sleep(0.1)
        return value

    def type_into(self, selector: str, text: str) -> None:
        """Types into an element; into a file input, the path of the file to choose."""
        (element,) = self.send("/element", {"using": "css selector", "value": selector}).values()
        self.send(f"/element/{element}/value", {"text": text})


@contextlib.contextmanager
def chromium() -> Iterator[Chromium]:
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True) as driver,
    ):
        try:
            started = next(
                found for line in driver.stdout if (found := re.search(r"successfully on port (\d+)", line))
            )
            yield Chromium(int(started[1]), profile)
        finally:
            driver.terminate()  # and with it the browser


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which the folder's files are."""
    handler = functools.partial(_Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
