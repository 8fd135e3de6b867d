"""Files of JSON Lines: only line feeds end a line, byte order marks are skipped, errors name file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron.convert.hf_config import read_config
from megatron.convert.huggingface import INDEX, _read_index
from megatron.data.jsonl import read_items, read_lines
from megatron.data.tokenizer import hf_tokenizer
from megatron.errors import UserError
from megatron.files import read_object
from megatron.hub.model_card import read_run_records
from megatron.scaling.fit import load_fits
from megatron.scaling.report.tables import load_downstream
from megatron.training.deepspeed.settings import read_settings_file


def test_separators_within_strings_do_not_end_a_line(tmp_path) -> None:
    texts = [f"a{mark}b" for mark in "\u2028\u2029\u0085\x0b\x0c\x1c\x1e"]
    path = tmp_path / "items.jsonl"
    path.write_bytes(b"\n".join(json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts[:3]))
    assert [item["text"] for _, item in read_items(path)] == texts[:3]
    path.write_text("\n".join(texts), encoding="utf-8", newline="")
    assert [line for _, line in read_lines(path)] == texts


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_byte_order_mark_and_line_ends(tmp_path, end) -> None:
    path = tmp_path / "items.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + end.join(['{"a": 1}', "", '{"a": "\ufeff"}', ""]).encode())
    assert read_items(path) == [(1, {"a": 1}), (3, {"a": "\ufeff"})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n\n{"a": \n', "line 3 is not JSON"),
        (b'{"a": 1}\n[1]\n', "line 2 is a list"),
        (b'{"a": 1}\n{"a": "\xff"}\n', "line 2 is not UTF-8 .byte 0xff"),
        (b'\n{"a": ' + b"[" * 100_000 + b"\n", "line 2"),
        (b'{"a": ' + b"1" * 10_000 + b"}\n", "line 1 cannot be read"),
        (b'{"a": "\\ud800"}\n', "line 1 cannot be read .*surrogates not allowed"),
        (b"\n \n", "empty"),
    ],
)
def test_errors_name_the_line(tmp_path, content, message) -> None:
    path = tmp_path / "items.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        read_items(path)
    assert str(path) in str(raised.value)


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(UserError, match=r"gone\.jsonl is no file"):
        read_items(tmp_path / "gone.jsonl")


# What an editor, a torn copy or another program leaves where one JSON object is expected.
NO_OBJECT = {
    "empty": b"",
    "null": b"null",
    "a list": b"[]",
    "a number": b"5",
    "nested too deeply": b'{"a": ' * 100_000,
    "no text": b'{"a": "\xff"}',
    "a number of too many digits": b'{"a": ' + b"1" * 10_000 + b"}",
    "torn": b'{"results": {"a":',
}


def _tokenizer(path: Path) -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.BPE({"a": 0, "<|endoftext|>": 1}, [])
    tokenizers.Tokenizer(model).save(str(path.with_name("tokenizer.json")))
    return hf_tokenizer(str(path.parent))


# Name of the file → its reader.
READERS: dict[str, Callable[[Path], Any]] = {
    "any.json": lambda path: read_object(path, rule="one object", fix="correct it"),
    "tokenizer_config.json": _tokenizer,
    "deepspeed.json": partial(read_settings_file, bf16=False),
    "fits.json": load_fits,
    INDEX: _read_index,
    "config.json": lambda path: read_config(path.parent),
    "run.json": lambda path: read_run_records(path.parent),
    "downstream.json": lambda path: load_downstream(path.parent),
}


@pytest.mark.parametrize("content", NO_OBJECT.values(), ids=NO_OBJECT)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_json_object_is_one_message_that_names_the_file(tmp_path, name, content) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [(name, content) for name, contents in {
        "tokenizer_config.json": ['{"eos_token": 5}', '{"eos_token": ["a"]}', '{"eos_token": {"content": {}}}'],
        "downstream.json": ['{"results": 5}', '{"results": []}', '{"results": {"a": 5}}', "{}"],
        INDEX: ['{"weight_map": []}', '{"weight_map": {"a": 1}}', "{}"],
        "fits.json": ['{"fits": 5}', '{"fits": {}}{', '{"fits": [5]}'],
    }.items() for content in contents],
)  # fmt: skip
def test_an_object_of_another_form_is_one_message_that_names_the_file(tmp_path, name, content) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        READERS[name](tmp_path / name)


def test_an_object_behind_a_byte_order_mark_is_read(tmp_path) -> None:
    (tmp_path / "any.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert READERS["any.json"](tmp_path / "any.json") == {"a": 1}
