"""A full disk while saving: the run ends with a message, and no checkpoint is lost."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from layouts import jobs
from layouts.pool import Process, WorkerPool

from megatron.checkpoint.files import tag_folders
from megatron.checkpoint.select import select

STEPS = 12


def main_with_small_files(limit: int, argv: list[str]) -> int:
    """``main()`` that cannot write a file of more than ``limit`` bytes, as on a disk with so much room left."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return jobs.run_main("mdm", argv)


def assert_intact(run_dir: Path, step: int) -> None:
    """The newest checkpoint is that of ``step``, and its checksums are right."""
    found = select(run_dir)
    assert (found.tag, found.skipped) == (run_dir / f"global_step{step}", ())
    assert (run_dir / "latest").read_text() == f"global_step{step}"
    assert not list(run_dir.glob("*.saving"))


def test_file_that_cannot_be_finished(pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path) -> None:
    expected, run_dir = tmp_path / "expected", tmp_path / "run"
    options = {"train_iters": STEPS, "save_interval": 4, "hidden_dropout": 0.1}
    pools(1).run(jobs.train, "mdm", jobs.flags(token_files, expected, **options))
    options["load"] = run_dir
    first = jobs.flags(token_files, run_dir, **{**options, "exit_duration_in_mins": 1e-6})
    assert Process(jobs.run_main, "mdm", first).wait() == 75  # stopped, with a checkpoint of step 1
    argv = jobs.flags(token_files, run_dir, **options)
    process = Process(main_with_small_files, 500_000, argv)
    assert process.wait() == 1, process.output
    message = process.output.strip().splitlines()[-1]
    assert message.startswith("error: checkpoint") and "global_step4 could not be written (rank 0: " in message
    assert "File too large" in message and "earlier checkpoints are complete and untouched" in message
    assert "Traceback" not in process.output
    assert_intact(run_dir, 1)
    assert Process(jobs.run_main, "mdm", argv).wait() == 0  # with room again
    assert_intact(run_dir, STEPS)
    losses = [{s: r["loss"] for s, r in jobs.records(folder).items()} for folder in (run_dir, expected)]
    assert losses[0] == losses[1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for two checkpoints of 1.4 MB and a bit."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, *, leave: int) -> None:
    """Leave so many bytes of room."""
    with open(disk / "rest", "wb", buffering=0) as rest:
        with contextlib.suppress(OSError):
            while rest.write(b"0" * 4096):
                pass
        rest.truncate(rest.tell() - leave)


def test_a_full_disk_under_the_lock_or_tensorboard_is_one_line(
    token_files: Path, tmp_path: Path, small_disk: Path
) -> None:
    fill(small_disk, leave=0)
    process = Process(jobs.run_main, "mdm", jobs.flags(token_files, small_disk / "run"))
    assert process.wait() == 1 and f"error: {small_disk}/run/lock could not be written" in process.output
    fill(small_disk, leave=16384)
    options = {"tensorboard_dir": small_disk / "events", "tensorboard_queue_size": 1, "train_iters": 3000}
    process = Process(jobs.run_main, "mdm", jobs.flags(token_files, tmp_path / "run", **options))
    assert process.wait() == 1, process.output
    assert f"error: {small_disk}/events could not be written (No space left on device)" in process.output


def test_disk_without_room(token_files: Path, small_disk: Path) -> None:
    run_dir = small_disk / "run"
    process = Process(jobs.run_main, "mdm", jobs.flags(token_files, run_dir, train_iters=STEPS, save_interval=4))
    assert process.wait() == 1, process.output
    assert "global_step12 could not be written" in process.output and "No space left" in process.output
    assert "Traceback" not in process.output
    assert [tag.name for tag in tag_folders(run_dir)] == ["global_step8", "global_step4"]
    assert_intact(run_dir, 8)


def main_killed_behind_a_validation(step: int, run_dir: Path, is_beside: bool, argv: list[str]) -> int:
    """``main()`` that is killed while it writes the checkpoint of ``step``, when the validation of that step is through."""
    from megatron.checkpoint import writer

    original = writer.save_file

    def save_file(tensors: Any, path: Path, metadata: Any = None) -> str:
        if path.parent.name == f"global_step{step}.saving":
            while is_beside and json.loads((run_dir / "best.json").read_text())["step"] != step:
                time.sleep(0.01)
            time.sleep(0.5 * is_beside)  # all that follows the validation
            os._exit(137)
        return original(tensors, path, metadata)

    with mock.patch.object(writer, "save_file", save_file):
        return jobs.run_main("ar", argv)


@pytest.mark.parametrize("is_beside", [True, False])
def test_a_kill_in_the_save_of_a_new_best_leaves_the_best_one_before(
    token_files: Path, tmp_path: Path, is_beside: bool
) -> None:
    """Every validation is the best so far. Beside the training the checkpoint is begun before the validation, else by it."""
    run_dir = tmp_path / "run"
    options = {"train_iters": 7, "eval_interval": 3, "eval_iters": 1, "valid_data_path": token_files / "valid", "keep_last": 1,
               "save_best": True, "load": run_dir, "async_save": is_beside}  # fmt: skip
    options["save_interval"] = 1 if is_beside else 5
    argv = jobs.flags(token_files, run_dir, **options)
    process = Process(main_killed_behind_a_validation, 6, run_dir, is_beside, argv)
    assert process.wait() == 137, process.output
    assert [tag.name for tag in tag_folders(run_dir)] == ["global_step5", "global_step3"], process.output
    assert Process(jobs.run_main, "ar", argv).wait() == 0
    assert [tag.name for tag in tag_folders(run_dir)] == ["global_step7"]
    assert json.loads((run_dir / "best.json").read_text())["step"] == 7
