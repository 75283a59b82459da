"""A headless Chromium that tests click through, over its DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # containers run tests as root, where Chromium's own sandbox refuses
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)


def chromium() -> str | None:
    """Path of an installed Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


# [x, y, area] of an element in sight, the same in three frames: sizes are observed after a frame's
# own callbacks, so two equal frames may both be from before.
_BOX_AT_REST = """
async (selector) => {
  let last = "", still = 0;
  for (let i = 0; i < 600 && still < 3; i++) {
    const e = document.querySelector(selector);
    if (!e) return null;
    e.scrollIntoView({block: 'center', behavior: 'instant'});
    const b = e.getBoundingClientRect();
    const now = JSON.stringify([b.x + b.width / 2, b.y + b.height / 2, b.width * b.height]);
    still = now === last ? still + 1 : 0;
    last = now;
    await new Promise(requestAnimationFrame);
  }
  return still < 3 ? null : JSON.parse(last);
}
"""


class BrowserError(AssertionError):
    """A script of the page failed, or what was waited for did not come."""


class Page:
    """One tab. Keeps every console error, uncaught exception and network request it saw."""

    def __init__(self, folder: Path):
        """`folder`: an empty one, for the browser's profile."""
        found = chromium()
        assert found is not None, "no Chromium on PATH"
        self._process = subprocess.Popen(
            [found, *FLAGS, f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            port = self._port(folder / "DevToolsActivePort")
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
                targets = json.load(answer)
            url = next(t["webSocketDebuggerUrl"] for t in targets if t["type"] == "page")
            self._socket = connect(url, max_size=None)
        except BaseException:
            self._process.kill()
            raise
        self._ids = itertools.count(1)
        self.errors: list[str] = []
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait(timeout=20)

    def call(self, method: str, **parameters: Any) -> dict:
        """One DevTools command and its result; events that arrive meanwhile are kept."""
        id = next(self._ids)
        self._socket.send(json.dumps({"id": id, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") != id:
                self._note(message)
            elif "error" in message:
                raise BrowserError(f"{method}: {message['error']}")
            else:
                return message["result"]

    def open(self, path: Path) -> None:
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.until("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        result = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise BrowserError(f"{script}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def until(self, script: str, *, timeout_s: float = 30.0) -> Any:
        """The first true value of `script`."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if value := self.run(script):
                return value
            time.sleep(0.05)
        raise BrowserError(f"waited {timeout_s} s in vain for: {script}; errors: {self.errors}")

    def click(self, selector: str) -> None:
        """Press the middle of the first element that matches, as a mouse would, once it lies
        still: charts are drawn a frame after their page and push what is below them down."""
        box = self.run(f"({_BOX_AT_REST})({json.dumps(selector)})")
        if not box or not box[2]:
            raise BrowserError(f"nothing to click at {selector!r}")
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=box[0],
                y=box[1],
                button="none" if kind == "mouseMoved" else "left",
                clickCount=0 if kind == "mouseMoved" else 1,
            )

    def resize(self, width: int, height: int, *, scale: float = 1.0) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )

    def prefer(self, scheme: str) -> None:
        """`scheme`: light or dark."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, path: Path, *, quality: int = 80) -> None:
        """PNG, or WebP when the name says so."""
        kind = path.suffix.removeprefix(".")
        options = {} if kind == "png" else {"quality": quality}
        shot = self.call("Page.captureScreenshot", format=kind, **options)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _note(self, message: dict) -> None:
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.errors.append(details.get("exception", details).get("description", str(details)))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(parameters["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])

    def _port(self, path: Path) -> str:
        for _ in range(600):
            if path.is_file() and (lines := path.read_text().splitlines()):
                return lines[0]
            if self._process.poll() is not None:
                break
            time.sleep(0.1)
        raise BrowserError(f"Chromium did not start (exit code {self._process.poll()})")
