"""Going back, leftovers of kills, and old checkpoints."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from megatron.checkpoint.files import LATEST, MANIFEST, NEXT, tag_folders
from megatron.checkpoint.select import select
from megatron.checkpoint.upkeep import remove_old_checkpoints, set_back, sweep_leftovers
from tests.checkpoint.saved import names, save, value


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Checkpoints of steps 10, 20, 30 and 40."""
    for step in (10, 20, 30, 40):
        save(tmp_path / "run", step)
    return tmp_path / "run"


def test_going_back_moves_the_other_branch_aside_and_keeps_the_new_one(run_dir: Path) -> None:
    """FAULTS A3: the tag just written was deleted, `latest` named it, and the next start continued the old branch."""
    lines = set_back(run_dir, run_dir / "global_step10")
    assert "global_step40, global_step30, global_step20" in lines[0] and "abandoned" in lines[0]
    assert (run_dir / LATEST).read_text() == "global_step10"
    save(run_dir, 11, value=11.5)
    remove_old_checkpoints(run_dir, keep_last=2, keep=set())
    assert [tag.name for tag in tag_folders(run_dir)] == ["global_step11", "global_step10"]
    assert value(select(run_dir)) == 11.5 and not select(run_dir).skipped
    assert names(run_dir / "abandoned") == ["global_step20", "global_step30", "global_step40"]
    assert value(select(run_dir / "abandoned" / "global_step40")) == 40


def test_going_back_twice_keeps_both_branches(run_dir: Path) -> None:
    for number in (1, 2):
        set_back(run_dir, run_dir / "global_step10")
        save(run_dir, 20, value=20 + number / 10)
    set_back(run_dir, run_dir / "global_step10")
    assert names(run_dir / "abandoned") == [
        "global_step20", "global_step20.2", "global_step20.3", "global_step30", "global_step40"
    ]  # fmt: skip


def test_going_on_from_the_newest_changes_nothing(run_dir: Path) -> None:
    before = names(run_dir)
    assert set_back(run_dir, run_dir / "global_step40") == []
    assert set_back(run_dir, run_dir.parent / "other" / "global_step10") == []
    assert names(run_dir) == before


