"""One writer for a run directory."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from datetime import datetime
from pathlib import Path

from megatron.errors import Failure, UserError


class RunLock:
    """Held from before the first write until the process ends, however it ends: the kernel gives the lock back.

    A POSIX record lock: it is not inherited by the loader's processes, so a run whose trainer was killed can be continued
    at once, and it works across the hosts of a network file system. The file says who holds it, for people.
    """

    def __init__(self, run_dir: Path) -> None:
        """Take the lock.

        Raises:
            UserError: the folder cannot be written, or another process trains into it; says which, and since when.
            Failure: its disk is full.
        """
        self.path, self.is_held = run_dir / "lock", True
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
        except OSError as error:
            raise UserError(
                f"the run directory {run_dir} cannot be written ({error.strerror})",
                "metrics and checkpoints go there",
                "choose another --save or change its permissions",
            ) from error
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = _describe(self.path)
            self._file.close()
            raise UserError(
                f"{run_dir} is being trained into by {holder}",
                "a run directory belongs to one run at a time",
                "wait for it, stop it, or choose another --save",
            ) from None
        except OSError:  # a file system without locks: nothing can be promised
            self.is_held = False
            return
        own = {"host": socket.gethostname(), "pid": os.getpid(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        try:
            self._file.truncate(0)
            os.write(self._file.fileno(), json.dumps(own).encode())
        except OSError as error:
            self._file.close()
            raise Failure(
                f"{self.path} could not be written ({error.strerror})",
                "it says who trains into this folder",
                "free space on that disk, or choose another --save",
            ) from error

    def close(self) -> None:
        """Give the lock back. The file stays: removing it would race with the next holder."""
        self._file.close()


def _describe(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError):
        return "another process"
