"""DeepSpeed settings: they follow the flags, and a user's file changes nothing of what is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.errors import UserError
from megatron.objectives import parse
from megatron.training.deepspeed.settings import deepspeed_settings

BASE = ["--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4"]
BASE += ["--train-iters", "10", "--micro-batch-size", "2", "--global-batch-size", "8"]


def settings(tmp_path: Path, content: Any, *flags: str) -> dict[str, Any]:
    """DeepSpeed settings with a user's file, on two data-parallel ranks."""
    path = tmp_path / "deepspeed.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return deepspeed_settings(parse([*BASE, "--deepspeed_config", str(path), *flags]), dp_size=2, num_parameters=1000)


def test_settings_follow_the_flags() -> None:
    found = deepspeed_settings(parse([*BASE, "--clip-grad", "0.5"]), dp_size=2, num_parameters=1000)
    assert (found["train_batch_size"], found["train_micro_batch_size_per_gpu"]) == (8, 2)
    assert (found["gradient_accumulation_steps"], found["gradient_clipping"]) == (2, 0.5)
    assert found["zero_optimization"]["stage"] == 1 and "bf16" not in found
    assert found["zero_optimization"]["reduce_bucket_size"] == 1000  # no 2 GB buffers for small models
    found = deepspeed_settings(
        parse([*BASE, "--bf16", "--zero-stage", "2", "--cpu-optimizer"]), dp_size=1, num_parameters=10**12
    )
    assert found["bf16"]["enabled"] and found["data_types"] == {"grad_accum_dtype": "fp32"}
    assert found["zero_optimization"]["stage"] == 2
    assert found["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert found["zero_optimization"]["reduce_bucket_size"] == 500_000_000
    zero0 = deepspeed_settings(parse([*BASE, "--zero-stage", "0"]), dp_size=1, num_parameters=10)
    assert zero0["zero_optimization"]["stage"] == 1


def test_a_file_adds_settings_and_may_agree_with_the_flags(tmp_path: Path) -> None:
    plain = deepspeed_settings(parse(BASE), dp_size=2, num_parameters=1000)
    extra = {"wall_clock_breakdown": True, "zero_optimization": {"reduce_bucket_size": 77}}
    found = settings(tmp_path, extra)
    assert found["wall_clock_breakdown"] is True
    assert found["zero_optimization"] == {**plain["zero_optimization"], "reduce_bucket_size": 77}
    agreeing = {"train_batch_size": 8, "gradient_accumulation_steps": "auto", "gradient_clipping": 1.0,
                "zero_optimization": {"stage": 1, "allgather_bucket_size": "auto"}, "bf16": {"enabled": False},
                "fp16": {"enabled": False}, "steps_per_print": "auto"}  # fmt: skip
    assert {**settings(tmp_path, agreeing), "bf16": 0, "fp16": 0} == {**plain, "bf16": 0, "fp16": 0}


def test_no_file_lets_ranks_send_shares_of_tokens_that_are_not_the_same(tmp_path: Path) -> None:
    path = tmp_path / "deepspeed.json"
    path.write_text('{"pipeline": {"pipe_partitioned": true}}')
    words = [*BASE, "--tensor-model-parallel-size", "2", "--deepspeed_config", str(path)]
    with pytest.raises(UserError, match=r"pipe_partitioned to True, the flags to False(.|\n)*--no-sequence-parallel"):
        deepspeed_settings(parse(words, world_size=2), dp_size=1, num_parameters=1000)
    whole = parse([*words, "--no-sequence-parallel"], world_size=2)
    assert deepspeed_settings(whole, dp_size=1, num_parameters=1000)["pipeline"]["pipe_partitioned"]


def test_auto_is_ours_at_any_depth(tmp_path: Path) -> None:
    """A value "auto" that reached DeepSpeed would count as switched on."""
    plain = deepspeed_settings(parse([*BASE, "--bf16"]), dp_size=2, num_parameters=1000)
    auto = {"bf16": {"enabled": "auto", "immediate_grad_update": "auto"}, "zero_optimization": {"stage": "auto"},
            "optimizer": "auto", "scheduler": "auto", "zero_allow_untested_optimizer": "auto"}  # fmt: skip
    assert settings(tmp_path, auto, "--bf16") == plain


@pytest.mark.parametrize("flag", ["--bf16", "--fp16"])
def test_a_file_of_fp16_runs_as_bf16(tmp_path: Path, flag: str) -> None:
    plain = deepspeed_settings(parse([*BASE, "--bf16"]), dp_size=2, num_parameters=1000)
    half = {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 11}, "bf16": {"enabled": False}}
    assert settings(tmp_path, half, flag) == plain
    assert settings(tmp_path, {"fp16": {"enabled": True}}, flag) == plain


def test_fp16_left_to_us_is_not_asked_for(tmp_path: Path) -> None:
    plain = deepspeed_settings(parse(BASE), dp_size=2, num_parameters=1000)
    for half in (
        "auto",
        {"enabled": "auto", "loss_scale": 0},
        {"enabled": False},
        {"loss_scale": 0},
        {"enabled": None},
    ):
        assert settings(tmp_path, {"fp16": half}) == plain


def test_null_says_nothing(tmp_path: Path) -> None:
    given = {"zero_optimization": {"offload_optimizer": None, "reduce_bucket_size": None}, "bf16": None, "timers": None}
    assert settings(tmp_path, given) == settings(tmp_path, {})


def test_sections_that_are_switched_off_go(tmp_path: Path) -> None:
    """Old files name features that DeepSpeed has since removed, and it refuses their very names."""
    plain = deepspeed_settings(parse(BASE), dp_size=2, num_parameters=1000)
    off = {"amp": {"enabled": False}, "curriculum_learning": {"enabled": False}, "sparse_gradients": False}
    assert settings(tmp_path, off) == plain


