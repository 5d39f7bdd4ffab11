"""A headless Chromium, told over its debugging pipe to open a page, to run JavaScript in it, and to move the mouse."""

from __future__ import annotations

import json
import os
import select
import subprocess
from pathlib import Path
from typing import Any

_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync", "--remote-debugging-pipe")

_PATIENCE = 60.0
"""Seconds to wait for an answer."""


class Chromium:
    """One page of a browser process; `close` ends it."""

    def __init__(self, binary: str, profile: Path, width: int, height: int) -> None:
        """Start the browser, which reads commands from its file 3 and writes answers to its file 4."""
        read, self._commands = os.pipe()
        self._answers, write = os.pipe()
        command = [binary, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        pipes = f'exec "$@" 3<&{read} 4>&{write}'
        self._process = subprocess.Popen(
            ["bash", "-c", pipes, "bash", *command],
            pass_fds=(read, write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read)
        os.close(write)
        self._number, self._left = 0, b""
        self._session: dict[str, str] = {}
        self.console: list[str] = []
        """Messages that the page wrote, and its errors."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            if answer.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                self.console.append(json.dumps(answer["params"])[:300])
        assert "error" not in answer, answer["error"]
        result: dict[str, Any] = answer["result"]
        return result

    def run(self, script: str) -> Any:
        """Return the value of JavaScript; that of a promise, once it is kept."""
        done = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, buttons: int = 0) -> None:
        """Send an event of the mouse at a place in the window."""
        button = "left" if buttons or kind == "mouseReleased" else "none"
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, buttons=buttons, clickCount=1)

    def close(self) -> None:
        """End the browser."""
        os.close(self._commands)
        os.close(self._answers)
        self._process.kill()
        self._process.wait(timeout=30)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            assert select.select([self._answers], [], [], _PATIENCE)[0], "the browser does not answer"
            more = os.read(self._answers, 1 << 20)
            assert more, "the browser ended"
            self._left += more
        message, _, self._left = self._left.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found
