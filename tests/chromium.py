"""The system's Chromium without a window, driven by its DevTools protocol over a pipe: no further package."""
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

FOUND = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
           "--hide-scrollbars", "--remote-debugging-pipe")
KEYS = {"+": 187, "-": 189, "0": 48, " ": 32, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40,
        "Escape": 27}
LIMIT_S = 60.0  # for an answer: a busy machine starts a browser slowly


class Chromium:
    """One page. `problems` are the errors on its console, `requests` the addresses that it asked for."""
    def __init__(self, folder: Path):
        self.problems, self.requests, self.number, self.unread, self.session = [], [], 0, b"", {}
        read_end, self.to_page = os.pipe()
        self.from_page, write_end = os.pipe()
        # The protocol's pipe is descriptors 3 and 4 of the browser.
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{read_end} 4>&{write_end}', FOUND, *OPTIONS,
             f"--user-data-dir={folder}", "about:blank"],
            pass_fds=(read_end, write_end), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(read_end)
        os.close(write_end)
        page = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        os.close(self.to_page)
        os.close(self.from_page)

    def call(self, method: str, **params) -> dict:
        """The answer to one command; events on the way are noted."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | self.session
        os.write(self.to_page, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self.number:
            self._note(answer.get("method"), answer.get("params"))
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _receive(self) -> dict:
        while b"\0" not in self.unread:
            assert select.select([self.from_page], [], [], LIMIT_S)[0], f"no answer within {LIMIT_S:g} s"
            data = os.read(self.from_page, 1 << 20)
            assert data, "the browser has ended"
            self.unread += data
        text, _, self.unread = self.unread.partition(b"\0")
        return json.loads(text)

    def _note(self, method: str, params: dict) -> None:
        kind = {"Runtime.exceptionThrown": "error", "Log.entryAdded": params.get("entry", {}).get("level"),
                "Runtime.consoleAPICalled": params.get("type")}.get(method)
        if kind == "error":
            self.problems.append(params)
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(self, address: str, width: int = 1280) -> None:
        """Another page, with empty `problems` and `requests`."""
        self.problems, self.requests = [], []
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def evaluate(self, expression: str):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.05)

    def press(self, key: str, shift: bool = False) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": key} if len(key) == 1 and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=KEYS[key],
                      modifiers=8 * shift, **text)

    def move(self, x: float, y: float, **more) -> None:
        self.call("Input.dispatchMouseEvent", **{"type": "mouseMoved", "x": x, "y": y} | more)

    def drag(self, x: float, y: float, to_x: float) -> None:
        left = {"button": "left", "buttons": 1, "clickCount": 1}
        self.move(x, y)
        self.move(x, y, type="mousePressed", **left)
        self.move((x + to_x) / 2, y, **left)
        self.move(to_x, y, **left)
        self.move(to_x, y, type="mouseReleased", **left)
