"""Where the time of a profiled step went."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron.commands.benchmark import main
from megatron.commands.speed import TRACED, benchmark_config, largest_costs
from megatron.errors import UserError
from megatron.objectives import build_objective

CPU, CUDA = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA


def event(key: str, device: object, time: float) -> SimpleNamespace:
    return SimpleNamespace(key=key, device_type=device, self_device_time_total=time, self_cpu_time_total=1.0, count=4)


def test_on_a_gpu_the_time_of_a_kernel_counts_once() -> None:
    """The profiler gives an operator the time of its kernels, too."""
    events = [event("aten::mm", CPU, 3000.0), event("kernel of mm", CUDA, 3000.0), event("softmax", CUDA, 1000.0)]
    found = largest_costs(events, is_gpu=True)
    assert [(cost["name"], cost["share"]) for cost in found] == [("kernel of mm", 0.75), ("softmax", 0.25)]
    assert found[0]["ms"] == 3.0 / TRACED and found[0]["calls"] == 4 / TRACED


def test_on_a_cpu_operators_count() -> None:
    found = largest_costs([event(f"aten::{number}", CPU, 0.0) for number in range(12)], is_gpu=False)
    assert len(found) == 10 and sum(cost["share"] for cost in found) == pytest.approx(10 / 12)


def test_a_trace_that_could_not_be_written_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--trace .*its folder must be there"):
        main(["--model", "7M", "--trace", str(tmp_path / "none/trace.json")])


def test_a_training_command_is_timed_and_what_has_no_effect_is_named() -> None:
    """Of its length, too, which was refused as a second one."""
    notes: list[str] = []
    flags = "--model 7M --bf16 --seed 3 --train-samples 100 --save runs/x --lr 1e-3 --micro-batch-size 2"
    config = benchmark_config(flags.split(), 4, notes)
    assert (config.run.train_samples, config.run.global_batch_size, config.run.bf16) == (8, 2, True)
    assert notes[0].endswith("nothing: --train-samples, --save") and len(notes) == 1
    quiet: list[str] = []
    benchmark_config(["--model", "7M"], 4, quiet)
    assert not quiet
    with pytest.raises(UserError, match="--skip-train; a benchmark times training steps"):
        benchmark_config(["--skip-train"], 4)


@pytest.mark.parametrize(("name", "mask"), [("ar", None), ("mdm", 50257), ("uniform_diffusion", None)])
def test_objectives_are_told_the_vocabulary(name: str, mask: int | None) -> None:
    """Whose tokens uniform noise draws from."""
    config = benchmark_config(["--model", "7M", "--seq-length", "32", "--objective", name], 1)
    assert build_objective(config).label and config.objective.mask_token_id == mask


def test_a_plain_step_is_compared_with_one_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tensor-parallel ranks have one micro-batch a step, too."""
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 2,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 29500,
    }.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="--compare-plain with accumulation or several ranks"):
        main(
            [
                "--model",
                "7M",
                "--micro-batch-size",
                "1",
                "--global-batch-size",
                "1",
                "--tp-size",
                "2",
                "--compare-plain",
            ]
        )
