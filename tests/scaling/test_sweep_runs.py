"""Runs of a sweep: started, shared out, skipped, restarted, stopped, and killed with -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from test_sweep import PROGRAM, ROOT, write_sweep

from megatron.data.indexed import IndexedDataset
from megatron.errors import UserError
from megatron.runs.reading import load_run
from megatron.scaling.sweep.definition import load_sweep
from megatron.scaling.sweep.runner import Runner, last_line, make_subsets
from megatron.scaling.sweep.state import read_attempts, state


def starts(sweep) -> dict[str, int]:
    files = {run.name: run.folder / "starts.txt" for run in sweep.runs}
    return {name: len(file.read_text().split()) if file.exists() else 0 for name, file in files.items()}


def assert_complete_and_unmixed(sweep) -> None:
    """Every run is finished, with each step once, in order, and with its own seed, data and objective."""
    for run in sweep.runs:
        assert state(run) == "finished"
        result = load_run(run.folder)
        steps = [row["step"] for row in map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())]
        assert [row["step"] for row in result.train] == list(range(1, result.info["train_samples"] + 1))
        assert steps == sorted(steps)
        assert len(steps) == len(result.train) + len(result.valid)
        assert {row["seed"] for row in result.train} == {str(run.seed)}
        assert (result.objective, result.unique_tokens) == (run.objective, run.unique_tokens)
        assert result.epochs == pytest.approx(run.epochs)


def test_what_a_run_said_last_is_its_error_of_this_attempt(tmp_path):
    log = tmp_path / "log.txt"
    for text, last in (
        ("\n$ a\nerror: old\n\n$ b\nstep 1\n\n", "step 1"),
        ("\n$ b\nerror: new; rule; fix\nW1126 torch\n====\n", "error: new; rule; fix"),
        ("\n$ b\n", "no output"),
        ("\n$ b\n" + "x" * 5000 + "\nValueError: odd\n", "ValueError: odd"),
    ):
        log.write_text(text)
        assert last_line(log) == last


def test_runs_finish_and_are_not_repeated(tmp_path):
    sweep = load_sweep(write_sweep(tmp_path))
    assert {state(run) for run in sweep.runs} == {"waiting"}
    results = Runner(sweep, jobs=2, say=lambda text: None).run(sweep.runs)
    assert set(results.values()) == {"finished"}
    assert_complete_and_unmixed(sweep)
    results = Runner(sweep, jobs=2, say=lambda text: None).run(sweep.runs)
    assert set(results.values()) == {"skipped"}
    assert set(starts(sweep).values()) == {1}


@pytest.mark.parametrize(("jobs", "given", "expected"), [(2, None, "4"), (16, None, "1"), (2, "3", "3"), (1, None, "")])
def test_jobs_share_the_cores(tmp_path, monkeypatch, jobs, given, expected):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    sweep = load_sweep(write_sweep(tmp_path))
    Runner(sweep, jobs=jobs, say=lambda text: None).run(sweep.runs[:2])
    assert {(run.folder / "threads.txt").read_text() for run in sweep.runs[:2]} == {expected}


def test_failed_runs_are_restarted_and_reported(tmp_path, monkeypatch):
    sweep = load_sweep(write_sweep(tmp_path))
    monkeypatch.setenv("FAKE_FAIL", "mdm")
    results = Runner(sweep, attempts=1, say=lambda text: None).run(sweep.runs)
    assert results == {run.name: "failed" if run.objective == "mdm" else "finished" for run in sweep.runs}
    assert {state(run) for run in sweep.runs if run.objective == "mdm"} == {"failed"}
    first = next(run for run in sweep.runs if run.objective == "mdm")
    assert [record["returncode"] for record in read_attempts(first)] == [None, 3]
    results = Runner(sweep, say=lambda text: None).run(sweep.runs)
    assert "failed" not in results.values()
    assert_complete_and_unmixed(sweep)
    assert starts(sweep) == {run.name: 2 if run.objective == "mdm" else 1 for run in sweep.runs}


def test_a_changed_file_cannot_continue_old_results(tmp_path):
    sweep = load_sweep(write_sweep(tmp_path))
    Runner(sweep, say=lambda text: None).run(sweep.runs[:1])
    changed = load_sweep(
        write_sweep(tmp_path, flags={"lr": 0.002, "seq-length": 10, "valid-data-path": "corpus-valid"})
    )
    with pytest.raises(ValueError, match=r"other flags \(lr: 0.001 before, 0.002 now\)"):
        Runner(changed, say=lambda text: None).run(changed.runs)
    (sweep.runs[1].folder).mkdir(parents=True)
    (sweep.runs[1].folder / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="no sweep started"):
        Runner(sweep, say=lambda text: None).run(sweep.runs)


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def test_kill_9_of_sweep_and_trainer_then_again(tmp_path):
    """Both are killed in the middle of the third run; the same command finishes without repeating or mixing."""
    path = write_sweep(tmp_path)
    sweep = load_sweep(path)
    environment = dict(os.environ, FAKE_STEP_SECONDS="0.03")
    process = subprocess.Popen([*PROGRAM, str(path), "run"], env=environment, stdout=subprocess.DEVNULL)
    victim = sweep.runs[2].folder
    wait_for(lambda: (victim / "metrics.jsonl").exists() and (victim / "metrics.jsonl").read_text().count("\n") > 3)
    process.kill()
    process.wait()
    os.kill(int((victim / "starts.txt").read_text().split()[-1]), signal.SIGKILL)
    wait_for(lambda: state(sweep.runs[2]) != "running")
    assert [state(run) for run in sweep.runs[1:4]] == ["finished", "interrupted", "waiting"]
    with open(victim / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # what a kill can leave
    done = subprocess.run([*PROGRAM, str(path), "run"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 skipped" in done.stdout
    assert_complete_and_unmixed(sweep)
    assert starts(sweep) == {run.name: 2 if run.folder == victim else 1 for run in sweep.runs}


def test_trainer_that_outlives_a_killed_sweep_is_waited_for_not_doubled(tmp_path):
    path = write_sweep(tmp_path)
    sweep = load_sweep(path)
    environment = dict(os.environ, FAKE_STEP_SECONDS="0.15")
    process = subprocess.Popen([*PROGRAM, str(path), "run"], env=environment, stdout=subprocess.DEVNULL)
    first = sweep.runs[0]
    wait_for(lambda: (first.folder / "metrics.jsonl").exists())
    process.kill()
    process.wait()
    assert state(first) == "running"
    done = subprocess.run([*PROGRAM, str(path), "run"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_complete_and_unmixed(sweep)
    assert set(starts(sweep).values()) == {1}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_stops_the_training_processes(tmp_path, number):
    path = write_sweep(tmp_path)
    sweep = load_sweep(path)
    process = subprocess.Popen([*PROGRAM, str(path), "run"], env=dict(os.environ, FAKE_STEP_SECONDS="0.2"),
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    wait_for(lambda: (sweep.runs[0].folder / "metrics.jsonl").exists())
    process.send_signal(number)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "stopping" in out
    assert {state(run) for run in sweep.runs} == {"interrupted", "waiting"}
    assert read_attempts(sweep.runs[0])[-1]["returncode"] == 75, "no launcher was told to kill its trainers"


def test_jobs_take_the_gpus_that_they_are_given(tmp_path, monkeypatch):
    sweep = load_sweep(write_sweep(tmp_path))
    runner = Runner(sweep, jobs=2, devices_per_job=2, say=lambda text: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert runner._environment(1)["CUDA_VISIBLE_DEVICES"] == "2,3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,GPU-7")
    assert [runner._environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)] == ["4,5", "6,GPU-7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    with pytest.raises(UserError, match=r"2 GPUs a job, 2 jobs or more; CUDA_VISIBLE_DEVICES=4,5,6"):
        runner.run(sweep.runs)
    assert not any(starts(sweep).values()), "before anything starts"


def test_status_and_unknown_selection(tmp_path):
    path = write_sweep(tmp_path)
    sweep = load_sweep(path)
    Runner(sweep, say=lambda text: None).run(sweep.runs[:2])
    done = subprocess.run([*PROGRAM, str(path), "status"], capture_output=True, text=True, timeout=120)
    assert "2 finished, 6 waiting" in done.stdout
    assert "NLL" in done.stdout
    failed = subprocess.run(
        [*PROGRAM, str(path), "run", "--only", "nothing"], capture_output=True, text=True, timeout=120
    )
    assert failed.returncode == 2
    assert "--only nothing; no run has such a name" in failed.stderr


def test_missing_subsets_are_cut_once_from_the_source(tmp_path):
    source = str(ROOT / "tests/golden/data/rand_text_document")
    data = {"source": source, "directory": str(tmp_path / "subsets")}
    grid = {"objective": ["ar", "mdm"], "model": ["7M"], "unique_tokens": [4000], "epochs": [1]}
    sweep = load_sweep(write_sweep(tmp_path, data=data, grid=grid))
    said: list[str] = []
    make_subsets(sweep, sweep.runs, said.append)
    make_subsets(sweep, sweep.runs, said.append)
    assert len(said) == 1
    assert {run.flags["train-data-path"] for run in sweep.runs} == {str(tmp_path / "subsets/subset-4000_text_document")}
    assert 2000 < IndexedDataset(str(sweep.runs[0].flags["train-data-path"])).sizes.sum() <= 4000
    too_large = load_sweep(write_sweep(tmp_path, data=data, grid={**grid, "unique_tokens": [10**6]}))
    with pytest.raises(ValueError, match="no subset of 1000000 tokens"):
        make_subsets(too_large, too_large.runs, said.append)


def test_a_subset_that_another_task_cuts_is_waited_for(tmp_path):
    """Tasks of one array start together; all but the first wait, and none cuts again."""
    source = str(ROOT / "tests/golden/data/rand_text_document")
    data = {"source": source, "directory": str(tmp_path / "subsets")}
    grid = {"objective": ["ar"], "model": ["7M"], "unique_tokens": [4000], "epochs": [1]}
    path = write_sweep(tmp_path, data=data, grid=grid)
    code = (
        "import sys; from pathlib import Path; from megatron.scaling.sweep.definition import load_sweep\n"
        "from megatron.scaling.sweep.runner import make_subsets\n"
        "sweep = load_sweep(Path(sys.argv[1])); make_subsets(sweep, sweep.runs)"
    )
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        for _ in range(3)
    ]
    endings = [(task.communicate(timeout=120), task.returncode) for task in tasks]
    assert [status for _, status in endings] == [0, 0, 0], endings
    said = "".join(output for (output, _), _ in endings)
    assert said.count("cutting 4,000 tokens") == 1
