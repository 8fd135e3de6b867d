"""Download from the Hugging Face hub: resumable across interruptions and processes, every byte checked.

``huggingface_hub`` 2 starts a file again when its process ended in the middle, and checks sizes only. Here a partial
file stays beside its destination and the next start continues it; a finished file is compared with the SHA-256 (LFS
files) or the git hash (small files) that the hub lists, and gets its name only after that.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
)

from megatron.errors import Failure
from megatron.files import one_at_a_time
from megatron.screen import Progress

STATE_FOLDER = ".download"
ATTEMPTS = 6  # transport errors in a row, without a new byte, before giving up
CHUNK_BYTES = 1 << 22
# The hub does not serve larger files over plain HTTP; they go through hf_xet, which has a cache of its own.
PLAIN_HTTP_LIMIT_BYTES = 50 * 10**9
# Errors of this machine's disk, which no further attempt cures.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)


class DownloadError(Failure):
    """A download that could not end right: what was asked, what happened, what to do."""


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository at one commit, with what its content must hash to."""

    repo_id: str
    repo_type: str
    commit: str
    path: str
    size: int
    digest: str  # SHA-256 of the content (LFS), or SHA-1 of the git blob
    is_lfs: bool


def list_files(
    repo_id: str, repo_type: str, *, select: Callable[[str], bool], endpoint: str | None = None
) -> list[RemoteFile]:
    """List the files of a repository that ``select`` accepts by path, with sizes and hashes.

    Args:
        repo_id: "owner/name".
        repo_type: "model" or "dataset".
        select: says for a path whether it is wanted.
        endpoint: hub address; default: HF_ENDPOINT. The token is the one of HF_TOKEN or of ``hf auth login`` (HF_HOME).

    Raises:
        DownloadError: no connection, no such repository, or no access to it.
    """
    try:
        info = HfApi(endpoint=endpoint).repo_info(repo_id, repo_type=repo_type, files_metadata=True)
    except Exception as error:  # transport errors have no common class across versions of huggingface_hub
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DownloadError(
            f"cannot list {repo_type} {repo_id} at {endpoint or constants.ENDPOINT} ({reason})",
            "the repository must exist and be reachable",
            (
                "check the connection and HF_ENDPOINT, and for a private or gated repository set HF_TOKEN or "
                "run: hf auth login"
            ),
        ) from error
    files = []
    commit = str(info.sha)
    for entry in getattr(info, "siblings", None) or []:
        if select(entry.rfilename):
            digest = str(entry.lfs.sha256 if entry.lfs else entry.blob_id)
            files.append(
                RemoteFile(
                    repo_id, repo_type, commit, entry.rfilename, int(entry.size or 0), digest, entry.lfs is not None
                )
            )
    return files


