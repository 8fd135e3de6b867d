"""A branch is what one run with its schedule would have been under the data plan of the run that it leaves, however often it
is killed and on whatever layout; both know each other."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from layouts import jobs
from layouts.pool import Process, WorkerPool

from megatron.checkpoint.reader import CheckpointReader
from megatron.data.prepare.writer import IndexedDatasetWriter
from megatron.errors import UserError
from megatron.objectives import parse
from megatron.parallel.launch import Launch
from megatron.runs.branches import add_branch
from megatron.runs.matching import differences
from megatron.runs.reading import load_run
from megatron.runs.record import Link, RunRecord
from megatron.training.plan import Plan
from megatron.training.resolve import resolve

REPO = Path(__file__).parents[2]
TIMINGS = {"seconds", "step_seconds", "tokens_per_second", "tflops", "mfu", "best"}
LENGTH, LEFT, END = 40, 10, 24  # steps of the stable run, where the branch leaves it, and where that ends
STABLE: dict[str, Any] = {
    "train_iters": LENGTH,
    "lr_decay_style": "constant",
    "lr_warmup_fraction": 0.1,  # of 320 samples: a branch, which is shorter, keeps these 32
    "save_interval": 5,
    "log_interval": 4,
    "eval_interval": 6,
    "eval_iters": 1,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
}
WSD: dict[str, Any] = {"train_iters": END, "lr_decay_style": "wsd", "lr_wsd_decay_style": "minus_sqrt"}
ONE_GO: dict[str, Any] = {
    "lr_decay_style": "WSD", "lr_wsd_decay_style": "minus_sqrt", "lr_decay_samples": 8 * END,
    "lr_wsd_decay_samples": 8 * (END - LEFT), "lr_warmup_fraction": None, "lr_warmup_samples": 32,
}  # fmt: skip
NO_DROPOUT = {"hidden_dropout": 0, "attention_dropout": 0}


@pytest.fixture(scope="module")
def blend(token_files: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two parts; of the second one the stable run reads two epochs and a branch one, so that their own orders differ."""
    import numpy as np

    folder, random = tmp_path_factory.mktemp("blend"), np.random.default_rng(1)
    with IndexedDatasetWriter(folder / "other", np.dtype(np.uint16)) as writer:
        for size in random.integers(20, 120, 32):
            writer.add_document(random.integers(0, 500, size).astype(np.uint16))
    return ["0.7", str(token_files / "train"), "0.3", str(folder / "other")]


@pytest.fixture(scope="module")
def words(token_files: Path, blend: list[str]) -> Callable[..., list[str]]:
    """``words(run_dir, **flags)``: the command line of the stable run with changes."""

    def command(run_dir: Path | None, **changes: Any) -> list[str]:
        options = {**STABLE, "valid_data_path": token_files / "valid", "train_data_path": None, **changes}
        return [*jobs.flags(token_files, run_dir, **options), "--train-data-path", *blend]

    return command


