"""Planning: from published coefficients, from fits of synthetic losses with a known answer, and the two programs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from runs.synthetic_runs import write_run

from megatron.model.arithmetic import PEAK_FLOPS
from megatron.runs.reading import find_runs
from megatron.scaling.fit import Fit, fit_law, save_fits
from megatron.scaling.laws import CHINCHILLA, DATA_CONSTRAINED, U_SHAPED, Points, Reference
from megatron.scaling.literature import PUBLISHED
from megatron.scaling.observations import observe
from megatron.scaling.planner import DEVICES, best_epochs, compute_optimal, critical_compute, device_hours, make_plan

ROOT = Path(__file__).resolve().parents[2]
AR = (1.8, 400.0, 0.34, 1500.0, 0.35, 2.0, 0.9, 0.35, 0.45)  # u_shaped
MDM = (1.75, 800.0, 0.36, 4000.0, 0.36, 500.0, 50.0)  # data_constrained: worse at one epoch, better after many


def synthetic_fit(law, theta, objective, seed):
    n, u, e = (
        a.ravel() for a in np.meshgrid(np.geomspace(1e6, 1e9, 5), np.geomspace(1e7, 1e9, 4), [1, 3, 10, 40, 150])
    )
    points = Points.of(n, u * e, u)
    truth = law.loss(law.to_phi(np.array([theta]), Reference()), points, Reference())[0][0]
    losses = truth * np.exp(np.random.default_rng(seed).normal(0, 0.005, len(truth)))
    label = "NLL (exact)" if objective == "ar" else "NLL bound"
    return Fit(**{**vars(fit_law(law, points, losses, num_bootstrap=60)), "objective": objective, "label": label})


@pytest.fixture(scope="module")
def fits():
    return {"ar": synthetic_fit(U_SHAPED, AR, "ar", 1), "mdm": synthetic_fit(DATA_CONSTRAINED, MDM, "mdm", 2)}


def truth_fit(law, theta):
    """The law without noise, as a fit with one refit."""
    return Fit(law, np.array(theta), np.array([theta]), 0.0, None, None, {}, "x", "x", 0, 0)


def test_published_line_decides_without_fits():
    assert make_plan(PUBLISHED, unique_tokens=100e6, flops=1e19).recommended == "ar"
    plan = make_plan(PUBLISHED, unique_tokens=100e6, flops=1e21)
    assert plan.recommended == "mdm"
    assert plan.probability is None
    assert any("published coefficients" in note for note in plan.notes)
    assert any("do not compare" in note for note in plan.notes)
    assert "too close to call" in make_plan(PUBLISHED, unique_tokens=100e6, flops=6e19).reason


def test_extrapolating_the_line_is_said():
    assert any("extrapolated" in note for note in make_plan(PUBLISHED, unique_tokens=1e6, flops=1e15).notes)
    assert not any("extrapolated" in note for note in make_plan(PUBLISHED, unique_tokens=1e8, flops=1e19).notes)


def test_plan_from_fits_finds_the_true_winner_on_both_sides(fits):
    for flops in (1e17, 1e21):
        truth = {"ar": truth_fit(U_SHAPED, AR), "mdm": truth_fit(DATA_CONSTRAINED, MDM)}
        expected = make_plan(truth, unique_tokens=1e8, flops=flops)
        plan = make_plan(fits, unique_tokens=1e8, flops=flops)
        assert plan.recommended == expected.recommended
        for name, choice in plan.choices.items():
            assert choice.loss.value == pytest.approx(expected.choices[name].loss.value, rel=0.02)
            assert choice.loss.low <= choice.loss.value <= choice.loss.high
    assert plan.recommended == "mdm"
    assert plan.probability is not None
    assert plan.probability > 0.9


def test_critical_compute_interval_holds_the_truth(fits):
    truth = critical_compute(truth_fit(U_SHAPED, AR), truth_fit(DATA_CONSTRAINED, MDM), 1e8).value
    found = critical_compute(fits["ar"], fits["mdm"], 1e8)
    assert 1e16 < truth < 1e22
    assert found.low / 1.5 <= truth <= found.high * 1.5
    assert found.low < found.high


def test_best_epochs_interval_holds_the_truth(fits):
    truth = best_epochs(truth_fit(U_SHAPED, AR), 1e8, 1e8)
    found = best_epochs(fits["ar"], 1e8, 1e8)
    assert truth is not None
    assert found is not None
    assert found.low <= truth.value * 1.05
    assert found.high >= truth.value / 1.05
    assert best_epochs(fits["mdm"], 1e8, 1e8) is None


def test_overfitting_objective_stops_before_the_budget_is_spent(fits):
    choice = make_plan(fits, unique_tokens=1e8, flops=1e22, sizes={"a": 1e8}).choices["ar"]
    assert choice.flops < 0.5e22
    assert choice.optimal_epochs is not None
    assert choice.epochs == pytest.approx(choice.optimal_epochs, rel=0.1)


def test_outside_of_the_fitted_range_is_said(fits):
    notes = make_plan(fits, unique_tokens=1e8, flops=1e24).choices["mdm"].notes
    assert any("outside of the fitted range: parameters" in note for note in notes)
    inside = make_plan(fits, unique_tokens=1e8, flops=6 * 1e8 * 1e9, sizes={"a": 1e8}).choices["mdm"].notes
    assert not any("outside" in note for note in inside)


def test_compute_optimal_equals_the_closed_form():
    theta = (1.69, 406.4, 0.34, 410.7, 0.28)
    found = compute_optimal(truth_fit(CHINCHILLA, theta), 1e21)[0].value
    expected = (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62) * (1e21 / 6) ** (0.28 / 0.62)
    assert found == pytest.approx(expected, rel=0.02)


def test_cost():
    hours, wall = device_hours(989e12 * 3600, peak_flops=989e12, mfu=0.5, devices=8)
    assert hours == pytest.approx(2.0)
    assert wall == pytest.approx(0.25)
    assert DEVICES == PEAK_FLOPS


def test_observations_take_finished_runs_only_and_skip_what_is_no_likelihood(tmp_path):
    write_run(tmp_path / "ar", "ar", epochs=20)
    write_run(tmp_path / "maskgit", "maskgit", epochs=20)
    torn = write_run(tmp_path / "torn", "ar", epochs=20)
    lines = (torn / "metrics.jsonl").read_text().splitlines()
    (torn / "metrics.jsonl").write_text("\n".join(lines[:-40]) + "\n")
    [data] = observe(find_runs([tmp_path]))
    assert data.objective == "ar"
    assert len(data.losses) == 1
    assert data.skipped == ("torn (not finished)",)
    assert data.points.epochs[0] == pytest.approx(20, rel=0.01)
    [curve] = observe(find_runs([tmp_path / "ar"]), "curve")
    assert len(curve.losses) > 10
    assert set(curve.groups) == {0}


def test_programs_fit_and_plan(tmp_path):
    for unique in (50_000, 200_000, 800_000):
        for size in (300_000, 900_000, 2_700_000):
            for objective in ("ar", "mdm"):
                write_run(
                    tmp_path / f"runs/{objective}-{unique}-{size}", objective, parameters=size, unique=unique, epochs=60
                )
    command = [sys.executable, str(ROOT / "tools/fit_laws.py"), str(tmp_path / "runs")]
    fitted = subprocess.run(
        [*command, "--points", "curve", "--bootstrap", "40", "--output", str(tmp_path / "fits.json")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert fitted.returncode == 0, fitted.stderr
    assert "NLL bound" in fitted.stdout
    assert "<- chosen" in fitted.stdout
    plan = [sys.executable, str(ROOT / "tools/plan.py"), "--unique-tokens", "200k", "--flops", "1e14", "--json"]
    plan += ["--fits", str(tmp_path / "fits.json"), "--sizes", "3e5", "1e6", "3e6"]
    planned = subprocess.run(plan, capture_output=True, text=True, timeout=120)
    assert planned.returncode == 0, planned.stderr
    data = json.loads(planned.stdout)
    assert data["probability"] is not None
    assert data["choices"]["ar"]["size"] in ("3e5", "1e6", "3e6")
    assert "fit of 9 runs" in data["choices"]["ar"]["source"]


def test_plan_program_without_fits_says_so_and_refuses_nonsense():
    command = [sys.executable, str(ROOT / "tools/plan.py"), "--unique-tokens", "100e6", "--flops", "1e21"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Train: MDM" in done.stdout
    assert "published coefficients are used" in done.stdout
    assert "H100 hours" in done.stdout
    for extra in (["--sizes", "huge"], ["--mfu", "2"], ["--fits", "/nonexistent"]):
        failed = subprocess.run([*command, *extra], capture_output=True, text=True, timeout=120)
        assert failed.returncode == 2, extra
        assert failed.stderr.startswith("error: ")


def test_saved_fits_need_both_objectives(fits, tmp_path):
    save_fits([fits["ar"]], tmp_path / "fits.json")
    with pytest.raises(ValueError, match="no law for mdm"):
        make_plan({"ar": fits["ar"]}, unique_tokens=1e8, flops=1e19)
    assert math.isfinite(fits["ar"].noise)
