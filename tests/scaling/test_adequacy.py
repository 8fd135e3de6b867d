"""When a law does not describe its losses, the fit says so; when it does, nothing is said."""

from __future__ import annotations

import numpy as np
import pytest

from megatron.scaling.adequacy import r_squared
from megatron.scaling.fit import Fit, fit_law
from megatron.scaling.laws import CHINCHILLA, DATA_CONSTRAINED, PRESCRIPTIVE, Points, Reference
from megatron.scaling.literature import HOFFMANN

THETA = (1.8, 400.0, 0.34, 1500.0, 0.35, 0.05, 0.5, 0.6)


def grid(epochs):
    n, u, e = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e6, 1e9, 5), np.geomspace(1e7, 1e10, 4), epochs))
    return Points.of(n, u * e, u)


def made_by(law, theta, points, noise=0.005, seed=0):
    loss = law.loss(law.to_phi(np.array([theta]), Reference()), points, Reference())[0][0]
    return loss * np.exp(np.random.default_rng(seed).normal(0, noise, len(points)))


def test_a_law_that_made_the_losses_is_hardly_ever_doubted():
    points, doubted = grid([1, 3, 10, 40, 150]), 0
    for seed in range(20):
        fit = fit_law(PRESCRIPTIVE, points, made_by(PRESCRIPTIVE, THETA, points, 0.02, seed), num_bootstrap=5)
        doubted += bool(fit.doubts)
        assert fit.r_squared > 0.97
    assert doubted <= 1


@pytest.mark.parametrize("law", [CHINCHILLA, DATA_CONSTRAINED], ids=lambda law: law.name)
def test_losses_that_rise_are_not_left_to_a_law_that_cannot(law):
    points = grid([1, 3, 10, 40, 150])
    fit = fit_law(law, points, made_by(PRESCRIPTIVE, THETA, points), num_bootstrap=5)
    assert any("the loss rises with epochs" in text for text in fit.doubts)
    assert any("neighbouring runs miss it on the same side" in text for text in fit.doubts)
    assert any("of the variance" in text for text in fit.doubts) == (fit.r_squared < 0.9 or len(fit.doubts) == 3)
    again = Fit.from_dict(fit.to_dict())
    assert (again.doubts, again.r_squared) == (fit.doubts, fit.r_squared)


def test_a_wrong_shape_is_seen_where_it_explains_nearly_everything():
    """One exponent too few: R² says nothing, the residuals of neighbours do."""
    points = Points.of(
        *(axis.ravel() for axis in np.meshgrid(np.geomspace(1e6, 1e10, 15), np.geomspace(1e8, 1e12, 15))), np.inf
    )
    losses = made_by(CHINCHILLA, HOFFMANN.theta, points, 0.002) * (1 + 0.03 * np.sin(np.log(points.parameters)))
    fit = fit_law(CHINCHILLA, points, losses, num_bootstrap=5)
    assert fit.r_squared > 0.98
    [doubt] = fit.doubts
    assert "not their shape" in doubt


def test_points_of_one_run_are_no_neighbours():
    """Losses along a run err together: that is noise of the run, not the shape of the law."""
    points, runs = grid([1, 2, 4, 8, 16, 32]), np.arange(20)[:, None]
    rng = np.random.default_rng(3)
    key = np.stack([points.parameters, points.unique_tokens], axis=1)
    run = np.unique(key, axis=0, return_inverse=True)[1].ravel()
    assert len(runs) == run.max() + 1
    losses = made_by(CHINCHILLA, HOFFMANN.theta, points, 0.001) * np.exp(rng.normal(0, 0.03, 20)[run])
    assert fit_law(CHINCHILLA, points, losses, groups=list(run), num_bootstrap=5).doubts == ()
    assert fit_law(CHINCHILLA, points, losses, num_bootstrap=5).doubts != ()


def test_noise_alone_is_explained_by_nothing():
    points = grid([1, 3])
    losses = 3.0 * np.exp(np.random.default_rng(0).normal(0, 0.004, len(points)))
    [doubt] = fit_law(CHINCHILLA, points, losses, num_bootstrap=5).doubts
    assert "of the variance" in doubt
    assert r_squared(losses, losses) == 1.0
    assert r_squared(np.full_like(losses, losses.mean()), losses) == pytest.approx(0.0)
