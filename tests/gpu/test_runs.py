"""Whole runs on a GPU, with default settings, against the same runs on the CPU of the same machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from layouts import jobs

REPO = Path(__file__).resolve().parents[2]
PATHS = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])
pytestmark = pytest.mark.gpu
SHAPE = {"num_workers": None, "eval_iters": 2, "eval_interval": 5, "seq_length": 256, "hidden_size": 128}
OBJECTIVES = {
    "ar": {"objective": "ar"},
    "mdm": {"objective": "mdm"},
    "blocks": {"objective": "block_diffusion", "block_size": 32},
    "key drop": {"objective": "masked_attention_ar", "randmask_ratio": 0.5},
    "uniform": {"objective": "uniform_diffusion"},
    "packed": {"objective": "mdm", "reset_attention_mask": True, "reset_position_ids": True},
    "layernorm": {"objective": "ar", "normalization": "layernorm"},
    "fsdp2": {"objective": "mdm", "engine": "fsdp2", "micro_batch_size": 2},
}


def start(run_dir: Path, data: Path, *, gpu: bool, **changes: object) -> str:
    """Run a training to its end, or to ``exit_interval``; its output."""
    changes = {**SHAPE, "valid_data_path": data / "valid", **changes}
    environment = os.environ | {"PYTHONPATH": PATHS, **({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})}
    words = [sys.executable, str(REPO / "pretrain_mdm.py"), *jobs.flags(data, run_dir, **changes)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == (75 if "exit_interval" in changes else 0), done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def losses(run_dir: Path, field: str = "loss") -> list[float]:
    return [row[field] for _, row in sorted(jobs.records(run_dir).items())]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_fp32_losses_are_those_of_the_cpu(token_files: Path, tmp_path: Path, name: str) -> None:
    for gpu in (False, True):
        start(tmp_path / str(gpu), token_files, gpu=gpu, **OBJECTIVES[name])
    cpu, gpu_losses = losses(tmp_path / "False"), losses(tmp_path / "True")
    largest = max(abs(a - b) for a, b in zip(cpu, gpu_losses))
    print(f"{name}: largest difference of 10 losses, fp32 GPU to CPU: {largest:.2e}")
    assert len(cpu) == 10 and largest < 2e-4
    norms = zip(losses(tmp_path / "False", "grad_norm"), losses(tmp_path / "True", "grad_norm"))
    assert all(abs(a - b) < 2e-3 * a for a, b in norms)


@pytest.mark.parametrize(("objective", "engine"), [("ar", "deepspeed"), ("mdm", "deepspeed"), ("mdm", "fsdp2")])
def test_bf16_follows_fp32_and_a_resumed_run_goes_on(
    token_files: Path, tmp_path: Path, objective: str, engine: str
) -> None:
    flags = {"objective": objective, "engine": engine, "bf16": True, "hidden_dropout": 0.1}
    start(tmp_path / "whole", token_files, gpu=True, **flags)
    start(tmp_path / "parts", token_files, gpu=True, **flags, exit_interval=5)
    start(tmp_path / "parts", token_files, gpu=True, **flags, load=tmp_path / "parts")
    start(tmp_path / "cpu", token_files, gpu=False, **{**flags, "bf16": None, "hidden_dropout": 0})
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    largest = max(abs(a - b) for a, b in zip(whole, parts))
    print(f"{objective}: largest difference of 10 losses, resumed to whole, bf16 with dropout: {largest:.2e}")
    assert len(parts) == 10 and whole[:5] == parts[:5] and largest < 1e-3
    assert max(abs(a - b) for a, b in zip(whole, losses(tmp_path / "cpu"))) < 0.05


def test_a_run_of_the_gpu_is_read_on_the_cpu(token_files: Path, tmp_path: Path) -> None:
    start(tmp_path / "run", token_files, gpu=True, objective="mdm", bf16=True)
    found = {}
    for device, hidden in (("gpu", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": ""})):
        output, environment = tmp_path / f"{device}.json", os.environ | {"PYTHONPATH": PATHS} | hidden
        words = [sys.executable, str(REPO / "tools/likelihood.py"), str(tmp_path / "run"), "--samples", "4"]
        words += ["--policies", "left-to-right,random", "--output", str(output)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        findings = json.loads(output.read_text())["findings"]
        found[device] = {finding["estimator"]: finding["nll"] for finding in findings}
    print(f"likelihoods: {found}")
    assert all(abs(found["gpu"][name] - value) < 1e-5 for name, value in found["cpu"].items())
