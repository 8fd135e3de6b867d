"""A run that is killed and resumed writes the same metrics, bit for bit, as one that was left alone.

Kills are real (SIGKILL), dropout is on, and log lines, checkpoints and validations fall on different steps, so that a
sum carried wrongly over a restart would show.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from layouts import jobs
from layouts.pool import ENVIRONMENT, Process, WorkerPool

from megatron.checkpoint.files import tag_folders
from megatron.checkpoint.reader import CheckpointReader
from megatron.checkpoint.select import select

REPO = Path(__file__).resolve().parents[2]
STEPS = 40
TIMINGS = {"seconds", "step_seconds", "tokens_per_second", "tflops", "mfu"}


def options(tokens: Path, **changes: Any) -> dict[str, Any]:
    return {
        "train_iters": STEPS,
        "save_interval": 5,
        "log_interval": 2,
        "eval_interval": 6,
        "eval_iters": 1,
        "valid_data_path": tokens / "valid",
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "lr_warmup_samples": 50,
        "ema_decay": 0.9,
        "lr_decay_style": "inverse-square-root",
        **changes,
    }


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Every line, without what a clock decides."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def last_step(run_dir: Path) -> int:
    """Step of the last complete line so far."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def assert_same_run(run_dir: Path, reference: Path) -> None:
    """Equal metrics, and equal tensors in the last checkpoint."""
    assert metrics(run_dir) == metrics(reference)
    ours, theirs = (CheckpointReader(folder / f"global_step{STEPS}") for folder in (run_dir, reference))
    held = theirs._tp_sizes.keys()  # (kind, name): Muon's matrices have a momentum, the rest Adam's moments
    assert ours._tp_sizes.keys() == held and {kind for kind, _ in held} >= {"weight", "exp_avg", "exp_avg_sq", "ema"}
    for kind, name in held:
        assert ours.tensor(name, kind).equal(theirs.tensor(name, kind)), (kind, name)


def resume(pools: Callable[[int], WorkerPool], tokens: Path, run_dir: Path, size: int = 1, **changes: Any) -> str:
    """Continue the run to its end, in the pool; returns what the first rank printed."""
    argv = jobs.flags(tokens, run_dir, load=run_dir, **options(tokens, **changes))
    traces = pools(size).run(jobs.train, "mdm", argv)
    assert [trace.status for trace in traces] == [0] * size
    return pools(size).output(0)


@pytest.fixture(scope="module")
def straight(pools: Callable[[int], WorkerPool], token_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("straight")
    traces = pools(1).run(jobs.train, "mdm", jobs.flags(token_files, run_dir, **options(token_files)))
    assert traces[0].status == 0
    kinds = [line["kind"] for line in metrics(run_dir)]
    assert [kinds.count(kind) for kind in ("train", "valid", "valid_ema")] == [20, 7, 7]
    return run_dir


def command(tokens: Path, run_dir: Path, *launcher: str, **changes: Any) -> subprocess.Popen:
    """``python pretrain_mdm.py``, or the same under a launcher, in a session of its own."""
    argv = jobs.flags(tokens, run_dir, **options(tokens, **changes))
    return subprocess.Popen(
        [sys.executable, *launcher, str(REPO / "pretrain_mdm.py"), *argv],
        stdout=open(f"{run_dir}.log", "a"),
        stderr=subprocess.STDOUT,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPO)},
    )


