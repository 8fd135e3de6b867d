"""Flags, configuration and DeepSpeed settings: nothing is accepted without effect, and nothing is lost on the way."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron.config import Config, build_parser, config_from_dict, config_to_dict, parse
from megatron.training.deepspeed.settings import deepspeed_settings

SHAPE = ["--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4"]
BASE = [*SHAPE, "--train-iters", "10", "--micro-batch-size", "2", "--global-batch-size", "8"]
SECTIONS = [(section.name, section.default_factory) for section in dataclasses.fields(Config)]
FIELDS = [(name, field) for name, cls in SECTIONS for field in dataclasses.fields(cls)]  # type: ignore[arg-type]


def test_help_names_every_field_with_unit_and_default() -> None:
    text = build_parser("pretrain_mdm.py").format_help()
    flags = set(re.findall(r"--[\w-]+", text))
    for _, field in FIELDS:
        spelling = (field.metadata["flags"] or ("--" + field.name.replace("_", "-"),))[0]
        assert spelling in flags
        assert field.metadata["help"].split(";")[0].split()[0] in text
    squeezed = " ".join(text.split())
    assert "--seq-length TOKENS tokens per sample (default: 2048)" in squeezed
    assert "--no-swiglu" in squeezed and "(default: on)" in squeezed
    for title in ("model:", "objective:", "data and tokenizer:", "parallelism and engine:"):
        assert f"\n{title}\n" in text


def test_help_needs_nothing_and_exits_with_0(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    assert "--hidden-size" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (["--hiden-size", "8"], "did you mean --hidden-size?"),
        (["--seq_length", "8"], "did you mean --seq-length?"),
        (["--seq-len", "8"], "'--seq-len'"),  # no silent abbreviations
        (["--lr=abc"], "invalid float value: 'abc'"),
        (["--normalization", "batchnorm"], "rmsnorm"),
    ],
)
def test_malformed_flags_end_with_status_2(capsys: pytest.CaptureFixture, wrong: list[str], hint: str) -> None:
    with pytest.raises(SystemExit) as stop:
        parse([*BASE, *wrong])
    assert stop.value.code == 2
    assert hint in capsys.readouterr().err


def changed(config: Config) -> Config:
    """Every field with another value than its default."""
    sections = {}
    for name, _ in SECTIONS:
        section = getattr(config, name)
        values: dict[str, Any] = {}
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if isinstance(value, bool):
                values[field.name] = not value
            elif isinstance(value, int | float):
                values[field.name] = value + 1
            elif isinstance(value, list):
                values[field.name] = ["0.5", "a", "0.5", "b"]
            else:
                values[field.name] = 3 if value is None else value + "x"
        sections[name] = dataclasses.replace(section, **values)
    return Config(**sections)


def test_configuration_survives_json() -> None:
    for config in (parse(BASE, objective="mdm"), changed(Config())):
        again = config_from_dict(json.loads(json.dumps(config_to_dict(config))))
        assert again == config
    assert config_from_dict({}) == Config()  # fields of newer versions get their defaults
    with pytest.raises(ValueError, match=r"'model' has unknown fields \['hiden_size'\]; .*; load it with"):
        config_from_dict({"model": {"hiden_size": 3}})


def test_configuration_cannot_be_changed() -> None:
    config = parse(BASE)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.hidden_size = 3  # type: ignore[misc]


def test_presets_and_derived_sizes() -> None:
    model = parse(["--model", "140M", "--train-iters", "1"]).model
    assert (model.hidden_size, model.num_layers, model.num_attention_heads, model.kv_channels) == (768, 15, 12, 64)
    assert (model.ffn_hidden_size, model.num_query_groups, model.max_position_embeddings) == (2048, 12, 2048)
    model = parse(["--model", "140M", "--num-layers", "3", "--no-swiglu", "--train-iters", "1"]).model
    assert (model.num_layers, model.ffn_hidden_size) == (3, 4 * 768)  # an explicit size wins
    run = parse([*SHAPE, "--train-iters", "10", "--micro-batch-size", "4"]).run
    assert (run.global_batch_size, run.train_samples) == (4, 40)


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
        ({"fp16": {"enabled": True}}, [], "enables fp16; runs are bf16 or fp32; .*pass --bf16"),
        ({"optimizer": {"type": "Adam"}}, [], "has 'optimizer'; .*--lr.*; remove it"),
        ({"scheduler": {}}, [], "has 'scheduler'; .*--lr-warmup-samples"),
        ([1], [], "holds a list; it must be a JSON object"),
        ("{oops", [], "it must be a JSON file; correct it"),
    ],
)
def test_a_file_that_contradicts_the_flags_is_refused(
    tmp_path: Path, content: Any, flags: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, content, *flags)
