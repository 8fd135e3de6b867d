"""Scaling laws: gradients, recovery of parameters from synthetic losses, and what the published figures determine."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron.commands.fit import PUBLISHED as PUBLISHED_NAMES
from megatron.scaling import fit
from megatron.scaling.fit import Fit, fit_law, load_fits, save_fits
from megatron.scaling.laws import CHINCHILLA, DATA_CONSTRAINED, LAWS, U_SHAPED, Coefficients, Points, Reference
from megatron.scaling.literature import (
    GIDD_FRONTIERS,
    HOFFMANN,
    KIM,
    KIM_ASYMPTOTES,
    LITERATURE,
    MDM_REPEATED,
    MUENNIGHOFF,
    QUOKKA,
    critical_flops,
    critical_unique_tokens,
    preset_parameters,
    quokka_overfitting_epochs,
)
from megatron.scaling.predict import best_epochs, compute_optimal, critical_compute
from megatron.scaling.solve import minimize

U_SHAPED_THETA = (1.8, 400.0, 0.34, 1500.0, 0.35, 2.0, 0.9, 0.35, 0.45)


def grid(sizes, unique, epochs):
    n, u, e = (axis.ravel() for axis in np.meshgrid(sizes, unique, epochs, indexing="ij"))
    return Points.of(n, u * e, u)


DESIGNS = {
    "chinchilla": (HOFFMANN.theta, grid(np.geomspace(5e6, 5e9, 8), np.geomspace(2e8, 2e11, 8), [1.0])),
    "data_constrained": (
        MUENNIGHOFF.theta,
        grid(np.geomspace(1e6, 1e9, 6), np.geomspace(3e6, 3e9, 5), [1, 4, 16, 60]),
    ),
    "prescriptive": (
        (1.8, 400.0, 0.34, 1500.0, 0.35, 0.05, 0.5, 0.6),
        grid(np.geomspace(1e6, 1e9, 5), np.geomspace(1e7, 1e10, 4), [1, 3, 10, 40, 150]),
    ),
    "memorisation": (
        (1.8, 400.0, 0.34, 1500.0, 0.35, 0.6, 1.0, 2.0, 63_400.0, 0.2, 1.8),
        grid(np.geomspace(1e6, 3e9, 6), np.geomspace(1e7, 1e10, 4), [1, 3, 10, 40, 150, 600]),
    ),
    "u_shaped": (U_SHAPED_THETA, grid(np.geomspace(1e6, 1e9, 5), np.geomspace(1e7, 1e10, 4), [1, 3, 10, 40, 150])),
}


def exact(law, theta, points):
    return law.loss(law.to_phi(np.array([theta]), Reference()), points, Reference())[0][0]


@pytest.mark.parametrize("name", LAWS)
def test_gradient_equals_central_differences(name):
    law, (theta, points) = LAWS[name], DESIGNS[name]
    reference = Reference.of(points)
    phi = law.to_phi(np.array([theta]), reference)
    gradient = law.loss(phi, points, reference)[1]
    for index in range(len(theta)):
        step = np.zeros_like(phi)
        step[0, index] = 1e-6
        numeric = (law.loss(phi + step, points, reference)[0] - law.loss(phi - step, points, reference)[0]) / 2e-6
        np.testing.assert_allclose(gradient[..., index], numeric, atol=2e-7, rtol=1e-6, err_msg=law.names[index])


@pytest.mark.parametrize("name", LAWS)
def test_loss_does_not_depend_on_the_reference_point(name):
    law, (theta, points) = LAWS[name], DESIGNS[name]
    reference = Reference.of(points)
    phi = law.to_phi(np.array([theta]), reference)
    np.testing.assert_allclose(law.to_theta(phi, reference)[0], theta, rtol=1e-10)
    np.testing.assert_allclose(law.loss(phi, points, reference)[0][0], exact(law, theta, points), rtol=1e-10)


@pytest.mark.parametrize("name", LAWS)
def test_parameters_come_back_within_their_intervals(name):
    """1 % noise, 100 draws: each parameter is inside of its 95 % interval, and all of them of the joint intervals, in at least
    87, two standard errors below what the law of memorisation has with its skewed S (about 90; the others 91 to 93).
    Bootstrap intervals as used everywhere, with 200 refits."""
    law, (theta, points) = LAWS[name], DESIGNS[name]
    truth = exact(law, theta, points)
    inside, together = np.zeros(len(theta)), 0
    for draw in range(100):
        noisy = truth * np.exp(np.random.default_rng(100 + draw).normal(0, 0.01, len(truth)))
        fit = fit_law(law, points, noisy, num_bootstrap=200, seed=draw)
        inside += [fit.interval(key).low <= value <= fit.interval(key).high for key, value in zip(law.names, theta)]
        joint = fit.joint_intervals()
        together += all(joint[key].low <= value <= joint[key].high for key, value in zip(law.names, theta))
    assert inside.min() >= 87, dict(zip(law.names, inside))
    assert inside.mean() < 99.5, "intervals far too wide would pass the line above"
    assert together >= 87


def test_intervals_are_not_merely_wide():
    """The width of the interval is that of a linearised fit with the true noise, within a third."""
    theta, points = DESIGNS["chinchilla"]
    truth = exact(CHINCHILLA, theta, points)
    noisy = truth * np.exp(np.random.default_rng(3).normal(0, 0.01, len(truth)))
    fit = fit_law(CHINCHILLA, points, noisy, num_bootstrap=400)
    reference = Reference()
    phi = CHINCHILLA.to_phi(np.array([theta]), reference)
    loss, gradient = CHINCHILLA.loss(phi, points, reference)
    jacobian = gradient[0] / loss[0][:, None]
    error = 0.01 * np.sqrt(np.diag(np.linalg.inv(jacobian.T @ jacobian)))
    # With the reference at 1 token and 1 parameter, the logarithm of every parameter is one column.
    for index, key in enumerate(CHINCHILLA.names):
        interval = fit.interval(key)
        assert math.log(interval.high / interval.low) == pytest.approx(2 * 1.96 * error[index], rel=0.34), key


def test_outliers_hardly_move_the_fit():
    theta, points = DESIGNS["chinchilla"]
    rng = np.random.default_rng(5)
    losses = exact(CHINCHILLA, theta, points) * np.exp(rng.normal(0, 0.01, len(points)))
    losses[[3, 30, 55]] *= 1.5
    fit = fit_law(CHINCHILLA, points, losses, num_bootstrap=50)
    assert fit.interval("alpha").value == pytest.approx(theta[2], rel=0.1)
    clean = np.ones(len(points), dtype=bool)
    clean[[3, 30, 55]] = False
    assert np.abs(np.log(fit.loss(points) / exact(CHINCHILLA, theta, points)))[clean].max() < 0.02


def test_held_out_error_prefers_the_law_that_made_the_data():
    theta, points = DESIGNS["u_shaped"]
    losses = exact(U_SHAPED, theta, points) * np.exp(np.random.default_rng(0).normal(0, 0.01, len(points)))
    errors = {name: fit_law(law, points, losses, num_bootstrap=10).cross_validation for name, law in LAWS.items()}
    assert errors["u_shaped"] == pytest.approx(0.01, rel=0.3)
    assert errors["u_shaped"] < 0.5 * min(errors["chinchilla"], errors["data_constrained"])


def test_runs_are_left_out_and_resampled_as_a_whole():
    """Ten points per run with an error common to the run: ignoring the runs understates the interval."""
    theta, points = DESIGNS["chinchilla"]
    repeated = points.take(np.repeat(np.arange(64), 10))
    run = np.repeat(np.arange(64), 10)
    losses = exact(CHINCHILLA, theta, repeated) * np.exp(np.random.default_rng(1).normal(0, 0.01, 64)[run])
    widths = []
    for groups in (None, list(run)):
        interval = fit_law(CHINCHILLA, repeated, losses, groups=groups, num_bootstrap=100).interval("alpha")
        widths.append(math.log(interval.high / interval.low))
    assert widths[1] > 2 * widths[0]


def test_every_run_is_left_out_once_and_the_largest_together(monkeypatch):
    left_out = []

    def note(problem, starts, log_loss, *, weights=1.0, **options):
        if np.ndim(weights) == 2:
            left_out.append(np.asarray(weights) == 0)
        return minimize(problem, starts, log_loss, weights=weights, **options)

    monkeypatch.setattr(fit, "minimize", note)
    theta, points = DESIGNS["chinchilla"]
    groups = np.arange(len(points)) // 2  # runs of two points
    losses = exact(CHINCHILLA, theta, points) * np.exp(np.random.default_rng(0).normal(0, 0.01, len(points)))
    fit_law(CHINCHILLA, points, losses, groups=groups.tolist(), num_bootstrap=8)
    (masks,) = left_out
    assert (masks[:5].sum(axis=0) == 1).all() and (masks[:, ::2] == masks[:, 1::2]).all()
    compute = points.flops.reshape(-1, 2).max(axis=1)
    assert compute[masks[5, ::2]].min() > compute[~masks[5, ::2]].max() and masks[5].mean() == pytest.approx(
        0.2, abs=0.03
    )


def test_u_shaped_turns_where_the_formula_says():
    _, _, _, b, beta, p, kappa, gamma, delta = U_SHAPED_THETA
    n, u = 1e8, 1e8
    predicted = (beta * b / (kappa * p) * u ** (delta - beta) / n**gamma) ** (1 / (kappa + beta))
    epochs = np.geomspace(1, 1e4, 20001)
    measured = epochs[np.argmin(exact(U_SHAPED, U_SHAPED_THETA, Points.of(n, u * epochs, u)))]
    # The formula takes e for e - 1.
    assert measured == pytest.approx(predicted, rel=0.1)


def test_laws_agree_where_they_should():
    points = grid([1e7], [1e9], [1.0])
    np.testing.assert_allclose(exact(U_SHAPED, U_SHAPED_THETA, points), exact(CHINCHILLA, U_SHAPED_THETA[:5], points))
    large = (1.8, 400.0, 0.34, 1500.0, 0.35, 1e9, 1e9)
    repeated = grid([1e7], [1e7], [50.0])
    np.testing.assert_allclose(
        exact(DATA_CONSTRAINED, large, repeated), exact(CHINCHILLA, large[:5], repeated), rtol=1e-6
    )


def test_repeated_tokens_saturate_at_their_half_life():
    """Equation 5 of Muennighoff et al.: D' = U + U*R_D*(1 - exp(-(epochs - 1)/R_D)), checked by hand."""
    unique, epochs, rate = 1e8, 20.0, MUENNIGHOFF.values["R_D"]
    effective = unique + unique * rate * (1 - math.exp(-(epochs - 1) / rate))
    values = MUENNIGHOFF.values
    optimal = (values["alpha"] * values["A"] / (values["beta"] * values["B"])) ** (1 / values["alpha"]) * unique
    small = optimal / 2  # fewer parameters than are useful: N' = N
    expected = values["E"] + values["A"] / small ** values["alpha"] + values["B"] / effective ** values["beta"]
    assert MUENNIGHOFF.loss(small, unique * epochs, unique)[0] == pytest.approx(expected, rel=1e-9)