def wait_for_step(process: subprocess.Popen, run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 180
    while last_step(run_dir) < step:
        assert process.poll() is None and time.monotonic() < deadline, Path(f"{run_dir}.log").read_text()
        time.sleep(0.02)


def test_killed_program_resumes_bit_for_bit(token_files: Path, tmp_path: Path, straight: Path) -> None:
    """The real program, with loader processes, killed in the middle and started again with the same command."""
    run_dir = tmp_path / "run"
    process = command(token_files, run_dir, load=run_dir, num_workers=2)  # nothing to load yet: starts fresh
    wait_for_step(process, run_dir, 12)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 12 <= last_step(run_dir) < STEPS
    process = command(token_files, run_dir, load=run_dir, num_workers=2)
    assert process.wait(timeout=180) == 0, Path(f"{run_dir}.log").read_text()
    assert_same_run(run_dir, straight)


def children(pid: int) -> list[int]:
    """Child processes of a process."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def test_torchrun_with_a_killed_worker_resumes_bit_for_bit(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path
) -> None:
    """Two data-parallel processes of which one is killed; the launcher fails, and the same command continues."""
    expected, run_dir = tmp_path / "expected", tmp_path / "run"
    traces = pools(2).run(jobs.train, "mdm", jobs.flags(token_files, expected, **options(token_files)))
    assert [trace.status for trace in traces] == [0, 0]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    process = command(token_files, run_dir, *launcher, load=run_dir)
    wait_for_step(process, run_dir, 12)
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    assert process.wait(timeout=180) != 0
    assert last_step(run_dir) < STEPS
    process = command(token_files, run_dir, *launcher, load=run_dir)
    assert process.wait(timeout=180) == 0, Path(f"{run_dir}.log").read_text()
    assert_same_run(run_dir, expected)


def train_and_die_while_saving(step: int, moment: str, argv: list[str]) -> int:
    """``main()`` that kills itself at one moment of saving one step."""
    from megatron.checkpoint import files, writer
    from megatron.training.main import main

    save_file, replace_file, replace = writer.save_file, files.replace_file, os.replace

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def save_shard(tensors: Any, path: Path, metadata: Any = None) -> str:
        checksum = save_file(tensors, path, metadata)
        if f"global_step{step}." in str(path):
            if moment == "in the middle of a shard":
                os.truncate(path, os.path.getsize(path) // 2)
            if "shard" in moment:
                die()
        return checksum

    def write(path: Path, text: str) -> None:
        is_manifest = path.name == "manifest.json" and f"global_step{step}." in str(path)
        if is_manifest and moment == "in the middle of the manifest":
            path.with_name(".manifest.json.1.tmp").write_text(text[:100])
            die()
        replace_file(path, text)
        if is_manifest and moment == "after the manifest":
            die()

    def move(source: Path, target: Path) -> None:
        is_pointer = Path(target).name == "latest" and Path(source).read_text() == f"global_step{step}"
        if is_pointer and moment == "before latest moves":
            die()
        replace(source, target)

    with (
        mock.patch.object(writer, "save_file", save_shard),
        mock.patch.object(os, "replace", move),
        mock.patch.object(files, "replace_file", write),
    ):
        return main("mdm", argv)


@pytest.mark.parametrize(
    ("moment", "survivor", "is_beside"),
    [
        ("in the middle of a shard", 5, False),
        ("in the middle of a shard", 5, True),
        ("after a shard", 5, False),
        ("in the middle of the manifest", 5, False),
        ("after the manifest", 5, True),
        ("before latest moves", 10, False),
    ],
)
def test_killed_while_saving_loses_no_checkpoint(
    pools: Callable[[int], WorkerPool],
    token_files: Path,
    tmp_path: Path,
    straight: Path,
    moment: str,
    survivor: int,
    is_beside: bool,
) -> None:
    """Also in a thread, beside the training."""
    run_dir = tmp_path / "run"
    argv = jobs.flags(token_files, run_dir, **options(token_files, async_save=is_beside))
    process = Process(train_and_die_while_saving, 10, moment, argv)
    assert process.wait() == -signal.SIGKILL, process.output
    found = select(run_dir)
    assert (found.tag, found.skipped) == (run_dir / f"global_step{survivor}", ())
    assert (run_dir / "latest").read_text() == "global_step5"
    assert f"continuing at step {survivor}" in resume(pools, token_files, run_dir)
    assert_same_run(run_dir, straight)
    assert not list(run_dir.glob("*.saving")) and not list(run_dir.rglob("*.tmp"))


def train_with_slow_writes(argv: list[str]) -> list[tuple[int, list[str]]]:
    """Training whose files take longer than a step to write. Returns, at the beginning of each step, which tags are there."""
    import time

    from megatron.checkpoint import writer
    from megatron.checkpoint.files import tag_folders

    seen: list[tuple[int, list[str]]] = []
    run_dir = Path(argv[argv.index("--save") + 1])

    def write_slowly(*given: Any) -> str:
        time.sleep(0.5)
        return save_file(*given)

    def begins(step: int) -> None:
        seen.append((step, [tag.name for tag in tag_folders(run_dir)]))
        time.sleep(0.1)

    save_file = writer.save_file
    with mock.patch.object(writer, "save_file", write_slowly):
        trace = jobs.train("mdm", argv, begins=begins)
    assert trace.status == 0
    return seen


@pytest.mark.parametrize("size", [1, 2])
def test_saves_beside_the_training_are_those_that_it_waits_for(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path, size: int
) -> None:
    """Bit for bit, --keep-last and --save-best included; a tag is there some steps later, and every tag at the end."""
    changes = {"save_interval": 8, "keep_last": 1, "save_best": True, "eval_interval": 6, "train_iters": 20}
    changes |= {"tp_size": size, "load": None}
    folders = {}
    for is_beside in (False, True):
        run_dir = folders[is_beside] = tmp_path / f"beside_{is_beside}"
        argv = jobs.flags(token_files, run_dir, **options(token_files, **changes, async_save=is_beside))
        seen = pools(size).run(train_with_slow_writes, argv)[0]
        known = dict(seen)
        assert ("global_step8" in known[9]) != is_beside
        assert "global_step8" in known[16] or "global_step12" in known[16]
        said = pools(size).output(0)
        assert ("s of them waited for)" in said) == is_beside
    names = [sorted(tag.name for tag in tag_folders(folder)) for folder in folders.values()]
    assert names[0] == names[1] and "global_step20" in names[0]
    for name in names[0]:
        shards = [sorted((folder / name).glob("*.safetensors")) for folder in folders.values()]
        assert [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]]
    assert (folders[True] / "latest").read_text() == "global_step20"
    assert not list(folders[True].glob("*.saving"))


def test_resume_with_more_data_parallel_ranks(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path
) -> None:
    """Killed on one process, resumed on two: equal to 1e-5 (without dropout, which differs between ranks)."""
    changes = {"hidden_dropout": 0, "attention_dropout": 0}
    expected, run_dir = tmp_path / "expected", tmp_path / "run"
    pools(1).run(jobs.train, "mdm", jobs.flags(token_files, expected, **options(token_files, **changes)))
    argv = jobs.flags(token_files, run_dir, **options(token_files, **changes))
    process = Process(train_and_die_while_saving, 20, "after a shard", argv)
    assert process.wait() == -signal.SIGKILL
    assert "continuing at step 15" in resume(pools, token_files, run_dir, size=2, **changes)
    ours, theirs = jobs.records(run_dir), jobs.records(expected)
    assert list(ours) == list(theirs)
    for step, record in theirs.items():
        assert ours[step]["loss"] == pytest.approx(record["loss"], abs=1e-5, rel=0)
        assert ours[step]["grad_norm"] == pytest.approx(record["grad_norm"], rel=1e-4)
    ours, theirs = jobs.records(run_dir, "valid"), jobs.records(expected, "valid")
    assert [r["nll"] for r in ours.values()] == pytest.approx([r["nll"] for r in theirs.values()], abs=1e-5, rel=0)


def damage_size(tag: Path) -> str:
    shard = next(tag.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)
    return "bytes instead of"


def damage_contents(tag: Path) -> str:
    shard = next(tag.glob("*.safetensors"))
    contents = bytearray(shard.read_bytes())
    contents[-5] ^= 1
    shard.write_bytes(contents)
    return "fails its checksum"


def damage_by_removal(tag: Path) -> str:
    next(tag.glob("*.safetensors")).unlink()
    return "is missing"


@pytest.mark.parametrize("damage", [damage_size, damage_contents, damage_by_removal])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path, straight: Path, damage: Callable
) -> None:
    run_dir = tmp_path / "run"
    argv = jobs.flags(token_files, run_dir, **options(token_files))
    assert Process(train_and_die_while_saving, 15, "after a shard", argv).wait() == -signal.SIGKILL
    complaint = damage(run_dir / "global_step10")
    output = resume(pools, token_files, run_dir)
    assert "warning: skipped checkpoints: global_step10 (shard-00000.safetensors" in output
    assert complaint in output and "continuing at step 5" in output
    assert_same_run(run_dir, straight)


def test_nothing_but_damaged_checkpoints_is_an_error(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    argv = jobs.flags(token_files, run_dir, **options(token_files, train_iters=5, lr_warmup_samples=0))
    assert pools(1).run(jobs.train, "mdm", argv)[0].status == 0
    before = (run_dir / "metrics.jsonl").read_text()
    argv = jobs.flags(token_files, run_dir, load=run_dir, **options(token_files, train_iters=10))
    # The first shows only in the checksums, after the groups have started.
    for damage in (damage_contents, damage_size):
        damage(run_dir / "global_step5")
        (trace,) = pools(1).run(jobs.train, "mdm", argv)
        assert trace.status == 2
        assert "can be used" in pools(1).output(0) and "Traceback" not in pools(1).output(0)
    assert (run_dir / "metrics.jsonl").read_text() == before


STOPS: dict[str, tuple[str, dict[str, Any]]] = {
    "SIGTERM": ("SIGTERM", {}),
    "SIGUSR1": ("SIGUSR1", {}),
    "SIGINT": ("SIGINT", {}),
    "kill switch": ("the kill-switch file", {"kill_switch_file": "STOP"}),
    "duration": ("--exit-duration-in-mins", {"exit_duration_in_mins": 1e-6}),
    "interval": ("--exit-interval", {"exit_interval": 6}),
}


@pytest.mark.parametrize("stop", list(STOPS))
def test_a_stopped_run_saves_exits_with_75_and_resumes(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path, straight: Path, stop: str
) -> None:
    run_dir = tmp_path / "run"
    reason, changes = STOPS[stop]
    changes = {**changes, "kill_switch_file": tmp_path / "STOP"} if stop == "kill switch" else changes
    argv = jobs.flags(token_files, run_dir, **options(token_files, save_interval=None, **changes))
    process = Process(jobs.run_main, "mdm", argv)
    if stop not in ("duration", "interval"):
        process.wait_until(lambda: last_step(run_dir) >= 6)
        if stop == "kill switch":
            (tmp_path / "STOP").touch()
        else:
            process.signal(signal.Signals[stop])
    assert process.wait() == 75, process.output
    (tag,) = tag_folders(run_dir)
    step = int(tag.name.removeprefix("global_step"))
    exact = {"duration": 1, "interval": 6}
    assert step == exact[stop] if stop in exact else 6 <= step < STEPS
    assert f"stopped by {reason}" in process.output
    assert f"at step {step}; checkpoint of step {step} saved" in process.output
    resume(pools, token_files, run_dir)
    assert_same_run(run_dir, straight)
