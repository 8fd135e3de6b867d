"""The one answer to "which checkpoint does --load mean"."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from megatron.checkpoint.files import BEST, LATEST, MANIFEST, NEXT, complaints, read_manifest, write_manifest
from megatron.checkpoint.select import Selection, agree_on_checkpoint, select
from megatron.config.schema import AVERAGE, WEIGHT
from megatron.errors import UserError
from megatron.parallel.context import ParallelContext
from tests.checkpoint.saved import save, value


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Checkpoints of steps 10, 20 and 30."""
    for step in (10, 20, 30):
        save(tmp_path, step)
    return tmp_path


def test_a_folder_without_checkpoints_starts_fresh(tmp_path: Path) -> None:
    assert select(tmp_path) == select(tmp_path / "nothing") == Selection()


def test_newest_is_what_latest_names_and_later_ones_are_said(run_dir: Path) -> None:
    assert value(select(run_dir)) == 30
    assert select(run_dir).warning is None
    (run_dir / LATEST).write_text("global_step10")
    found = select(run_dir)
    assert value(found) == 10
    assert found.skipped == (
        "global_step30 (`latest` names global_step10)",
        "global_step20 (`latest` names global_step10)",
    )


def test_without_latest_newest_is_what_was_written_last(run_dir: Path) -> None:
    save(run_dir, 15)
    (run_dir / LATEST).unlink()
    assert value(select(run_dir)) == 15


def test_what_cannot_be_dated_is_said_before_a_dated_one_is_taken(run_dir: Path) -> None:
    (run_dir / LATEST).unlink()
    (run_dir / "global_step10" / MANIFEST).write_text("?")
    found = select(run_dir)
    assert value(found) == 30 and [line.split(" (")[0] for line in found.skipped] == ["global_step10"]


def test_checkpoints_of_format_1_go_by_their_step(run_dir: Path) -> None:
    for step in (30, 10, 20):
        path = run_dir / f"global_step{step}" / MANIFEST
        manifest = json.loads(path.read_text())
        old = {key: entry for key, entry in manifest.items() if key not in ("sha256", "saved_at")}
        path.write_text(json.dumps({**old, "format": 1}))
    (run_dir / LATEST).unlink()
    assert value(select(run_dir)) == 30


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[]", "cannot be read (it is a list)"),
        (b"{}", "has format None"),
        (b'{"format": true}', "has format True"),
        (b'{"format": 3}', "has format 3"),
        (b'{"format": 2}', "fails its own checksum"),
        (b'{"format": 1}', "holds no valid step, consumed_samples, optimizer_steps, config, tensors, files"),
        (None, "has no manifest.json"),
    ],
)
def test_a_damaged_manifest_is_skipped_with_words(run_dir: Path, content: bytes | None, reason: str) -> None:
    path = run_dir / "global_step30" / MANIFEST
    path.unlink() if content is None else path.write_bytes(content)
    found = select(run_dir)
    assert value(found) == 20
    assert [line.split(" (")[0] for line in found.skipped] == ["global_step30"]
    assert reason in found.skipped[0] and reason in str(found.warning)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("step", -1),
        ("consumed_samples", 4.5),
        ("files", {}),
        ("files", {"../other": {"bytes": 1, "sha256": ""}}),
        ("tensors", {"w": {"shape": [4], "dim": 1, "blocks": [4]}}),
        ("tensors", {"w": {"shape": "4", "dim": None, "blocks": []}}),
        ("config", {"model": 7}),
    ],
)
def test_fields_of_wrong_types_are_damage_even_where_the_checksum_is_right(
    run_dir: Path, field: str, wrong: object
) -> None:
    tag = run_dir / "global_step30"
    write_manifest(tag, {**read_manifest(tag), field: wrong})
    found = select(run_dir)
    assert value(found) == 20
    assert f"holds no valid {field}" in found.skipped[0]


def test_no_flip_of_a_bit_of_the_position_is_believed(run_dir: Path) -> None:
    """FAULTS A12: consumed_samples 120 became 40 and the run resumed with other data."""
    path = run_dir / "global_step30" / MANIFEST
    whole = path.read_text()
    for right, wrong in (('"consumed_samples": 240', '"consumed_samples": 140'), ('"format": 2', '"format": 1')):
        assert right in whole
        path.write_text(whole.replace(right, wrong))
        assert "fails its own checksum" in select(run_dir).skipped[0]


