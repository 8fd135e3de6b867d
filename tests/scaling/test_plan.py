"""Planning: from published coefficients, from fits of synthetic losses with a known answer, and the two programs."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from runs.synthetic_runs import write_run

from megatron.errors import UserError
from megatron.runs.reading import find_runs
from megatron.scaling.fit import Fit, fit_law, of_one_source, save_fits
from megatron.scaling.laws import CHINCHILLA, DATA_CONSTRAINED, U_SHAPED, Coefficients, Points, Reference
from megatron.scaling.literature import LITERATURE, MUENNIGHOFF, PUBLISHED
from megatron.scaling.observations import observe
from megatron.scaling.planner import Budget, device_hours, make_plan, preset_sizes
from megatron.scaling.predict import best_epochs, compute_optimal, critical_compute

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from megatron.commands.plan import main as plan_program  # noqa: E402
from megatron.commands.running import status_of  # noqa: E402

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


def budget(unique, flops, sizes=None):
    return Budget(unique, flops, sizes or preset_sizes())


def truth_fit(law, theta):
    """The law without noise, as a fit with one refit."""
    return Fit(law, np.array(theta), np.array([theta]), 0.0, None, None, {}, "x", "x", 0, 0)


def test_fits_of_two_sources_are_not_compared(fits, tmp_path, capsys):
    """As their runs are not: data and tokenizers differ."""
    theirs = [replace(fit, source="paper X") for fit in fits.values()]
    words = ["--unique-tokens", "100M", "--flops", "1e20", "--fits", str(tmp_path / "fits.json")]
    save_fits([theirs[0], fits["mdm"]], tmp_path / "fits.json")
    with pytest.raises(UserError, match="fits of own runs and runs of paper X; losses of two sources are not compared"):
        plan_program(words)
    save_fits([*theirs, fits["ar"]], tmp_path / "fits.json")  # only theirs are a pair
    plan_program(words)
    assert capsys.readouterr().out.count("imported from paper X") == 2
    assert of_one_source([*theirs, *fits.values()]) == fits, "own ones before others"


def test_published_line_decides_without_fits():
    assert make_plan(PUBLISHED, budget(100e6, 1e19)).recommended == "ar"
    plan = make_plan(PUBLISHED, budget(100e6, 1e21))
    assert plan.recommended == "mdm"
    assert plan.probability is None
    assert any("published coefficients" in note for note in plan.notes)
    assert any("do not compare" in note for note in plan.notes)
    assert make_plan(PUBLISHED, budget(100e6, 6e19)).is_close and not plan.is_close


def test_extrapolating_the_line_is_said():
    assert any("extrapolated" in note for note in make_plan(PUBLISHED, budget(5e6, 1e17)).notes)
    assert not any("extrapolated" in note for note in make_plan(PUBLISHED, budget(1e8, 1e19)).notes)


def test_plan_from_fits_finds_the_true_winner_on_both_sides(fits):
    for flops in (1e17, 1e21):
        truth = {"ar": truth_fit(U_SHAPED, AR), "mdm": truth_fit(DATA_CONSTRAINED, MDM)}
        expected = make_plan(truth, budget(1e8, flops))
        plan = make_plan(fits, budget(1e8, flops))
        assert plan.recommended == expected.recommended
        for name, choice in plan.choices.items():
            assert choice.loss.value == pytest.approx(expected.choices[name].loss.value, rel=0.02)
            assert choice.loss.low <= choice.loss.value <= choice.loss.high
    assert plan.recommended == "mdm"
    assert plan.probability is not None
    assert plan.probability > 0.9


def test_critical_compute_intervals_hold_the_truth():
    """12 pairs of fits to losses with 0.5 % noise: the interval holds the true crossing in at least 11 and the crossing is
    no point of the search's grid."""
    truth = critical_compute(truth_fit(U_SHAPED, AR), truth_fit(DATA_CONSTRAINED, MDM), 1e8).value
    assert 1e16 < truth < 1e22
    inside, values = 0, []
    for draw in range(12):
        ar, mdm = (
            synthetic_fit(law, theta, name, 1000 + 2 * draw + index)
            for index, (law, theta, name) in enumerate(((U_SHAPED, AR, "ar"), (DATA_CONSTRAINED, MDM, "mdm")))
        )
        found = critical_compute(ar, mdm, 1e8)
        inside += found.low <= truth <= found.high
        values.append(found.value)
        assert found.high / found.low < 2, "intervals far too wide would pass the line below"
    assert inside >= 11
    grid = np.geomspace(1e10, 1e28, 217)
    assert sum(np.abs(np.log(grid / value)).min() < 1e-6 for value in values) < 3