@pytest.fixture(scope="module")
def trained(
    pools: Callable[[int], WorkerPool], words: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``trained(name, size, **flags)``: the folder of that run, trained once a module."""
    folder, finished = tmp_path_factory.mktemp("runs"), {}

    def run(name: str, size: int = 1, **changes: Any) -> Path:
        if name not in finished:
            traces = pools(size).run(jobs.train, "mdm", words(folder / name, **changes))
            assert [trace.status for trace in traces] == [0] * size, pools(size).output(0)
            finished[name] = folder / name
        return finished[name]

    return run


@pytest.fixture(scope="module")
def stable(trained: Callable[..., Path]) -> Path:
    return trained("stable")


@pytest.fixture(scope="module")
def branch(trained: Callable[..., Path], stable: Path) -> Path:
    return trained("branch", branch_from=f"{stable}:global_step{LEFT}", **WSD)


def rows(run_dir: Path, *, after: int = 0) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if after < line["step"] <= END]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in kept]


def assert_same_tensors(run_dir: Path, reference: Path) -> None:
    ours, theirs = (CheckpointReader(folder / f"global_step{END}") for folder in (run_dir, reference))
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        assert all(ours.tensor(name, kind).equal(theirs.tensor(name, kind)) for name in theirs.specs), kind


def record(run_dir: Path) -> RunRecord:
    found = RunRecord.read(run_dir)
    assert found is not None
    return found


def test_a_branch_equals_one_run_under_the_data_plan_of_the_stable_run(
    trained: Callable[..., Path], stable: Path, branch: Path
) -> None:
    """Bit for bit: losses, rates, norms, validations, weights and moments; dropout is on, and a log interval is cut in two."""
    one = trained("one", **ONE_GO, save_interval=END)
    assert rows(branch, after=LEFT) == rows(one, after=LEFT)
    assert_same_tensors(branch, one)
    first, at = rows(branch)[0], load_run(stable)
    assert (first["kind"], first["step"]) == ("valid", LEFT) and first["epoch"] > 0  # its curve begins where it leaves
    assert rows(branch, after=END - 1)[-1]["nll"] != rows(stable, after=END - 1)[-1]["nll"] and at.branch is None


def test_both_runs_know_each_other(stable: Path, branch: Path) -> None:
    child, parent = record(branch), record(stable)
    link = child.branch
    assert link is not None
    assert (link.run, link.run_id, link.tag) == (str(stable), parent.run_id, f"global_step{LEFT}")
    assert (link.step, link.samples, link.order_samples) == (LEFT, 8 * LEFT, 8 * LENGTH)
    assert link.changed["optimizer.lr_decay_style"] == ["constant", "WSD"] and child.run_id != parent.run_id
    assert Link(str(branch), child.run_id, link.tag, LEFT) in parent.branches
    assert child.train_samples == 8 * END and child.epochs == pytest.approx(8 * END * 32 / child.unique_tokens)
    optimizer = child.config["optimizer"]
    assert (optimizer["lr_wsd_decay_samples"], optimizer["lr_warmup_samples"]) == (8 * (END - LEFT), 32)
    assert not child.attempts[0].changed and child.attempts[0].from_step == LEFT
    run = load_run(branch)
    assert run.is_finished and run.origin == f"branch of stable at step {LEFT}"


def test_a_branch_is_compared_as_the_run_that_it_stands_for(
    trained: Callable[..., Path], stable: Path, branch: Path
) -> None:
    """Its weights have no other beginning; its data order has another length, which is said."""
    later = trained("later", branch_from=f"{stable}:global_step15", **WSD)
    (said,) = [item for item in differences(load_run(branch), load_run(later)) if not item.layout]
    assert said.field == "optimizer.lr_wsd_decay_samples"
    one = trained("one", **ONE_GO, save_interval=END)
    fields = {item.field for item in differences(load_run(branch), load_run(one))}
    assert "data order" in fields and not {"start", "settings changed on the way"} & fields


def die(step: int, argv: list[str]) -> None:
    def begins(number: int) -> None:
        if number == step:
            os.kill(os.getpid(), signal.SIGKILL)

    jobs.train("mdm", argv, begins=begins)


@pytest.mark.parametrize("done", [3, 8], ids=["before its first checkpoint", "behind it"])
def test_a_killed_branch_goes_on_by_the_same_command(
    pools: Callable[[int], WorkerPool],
    words: Callable[..., list[str]],
    tmp_path: Path,
    stable: Path,
    branch: Path,
    done: int,
) -> None:
    """It branches once; the second start continues it, bit for bit."""
    argv = words(tmp_path / "run", branch_from=f"{stable}:global_step{LEFT}", **WSD)
    assert Process(die, done, argv).wait() == -signal.SIGKILL
    assert pools(1).run(jobs.train, "mdm", argv)[0].status == 0
    output = pools(1).output(0)
    assert ("branching at step 10" if done == 3 else "continuing at step 15") in output
    assert "cannot be read" not in output and not (tmp_path / "run/run.json.damaged").exists()
    assert rows(tmp_path / "run") == rows(branch)
    assert_same_tensors(tmp_path / "run", branch)
    found = record(tmp_path / "run")
    assert found.branch == record(branch).branch and len(found.attempts) == (1 if done == 3 else 2)
    assert [link.run_id for link in record(stable).branches if link.run == str(tmp_path / "run")] == [found.run_id]
    assert pools(1).run(jobs.train, "mdm", argv)[0].status == 0  # a finished one has nothing to do
    assert rows(tmp_path / "run") == rows(branch)


@pytest.mark.parametrize(
    ("size", "layout", "then"),
    [
        (2, {"tp_size": 2}, {"zero_stage": 3, "micro_batch_size": 2}),
        (2, {"pp_size": 2, "micro_batch_size": 2}, {"tp_size": 2}),
        (2, {"zero_stage": 1}, {"pp_size": 2}),
        (2, {"zero_stage": 2}, {"zero_stage": 1}),
        (2, {"zero_stage": 3}, {"zero_stage": 2}),
    ],
    ids=["tp2", "pp2", "dp2", "zero2", "zero3"],
)
def test_a_branch_is_the_same_on_every_layout_and_moves_between_them(
    pools: Callable[[int], WorkerPool],
    words: Callable[..., list[str]],
    trained: Callable[..., Path],
    tmp_path: Path,
    size: int,
    layout: dict[str, Any],
    then: dict[str, Any],
) -> None:
    stable = trained("dry", **NO_DROPOUT)
    begin = {"branch_from": f"{stable}:global_step{LEFT}", "log_interval": 1, **WSD, **NO_DROPOUT}
    expected = jobs.records(trained("dry branch", **begin))
    for attempt in ({**layout, "exit_interval": 15}, then):
        traces = pools(size).run(jobs.train, "mdm", words(tmp_path / "run", **begin, **attempt))
        assert [trace.status for trace in traces] == [75 if attempt is not then else 0] * size, pools(size).output(0)
    found = jobs.records(tmp_path / "run")
    assert list(found) == list(expected) == list(range(LEFT + 1, END + 1))
    for step, row in expected.items():
        assert found[step]["loss"] == pytest.approx(row["loss"], abs=1e-5, rel=0), step
        assert found[step]["lr"] == row["lr"]


def test_a_run_that_trains_keeps_the_branches_that_leave_it(
    pools: Callable[[int], WorkerPool], words: Callable[..., list[str]], tmp_path: Path
) -> None:
    """It writes its record when it ends, long after the branch put itself on its list."""
    stop, stable = tmp_path / "stop", tmp_path / "stable"
    process = Process(
        jobs.run_main, "mdm", words(stable, train_iters=5000, kill_switch_file=stop, lr_warmup_fraction=0.0)
    )
    process.wait_until(lambda: (stable / "global_step10/manifest.json").is_file())
    argv = words(
        tmp_path / "run", branch_from=f"{stable}:global_step10", **{**WSD, "train_iters": 12}, lr_warmup_fraction=0.0
    )
    assert pools(1).run(jobs.train, "mdm", argv)[0].status == 0, pools(1).output(0)
    assert process.is_running and [link.step for link in record(stable).branches] == [10]
    stop.touch()
    assert process.wait() == 75
    parent = record(stable)
    assert parent.attempts[-1].ended is not None
    assert [link.run_id for link in parent.branches] == [record(tmp_path / "run").run_id]


def test_a_list_that_cannot_be_written_ends_no_branch(
    pools: Callable[[int], WorkerPool], words: Callable[..., list[str]], tmp_path: Path, stable: Path
) -> None:
    """Somebody else's run: without a record there, or with that of another one."""
    shutil.copytree(stable / "global_step10", tmp_path / "theirs/global_step10")
    argv = words(tmp_path / "run", branch_from=f"{tmp_path / 'theirs'}:global_step10", **{**WSD, "train_iters": 12})
    assert pools(1).run(jobs.train, "mdm", argv)[0].status == 0
    assert f"warning: not on the list of branches of {tmp_path / 'theirs'}" in pools(1).output(0)
    reason = add_branch(stable, Link(str(tmp_path), "x", "global_step10", 10), parent_id="another")
    assert reason == "its run.json is of another run" and all(link.run_id != "x" for link in record(stable).branches)


@pytest.fixture
def planned(words: Callable[..., list[str]], tmp_path: Path) -> Callable[..., Plan]:
    """``planned(**flags)``: the plan of a branch in tmp_path/run, nothing trained."""

    def plan(save: Path | None = tmp_path / "run", **changes: Any) -> Plan:
        flags = parse(words(save, **{**WSD, **changes}), objective="mdm")
        return resolve(flags, Launch(), run_name="x")

    return plan


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr_decay_style": "cosine", "lr_wsd_decay_style": None}, "step 6 had the rate 0.001, and would have"),
        ({"lr_warmup_fraction": 0.2}, "step 2 had the rate 0.00025, and would have had 0.000"),
        ({"lr_wsd_decay_samples": 8 * END - 60}, "step 9 had the rate 0.001"),
        ({"lr": 2e-3}, "was trained with other settings: optimizer.lr 0.001 → 0.002"),
        ({"weight_decay": 0.5}, "was trained with other settings: optimizer.weight_decay 0.01 → 0.5"),
        ({"train_iters": LENGTH + 1}, "is to end at 328 samples, and the run that it leaves was planned for 320"),
        ({"train_iters": LEFT - 1}, "has trained on 80 samples, this run is to end at 72"),
        ({"branch_from": "STABLE:global_step11"}, "global_step11 has no manifest.json (there is no such folder)"),
        ({"branch_from": "STABLE:../other/global_step10"}, "the tag ../other/global_step10; it is the name of a folder in"),
        ({"objective": "ar"}, "stable is a checkpoint of objective mdm, this run trains ar; "),
        ({"hidden_size": 32}, "stable is a checkpoint of another architecture: hidden_size 64 (here 32)"),
        ({"branch_from": "STABLE"}, "names no run and checkpoint"),
        ({"branch_from": "STABLE/nowhere:global_step10"}, "there is no folder"),
        ({"load": "STABLE"}, "a run begins at one place"),
        ({"save": "STABLE"}, "a branch is a run of its own"),
        ({"skip_train": True}, "--branch-from with --skip-train"),
        ({"save": None, "save_interval": None}, "--branch-from would have no effect; it needs --save"),
        ({"lr_wsd_decay_samples": 8 * END - 31}, "does not fit between the warm-up of 32"),
        ({"branch_from": None}, "--lr-decay-style WSD without --lr-wsd-decay-samples"),
        ({"lr_decay_style": "constant"}, "--lr-wsd-decay-style would have no effect; it needs --lr-decay-style WSD"),
    ],
)  # fmt: skip
def test_what_would_be_no_branch_is_refused(
    planned: Callable[..., Plan], stable: Path, changes: dict[str, Any], said: str
) -> None:
    own = {
        name: value.replace("STABLE", str(stable)) if isinstance(value, str) else value
        for name, value in changes.items()
    }
    with pytest.raises(UserError) as stop:
        planned(**{"branch_from": f"{stable}:global_step{LEFT}", **own})
    words = " ".join(str(stop.value).split())
    assert said in words and ("load" in changes or "--load " not in words.partition("; ")[0])


