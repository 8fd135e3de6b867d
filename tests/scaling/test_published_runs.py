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

from megatron.scaling.adequacy import r_squared
from megatron.scaling.fit import fit_law
from megatron.scaling.laws import CHINCHILLA, DATA_CONSTRAINED, LAWS, Points, Reference
from megatron.scaling.literature import BESIROGLU, MUENNIGHOFF

FOLDER = Path(os.environ.get("MEGATRON_PUBLISHED_RUNS", "../shared/facts/runs"))
C4_THETA = MUENNIGHOFF.theta

needs_runs = pytest.mark.skipif(
    not (FOLDER / "muennighoff_c4_fit182.csv").is_file(),
    reason="MEGATRON_PUBLISHED_RUNS names no folder of published runs",
)


def columns(name, *fields):
    with open(FOLDER / name, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [np.array([float(row[field]) for row in rows]) for field in fields]


def c4(name="muennighoff_c4_fit182.csv"):
    n, d, u, loss = columns(name, "params", "tokens", "unique_tokens", "final_validation_loss")
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
def test_the_law_that_plans_use_is_the_published_one_to_its_last_digit():
    points, loss = c4()
    predicted = MUENNIGHOFF.loss(points.parameters, points.tokens, points.unique_tokens)
    assert f"{huber(np.log(predicted / loss)):.8f}" == "0.01582594"
    assert f"{r_squared(predicted, loss):.10f}" == "0.7722046085"


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
    assert fit.doubts == (), "a law that describes its losses is not doubted"
    assert fit.cross_validation < 0.01
    assert fit.r_squared > 0.99
    predicted = BESIROGLU.loss(points.parameters, points.tokens, points.unique_tokens)
    # With the exponents rounded to five digits; published: 0.00101827.
    assert huber(np.log(predicted / loss[keep])) == pytest.approx(0.00101827, rel=1e-2)


# File → runs; R² that the published law reaches with its published coefficients; by law the least R² and the most held-out error
# (five folds of runs). Reached on 26 November 2026: docs/scaling.md.
C4 = {
    "muennighoff_c4_fit182.csv": (
        182,
        0.7722046,
        {"chinchilla": (0.90, 0.09), "data_constrained": (0.935, 0.07), "prescriptive": (0.96, 0.06),
         "u_shaped": (0.97, 0.055), "memorisation": (0.985, 0.033)},
    ),
    "muennighoff_c4_all.csv": (
        296,
        0.447,
        {"chinchilla": (0.30, 0.24), "data_constrained": (0.50, 0.18), "prescriptive": (0.77, 0.105),
         "u_shaped": (0.755, 0.105), "memorisation": (0.88, 0.07)},
    ),
}  # fmt: skip


@needs_runs
@pytest.mark.parametrize("name", C4)
def test_laws_describe_the_runs_of_muennighoff(name):
    """The published law has its published R²; ours reach what is asked (0.97 and 0.76) and more, and leave what they leave."""
    points, loss = c4(name)
    count, published, bounds = C4[name]
    assert len(loss) == count
    predicted = MUENNIGHOFF.loss(points.parameters, points.tokens, points.unique_tokens)
    assert r_squared(predicted, loss) == pytest.approx(published, abs=1e-3)
    fits = {law: fit_law(LAWS[law], points, loss, num_bootstrap=20) for law in LAWS}
    for law, (least, most) in bounds.items():
        assert fits[law].r_squared == pytest.approx(r_squared(fits[law].loss(points), loss), rel=1e-6)
        assert fits[law].r_squared >= least, law
        assert fits[law].cross_validation <= most, law
    best = min(fits.values(), key=lambda fit: fit.cross_validation)
    assert best.law.name == "memorisation"
    for fit in fits.values():
        rising = any("the loss rises with epochs" in text for text in fit.doubts)
        assert rising is not fit.law.can_rise, "these losses rise by half and more"
        assert any("neighbouring runs" in text for text in fit.doubts), "the rest is no noise: seeds differ by 0.1 %"
