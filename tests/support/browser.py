"""Chromium without a window, over a pair of pipes (the DevTools protocol); nothing to install.

with browser() as page:
    page.open(path.as_uri())
    assert page.evaluate("document.title") == "run"
    assert page.complaints == []
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LIMIT_S = 90.0
_KEYS = {"Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38}
_KEYS |= {"ArrowRight": 39, "ArrowDown": 40, "+": 187, "-": 189, "Enter": 13, "Tab": 9}
_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--remote-debugging-pipe", "--disable-dev-shm-usage"),
]


def find_browser() -> str | None:
    """The first that is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab. ``complaints``: what console and log say; ``requests``: addresses asked for."""

    def __init__(self, sends: int, receives: int) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._sends, self._receives, self._buffer = sends, receives, b""
        self._number, self._session, self._loaded = 0, None, 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol; what it returns."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._sends, data) :]
        deadline = time.monotonic() + LIMIT_S
        while True:
            answer = self._next(deadline)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            left = deadline - time.monotonic()
            ready = left > 0 and select.select([self._receives], [], [], left)[0]
            assert ready, f"the browser has not answered within {LIMIT_S} s"
            data = os.read(self._receives, 1 << 20)
            assert data, "the browser has ended"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method: str | None, given: dict[str, Any]) -> None:
        if method == "Runtime.consoleAPICalled":
            self.complaints.append(f"{given['type']}: {[a.get('value') for a in given['args']]}")
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(given["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.complaints.append(given["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"])
        elif method == "Page.loadEventFired":
            self._loaded += 1

    def open(self, address: str) -> None:
        """Load a page to its end."""
        before = self._loaded
        self.call("Page.navigate", url=address)
        deadline = time.monotonic() + LIMIT_S
        while self._loaded == before:
            self._next(deadline)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript."""
        given = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", **given)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Until an expression is true."""
        deadline = time.monotonic() + LIMIT_S
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"not true within {LIMIT_S} s: {expression}"
            time.sleep(0.05)

    def look(self, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Set the size of the window and the colours that the reader's system asks for."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def mouse(self, kind: str, x: float, y: float) -> None:
        """kind: Moved, Pressed or Released; the left button is down in between."""
        button = "none" if kind == "Moved" else "left"
        given = {"type": f"mouse{kind}", "x": x, "y": y, "button": button, "clickCount": 1}
        self.call("Input.dispatchMouseEvent", **given)

    def key(self, key: str, shift: bool = False) -> None:
        """Press and release a key."""
        given = {"key": key, "windowsVirtualKeyCode": _KEYS[key], "modifiers": 8 if shift else 0}
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **given, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **given)

    def picture(self, path: Path) -> None:
        """The whole page as a PNG file."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))


@contextlib.contextmanager
def browser() -> Iterator[Page]:
    """A browser of its own, with nothing in it, and its end."""
    program = find_browser()
    assert program, f"found none of {', '.join(NAMES)}; expected Chromium or Chrome"
    with contextlib.ExitStack() as stack:
        place = {"prefix": "browser-", "ignore_cleanup_errors": True}
        folder = stack.enter_context(tempfile.TemporaryDirectory(**place))
        theirs_read, ours_write = os.pipe()
        ours_read, theirs_write = os.pipe()
        command = [program, *_FLAGS, f"--user-data-dir={folder}", "about:blank"]
        # The browser reads descriptor 3 and writes descriptor 4.
        shell = f'exec "$@" 3<&{theirs_read} 4>&{theirs_write}'
        process = subprocess.Popen(
            ["bash", "-c", shell, "browser", *command],
            pass_fds=[theirs_read, theirs_write],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        os.close(theirs_read)
        os.close(theirs_write)
        stack.callback(os.close, ours_read)
        stack.callback(os.close, ours_write)
        yield Page(ours_write, ours_read)
