"""A pair of runs in numbers: each at its best and at its end, and where one passes the other."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from megatron.runs.comparison import comparisons, epoch_text, plus_minus
from megatron.runs.counts import format_count
from megatron.runs.crossing import crossing
from megatron.runs.run import Run, Validation
from megatron.scaling.report.tables import section, table

MAX_PAIRS = 6


def pair_numbers_html(runs: Sequence[Run]) -> str:
    """One table per comparison (AR against another objective on the same data), and a sentence on the crossing."""
    pairs = comparisons(runs)[:MAX_PAIRS]
    parts = []
    for first, second in pairs:
        name = f"{first.title} and {second.title}, {format_count(first.unique_tokens)} unique tokens"
        rows = [*_rows(first), *_rows(second)]
        heading = f"<h3>{html.escape(name)}</h3>" if len(pairs) > 1 else ""
        apart = any(run.result is not None and run.result.chosen_apart for run in (first, second))
        note = "Over all validation documents; the text above gives the report half. " if apart else ""
        parts.append(f"{heading}{table(rows, name)}<p>{html.escape(note + crossing_text(first, second))}</p>")
    return section("Best, end and crossing", "".join(parts)) if parts else ""


def crossing_text(first: Run, second: Run) -> str:
    """From which epoch on the second run is below the first, at the same epoch and against its best; and the end."""
    found = crossing(first, second)
    one, other = first.objective.upper(), second.objective.upper()
    bound = "" if second.is_exact else "'s bound"
    if found.end is None:
        return f"{one} and {other} were never validated in the same stretch of epochs, so a crossing cannot be seen."
    if found.epoch is None:
        text = f"Crossing: none; at equal epochs {other}{bound} is not below {one} at the end they share."
    else:
        text = f"Crossing: from epoch {epoch_text(found.epoch)} on {other}{bound} is below {one} at the same epoch."
    sure = "" if found.end.is_real else ", which is within the error"
    text += (
        f" At epoch {epoch_text(found.end_epoch)} the difference {other} − {one} is "
        f"{plus_minus(found.end.value, found.end.error).replace('-', '−')} nats/token ({found.end.how}){sure}."
    )
    if found.best_epoch is None:
        return text + f" {one}'s best is not reached within these runs."
    return text + f" {one}'s best is passed from epoch {epoch_text(found.best_epoch)} on."


def _rows(run: Run) -> list[dict[str, str]]:
    finite = [row for row in run.valid if math.isfinite(row.nll)]
    best, last = run.best, finite[-1]
    assert best is not None  # comparisons() has validated runs only
    name = run.objective.upper()
    if last is best:
        return [_row(f"{name} at its best, the end", run, best)]
    return [_row(f"{name} at its best", run, best), _row(f"{name} at the end", run, last)]


def _row(name: str, run: Run, row: Validation) -> dict[str, str]:
    return {
        "Where": name,
        "Epoch": epoch_text(row.epoch),
        "Step": f"{row.step:,}",
        "Validation, nats/token": plus_minus(row.nll, row.nll_se),
        "Kind": row.full_label,
        "Training FLOPs": f"{row.flops:.1e}",
    }
