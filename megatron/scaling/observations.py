"""Runs → points and losses that a law can be fitted to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron.errors import UserError, require
from megatron.runs.run import Run, Validation
from megatron.scaling.fit import SAME, Fit, fit_law
from megatron.scaling.laws import Law, Points

CHOICES = ("final", "best", "curve")


@dataclass(frozen=True)
class Observations:
    """Losses of one objective, of weights as trained. ``groups`` is the run of every point; ``skipped`` says what of the runs is
    not in it; ``source`` whose runs they are, where they were imported."""

    objective: str
    label: str
    points: Points
    losses: np.ndarray
    groups: np.ndarray
    skipped: tuple[str, ...]
    source: str = ""


def observe(runs: Sequence[Run], which: str = "final") -> list[Observations]:
    """Collect the losses of every objective whose number is a likelihood; imported runs of each source apart, before own.

    Args:
        which: "final": the last validation of every finished run, after its learning rate has decayed (use this for
            sweeps over epochs); "best": the lowest validation of every run, at the tokens where it occurred; "curve":
            all validations from a tenth of an epoch on (many points from few runs, at rates not yet decayed).

    Raises:
        UserError: an unknown choice, or one objective carries two kinds of label.
    """
    require(
        which in CHOICES, f"points {which!r} were asked for", f"known are {', '.join(CHOICES)}", "choose one of them"
    )
    found = []
    kinds = {
        (run.source == "", run.source, run.objective) for run in runs if run.is_likelihood and not run.is_evaluation
    }
    for _, source, objective in sorted(kinds):
        members = [run for run in runs if (run.source, run.objective) == (source, objective) and not run.is_evaluation]
        labels = {run.label for run in members}
        if len(labels) > 1:
            raise UserError(
                f"runs of {objective} are labelled {', '.join(sorted(labels))}",
                "one fit takes one kind of number",
                "fit them apart",
            )
        rows: list[tuple[float, float, float, float, int]] = []
        skipped = []
        for index, run in enumerate(members):
            chosen = _choose(run, which)
            if not chosen:
                skipped.append(f"{run.name} ({'not finished' if not run.is_finished else 'no finite validation'})")
            rows += [(run.compute_parameters, row.tokens, run.unique_tokens, row.nll, index) for row in chosen]
        if averaged := sum(bool(run.averaged) for run in members):
            skipped.append(f"validations of averaged weights, of {averaged} runs (a law is of weights as trained)")
        table = np.array(rows, dtype=np.float64).reshape(-1, 5)
        points = Points.of(table[:, 0], table[:, 1], table[:, 2])
        found.append(
            Observations(objective, labels.pop(), points, table[:, 3], table[:, 4].astype(int), tuple(skipped), source)
        )
    return found


def fit_observations(law: Law, data: Observations, *, num_bootstrap: int = 400, seed: int = 0) -> Fit:
    """Fit a law to one objective's losses and keep whose they are.

    Raises:
        UserError: too few points for the law.
    """
    fitted = fit_law(law, data.points, data.losses, groups=list(data.groups), num_bootstrap=num_bootstrap, seed=seed)
    return replace(fitted, objective=data.objective, label=data.label, source=data.source)


def best_fit(fits: Sequence[Fit], data: Observations) -> Fit:
    """Of fits of several laws to ``data`` the one with the lowest error on left-out runs (on all runs, where there are too few).

    Laws that agree with it on every loss to a thousandth are one function there: of those the one that leaves the fewest
    parameters open, and then that with the fewest.
    """
    judged = [fit for fit in fits if fit.cross_validation is not None] or fits
    best = min(judged, key=lambda fit: fit.noise if fit.cross_validation is None else fit.cross_validation)
    known = best.loss(data.points)
    same = [fit for fit in judged if np.all(np.abs(fit.loss(data.points) / known - 1) <= SAME)]
    return min(same, key=lambda fit: (len(fit.undetermined), len(fit.law.names)))


def _choose(run: Run, which: str) -> list[Validation]:
    finite = [row for row in run.valid if math.isfinite(row.nll) and row.nll > 0 and row.tokens > 0]
    if not finite or not run.unique_tokens:
        return []
    if which == "final":
        return finite[-1:] if run.is_finished else []
    if which == "best":
        return [min(finite, key=lambda row: row.nll)]
    return [row for row in finite if row.epoch >= 0.1]
