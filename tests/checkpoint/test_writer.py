"""Writing a tag: what its file holds; beside the training or not; over one that exists already."""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import time
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import safetensors.torch
import torch
from layouts.pool import Process

from megatron.checkpoint import writer
from megatron.checkpoint.files import Fragment, complaints, tag_folders
from megatron.checkpoint.reader import CheckpointReader
from megatron.checkpoint.select import select
from megatron.checkpoint.upkeep import sweep_leftovers
from megatron.checkpoint.writer import Saving, Staging
from megatron.errors import Failure
from megatron.objectives import parse
from megatron.parallel.context import ParallelContext
from megatron.parallel.sharding import ShardSpec


def save(run_dir: Path, value: float) -> Path:
    """Step 5 of a model of one tensor that is ``value`` everywhere."""
    config = parse(["--model", "7M", "--train-samples", "8", "--seq-length", "8"], objective="ar")
    return Saving(
        run_dir,
        fragments=[Fragment("weight", "w", 0, 1, 0, torch.full((4,), value))],
        specs={"w": ShardSpec((4,))},
        state={"step": 5, "consumed_samples": 0, "optimizer_steps": 0, "config": config},
        context=ParallelContext(),
    ).publish()


def value(run_dir: Path) -> float:
    """What the newest complete checkpoint holds."""
    found = select(run_dir)
    assert found.tag is not None and not found.skipped
    return float(CheckpointReader(found.tag).tensor("w").unique())


def test_the_second_save_of_a_step_replaces_the_first(tmp_path: Path) -> None:
    save(tmp_path, 1.0)
    tag = save(tmp_path, 2.0)
    assert value(tmp_path) == 2.0
    assert sorted(path.name for path in tmp_path.iterdir()) == [tag.name, "latest"]


