"""A real browser, Chromium without a window, driven over its debugging pipe (https://chromedevtools.github.io/devtools-protocol/)."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_OPTIONS = ("--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--disable-extensions", "--disable-background-networking", "--hide-scrollbars",
            # Certificates of tests sign themselves.
            "--ignore-certificate-errors")  # fmt: skip
_WAIT_S = 60.0
needed = pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium here: apt install chromium")


class Browser:
    """One page of it."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, read
        self._number = 0
        self._session: str | None = None
        self._rest = b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol, and its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        give_up = time.monotonic() + _WAIT_S
        while True:
            while (end := self._rest.find(b"\0")) < 0:
                assert select.select([self._read], [], [], max(0.0, give_up - time.monotonic()))[0], method
                piece = os.read(self._read, 1 << 20)
                assert piece, f"the browser ended during {method}"
                self._rest += piece
            said, self._rest = json.loads(self._rest[:end]), self._rest[end + 1 :]
            if said.get("id") == self._number:
                assert "error" not in said, said["error"]
                found: dict[str, Any] = said["result"]
                return found

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str) -> Any:
        """Wait until an expression is true; returns its value."""
        give_up = time.monotonic() + _WAIT_S
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < give_up, (expression, self.evaluate("document.body.innerText"))
            time.sleep(0.05)
        return value

    def open(self, url: str) -> None:
        """Go to a page."""
        self.call("Page.navigate", url=url)
        self.until(f"document.readyState == 'complete' && location.href.startsWith({url!r})")

    def choose_file(self, selector: str, path: Path) -> None:
        """Choose a file in an input of the page."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def bars(self) -> list[tuple[str, float]]:
        """Names and numbers of the bars that the answer shows."""
        row = "[b.children[0].textContent, +b.children[2].textContent]"
        found = self.evaluate(f"[...document.querySelectorAll('#answer .bar')].map(b => {row})")
        return [(name, value) for name, value in found]

    def picture(self, path: Path, width: int, height: int, dark: bool = False) -> None:
        """Write what the page looks like."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def browser(directory: Path) -> Iterator[Browser]:
    """Start a browser whose profile lies in ``directory``, and end it."""
    assert PROGRAM is not None
    down_read, down_write = os.pipe()
    up_read, up_write = os.pipe()
    # The pipe is expected at the descriptors 3 and 4; not every shell can move those above 9.
    move = f"import os, sys; os.dup2({down_read}, 3); os.dup2({up_write}, 4); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-S", "-c", move, PROGRAM, *_OPTIONS, f"--user-data-dir={directory}"]
    process = subprocess.Popen(command, pass_fds=(down_read, up_write), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    os.close(down_read)
    os.close(up_write)
    try:
        found = Browser(down_write, up_read)
        yield found
        found._session = None
        with contextlib.suppress(AssertionError, OSError):
            found.call("Browser.close")
        process.wait(60)
    finally:
        process.kill()
        process.wait()
        os.close(down_write)
        os.close(up_read)