def test_too_few_points_and_bad_losses_are_refused():
    points = grid([1e7, 1e8], [1e8], [1.0, 2.0])
    with pytest.raises(ValueError, match="needs at least 7"):
        fit_law(CHINCHILLA, points, np.full(4, 3.0))
    theta, points = DESIGNS["chinchilla"]
    losses = exact(CHINCHILLA, theta, points)
    losses[0] = np.nan
    with pytest.raises(ValueError, match="not positive and finite"):
        fit_law(CHINCHILLA, points, losses)


def test_fits_survive_the_file(tmp_path):
    theta, points = DESIGNS["chinchilla"]
    losses = exact(CHINCHILLA, theta, points) * np.exp(np.random.default_rng(0).normal(0, 0.01, len(points)))
    fit = Fit(
        **{**vars(fit_law(CHINCHILLA, points, losses, num_bootstrap=20)), "objective": "ar", "label": "NLL (exact)"}
    )
    save_fits([fit], tmp_path / "fits.json")
    [again] = load_fits(tmp_path / "fits.json")
    assert again.interval("alpha").value == pytest.approx(fit.interval("alpha").value)
    assert again.interval("alpha").low == pytest.approx(fit.interval("alpha").low, rel=1e-5)
    assert (again.objective, again.label, again.ranges) == ("ar", "NLL (exact)", fit.ranges)
    assert fit.outside(Points.of(1e12, 1e10, 1e10))
    assert not fit.outside(Points.of(1e8, 1e10, 1e10))
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="not a file of fits"):
        load_fits(tmp_path / "other.json")


