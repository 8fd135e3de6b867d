"""Files and folders appear whole or not at all, and say what went wrong."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO

import pytest

from megatron.errors import Failure, UserError
from megatron.files import (
    _describe,
    lock_run,
    make_folder,
    one_at_a_time,
    remove_leftovers,
    replace_file,
    replace_folder,
    temporary_name,
    written_whole,
)


def write_parts(file: BinaryIO) -> None:
    file.write(b"one ")
    file.write("zwei\u2028".encode())


@pytest.mark.parametrize(
    ("content", "expected"), [("zwei\u2028", "zwei\u2028"), (b"raw", "raw"), (write_parts, "one zwei\u2028")]
)
def test_text_bytes_and_functions_are_written(tmp_path: Path, content: object, expected: str) -> None:
    target = tmp_path / "x.json"
    target.write_text("old")
    replace_file(target, content)  # type: ignore[arg-type]
    assert target.read_bytes().decode() == expected
    assert os.listdir(tmp_path) == ["x.json"]
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def test_an_error_of_the_content_passes_and_leaves_the_old_file(tmp_path: Path) -> None:
    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        open(tmp_path / "other source")  # noqa: SIM115 - does not exist

    target = tmp_path / "x"
    target.write_text("old")
    with pytest.raises(FileNotFoundError, match="other source"):
        replace_file(target, fail)
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["x"]


def _write_with_little_room(path: Path, outcome: object) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        replace_file(path, b"x" * 5000)
    except Failure as error:
        outcome.put(str(error))  # type: ignore[attr-defined]


def test_a_full_disk_names_the_file_and_the_cure(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.write_text("old")
    context = get_context("fork")
    outcome = context.Queue()
    process = context.Process(target=_write_with_little_room, args=(target, outcome))
    process.start()
    message = outcome.get(timeout=30)
    process.join()
    assert message.startswith(f"{target} could not be written (File too large); it needs") and "free space" in message
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("make", [lambda path: replace_file(path, "new"), lambda path: _make_folder(path)])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, make: Callable[[Path], None]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Failure, match=r"file/x could not be written \((Not a directory|File exists)\)"):
        make(tmp_path / "file" / "x")


def _make_folder(path: Path) -> None:
    with replace_folder(path) as folder:
        (folder / "a").write_text("a")


def test_standard_output_is_written_to_directly(tmp_path: Path) -> None:
    for name in ("/dev/stdout", "/proc/self/fd/1"):
        code = f"from megatron.files import replace_file; replace_file('{name}', 'hello')"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.stdout == "hello", done.stderr
        with open(tmp_path / "log", "w") as log:
            log.write("before ")
            log.flush()
            subprocess.run([sys.executable, "-c", code], stdout=log, check=True, timeout=60)
        assert (tmp_path / "log").read_text() == "before hello"
    assert os.listdir(tmp_path) == ["log"] and Path("/dev/stdout").is_symlink()


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"
    with replace_folder(target) as folder:
        (folder / "a").write_text("a")
        assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["folder"]
    assert (target / "a").read_text() == "a"


def watch_syncs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths as they are put on the disk."""
    synced, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.readlink(f"/proc/self/fd/{file}")), sync(file)))
    return synced


def test_a_power_cut_leaves_whatever_names_a_finished_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync(2): a file needs that of its folder, a folder that of the one above; only what was there needs none."""
    synced = watch_syncs(monkeypatch)
    with replace_folder(tmp_path / "a/b/run") as folder:
        (folder / "inside").mkdir()
        (folder / "inside/file").write_text("x")
    above = {str(tmp_path / name) for name in (".", "a", "a/b")}
    assert set(synced) == above | {str(folder / name) for name in (".", "inside", "inside/file")}
    synced.clear()
    lock, _ = lock_run(tmp_path / "c/run")
    assert set(synced) == {str(tmp_path), str(tmp_path / "c")}
    with lock:
        synced.clear()
        make_folder(tmp_path / "c/run")
    assert not synced


def test_a_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with replace_folder(tmp_path / "folder") as folder:
            (folder / "a").write_text("a")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_finished_folder_is_never_replaced(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "mine").write_text("mine")
    with pytest.raises(UserError, match=r"folder exists and is not empty; a finished folder is never overwritten"):
        _make_folder(target)
    assert (target / "mine").read_text() == "mine"
    assert os.listdir(tmp_path) == ["folder"]
    (target / "mine").unlink()
    _make_folder(target)
    assert [path.name for path in target.iterdir()] == ["a"]
    assert os.listdir(tmp_path) == ["folder"]


def test_a_folder_that_cannot_take_its_place_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: Path) -> None:
        raise OSError("stale file handle")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(Failure, match="stale file handle"):
        _make_folder(tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_what_is_renamed_is_on_the_disk_and_then_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_rename(source: Path, target: Path) -> None:
        done.append(f"-> {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_rename)
    replace_file(tmp_path / "x", "new")
    assert done[0].startswith(".x.") and done[1:] == ["-> x", tmp_path.name]
    done.clear()
    with replace_folder(tmp_path / "folder") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "a").write_text("a")
        (folder / "b").write_text("b")
    synced, named = done[:-2], done[-2:]
    assert {"a", "b", "deep"} <= {*synced} and any(name.startswith(".folder.") for name in synced)
    assert named == ["-> folder", tmp_path.name]


def test_an_error_within_a_folder_names_the_folder(tmp_path: Path) -> None:
    named = pytest.raises(Failure, match=r"events could not be written \(No such file or directory\)")
    with named, written_whole(tmp_path / "events"):
        (tmp_path / "events" / "a" / "b").write_text("")


def test_one_that_waits_enters_when_the_other_has_left(tmp_path: Path) -> None:
    begun, found = threading.Event(), []

    def second() -> None:
        with one_at_a_time(tmp_path / "lock", waiting=begun.set):
            found.append((tmp_path / "made").exists())

    thread = threading.Thread(target=second, daemon=True)
    with one_at_a_time(tmp_path / "lock", waiting=lambda: found.append("waited for nobody")):
        thread.start()
        assert begun.wait(30)
        thread.join(0.2)
        (tmp_path / "made").write_text("")
    thread.join(30)
    assert found == [True]


def test_leftovers_are_removed_when_old_enough(tmp_path: Path) -> None:
    old, young, other = (temporary_name(tmp_path / name) for name in ("a", "a", "b"))
    for path in (old, young, other):
        path.mkdir()
        (path / "part").write_text("half")
    os.utime(old, (0, 0))
    os.utime(other, (0, 0))
    (tmp_path / "a").write_text("finished")
    remove_leftovers(tmp_path, name="a")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a", young.name, other.name])


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
    holder = json.loads((tmp_path / "run/lock").read_text())["pid"]  # whom those that came later have not overwritten
    assert holder in [process.pid for process in others]
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
