"""Counts as people write them: 100M tokens, 40k, 1e8."""

from __future__ import annotations

import math

from megatron.errors import UserError

MOST = 1e40  # more than all computers of the world compute in its age
_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def parse_count(text: str, flag: str = "", *, least: float = 1) -> float:
    """A count as people write it: "100M", "40k", "1e8", "100000000".

    Args:
        text: what was written.
        flag: behind which, for the error.
        least: below it is none; hours have parts.

    Raises:
        UserError: it is none of these, below ``least``, or larger than anything that there is to count.
    """
    scale = next((scale for scale, suffix in _COUNTS if text.lower().endswith(suffix.lower())), None)
    try:
        value = float(text) if scale is None else float(text[:-1]) * scale
    except ValueError:
        value = math.nan
    if not least <= value <= MOST:
        shown = repr(text[:40])
        rule = f"a count is a number from {least:g} to {MOST:g}, with k, M, B or T at will"
        fix = "write 100M or 1e8" if least == 1 else "write such as 0.5 or 500"
        raise UserError(f"{flag} {shown} is not a count".lstrip(), rule, fix)
    return value


def format_count(value: float) -> str:
    """A count in words for labels: 912345 -> "0.912M", 100000 -> "100k", 425e6 -> "425M"."""
    for scale, suffix in _COUNTS:
        if value >= scale * 0.9:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.3g}"
