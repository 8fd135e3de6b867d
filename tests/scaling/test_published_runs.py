"""Our laws against published runs of others (arXiv 2305.16264, and 2404.10102 for Chinchilla's figure).

The files are facts of others that the repository does not carry: MEGATRON_PUBLISHED_RUNS names their folder; without it
these tests skip themselves.
"""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path

import numpy as np
import pytest

from megatron.scaling.fit import fit_law
from megatron.scaling.laws import CHINCHILLA, DATA_CONSTRAINED, Points, Reference

FOLDER = Path(os.environ.get("MEGATRON_PUBLISHED_RUNS", "../shared/facts/runs"))
C4_THETA = (1.869146, 520.825, 0.3526596, 1487.71, 0.3526596, 15.387756, 5.309743)

needs_runs = pytest.mark.skipif(
    not (FOLDER / "muennighoff_c4_fit182.csv").is_file(),
    reason="MEGATRON_PUBLISHED_RUNS names no folder of published runs",
)


def columns(name, *fields):
    with open(FOLDER / name, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [np.array([float(row[field]) for row in rows]) for field in fields]


def c4():
    n, d, u, loss = columns("muennighoff_c4_fit182.csv", "params", "tokens", "unique_tokens", "final_validation_loss")
    return Points.of(n, d, u), loss


def residuals(theta, points, loss):
    phi = DATA_CONSTRAINED.to_phi(np.atleast_2d(np.array(theta)), Reference())
    return np.log(DATA_CONSTRAINED.loss(phi, points, Reference())[0]) - np.log(loss)


def huber(residual, delta=1e-3):
    size = np.abs(residual)
    return np.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).sum(axis=-1)


@needs_runs
def test_the_published_law_has_the_published_error_on_its_own_runs():
    points, loss = c4()
    assert len(loss) == 182
    residual = residuals(C4_THETA, points, loss)[0]
    assert huber(residual) == pytest.approx(0.01582594, rel=1e-5)
    predicted = loss * np.exp(residual)
    assert 1 - np.sum((loss - predicted) ** 2) / np.sum((loss - loss.mean()) ** 2) == pytest.approx(0.7722046, rel=1e-5)


@needs_runs
def test_the_published_half_lives_are_where_our_law_has_its_minimum():
    """The paper fixed E, A, alpha, B and beta from other runs and fitted R_D and R_N: on a grid of 1 % steps around them
    no other pair is better."""
    points, loss = c4()
    steps = np.exp(np.linspace(-0.1, 0.1, 21))
    theta = np.array([[*C4_THETA[:5], C4_THETA[5] * a, C4_THETA[6] * b] for a in steps for b in steps])
    best = theta[np.argmin(huber(residuals(theta, points, loss)))]
    assert best[5:] == pytest.approx(C4_THETA[5:], rel=0.011)


@needs_runs
def test_the_replication_of_chinchilla_comes_back_within_our_intervals():
    """240 of 245 points read off the figure; published: A 482.01 ± 124.52, B 2085.43 ± 1293.28, E 1.81686 ± 0.02566,
    alpha 0.34781 ± 0.01540, beta 0.36585 ± 0.02060."""
    n, flops, loss = columns("epoch_chinchilla_svg_extracted.csv", "Model Size", "Training FLOP", "loss")
    keep = np.argsort(loss)[:-5]
    points = Points.of(n[keep], flops[keep] / (6 * n[keep]), math.inf)
    fit = fit_law(CHINCHILLA, points, loss[keep], num_bootstrap=200)
    published = {"E": (1.81686, 0.02566), "A": (482.01, 124.52), "alpha": (0.34781, 0.01540),
                 "B": (2085.43, 1293.28), "beta": (0.36585, 0.02060)}  # fmt: skip
    for name, (value, error) in published.items():
        interval = fit.interval(name)
        assert interval.low <= value <= interval.high, (name, interval)
        assert abs(interval.value - value) < error, (name, interval)
        assert interval.high - interval.low < 6 * error, "an interval far too wide would hold anything"
    assert fit.undetermined == []