def test_best_epochs_interval_holds_the_truth(fits):
    truth = best_epochs(truth_fit(U_SHAPED, AR), 1e8, 1e8)
    found = best_epochs(fits["ar"], 1e8, 1e8)
    assert truth is not None
    assert found is not None
    assert found.low <= truth.value * 1.05
    assert found.high >= truth.value / 1.05
    assert best_epochs(fits["mdm"], 1e8, 1e8) is None


def test_on_a_plateau_the_cheapest_plan_within_the_error_stands_beside_the_best():
    """100M tokens and 1e20 FLOPs: AR 552M for 312 epochs is 0.005 nats better than 140M for 71, for 16 times the compute."""
    plan = make_plan(PUBLISHED, budget(100e6, 1e20))
    best = plan.choices["ar"]
    assert best.cheapest is not None
    error = (best.loss.high - best.loss.low) / 4
    assert best.loss.value < best.cheapest.loss.value <= best.loss.value + error
    assert best.cheapest.flops < best.flops / 16
    assert best.cheapest.epochs < 71
    assert best.advised is best.cheapest
    known = MUENNIGHOFF.loss(preset_sizes()["140M"], 71e8, 1e8)[0]
    assert known - best.loss.value == pytest.approx(0.005, abs=0.002)


def test_more_compute_than_a_plateau_needs_is_not_spent():
    """Repeated data saturate: beyond some length the predicted loss does not move in floating-point numbers."""
    small = make_plan(PUBLISHED, budget(1e6, 1e22)).choices["ar"]
    large = make_plan(PUBLISHED, budget(1e6, 1e26)).choices["ar"]
    assert large.flops == pytest.approx(small.flops, rel=1e-6)
    assert large.epochs < 542


def test_parts_of_an_epoch_are_shown():
    choice = make_plan(PUBLISHED, budget(100e9, 1e19)).choices["ar"]
    assert choice.epochs == pytest.approx(choice.tokens / 100e9)
    assert choice.epochs < 0.2


def test_no_prediction_is_worse_than_guessing():
    """At 1e15 FLOPs the MDM law gives far more than ln V; AR's is still below."""
    plan = make_plan(PUBLISHED, budget(100e6, 1e15))
    guessing = math.log(50257)
    for choice in plan.choices.values():
        assert choice.loss.value <= guessing
        assert choice.loss.high <= guessing
    assert any("more than guessing" in note for note in plan.choices["mdm"].notes)
    assert any("outside of the published runs" in note for note in plan.choices["ar"].notes)


def test_a_fit_that_determines_nothing_is_flagged_and_stays_below_guessing():
    """Six sizes at one length: B, beta and E can trade against each other, refits run off."""
    points = Points.of(np.repeat(np.geomspace(1e7, 3e7, 4), 2), [1e8, 1.2e8] * 4, 1e9)
    losses = 3.0 + np.random.default_rng(0).normal(0, 0.05, 8)
    fit = fit_law(CHINCHILLA, points, losses, num_bootstrap=100)
    assert len(fit.undetermined) >= 3
    ar = Fit(**{**vars(fit), "objective": "ar", "label": "NLL (exact)"})
    choice = make_plan({"ar": ar, "mdm": PUBLISHED["mdm"]}, budget(1e9, 1e20)).choices["ar"]
    assert choice.loss.high <= math.log(50257)
    assert any("leave" in note and "open" in note for note in choice.notes)


def test_overfitting_objective_stops_before_the_budget_is_spent(fits):
    choice = make_plan(fits, budget(1e8, 1e22, {"a": 1e8})).choices["ar"]
    assert choice.flops < 0.5e22
    assert choice.optimal_epochs is not None
    assert choice.epochs == pytest.approx(choice.optimal_epochs, rel=0.1)