def test_going_back_may_be_killed_and_done_again(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, left = Path.rename, [2]

    def killed(self: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        set_back(run_dir, run_dir / "global_step10")
    monkeypatch.undo()
    assert value(select(run_dir)) == 20  # nothing was saved in the new branch yet
    set_back(run_dir, run_dir / "global_step10")
    assert value(select(run_dir)) == 10 and not select(run_dir).skipped


def test_old_checkpoints_go_by_branch_and_run(tmp_path: Path) -> None:
    """Neither another run's tags nor unreadable ones are counted or deleted; the newest is what `latest` names."""
    run_dir = tmp_path
    for step in (10, 20, 30, 40):
        save(run_dir, step, run_id="other")
    for step in (5, 50, 60):
        save(run_dir, step, run_id="new")
    (run_dir / "global_step60" / MANIFEST).write_text("damaged")
    (run_dir / LATEST).write_text("global_step50")
    remove_old_checkpoints(run_dir, keep_last=1, keep={40})
    assert [tag.name for tag in tag_folders(run_dir)] == [f"global_step{step}" for step in (60, 50, 40, 30, 20, 10)]
    for step in (70, 80):
        save(run_dir, step, run_id="new")
    remove_old_checkpoints(run_dir, keep_last=1, keep={50})
    assert [tag.name for tag in tag_folders(run_dir)][:3] == ["global_step80", "global_step60", "global_step50"]


def test_what_latest_names_is_kept_though_others_were_written_later(run_dir: Path) -> None:
    (run_dir / LATEST).write_text("global_step20")
    remove_old_checkpoints(run_dir, keep_last=1, keep=set())
    assert names(run_dir) == ["global_step20", LATEST]


def test_checkpoints_from_before_run_ids_belong_to_the_run_that_continues_them(run_dir: Path) -> None:
    save(run_dir, 50, run_id="new")
    remove_old_checkpoints(run_dir, keep_last=2, keep=set())
    assert [tag.name for tag in tag_folders(run_dir)] == ["global_step50", "global_step40"]


def test_of_a_link_to_a_checkpoint_the_link_alone_is_deleted(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "global_step10").rename(tmp_path / "global_step10")
    (run_dir / "global_step10").symlink_to(tmp_path / "global_step10")
    remove_old_checkpoints(run_dir, keep_last=1, keep=set())
    assert names(run_dir) == ["global_step40", LATEST]
    assert value(select(tmp_path / "global_step10")) == 10


def test_what_cannot_be_deleted_is_said_and_no_error(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    lines = remove_old_checkpoints(run_dir, keep_last=2, keep=set())
    assert len(lines) == 2 and "Device or resource busy" in lines[0] and "global_step20" in lines[0]
    assert [(run_dir / f"global_step{step}" / MANIFEST).exists() for step in (10, 20, 30)] == [False, False, True]
    assert value(select(run_dir)) == 40


def test_leftovers_of_kills_are_swept(run_dir: Path) -> None:
    """FAULTS A14: each up to a full checkpoint, for ever."""
    (run_dir / "validations").mkdir()
    (run_dir / "validations" / "step6.npz").touch()
    kept = names(run_dir)
    for name in ("global_step50.saving", "global_step30.replaced"):
        shutil.copytree(run_dir / "global_step30", run_dir / name)
    (run_dir / "global_step50.saving" / MANIFEST).rename(
        run_dir / "global_step50.saving" / ".manifest.json.123.0a1b2c3d.tmp"
    )
    (run_dir / "global_step5").mkdir()
    shutil.copy(run_dir / "global_step10" / "shard-00000.safetensors", run_dir / "global_step5")
    for name in ("latest.tmp", ".run.json.123.0a1b2c3d.tmp", NEXT, "validations/.step8.npz.123.0a1b2c3d.tmp"):
        (run_dir / name).write_text("global_step99")
    lines = sweep_leftovers(run_dir)
    assert names(run_dir) == kept
    assert [line.split(" (")[0] for line in lines] == [
        f"removed {run_dir / name}" for name in (
            "global_step50.saving", "global_step30.replaced", "global_step5", ".run.json.123.0a1b2c3d.tmp", "latest.tmp",
            "validations/.step8.npz.123.0a1b2c3d.tmp",
        )
    ]  # fmt: skip
    assert names(run_dir / "validations") == ["step6.npz"]
    assert sweep_leftovers(run_dir) == []
    assert sweep_leftovers(run_dir / "nothing") == []


def test_what_is_not_ours_stays(run_dir: Path) -> None:
    (run_dir / "global_step50.saving").mkdir()
    (run_dir / "global_step50.saving" / "thesis.tex").touch()
    (run_dir / "global_step60.saving" / "shard-00001.safetensors").mkdir(parents=True)
    (run_dir / "global_step7").mkdir()
    (run_dir / "global_step7" / "mp_rank_00_model_states.pt").touch()
    (run_dir / "notes.tmp").touch()
    (run_dir / "global_step10.backup").mkdir()
    before = names(run_dir)
    lines = sweep_leftovers(run_dir)
    assert names(run_dir) == before
    assert len(lines) == 3 and "it holds shard-00001" in lines[0] and "it holds thesis.tex" in lines[1]
    assert "mp_rank_00_model_states.pt" in lines[2]


def test_a_save_whose_files_are_not_whole_is_not_completed(run_dir: Path) -> None:
    saving = run_dir / "global_step50.saving"
    shutil.copytree(run_dir / "global_step40", saving)
    (saving / "shard-00000.safetensors").write_bytes(b"half")
    (run_dir / NEXT).write_text("global_step50")
    before = names(run_dir)
    sweep_leftovers(run_dir)
    assert names(run_dir) == [name for name in before if name not in (saving.name, NEXT)]
    assert value(select(run_dir)) == 40


def test_a_newest_checkpoint_that_lost_its_manifest_is_not_swept(run_dir: Path) -> None:
    (run_dir / "global_step40" / MANIFEST).unlink()
    assert sweep_leftovers(run_dir) == []
    assert (run_dir / "global_step40" / "shard-00000.safetensors").is_file()


@pytest.mark.parametrize("step", [40, 50])
def test_a_kill_at_any_rename_of_a_save_is_completed(run_dir: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """A new tag, or one that takes the place of an older one of its step: swept, the run has a whole newest tag."""
    outcomes = []
    for moment in range(6):
        folder = run_dir.parent / f"{moment}"
        shutil.copytree(run_dir, folder)
        left = [moment]

        def killed(operation, *arguments, left=left, **options):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return operation(*arguments, **options)

        with monkeypatch.context() as patch:
            for module, name in ((os, "replace"), (os, "rename"), (shutil, "rmtree")):
                original = getattr(module, name)
                patch.setattr(module, name, lambda *a, original=original, **b: killed(original, *a, **b))
            try:
                save(folder, step, value=0.5)
            except KeyboardInterrupt:
                pass
            else:
                break
        sweep_leftovers(folder)
        found = select(folder)
        assert not found.skipped and (folder / LATEST).read_text() == found.tag.name
        assert names(folder) == sorted({*(f"global_step{each}" for each in (10, 20, 30, 40)), LATEST, found.tag.name})
        outcomes.append(value(found))
    assert outcomes[0] == 40 and outcomes[-1] == 0.5 and outcomes == sorted(outcomes, reverse=True)
    assert len(outcomes) >= (4 if step == 50 else 5)
