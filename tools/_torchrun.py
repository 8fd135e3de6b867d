"""``torchrun`` that ends as its processes ended, without a traceback about them: the launcher of the example scripts.

torchrun turns every end of a process into status 1 and a report of its own: "stopped and saved" (75) and wrong flags (2)
would look like a crash. Which process failed first decides here; what it printed stands above. SIGUSR1, at which torchrun ends
alone, goes to its processes, which save and end in their own time (SLURM may send it to every process of a job).
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

from _run import run

STOPPED = 75  # EX_TEMPFAIL: saved before the end, to be continued


def main() -> int:
    """Run torchrun's command line; returns the status of the process that ended first, 128 + N where signal N did it."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as torchrun

    signal.signal(signal.SIGUSR1, _pass_on)
    try:
        torchrun(parse_args(sys.argv[1:]))
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        if status != STOPPED:
            print(f"rank {rank} ended first, with status {status}; all others were ended", file=sys.stderr)
        return status
    return 0


def _pass_on(number: int, _frame: FrameType | None) -> None:
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                os.kill(int(folder.name), number)


if __name__ == "__main__":
    run(main)
