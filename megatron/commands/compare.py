"""Runs against each other, as text: best validations, what differs in each pair, and what follows (docs/scaling.md)."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.config.parser import Parser
from megatron.screen import wrapped

if TYPE_CHECKING:
    from megatron.runs.run import Run

MAX_LINES = 12  # a sweep has hundreds of runs; the page of ``megatron report`` has them all


def main(arguments: list[str] | None = None) -> None:
    """Print the comparison."""
    parser = Parser(description=__doc__, examples=("megatron compare runs/ar runs/mdm",))
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run directory, or folder holding run directories"
    )
    options = parser.parse_args(arguments)
    from megatron.runs.reading import find_runs

    left_out: list[str] = []
    runs = find_runs(options.runs, left_out=left_out)
    print(wrapped("\n".join(comparison(runs, left_out))))


def name_unread(problems: Iterable[str]) -> None:
    """Name on standard error what could not be read."""
    for problem in problems:
        print(f"not read: {problem}", file=sys.stderr)


def comparison(runs: list[Run], left_out: Iterable[str] = ()) -> list[str]:
    """Lines about runs and their pairs, then what follows. What could not be read, ``left_out`` too, is named on standard
    error."""
    from megatron.runs.comparison import summary_row
    from megatron.runs.conclusion import conclusion
    from megatron.runs.matching import matched_pairs
    from megatron.runs.replicates import average_seeds

    name_unread([*left_out, *(problem for run in runs for problem in run.unreadable)])
    lines = []
    for run in runs[:MAX_LINES]:
        row = summary_row(run)
        lines.append(f"{row['Run']}: {row['Best validation, nats/token']} nats/token (± over {row['± over']}), {row['Kind']}; "
                     f"overfits: {row['Overfits']}")  # fmt: skip
    for first, second, found in matched_pairs(runs)[:MAX_LINES]:
        real = [str(item) for item in found if item.weight == "result"]
        unknown = [str(item) for item in found if item.weight == "unknown"]
        verdict = "matched" if not real else "differs in " + "; ".join(real)
        lines.append(f"pair {first.name} / {second.name}: " + "; ".join([verdict, *unknown]))
    return [*lines, "", *conclusion(average_seeds(runs))]
