"""How every program starts and ends: one line for what the user can mend, a traceback for what only a developer can.

| how ``main`` ends | printed | status |
|---|---|---|
| returns | | what it returned (None: 0) |
| ``UserError``, wrong flags, the name of no file | ``error: given; rule; fix`` | 2 |
| ``Failure``; a file that may not be used, a full disk | ``error: given; rule; fix`` | 1 |
| a package is missing | how to reach or make the environment | 1 |
| memory, of the host or a device, is used up | ``error: given; rule; fix`` | 1 |
| Ctrl-C | ``interrupted`` | 130 |
| the reader of a pipe is gone (``tool \\| head``) | | 141, as of any program that SIGPIPE ends |
| anything else | its traceback | 1 |

A tool imports packages inside its functions, so that ``--help`` answers at once and a missing one is caught here.
"""

from __future__ import annotations

import atexit
import errno
import gc
import os
import select
import sys
import traceback
from collections.abc import Callable
from io import TextIOWrapper
from typing import NoReturn

from megatron.errors import Failure, UserError
from megatron.parallel.launch import complain
from megatron.screen import drop

# Error numbers of files: the rule, and what to do.
WRONG_NAMES = {
    errno.ENOENT: ("it must exist", "check the name"),
    errno.ENOTDIR: ("a part of the path is no folder", "check the name"),
    errno.EISDIR: ("a file is needed there", "name a file, not a folder"),
    errno.EEXIST: ("it is never overwritten", "remove it or name another"),
}
REFUSED = {
    errno.EACCES: ("this user may not use it", "change its permissions or name another"),
    errno.EPERM: ("this user may not change it", "change its owner or name another"),
    errno.EROFS: ("its file system is read-only", "name a place that can be written"),
    errno.ENOSPC: ("its file system is full", "free space there or name another place, and run again"),
    errno.EDQUOT: ("the quota is used up", "free space there or name another place, and run again"),
}

IMPORTED = 300_000  # objects that may be parts of cycles; torch makes 275,000


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call ``main`` and leave with the status of the table above. A process of several that fails ends at once: on Python's way
    out it would wait for the others, which may wait for it."""
    begin()
    try:
        status = status_of(main)
    except BaseException as error:
        if not _is_one_of_several():
            raise
        _end(error)
    if _is_one_of_several():  # it did not part from them
        _end(status)
    sys.exit(status)


def begin() -> None:
    """What every program does first.

    At its end the interpreter would look through all that was imported for cycles to free, 0.3 to 0.6 processor seconds with
    DeepSpeed; the system takes the memory anyway. It would look some 370 times while torch is imported, too, 0.13 of 1.1
    seconds; so the first look waits until there is more than that, and the others come at their usual times. And no letter that
    the encoding of the output lacks (``±`` in ASCII, the name of a file that is no UTF-8) ends a program: it is shown as an
    escape, as on standard error.
    """
    atexit.register(gc.freeze)
    usual = gc.get_threshold()
    if "torch" not in sys.modules and 0 < usual[0] < IMPORTED:

        def as_usual(_phase: str, info: dict[str, int]) -> None:
            if info["generation"] == 0:
                gc.callbacks.remove(as_usual)
                gc.freeze()
                gc.unfreeze()  # all of them among the old ones, which a look at the young ones leaves out
                gc.set_threshold(*usual)

        gc.callbacks.append(as_usual)
        gc.set_threshold(IMPORTED, *usual[1:])
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def status_of(main: Callable[[], int | None]) -> int:
    """Call ``main``, print its error if it is one for the user, and return the exit status.

    Raises:
        Exception: whatever is a fault of the program.
        SystemExit: ``main`` left by itself (argparse).
    """
    try:
        return _flushed(main() or 0)
    except UserError as error:
        return _say(error)
    except ModuleNotFoundError as error:
        return missing_package(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        drop(sys.stdout.fileno(), for_good=True)
        return 141
    except OSError as error:
        if error.errno not in WRONG_NAMES | REFUSED or error.filename is None:
            raise
        kind = UserError if error.errno in WRONG_NAMES else Failure
        given = f"{_named(error)}: {os.strerror(error.errno).lower()}"
        return _say(kind(given, *(WRONG_NAMES | REFUSED)[error.errno]))
    except (MemoryError, RuntimeError) as error:
        if (status := out_of_memory(error)) is None:
            raise
        return status


def _is_one_of_several() -> bool:
    if "megatron.parallel.connection" not in sys.modules:
        return False
    from megatron.parallel.connection import is_connected

    return is_connected()


def _end(how: BaseException | int) -> NoReturn:
    from megatron.parallel.connection import end_process, show
    from megatron.parallel.launch import Launch

    if isinstance(how, BaseException):
        show(how, rank=Launch.from_environment().rank)
    end_process(1 if isinstance(how, BaseException) else how)


def missing_package(error: ModuleNotFoundError) -> int:
    """Say how to reach the environment that has a package; returns the exit status.

    Raises:
        ModuleNotFoundError: it is none that comes with a package.
    """
    if not _is_package(error.name):
        raise error
    fix = "run: source .venv/bin/activate, or bash install.sh where there is none yet"
    return _say(Failure(f"{sys.executable} has no package {error.name}", "programs run in the environment", fix))


def out_of_memory(error: MemoryError | RuntimeError) -> int | None:
    """Say where memory was used up, and what to do; returns the exit status, None for any other error."""
    said = str(error).partition("\n")[0]
    is_of_torch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in said
    if not isinstance(error, MemoryError) and not is_of_torch:
        return None
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # of this package
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(root + os.sep)]
    place = f" in {own[-1].name} (megatron{own[-1].filename.removeprefix(root)}, line {own[-1].lineno})"
    fix = "make it smaller, or take more devices; megatron doctor --preflight says what a training run needs"
    return _say(Failure(f"out of memory{place}: {said or 'no more to be had'}", "model and data must fit", fix))


def _flushed(status: int) -> int:
    """``status``, once all output has left. A full disk under it is an error that names standard output."""
    try:
        if sys.stdout is not None:  # closed by who started us: what is printed goes nowhere
            sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            drop(sys.stdout.fileno(), for_good=True)
            error.filename = "standard output"
        raise
    return status


def _say(error: UserError) -> int:
    complain(f"error: {error}")
    return error.exit_status


def _named(error: OSError) -> str:
    """The file of an error; of two (a rename), the second is where it should have gone."""
    return str(error.filename if error.filename2 is None else error.filename2)


def _is_package(name: str | None) -> bool:
    """Whether a module comes with an installed package, neither with Python nor with this checkout."""
    top = (name or "").partition(".")[0]
    return bool(top) and top != "megatron" and top not in sys.stdlib_module_names


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
