"""What runs leave open of a law: it is said, and nothing is derived from where a search happened to start."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from megatron.errors import UserError
from megatron.scaling.fit import fit_law, load_fits, save_fits
from megatron.scaling.laws import CHINCHILLA, DATA_CONSTRAINED, LAWS, Points
from megatron.scaling.literature import HOFFMANN, PUBLISHED
from megatron.scaling.observations import Observations, best_fit
from megatron.scaling.planner import Budget, make_plan
from megatron.scaling.predict import best_epochs, compute_optimal, critical_compute

OF_REPETITION = {
    "chinchilla": (),
    "data_constrained": ("R_D", "R_N"),  # these losses have no R_N: refits end at its upper bound
    "prescriptive": ("P", "delta", "kappa"),
    "u_shaped": ("P", "kappa", "gamma", "delta"),
    "memorisation": ("P", "kappa", "S", "h", "nu", "delta"),
}


def labelled(fit):
    return dataclasses.replace(fit, objective="ar", label="NLL (exact)")


@pytest.fixture(scope="module")
def read_once():
    """64 losses with 1 % noise of models that read every token once."""
    n, d = (axis.ravel() for axis in np.meshgrid(np.geomspace(5e6, 5e9, 8), np.geomspace(2e8, 2e11, 8)))
    points = Points.of(n, d, d)
    losses = HOFFMANN.loss(n, d, d) * np.exp(np.random.default_rng(0).normal(0, 0.01, len(n)))
    return Observations("ar", "NLL (exact)", points, losses, np.arange(64), ())


@pytest.fixture(scope="module")
def fits(read_once):
    return {name: labelled(fit_law(law, read_once.points, read_once.losses)) for name, law in LAWS.items()}


@pytest.fixture(scope="module")
def one_size():
    """The learning curve of one model on one data set, without noise."""
    step = np.arange(1, 20) * 10.0
    points = Points.of(1e6, step * 20_480, 1e5)
    return labelled(fit_law(CHINCHILLA, points, 3 + 5 / (1 + step) ** 0.3, groups=[0] * 19))


@pytest.mark.parametrize("name", LAWS)
def test_what_repetition_costs_is_open_where_every_token_was_read_once(fits, name):
    fit = fits[name]
    assert fit.open == OF_REPETITION[name]
    for key in fit.law.names:
        found = fit.interval(key)
        assert found.is_determined is (key not in fit.open), (key, found)
        assert fit.joint_intervals()[key].is_determined is (key not in fit.open)
        assert str(found).endswith(", not determined") is (key in fit.open)
        if key in fit.open:
            assert found.high > 30 * found.low, "the ends are those of the search, not of a start"


def test_of_one_size_only_the_sum_of_e_and_the_term_of_n_is_known(one_size):
    assert one_size.open == ("E", "A", "alpha")
    assert one_size.interval("beta").is_determined


def test_two_sizes_are_too_few_for_three_parameters():
    n, d = (axis.ravel() for axis in np.meshgrid([1e7, 1e8], np.geomspace(2e8, 2e11, 8)))
    losses = HOFFMANN.loss(n, d, d) * np.exp(np.random.default_rng(0).normal(0, 0.01, len(n)))
    assert fit_law(CHINCHILLA, Points.of(n, d, d), losses, num_bootstrap=20).open == ("E", "A", "alpha")


def test_a_parameter_whose_refits_end_at_a_bound_is_open(read_once):
    """Losses that end at nothing, so that E falls to the least that is searched for."""
    points = read_once.points
    losses = 400 / points.parameters**0.34 + 100 / points.tokens**0.3
    assert fit_law(CHINCHILLA, points, losses, num_bootstrap=20).open == ("E",)


def test_laws_that_are_one_function_on_the_runs_have_one_error_and_one_interval(fits):
    """They are judged on the same left-out runs, and refitted under the same noise."""
    plain = fits["chinchilla"]
    for name in ("prescriptive", "u_shaped", "memorisation"):
        assert fits[name].cross_validation == pytest.approx(plain.cross_validation, rel=1e-3), name
        assert fits[name].extrapolation == pytest.approx(plain.extrapolation, rel=1e-3), name
        assert fits[name].noise == pytest.approx(plain.noise, rel=1e-3), name
        for end in ("low", "high"):
            ends = (getattr(fit.interval("beta"), end) for fit in (fits[name], plain))
            assert next(ends) == pytest.approx(next(ends), rel=0.01), name


def test_of_laws_that_are_one_function_the_one_with_least_open_is_chosen(fits, read_once):
    same = [fits[name] for name in ("memorisation", "u_shaped", "prescriptive", "chinchilla")]
    assert best_fit(same, read_once) is fits["chinchilla"]
    assert best_fit(same[:3], read_once) is fits["prescriptive"]
    unjudged = dataclasses.replace(fits["memorisation"], cross_validation=None, noise=1e-9)
    assert best_fit([unjudged, fits["chinchilla"]], read_once) is fits["chinchilla"], "held-out errors come first"


def test_a_loss_that_needs_an_open_parameter_is_not_known(fits, one_size):
    for name in ("data_constrained", "prescriptive", "u_shaped", "memorisation"):
        assert list(fits[name].knows(Points.of(1e9, [1e9, 4e10], 1e9))) == [True, False], name
        refits = fits[name].loss_samples(Points.of(1e9, 4e10, 1e9))[:, 0]
        assert np.quantile(refits, 0.975) > 1.15 * np.quantile(refits, 0.025), name
    assert fits["chinchilla"].knows(Points.of(1e9, [1e9, 4e10], 1e9)).all()
    assert list(one_size.knows(Points.of([1e6, 1e7], 1e6, 1e5))) == [True, False]


def test_what_follows_from_open_parameters_is_not_determined_either(fits, one_size):
    for name in ("prescriptive", "u_shaped", "memorisation"):
        found = best_epochs(fits[name], 1e9, 1e9)
        assert found is not None and not found.is_determined, name
    assert not compute_optimal(one_size, 1e18)[0].is_determined
    assert not critical_compute(one_size, fits["chinchilla"], 1e6).is_determined


def test_a_plan_stays_where_the_runs_determine_the_law(fits, one_size):
    for name in ("data_constrained", "prescriptive"):
        choice = make_plan({"ar": fits[name], "mdm": PUBLISHED["mdm"]}, Budget(1e9, 1e21, {"a": 1e9})).choices["ar"]
        assert choice.epochs < 1.3, "R_D = 6.4 of a start was worth 43 epochs"
        assert choice.optimal_epochs is None
        assert any("planned only where that changes no prediction" in note for note in choice.notes)
    models = {"ar": one_size, "mdm": PUBLISHED["mdm"]}
    assert make_plan(models, Budget(1e5, 1e14, {"a": 1e6, "b": 2e6})).choices["ar"].size == "a"
    with pytest.raises(UserError, match="leaves E, A, alpha of chinchilla open"):
        make_plan(models, Budget(1e5, 1e14, {"b": 2e6}))


def test_open_parameters_survive_the_file_and_are_found_in_older_ones(fits, tmp_path):
    save_fits([fits["data_constrained"]], tmp_path / "fits.json")
    [again] = load_fits(tmp_path / "fits.json")
    assert again.open == ("R_D", "R_N")
    assert list(again.knows(Points.of(1e9, [1e9, 4e10], 1e9))) == [True, False]
    old = fits["data_constrained"].to_dict()
    del old["open"], old["equivalents"]
    at = DATA_CONSTRAINED.names.index("R_D")
    old["samples"] = [[*row[:at], 6.4, *row[at + 1 :]] for row in old["samples"]]
    assert type(again).from_dict(old).open == ("R_D",)
