"""The command-line programs, as a user of a fresh checkout starts them: from another folder, without PYTHONPATH."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted([*(ROOT / "tools").glob("*.py"), *ROOT.glob("pretrain_*.py")])
TINY = [
    "--num-layers",
    "1",
    "--hidden-size",
    "32",
    "--num-attention-heads",
    "2",
    "--seq-length",
    "32",
    "--micro-batch-size",
    "2",
]


def run(program: Path, *flags: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # the figures below are those of a CPU
    command = [sys.executable, str(program), *flags]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_help(program: Path, tmp_path: Path) -> None:
    done = run(program, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    assert program.stem in done.stdout.splitlines()[0]
    assert list(tmp_path.iterdir()) == []


def test_benchmark_measures_and_writes_json(tmp_path: Path) -> None:
    done = run(
        ROOT / "tools/benchmark.py", *TINY, "--objective", "mdm", "--steps", "3", "--warmup", "1", "--num-workers", "0",
        "--compare-plain", "--json", "result.json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert json.loads(done.stdout) == result
    assert (result["objective"], result["precision"], result["global_batch"], result["sequence"]) == (
        "mdm",
        "fp32",
        2,
        32,
    )
    assert result["layout"] == {"tp": 1, "pp": 1, "dp": 1}
    assert result["steps"] == 3
    seconds = result["step_seconds"]
    assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
    assert result["tokens_per_second"] == pytest.approx(64 / seconds["median"])
    # Blocks: 4 projections of 32 x 32 and 3 matrices of 32 x 64; head: 50,304 x 32 for the masked half; 32 keys a token.
    flops = 6 * (4 * 32 * 32 + 3 * 32 * 64 + 50_304 * 32 * 0.5005) + 12 * 32 * 32
    assert result["flops_per_token"] == pytest.approx(flops)
    assert result["tflops_per_device"] == pytest.approx(flops * result["tokens_per_second"] / 1e12)
    assert result["mfu"] is None  # no data sheet says what this CPU can do
    assert result["times_faster_than_plain"] > 0


def test_benchmark_refuses_a_comparison_with_accumulation(tmp_path: Path) -> None:
    flags = [*TINY, "--objective", "ar", "--global-batch-size", "4", "--compare-plain"]
    done = run(ROOT / "tools/benchmark.py", *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --compare-plain with accumulation")