def test_a_branch_begins_only_in_a_folder_of_its_own(
    words: Callable[..., list[str]], stable: Path, branch: Path, tmp_path: Path, trained: Callable[..., Path]
) -> None:
    def plan(save: Path, tag: str, **changes: Any) -> Plan:
        flags = parse(words(save, branch_from=f"{stable}:{tag}", **{**WSD, **changes}), objective="mdm")
        return resolve(flags, Launch(), run_name="x")

    other = trained("one", **ONE_GO, save_interval=END)
    shutil.copytree(branch, tmp_path / "begun", ignore=shutil.ignore_patterns("global_step*", "latest"))
    for save, held in (
        (branch, "the branch of"),
        (tmp_path / "begun", "the branch of"),
        (other, "a run that is no branch"),
    ):
        with pytest.raises(UserError, match=f"holds {held}.*global_step10|holds {held}"):
            plan(save, "global_step15")
    assert plan(branch, "global_step15", overwrite=True).start.is_branching
    assert plan(tmp_path / "begun", f"global_step{LEFT}").start.is_branching  # killed before its first checkpoint
    for tag in (f"global_step{LEFT}", "latest"):  # what `latest` meant then
        again = plan(branch, tag, load=branch)
        assert again.start.is_continued and not again.start.is_branching and not again.start.changed
        assert again.schedule.order_samples == 8 * LENGTH and again.run_dir == branch
    alone = resolve(parse(words(branch, load=branch, **WSD), objective="mdm"), Launch(), run_name="x")
    assert alone.start.branch == again.start.branch  # what it is stands in its checkpoints
    with pytest.raises(UserError, match=r"optimizer.lr_decay_style WSD → constant"):
        plan(branch, "latest", lr_decay_style="constant", lr_wsd_decay_style=None)


