"""Nothing of ours waits for the device within a step, and no host for another. What DeepSpeed does is counted, so that a change
is noticed."""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from layouts import jobs
from layouts.pool import WorkerPool

import megatron

OURS = Path(megatron.__file__).parent
# On a GPU each of these brings a value to the host, hence waits for everything that was queued before.
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")


def count_reads(argv: list[str]) -> dict[str, int]:
    """Reads of device values from the third step of a run to the fourth, by the file that asks for them; and of a step's numbers
    before the next step was queued."""
    from deepspeed.accelerator import get_accelerator
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron.training.main import main
    from megatron.training.step import Observer, PendingStep, StepNumbers

    found: Counter[str] = Counter()
    made: dict[PendingStep, int] = {}

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            if function.__name__.split(".")[0] in READS and (file := _asking_file()):
                found[file] += 1
            return function(*arguments, **(options or {}))

    class Watcher(Observer):
        steps, mode = 0, None

        def step_begins(self, engine: Any, consumed_samples: int) -> None:
            self.steps += 1
            if self.mode is not None:
                self.mode.__exit__(None, None, None)
            self.mode = Counting() if self.steps == 3 else None
            if self.mode is not None:
                self.mode.__enter__()

    watcher: Any = Watcher()
    begin, read = PendingStep.__init__, PendingStep.read

    def begun(pending: PendingStep, result: Any) -> None:
        made[pending] = watcher.steps
        begin(pending, result)

    def read_late(pending: PendingStep) -> StepNumbers:
        if watcher.mode is not None and made[pending] == watcher.steps:
            found["megatron/training/step.py"] += 1
        return read(pending)

    def synchronize(*_: Any) -> None:
        if watcher.mode is not None:
            found["synchronize"] += 1

    with (
        mock.patch.object(type(get_accelerator()), "synchronize", synchronize),
        mock.patch.multiple(PendingStep, __init__=begun, read=read_late),
    ):
        assert main("mdm", argv, observer=watcher) == 0
        assert len(made) == watcher.steps == 4
    return dict(found)


COLLECTIVES = ("all_reduce", "broadcast", "reduce", "barrier", "all_gather", "all_gather_object", "gather_object")


def count_collectives(argv: list[str]) -> dict[str, int]:
    """Collective calls of a rank from the third step to the fourth, those between hosts with their group's name before."""
    import torch.distributed as dist

    from megatron.training.main import main
    from megatron.training.step import Observer

    found: Counter[str] = Counter()

    class Watcher(Observer):
        steps = 0

        def step_begins(self, engine: Any, consumed_samples: int) -> None:
            self.steps += 1
            self.control_group = engine.context.control_group

    watcher = Watcher()

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            if watcher.steps == 3:
                is_host = watcher.control_group in (*arguments, options.get("group"))
                found[f"host {name}" if is_host else name] += 1
            return call(*arguments, **options)

        return counting

    with contextlib.ExitStack() as patches:
        for name in COLLECTIVES:
            patches.enter_context(mock.patch.object(dist, name, counted(name, getattr(dist, name))))
        assert main("mdm", argv, observer=watcher) == 0
    return dict(found)


def _asking_file() -> str | None:
    """The innermost file of ours or DeepSpeed's; None within the preparation of batches, which runs in loader workers."""
    stack = traceback.extract_stack()[:-2]
    if any(Path(frame.filename).is_relative_to(OURS / "data") for frame in stack):
        return None
    for frame in reversed(stack):
        path = Path(frame.filename)
        if path.is_relative_to(OURS):
            return f"megatron/{path.relative_to(OURS)}"
        if "site-packages/deepspeed/" in frame.filename:
            return f"deepspeed/{frame.filename.rpartition('site-packages/deepspeed/')[2]}"
    return "elsewhere"


UTILS, ZERO = "deepspeed/runtime/utils.py", "deepspeed/runtime/zero/stage_1_and_2.py"
# Reads of DeepSpeed 0.19.8 in one step: the gradient norm, whether it is finite, and (ZeRO 2) whether any gradient is not.
EXPECTED: dict[str, tuple[int, dict[str, Any], dict[str, int]]] = {
    "fp32": (1, {}, {UTILS: 3}),
    "bf16": (1, {"bf16": True}, {UTILS: 2}),
    "zero2 bf16": (2, {"bf16": True, "zero_stage": 2}, {UTILS: 3, ZERO: 1}),
    "zero3 bf16": (2, {"bf16": True, "zero_stage": 3}, {UTILS: 1}),
    "tp2 bf16": (2, {"bf16": True, "tp_size": 2}, {UTILS: 2}),
    "pp2 bf16": (2, {"bf16": True, "pp_size": 2}, {UTILS: 2}),
    "fsdp2 bf16": (2, {"bf16": True, "engine": "fsdp2", "ema_decay": 0.9}, {}),
    "fsdp2 zero3 tp2": (4, {"engine": "fsdp2", "zero_stage": 3, "tp_size": 2}, {}),
    "muon with an average": (2, {"bf16": True, "optimizer": "muon", "ema_decay": 0.9}, {UTILS: 2}),
}


@pytest.mark.parametrize("layout", list(EXPECTED))
def test_a_step_waits_only_where_deepspeed_does(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path, layout: str
) -> None:
    size, changes, expected = EXPECTED[layout]
    dp = size // (changes.get("tp_size", 1) * changes.get("pp_size", 1))  # four micro-batches everywhere
    flags = {"train_iters": 4, "log_interval": 100, "micro_batch_size": 2, "global_batch_size": 8 * dp, **changes}
    for found in pools(size).run(count_reads, jobs.flags(token_files, tmp_path / "run", **flags)):
        assert not [place for place in found if not place.startswith("deepspeed/")], found
        assert found == expected


# All-reduces of the first rank in a step with two micro-batches: one over all ranks, of losses and of what each rank wishes;
# the others are of gradients and their norm, and of tensor-parallel layers.
CALLS: dict[str, tuple[int, dict[str, Any], int]] = {
    "dp2": (2, {}, 1 + 1),
    "tp2": (2, {"tp_size": 2}, 1 + 18),  # with the sequence split, sums of layers are scattered instead
    "pp2": (2, {"pp_size": 2}, 1 + 3),
    "fsdp2 dp2": (2, {"engine": "fsdp2", "micro_batch_size": 2}, 1 + 1),
    "pp2 tp2": (4, {"pp_size": 2, "tp_size": 2}, 1 + 7),
}


@pytest.mark.parametrize("layout", list(CALLS))
def test_no_host_asks_another_within_a_step(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path, layout: str
) -> None:
    size, changes, expected = CALLS[layout]
    argv = jobs.flags(token_files, tmp_path / "run", train_iters=5, log_interval=100, bf16=True, **changes)
    found = pools(size).run(count_collectives, argv)
    assert found[0] == {"all_reduce": expected} and all(set(calls) == {"all_reduce"} for calls in found)


def test_no_copy_of_a_batch_to_the_device_waits() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron.data.loader import to_device
    from megatron.model.batch import Inputs, ModelBatch, Targets

    asked: list[bool] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            if function.__name__.startswith("_to_copy"):
                asked.append((options or {}).get("non_blocking", False))
            return function(*arguments, **(options or {}))

    ids = torch.zeros(2, 8, dtype=torch.int64)
    batch = ModelBatch(Inputs(ids, sample_ids=ids[:, 0]), Targets(ids, ids.float(), ids[:, 0], ids[:, 0].float()))
    with Copies():  # of tensors as they come from pinned memory
        moved = to_device(batch, torch.device("meta"))
    assert moved.inputs.input_ids.is_meta and asked == [True] * 6
