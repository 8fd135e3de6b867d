"""What FSDP2's engine does besides the numbers, which are those of every layout (``tests/layouts``)."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from layouts import jobs
from layouts.pool import ENVIRONMENT, WorkerPool

from megatron.checkpoint.reader import CheckpointReader
from megatron.training.step import Observer, PendingStep

REPO = Path(__file__).resolve().parents[3]


def count_exchanges(argv: list[str]) -> dict[str, int]:
    """Gathers of weights and reductions of gradients in the third step, as the process group is asked for them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron.training.main import main

    found: Counter[str] = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            name = function.__name__.split(".")[0]
            found[name] += 1
            return function(*arguments, **(options or {}))

    class Watcher(Observer):
        steps = 0

        def step_begins(self, engine: Any, consumed_samples: int) -> None:
            self.steps += 1
            if self.steps == 3:
                self.mode = Counting()
                self.mode.__enter__()

        def step_ended(self, result: Any) -> None:
            if self.steps == 3:
                self.mode.__exit__(None, None, None)

    assert main("mdm", argv, observer=Watcher()) == 0
    return {name: found[name] for name in found if name.startswith(("_allgather", "_reduce_scatter", "allreduce"))}


@pytest.mark.parametrize(("zero", "gathers"), [(1, 3), (3, 4 * (1 + 2 * 2))])
def test_gradients_are_reduced_once_a_step_and_weights_gathered_as_the_stage_says(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path, zero: int, gathers: int
) -> None:
    """Units are two blocks and what is outside them; a step has four micro-batches."""
    argv = jobs.flags(
        token_files, tmp_path / "run", engine="fsdp2", zero_stage=zero, micro_batch_size=1, train_iters=3, bf16=True
    )
    for found in pools(2).run(count_exchanges, argv):
        assert found == {"_allgather_base_": gathers, "_reduce_scatter_base_": 3, "allreduce_": 2}


def frames(argv: list[str]) -> int:
    """Graphs that are compiled for the blocks of a run."""
    from torch._dynamo.testing import CompileCounter

    from megatron.training.main import main

    torch._dynamo.reset()
    counter, compile = CompileCounter(), torch.compile
    with mock.patch.object(torch, "compile", lambda function, **options: compile(function, backend=counter, **options)):
        assert main("mdm", argv) == 0
    return counter.frame_count


