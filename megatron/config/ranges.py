"""What the command lines of the tools refuse where they are read: numbers out of range, flags without effect."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping

from megatron.errors import UserError


def whole(low: int, high: int) -> Callable[[str], int]:
    """Return a type for ``add_argument``: a whole number from ``low`` to ``high``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text[:40]!r}; it must be a whole number from {low} to {high}")
        return value

    return parse


def real(low: float, high: float) -> Callable[[str], float]:
    """Return a type for ``add_argument``: a finite number above ``low`` and at most ``high``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low < value <= high:
            raise argparse.ArgumentTypeError(f"{text[:40]!r}; it must be a number above {low} and at most {high}")
        return value

    return parse


def refuse_idle(parser: argparse.ArgumentParser, options: argparse.Namespace, idle: Mapping[str, str]) -> None:
    """Refuse flags that were given and can have no effect beside the others.

    Args:
        parser: knows what a flag is when it is absent.
        options: what was read.
        idle: the flags, with underscores → why.

    Raises:
        UserError: the first one that was given.
    """
    for name, reason in idle.items():
        if getattr(options, name) != parser.get_default(name):
            spelling = next(word for action in parser._actions if action.dest == name for word in action.option_strings)
            raise UserError(f"{spelling} would have no effect", reason, "drop it")
