"""From one row of input to its texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def parse_row(raw: Any, unit: str, keys: Sequence[str]) -> list[str] | None:
    """Return the text of each key; None for a blank line. Raises ValueError for a malformed row.

    Args:
        raw: a JSON line or a text (bytes), or a row as a dictionary.
        unit: ``document`` when ``raw`` is a text.
        keys: entries to take.
    """
    if unit == "document":
        return [_checked(raw.decode("utf-8"), "text")] + [""] * (len(keys) - 1)
    if isinstance(raw, bytes):
        if not raw.strip():
            return None
        try:
            raw = json.loads(raw.decode("utf-8"))
        except RecursionError:
            raise ValueError("nested too deeply to be read") from None
        if not isinstance(raw, dict):
            raise ValueError(f"a JSON {type(raw).__name__}, not an object")
    return [_checked(_entry(raw, key), key) for key in keys]


def _entry(row: dict[str, Any], key: str) -> Any:
    if key not in row:
        raise ValueError(f"no key {key!r} (found: {', '.join(map(str, list(row)[:5])) or 'none'})")
    return row[key]


def _checked(text: Any, key: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{key!r} is {type(text).__name__}, not text")
    text.encode("utf-8")  # a lone surrogate, which JSON can spell, is no text: UnicodeEncodeError is a ValueError
    return text