@pytest.mark.parametrize("changes", [{}, {"zero_stage": 3, "tp_size": 2}])
def test_all_blocks_are_one_graph(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    flags = {"engine": "fsdp2", "compile": True, "bf16": True, "train_iters": 3, "num_layers": 3, "micro_batch_size": 2}
    assert pools(2).run(frames, jobs.flags(token_files, tmp_path, **flags, **changes)) == [1, 1]


def train_through_a_nan(argv: list[str]) -> list[tuple[bool, float]]:
    """Whether each step was skipped, and its norm, where the second data-parallel rank meets NaN in the third."""
    from megatron.training.main import main

    class Spoiler(Observer):
        steps = 0

        def built(self, engine: Any) -> None:
            self.found: list[tuple[bool, float]] = []
            engine.module.final_layernorm.register_forward_hook(self.spoil)
            self.is_spoiler = engine.context.dp.rank == 1

        def step_begins(self, engine: Any, consumed_samples: int) -> None:
            self.steps += 1

        def spoil(self, module: Any, given: Any, made: torch.Tensor) -> torch.Tensor | None:
            return made * float("nan") if self.steps == 3 and self.is_spoiler else None

        def step_ended(self, result: Any) -> None:
            numbers = PendingStep(result).read()
            self.found.append((numbers.skipped, numbers.grad_norm))

    spoiler = Spoiler()
    assert main("mdm", argv, observer=spoiler) == 0
    return spoiler.found


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp2"])
def test_a_step_with_a_nan_on_one_rank_changes_nothing_on_any(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path, engine: str
) -> None:
    flags = {"engine": engine, "bf16": True, "train_iters": 4, "save_interval": 1, "ema_decay": 0.9}
    for found in pools(2).run(train_through_a_nan, jobs.flags(token_files, tmp_path, **flags)):
        assert [skipped for skipped, _ in found] == [False, False, True, False]
        assert [norm == float("inf") for _, norm in found] == [False, False, True, False]
    before, after, end = (CheckpointReader(tmp_path / f"global_step{step}") for step in (2, 3, 4))
    for kind in ("weight", "exp_avg", "exp_avg_sq", "ema"):
        for name in before.specs:
            assert after.tensor(name, kind).equal(before.tensor(name, kind))
            assert "layernorm" in name or not end.tensor(name, kind).equal(after.tensor(name, kind))
    counts = [(each.manifest["optimizer_steps"], each.manifest["average_updates"]) for each in (before, after, end)]
    assert counts == [(2, 2), (2, 2), (3, 3)]


def models_kept(argv: list[str]) -> int:
    """Models that a run leaves in its process."""
    from megatron.model.gpt import GPTModel

    def count() -> int:
        gc.collect()
        return sum(isinstance(each, GPTModel) for each in gc.get_objects())

    before = count()
    jobs.train("mdm", argv)
    return count() - before


def test_a_finished_run_lets_go_of_its_model(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path
) -> None:
    argv = jobs.flags(token_files, tmp_path, train_iters=2, engine="fsdp2", tp_size=2)
    assert pools(2).run(models_kept, argv) == [0, 0]


def test_fewer_rows_than_ranks_leave_some_with_nothing(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path
) -> None:
    """A norm of six weights on four ranks: two each, and none on the last. It is saved and loaded as well."""
    flags = {"hidden_size": 6, "num_attention_heads": 1, "kv_channels": 4, "ffn_hidden_size": 5, "save_interval": 2}
    flags |= {"micro_batch_size": 2, "ema_decay": 0.5, "lr_decay_samples": 80}
    (alone,) = pools(1).run(jobs.train, "mdm", jobs.flags(token_files, tmp_path / "alone", train_iters=6, **flags))
    layout = {"engine": "fsdp2", "bf16": False}
    for steps, load in ((4, {}), (6, {"load": tmp_path / "run"})):
        argv = jobs.flags(token_files, tmp_path / "run", train_iters=steps, **flags, **layout, **load)
        for trace in pools(4).run(jobs.train, "mdm", argv):
            done = steps - len(trace.losses)
            assert trace.losses == pytest.approx(alone.losses[done:steps], abs=1e-5)


def test_a_run_changes_engines_and_its_record_names_them(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path
) -> None:
    """Started as users start it, where there is no DeepSpeed; then on two processes under the one engine and the other."""
    code = (
        "import runpy, sys; sys.modules['deepspeed'] = None\n"
        "sys.argv = ['pretrain_mdm.py', *sys.argv[1:]]; runpy.run_path('pretrain_mdm.py', run_name='__main__')"
    )
    flags = {"lr_decay_samples": 80, "valid_data_path": token_files / "valid", "eval_iters": 1, "ema_decay": 0.9}
    beside = {"engine": "fsdp2", "async_save": True}
    argv = jobs.flags(token_files, tmp_path / "run", train_iters=2, **beside, **flags)
    started = subprocess.run(
        [sys.executable, "-c", code, *argv],
        cwd=REPO,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert started.returncode == 0, started.stderr
    assert "dp 1, FSDP2, ZeRO 1 (runs as 2), fp32" in started.stdout
    layouts: list[dict[str, Any]] = [{"engine": "deepspeed"}, {"engine": "fsdp2", "tp_size": 2}]
    for steps, layout in zip((4, 6), layouts):
        argv = jobs.flags(token_files, tmp_path / "run", load=tmp_path / "run", train_iters=steps, **flags, **layout)
        assert [trace.status for trace in pools(2).run(jobs.train, "mdm", argv)] == [0, 0], pools(2).output(0)
    straight = jobs.flags(token_files, tmp_path / "straight", train_iters=6, **flags)
    assert pools(1).run(jobs.train, "mdm", straight)[0].status == 0
    for kind in ("train", "valid", "valid_ema"):
        ours, theirs = (jobs.records(tmp_path / name, kind) for name in ("run", "straight"))
        name = "loss" if kind == "train" else "nll"
        for step, row in theirs.items():
            assert ours[step][name] == pytest.approx(row[name], abs=1e-5)
    attempts = json.loads((tmp_path / "run" / "run.json").read_text())["attempts"]
    assert [attempt["layout"]["engine"] for attempt in attempts] == ["fsdp2", "deepspeed", "fsdp2"]
