"""Branches of a sweep: runs that leave another one at its checkpoints, and wait for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_search import PROGRAM, write

from megatron.errors import UserError
from megatron.scaling.sweep.definition import load_sweep, unmatched
from megatron.scaling.sweep.runner import Runner
from megatron.scaling.sweep.slurm import write_slurm

BLOCK: dict[str, Any] = {"steps": [8, 4], "decay": 0.25, "flags": {"lr_decay_style": "WSD", "min-lr": 0.0001}}
FLAGS = {"lr": 0.001, "seq-length": 10, "valid-data-path": "v", "global-batch-size": 1, "save-interval": 4,
         "lr-decay-style": "constant"}  # fmt: skip


def written(folder: Path, **changes: Any) -> Path:
    path = write(folder, **{"branches": BLOCK, "flags": FLAGS, **changes})
    text = path.read_text()
    start = text.index("search:\n")
    path.write_text(text[:start] + text[text.index("data:\n", start) :])
    return path


def test_a_branch_has_its_trunks_settings_its_own_schedule_and_length(tmp_path: Path) -> None:
    sweep = load_sweep(written(tmp_path))
    trunk, *branches = (run for run in sweep.runs if run.objective == "ar")
    assert [branch.name for branch in branches] == [f"{trunk.name}-branch4", f"{trunk.name}-branch8"]
    first = branches[0]
    assert first.trunk == trunk and first.flags["branch-from"] == f"{trunk.folder}:global_step4"
    own = {"train-epochs", "lr-decay-style", "min-lr", "train-samples", "branch-from"}
    assert {
        name for name in trunk.flags.keys() | first.flags.keys() if trunk.flags.get(name) != first.flags.get(name)
    } == own
    assert (first.flags["train-samples"], first.epochs) == (5, 0.5)
    assert first.flops == pytest.approx(trunk.flops * 0.5 / 2 * 0.2), "what it adds"
    assert sweep.flops == pytest.approx(sum(run.flops for run in sweep.runs))
    assert unmatched(sweep.runs) == []
    to_the_end = load_sweep(written(tmp_path / "end", branches={**BLOCK, "steps": [16]})).runs
    assert {run.epochs for run in to_the_end} == {2} and unmatched(to_the_end) == [], (
        "a branch is compared with branches"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branches__steps": [5]}, "branches leave at step 5; checkpoints are saved every 4 steps"),
        ({"branches__steps": [20]}, "a branch from step 20 ends at epoch 2.5; ar-small-100-2ep-seed1 is planned for 2"),
        ({"branches__decay": 0}, "branches.decay 0 is in the file; it must be positive"),
        ({"branches__flags": {"seed": 3, "train_samples": 7}}, "sweep.yaml: seed, train-samples in branches.flags"),
        ({"flags__keep-last": 1}, "keep-last, and branches; a branch leaves a checkpoint of its trunk"),
        ({"branches": {"steps": [4]}}, "branches is .*; it is steps, decay"),
    ],
)
def test_what_no_branch_can_be_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_sweep(written(tmp_path, **{"branches": dict(BLOCK), "flags": dict(FLAGS), **changes}))
    with pytest.raises(UserError, match="has search and branches"):
        load_sweep(write(tmp_path, branches=BLOCK, flags={**FLAGS, "weight-decay": 0.1}))


def test_branches_wait_for_their_trunk_and_come_with_it(tmp_path: Path) -> None:
    path = written(tmp_path)
    sweep = load_sweep(path)
    said: list[str] = []
    results = Runner(sweep, jobs=2, say=said.append).run(sweep.runs)
    assert set(results.values()) == {"finished"} and len(results) == 6
    for run in sweep.runs:
        if run.trunk is not None:
            assert said.index(f"{run.trunk.name}: finished") < said.index(f"{run.name}: started (attempt 1)")
    again = subprocess.run(
        [*PROGRAM, str(path), "run", "--only", "mdm-small-100-2ep-seed1"], capture_output=True, text=True, timeout=120
    )
    assert (again.returncode, again.stdout.splitlines()[-1]) == (0, "3 skipped"), again.stderr
    script = write_slurm(sweep, sweep.runs, tmp_path / "slurm")
    assert (tmp_path / "slurm/runs.txt").read_text().split() == ["ar-small-100-2ep-seed1", "mdm-small-100-2ep-seed1"]
    assert "--array=0-1" in script.read_text() and sys.executable in script.read_text()


def test_branches_of_a_failed_trunk_have_failed_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody stopped them: a status of 130 would say so."""
    monkeypatch.setenv("FAKE_FAIL", "mdm")
    sweep = load_sweep(written(tmp_path))
    runs = [run for run in sweep.runs if run.objective == "mdm"]
    results = Runner(sweep, attempts=1, say=lambda text: None).run(runs)
    assert [results[run.name] for run in runs] == ["failed"] * 3