def test_outside_of_the_fitted_range_is_said(fits):
    notes = make_plan(fits, budget(1e8, 1e24)).choices["mdm"].notes
    assert any("outside of the fitted range: parameters" in note for note in notes)
    inside = make_plan(fits, budget(1e8, 6 * 1e8 * 1e9, {"a": 1e8})).choices["mdm"].notes
    assert not any("outside" in note for note in inside)


@pytest.mark.parametrize("flops", [1e18, 1e19, 3e19, 1e20, 5.76e23])
@pytest.mark.parametrize("law", ["hoffmann", "besiroglu", "quokka", "gidd_masked"])
def test_compute_optimal_equals_the_closed_form(law, flops):
    """N = G·(C/6)^(beta/(alpha + beta)), G = (alpha·A/(beta·B))^(1/(alpha + beta)), to the last digit that is printed."""
    _, a, alpha, b, beta = LITERATURE[law].theta
    found, tokens = compute_optimal(LITERATURE[law], flops)
    expected = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (flops / 6) ** (beta / (alpha + beta))
    assert found.value == pytest.approx(expected, rel=1e-5) and str(found) == f"{expected:.3g}"
    assert tokens.value == pytest.approx(flops / 6 / expected, rel=1e-5)


def test_critical_compute_is_that_of_a_fine_search():
    """Crossings of the published laws, found by bisection of the two lowest losses over 4,001 sizes, polished."""
    for unique, exact in (
        (25e6, 2.69943e17),
        (1e8, 7.64704e18),
        (3e8, 1.76888e20),
        (5e8, 1.03560e21),
        (1e9, 2.35116e22),
    ):
        found = critical_compute(PUBLISHED["ar"], PUBLISHED["mdm"], unique).value
        assert found == pytest.approx(exact, rel=1.5e-3), unique


@pytest.mark.parametrize(("parameters", "unique"), [(1e8, 1e8), (1e7, 1e9), (1e8, 3e8)])
def test_best_epochs_are_where_the_derivative_is_zero(parameters, unique):
    law = Coefficients(U_SHAPED, AR, "")
    found = best_epochs(law, parameters, unique)
    assert found is not None
    below, above = (law.loss(parameters, found.value * (1 + step) * unique, unique)[0] for step in (-1e-3, 1e-3))
    best = law.loss(parameters, found.value * unique, unique)[0]
    assert min(below, above) > best and abs(above - below) < 0.1 * (above + below - 2 * best), "within 5e-5"


def test_cost():
    hours, wall = device_hours(989e12 * 3600, peak_flops=989e12, mfu=0.5, devices=8)
    assert hours == pytest.approx(2.0)
    assert wall == pytest.approx(0.25)


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
    metrics = tmp_path / "ar/metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows += [{**row, "kind": "valid_ema", "nll": row["nll"] - 1} for row in rows if row["kind"] == "valid"]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for which in ("final", "best"):  # runs with and without an average are of one kind
        [found] = observe(find_runs([tmp_path / "ar"]), which)
        assert found.losses[0] >= min(row["nll"] for row in rows if row["kind"] == "valid")
        assert found.skipped == ("validations of averaged weights, of 1 runs (a law is of weights as trained)",)
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


