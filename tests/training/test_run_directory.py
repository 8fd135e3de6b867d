"""What a run leaves behind: run.json, metrics.jsonl, TensorBoard events and offline W&B files."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import jobs
from layouts.jobs import Run
from layouts.pool import Process, WorkerPool

from megatron.checkpoint.reader import CheckpointReader
from megatron.config import config_from_dict
from megatron.runs.record import TrainRow, ValidRow, clear_run
from megatron.runs.sums import load_sums
from megatron.screen import format_seconds
from megatron.training.reporting import MetricsLog, Screen

NUMBER = (int, float)
RUN_JSON: dict[str, Any] = {
    "format": int, "objective": str, "label": str, "config": dict, "parameters": dict, "unique_tokens": int,
    "train_samples": int, "train_tokens": int, "epochs": float, "train_flops": float, "versions": dict, "device": str,
    "started": str, "text_bytes_per_token": (float, type(None)),
}  # fmt: skip
POSITION: dict[str, Any] = {
    "kind": str, "step": int, "samples": int, "tokens": int, "epoch": float, "flops": float,
}  # fmt: skip
TRAIN: dict[str, Any] = POSITION | {
    "loss": float, "lr": float, "grad_norm": float, "seconds": float, "tokens_per_second": float, "tflops": float,
    "mfu": (float, type(None)), "skipped_steps": int,
}  # fmt: skip
VALID: dict[str, Any] = POSITION | {
    "nll": float, "nll_se": float, "label": str, "estimator": str, "num_mc": int, "num_samples": int, "ppl": float,
    "bits_per_byte": (float, type(None)), "best": bool,
}  # fmt: skip


def assert_fields(record: dict[str, Any], fields: dict[str, Any]) -> None:
    for name, kind in fields.items():
        assert isinstance(record[name], kind), f"{name} is {record[name]!r}"


def read(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "run.json").read_text())


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_files_have_the_agreed_fields(runs: Callable[..., Run], token_files: Path, objective: str) -> None:
    run = runs(objective, 1, valid_data_path=str(token_files / "valid"), eval_interval=5, eval_iters=1)
    record = read(run.run_dir)
    assert_fields(record, RUN_JSON)
    label = "NLL (exact)" if objective == "ar" else "NLL bound"
    assert (record["format"], record["objective"], record["label"]) == (1, objective, label)
    assert (record["train_samples"], record["train_tokens"]) == (80, 80 * 32)
    assert record["epochs"] == pytest.approx(80 * 32 / record["unique_tokens"])
    assert record["unique_tokens"] == (token_files / "train.bin").stat().st_size // 2
    datetime.fromisoformat(record["started"])
    assert record["versions"]["torch"] == torch.__version__
    config = config_from_dict(record["config"])
    assert (config.model.padded_vocab_size, config.model.ffn_hidden_size) == (512, 128)
    assert config.objective.mask_token_id == (500 if objective == "mdm" else None)
    assert len(run.train) == 10 and len(run.valid) == 2
    for step, line in run.train.items():
        assert_fields(line, TRAIN)
        assert (line["samples"], line["tokens"]) == (8 * step, 8 * step * 32)
        assert line["epoch"] == pytest.approx(line["tokens"] / record["unique_tokens"])
        assert line["flops"] == pytest.approx(6 * record["parameters"]["for_compute"] * line["tokens"])
        assert line["tokens_per_second"] == pytest.approx(8 * 32 / line["seconds"])
    for line in run.valid.values():
        assert_fields(line, VALID)
        assert (line["label"], line["num_samples"], line["num_mc"]) == (label, 8, 1)
        assert line["estimator"] == ("" if objective == "ar" else "exact-count-antithetic")
        assert line["bits_per_byte"] is None  # these tokens have no text
        assert load_sums(run.run_dir / line["sums"]).draws == (objective == "mdm")  # an exact loss has no noise


@pytest.mark.parametrize(
    ("size", "layout"), [(1, {}), (2, {"tp_size": 2}), (2, {"pp_size": 2}), (2, {"zero_stage": 3})]
)
def test_parameters_are_those_of_the_whole_model(runs: Callable[..., Run], size: int, layout: dict[str, Any]) -> None:
    run = runs("mdm", size, train_iters=2, **layout)
    parameters = read(run.run_dir)["parameters"]
    specs = CheckpointReader(run.run_dir / "global_step2").specs
    assert parameters["total"] == sum(torch.Size(spec.full_shape).numel() for spec in specs.values())
    assert parameters["embedding"] == 512 * 64
    # FACTS section 1, with this vocabulary and width: 4·L·h² + 3·L·h·ffn + 6·L·h + V·h.
    assert parameters["for_compute"] == 4 * 2 * 64**2 + 3 * 2 * 64 * 128 + 6 * 2 * 64 + 500 * 64


def test_bits_per_byte_follow_the_text(pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path) -> None:
    """Data that record their bytes: bits per byte = nats per token / ln 2 / bytes per token."""
    import math
    import shutil

    data = tmp_path / "data"
    shutil.copytree(token_files, data)
    for name in ("train", "valid"):
        tokens = (data / f"{name}.bin").stat().st_size // 2
        meta = {"format": 1, "tokens": tokens, "text_bytes": 4 * tokens, "vocab_size": jobs.VOCAB}
        (data / f"{name}.meta.json").write_text(json.dumps(meta))
    options = {"train_iters": 2, "valid_data_path": data / "valid", "eval_iters": 1}
    pools(1).run(jobs.train, "mdm", jobs.flags(data, tmp_path / "run", **options))
    (line,) = jobs.records(tmp_path / "run", "valid").values()
    assert line["bits_per_byte"] == pytest.approx(line["nll"] / math.log(2) / 4)
    assert line["ppl"] == pytest.approx(math.exp(line["nll"]))
    assert read(tmp_path / "run")["text_bytes_per_token"] == 4


def test_resume_drops_later_and_torn_lines(tmp_path: Path) -> None:
    config = config_from_dict({})
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": kind, "step": step}) for step in (1, 2, 3, 4) for kind in ("train", "valid")]
    path.write_bytes(("\n".join(lines) + "\n").encode() + b"\xff\n[1]\n{}\n" + lines[-1][:9].encode())
    log = MetricsLog(tmp_path, config, last_step=3)
    log.write(train_row(step=4, loss=float("nan"), grad_norm=float("inf")))
    log.close()
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in found] == [
        *((kind, step) for step in (1, 2, 3) for kind in ("train", "valid")),
        ("train", 4),
    ]
    assert (found[-1]["loss"], found[-1]["grad_norm"]) == (None, None)  # JSON has no NaN


def test_a_folder_that_holds_a_run_is_refused_or_replaced(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    for steps, changes, status in ((4, {}, 0), (2, {}, 2), (2, {"overwrite": True}, 0)):
        argv = jobs.flags(token_files, run_dir, train_iters=steps, **changes)
        assert pools(1).run(jobs.train, "mdm", argv)[0].status == status
        if status == 2:
            assert f"--save {run_dir} holds a run already" in pools(1).output(0)
    assert list(jobs.records(run_dir)) == [1, 2] and not (run_dir / "global_step4").exists()
    # Its own checkpoint would be deleted before it is loaded, and the run start afresh without a word.
    for load in (run_dir / "global_step2", run_dir):
        argv = jobs.flags(token_files, run_dir, overwrite=True, load=load, train_iters=3)
        assert pools(1).run(jobs.train, "mdm", argv)[0].status == 2
        assert f"--overwrite of {run_dir} with a checkpoint of {load}; what is replaced" in pools(1).output(0)
    assert (run_dir / "global_step2").is_dir()


def test_a_checkpoint_that_goes_before_it_is_read_is_no_fresh_start(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    argv = jobs.flags(token_files, run_dir, train_iters=1)
    assert pools(1).run(jobs.train, "mdm", argv)[0].status == 0
    argv = jobs.flags(token_files, tmp_path / "other", load=run_dir, finetune=True, train_iters=1)
    assert pools(1).run(train_without, run_dir, argv) == [2]
    assert "global_step1 is gone; it was there when this run was planned" in pools(1).output(0)


def train_without(run_dir: Path, argv: list[str]) -> int:
    """The status of a run whose checkpoint another one, which replaces it, deletes meanwhile."""
    from unittest import mock

    from megatron.training import resolve
    from megatron.training.main import main

    original = resolve.resolve

    def then_delete(*arguments: Any, **more: Any) -> Any:
        plan = original(*arguments, **more)
        clear_run(run_dir)
        return plan

    with mock.patch.object(resolve, "resolve", then_delete):
        return main("mdm", argv)


def test_replacing_a_run_deletes_its_checkpoints_and_nothing_beside_them(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for place in (run_dir / "global_step1", run_dir / "global_step1-mine", tmp_path / "store"):
        place.mkdir(parents=True)
        (place / "manifest.json").write_text("{}")
    (run_dir / "global_step2").symlink_to(tmp_path / "store")
    clear_run(run_dir)
    assert [path.name for path in run_dir.iterdir()] == ["global_step1-mine"]
    assert (tmp_path / "store/manifest.json").exists(), "what a link names is not in the folder"


def train_row(**changes: Any) -> TrainRow:
    values = {"step": 50, "samples": 1, "tokens": 1, "epoch": 1.234, "flops": 1.0, "loss": 3.21987, "lr": 1.5e-4,
              "grad_norm": 0.4567, "seconds": 1.0, "step_seconds": 1.0, "batch_size": 1, "tokens_per_second": 12345.6,
              "tflops": 1.0, "mfu": None, "skipped_steps": 0, **changes}  # fmt: skip
    return TrainRow(**values)


def test_progress_lines_read_well(capsys: pytest.CaptureFixture) -> None:
    screen = Screen(total_steps=1000, first_step=0, enabled=True)
    screen.train_line(train_row())
    screen.train_line(train_row(step=1000, mfu=0.512, skipped_steps=3))
    Screen(total_steps=1000, first_step=0, enabled=False).train_line(train_row())
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("step   50/1000 | epoch 1.23 | loss 3.2199 | lr 1.50e-04 | norm 0.457 | 12,346 tok/s | ")
    assert first.endswith(" left") and "MFU" not in first and "skipped" not in first
    assert "step 1000/1000" in last and "| MFU 51.2% | skipped 3 | 0 s left" in last


def test_on_80_columns_the_least_important_numbers_are_left_out(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    Screen(total_steps=1000, first_step=0, enabled=True).train_line(train_row())
    screen = Screen(total_steps=200_000, first_step=0, enabled=True)
    screen.train_line(train_row(step=150_000, mfu=0.512, epoch=312.4, tokens_per_second=1.25e6))
    screen.print("a sentence " * 12)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert " | norm 0.457 | 12,346 tok/s | " in lines[0] and "lr" not in lines[0]
    assert lines[1].startswith("step 150000/200000 | epoch 312.40 | loss 3.2199 | MFU 51.2% | ")
    assert lines[-1].startswith("  ")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {},
            "step 7: NLL bound (4 exact-count-antithetic draws) 3.5000 ± 0.0125 nats/token | perplexity 33.12 (best)",
        ),
        (
            {"num_mc": 1, "estimator": "bernoulli", "best": False},
            "NLL bound (1 bernoulli draw) 3.5000 ± 0.0125 nats/token",
        ),
        ({"label": "NLL (exact)", "estimator": ""}, "validation at step 7: NLL (exact) 3.5000 ± 0.0125 nats/token"),
        ({"bits_per_byte": 1.25, "nll_se": None}, "3.5000 nats/token | perplexity 33.12 | 1.2500 bits/byte (best)"),
    ],
)
def test_validation_lines_name_what_they_measure(
    capsys: pytest.CaptureFixture, changes: dict[str, Any], expected: str
) -> None:
    values = {"step": 7, "samples": 1, "tokens": 1, "epoch": 1.0, "flops": 1.0, "label": "NLL bound", "num_mc": 4, "nll": 3.5,
              "estimator": "exact-count-antithetic",
              "nll_se": 0.0125, "ppl": 33.115, "best": True, "num_samples": 8, "bits_per_byte": None, **changes}  # fmt: skip
    row = ValidRow(**values)
    Screen(total_steps=10, first_step=0, enabled=True).valid_line(row)
    line = capsys.readouterr().out.strip()
    assert expected in line and line.endswith("(best)") == row.best


@pytest.mark.parametrize(("seconds", "text"), [(44.6, "45 s"), (725, "12:05 min"), (12010, "3:20 h")])
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_tensorboard_holds_what_metrics_hold(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {
        "train_iters": 4,
        "valid_data_path": token_files / "valid",
        "eval_iters": 1,
        "tensorboard_dir": tmp_path / "events",
        "log_validation_ppl_to_tensorboard": True,
        "log_batch_size_to_tensorboard": True,
    }
    pools(1).run(jobs.train, "mdm", jobs.flags(token_files, tmp_path / "run", **options))
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    for kind in ("train", "valid"):
        lines = jobs.records(tmp_path / "run", kind)
        for name in {"train": ("loss", "lr", "grad_norm", "batch_size"), "valid": ("nll", "ppl")}[kind]:
            found = {event.step: event.value for event in events.Scalars(f"{kind}/{name}")}
            assert found == pytest.approx({step: line[name] for step, line in lines.items()}, rel=1e-6)
    assert "train/step_seconds" not in events.Tags()["scalars"]  # only with --log-timers-to-tensorboard


def test_wandb_writes_offline_without_a_login(token_files: Path, tmp_path: Path) -> None:
    """Two runs of one directory, the second a resume: both write files, under one id."""
    options = {"train_iters": 2, "wandb_project": "tests", "wandb_exp_name": "tiny", "load": tmp_path / "run"}
    home = {"HOME": str(tmp_path), "WANDB_MODE": "", "NETRC": str(tmp_path / "none"), "WANDB_API_KEY": ""}
    for steps in (2, 4):
        argv = jobs.flags(token_files, tmp_path / "run", **{**options, "train_iters": steps})
        process = Process(main_without_wandb_mode, argv, environment=home)
        assert process.wait(120) == 0, process.output
    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and all(file.stat().st_size > 0 for file in files)
    (identity,) = {file.name for file in files}
    assert identity == f"run-{(tmp_path / 'run/wandb_id').read_text()}.wandb"


def main_without_wandb_mode(argv: list[str]) -> int:
    """``main()`` on a machine where nobody has said how W&B is to work."""
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        os.environ.pop(name, None)
    return jobs.run_main("mdm", argv)