def is_present(file: RemoteFile, destination: Path) -> bool:
    """Say whether the file is there, whole and right. It is hashed once; later, size and time of change are trusted."""
    if not destination.is_file() or destination.stat().st_size != file.size:
        return False
    status = destination.stat()
    seal = {"digest": file.digest, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    marker = _state(destination) / f"{destination.name}.verified"
    if marker.is_file() and marker.read_text(encoding="utf-8", errors="replace") == json.dumps(seal):
        return True
    if content_digest(destination, is_lfs=file.is_lfs) != file.digest:
        return False
    with contextlib.suppress(OSError):  # of a folder that is only to be read: hashed again next time
        _seal(file, destination)
    return True


def fetch(file: RemoteFile, destination: Path, *, endpoint: str | None = None, wait_seconds: float = 1.0) -> bool:
    """Bring one file to its place; continue a partial one; check the content.

    Args:
        file: from :func:`list_files`.
        destination: path of the file on this machine.
        endpoint: hub address; default: HF_ENDPOINT.
        wait_seconds: pause before the second attempt; it doubles with each.

    Returns:
        False if it was there already, or another process brought it meanwhile.

    Raises:
        DownloadError: the connection kept failing, or the content was wrong twice. ``destination`` is then unchanged.
    """
    if is_present(file, destination):
        return False
    state = _state(destination)
    state.mkdir(parents=True, exist_ok=True)
    partial = state / f"{destination.name}.{file.digest[:16]}.incomplete"

    def waiting() -> None:
        print(f"{file.path}: another process fetches it; waiting for that", flush=True)

    with one_at_a_time(partial.with_suffix(".lock"), waiting=waiting):
        if is_present(file, destination):
            return False
        for _ in range(2):
            _fill(file, partial, endpoint=endpoint, wait_seconds=wait_seconds)
            actual = content_digest(partial, is_lfs=file.is_lfs)
            if actual == file.digest:
                os.replace(partial, destination)
                _seal(file, destination)
                return True
            print(f"{file.path}: wrong checksum ({actual[:12]}…, expected {file.digest[:12]}…)", flush=True)
            partial.unlink()
    raise DownloadError(
        f"{file.path} of {file.repo_id} arrived damaged twice: hash {actual}, the hub lists {file.digest}",
        "a file is kept only when they agree",
        "something between here and the hub changes it: try again later, another network or HF_ENDPOINT",
    )


def content_digest(path: Path, *, is_lfs: bool) -> str:
    """Hash a file as the hub does: SHA-256 for LFS files, SHA-1 of a git blob for the others."""
    digest = hashlib.sha256() if is_lfs else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as opened:
        while block := opened.read(CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _fill(file: RemoteFile, partial: Path, *, endpoint: str | None, wait_seconds: float) -> None:
    """Bring ``partial`` to the full size, from the cache of HF_HOME or from the hub, over any number of breaks."""
    cached = try_to_load_from_cache(file.repo_id, file.path, revision=file.commit, repo_type=file.repo_type)
    if isinstance(cached, str) and not partial.exists():
        shutil.copyfile(cached, partial)
    if file.size > PLAIN_HTTP_LIMIT_BYTES:
        _fetch_large(file, partial, endpoint)
    failures, before = 0, -2  # an absent file has -1 bytes
    while (size := partial.stat().st_size if partial.exists() else -1) != file.size:
        if size > file.size:
            partial.unlink()  # a server that ignored the range wrote the file twice
        failures = failures + 1 if size <= before else 0
        before = size
        try:
            _request(file, partial, endpoint)
        except Exception as error:  # whatever the transport raises; a full file ends the loop
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise DownloadError(
                    f"{partial} could not be written ({error.strerror})",
                    f"{file.path} needs {file.size:,} bytes there",
                    "free space or give another --data-dir, and run the same command again: what arrived is kept",
                ) from error
            refused = isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 404, 451)
            if refused or failures + 1 >= ATTEMPTS:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise DownloadError(
                    f"{file.path} of {file.repo_id} stopped at {max(size, 0):,} of {file.size:,} bytes ({reason})",
                    "the hub must deliver the whole file",
                    "what arrived is kept: run the same command again to continue",
                ) from error
            print(f"{file.path}: connection lost ({type(error).__name__}), continuing", flush=True)
            time.sleep(wait_seconds * 2**failures)


def _request(file: RemoteFile, partial: Path, endpoint: str | None) -> None:
    """Ask the hub for the bytes after those that are there. The address is new each time: signed ones expire."""
    url = hf_hub_url(file.repo_id, file.path, repo_type=file.repo_type, revision=file.commit, endpoint=endpoint)
    metadata = get_hf_file_metadata(url, endpoint=endpoint)
    headers = build_hf_headers()
    if urlparse(metadata.location).netloc != urlparse(url).netloc:
        headers.pop("authorization", None)  # a content server is given no token
    with _Counting(io.FileIO(partial, "ab")) as opened, _without_bars():
        start = opened.tell()
        opened.progress = Progress(file.path, file.size, unit="B", start=start)
        with opened.progress:
            http_get(metadata.location, opened, resume_size=start, headers=headers, expected_size=file.size)


class _Counting(io.BufferedWriter):
    """A file that shows how much of it has arrived."""

    progress: Progress | None = None

    def write(self, data: Any) -> int:
        """Write and count."""
        if self.progress is not None:
            self.progress.update(len(data))
        return super().write(data)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """The hub's library draws bars of its own, also into logs."""
    was_off = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not was_off:
            enable_progress_bars()


def _fetch_large(file: RemoteFile, partial: Path, endpoint: str | None) -> None:
    """Fetch a file that plain HTTP does not serve, through huggingface_hub and hf_xet."""
    if partial.exists() and partial.stat().st_size == file.size:
        return
    try:
        found = hf_hub_download(
            file.repo_id,
            file.path,
            repo_type=file.repo_type,
            revision=file.commit,
            endpoint=endpoint,
            local_dir=partial.parent,
        )
    except Exception as error:  # see list_files
        raise DownloadError(
            f"{file.path} of {file.repo_id} ({file.size:,} bytes) failed ({error})",
            "files of this size need hf_xet and a steady connection",
            "run: pip install hf_xet, and the same command again",
        ) from error
    os.replace(found, partial)


def _state(destination: Path) -> Path:
    """Return the folder of partial files and seals beside a destination."""
    return destination.parent / STATE_FOLDER


def _seal(file: RemoteFile, destination: Path) -> None:
    """Note that the content was checked, so that a later start need not hash it again."""
    status = destination.stat()
    seal = {"digest": file.digest, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    _state(destination).mkdir(exist_ok=True)
    (_state(destination) / f"{destination.name}.verified").write_text(json.dumps(seal), encoding="utf-8")
