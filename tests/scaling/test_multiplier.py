"""Data-efficiency multipliers: interpolation, its interval, and what is refused."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from megatron.commands.report import main
from megatron.errors import UserError
from megatron.runs.reading import find_runs
from megatron.scaling.multiplier import Baseline, multiplier, of_run
from tests.runs.synthetic_runs import write_run

UNIQUE = np.array([1e8, 2e8, 4e8, 8e8, 16e8])


def law(unique):
    return 2.0 + 400.0 / np.asarray(unique) ** 0.3


def baseline(error=0.0):
    return Baseline.of("AR", UNIQUE, law(UNIQUE), np.full(5, error))


def test_the_baseline_itself_has_a_multiplier_of_one():
    for unique, loss in zip(UNIQUE, law(UNIQUE)):
        assert multiplier(float(loss), 0.0, unique, baseline()).times.value == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("times", [1.3, 2.0, 5.0, 11.0])
def test_a_recipe_that_saves_data_has_its_factor(times):
    found = multiplier(float(law(1.1e8 * times)), 0.0, 1.1e8, baseline())
    assert found.times.value == pytest.approx(times, rel=0.02)
    assert math.isnan(found.times.low), "without any known noise there is no interval"


def test_rows_of_the_table_may_come_in_any_order():
    mixed = Baseline.of("AR", UNIQUE[::-1], law(UNIQUE)[::-1])
    assert multiplier(3.0, 0.0, 1e8, mixed) == multiplier(3.0, 0.0, 1e8, baseline())


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Noise of run and baseline; 40 tables: about 95 % of the intervals hold the true factor."""
    rng, truth, inside = np.random.default_rng(0), 3.0, 0
    for _ in range(40):
        table = Baseline.of("AR", UNIQUE, law(UNIQUE) + rng.normal(0, 0.01, 5), np.full(5, 0.01))
        found = multiplier(float(law(1e8 * truth)) + rng.normal(0, 0.01), 0.01, 1e8, table)
        inside += found.times.low <= truth <= found.times.high
    assert inside >= 35


def test_more_noise_is_a_wider_interval_and_ends_beyond_the_table_are_open():
    widths = []
    for error in (0.005, 0.02):
        found = multiplier(float(law(3e8)), error, 1e8, baseline(error))
        widths.append(math.log(found.times.high / found.times.low))
    assert widths[1] > 3 * widths[0]
    assert multiplier(float(law(1.59e9)), 0.05, 1e8, baseline()).times.high == math.inf
    assert multiplier(float(law(1.01e8)), 0.05, 1e8, baseline()).times.low == 0.0


def test_nothing_is_extrapolated():
    better = multiplier(float(law(2e9)), 0.01, 1e8, baseline())
    assert better.refusal.startswith("none: ")
    assert "better than the baseline with the most data" in better.text()
    assert "at 1.6B tokens" in better.text()
    assert "worse than the baseline with the least data" in multiplier(float(law(5e7)), 0.01, 1e8, baseline()).text()


def test_a_bound_gives_a_multiplier_from_below():
    assert multiplier(3.0, 0.01, 1e8, baseline(), at_least=True).text().startswith("≥ ")


def test_a_baseline_of_bounds_gives_a_multiplier_from_above():
    """Its true losses lie lower, so that it needs less data; against another bound nothing is known."""
    bounds = dataclasses.replace(baseline(), is_bound=True)
    assert multiplier(3.0, 0.01, 1e8, bounds).text().startswith("≤ ")
    assert multiplier(3.0, 0.01, 1e8, bounds, at_least=True).text().startswith("not determined: ")


@pytest.fixture
def bounds(tmp_path):
    """Runs of a bound, imported, on three amounts of data."""
    runs = [imported(tmp_path / f"base{unique}", loss, unique) for unique, loss in ((10, 4.5), (100, 4.0), (1000, 3.5))]
    return Baseline.of_runs(runs)


def imported(folder, loss, unique, *, label="NLL bound", source="s", **record):
    """A run of others with one validation, on so many million unique tokens."""
    write_run(folder, "mdm", epochs=20.0, unique=50_000)
    [run] = find_runs([folder])
    info = {**run.info, "label": label, "unique_tokens": unique * 1_000_000, "imported": {"source": source}, **record}
    row = dataclasses.replace(run.valid[-1], nll=loss, nll_se=0.01, label=label)
    return dataclasses.replace(run, info=info, valid=(row,))


