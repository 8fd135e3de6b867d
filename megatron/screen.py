"""Lines that fit the screen."""

from __future__ import annotations

import shutil
import textwrap


def wrapped(text: str) -> str:
    """The lines of a text, each broken between words at 80 columns or at the terminal's; what follows is indented."""
    width = max(40, shutil.get_terminal_size((80, 24)).columns)
    lines = []
    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        parts = textwrap.wrap(
            line, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False, drop_whitespace=True
        )
        lines += parts or [""]
    return "\n".join(lines)
