"""Means over seeds. All runs here are SYNTHETIC (see synthetic_runs.py)."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest

from megatron.runs.comparison import _gap, summary_row
from megatron.runs.conclusion import conclusion
from megatron.runs.reading import load_run
from megatron.runs.replicates import _mean_validation, average_seeds, is_replicate
from megatron.scaling.report import plots
from megatron.scaling.report.page import write_report
from megatron.scaling.report.panels import compose
from megatron.scaling.report.style import count_seeds
from runs.synthetic_runs import write_run


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    return [load_run(write_run(folder / f"mdm-seed{seed}", "mdm", epochs=40, seed=seed)) for seed in (1, 2, 3)]


def test_mean_and_error_at_every_step(seeds):
    [mean] = average_seeds(seeds)
    assert mean.seeds == (1, 2, 3)
    assert [row.step for row in mean.valid] == [row.step for row in seeds[0].valid]
    for index, row in enumerate(mean.valid):
        values = [run.valid[index].nll for run in seeds]
        assert row.nll == pytest.approx(statistics.mean(values))
        assert row.nll_se == pytest.approx(math.hypot(statistics.stdev(values) / math.sqrt(3), 0.025))
    losses = [run.train[5]["loss"] for run in seeds]
    assert mean.train[5]["loss"] == pytest.approx(statistics.mean(losses))


@pytest.mark.parametrize("number", [2, 3, 5])
def test_means_of_few_seeds_are_not_told_apart_by_chance(seeds, number):
    """Of 1,500 pairs of equal recipes, whose seeds differ more than the documents say, at most 7 % are called different; by two
    errors it was 13 % with two seeds each, and 18 % where all is the spread of seeds."""
    random, [row] = np.random.default_rng(number), seeds[0].valid[:1]
    means = [
        _mean_validation([replace(row, nll=nll, nll_se=error) for nll in values])
        for error in (0.0, 0.003)
        for values in 3.0 + 0.01 * random.standard_normal((3000, number))
    ]
    for begin in (0, 3000):
        pairs = zip(means[begin : begin + 1500], means[begin + 1500 : begin + 3000])
        assert sum(_gap(one, other).is_real for one, other in pairs) <= 0.07 * 1500


def test_only_runs_that_differ_in_nothing_else_are_averaged(seeds, tmp_path):
    longer = load_run(write_run(tmp_path / "longer", "mdm", epochs=41, seed=4))
    other = load_run(write_run(tmp_path / "ar", "ar", epochs=40, seed=4))
    again = load_run(write_run(tmp_path / "again", "mdm", epochs=40, seed=1))
    assert not is_replicate(seeds[0], longer)
    assert not is_replicate(seeds[0], other)
    assert not is_replicate(seeds[0], again)  # of one seed: the same run twice is no evidence
    assert [len(run.seeds) for run in average_seeds([longer, *seeds, other])] == [0, 3, 0]
    copy = load_run(write_run(tmp_path / "copy", "mdm", epochs=40, seed=3))
    assert [run.seeds for run in average_seeds([*seeds, copy])] == [(1, 2, 3), ()], "a seed counts once"


def test_an_unfinished_seed_shortens_the_mean(seeds, tmp_path):
    folder = write_run(tmp_path / "short", "mdm", epochs=40, seed=4)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[: len(lines) // 2]))
    short = load_run(folder)
    [mean] = average_seeds([seeds[0], short])
    assert [row.step for row in mean.valid] == [row.step for row in short.valid]
    assert not mean.is_finished


def test_report_shows_each_seed_and_the_mean_and_says_what_the_error_holds(seeds, tmp_path):
    baseline = load_run(write_run(tmp_path / "ar", "ar", epochs=40, seed=1))
    page = write_report([baseline, *seeds], tmp_path / "report").read_text()
    for text in ("mdm-seed1", "mdm-seed2", "mdm-seed3", "mdm-seed1 and 2 more seeds", "mean of 1, 2, 3"):
        assert text in page
    text = " ".join(conclusion(average_seeds([baseline, *seeds])))
    assert "(mean of 3 seeds) reaches its best" in text
    assert "is in it where a run is the mean of several" in text
    assert summary_row(seeds[0])["Seed"] == "1"


def test_panels_say_how_many_seeds(seeds, tmp_path):
    single = load_run(write_run(tmp_path / "longer", "mdm", epochs=80, seed=4))
    mean = average_seeds(seeds)
    assert count_seeds(mean) == "3 seeds"
    assert count_seeds([single]) == "1 seed"
    assert count_seeds([*mean, single]) == "1 to 3 seeds"
    figure = compose(plots.facets([*mean, single]))
    assert figure.axes[0].get_title(loc="left") == "100k unique tokens, 1 to 3 seeds"
