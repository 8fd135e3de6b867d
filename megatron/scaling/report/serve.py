"""A report that follows its runs: the page on this machine's loopback address, made anew while runs train.

Nothing is done while nobody looks: the page asks every few seconds, and only then are the runs' files compared with those of
the last report. What is served is the page and the pictures it names, from memory or by name, never a path of the request.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from megatron.errors import UserError

ADDRESS = "127.0.0.1"
LEAST_SECONDS = 5.0
"""Between two looks at the files: drawing takes a core for a second or more, which a run on this machine misses."""
_WATCHED = re.compile(
    r"(run|search)\.json|metrics\.jsonl|.*/evaluations/[^/]*\.json|.*/generalisation/record\.json|"
    r"(downstream|likelihood).*\.json|samples.*\.jsonl"
)

_SCRIPT = """
(() => {
  const status = document.getElementById("live");
  let version = document.documentElement.dataset.version;
  const say = text => { if (status.textContent !== text) status.textContent = text; };
  const opened = () => [...document.querySelectorAll("details[open] > summary")].map(item => item.textContent.split(":")[0]);
  async function look() {
    try {
      const state = await (await fetch("/state", {cache: "no-store"})).json();
      if (state.version !== version) {
        const text = await (await fetch("/report.html", {cache: "no-store"})).text();
        const next = new DOMParser().parseFromString(text, "text/html");
        const open = opened(), place = scrollY;
        for (const part of ["header h1", "header .written", "main"])
          document.querySelector(part).replaceWith(next.querySelector(part));
        for (const item of document.querySelectorAll("details > summary"))
          if (open.includes(item.textContent.split(":")[0])) item.parentElement.open = true;
        scrollTo(0, place);
        version = next.documentElement.dataset.version;
        say("Updated at " + new Date().toLocaleTimeString() + ".");
      } else if (state.problem) say("Not updated: " + state.problem);
    } catch (error) { say("The program that serves this page has ended; this is its last state."); }
    setTimeout(look, 2000);
  }
  setTimeout(look, 2000);
})();
"""


class LiveReport:
    """The newest report of some places, made again when a file of a run there has changed.

    Args:
        places: run directories, or folders of them; runs that begin later are found.
        write: makes the report and returns the path of its page.
    """

    def __init__(self, places: Sequence[Path], write: Callable[[], Path]) -> None:
        self.places, self._write = places, write
        self.version, self.problem = 0, ""
        self.page, self.folder = "", Path()
        self._seen: dict[Path, tuple[int, int]] = {}
        self._making = threading.Lock()
        self._make()
        self._looked = time.monotonic()

    def refresh(self) -> None:
        """Make the report again if something changed, unless that is under way or was a moment ago."""
        if not self._making.acquire(blocking=False):
            return
        try:
            if time.monotonic() - self._looked >= LEAST_SECONDS:
                self._looked = time.monotonic()
                if self._stamps() != self._seen:
                    self._make()
        except (UserError, OSError) as error:  # a run that is being moved or begun: the next time it may be whole
            self.problem = str(error)
        finally:
            self._making.release()

    def picture(self, name: str) -> bytes | None:
        """A file that the page names as one of its pictures, or None."""
        stems = re.findall(r'<figure id="(\w+)"', self.page)
        if name not in {f"{stem}{suffix}" for stem in stems for suffix in (".png", ".svg")}:
            return None
        file = self.folder / name
        return file.read_bytes() if file.is_file() and not file.is_symlink() else None

    def _make(self) -> None:
        seen = self._stamps()  # before reading: what changes meanwhile is seen the next time
        path = self._write()
        self.page, self.folder = path.read_text(encoding="utf-8"), path.parent
        self._seen, self.problem = seen, ""
        self.version += 1

    def _stamps(self) -> dict[Path, tuple[int, int]]:
        """{file: (time of change, size)} of everything that a report reads."""
        found = {}
        for file in self._files():
            try:
                status = file.stat()
            except OSError:  # replaced this moment
                continue
            found[file] = (status.st_mtime_ns, status.st_size)
        return found

    def _files(self) -> Iterator[Path]:
        for place in self.places:
            if (place / "run.json").is_file():  # beside a run lies what was found of several
                beside = place.resolve().parent
                yield from (*beside.glob("likelihood*.json"), *beside.glob("search.json"))
            for folder, inner, names in os.walk(place):
                inner[:] = [name for name in inner if not name.startswith("global_step")]  # checkpoints hold many files
                for name in names:
                    if _WATCHED.fullmatch(name) or _WATCHED.fullmatch(f"{folder}/{name}"):
                        yield Path(folder, name)


def open_server(report: LiveReport, port: int) -> ThreadingHTTPServer:
    """A server of ``report`` on the loopback address; port 0 takes any free one.

    Raises:
        UserError: another program has the port, or this user may not have it.
    """

    class Handler(_Handler):
        live = report

    try:
        server = ThreadingHTTPServer((ADDRESS, port), Handler)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        rule = "another program listens there" if error.errno == errno.EADDRINUSE else "it needs more rights"
        raise UserError(f"--serve {port}", rule, "pass another port, or 0 for any free one") from None
    server.daemon_threads = True
    return server


class _Handler(BaseHTTPRequestHandler):
    live: LiveReport
    server_version, sys_version = "report", ""

    def do_GET(self) -> None:
        """Answer with the page, its state or one of its pictures."""
        if self.headers.get("Host", "").partition(":")[0] not in (ADDRESS, "localhost"):
            self._send(403, b"served on this machine only", "text/plain")  # a foreign name that was pointed here
            return
        name = self.path.partition("?")[0]
        if name in ("/", "/report.html"):
            nonce = secrets.token_urlsafe(12)
            self._send(200, _live_page(self.live, nonce).encode(), "text/html; charset=utf-8", nonce=nonce)
        elif name == "/state":
            self.live.refresh()
            state = {"version": str(self.live.version), "problem": self.live.problem}
            self._send(200, json.dumps(state).encode(), "application/json")
        else:
            data = self.live.picture(name[1:])
            kind = "image/png" if name.endswith(".png") else "image/svg+xml"
            if data is None:
                self._send(404, b"not a file of this report", "text/plain")
            else:
                self._send(200, data, kind)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a page asks every two seconds."""

    def _send(self, status: int, body: bytes, kind: str, *, nonce: str = "") -> None:
        policy = (
            "default-src 'none'; img-src data: 'self'; style-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'"
        )
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", policy + (f"; script-src 'nonce-{nonce}'" if nonce else ""))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _live_page(report: LiveReport, nonce: str) -> str:
    """The page as it is written, with a line that says so and the script that looks for a newer one."""
    version, page = report.version, report.page
    page = page.replace("<html ", f'<html data-version="{version}" ', 1)
    page = page.replace("</header>", '<p class="meta" id="live" role="status">Follows the runs.</p></header>', 1)
    return page.replace("</body>", f'<script nonce="{nonce}">{_SCRIPT}</script></body>', 1)
