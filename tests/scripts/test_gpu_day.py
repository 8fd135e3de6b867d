"""The GPU day in miniature, on a CPU: every step but the tests, and what it leaves."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
DAY = REPO / "tools/gpu_day.sh"
SWEEP = """
name: tiny
output: {folder}/runs
grid:
  objective: [ar, mdm]
  model: {{1x32: {{num-layers: 1, hidden-size: 32, num-attention-heads: 2}}}}
  unique_tokens: [4000]
  epochs: [1]
data: {{source: {data}/train, directory: {folder}/subsets}}
vocab_size: 500
flags:
  {{valid-data-path: {data}/valid, tokenizer-type: NullTokenizer, vocab-size: 500, seq-length: 32, micro-batch-size: 16,
   global-batch-size: 16, eval-interval: 4, eval-iters: 2, save-interval: 10, lr: 1.0e-3}}
"""


def run(*words: object, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""} | settings
    return subprocess.run(
        ["bash", str(DAY), *map(str, words)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def test_every_step_leaves_its_result(token_files: Path, tmp_path: Path) -> None:
    sweep, out = tmp_path / "tiny.yaml", tmp_path / "out"
    sweep.write_text(SWEEP.format(folder=tmp_path, data=token_files))
    done = run(
        out, 10, STEPS="speed crossover", MODELS="7M", OBJECTIVES="mdm", CROSSOVER=str(sweep), TIMED_STEPS="1",
        SPEED_FLAGS="--seq-length 16 --micro-batch-size 2", JOBS="1",
    )  # fmt: skip
    assert done.returncode == 0 and "status 0" in done.stdout and "status 1" not in done.stdout, (
        done.stdout + done.stderr
    )
    speed = json.loads((out / "speed_7M_mdm.json").read_text())
    assert speed["tokens_per_second"] > 0 and speed["mfu"] is None
    shares = [cost["share"] for cost in speed["largest_costs"]]
    assert len(shares) == 10 and shares == sorted(shares, reverse=True) and sum(shares) <= 1
    assert "speed_7M_mdm: " in done.stdout and "% " in done.stdout
    assert json.loads(gzip.decompress((out / "trace_7M_mdm.json.gz").read_bytes()))["traceEvents"]
    assert (out / "report/report.html").is_file() and (out / "doctor.txt").is_file()
    assert {path.name.split("-")[0] for path in (tmp_path / "runs").iterdir() if path.is_dir()} == {"ar", "mdm"}


def test_no_step_and_no_folder(tmp_path: Path) -> None:
    assert run(tmp_path / "out", 1, STEPS="").stdout == ""
    told = run("--help")
    assert told.returncode == 0 and "gpu_day.sh OUT [MINUTES]" in told.stdout
    assert run().returncode == 2


@pytest.mark.parametrize(
    ("words", "settings", "given"),
    [
        (["soon"], {}, "MINUTES is soon; it is a whole number"),
        (["0"], {}, "MINUTES is 0;"),
        (["08"], {}, "MINUTES is 08;"),  # which bash would read as an octal number
        (["9" * 20], {}, "MINUTES is 999"),
        (["5", "more"], {}, "there are 3 arguments"),
        (["5"], {"STEPS": "speed test"}, "STEPS has test; steps are tests, speed"),
        (["5"], {"PYTHON": "no-python"}, "PYTHON is no-python"),
        (["5"], {"WHEELS": "nowhere"}, "WHEELS is nowhere, where no wheel is"),
        (["5"], {"CROSSOVER": "no.yaml"}, "CROSSOVER is no.yaml, which is no file"),
    ],
)
def test_what_is_wrong_is_refused_before_a_minute_is_spent(
    tmp_path: Path, words: list[str], settings: dict[str, str], given: str
) -> None:
    wrong = run(tmp_path / "out", *words, **settings)
    assert wrong.returncode == 2 and wrong.stdout == "" and wrong.stderr.startswith(f"gpu_day.sh: error: {given}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_day_and_what_runs(tmp_path: Path, number: int) -> None:
    """An interpreter that waits as a step does, and leaves its number."""
    slow = tmp_path / "python"
    slow.write_text(f'#!{sys.executable}\nimport os, sys, time\nif sys.argv[1:2] == ["tools/benchmark.py"]:\n'
                    f'    open({str(tmp_path / "pid")!r}, "a").write(f"{{os.getpid()}}\\n")\n    time.sleep(100)\n')  # fmt: skip
    slow.chmod(0o755)
    environment = os.environ | {"PYTHON": str(slow), "STEPS": "speed", "MODELS": "7M"}
    day = subprocess.Popen(
        ["bash", str(DAY), str(tmp_path / "out"), "5"], env=environment, stdout=subprocess.PIPE, text=True
    )
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"))
    day.send_signal(number)
    assert "stopped; what was measured is in" in day.communicate(timeout=60)[0]
    assert day.returncode == 128 + number
    (pid,) = (tmp_path / "pid").read_text().split()  # of one step: the next one did not begin
    wait_for(lambda: not Path("/proc", pid).exists())


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
