"""Seen and unseen documents in the report. All numbers here are SYNTHETIC."""

from __future__ import annotations

import numpy as np
import pytest
from runs.synthetic_runs import write_run

from megatron.runs.generalisation import Generalisation, Measured, Point, Protocol
from megatron.runs.reading import find_runs
from megatron.scaling.report.generalisation import _number, differences_text, generalisation_chart
from megatron.scaling.report.page import write_report
from megatron.scaling.report.panels import compose
from megatron.statistics import Estimate


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    effects = np.random.default_rng(0).normal(0, 0.5, (2, 30))
    for name, label, draws, rise in (("ar", "NLL (exact)", 0, 0.3), ("mdm", "NLL bound", 2, 0.05)):
        write_run(folder / name, name, epochs=40)
        sets = {"samples": 30, "documents": 30, "tokens": "x"}
        record = Generalisation.begin(
            folder / name, Protocol(name, label, "bound, 2 passes" * bool(draws), 2, 65, sets, sets)
        )
        for epoch in (1, 10, 40):
            place = np.arange(30, dtype=np.int32)
            losses = [
                np.tile(4 + own - 0.2 * epoch**0.3 + at * rise * epoch**0.5, (3, 1)) for at, own in enumerate(effects)
            ]
            tokens = np.full((3, 30), 64, dtype=np.int32)
            record.add(Point(epoch, epoch, *(Measured(place, place, tokens, loss * 64, draws) for loss in losses)))
    return folder


def test_the_page_has_losses_gaps_and_who_forgets_more(runs, tmp_path) -> None:
    text = write_report(find_runs([runs]), tmp_path / "out").read_text()
    assert "<h2>Seen and unseen documents</h2>" in text and (tmp_path / "out/generalisation.svg").is_file()
    assert "Unseen minus seen, nats per token, mdm against ar: at the lowest loss on unseen documents" in text
    assert "<td>NLL bound, 2 passes</td>" in text
    for run in runs.iterdir():
        assert run.name in {"ar", "mdm"}
    alone = write_report(find_runs([write_run(tmp_path / "new", "ar", validations=2)]), tmp_path / "alone").read_text()
    assert "Seen and unseen documents" not in alone


def test_differences_are_paired_and_only_between_the_same_documents(runs) -> None:
    found = [(run, Generalisation.load(run.path)) for run in find_runs([runs])]
    (sentence,) = differences_text(found)  # type: ignore[arg-type]
    assert "at the end (epochs 40 and 40)" in sentence
    assert "difference −1.581 ± 0.000; paired" in sentence, "0.05·√40 − 0.3·√40; what documents do cancels"
    other = Generalisation(
        found[0][0].path, Protocol("ar", "NLL (exact)", "", 2, 65, {"samples": 1}, {}), found[0][1].epochs
    )
    assert differences_text([(found[0][0], other), found[1]]) == []  # type: ignore[list-item]


def test_three_panels_of_which_the_legend_says_what_is_a_bound(runs) -> None:
    found = [(run, Generalisation.load(run.path)) for run in find_runs([runs])]
    chart = generalisation_chart(found)  # type: ignore[arg-type]
    figure = compose(chart)
    assert len(chart.panels) == 3
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == [
        f"{name}, {side}" for name in ("ar – NLL (exact)", "mdm – of bounds") for side in ("unseen", "seen")
    ]


def test_an_unknown_error_is_not_shown_as_zero() -> None:
    """Of a single document nothing is known of others."""
    assert _number(Estimate(-1.0, float("nan"), 1, float("nan"))) == "−1.000"
    assert _number(Estimate(-1.0, 0.01, 1000, 1e9)) == "−1.000 ± 0.020"
