"""A hub on localhost: the endpoints of huggingface.co that downloads and uploads use, over real HTTP, with faults on
order.

Files above ``LFS_BYTES`` are LFS files and are served by redirect from another path, as the real hub does from its CDN.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_BYTES = 1024
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Fault:
    """What happens to requests for the content of one path, in order; afterwards all is well."""

    cut_after: list[int] = field(default_factory=list)  # bytes sent before the connection breaks
    corrupt: int = 0  # how many times content is damaged (every request for it counts)
    status: list[int] = field(default_factory=list)  # error codes before anything else


@dataclass
class Hub:
    """State of the server: repositories by (type, id), faults by path, and what was asked."""

    repos: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    faults: dict[str, Fault] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    tokens: list[str | None] = field(default_factory=list)  # Authorization of content requests at the "CDN"
    sent_bytes: int = 0
    private_token: str | None = None
    slow_after: int | None = None  # content stops flowing after this many bytes, without an end
    refuse_posts: bool = False
    uploads: dict[str, bytes] = field(default_factory=dict)  # LFS objects by SHA-256
    url: str = ""


def start(hub: Hub) -> ThreadingHTTPServer:
    """Serve ``hub`` on a free port in a thread; ``hub.url`` is set."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    return server


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._get(body=False)

    def do_GET(self) -> None:
        self._get(body=True)

    def _get(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        token = self.hub.private_token
        if token and not path.startswith("/cdn/") and self.headers.get("Authorization") != f"Bearer {token}":
            self._json({"error": "Invalid username or password."}, 401)
            return
        if match := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            self._info(match[1], match[2])
        elif match := re.fullmatch(r"(/datasets)?/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._resolve("dataset" if match[1] else "model", match[2], match[3], body)
        elif match := re.fullmatch(r"/cdn/(model|dataset)/([^/]+/[^/]+)/(.+)", path):
            self.hub.tokens.append(self.headers.get("Authorization"))
            self._content(self.hub.repos[match[1], match[2]][match[3]], match[3], {}, body)
        elif path == "/api/whoami-v2":
            self._json({"name": "me", "type": "user", "orgs": []})
        else:
            self._json({"error": f"no such path {path}"}, 404)

    def _info(self, repo_type: str, repo_id: str) -> None:
        files = self.hub.repos.get((repo_type, repo_id))
        if files is None:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return
        siblings = []
        for name, content in files.items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git_hash(content)}
            if len(content) > LFS_BYTES:
                sha = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": sha, "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        self._json({"id": repo_id, "_id": "1", "sha": COMMIT, "private": False, "downloads": 0, "likes": 0, "tags": [],
                    "siblings": siblings})  # fmt: skip

    def _resolve(self, repo_type: str, repo_id: str, name: str, body: bool) -> None:
        content = self.hub.repos.get((repo_type, repo_id), {}).get(name)
        if content is None:
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        headers = {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if len(content) > LFS_BYTES:
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(content))
            # another host name for the same server: a client must not send its token there
            port = self.server.server_address[1]  # type: ignore[index]
            headers["Location"] = f"http://localhost:{port}/cdn/{repo_type}/{repo_id}/{name}"
            self._send(302, b"", headers, body)
        else:
            headers["ETag"] = f'"{git_hash(content)}"'
            self._content(content, name, headers, body)

    def _content(self, content: bytes, name: str, headers: dict[str, str], body: bool) -> None:
        fault = self.hub.faults.get(name, Fault())
        if body and fault.status:
            self._json({"error": "try later"}, fault.status.pop(0))
            return
        if body and fault.corrupt:
            fault.corrupt -= 1
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        start, total, status = 0, len(content), 200
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start, status = int(match[1]), 206
            headers = {**headers, "Content-Range": f"bytes {start}-{total - 1}/{total}"}
        cut = fault.cut_after.pop(0) if body and fault.cut_after else None
        self._send(status, content[start:], headers, body, cut)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool, cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not body:
            return
        part = content if cut is None else content[:cut]
        if self.hub.slow_after is not None and len(part) > self.hub.slow_after:
            with suppress(ConnectionError):
                self.wfile.write(part[: self.hub.slow_after])
                self.wfile.flush()
            while self.hub.slow_after is not None:
                time.sleep(0.05)
            self.close_connection = True
            return
        with suppress(ConnectionError):
            self.wfile.write(part)
            self.wfile.flush()
            self.hub.sent_bytes += len(part)
        if cut is not None:
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})}, True)

    # Uploads: create a repository, ask how each file goes, put LFS objects, commit.

    def _read(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_PUT(self) -> None:
        content = self._read()
        self.hub.requests.append(("PUT", self.path, None))
        sha = self.path.rsplit("/", 1)[1]
        if hashlib.sha256(content).hexdigest() != sha:
            self._json({"error": "wrong content"}, 400)
            return
        self.hub.uploads[sha] = content
        self._send(200, b"", {}, True)

    def do_POST(self) -> None:
        path, content = unquote(urlsplit(self.path).path), self._read()
        self.hub.requests.append(("POST", path, None))
        if self.hub.refuse_posts:
            self._json({"error": "You don't have the rights"}, 403)
            return
        if path == "/api/repos/create":
            request = json.loads(content)
            repo_id = f"{request.get('organization') or 'me'}/{request['name']}"
            self.hub.repos.setdefault((request.get("type", "model"), repo_id), {})
            self._json({"url": f"{self.hub.url}/{repo_id}", "id": repo_id, "name": repo_id})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/main", path):
            files = json.loads(content)["files"]
            answer = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["size"] > LFS_BYTES else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for f in files
            ]
            self._json({"files": answer, "commitOid": COMMIT})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = []
            for wanted in json.loads(content)["objects"]:
                entry = {"oid": wanted["oid"], "size": wanted["size"]}
                if wanted["oid"] not in self.hub.uploads:
                    entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
                objects.append(entry)
            self._json({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self._commit(self.hub.repos[("model", match[1])], content)
            self._json(
                {"commitUrl": f"{self.hub.url}/{match[1]}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
            )
        else:
            self._json({"error": f"no such path {path}"}, 404)

    def _commit(self, files: dict[str, bytes], content: bytes) -> None:
        for line in content.decode().splitlines():
            record = json.loads(line)
            if record["key"] == "file":
                files[record["value"]["path"]] = base64.b64decode(record["value"]["content"])
            elif record["key"] == "lfsFile":
                files[record["value"]["path"]] = self.hub.uploads[record["value"]["oid"]]