@pytest.mark.parametrize("text", ["global_step40", "", "../elsewhere", "global_step", "\udcff"])
def test_a_latest_that_names_nothing_is_said(run_dir: Path, text: str) -> None:
    (run_dir / LATEST).write_bytes(text.encode(errors="surrogateescape"))
    found = select(run_dir)
    assert value(found) == 30
    assert len(found.skipped) == 1


def test_all_damaged_is_an_error_that_lists_each(run_dir: Path) -> None:
    for step in (10, 20, 30):
        (run_dir / f"global_step{step}" / MANIFEST).write_text("")
    with pytest.raises(UserError) as caught:
        select(run_dir)
    assert all(f"global_step{step} (" in caught.value.given for step in (10, 20, 30))


def test_a_tag_that_is_asked_for_is_used_or_refused(run_dir: Path) -> None:
    assert value(select(run_dir, "global_step10")) == 10
    assert select(run_dir, "global_step10").skipped == ()
    assert value(select(run_dir, "latest")) == 30
    assert value(select(run_dir / "global_step20")) == 20
    assert value(select(run_dir / "global_step20", "global_step20")) == 20
    (run_dir / "global_step20" / MANIFEST).unlink()
    for arguments in ((run_dir, "global_step20"), (run_dir / "global_step20",), (run_dir, "global_step25"),
                      (run_dir, "../x"), (run_dir / "global_step10", "global_step30")):  # fmt: skip
        with pytest.raises(UserError):
            select(*arguments)
    (run_dir / LATEST).unlink()
    with pytest.raises(UserError, match="no file latest"):
        select(run_dir, "latest")


def test_the_best_is_that_of_its_validation_with_the_weights_that_it_judged(run_dir: Path) -> None:
    for more, weights in (({}, WEIGHT), ({"weights": AVERAGE}, AVERAGE)):
        (run_dir / BEST).write_text(json.dumps({"step": 20, **more}))
        found = select(run_dir, "best")
        assert value(found) == 20 and found.weights == weights
    assert select(run_dir).weights == WEIGHT
    for text in ('{"step": 25}', "{}", "?"):
        (run_dir / BEST).write_text(text)
        with pytest.raises(UserError, match="keeps no checkpoint of its best validation"):
            select(run_dir, "best")


def test_a_deepspeed_checkpoint_is_called_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "global_step5").mkdir()
    (tmp_path / "global_step5" / "mp_rank_00_model_states.pt").touch()
    (tmp_path / LATEST).write_text("global_step5")
    with pytest.raises(UserError, match="a DeepSpeed checkpoint"):
        select(tmp_path)


def test_a_save_that_only_lacks_its_last_rename_counts(run_dir: Path) -> None:
    (run_dir / LATEST).write_text("global_step20")
    (run_dir / NEXT).write_text("global_step30")
    assert value(select(run_dir)) == 30 and not select(run_dir).skipped
    (run_dir / NEXT).write_text("global_step40")  # never came to be
    assert value(select(run_dir)) == 20


class Together(ParallelContext):
    """Ranks as threads."""

    def gather_objects(self, value: object) -> list:
        board, barrier = BOARDS[self.world_size]
        board[self.rank] = value
        barrier.wait(timeout=20)
        everyone = list(board)
        barrier.wait(timeout=20)
        return everyone


BOARDS = {3: ([None] * 3, threading.Barrier(3))}


def test_ranks_agree_on_the_answer_of_one_process(run_dir: Path) -> None:
    """Also on errors, and though every rank reads other files."""
    tag, first, second = run_dir / "global_step30", "shard-00000.safetensors", "shard-00001.safetensors"
    manifest = read_manifest(tag)
    write_manifest(tag, {**manifest, "files": dict.fromkeys((first, second), manifest["files"][first])})
    (tag / second).write_bytes((tag / first).read_bytes()[:-1] + b"?")
    assert [len(list(complaints(tag, part=part, parts=3))) for part in range(3)] == [0, 1, 0]
    (run_dir / "global_step20" / MANIFEST).write_text("?")

    def ask(load: Path, tag: str | None) -> list[object]:
        answers: list[object] = [None] * 3

        def rank(number: int) -> None:
            try:
                answers[number] = agree_on_checkpoint(load, tag, Together(rank=number, world_size=3))
            except UserError as error:
                answers[number] = str(error)

        threads = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers

    assert ask(run_dir, None) == [select(run_dir)] * 3
    assert value(select(run_dir)) == 10
    first, *others = ask(run_dir, "../x")
    assert "the tag ../x" in str(first) and others == [first] * 2
    first, *others = ask(run_dir, "global_step30")
    assert "fails its checksum" in str(first) and others == [first] * 2
