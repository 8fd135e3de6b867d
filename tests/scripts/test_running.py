"""How each ending of a program is printed, and its status."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.commands.running import status_of
from megatron.errors import Failure, UserError

ROOT = Path(__file__).resolve().parents[2]


def raising(error: BaseException):
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("a", "b", "c"), 2, "error: a; b; c"),
        (Failure("a", "b", "c"), 1, "error: a; b; c"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (FileNotFoundError(errno.ENOENT, "", "x.json"), 2, "error: x.json: no such file or directory; it must exist; "),
        (IsADirectoryError(errno.EISDIR, "", "x"), 2, "error: x: is a directory; "),
        (FileExistsError(errno.EEXIST, "", "a", None, "b"), 2, "error: b: file exists; "),
        (PermissionError(errno.EACCES, "", "x"), 1, "error: x: permission denied; "),
        (OSError(errno.ENOSPC, "", "x"), 1, "error: x: no space left on device; its file system is full; "),
        (OSError(errno.EROFS, "", "x"), 1, "error: x: read-only file system; "),
        (ModuleNotFoundError("", name="numpy.linalg"), 1, f"error: {sys.executable} has no package numpy.linalg; "),
        (MemoryError(), 1, "error: out of memory in status_of (megatron/commands/running.py, line "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 1, "error: out of memory in "),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory.\nMore"), 1, "error: out of memory in "),
    ],
    ids=repr,
)
def test_an_error_for_the_user_is_one_line(
    error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(raising(error)) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        RuntimeError("a bug"),
        OSError(errno.ENOSPC, "which file?"),
        OSError(errno.EBADF, "", "x"),
        ModuleNotFoundError("", name="megatron.absent"),
        ModuleNotFoundError("", name="tkinter"),
    ],
    ids=repr,
)
def test_anything_else_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        status_of(raising(error))
    assert raised.value is error


def test_what_main_returns_is_the_status() -> None:
    assert [status_of(lambda: None), status_of(lambda: 0), status_of(lambda: 1)] == [0, 0, 1]


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_closed_pipe_is_quiet(lines: int) -> None:
    """Few lines fail when the interpreter flushes them, many while they are printed."""
    program = f"from megatron.commands.running import run\nrun(lambda: print('x\\n' * {lines}))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_letters_that_the_output_lacks_are_shown_as_escapes(tmp_path: Path) -> None:
    """Also those of an error that the scripts print last, and of the name of a file that is no UTF-8."""
    program = (
        "from megatron.commands.running import run\nfrom megatron.errors import UserError\n"
        "def main():\n print('5.4 \\xb1 0.1 \\udcff')\n raise UserError('\\xb1 \\udcff', 'b', 'c')\nrun(main)"
    )
    others = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    for encoding in (others, {"PYTHONUTF8": "1", "MEGATRON_LAST_WORDS": str(tmp_path / "words")}):
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=os.environ | encoding, capture_output=True, timeout=60
        )
        assert done.returncode == 2, done.stderr
        assert b"\\udcff\n" in done.stdout and b"5.4 " in done.stdout
    assert (tmp_path / "words").read_text() == "error: \xb1 \\udcff; b; c\n"


def test_without_a_standard_output_a_program_ends_as_ever() -> None:
    """``megatron plan ... >&-``: AttributeError after the work was done."""
    program = "from megatron.commands.running import run\nrun(lambda: print('x'))"
    command = ["sh", "-c", 'exec "$0" -c "$1" >&-', sys.executable, program]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def test_another_broken_pipe_is_no_closed_output() -> None:
    program = "from megatron.commands.running import run\ndef main(): raise BrokenPipeError(32, 'a worker')\nrun(main)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "BrokenPipeError" in done.stderr


def test_a_full_disk_under_the_output_is_said() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    program = "from megatron.commands.running import run\nrun(lambda: print('x'))"
    command = [sys.executable, "-c", program]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, cwd=ROOT, env=buffered, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: standard output: no space left on device; ")
    assert done.stderr.count("\n") == 1


def test_no_time_goes_into_cycles_while_packages_are_imported_and_afterwards_it_is_as_ever() -> None:
    """Looks of every kind before, and thereafter with the usual thresholds; a cycle from before is found like any other."""
    program = """
import gc
from megatron.commands.running import run
usual = gc.get_threshold()

def main():
    before = gc.get_stats()
    packages, cycle = [[] for _ in range(280_000)], []
    cycle.append(cycle)
    number = id(cycle)
    assert gc.get_stats() == before
    del cycle
    more = [[] for _ in range(40_000)]
    assert gc.get_threshold() == usual and not gc.get_freeze_count()
    assert gc.get_stats()[0]["collections"] > before[0]["collections"] + 5
    assert any(id(each) == number for each in gc.get_objects())
    gc.collect()
    assert not any(id(each) == number for each in gc.get_objects())

run(main)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
