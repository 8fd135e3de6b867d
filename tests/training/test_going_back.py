"""A run that goes back, or goes on otherwise: what its records show is the branch that it is on, whenever it is killed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from layouts import jobs
from layouts.pool import Process, WorkerPool

from megatron.checkpoint.files import tag_folders
from megatron.checkpoint.select import select

VALIDATED: dict[str, Any] = {"eval_interval": 2, "eval_iters": 1, "save_interval": 2}


def train_with_validations(results: list[float], argv: list[str], *, dies_before: int | None = None) -> jobs.Trace:
    """Training whose validations give these losses, in order; killed before one of its steps."""
    from megatron.training.validation import Validator

    queue, original = iter(results), Validator._measure

    def measure(self: Any, kind: str, stop: Any) -> Any:
        found, sums = original(self, kind, stop)
        return {**found, "nll": next(queue)}, sums

    def begins(number: int) -> None:
        if number == dies_before:
            os._exit(9)

    with mock.patch.object(Validator, "_measure", measure):
        return jobs.train("mdm", argv, begins=begins)


@pytest.fixture
def run_dir(pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path) -> Path:
    """Six steps, saved and validated at 2, 4 and 6; the last is the best one."""
    argv = flags(token_files, tmp_path / "run", train_iters=6)
    assert pools(1).run(train_with_validations, [6.0, 5.5, 5.0], argv)[0].status == 0
    return tmp_path / "run"


def flags(tokens: Path, run_dir: Path, **changes: Any) -> list[str]:
    return jobs.flags(tokens, run_dir, **{"valid_data_path": tokens / "valid", **VALIDATED, **changes})


def best_step(run_dir: Path) -> int:
    return int(json.loads((run_dir / "best.json").read_text())["step"])


def test_a_kill_before_the_first_save_of_a_branch_parts_no_metrics_from_their_checkpoint(
    run_dir: Path, token_files: Path, pools: Callable[[int], WorkerPool]
) -> None:
    """The other branch goes aside together with its rows; the next start continues where the rows end."""
    whole = (run_dir / "metrics.jsonl").read_text()
    argv = flags(token_files, run_dir, load=run_dir, load_tag="global_step2", train_iters=6)
    assert Process(train_and_die, argv, 2).wait() == 9  # step 3 is logged, nothing is saved
    assert max(jobs.records(run_dir)) == 3 and best_step(run_dir) == 2
    assert select(run_dir).tag == run_dir / "global_step2"
    kept = sorted(path.name for path in (run_dir / "abandoned").iterdir())
    assert kept == ["global_step4", "global_step6", "metrics.jsonl"]
    assert (run_dir / "abandoned/metrics.jsonl").read_text() == whole
    argv = flags(token_files, run_dir, load=run_dir, train_iters=6)
    assert pools(1).run(train_with_validations, [5.9, 5.8], argv)[0].status == 0
    assert list(jobs.records(run_dir)) == [1, 2, 3, 4, 5, 6]
    assert list(jobs.records(run_dir, "valid")) == [2, 4, 6] and best_step(run_dir) == 6


def train_and_die(argv: list[str], step: int) -> None:
    train_with_validations([], argv, dies_before=step)


def test_the_best_validation_outlives_a_resume_though_its_checkpoint_was_saved_before_it(
    run_dir: Path, token_files: Path, pools: Callable[[int], WorkerPool]
) -> None:
    argv = flags(token_files, run_dir, load=run_dir, train_iters=10, keep_last=1)
    assert pools(1).run(train_with_validations, [5.2, 5.1], argv)[0].status == 0
    assert [step for step, row in jobs.records(run_dir, "valid").items() if row["best"]] == [2, 4, 6]
    assert best_step(run_dir) == 6 and "at step 6; metrics in" in pools(1).output(0)
    assert [tag.name for tag in tag_folders(run_dir)] == ["global_step10", "global_step6"]


def test_other_validation_data_are_said_recorded_and_begin_a_curve_of_their_own(
    run_dir: Path, token_files: Path, pools: Callable[[int], WorkerPool]
) -> None:
    from megatron.runs.reading import load_run
    from megatron.runs.record import RunRecord

    argv = flags(token_files, run_dir, load=run_dir, train_iters=8, valid_data_path=token_files / "train")
    assert pools(1).run(train_with_validations, [5.7], argv)[0].status == 0
    assert "warning: data.valid was" in pools(1).output(0)
    record = RunRecord.read(run_dir)
    assert record is not None and "data.valid" in record.attempts[-1].changed
    rows = jobs.records(run_dir, "valid")
    assert rows[2]["data"] == rows[6]["data"] != rows[8]["data"] and rows[8]["data"]
    assert rows[8]["best"] and best_step(run_dir) == 8  # of the new curve
    run = load_run(run_dir)
    assert [point.step for point in run.valid] == [2, 4, 6] and [point.step for point in run.other_valid] == [8]


def train_with_recorded_wandb(argv: list[str]) -> int:
    """Training whose calls of W&B go to ID.jsonl in the run directory."""
    from megatron.training import reporting

    class Recorder:
        def __init__(self, _settings: Any, run_dir: Path) -> None:
            self.path = run_dir / f"{reporting._wandb_id(run_dir)}.jsonl"

        def log(self, scalars: dict[str, float], step: int) -> None:
            with open(self.path, "a") as file:
                file.write(json.dumps([step, scalars["train/loss"]]) + "\n")

        def finish(self) -> None:
            pass

    with mock.patch.object(reporting, "_open_wandb", Recorder):
        return jobs.train("mdm", argv).status


def test_wandb_shows_the_branch_that_the_run_is_on(
    token_files: Path, tmp_path: Path, pools: Callable[[int], WorkerPool]
) -> None:
    """W&B takes no step twice: a branch is a W&B run of its own, with the rows before it; a plain resume goes on."""
    run_dir, shown = tmp_path / "run", []
    options = {"load": run_dir, "wandb_project": "tests", "save_interval": 2}
    for changes in ({"train_iters": 6}, {"train_iters": 8}, {"train_iters": 5, "load_tag": "global_step2"}):
        argv = jobs.flags(token_files, run_dir, **options, **changes)
        assert pools(1).run(train_with_recorded_wandb, argv) == [0]
        path = run_dir / f"{(run_dir / 'wandb_id').read_text()}.jsonl"
        shown.append([json.loads(line) for line in path.read_text().splitlines()])
    assert [[step for step, _ in rows] for rows in shown] == [list(range(1, 7)), list(range(1, 9)), list(range(1, 6))]
    assert shown[2] == [[step, row["loss"]] for step, row in jobs.records(run_dir).items()]
