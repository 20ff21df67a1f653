"""Headless Chromium over its debugging pipe: no port, no network, no package."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


class Browser:
    """One page of a browser that can reach nothing but files; what it complains of is kept."""

    def __init__(self, folder: Path, *, width: int = 1100, height: int = 900, dark: bool = False):
        assert PROGRAM is not None
        self.complaints: list[str] = []
        self._count, self._left = 0, b""
        ours_read, theirs_write = os.pipe()
        theirs_read, ours_write = os.pipe()
        self._read, self._write = ours_read, ours_write

        def place() -> None:  # the protocol wants descriptors 3 (commands) and 4 (answers)
            spare_read, spare_write = os.dup(theirs_read), os.dup(theirs_write)
            os.dup2(spare_read, 3)
            os.dup2(spare_write, 4)

        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        options += ["--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen(
            [PROGRAM, *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=place,
        )
        os.close(theirs_read)
        os.close(theirs_write)
        targets = self._call("Target.getTargets")["targetInfos"]
        page = next(t["targetId"] for t in targets if t["type"] == "page")
        self._session: str | None = None
        about = {"targetId": page, "flatten": True}
        self._session = self._call("Target.attachToTarget", **about)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        offline = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self._call("Network.emulateNetworkConditions", offline=True, **offline)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        self._call("Emulation.setFocusEmulationEnabled", enabled=True)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def __enter__(self) -> "Browser":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._read)
        os.close(self._write)

    def open(self, file: Path, query: str = "") -> None:
        """Open a file and wait until its scripts have run."""
        self._call("Page.navigate", url=f"{file.resolve().as_uri()}{query}")
        end = time.monotonic() + 20
        while self.value("document.readyState") != "complete" and time.monotonic() < end:
            time.sleep(0.05)

    def value(self, expression: str) -> Any:
        """Return what an expression of JavaScript gives."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self, file: Path) -> None:
        """Write the whole page as a PNG."""
        found = self._call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(found["data"]))

    def wider(self) -> list[str]:
        """List what reaches beyond the window, unless it scrolls by itself."""
        return list(
            self.value(
                """[...document.querySelectorAll("body *")].filter((e) =>
                !e.parentElement.closest(".scroll, svg, pre") && e.getClientRects().length &&
                e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5
                ).map((e) => e.tagName + "." + e.getAttribute("class"))"""
            )
        )

    def _call(self, method: str, **values: Any) -> dict[str, Any]:
        self._count += 1
        words: dict[str, Any] = {"id": self._count, "method": method, "params": values}
        if getattr(self, "_session", None):
            words["sessionId"] = self._session
        os.write(self._write, json.dumps(words).encode() + b"\0")
        while True:
            answer = self._answer()
            self._listen(answer)
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def _answer(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._read], [], [], 60)
            data = os.read(self._read, 1 << 20) if ready else b""
            assert data, "the browser does not answer"
            self._left += data
        text, _, self._left = self._left.partition(b"\0")
        return dict(json.loads(text))

    def _listen(self, answer: dict[str, Any]) -> None:
        told = answer.get("params", {})
        if answer.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(told["exceptionDetails"]))
        elif answer.get("method") == "Runtime.consoleAPICalled":
            self.complaints.append(json.dumps(told["args"]))
        elif answer.get("method") == "Log.entryAdded":
            self.complaints.append(told["entry"]["text"])
        elif answer.get("method") == "Network.requestWillBeSent":
            address = told["request"]["url"]
            if not address.startswith(("file:", "about:")):
                self.complaints.append(f"asked for {address}")
