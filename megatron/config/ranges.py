"""Ranges of numbers on the command lines of the tools, for ``argparse``: refused where they are read."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


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