# --- published figures: what can be checked -------------------------------------------------------------------------


def test_published_critical_line():
    assert critical_flops(100e6) == pytest.approx(4.77e19, rel=2e-3)
    assert math.log(critical_flops(1e9) / critical_flops(1e8)) / math.log(10) == pytest.approx(2.174, abs=1e-3)
    assert critical_unique_tokens(critical_flops(3e8)) == pytest.approx(3e8)


def test_published_coefficients_do_not_determine_the_critical_line():
    """The line compares two laws fitted to one data set, whose coefficients are not available here. The public ones
    for AR (C4) and MDM (Quokka's data) cross elsewhere and with another slope; this test records that, so that nobody
    takes their crossing for the published line. See docs/scaling.md."""
    crossings = [critical_compute(MUENNIGHOFF, MDM_REPEATED, unique).value for unique in (1e8, 1e9)]
    slope = math.log10(crossings[1] / crossings[0])
    assert not critical_flops(1e8) / 3 < crossings[0] < critical_flops(1e8) * 3
    assert abs(slope - 1 / 0.460) > 0.5
    assert [f"{value:.2e}" for value in crossings] == ["7.65e+18", "2.35e+22"] and slope == pytest.approx(
        3.488, abs=0.002
    ), "as told"


def test_published_compute_optimal_sizes():
    """Quokka's law puts the optimum for 1e20 FLOPs near the 425M that arXiv 2507.15857 lists for MDM, and its tokens
    above Chinchilla's; Chinchilla's own law (approach 3) gives about 32B parameters for Gopher's budget."""
    assert compute_optimal(QUOKKA, 1e20)[0].value == pytest.approx(preset_parameters("425M"), rel=0.15)
    assert compute_optimal(QUOKKA, 1e21)[1].value > compute_optimal(MUENNIGHOFF, 1e21)[1].value
    parameters, tokens = compute_optimal(HOFFMANN, 5.76e23)
    exponent = 0.28 / (0.34 + 0.28)
    ratio = (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62)
    assert parameters.value == pytest.approx(ratio * (5.76e23 / 6) ** exponent, rel=0.02)
    assert parameters.value * tokens.value * 6 == pytest.approx(5.76e23)
    assert math.isnan(parameters.low), "published coefficients carry no interval"


