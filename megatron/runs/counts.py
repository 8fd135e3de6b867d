"""Counts as people write them: 100M tokens, 40k, 1e8."""

from __future__ import annotations

import math

from megatron.errors import UserError

_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def parse_count(text: str) -> float:
    """A count as people write it: "100M", "40k", "1e8", "100000000".

    Raises:
        UserError: it is none of these, or not positive and finite.
    """
    scale = next((scale for scale, suffix in _COUNTS if text.endswith(suffix)), None)
    try:
        value = float(text) if scale is None else float(text[:-1]) * scale
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UserError(
            f"{text!r} is not a count", "a count is a number above 0, with k, M, B or T at will", "write 100M or 1e8"
        )
    return value


def format_count(value: float) -> str:
    """A count in words for labels: 912345 -> "0.91M", 100000 -> "100k", 425e6 -> "425M"."""
    for scale, suffix in _COUNTS:
        if value >= scale * 0.9:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.3g}"
