"""Small text files that people write: lines with their numbers, and the objects of JSON Lines (tasks, prompts, questions)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.errors import UserError


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a UTF-8 text file and their numbers from 1, blank ones left out.

    A line ends at ``\\n`` (or ``\\r\\n``) and nowhere else: U+2028, U+0085 and the like are characters of a JSON string.
    A byte order mark is skipped.

    Raises:
        UserError: no such file, or a line that is not UTF-8.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file", "it is read from disk", "correct the path")
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            text = line.decode("utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} line {number} is not UTF-8 (byte {line[error.start]:#04x})", "text files are", "convert it"
            ) from None
        if text.strip(" \t\r"):
            yield number, text


def read_items(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file, each with the number of its line.

    Raises:
        UserError: no file, no item, or a line that is no JSON object.
    """
    items = []
    for number, line in read_lines(path):
        try:
            item = json.loads(line)
            json.dumps(item, ensure_ascii=False).encode()  # a lone surrogate, which JSON can spell, is no text
        except json.JSONDecodeError as error:
            raise _wrong(path, number, f"is not JSON ({error.msg})") from None
        except (RecursionError, ValueError) as error:  # nested too deep; a number of too many digits; no text
            raise _wrong(path, number, f"cannot be read ({error})") from None
        if not isinstance(item, dict):
            raise _wrong(path, number, f"is a {type(item).__name__}")
        items.append((number, item))
    if not items:
        raise UserError(f"{path} is empty", "at least one item is needed", "add lines")
    return items


def _wrong(path: Path, number: int, what: str) -> UserError:
    return UserError(f"{path} line {number} {what}", "every line is one JSON object", "correct it")
