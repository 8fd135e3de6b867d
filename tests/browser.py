"""Headless Chromium over a pipe (the DevTools protocol, no package needed), for tests of pages; they skip where there is none."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

LIMIT = 60


def _starts(program: str) -> bool:
    """Whether it is a browser, and no stub that says how to install one."""
    try:
        return subprocess.run([program, "--version"], capture_output=True, timeout=LIMIT).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path is not None and _starts(path)), None)


class Browser:
    """One page of one browser; use it as a context manager."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp()
        child_reads, self._write = os.pipe()
        self._read, child_writes = os.pipe()
        program = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        flags += ["--no-first-run", "--disable-background-networking", f"--user-data-dir={self.folder}"]
        self.process = subprocess.Popen(
            ["bash", "-c", program, "bash", str(child_reads), str(child_writes), str(CHROMIUM), *flags, "about:blank"],
            pass_fds=(child_reads, child_writes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(child_reads)
        os.close(child_writes)
        self._buffer, self._count, self._session = b"", 0, None
        pages = self.send("Target.getTargets")["targetInfos"]
        target = next(page["targetId"] for page in pages if page["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.send("Page.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self.folder, ignore_errors=True)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and wait for its answer."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + LIMIT
        while True:
            while b"\0" not in self._buffer:
                ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
                chunk = os.read(self._read, 1 << 20) if ready else b""
                if not chunk:
                    raise TimeoutError(f"{method} was not answered")
                self._buffer += chunk
            line, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def open(self, url: str, *, width: int = 1440, height: int = 900, reduced_motion: bool = False) -> None:
        """Show a page in a window of ``width`` CSS pixels, once it is loaded."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        motion = {"name": "prefers-reduced-motion", "value": "reduce" if reduced_motion else "no-preference"}
        self.send("Emulation.setEmulatedMedia", features=[motion])
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """Value of a JavaScript expression (of its promise)."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:2000])
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = LIMIT) -> None:
        """Until a JavaScript expression holds."""
        end = time.monotonic() + seconds
        while not self.run(condition):
            if time.monotonic() > end:
                raise TimeoutError(condition)
            time.sleep(0.1)

    def screenshot(self, file: Path, *, whole: bool = True) -> None:
        """The page as PNG."""
        picture = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(picture["data"]))

    def pdf(self, file: Path) -> None:
        """The page as it is printed."""
        printed = self.send("Page.printToPDF", preferCSSPageSize=True, printBackground=True)
        file.write_bytes(base64.b64decode(printed["data"]))