def test_published_losses_are_near_the_papers_but_not_equal():
    """What the planner quotes as the error of published coefficients: AR 3.71 and MDM 3.55 on 100M tokens."""
    ar = MUENNIGHOFF.loss(preset_parameters("140M"), 50e8, 1e8)[0]
    mdm = MDM_REPEATED.loss(preset_parameters("425M"), 500e8, 1e8)[0]
    assert abs(ar - 3.71) < 0.3
    assert abs(mdm - 3.55) < 0.3


def test_published_laws_carry_a_name_each():
    assert set(LITERATURE) == set(PUBLISHED_NAMES), "the command offers what there is, without importing it for --help"
    for name, law in LITERATURE.items():
        loss = law.loss([1e8, 1e9], 2e10, 2e10)
        assert np.all(np.isfinite(loss) & (loss > 1.5) & (loss < 5)), name
        assert loss[1] < loss[0], name
    assert KIM.loss(1e9, 1e10, 2e8)[0] == pytest.approx(3.48), "3.43 + 0.05/N^1.02, N in billions"
    assert KIM.loss(1e15, 1e10, 2e8)[0] == pytest.approx(KIM_ASYMPTOTES["single"], abs=1e-4)


def test_gidd_frontiers_lie_below_the_best_of_gidds_own_laws():
    """Two published sets of one paper that do not agree: by 0.35 to 0.4 nats at 1e20 FLOPs of 6*N*D and 0.13 to 0.21 at 1e22
    (C may be counted otherwise there). This records it, so that nobody takes one for the other."""
    for name, frontier in GIDD_FRONTIERS.items():
        law = LITERATURE[name]
        gaps = []
        for flops in (1e20, 1e22):
            parameters, tokens = compute_optimal(law, flops)
            gaps.append(float(law.loss(parameters.value, tokens.value, tokens.value)[0]) - frontier.loss(flops))
        assert 0.34 < gaps[0] < 0.40, name
        assert 0.12 < gaps[1] < 0.22, name
        assert frontier.by_size + frontier.by_tokens == pytest.approx(1.0)


def test_the_penalty_of_memorisation_ends_and_the_prescriptive_one_does_not():
    """Once all is memorised, a hundred times more epochs change little; without an end they multiply the penalty."""
    points = Points.of(1e9, np.array([1e3, 1e5]) * 1e8, 1e8)
    excess = {}
    for name in ("memorisation", "prescriptive"):
        theta = DESIGNS[name][0]
        excess[name] = exact(LAWS[name], theta, points) - exact(CHINCHILLA, theta[:5], points)
    assert excess["memorisation"][1] == pytest.approx(excess["memorisation"][0], rel=0.01)
    assert excess["prescriptive"][1] == pytest.approx(10 * excess["prescriptive"][0], rel=1e-3)
    assert best_epochs_of("memorisation") > 1
    assert best_epochs(HOFFMANN, 1e9, 1e8) is None


def best_epochs_of(name):
    found = best_epochs(Coefficients(LAWS[name], DESIGNS[name][0], ""), 1e9, 1e8)
    assert found is not None
    return found.value


def test_quokka_overfitting_scales_as_published():
    base = quokka_overfitting_epochs(1e9, 1e9)
    assert quokka_overfitting_epochs(1e9, 1e10) / base == pytest.approx(10**0.39)
    assert quokka_overfitting_epochs(1e10, 1e9) / base == pytest.approx(10**-0.55)
    assert quokka_overfitting_epochs(1e10, 1e12) == pytest.approx(1100)
