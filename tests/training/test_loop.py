"""What the loop makes of step results: averages over log intervals, skipped steps, the best validation."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron.config import Config, parse
from megatron.parallel.context import ParallelContext
from megatron.training.deepspeed.engine import StepResult
from megatron.training.loop import Loop, TrainState, state_from_dict, state_to_dict
from megatron.training.reporting import MetricsLog, Progress, Throughput

SHAPE = ["--num-layers", "1", "--hidden-size", "32", "--num-attention-heads", "1", "--seq-length", "10",
         "--vocab-size", "50", "--padded-vocab-size", "128"]  # fmt: skip


def configuration(*flags: str) -> Config:
    return parse([*SHAPE, "--global-batch-size", "4", "--micro-batch-size", "2", *flags], objective="mdm")


class Engine:
    """Gives the results it is told to, one a step."""

    def __init__(self, *results: tuple[float, bool]) -> None:
        self.context = ParallelContext()
        self.results: Iterator[tuple[float, bool]] = iter(results)
        self.samples: list[int] = []

    def train_step(self, data: Any, *, consumed_samples: int) -> StepResult:
        self.samples.append(consumed_samples)
        loss, skipped = next(self.results)
        return StepResult(torch.tensor(loss), math.inf if skipped else 1.0, 1e-3, skipped)


def loop_over(engine: Engine, run_dir: Path, *flags: str, **parts: Any) -> Loop:
    config = configuration(*flags)
    state = parts.pop("state", TrainState())
    throughput = Throughput(config, flops_per_token=1.0, num_devices=1, device=torch.device("cpu"))
    values = {
        "batches": iter(()),
        "validate": None,
        "save": None,
        "log": MetricsLog(run_dir, config, resume_step=state.step),
        "progress": Progress(total_steps=9, first_step=0, enabled=True),
        "throughput": throughput,
        "unique_tokens": 400,
        "parameters": 7,
    }
    return Loop(config=config, engine=engine, state=state, **{**values, **parts})  # type: ignore[arg-type]


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_log_line_averages_its_interval_and_says_where_the_run_is(tmp_path: Path) -> None:
    engine = Engine((1.0, False), (2.0, False), (6.0, False), (4.0, False), (9.0, False))
    loop_over(engine, tmp_path, "--train-iters", "5", "--log-interval", "2").run()
    assert engine.samples == [0, 4, 8, 12, 16]
    first, second, last = lines(tmp_path)
    assert [line["loss"] for line in (first, second, last)] == [1.5, 5.0, 9.0]  # the last step is always logged
    assert (second["step"], second["samples"], second["tokens"]) == (4, 16, 160)
    assert (second["epoch"], second["flops"]) == (160 / 400, 6 * 7 * 160)


def test_skipped_steps_are_counted_but_not_averaged(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Also where the loss of the skipped step is finite and only its gradient is not."""
    engine = Engine((2.0, False), (100.0, True), (math.nan, True), (math.inf, True), (4.0, False))
    loop_over(engine, tmp_path, "--train-iters", "5", "--log-interval", "2").run()
    first, second, last = lines(tmp_path)
    assert (first["loss"], first["skipped_steps"]) == (2.0, 1)
    assert (second["loss"], second["skipped_steps"]) == (None, 3)  # no loss at all, which is not a loss of 0
    assert (last["loss"], last["skipped_steps"], last["grad_norm"]) == (4.0, 3, 1.0)
    output = capsys.readouterr().out
    assert "step 2 skipped: its gradient is not finite (1 so far)" in output and "skipped 3" in output


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    """The limit is on steps in a row: single bad steps may add up to more."""
    spread = [(1.0, step % 2 == 0) for step in range(9)]
    loop_over(Engine(*spread), tmp_path, "--train-iters", "9", "--max-skipped-steps", "2").run()
    engine = Engine((1.0, False), *[(math.nan, True)] * 8)
    with pytest.raises(RuntimeError, match=r"3 steps in a row .*--max-skipped-steps 2\); .* lower --lr"):
        loop_over(engine, tmp_path, "--train-iters", "9", "--max-skipped-steps", "2").run()
    assert len(engine.samples) == 4


def validations(*values: float) -> Any:
    queue = iter(values)
    others = {"nll_se": 0.1, "label": "NLL bound", "num_mc": 1, "num_samples": 8, "ppl": 1.0, "bits_per_byte": None}
    return lambda: {"nll": next(queue), **others}


def test_the_best_validation_is_the_lowest_finite_one(tmp_path: Path) -> None:
    loop = loop_over(
        Engine(*[(1.0, False)] * 5),
        tmp_path,
        *("--train-iters", "5", "--eval-interval", "1", "--valid-data-path", "x"),
        validate=validations(math.nan, 5.0, 6.0, 4.0, math.inf),
    )
    loop.run()
    assert (loop.state.best_step, loop.state.best_nll) == (4, 4.0)
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 4, "nll": 4.0, "label": "NLL bound"}
    found = [(line["nll"], line["best"]) for line in lines(tmp_path) if line["kind"] == "valid"]
    assert found == [(None, False), (5.0, True), (6.0, False), (4.0, True), (None, False)]


def test_saves_fall_on_the_interval_and_on_the_last_step(tmp_path: Path) -> None:
    saved: list[TrainState] = []
    flags = ("--train-iters", "5", "--save-interval", "2", "--save", str(tmp_path), "--log-interval", "3")
    engine = Engine((1.0, False), (2.0, False), (3.0, False), (4.0, False), (5.0, False))
    loop_over(engine, tmp_path, *flags, save=lambda state: saved.append(SimpleNamespace(**vars(state)))).run()
    assert [(state.step, state.consumed_samples) for state in saved] == [(2, 8), (4, 16), (5, 20)]
    # Losses of the unfinished log interval travel with the checkpoint.
    assert [(state.loss_sum, state.loss_count) for state in saved] == [(3.0, 2), (4.0, 1), (0.0, 0)]


def test_an_interval_goes_on_after_a_restart(tmp_path: Path) -> None:
    state = TrainState(step=2, consumed_samples=8, loss_sum=3.0, loss_count=2)
    engine = Engine((6.0, False), (7.0, False))
    loop_over(engine, tmp_path, "--train-iters", "4", "--log-interval", "3", state=state).run()
    assert engine.samples == [8, 12]
    assert [line["loss"] for line in lines(tmp_path)] == [3.0, 7.0]


def test_the_state_survives_json() -> None:
    state = TrainState(5, 40, 2, 1, 0.1 + 0.2, 3, 4, 5.5)
    again = state_from_dict({**json.loads(json.dumps(state_to_dict(state))), "config": {}, "unknown": 1})
    assert again == state