def test_throughput_is_not_timed_by_deepspeed() -> None:
    """Its timer waits for the device twice a micro-batch."""
    found = deepspeed_settings(parse(BASE), dp_size=2, num_parameters=1000)
    assert found["timers"] == {"throughput": {"enabled": False}}


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ({"train_batch_size": 9}, [], "train_batch_size to 9, the flags to 8; they must agree; .*--global-batch-size"),
        ({"gradient_clipping": 2}, [], "gradient_clipping to 2, the flags to 1.0; .*--clip-grad"),
        ({"train_micro_batch_size_per_gpu": 1}, [], "--micro-batch-size"),
        ({"zero_optimization": {"stage": 2}}, [], "zero_optimization.stage to 2, the flags to 1; .*--zero-stage"),
        ({"zero_optimization": {"stage": 1}}, ["--zero-stage", "3"], "stage to 1, the flags to 3"),
        ({"bf16": {"enabled": True}}, [], "bf16.enabled to True, the flags to False; .*--bf16"),
        ({"bf16": {"enabled": False}}, ["--bf16"], "bf16.enabled to False, the flags to True"),
        ({"fp16": {"enabled": True}}, [], "enables fp16; fp16 runs as bf16 here; pass --bf16, or --fp16"),
        ({"optimizer": {"type": "Adam"}}, [], "has 'optimizer'; .*--lr.*; remove it"),
        ({"scheduler": {}}, [], "has 'scheduler'; .*--lr-warmup-samples"),
        (
            {"optimizer": {"type": "Adam"}, "scheduler": {"type": "WarmupLR"}, "foo": 1},
            [],
            "has 'optimizer', 'scheduler', 'foo'; .*--lr-decay-style.*; remove them from the file",
        ),
        (
            {"gradient_clipping": 7.0, "zero_optimization": {"stage": 3}},
            [],
            r"gradient_clipping to 7.0, the flags to 1.0 and zero_optimization.stage to 3.*or --clip-grad and --zero-stage",
        ),
        ({"curriculum_learning": {"enabled": True}}, [], "has 'curriculum_learning'; every sample is seen whole"),
        ({"data_efficiency": {"enabled": True, "seed": 1}}, [], "has 'data_efficiency'; .*; remove it from the file"),
        (
            {"compression_training": {"weight_quantization": {}}},
            [],
            "has 'compression_training'; weights are trained as",
        ),
        (
            {"progressive_layer_drop": {"enabled": True}},
            [],
            "has 'progressive_layer_drop'; a setting that is not known",
        ),
        ({"zero_optimisation": {"stage": 1}}, [], "has 'zero_optimisation'; a setting that is not known here"),
        (
            {"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}},
            [],
            "has 'zero_optimization.zenflow'; every gradient",
        ),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, ["--bf16"], "has 'bf16.bf16_optimizer_states'"),
        ({"bf16": {"check_grad_overflow": False}}, ["--bf16"], "bf16.check_grad_overflow to False, the flags to True"),
        ({"zero_optimization": {"compute_grad_norm": False}}, [], "zero_optimization.compute_grad_norm to False"),
        ({"pipeline": {"use_reentrant": True}}, [], "pipeline.use_reentrant to True"),
        (
            {"data_types": {"grad_accum_dtype": "bf16"}},
            ["--bf16"],
            "data_types.grad_accum_dtype to bf16, the flags to fp32",
        ),
        ({"zero_allow_untested_optimizer": False}, [], "zero_allow_untested_optimizer to False"),
        ('{"gradient_clipping": NaN}', [], "NaN is not a number of JSON.; --deepspeed_config must be a JSON object"),
        ('{"gradient_clipping": Infinity}', [], "Infinity is not a number of JSON"),
        ({"zero_optimization": [2]}, [], r"has zero_optimization as \[2\]; a section is an object"),
        ({"bf16": 1}, ["--bf16"], "has bf16 as 1; a section is an object"),
        ({"data_types": False}, ["--bf16"], "has data_types as False; a section is an object"),
        ({"wandb": True, "steps_per_print": {"every": 9}}, [], "has wandb as True, steps_per_print as .*'every': 9"),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, [], "offload_optimizer as 'cpu'; a section is an object"),
        (
            {"zero_optimization": {"reduce_bucket_size": "many"}},
            [],
            "reduce_bucket_size as 'many'; .*a size is a number",
        ),
        (
            {"zero_optimization": {"reduce_bucket_size": -5, "stage3_max_live_parameters": "x"}},
            [],
            "size as -5, .*as 'x'",
        ),
        ({"zero_optimization": {"reduce_bucket_size": True}}, [], "reduce_bucket_size as True; .*a size is a number"),
        ({"zero_optimization": {"stage": True}}, [], "zero_optimization.stage to True, the flags to 1"),
        ({"gradient_clipping": True}, [], "gradient_clipping to True, the flags to 1.0"),
        ({"zero_optimization": {"stage3_param_persistence_threshold": [1]}}, ["--zero-stage", "3"], r"as \[1\]"),
        ('{"zero_optimization": {"sub_group_size": 1e999}}', [], "sub_group_size as inf"),
        ([1], [], "it is a list.; --deepspeed_config must be a JSON object"),
        ("{oops", [], "--deepspeed_config must be a JSON object; correct it"),
    ],
)
def test_a_file_that_contradicts_the_flags_is_refused(
    tmp_path: Path, content: Any, flags: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, content, *flags)
