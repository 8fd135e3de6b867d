"""Configuration files: the words of a command line, written down; everything odd is refused in words."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from megatron.config import Config, build_parser, values_of
from megatron.config.layers import Layers
from megatron.errors import UserError
from megatron.objectives import OBJECTIVES, parse

FILES = 10_000 if os.environ.get("STORM") == "1" else 120
BASE = """
model: {num_layers: 2, hidden-size: 64, num_attention_heads: 4}
train_iters: 10
run:
  micro_batch_size: 2
  global-batch-size: 8
"""


def read(folder: Path, text: str | bytes, *words: str, name: str = "a.yaml", objective: str = "mdm") -> Config:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return parse(["--config", str(path), *words], objective=objective)


def values(folder: Path, text: str, *words: str) -> dict:
    return values_of(read(folder, BASE + text, *words))


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("lr: 1e-4", "lr", 1e-4),  # which YAML takes for a text
        ("lr: '1e-4'", "lr", 1e-4),
        ("seed: 1e3", "seed", 1000),
        ("bf16: true", "bf16", True),
        ("bf16: on", "bf16", True),
        ("swiglu: no", "swiglu", False),
        ("no-swiglu: yes", "swiglu", False),
        ("no_swiglu: false", "swiglu", True),
        ("wandb_project: no", "wandb_project", "no"),  # which YAML takes for a truth
        ("wandb_project: 0777", "wandb_project", "0777"),  # … for a number
        ("wandb_project: 2026-11-26", "wandb_project", "2026-11-26"),  # … for a date
        ("wandb_project: 1:30", "wandb_project", "1:30"),
        ("wandb_project: 'null'", "wandb_project", "null"),
        ("wandb_project: null", "wandb_project", None),
        ("wandb_project: a b # c", "wandb_project", "a b"),
        ("wandb_project: --lr=3", "wandb_project", "--lr=3"),  # a word of a file is never a flag
        ("eval_interval: null", "eval_interval", None),
        ("train_data_path: a", "train_data_path", ["a"]),
        ("train_data_path: [0.3, a, 0.7, b]", "train_data_path", ["0.3", "a", "0.7", "b"]),
        ("train_data_path: []", "train_data_path", []),
        ("tp-size: 1", "tensor_model_parallel_size", 1),
        ("optimizer: adam", "optimizer", "adam"),  # also the name of a group
        ("objective: {ar_ratio: 0.5}", "ar_ratio", 0.5),
        ("--lr: 5e-4", "lr", 5e-4),
        ("save: ~/runs", "save", os.path.expanduser("~/runs")),
        ("hidden_dropout: &x 0.5\nar_ratio: *x", "ar_ratio", 0.5),
        ("megatron_defaults: true", "normalization", "layernorm"),
        ("lr_decay_iters: 20", "lr_decay_samples", 160),  # Megatron's names go the way of its flags
        ("tokenizer-type: Llama2Tokenizer", "tokenizer_type", "SentencePieceTokenizer"),
    ],
)
def test_a_word_of_a_file_means_what_it_means_on_the_command_line(
    tmp_path: Path, text: str, name: str, value: object
) -> None:
    assert values(tmp_path, text)[name] == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hiden_size: 3\nmodel: {frobnicate: 1, zero-stge: 2}", r"has 3 unknown names: "
         r"'hiden_size' \(did you mean hidden_size\?\), "
         r"'frobnicate', 'zero-stge' \(did you mean zero_stage\?\); a name is that of a flag.*; correct them"),
        ("lr: nan", "--lr is nan .*; it must be"),
        ("lr: 5e3", "--lr is 5000.0 .*; it must be"),
        ("lr: [1, 2]", "lr is a list; it takes one value"),
        ("lr: {peak: 1}", "has no word or list of words for lr; .*the only groups are model"),
        ("train_data_path: [[a]]", "has no word or list of words for train_data_path"),
        ("train_data_path: [0.5, null]", "has no word or list of words for train_data_path"),
        ("train_data_path: [a, --lr, '5']", "train_data_path has '--lr'; no word of a list begins with -"),
        ("lr: 1\noptimizer: {lr: 2}", "gives twice: lr and lr; a setting has one value"),
        ("seq-length: 8\nseq_length: 8", "gives twice: seq-length and seq_length"),
        ("tp_size: 1\ntensor_model_parallel_size: 1", "gives twice: tp_size and tensor_model_parallel_size"),
        ("bf16:", "a.yaml, line 1: a name without a value; a setting that is left open is null"),
        ("save: ''", "--save '' .*; it names a place"),
        ("model: {model: {num_layers: 1}}", "no word or list of words for model"),
        ("", "holds nothing; a configuration file is YAML or JSON"),
        ("# nothing", "holds nothing"),
        ("- lr", "holds a list"),
        ("lr=3", "holds one text"),
        ("lr: 1\n\tseed: 2", "is no YAML .*line 2"),
        ("lr: 1\n---\nseed: 2", "is no YAML .*another document"),
        ("lr: !!python/name:os.system x", "the tag .*os.system"),
        ("lr: !env LR", "the tag .!env"),
        ("? [a]\n: 1", "a name is a list or a mapping"),
        ('save: "a\\0b"', "has a character that no word has"),
        ("a: " + "[" * 5000, "nested too deeply"),
        (b"lr: \xff", "is not UTF-8 .byte 4."),
        (b"\0\0\0", "is no YAML"),
        ("config: b.yaml", "unknown name: 'config'"),  # files name no files
        ("help: true", "unknown name: 'help'"),
        ("megatron_defaults: maybe", "megatron_defaults is maybe; it is true or false"),
        ("--", "holds one text"),
    ],
)  # fmt: skip
def test_an_odd_file_is_refused_in_words(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as stop:
        read(tmp_path, b"\n" + text if isinstance(text, bytes) and b"lr" not in text else text)
    assert "a.yaml" in str(stop.value) and "\n" not in str(stop.value) and stop.value.rule and stop.value.fix


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr: abc", "--lr: 'abc' was given"),
        ("num_layers: true", "'true' was given"),
        ("bf16: maybe", "'maybe' follows a switch"),
        ("normalization: batchnorm", "'batchnorm' was given"),
        ("num_experts: 8\nalibi: 1", "--num-experts 8: mixtures of experts are not built"),
        (BASE + "lr: -1", "--lr is -1.0"),
        (BASE.replace("64", "30"), "--hidden-size 30 is not divisible by"),
        (BASE + "train_epochs: 3", "the length of training is given 2 times"),
    ],
)
def test_a_wrong_word_of_a_file_is_refused_by_the_parser_of_the_flags(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        read(tmp_path, text)
    assert caught.value.given.endswith(f" ({tmp_path / 'a.yaml'})"), "nobody typed such a flag: the file is named"


def test_what_is_wrong_on_the_command_line_is_not_put_on_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--lr is -1\.0; it must be"):
        read(tmp_path, BASE + "lr: 1e-3", "--lr=-1")
    (tmp_path / "b.yaml").write_text("train_epochs: many\n")
    with pytest.raises(UserError, match=r"--train-epochs: 'many' was given \([^,]*b\.yaml\); it takes a number"):
        read(tmp_path, BASE, "--config", str(tmp_path / "b.yaml"))
    with pytest.raises(UserError, match="--config behind --; no flag stands there; drop the --"):
        parse(["--", "--config", str(tmp_path / "b.yaml")])


@pytest.mark.parametrize("section", ["model", "objective", "data", "optimizer", "parallel", "run"])
@pytest.mark.parametrize("value", [None, [], "x", 3, {"zzz": 1}], ids=repr)
def test_a_record_with_another_section_is_refused_by_its_name(tmp_path: Path, section: str, value: object) -> None:
    config = {"model": {}, "objective": {"objective": "ar"}, "data": {}, "optimizer": {}, "parallel": {}, "run": {}}
    (tmp_path / "run.json").write_text(json.dumps({"objective": "ar", "config": {**config, section: value}}))
    with pytest.raises(UserError, match=rf"^{tmp_path}/run\.json") as caught:
        parse(["--config", str(tmp_path / "run.json")])
    assert section in caught.value.given and "Error" not in caught.value.given


def test_places_that_are_no_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    for name, message in (
        ("absent.yaml", "cannot be read .No such file"),
        ("", r"is a folder; it names a file; pass .*run\.json"),
    ):
        with pytest.raises(UserError, match=message):
            parse(["--config", str(tmp_path / name)])
    with pytest.raises(UserError, match=r"is no YAML|more than 16 MB"):
        parse(["--config", "/dev/zero"])


def test_later_layers_win(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("lr: 2e-3\nseed: null\ntrain_epochs: 2\n")
    more = ("--config", str(tmp_path / "b.yaml"))
    found = values(tmp_path, "lr: 1e-3\nseed: 5\nweight_decay: 0", *more, "--weight-decay", "0.5")
    assert (found["lr"], found["seed"], found["weight_decay"]) == (2e-3, 1234, 0.5)
    assert (found["train_iters"], found["train_epochs"]) == (None, 2)  # a run has one length
    origins: dict[str, str] = {}
    parse(["--config", str(tmp_path / "a.yaml"), *more, "--weight-decay=0.5"], origins=origins)
    a, b = str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")
    assert origins["lr"] == b and origins["hidden_size"] == a and origins["weight_decay"] == "flag"
    assert "train_iters" not in origins and "seed" not in origins


@pytest.mark.parametrize(
    ("text", "words", "name", "value"),
    [
        ("", ["--model", "14M"], "num_layers", None),  # another preset brings its own sizes
        ("objective: mdm\nar_ratio: 0.5", ["--objective", "ar"], "objective", "ar"),  # … objective, its own options
        ("objective: mdm\nar_ratio: 0.5", ["--objective", "mdm"], "ar_ratio", 0.5),
        ("vocab_file: v\nmerge_file: m", ["--tokenizer-model", "t"], "vocab_file", None),
        ("lr_warmup_samples: 5", ["--lr-warmup-fraction", "0.1"], "lr_warmup_samples", 0),
        ("lr_decay_iters: 20", ["--lr-decay-samples", "7"], "lr_decay_samples", 7),
        ("lr_decay_samples: 20", ["--lr_decay_iters", "1"], "lr_decay_samples", 8),
        ("train_data_path_file: f", ["--train-data-path", "a"], "train_data_path_file", None),
    ],
)
def test_a_flag_wins_over_what_it_replaces(
    tmp_path: Path, text: str, words: list[str], name: str, value: object
) -> None:
    assert values(tmp_path, text, *words)[name] == value


@pytest.mark.parametrize("kind", ["train", "valid"])
def test_a_flag_does_not_drop_a_part_of_what_a_file_says(tmp_path: Path, kind: str) -> None:
    """--data-path names training and validation data: one of them given anew would leave the other one out."""
    with pytest.raises(UserError, match=rf"data_path \(.*a.yaml\) beside {kind}_data_path; .* give all of them anew"):
        values(tmp_path, "data_path: a", f"--{kind}-data-path", "b")
    found = values(tmp_path, "data_path: a", "--train-data-path", "b", "--valid-data-path", "c")
    assert (found["train_data_path"], found["valid_data_path"]) == (["b"], ["c"])


def test_json_is_read_as_yaml_is(tmp_path: Path) -> None:
    text = json.dumps({"model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}, "train_iters": 3, "bf16": True,
                       "lr": 1e-4, "train_data_path": ["a"], "load": None})  # fmt: skip
    found = values_of(read(tmp_path, text, name="a.json"))
    assert (found["lr"], found["bf16"], found["train_data_path"], found["load"]) == (1e-4, True, ["a"], None)
    assert read(tmp_path, text, name="b.yaml") == read(tmp_path, text, name="a.json")
    for wrong, message in (('{"lr": 1,}', "is no JSON"), ('{"lr": 1, "lr": 2}', "gives twice: lr and lr"),
                           ('{"lr": NaN}', "--lr is nan"), ('{"save": "\\ud800"}', "a character that no word has")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            read(tmp_path, wrong, name="a.json")


def test_every_setting_can_be_named_in_a_file() -> None:
    layers = Layers(OBJECTIVES, None)
    for name in values_of(Config()):
        assert layers.fields_of(layers.by_key[name]) == (name,)
    assert {action.dest for action in build_parser(OBJECTIVES)._actions} > set(layers.options)


WORDS = (
    "lr",
    "seed",
    "save",
    "bf16",
    "train_data_path",
    "model",
    "run",
    "optimizer",
    "config",
    "hiden",
    "<<",
    "no",
    "1",
    "é",
    "--lr",
)
SCALARS = (
    "1", "1e-4", "true", "no", "null", "~", "''", '"a\\0"', ".nan", ".inf", "0x10", "1_0", "'1'", "[a, b]", "[[1]]", "{}", "[]",
    "{lr: 1}", "&a 1", "*a", "!!int 3", "!x y", "|\n  a\n  b", ">", "- a", "a: b", "@x", "`x`", "%x", "\t", "\ufeff", "=",
    "2026-01-01", "1:30", "/dev/null", "9" * 400, "--lr", "-1", "\x07", "\x85", "??"
)  # fmt: skip


def odd_file(chance: random.Random) -> bytes:
    lines = [
        f"{chance.choice(WORDS)}{chance.choice((': ', ': ', ':', ' '))}{chance.choice(SCALARS)}"
        for _ in range(chance.choice((0, 1, 1, 2)))
    ]
    text = "\n".join([*lines, BASE * (chance.random() < 0.7)])
    if chance.random() < 0.2:
        text = json.dumps(dict(zip(WORDS, (1, 1e-4, True, None, ["a"], {"model": "7M"}, [[1]], "x"))))
        text = {0: text, 1: text[: chance.randrange(len(text))], 2: text.replace(",", ",,", 1)}[chance.randrange(3)]
    content = bytearray(text.encode("utf-8", "surrogatepass"))
    for _ in range(chance.choice((0, 0, 0, 1, 3))):
        content.insert(chance.randrange(len(content) + 1), chance.randrange(256))
    return bytes(content)


def outcome(folder: Path, content: bytes) -> str:
    try:
        read(folder, content)
    except UserError as error:
        return "refused" if error.given and error.rule and error.fix else f"no three parts: {content!r}"
    except BaseException as error:
        raise AssertionError(repr(content)) from error
    return "read"


def test_whatever_a_file_holds_it_is_read_or_refused(tmp_path: Path) -> None:
    chance, counts = random.Random(20261126), {"read": 0, "refused": 0}
    for _ in range(FILES):
        content = odd_file(chance)
        counts[outcome(tmp_path, content)] += 1
    assert all(count >= FILES // 60 for count in counts.values()), counts
