"""Which checkpoints stay: the newest, and that of the best validation, which a resumed run still knows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from layouts import jobs
from layouts.pool import WorkerPool

from megatron.checkpoint.files import tag_folders
from megatron.checkpoint.select import select
from megatron.errors import UserError
from training.test_resume import options

KINDS = ("valid", "valid_ema")


def train_with_validation(results: list[float], argv: list[str]) -> jobs.Trace:
    """Training whose validations give these losses."""
    from megatron.training.validation import Validator

    queue, original = iter(results), Validator._measure

    def measure(self: Any, kind: str, stop: Any) -> Any:
        fields, sums = original(self, kind, stop)
        return {**fields, "nll": next(queue)}, sums

    with mock.patch.object(Validator, "_measure", measure):
        return jobs.train("mdm", argv)


def test_keep_last_keeps_the_newest_and_the_best(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    changes = {"train_iters": 12, "save_interval": 2, "eval_interval": 2, "keep_last": 2, "ema_decay": None}
    argv = jobs.flags(token_files, run_dir, **options(token_files, **changes))
    pools(1).run(train_with_validation, [6.0, 5.0, 5.5, 5.0, 7.0, 8.0], argv)
    assert {tag.name for tag in tag_folders(run_dir)} == {"global_step4", "global_step10", "global_step12"}
    assert sorted(run_dir.glob("global_step*")) == sorted(tag_folders(run_dir))
    assert json.loads((run_dir / "best.json").read_text())["step"] == 4
    assert [step for step, record in jobs.records(run_dir, "valid").items() if record["best"]] == [2, 4]
    # A resumed run still knows the best one, and does not mistake its own first validation for it.
    argv = jobs.flags(token_files, run_dir, load=run_dir, **options(token_files, **{**changes, "train_iters": 16}))
    pools(1).run(train_with_validation, [5.2, 5.1], argv)
    assert {tag.name for tag in tag_folders(run_dir)} == {"global_step4", "global_step14", "global_step16"}
    assert json.loads((run_dir / "best.json").read_text())["step"] == 4


@pytest.mark.parametrize("size", [1, 2])
def test_save_best_keeps_the_checkpoint_of_the_best_validation(
    size: int, pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path
) -> None:
    """The best validation falls between two saves: it has a checkpoint all the same, and --load-tag best means it and, of its
    weights, those that were validated: here (each first of its pair) the averaged ones."""
    changes = {"train_iters": 13, "save_interval": 5, "eval_interval": 2, "keep_last": 1, "save_best": True}
    argv = jobs.flags(token_files, tmp_path, **options(token_files, pp_size=size, **changes))
    averaged_and_trained = [6.5, 6.0, 6.0, 5.0, 5.5, 5.5, 4.0, 4.5, 7.0, 7.0, 8.0, 8.0, 9.0, 9.0]
    pools(size).run(train_with_validation, averaged_and_trained, argv)
    assert {tag.name for tag in tag_folders(tmp_path)} == {"global_step8", "global_step13"}
    found = select(tmp_path, "best")
    assert (found.tag, found.weights) == (tmp_path / "global_step8", "ema")
    found = select(tmp_path)
    assert (found.tag, found.weights) == (tmp_path / "global_step13", "weight")
    best = {kind: [step for step, row in jobs.records(tmp_path, kind).items() if row["best"]] for kind in KINDS}
    assert best == {"valid": [2, 4], "valid_ema": [8]}


def test_the_best_that_was_not_kept_is_refused(tmp_path: Path) -> None:
    (tmp_path / "best.json").write_text('{"step": 4}')
    with pytest.raises(UserError, match=r"no checkpoint of its best validation \(global_step4\).*--save-best"):
        select(tmp_path, "best")
