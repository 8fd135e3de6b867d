"""Flags, configuration and DeepSpeed settings: nothing is accepted without effect, and nothing is lost on the way."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from typing import Any

import pytest

from megatron.config import Config, build_parser, config_from_dict, config_to_dict
from megatron.config.option import spelling
from megatron.config.shape import PRESETS, Shape, padded_size
from megatron.config.usage import TOPICS
from megatron.config.validate import PATHS, idle_notes
from megatron.errors import UserError
from megatron.objectives import OBJECTIVES, parse

SHAPE = ["--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4"]
BASE = [*SHAPE, "--train-iters", "10", "--micro-batch-size", "2", "--global-batch-size", "8"]
SECTIONS = [(section.name, section.default_factory) for section in dataclasses.fields(Config)]
FIELDS = [(name, field) for name, cls in SECTIONS for field in dataclasses.fields(cls) if field.metadata]  # type: ignore[arg-type]
OPTIONS = {item.name: (cls.Options, item) for cls in OBJECTIVES.values() for item in dataclasses.fields(cls.Options)}


def test_help_names_every_field_with_unit_and_default() -> None:
    text = build_parser(OBJECTIVES, "pretrain_mdm.py").format_help()
    flags = set(re.findall(r"--[\w-]+", text))
    for _, field in FIELDS:
        spelling = (field.metadata["flags"] or ("--" + field.name.replace("_", "-"),))[0]
        assert spelling in flags
        assert field.metadata["help"].split(";")[0].split()[0] in text
    squeezed = " ".join(text.split())
    assert "--seq-length TOKENS tokens per sample (default: 2048; at least 1)" in squeezed
    assert "--swiglu SwiGLU feed-forward, else GELU (default: on; --no-swiglu turns it off)" in squeezed
    assert "--ar-ratio P mdm: probability that" in squeezed and "(default: 0.0; in [0, 1])" in squeezed
    assert all(name in squeezed.partition("objective: ")[2].partition(": the flags")[0] for name in OBJECTIVES)
    assert max(map(len, text.splitlines())) <= 80
    assert "exit status: 0 at the end of the run, 75 stopped" in squeezed
    assert "[]" not in text
    for title in ("model:", "objective:", "data and tokenizer:", "parallelism and engine:"):
        assert f"\n{title}\n" in text


@pytest.mark.parametrize(
    ("topic", "holds", "lacks"),
    [
        (
            [],
            ["  block_diffusion  ", " 140M,", "--lr X", "  optimizer  ", "megatron train --objective"],
            ["--adam-beta1"],
        ),
        (["optimizer"], ["--adam-beta1", "--lr X"], ["--hidden-size"]),
        (["MDM"], ["mdm: Masked diffusion", "--ar-ratio P"], ["--num-order-list", "--lr"]),
        (["warmup"], ["--lr-warmup-samples", "--lr-warmup-fraction"], ["--hidden-size"]),
        (["save_best"], ["--save-best"], ["--hidden-size"]),
        (["presets"], ["7M             3     128       4"], ["--lr"]),
        (["all"], ["--hidden-size", "--adam-beta1"], []),
    ],
    ids=str,
)
def test_help_answers_by_topic_in_80_columns(
    topic: list[str], holds: list[str], lacks: list[str], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["--help", *topic])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(words in text for words in holds) and not [words for words in lacks if words in text]
    assert max(map(len, text.splitlines())) <= 80
    if not topic:
        assert len(text.splitlines()) < 100 and all(f"  {name} " in text for name in [*OBJECTIVES, *TOPICS])


def test_help_on_nothing_names_the_topics() -> None:
    with pytest.raises(UserError, match=r"^--help foozle; topics are model, .*mdm"):
        parse(["--help", "foozle"])


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (["--hiden-size", "8"], "did you mean --hidden-size?"),
        (["--seq-len", "8"], "'--seq-len'"),  # no silent abbreviations
        (["--lr=abc"], "'abc' was given; it takes a number"),
        (["--normalization", "batchnorm"], "rmsnorm"),
    ],
)
def test_malformed_flags_are_refused(wrong: list[str], hint: str) -> None:
    with pytest.raises(UserError) as stop:
        parse([*BASE, *wrong])
    assert hint in str(stop.value)


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
            elif isinstance(value, dict):
                values[field.name] = {"ar_ratio": 0.5}
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


def shape(*flags: str) -> Shape:
    return Shape.from_flags(parse([*flags, "--train-iters", "1"]).model, padded_vocab_size=512)


def test_presets_and_derived_sizes() -> None:
    model = shape("--model", "140m")  # presets without regard to case
    assert (model.hidden_size, model.num_layers, model.num_attention_heads, model.kv_channels) == (768, 15, 12, 64)
    assert (model.ffn_hidden_size, model.num_query_groups, model.max_position_embeddings) == (2048, 12, 2048)
    model = shape("--model", "140M", "--num-layers", "3", "--no-swiglu")
    assert (model.num_layers, model.ffn_hidden_size) == (3, 4 * 768)  # an explicit size wins
    with pytest.raises(UserError, match=r"gives a feed-forward width of .* = 0; .*; pass --ffn-hidden-size"):
        shape("--num-layers", "1", "--hidden-size", "16", "--num-attention-heads", "1")


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_padding_does_not_depend_on_the_layout(tp_size: int) -> None:
    assert padded_size(257, multiple=128, tp_size=tp_size) == 384
    assert padded_size(50257, multiple=128, tp_size=tp_size) == 50304


def test_every_number_has_a_range() -> None:
    declared = [(dict(SECTIONS)[name], item) for name, item in FIELDS] + list(OPTIONS.values())
    for cls, item in declared:
        hint = typing.get_type_hints(cls)[item.name]
        is_number = hint in (int, float, int | None, float | None)
        assert (item.metadata["range"] is not None) == is_number, item.name


NUMBERS = [item for _, item in [*FIELDS, *OPTIONS.values()] if item.metadata["range"] is not None]


def owner_of(item: dataclasses.Field) -> list[str]:
    owners = [name for name, cls in OBJECTIVES.items() if item in dataclasses.fields(cls.Options)]
    return ["--objective", owners[0]] if owners else []


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-3", "1e300", str(10**30), "9" * 5000])
@pytest.mark.parametrize("item", NUMBERS, ids=lambda item: item.name)
def test_numbers_outside_their_range_are_refused(item: dataclasses.Field, value: str) -> None:
    """In three parts, before anything else is looked at."""
    with pytest.raises(UserError) as stop:
        parse([*BASE, *owner_of(item), f"{spelling(item)}={value}"])
    of_argparse = rf"{spelling(item)}: .* was given; it takes a (whole )?number; .*"
    assert re.fullmatch(rf"{spelling(item)} is .*; it must be .*; correct the number|{of_argparse}", str(stop.value))


@pytest.mark.parametrize("value", ["9" * 5000, "9" * 98 + "x" * 9, "-1", "1.5", "nan", "", "10000000000000000"])
def test_validation_steps_are_a_number_or_full(value: str) -> None:
    with pytest.raises(UserError, match=r"--eval-iters '.*'; it counts validation steps, or is 'full'; "):
        parse([*BASE, "--valid-data-path", "v", f"--eval-iters={value}"])


def test_a_name_is_text_and_only_a_path_may_be_none() -> None:
    """W&B ended a run that had begun in a traceback."""
    words = [*BASE, "--save", "runs/\udcff"]
    assert parse(words).run.save == "runs/\udcff"
    with pytest.raises(UserError, match=r"--wandb-project: '.udcff' was given; it is no text in UTF-8; correct it"):
        parse([*words, "--wandb-project", "\udcff"])


@pytest.mark.parametrize("kind", ["train", "valid"])
def test_data_are_named_once(kind: str) -> None:
    flag = f"--{kind}-data-path"
    with pytest.raises(UserError, match=f"{flag} and {flag}-file are both given; the data are named once; drop one"):
        parse([*BASE, flag, "v", f"{flag}-file", "list.txt"])


PLACES = [item for _, item in FIELDS if item.metadata["unit"] in PATHS]


@pytest.mark.parametrize("item", PLACES, ids=lambda item: item.name)
def test_a_place_without_a_name_is_refused(item: dataclasses.Field) -> None:
    """What an unset variable of a script gives."""
    needs = {"wandb_save_dir": "--wandb-project", "gap_task": "--valid-data-path", "branch_from": "--save"}
    needed = [needs[item.name], "x"] if item.name in needs else []
    with pytest.raises(UserError, match=f"{spelling(item)} ''; it names a place"):
        parse([*BASE, *needed, spelling(item), ""])


def test_a_home_is_a_home_in_every_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = parse([*BASE, "--save=~/runs", "--train-data-path", "0.5", "~/a", "0.5", "b~"])
    assert config.run.save == "/home/me/runs" and config.data.train_data_path == ["0.5", "/home/me/a", "0.5", "b~"]


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--adam-eps", "1e-320"),
        ("--layernorm-epsilon", "1e-39"),
    ]  # 0 in fp32, or flushed to it: rows without gradients become NaN
    + [("--distributed-timeout-minutes", value) for value in ("1e-320", "1e-5")],  # nobody can meet within that
)
def test_numbers_that_only_look_usable_are_refused(flag: str, value: str) -> None:
    with pytest.raises(UserError, match=f"^{flag} "):
        parse([*BASE, f"{flag}={value}"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--allow-training-data-in-validation"], "--allow-training-data-in-validation .* needs --valid-data-path"),
        (
            ["--padded-vocab-size", "512", "--make-vocab-size-divisible-by", "64"],
            "--make-vocab-size-divisible-by would have no effect; it needs no --padded-vocab-size; drop it",
        ),
        (["--keep-last", "2"], "--keep-last would have no effect; it needs --save"),
        (
            ["--tokenizer-type", "NullTokenizer", "--tokenizer-model", "t"],
            "--tokenizer-model would have no effect; it needs --tokenizer-type HFTokenizer or --tokenizer-type Sentence",
        ),
        (["--tokenizer-type", "NullTokenizer", "--merge-file", "m"], "--merge-file would have no effect"),
        (["--load-tag", "latest"], "--load-tag .* needs --load"),
        (["--finetune"], "--finetune .* needs --load"),
        (["--low-noise-iter", "5"], "--low-noise-iter .* needs --low-noise-start"),
        (["--low-noise-ratio", "0.3"], "--low-noise-ratio .* needs --low-noise-start"),
        (["--no-use-rotary-position-embeddings", "--rotary-base", "500"], "--rotary-base .* needs --use-rotary"),
        (["--noise-schedule-power", "3"], "--noise-schedule-power .* needs --noise-schedule polynomial"),
        (["--gap-task", "x.jsonl"], "--gap-task .* needs --valid-data-path"),
        (
            ["--lr-decay-style", "constant", "--min-lr", "1e-5"],
            "--min-lr .* needs another --lr-decay-style than constant",
        ),
        (["--no-swiglu", "--swiglu-backend", "liger"], "--swiglu-backend .* needs --swiglu"),
    ],
)
def test_a_flag_without_effect_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse([*BASE, *flags], objective="mdm")


def test_a_mask_token_needs_an_objective_that_masks() -> None:
    with pytest.raises(UserError, match=r"--mask-token-id with objective ar; .*; drop it"):
        parse([*BASE, "--mask-token-id", "3"])


def test_flags_of_launch_scripts_without_effect_are_named() -> None:
    flags = ["--data-impl", "infer", "--no-load-rng", "--wandb-group", "g", "--deepspeed", "--num-mc", "4"]
    flags += ["--max-position-embeddings", "4096", "--tensorboard-queue-size", "3"]
    notes = idle_notes(parse([*BASE, *flags]))
    named = {note.split()[0] for note in notes}
    assert named == {flag for flag in flags if flag.startswith("--")}
    assert all("(" in note for note in notes)


def test_switches_take_true_and_false() -> None:
    assert parse([*BASE, "--bf16", "True"]).run.bf16 and not parse([*BASE, "--bf16", "false"]).run.bf16
    assert not parse([*BASE, "--swiglu", "False"]).model.swiglu and parse([*BASE, "--swiglu"]).model.swiglu


@pytest.mark.parametrize("name", list(PRESETS))
def test_tensor_parallel_sizes_that_an_error_offers_are_accepted(name: str) -> None:
    words = ["--model", name, "--train-iters", "1", "--micro-batch-size", "1", "--tensor-model-parallel-size"]
    with pytest.raises(UserError) as caught:
        parse([*words, "59"], objective="ar", world_size=59)
    for size in re.findall(r"\d+", str(caught.value).rpartition("--tensor-model-parallel-size")[2]):
        parse([*words, size], objective="ar", world_size=int(size))
