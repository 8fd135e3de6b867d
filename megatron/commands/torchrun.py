"""``torchrun`` that ends as its processes ended, with their error as the last line: the launcher of the example scripts.

torchrun turns every end of a process into status 1 and a report of its own: "stopped and saved" (75) and wrong flags (2)
would look like a crash. Which process failed first decides here, and what it had to say is printed when all have ended.
SIGUSR1, at which torchrun ends alone, goes to its processes, which save and end in their own time (SLURM may send it to every
process of a job).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from megatron.commands.running import run
from megatron.errors import Failure

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

STOPPED = 75  # EX_TEMPFAIL: saved before the end, to be continued
GONE = "gone without a word"  # of another process, as Connection.peer_failure says it
# Signals with which the system ends a program for a fault of its own.
FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL}


def main() -> int:
    """Run torchrun's command line; returns the status of the process that ended first, 128 + N where signal N did it.

    Raises:
        Failure: the processes could not meet.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as torchrun

    signal.signal(signal.SIGUSR1, _pass_on)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # tells in 20 lines who ended whom
    with tempfile.TemporaryDirectory(prefix="torchrun-") as folder:
        words = Path(os.environ.setdefault("MEGATRON_LAST_WORDS", f"{folder}/words"))
        try:
            torchrun(parse_args(sys.argv[1:]))
        except SignalException as error:
            return 128 + int(error.sigval)
        except (DistError, RendezvousError) as error:
            given = f"torchrun: {str(error).strip().splitlines()[0]}"
            raise Failure(
                given, "all nodes meet at MASTER_ADDR:MASTER_PORT", "check the address, or another port"
            ) from error
        except ChildFailedError as error:
            said = words.read_text() if words.exists() else ""
            rank, failure = _first_to_end(error, said)
            status = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
            if said and not (GONE in said and _is_mute(failure)):
                print(said, end="", file=sys.stderr)
            elif status != STOPPED:
                print(f"error: {_without_a_word(rank, failure.exitcode)}", file=sys.stderr)
            return status
    return 0


def _first_to_end(error: ChildFailedError, said: str) -> tuple[int, ProcessFailure]:
    """Rank and end of the process that ended first.

    Others may miss one that was killed before torchrun does, which looks ten times a second and counts whole seconds; those
    that torchrun ends itself end after that, by SIGTERM or much later.
    """
    rank, first = error.get_first_failure()
    for other, failure in error.failures.items() if GONE in said else ():
        is_own_end = _is_mute(failure) and failure.exitcode != -signal.SIGTERM
        if is_own_end and failure.timestamp <= first.timestamp + 1:
            return other, failure
    return rank, first


def _is_mute(failure: ProcessFailure) -> bool:
    """Whether a process left no error."""
    return failure.error_file == "<N/A>"


def _without_a_word(rank: int, code: int) -> str:
    """The line about a process that left none: what it printed itself stands above."""
    if code < 0:
        number = signal.Signals(-code)
        name, why = number.name, "a fault of compiled code does that" if number in FAULTS else "somebody sent it"
        why = "the system does that when memory runs out" if name == "SIGKILL" else why
        return f"rank {rank} was ended by {name}; {why}; see the system's log, then start again"
    return f"rank {rank} ended first, with status {code}; a run needs all its ranks; see what it printed above"


def _pass_on(number: int, _frame: FrameType | None) -> None:
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                os.kill(int(folder.name), number)


if __name__ == "__main__":
    run(main)