def test_a_branch_of_a_branch_keeps_the_first_data_plan(planned: Callable[..., Plan], branch: Path) -> None:
    plan = planned(branch_from=f"{branch}:latest", train_iters=30, lr_decay_samples=8 * END, lr_wsd_decay_samples=112)
    assert plan.start.branch is not None and plan.start.branch.tag == f"global_step{END}"
    assert plan.schedule.order_samples == 8 * LENGTH and plan.settings.run.branch_from == f"{branch}:global_step{END}"


def test_a_checkpoint_of_the_first_version_can_be_left(tmp_path: Path) -> None:
    """It has no run id, and its record no list."""
    shutil.copytree(REPO / "tests/golden/run_v1", tmp_path / "old", ignore=shutil.ignore_patterns("index-cache"))
    old = tmp_path / "old"
    data = ["--train-data-path", str(old / "train"), "--valid-data-path", str(old / "valid")]
    argv = [
        "--config",
        str(old / "mdm/run.json"),
        *data,
        "--branch-from",
        f"{old / 'mdm'}:global_step5",
        "--save",
        str(tmp_path),
    ]
    link = resolve(parse(argv, objective="mdm"), Launch(), run_name="x").start.branch
    assert link is not None and (link.step, link.samples, link.order_samples, link.run_id) == (5, 20, 40, "")
    assert add_branch(old / "mdm", Link(str(tmp_path), "x", link.tag, 5), parent_id="") is None
    assert record(old / "mdm").branches == [Link(str(tmp_path), "x", "global_step5", 5)]


