"""Runs that differ in nothing but their seed, as one run with an error that holds the spread between seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megatron.runs.matching import differences
from megatron.runs.run import Run, Validation
from megatron.runs.sums import welch


def average_seeds(runs: Sequence[Run]) -> list[Run]:
    """Every group of runs that differ only in their seed as their mean (:func:`mean_run`), all other runs as they are.

    The order is that of the first run of each group.
    """
    groups: list[list[Run]] = []
    for run in runs:
        # A seed that is there already (a copy of a run) says nothing about the spread between seeds.
        group = next((group for group in groups if all(is_replicate(one, run) for one in group)), None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    return [mean_run(group) if len(group) > 1 else group[0] for group in groups]


def is_replicate(first: Run, second: Run) -> bool:
    """Whether two runs have different seeds and are otherwise of one configuration, estimator included."""
    one, other = first.info["config"], second.info["config"]
    if one.get("objective") != other.get("objective") or first.objective != second.objective:
        return False
    if first.setting("run", "num_mc") != second.setting("run", "num_mc"):
        return False
    return [item.field for item in differences(first, second) if item.weight == "result"] == ["run.seed"]


def mean_run(runs: Sequence[Run]) -> Run:
    """The mean of replicates over the steps that all of them have reached.

    The runs are judged on the same validation samples and noise, so averaging does not lessen that error; what it lessens
    is the spread between seeds: ``se² = sd² / n + mean(se_i)²`` with sd the standard deviation between the n seeds, which has
    n − 1 degrees of freedom.
    """
    first = runs[0]
    logs = [{int(row["step"]): row for row in run.train} for run in runs]
    train_steps = [int(row["step"]) for row in first.train if all(int(row["step"]) in log for log in logs)]
    return replace(
        first,
        name=f"{first.name} and {len(runs) - 1} more seed{'s' * (len(runs) > 2)}",
        train=tuple(_mean_train([log[step] for log in logs]) for step in train_steps),
        valid=_mean_curve([run.valid for run in runs]),
        averaged=_mean_curve([run.averaged for run in runs]),
        other_valid=(),
        problems=(),
        seeds=tuple(run.seed for run in runs),
    )


def _mean_train(rows: Sequence[Any]) -> dict[str, Any]:
    losses = [row.get("loss") for row in rows]
    mean = None if any(loss is None for loss in losses) else float(np.mean(losses))
    return {**rows[0], "loss": mean}


def _mean_curve(curves: Sequence[Sequence[Validation]]) -> tuple[Validation, ...]:
    """Means over the steps that all of them have."""
    by_step = [{row.step: row for row in curve} for curve in curves]
    steps = [row.step for row in curves[0] if all(row.step in rows for rows in by_step)]
    return tuple(_mean_validation([rows[step] for rows in by_step]) for step in steps)


def _mean_validation(rows: Sequence[Validation]) -> Validation:
    values = np.array([row.nll for row in rows])
    between = float(values.std(ddof=1)) / math.sqrt(len(rows))
    within = float(np.mean([row.nll_se for row in rows]))
    bits = [row.bits_per_byte for row in rows]
    return replace(
        rows[0],
        nll=float(values.mean()),
        nll_se=math.hypot(between, within),
        degrees=welch((between**2, len(rows) - 1), (within**2, math.inf)),
        bits_per_byte=None if None in bits else float(np.mean(bits)),  # type: ignore[arg-type]
    )