def run_plan(*arguments):
    command = [sys.executable, str(ROOT / "tools/plan.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_plan_program_without_fits_says_so():
    done = run_plan("--unique-tokens", "100M", "--flops", "1e21")
    assert done.returncode == 0, done.stderr
    assert re.match(r"Train MDM \d+M for [\d.]+ epochs of your 100M tokens: \d+ H100 hours", done.stdout)
    assert "published coefficients are used" in done.stdout
    assert "H100 hours" in done.stdout
    assert "cheapest within one standard error" in done.stdout
    assert "lowest predicted loss" in done.stdout


def test_gpu_hours_are_the_compute_of_a_device_by_its_peak_and_the_utilisation(capsys, monkeypatch):
    """And the answer comes first, in one sentence, in 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    plans = []
    for words in ("--gpu-hours 100 --device h100 --mfu 0.5", f"--flops {100 * 3600 * 989e12 * 0.5}"):
        assert status_of(lambda words=words: plan_program(["--unique-tokens", "100m", *words.split(), "--json"])) == 0
        plans.append(json.loads(capsys.readouterr().out)["flops"])
    assert plans[0] == pytest.approx(plans[1]) == 100 * 3600 * 989e12 * 0.5
    plan_program(["--unique-tokens", "100M", "--gpu-hours", "40", "--device", "b200"])
    text = capsys.readouterr().out
    answer = " ".join(text.partition("\n\n")[0].split())
    assert re.fullmatch(r"AR and MDM are too close to call; if one, train MDM .* B200 hours .* nats/token\.", answer)
    assert max(map(len, text.splitlines())) <= 80
    assert "40 B200 hours at 40% MFU (2250 TFLOP/s at most)" in " ".join(text.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--flops 500", "--flops 500; a H100 computes that in 5e-13 s; write FLOPs such as 1e20, or --gpu-hours HOURS"),
        ("--unique-tokens 100", "--unique-tokens 100; a model is trained on 10k tokens or more; write the number"),
        ("--sizes huge", "size 'huge' was given; a size is a number of parameters from 1, or a preset; presets: 7M"),
        ("--sizes -5 140M", "size '-5' was given; a size is a number of parameters from 1"),
        ("--flops inf", "--flops 'inf' is not a count; a count is a number from 1 to 1e+40"),
        ("--flops nan", "'nan' is not a count"),
        ("--unique-tokens -1", "--unique-tokens '-1' is not a count"),
        ("--unique-tokens 1e999", "'1e999' is not a count"),
        ("--device H1000", "--device H1000; known are A100"),
        ("--sizes 1e-320", "size '1e-320' was given"),
        ("--flops 1e12", "the laws predict no loss below guessing (ln 50257 = 10.82) there"),
        ("--fits /nonexistent", "/nonexistent is not a file of fits"),
    ],
)
def test_nonsense_is_refused_in_three_parts(flags, message, capsys):
    words = flags.split()
    given = {"--unique-tokens": "100M", "--flops": "1e21"}
    arguments = [word for pair in given.items() if pair[0] != words[0] for word in pair] + words
    if words[1].startswith("-") and len(words) == 2:
        arguments[-2:] = [f"{words[0]}={words[1]}"]
    assert status_of(lambda: plan_program(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count(";") >= 2


def test_hours_have_parts(capsys):
    plan_program(["--unique-tokens", "1M", "--gpu-hours", "0.5"])
    text = " ".join(capsys.readouterr().out.split())
    assert "0.5 H100 hours at 40% MFU" in text and re.search(r"for 1,\d\d0 epochs of your 1M tokens", text)
    assert status_of(lambda: plan_program(["--unique-tokens", "1M", "--gpu-hours", "0"])) == 2
    message = "--gpu-hours '0' is not a count; a count is a number from 0.001 to 1e+40"
    assert message in capsys.readouterr().err


def test_saved_fits_need_both_objectives(fits, tmp_path):
    save_fits([fits["ar"]], tmp_path / "fits.json")
    with pytest.raises(ValueError, match="no law for mdm"):
        make_plan({"ar": fits["ar"]}, budget(1e8, 1e19))
    assert math.isfinite(fits["ar"].noise)


def test_a_file_of_fits_has_one_law_of_an_objective(fits, tmp_path, capsys):
    """Of two of one source the last one decided, which was not said; a file without any was of no effect."""
    words = ["--unique-tokens", "100M", "--flops", "1e19", "--fits", str(tmp_path / "fits.json")]
    save_fits([fits["ar"], fits["ar"], fits["mdm"]], tmp_path / "fits.json")
    assert status_of(lambda: plan_program(words)) == 2
    assert "fits.json holds two laws of ar; a plan takes one" in capsys.readouterr().err
    save_fits([Fit(**{**vars(fits["ar"]), "objective": "dual"})], tmp_path / "fits.json")
    assert status_of(lambda: plan_program(words)) == 2
    assert "it holds a law of neither" in capsys.readouterr().err
    save_fits([fits["ar"], Fit(**{**vars(fits["ar"]), "objective": "dual"})], tmp_path / "fits.json")
    assert status_of(lambda: plan_program(words)) == 0