def test_an_evaluation_of_a_branch_needs_no_length(words: Callable[..., list[str]], branch: Path) -> None:
    changes = {"skip_train": True, "load": branch, "train_iters": None, "save_interval": None, "eval_interval": None}
    plan = resolve(parse(words(None, **{**WSD, **changes}), objective="mdm"), Launch(), run_name="x")
    assert plan.start.is_continued and plan.run_dir == branch


def test_records_repeat_a_stable_run_as_a_branch_and_a_branch_as_itself(
    pools: Callable[[int], WorkerPool], tmp_path: Path, stable: Path, branch: Path
) -> None:
    """The whole command of a branch is the record of the stable run and what differs."""
    short = ["--config", str(stable / "run.json"), "--branch-from", f"{stable}:global_step{LEFT}"]
    short += ["--train-iters", str(END), "--lr-decay-style", "WSD", "--lr-wsd-decay-style", "minus_sqrt"]
    for name, argv in (("short", short), ("again", ["--config", str(branch / "run.json")])):
        assert pools(1).run(jobs.train, "mdm", [*argv, "--save", str(tmp_path / name)])[0].status == 0
        assert rows(tmp_path / name) == rows(branch)
    longer = ["--config", str(branch / "run.json"), "--train-iters", "25", "--save", str(tmp_path / "longer")]
    assert pools(1).run(jobs.train, "mdm", longer)[0].status == 0
    assert record(tmp_path / "longer").config["optimizer"]["lr_wsd_decay_samples"] == 8 * (25 - LEFT)