def test_a_run_is_measured_by_both_labels(bounds, tmp_path):
    exact, bound = (
        of_run(imported(tmp_path / "run", 4.0, 10, label=kind), bounds) for kind in ("NLL (exact)", "NLL bound")
    )
    assert exact.text().startswith("≤ 10 [")
    assert bound.text().startswith(
        "not determined: the losses of both are bounds from above, by which it would be 10 ["
    )


def test_runs_of_two_sources_have_no_multiplier(bounds, tmp_path):
    found = of_run(imported(tmp_path / "run", 4.0, 10, source="another corpus"), bounds)
    assert "is imported from another corpus" in found.text() and "runs of two sources are not compared" in found.text()
    found = of_run(imported(tmp_path / "own", 4.0, 10, imported={}), bounds)
    assert found.text().startswith("none: ") and "is our own" in found.text()


def test_runs_judged_on_other_validation_data_have_no_multiplier(tmp_path):
    data, other = ({"valid": [{"prefix": "v", "documents": 9, "tokens": 99, "idx_sha256": key}]} for key in "ab")
    base = [imported(tmp_path / f"base{unique}", 5 - unique / 100, unique, data=data) for unique in (10, 100)]
    table = Baseline.of_runs(base)
    assert of_run(imported(tmp_path / "same", 4.5, 10, data=data), table).refusal == ""
    assert "judged on other validation data" in of_run(imported(tmp_path / "run", 4.5, 10, data=other), table).text()
    tokens = [{"tokenizer": {"fingerprint": key}} for key in "ab"]
    table = Baseline.of_runs([dataclasses.replace(run, info={**run.info, **tokens[0]}) for run in base])
    assert "tokenizer" in of_run(imported(tmp_path / "run", 4.5, 10, data=data, **tokens[1]), table).text()
    with pytest.raises(UserError, match="judged on other validation data"):
        Baseline.of_runs([base[0], imported(tmp_path / "run", 4.0, 100, data=other)])


def test_losses_that_are_no_likelihoods_are_no_baseline(tmp_path):
    label = "MaskGIT loss (not a likelihood bound)"
    with pytest.raises(UserError, match="compares likelihoods"):
        Baseline.of_runs(
            [imported(tmp_path / f"{unique}", 5 - unique / 100, unique, label=label) for unique in (10, 100)]
        )


def test_what_is_no_baseline_is_refused():
    with pytest.raises(UserError, match="more data must not make a baseline worse"):
        Baseline.of("AR", UNIQUE, [3.6, 3.4, 3.5, 3.2, 3.1], np.full(5, 0.01))
    Baseline.of("AR", UNIQUE, [3.6, 3.4, 3.41, 3.2, 3.1], np.full(5, 0.01))  # noise
    with pytest.raises(UserError, match="two or more amounts"):
        Baseline.of("AR", [1e8], [3.6])
    with pytest.raises(UserError, match="in 2 rows"):
        Baseline.of("AR", [1e8, 1e8], [3.6, 3.5])
    with pytest.raises(UserError, match="needs both"):
        multiplier(math.nan, 0.0, 1e8, baseline())


def test_rows_within_noise_of_each_other_are_pooled():
    table = Baseline.of("AR", [1e8, 2e8, 4e8], [3.6, 3.605, 3.2], [0.01] * 3)
    found = table.equivalent_tokens(np.array([3.6025, 3.4, 3.2]))
    assert found[0] == pytest.approx(math.sqrt(2) * 1e8)
    assert found[0] < found[1] < found[2] == pytest.approx(4e8)


def test_the_report_says_how_much_data_each_run_saves(tmp_path):
    for unique in (50_000, 100_000, 200_000):
        write_run(tmp_path / f"base/u{unique}", "ar", unique=unique, epochs=20.0)
    write_run(tmp_path / "mdm", "mdm", epochs=400.0)
    table = Baseline.of_runs(find_runs([tmp_path / "base"]))
    assert len(table.losses) == 3
    found = of_run(find_runs([tmp_path / "mdm"])[0], table)
    assert found is not None
    assert found.at_least
    main([str(tmp_path / "mdm"), "--baseline", str(tmp_path / "base"), "--output", str(tmp_path / "page")])
    page = (tmp_path / "page/report.html").read_text(encoding="utf-8")
    assert "Data efficiency" in page
    assert found.text() in page
    with pytest.raises(UserError, match="one recipe"):
        Baseline.of_runs(find_runs([tmp_path]))
