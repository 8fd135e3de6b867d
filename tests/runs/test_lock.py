"""One writer for a run directory."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
from pathlib import Path

import pytest

from megatron.errors import UserError
from megatron.runs.lock import _describe, lock_run


def hold(run_dir: Path, begun: multiprocessing.Queue, end: multiprocessing.Event) -> None:
    """Take the lock at the same instant as others; say how it went."""
    try:
        _lock, is_held = lock_run(run_dir)
    except UserError as error:
        begun.put(str(error))
        return
    begun.put(is_held)
    end.wait(60)


def test_of_many_that_come_at_one_instant_one_is_let_in(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    begun, end = context.Queue(), context.Event()
    others = [context.Process(target=hold, args=(tmp_path / "run", begun, end)) for _ in range(6)]
    for process in others:
        process.start()
    answers = [begun.get(timeout=60) for _ in others]
    assert answers.count(True) == 1
    refusals = [answer for answer in answers if answer is not True]
    assert all(f"{tmp_path}/run is being trained into by" in text for text in refusals)
    end.set()
    for process in others:
        process.join(60)
    _lock, is_held = lock_run(tmp_path / "run")
    assert is_held  # what ended ones wrote is stale
    assert json.loads((tmp_path / "run/lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b"{}", b"3"], ids=repr)
def test_a_holder_that_wrote_nothing_readable_is_another_process(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lock").write_bytes(content)
    assert _describe(tmp_path / "lock") == "another process"


def test_a_file_system_without_locks_is_told_from_one_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_arguments: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    _lock, is_held = lock_run(tmp_path)
    assert not is_held
