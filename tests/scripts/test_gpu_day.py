"""The GPU day in miniature, on a CPU: every step but the tests, and what it leaves."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

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
    wrong = run(tmp_path / "out", "soon")
    assert wrong.returncode == 2 and "MINUTES is soon; it is a whole number" in wrong.stderr