def test_what_a_name_promises_is_on_the_disk_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, Path.rename

    def name_of(path: str | Path) -> str:
        return re.sub(r"^\.(.*)\.[0-9]+\.[0-9a-f]{8}\.tmp$", r"\1", Path(path).name)  # a temporary one: what it becomes

    def note_fsync(descriptor: int) -> None:
        done.append(name_of(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        done.append(f"-> {target.name}")
        replace(source, target)

    def note_rename(self: Path, target: Path) -> Path:
        done.append(f"-> {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    monkeypatch.setattr(Path, "rename", note_rename)
    save(tmp_path, 1.0)
    tag, saving = "global_step5", "global_step5.saving"
    assert done == ["shard-00000.safetensors", "manifest.json", "-> manifest.json", saving,
                    "latest.next", "-> latest.next", tmp_path.name, f"-> {tag}", "-> latest"]  # fmt: skip


def test_shards_that_an_interrupted_save_of_more_ranks_left_are_not_of_the_tag(tmp_path: Path) -> None:
    scratch = tmp_path / "global_step5.saving"
    scratch.mkdir()
    (scratch / "shard-00001.safetensors").write_bytes(b"half")
    tag = save(tmp_path, 1.0)
    assert sorted(path.name for path in tag.iterdir()) == ["manifest.json", "shard-00000.safetensors"]


def test_a_disk_that_takes_parts_of_a_block_gets_all_of_it() -> None:
    class Slow:
        taken = b""

        def write(self, data: memoryview) -> int:
            self.taken += bytes(data[:3])
            return min(3, len(data))

    file = Slow()
    writer._write_all(file, memoryview(b"eleven bytes"))  # type: ignore[arg-type]
    assert file.taken == b"eleven bytes"


@pytest.mark.parametrize("refused", ["", ".saving"], ids=["old one out", "new one in"])
def test_a_save_that_cannot_take_the_place_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    save(tmp_path, 1.0)
    rename = Path.rename

    def refuse_new(self: Path, target: Path) -> Path:
        if self.suffix == refused:
            raise OSError("stale file handle")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(Failure, match="stale file handle"):
        save(tmp_path, 2.0)
    assert value(tmp_path) == 1.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step5", "latest"]


def test_a_failure_after_the_exchange_loses_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1.0)
    replace = os.replace

    def refuse_latest(source: Path, target: Path) -> None:
        if Path(target).name == "latest":
            raise OSError("stale file handle")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_latest)
    with pytest.raises(Failure, match="stale file handle"):
        save(tmp_path, 2.0)
    assert value(tmp_path) == 2.0
    monkeypatch.undo()
    save(tmp_path, 3.0)
    assert value(tmp_path) == 3.0
    assert not list(tmp_path.glob("*.replaced"))


CONFIG = parse(["--model", "7M", "--train-samples", "8", "--seq-length", "8"], objective="ar")
IS_STORM = os.environ.get("STORM") == "1"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_is_that_of_the_library_and_hashed_as_it_is_written(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {f"b/é{size}": torch.randn(size, 3).to(dtype) for size in (1, 7, 500_000)}
    tensors |= {"a/empty": torch.empty(0, dtype=dtype), "a/transposed": torch.randn(5, 4).to(dtype).t()}
    tensors |= {"z/wider": torch.arange(3)}  # which comes first
    for metadata in (None, {"format": "pt"}):
        checksum = writer.save_file(tensors, tmp_path / "ours", metadata)
        plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(plain, tmp_path / "theirs", metadata)
        content = (tmp_path / "ours").read_bytes()
        assert content == (tmp_path / "theirs").read_bytes()
        assert checksum == hashlib.sha256(content).hexdigest()


def begin(run_dir: Path, data: torch.Tensor, step: int, staging: Staging | None) -> Saving:
    """Weights and a moment of one tensor."""
    kinds = [Fragment(kind, "w", 0, 1, 0, data) for kind in ("weight", "exp_avg")]
    state = {"step": step, "consumed_samples": 0, "optimizer_steps": 0, "config": CONFIG}
    specs = {"w": ShardSpec((data.numel(),))}
    return Saving(run_dir, fragments=kinds, specs=specs, state=state, context=ParallelContext(), staging=staging)


def test_a_save_beside_the_training_holds_what_was_there_when_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer is held up until the weights have changed: the files are those of a save that was waited for."""
    staging, go, save_file = Staging(), Event(), writer.save_file

    def slow(tensors: Any, path: Path, metadata: Any = None) -> str:
        assert go.wait(60)
        return save_file(tensors, path, metadata)

    for step in (5, 6):  # the second in the same memory
        data = torch.full((3000,), float(step))
        begin(tmp_path / "waited", data, step, None).publish()
        with monkeypatch.context() as patch:
            patch.setattr(writer, "save_file", slow)
            saving = begin(tmp_path / "beside", data, step, staging)
            data.fill_(-1.0)
            assert not saving.is_written()
            go.set()
            deadline = time.monotonic() + 60
            while not saving.is_written():
                assert time.monotonic() < deadline
            go.clear()
        assert not (tmp_path / f"beside/global_step{step}").exists()
        tag = saving.publish()
        assert (tmp_path / "beside/latest").read_text() == tag.name
        shard = "shard-00000.safetensors"
        assert (tag / shard).read_bytes() == (tmp_path / "waited" / tag.name / shard).read_bytes()
        manifests = [CheckpointReader(tmp_path / name / tag.name).manifest for name in ("waited", "beside")]
        assert {**manifests[0], "saved_at": 0, "sha256": 0} == {**manifests[1], "saved_at": 0, "sha256": 0}


def test_host_memory_grows_with_what_is_saved() -> None:
    """Of a run whose first save came before its moments."""
    staging, data = Staging(), torch.arange(4.0)
    for kinds in (["weight"], ["weight", "exp_avg"]):
        copied, _ = staging.copy([Fragment(kind, "w", 0, 1, 0, data) for kind in kinds])
        assert [part.tolist() for part in copied.values()] == [data.tolist()] * len(kinds)


def save_beside_and_die(run_dir: Path, number: int) -> None:
    """Saves beside a training that changes its one tensor; the process is killed at a seeded byte of a write, or of the moves."""
    chance, written, write = random.Random(number), 0, writer._write_all
    limit = chance.randrange(6 * 2 * 4 * 50_000)  # of six files

    def write_and_die(file: Any, block: memoryview) -> None:
        nonlocal written
        for start in range(0, len(block), 4096):
            write(file, block[start : start + 4096])
            written += 4096
            if written > limit:
                os.kill(os.getpid(), signal.SIGKILL)

    writer._write_all = write_and_die  # type: ignore[assignment]
    data, staging, saving = torch.zeros(50_000), Staging(), None
    for step in range(1, 100):
        data.fill_(step)
        if saving is not None and (step % 3 == 0 or saving.is_written()):
            saving, _ = None, saving.publish()
        if step % 3 == 0:
            saving = begin(run_dir, data, step, staging)


@pytest.mark.parametrize("kills", [50 if IS_STORM else 10])
def test_killed_while_a_thread_writes_an_earlier_checkpoint_is_whole(tmp_path: Path, kills: int) -> None:
    """Each one that is there holds its own step everywhere; a later run clears the half away and saves again."""
    found = []
    for number in range(kills):
        run_dir = tmp_path / str(number)
        process = Process(save_beside_and_die, run_dir, number)
        assert process.wait() == -signal.SIGKILL, process.output
        halves = list(run_dir.glob("*.saving"))
        tags = [int(tag.name.removeprefix("global_step")) for tag in tag_folders(run_dir)]
        assert tags == sorted(tags, reverse=True) and tags == list(range(3 * len(tags), 0, -3))
        for step in tags:
            reader = CheckpointReader(run_dir / f"global_step{step}")
            assert not [*complaints(reader.path)]
            assert all((reader.tensor("w", kind) == step).all() for kind in ("weight", "exp_avg"))
        newest = select(run_dir).tag
        assert (newest and newest.name) == (f"global_step{tags[0]}" if tags else None)
        sweep_leftovers(run_dir)
        assert not list(run_dir.glob("*.saving"))
        found.append((len(tags), bool(halves)))
    print(
        f"{kills} kills: {sum(half for _, half in found)} within a write, {sum(count for count, _ in found)} checkpoints whole"
    )
    assert sum(half for _, half in found) >= 0.8 * kills and len({count for count, _ in found}) >= 3


def test_a_disk_without_room_fails_when_the_save_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path, torch.ones(8), 3, None).publish()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_write_all", full)
    saving = begin(tmp_path, torch.ones(8), 6, Staging())
    with pytest.raises(
        Failure, match=r"global_step6 could not be written \(rank 0: .*No space left on device(.|\n)*untouched"
    ):
        saving.publish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step3", "latest"]


@pytest.mark.parametrize("staging", [None, Staging()], ids=["waited for", "beside"])
def test_an_error_that_is_no_disk_is_that_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, staging: Staging | None
) -> None:
    """Such as one of the device, on which the copy to the host may fail: nobody is told to free space."""

    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(writer, "save_file", broken)
    with pytest.raises(RuntimeError, match="illegal memory access") as caught:
        begin(tmp_path, torch.ones(8), 6, staging).publish()
    assert any(entry.name == "_write_shard" for entry in caught.traceback)
