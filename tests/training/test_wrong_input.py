"""Wrong input ends in one message that says what was given, the rule and the fix, with a status that scripts notice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import jobs
from layouts.pool import ENVIRONMENT, Process, WorkerPool

from megatron.objectives import parse
from megatron.parallel.launch import Launch
from megatron.training.reporting import Screen
from megatron.training.resolve import resolve
from megatron.training.validation import Validator

REPO = Path(__file__).resolve().parents[2]


def refused(argv: list[str], *, processes: int = 1) -> str:
    """The message of a run that must not start, given to ``processes`` processes of which this is the first."""
    # No other process exists and none may be waited for: the check comes before any process group.
    world = {"WORLD_SIZE": str(processes), "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    process = Process(jobs.run_main, "mdm", argv, environment=world if processes > 1 else {})
    status = process.wait(60)  # seconds on an idle machine
    lines = process.output.strip().splitlines()
    assert status == 2, process.output
    assert "Traceback" not in process.output
    assert lines[-1].startswith("error: ") and len([line for line in lines if "error:" in line]) == 1
    assert lines[-1].count(";") >= 2, "given; rule; fix"
    return lines[-1]


def test_missing_data(tmp_path: Path) -> None:
    message = refused(jobs.flags(tmp_path, tmp_path / "run"))
    assert f"no data at {tmp_path}/train" in message and "tools/preprocess_data.py" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["train", "valid"])
def test_truncated_tokens(token_files: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(token_files, tmp_path / "data", ignore=shutil.ignore_patterns("index-cache"))
    size = (tmp_path / "data" / f"{kind}.bin").stat().st_size
    os.truncate(tmp_path / "data" / f"{kind}.bin", size - 10)
    argv = jobs.flags(tmp_path / "data", tmp_path / "run", valid_data_path=tmp_path / "data/valid")
    message = refused(argv)
    assert f"{kind}.bin has {size - 10} bytes" in message and str(size) in message and "truncated" in message


def test_validation_on_training_data_is_refused_and_has_a_flag(token_files: Path, tmp_path: Path) -> None:
    (tmp_path / "copies").mkdir()
    for suffix in (".bin", ".idx"):
        shutil.copy(token_files / f"train{suffix}", tmp_path / f"copies/other{suffix}")
    (tmp_path / "link").symlink_to(token_files)
    for valid in (token_files / "train", tmp_path / "copies/other", tmp_path / "link/train"):
        blend = ["0.5", token_files / "valid", "0.5", valid]
        argv = [*jobs.flags(token_files, tmp_path / "run"), "--valid-data-path", *map(str, blend)]
        message = refused(argv)
        assert "are the training data" in message and "tools/split_data.py" in message
        assert message.endswith("or pass --allow-training-data-in-validation")
        assert not (tmp_path / "run").exists()
    for allowed in ("--allow-training-data-in-validation", "--skip-train"):
        assert len(resolve(parse([*argv, allowed], objective="mdm"), Launch(), run_name="x").sources.valid) == 4


def test_an_evaluation_of_nothing_is_refused_and_a_run_without_validation_is_none(
    tmp_path: Path, token_files: Path
) -> None:
    argv = [*jobs.flags(token_files, tmp_path / "run"), "--valid-data-path", str(token_files / "valid")]
    for none in ("0", "00"):
        message = refused([*argv, "--eval-iters", none, "--skip-train", "--load", str(tmp_path)])
        assert message.startswith(
            "error: --skip-train without validation: --eval-iters 0; it needs a validation; raise"
        )
        plan = resolve(parse([*argv, "--eval-iters", none], objective="mdm"), Launch(), run_name="x")
        engine: Any = None
        assert not Validator(
            plan, engine, probe=None, screen=Screen(total_steps=1, first_step=0, enabled=False)
        ).has_data


def test_ids_beyond_the_vocabulary_name_the_file(token_files: Path, tmp_path: Path) -> None:
    largest = max(int(np.fromfile(token_files / "valid.bin", np.uint16).max()), 300)
    argv = jobs.flags(token_files, tmp_path / "run", valid_data_path=token_files / "valid", vocab_size=largest)
    message = refused(argv)
    assert ".bin holds the id" in message and f"below the size of the vocabulary, {largest}" in message


def test_verification_is_refused_where_nothing_was_recorded(token_files: Path, tmp_path: Path) -> None:
    message = refused([*jobs.flags(token_files, tmp_path / "run"), "--verify-data"])
    assert "records no digests" in message and "--record" in message


RULES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "batch": (
        {"global_batch_size": 9, "micro_batch_size": 2},
        ["--global-batch-size 9 is not divisible by micro batch 2", "use 8"],
    ),
    "mask id": (
        {"vocab_size": 512},
        ["mask id 512 has no row in the padded vocabulary of 512", "--padded-vocab-size 640"],
    ),
    "tokens beyond": ({"padded_vocab_size": 384}, ["padded vocabulary 384 is below the vocabulary 500"]),
    "two lengths": ({"train_samples": 160}, ["given 2 times", "pass one of"]),
    "warm-up": ({"lr_warmup_samples": 100}, ["warm-up of 100 samples leaves nothing of the 80"]),
    "objective": ({"objective": "mdn"}, ["--objective 'mdn'", "mdm"]),
    "preset": ({"model": "7b"}, ["--model '7b' is not a preset", "7M"]),
    "load tag": ({"load_tag": "latest"}, ["--load-tag would have no effect", "it needs --load"]),
    "flag of another objective": ({"randmask_ratio": 0.5}, ["--randmask-ratio with objective mdm"]),
    "no validation": (
        {"valid_data_path": "x", "eval_iters": 0, "skip_train": True},
        ["--skip-train without validation: --eval-iters 0", "raise --eval-iters"],
    ),
    "no best": (
        {"valid_data_path": "x", "eval_iters": "00", "save_best": True},
        ["--save-best without validation: --"],
    ),
    "no objective": ({"objective": ""}, ["--objective ''; an objective is one of ar, mdm"]),
    "settings file": ({"deepspeed_config": "/nowhere.json"}, ["/nowhere.json does not exist"]),
}


@pytest.mark.parametrize("rule", list(RULES))
def test_broken_rule(token_files: Path, tmp_path: Path, rule: str) -> None:
    changes, parts = RULES[rule]
    message = refused(jobs.flags(token_files, tmp_path / "run", **changes))
    assert all(part in message for part in parts), message


FSDP2: dict[str, tuple[int, dict[str, Any], list[str]]] = {
    "pipeline": (2, {"pp_size": 2}, ["--engine fsdp2 with 2 pipeline stages", "or pass --engine deepspeed"]),
    "muon": (1, {"optimizer": "muon"}, ["--engine fsdp2 with --optimizer muon", "use --optimizer adam"]),
    "host": (
        1,
        {"cpu_optimizer": True},
        ["--engine fsdp2 with --cpu-optimizer", "on the device; drop it, or pass --engine deepspeed"],
    ),
    "answers": (1, {"gap_task": "x.jsonl", "valid_data_path": "x"}, ["--engine fsdp2 with --gap-task", "downstream"]),
    "settings": (1, {"deepspeed_config": "x.json"}, ["--deepspeed_config would have no effect", "--engine deepspeed"]),
}


@pytest.mark.parametrize("rule", list(FSDP2))
def test_what_fsdp2_does_not_do(token_files: Path, tmp_path: Path, rule: str) -> None:
    processes, changes, parts = FSDP2[rule]
    message = refused(jobs.flags(token_files, tmp_path / "run", engine="fsdp2", **changes), processes=processes)
    assert all(part in message for part in parts), message


LAYOUTS: dict[str, tuple[int, dict[str, Any], list[str]]] = {
    "heads": (3, {"tp_size": 3}, ["num_attention_heads 4 is not divisible by tensor-parallel size 3", "1, 2, 4"]),
    "sequence": (
        2,
        {"tp_size": 2, "seq_length": 33, "sequence_parallel": True},
        [
            "--sequence-parallel with --seq-length 33 and tensor-parallel size 2",
            "use --seq-length 32, or drop the flag",
        ],
    ),
    "processes": (2, {"tp_size": 4}, ["2 processes cannot hold tensor-parallel 4", "start 4"]),
    "stages": (4, {"pp_size": 4}, ["4 pipeline stages for 2 layers", "at most 2"]),
    "zero": (2, {"pp_size": 2, "zero_stage": 2}, ["--zero-stage 2 with 2 pipeline stages", "--zero-stage 1"]),
    "batch": (3, {}, ["--global-batch-size 8 is not divisible by micro batch 4 x data-parallel size 3 = 12", "use 12"]),
}


@pytest.mark.parametrize("rule", list(LAYOUTS))
def test_layout_that_does_not_fit(token_files: Path, tmp_path: Path, rule: str) -> None:
    processes, changes, parts = LAYOUTS[rule]
    message = refused(jobs.flags(token_files, tmp_path / "run", **changes), processes=processes)
    assert all(part in message for part in parts), message


def test_unknown_flag_of_the_real_program(token_files: Path, tmp_path: Path) -> None:
    argv = [*jobs.flags(token_files, tmp_path / "run"), "--hiden-size", "64"]
    result = subprocess.run(
        [sys.executable, str(REPO / "pretrain_mdm.py"), *argv],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPO)},
    )
    assert result.returncode == 2
    assert "unknown argument '--hiden-size'" in result.stderr and "did you mean --hidden-size?" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def saved(pools: Callable[[int], WorkerPool], token_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps."""
    run_dir = tmp_path_factory.mktemp("saved")
    (trace,) = pools(1).run(jobs.train, "mdm", jobs.flags(token_files, run_dir, train_iters=2))
    assert trace.status == 0
    return run_dir


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"hidden_size": 128}, ["checkpoint of another architecture", "hidden_size 64 (here 128)"]),
        ({"num_layers": 3}, ["checkpoint of another architecture", "num_layers 2 (here 3)"]),
        (
            {"untie_embeddings_and_output_weights": True},
            ["another architecture", "untie_embeddings_and_output_weights False (here True)"],
        ),
        ({"objective": "ar"}, ["checkpoint of objective mdm, this run trains ar", "--finetune"]),
        ({"load_tag": "global_step7"}, ["global_step7 has no manifest.json", "name another checkpoint"]),
    ],
)
def test_checkpoint_that_does_not_fit(
    token_files: Path, tmp_path: Path, saved: Path, changes: dict[str, Any], parts: list[str]
) -> None:
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    message = refused(jobs.flags(token_files, tmp_path / "run", load=saved, **changes))
    assert all(part in message for part in parts), message
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before


def test_nothing_to_finetune(token_files: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = refused(jobs.flags(token_files, tmp_path / "run", load=tmp_path / "empty", finetune=True))
    assert "holds no checkpoint" in message


@pytest.mark.parametrize("kind", ["file", "read-only file system"])
def test_run_directory_that_cannot_be_written(token_files: Path, tmp_path: Path, kind: str) -> None:
    """Root may write anywhere, so permissions alone would not stop the tests."""
    (tmp_path / "file").touch()
    run_dir = tmp_path / "file/run" if kind == "file" else Path("/proc/run")
    message = refused(jobs.flags(token_files, run_dir))
    assert f"the run directory {run_dir} cannot be written" in message and "choose another --save" in message
