"""A search that is killed with -9 at random moments tries and chooses what one that was left alone does."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from test_search import IS_STORM, PROGRAM, SWEEP, read, searched, shown, write

from megatron.scaling.sweep.search import FAILED, FINISHED, GIVEN_UP
from megatron.scaling.sweep.verdict import budgets


def trainers(folder: Path) -> list[int]:
    """Ids of the trainers of a sweep's runs that are there now, loaders among them."""
    found = []
    for words in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"--save\0{folder}".encode() in words.read_bytes():
                found.append(int(words.parent.name))
    return found


def killed_until_it_ends(path: Path, *, kills: int, pause: float) -> int:
    """Start a search again and again, kill it with -9 at random moments, then let it end. Returns how often it was killed."""
    chance, done = random.Random(20261126), 0
    command = [*PROGRAM, str(path), "search", "--jobs", "2"]
    while True:
        process = subprocess.Popen(command, env={**os.environ, "FAKE_STEP_SECONDS": "0.05"}, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True)  # fmt: skip
        try:
            out, _ = process.communicate(timeout=chance.uniform(0.2, 1) * pause if done < kills else 300)
        except subprocess.TimeoutExpired:
            victims = chance.choice(("both", "search", "trainers"))
            for pid in trainers(path.parent) if victims != "search" else []:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if victims == "trainers":
                time.sleep(chance.uniform(0, 1))  # the search sees it, and starts the trial again or fails
            process.kill()
            process.communicate()
            done += 1
            continue
        assert process.returncode == 0, out
        return done


REAL = {
    "grid__objective": ["mdm"],
    "search__coordinates": {"lr": [0.001, 0.01]},
    "search__trials": 2,
    "grid__epochs": [0.3],
    "grid__model": {"tiny": {"num-layers": 1, "hidden-size": 32, "num-attention-heads": 1}},
    "launcher": "python",
    "vocab_size": 128,
}


FAKE = {
    "search__coordinates": {"weight-decay": [0.1, 1, 2, 4], "lr": [0.001, 0.01, 1]},
    "search__trials": 6,
    "grid__epochs": [3],
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("changes", "kills", "outcomes"),
    [(FAKE, 40 if IS_STORM else 2, {FINISHED, GIVEN_UP, FAILED}), (REAL, 20 if IS_STORM else 2, {FINISHED})],
    ids=["fake", "real"],
)
def test_killed_with_9_at_random_moments_gives_the_same_trials_and_choice(
    tmp_path: Path, token_files: Path, changes: dict, kills: int, outcomes: set[str]
) -> None:
    """The search and its trainers, together or one of them. Nothing is tried twice, and every number is the same."""
    if changes is REAL:
        flags = {**SWEEP["flags"], "valid-data-path": str(token_files / "valid"), "vocab-size": 500, "seq-length": 32,
                 "tokenizer-type": "NullTokenizer", "micro-batch-size": 2, "global-batch-size": 2, "eval-iters": 4,
                 "eval-interval": 20, "save-interval": 20, "num-workers": 0}  # fmt: skip
        changes = {**changes, "flags": flags, "data": {100: str(token_files / "train")}}
    began = time.monotonic()
    expected = searched(write(tmp_path / "alone", **changes), jobs=2)
    pause = (time.monotonic() - began) / min(kills, 4)  # so that no search ends before its kills
    assert {trial.outcome for search in expected for trial in search.trials} == outcomes
    path = write(tmp_path / "killed", **changes)
    assert killed_until_it_ends(path, kills=kills, pause=pause) >= min(2, kills)
    assert [shown(search) for search in read(path)] == [shown(search) for search in expected]
    record = json.loads((tmp_path / "killed/runs/search.json").read_text())
    assert record["budgets"] == budgets(expected)
    chosen = [Path(entry["chosen"]).name for entry in record["searches"]]
    assert chosen == [search.chosen.run.name for search in expected if search.chosen]
    names = [{folder.name for folder in (tmp_path / which / "runs").iterdir()} for which in ("alone", "killed")]
    assert names[1] - names[0] == {"search.json"}
