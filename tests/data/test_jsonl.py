"""Files of JSON Lines: only line feeds end a line, byte order marks are skipped, errors name file and line."""

from __future__ import annotations

import json

import pytest

from megatron.data.jsonl import read_items, read_lines
from megatron.errors import UserError


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
