"""Where one learning curve goes below another, and how far apart the two end."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from megatron.runs.comparison import Gap, gap_at
from megatron.runs.run import Run, Validation


@dataclass(frozen=True)
class Crossing:
    """How the curve of a second run passes that of a first.

    Attributes:
        epoch: of the second run's validation from which on it lies below the first at every epoch that both reached; None
            where it does not at the last of them.
        best_epoch: the same against the first run's best validation; None where the second never ends below it.
        end: difference second − first where both ended last, with its error; None without a common epoch.
        end_epoch: where that is.
    """

    epoch: float | None
    best_epoch: float | None
    end: Gap | None
    end_epoch: float


def crossing(first: Run, second: Run) -> Crossing:
    """Compare two learning curves over epochs; the first is interpolated (over log epochs) between its validations.

    The epoch is that of a validation, so it comes at most one validation too late; noise of the curves is in it.
    """
    base, curve = _curve(first), _curve(second)
    if not base or not curve:
        return Crossing(None, None, None, math.nan)
    epochs, losses = np.log([row.epoch for row in base]), [row.nll for row in base]
    common = [row for row in curve if base[0].epoch <= row.epoch <= base[-1].epoch * (1 + 1e-9)]
    below = [row.nll < float(np.interp(math.log(row.epoch), epochs, losses)) for row in common]
    assert first.best is not None  # of the trained weights or of their average
    last = common[-1] if common else None
    partner = min(base, key=lambda row: abs(row.epoch - last.epoch)) if last else None
    return Crossing(
        _from_there_on(common, below),
        _from_there_on(curve, [row.nll < first.best.nll for row in curve]),
        gap_at(first, partner, second, last) if last and partner else None,
        last.epoch if last else math.nan,
    )


def _curve(run: Run) -> list[Validation]:
    return [row for row in run.valid if row.epoch > 0 and math.isfinite(row.nll)]


def _from_there_on(rows: list[Validation], holds: list[bool]) -> float | None:
    """Epoch of the first row from which on all hold."""
    first = len(rows)
    while first and holds[first - 1]:
        first -= 1
    return rows[first].epoch if first < len(rows) else None
