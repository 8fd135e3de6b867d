"""Counts as people write them: 100M tokens, 40k, 1e8."""

from __future__ import annotations

import math

from megatron.errors import UserError

MOST = 1e40  # more than all computers of the world compute in its age
_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def parse_count(text: str) -> float:
    """A count as people write it: "100M", "40k", "1e8", "100000000".

    Raises:
        UserError: it is none of these, below 1, or larger than anything that there is to count.
    """
    scale = next((scale for scale, suffix in _COUNTS if text.lower().endswith(suffix.lower())), None)
    try:
        value = float(text) if scale is None else float(text[:-1]) * scale
    except ValueError:
        value = math.nan
    if not 1 <= value <= MOST:
        shown = repr(text[:40])
        rule = f"a count is a number from 1 to {MOST:g}, with k, M, B or T at will"
        raise UserError(f"{shown} is not a count", rule, "write 100M or 1e8")
    return value


def format_count(value: float) -> str:
    """A count in words for labels: 912345 -> "0.91M", 100000 -> "100k", 425e6 -> "425M"."""
    for scale, suffix in _COUNTS:
        if value >= scale * 0.9:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.3g}"
