"""From one row of input to its texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from megatron.data.prepare.html_text import decode_page, visible_text

_SHOWN_KEYS = 10


def parse_row(raw: Any, unit: str, keys: Sequence[str]) -> list[str] | None:
    """Return the text of each key; None for a blank line. Raises ValueError for a malformed row.

    Args:
        raw: a JSON line or a text (bytes), or a row as a dictionary.
        unit: ``document`` when ``raw`` is a text, ``page`` when it is HTML, of which the visible text counts.
        keys: entries to take.
    """
    if unit in ("document", "page"):
        text = visible_text(_decoded(raw, decode_page)) if unit == "page" else _decoded(raw)
        return [_checked(text, "text")] + [""] * (len(keys) - 1)
    if isinstance(raw, bytes):
        if not raw.strip():
            return None
        try:
            raw = json.loads(_decoded(raw))
        except json.JSONDecodeError as error:
            raise ValueError(f"no JSON ({error}); plain text has --input-format text") from None
        except RecursionError:
            raise ValueError("nested too deeply to be read") from None
        if not isinstance(raw, dict):
            raise ValueError(f"a JSON {type(raw).__name__}, not an object")
    return [_checked(_entry(raw, key), key) for key in keys]


def _decoded(raw: bytes, decode: Callable[[bytes], str] = bytes.decode) -> str:
    try:
        return decode(raw)
    except UnicodeDecodeError as error:
        cure = "if it is Latin-1, convert it: iconv -f latin1 -t utf-8 IN > OUT"
        raise ValueError(f"not UTF-8 (byte {error.object[error.start]:#04x} at {error.start:,}; {cure})") from None


def _entry(row: dict[str, Any], key: str) -> Any:
    if key not in row:
        found = ", ".join(map(str, list(row)[:_SHOWN_KEYS]))
        raise ValueError(f"no key {key!r} (found: {found or 'none'}; --json-keys chooses)")
    return row[key]


def _checked(text: Any, key: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{key!r} is {type(text).__name__}, not text")
    text.encode("utf-8")  # a lone surrogate, which JSON can spell, is no text: UnicodeEncodeError is a ValueError
    return text
