"""The only way a finished file or folder comes to be: whole, on the disk, or not at all; and how a JSON object is read.

Both are made under a temporary name beside the target, ``.NAME.PID.RANDOM.tmp``, and renamed. A failure removes it; after a
kill it stays, harmless, until :func:`remove_leftovers`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from megatron.errors import Failure, UserError, require

LEFTOVER_SECONDS = 24 * 3600
Content = str | bytes | Callable[[BinaryIO], object]


def replace_file(path: str | Path, content: Content) -> None:
    """Make or replace a file in one step: a reader, also after a crash, sees the old one or the new one.

    Args:
        path: file to write, in a folder that exists. A device or a pipe is written to directly.
        content: text (UTF-8), bytes, or a function that writes them to the file it is given.

    Raises:
        Failure: the file could not be written; an older one is as it was. Errors that ``content`` itself raises pass.
    """
    path = Path(path)
    with written_whole(path):
        if _is_stream(path):
            with open(path, "ab") as stream:
                _write(stream, content)
        else:
            with _published(path) as temporary, open(temporary, "xb") as file:
                _write(file, content)


@contextmanager
def replace_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path`` when the block ends well, and disappears when it does not.

    Args:
        path: folder to make; the folders above it are made too.

    Raises:
        UserError: there is something at ``path`` already.
        Failure: it could not be written.
    """
    path = Path(path)
    is_free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    require(is_free, f"{path} exists and is not empty", "a finished folder is never overwritten", "remove or rename it")
    with _published(path) as temporary:
        with written_whole(path):
            make_folder(path.parent)
            temporary.mkdir()
        yield temporary


@contextmanager
def written_whole(
    path: str | Path,
    rule: str = "it needs a writable folder with room on the disk; nothing half-written is left",
    fix: str = "free space, mend permissions or choose another place",
) -> Iterator[None]:
    """Turn an error of the operating system into a :class:`Failure` that names ``path`` and the cure.

    An error that names another file belongs to whatever the block reads, and passes.
    """
    path = Path(path)
    try:
        yield
    except OSError as error:
        named = path if error.filename is None else Path(os.fsdecode(error.filename))
        is_beside = named.name.lstrip(".").startswith(f"{path.name}.") or named in path.parents
        if not is_beside and path not in (named, *named.parents):
            raise
        raise Failure(f"{path} could not be written ({error.strerror or error})", rule, fix) from error


def temporary_name(path: Path) -> Path:
    """Return a name beside ``path`` that no other process, thread or machine uses."""
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def remove_leftovers(folder: Path, *, name: str) -> None:
    """Delete temporary files and folders of the target ``name`` that killed processes left in ``folder`` a day ago.

    Younger ones may belong to a living process.
    """
    for path in folder.glob(f".{name}.*.tmp"):
        with contextlib.suppress(OSError):  # another process was faster, or it is not ours
            if time.time() - path.lstat().st_mtime > LEFTOVER_SECONDS:
                _remove(path)


@contextmanager
def one_at_a_time(lock: Path, *, waiting: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Let one process at a time into the block; ``waiting`` is called once by one that must wait.

    The lock goes with its process. On a file system without locks everyone enters at once, so that it only saves work:
    what the block makes must be whole by other means.

    Raises:
        Failure: ``lock`` cannot be made.
    """
    with written_whole(lock):
        make_folder(lock.parent)
        file = lock.open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield


def lock_run(run_dir: Path) -> tuple[TextIO, bool]:
    """Take a run directory, which is made where there is none, for this process.

    A POSIX record lock: it is not inherited by the loader's processes, so a run whose trainer was killed can be continued
    at once, and it works across the hosts of a network file system. The file says who holds it, for people. It stays:
    removing it would race with the next holder.

    Returns:
        The lock, held from before the first write until it is closed or the process ends, however it ends; and whether
        it is held: on a file system without locks nothing can be promised.

    Raises:
        UserError: the folder cannot be written, or another process trains into it; says which, and since when.
        Failure: its disk is full.
    """
    path = run_dir / "lock"
    try:
        make_folder(run_dir)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
    except OSError as error:
        given = f"the run directory {run_dir} cannot be written ({error.strerror})"
        fix = "choose another --save or change its permissions"
        raise UserError(given, "metrics and checkpoints go there", fix) from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = _describe(path)
        file.close()
        raise UserError(
            f"{run_dir} is being trained into by {holder}",
            "a run directory belongs to one run at a time",
            "wait for it, stop it, or choose another --save",
        ) from None
    except OSError:  # no locks here
        return file, False
    own = {"host": socket.gethostname(), "pid": os.getpid(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
    with written_whole(
        path, "it says who trains into this folder", "free space on that disk, or choose another --save"
    ):
        file.truncate(0)
        os.write(file.fileno(), json.dumps(own).encode())
    return file, True


def read_object(path: Path, *, rule: str, fix: str, **options: Any) -> dict[str, Any]:
    """The JSON object that a file is.

    Args:
        path: the file; a byte order mark is skipped.
        rule: what the file must be, for the error.
        fix: what to do.
        options: of ``json.loads``.

    Raises:
        UserError: no file, or it does not hold one JSON object.
    """
    try:
        value = json.loads(path.read_bytes(), **options)
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, no text, a number of too many digits
        raise UserError(f"{path} cannot be read ({error})", rule, fix) from error
    if not isinstance(value, dict):
        raise UserError(f"{path} cannot be read (it is a {type(value).__name__})", rule, fix)
    return value


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, where there is none, to be there after a power cut, too: what lies in a folder is
    lost with the entry that names it."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync_folder(each.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` durable, on file systems that can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _published(path: Path) -> Iterator[Path]:
    """Yield a temporary name. What the block makes there is put on the disk and renamed to ``path``; else it is removed."""
    temporary = temporary_name(path)
    try:
        yield temporary
        with written_whole(path):
            for each in (temporary, *temporary.rglob("*")):
                if each.is_dir():
                    sync_folder(each)
                elif each.is_file():
                    with open(each, "rb") as opened:
                        os.fsync(opened.fileno())
            os.replace(temporary, path)  # a folder: onto nothing or an empty one
            sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            _remove(temporary)
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _is_stream(path: Path) -> bool:
    """Whether ``path`` is a device, a pipe, or a name of standard output, wherever that goes."""
    if path.is_symlink() and (path.is_relative_to("/dev") or path.is_relative_to("/proc")):
        return True
    return path.exists() and not path.is_file() and not path.is_dir()


def _write(file: BinaryIO, content: Content) -> None:
    if callable(content):
        content(file)
    else:
        file.write(content.encode() if isinstance(content, str) else content)


def _describe(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
