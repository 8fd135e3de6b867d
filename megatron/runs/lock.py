"""One writer for a run directory."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from datetime import datetime
from pathlib import Path
from typing import TextIO

from megatron.errors import UserError
from megatron.files import written_whole


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
        run_dir.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
    except OSError as error:
        raise UserError(
            f"the run directory {run_dir} cannot be written ({error.strerror})",
            "metrics and checkpoints go there",
            "choose another --save or change its permissions",
        ) from error
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


def _describe(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
