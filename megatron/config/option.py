"""One command-line flag: default, help, unit, spellings."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(
    default: Any, help: str, *, flags: tuple[str, ...] = (), choices: tuple[str, ...] = (), unit: str = ""
) -> Any:
    """Declare a field that is also a flag.

    Args:
        default: value when the flag is absent.
        help: one line for ``--help``.
        flags: spellings; the default is ``--field-name``. The first one is shown in error messages.
        choices: allowed values (compared without case).
        unit: what the number counts, shown as the metavar.
    """
    metadata = {"help": help, "flags": flags, "choices": choices, "unit": unit}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)
