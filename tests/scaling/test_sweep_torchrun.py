"""A sweep whose launcher is torchrun, with real trainers, where the environment is not on PATH."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from megatron.scaling.sweep.definition import load_sweep
from megatron.scaling.sweep.state import is_finished, read_attempts, state

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests/golden/run_v1"
FLAGS = {
    "seq-length": 16, "micro-batch-size": 1, "global-batch-size": 2, "tokenizer-type": "NullTokenizer", "vocab-size": 100,
    "valid-data-path": str(DATA / "valid"), "eval-iters": 1, "log-interval": 1, "num-workers": 0,
}  # fmt: skip
MODEL = {"tiny": {"num-layers": 1, "hidden-size": 32, "num-attention-heads": 2}}


def test_torchrun_off_the_path_trains_stops_and_continues(tmp_path: Path) -> None:
    """The signal reaches the trainers by their file, and they save: torchrun would kill them and turn 75 into 1."""
    grid = {"objective": "ar", "model": MODEL, "unique_tokens": [1000], "epochs": [6]}
    sweep_file = tmp_path / "sweep.yaml"
    sweep_file.write_text(yaml.safe_dump({
        "output": str(tmp_path / "runs"), "grid": grid, "data": {1000: str(DATA / "train")}, "flags": FLAGS,
        "launcher": "torchrun --standalone --nproc-per-node 2",
    }))  # fmt: skip
    environment = {**os.environ, "PATH": "/usr/bin:/bin"}
    command = [sys.executable, str(ROOT / "tools/sweep.py"), str(sweep_file), "run", "--attempts", "1"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    [run] = load_sweep(sweep_file).runs
    metrics, end = run.folder / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 130, said
    log = (run.folder / "log.txt").read_text()
    assert read_attempts(run)[-1]["returncode"] == 75, log
    assert state(run) == "interrupted" and (run.folder / "latest").exists()
    stopped_at = metrics.read_text().count("\n")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert is_finished(run) and metrics.read_text().count("\n") > stopped_at
