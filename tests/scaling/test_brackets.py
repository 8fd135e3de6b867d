"""The panel of brackets in the report. All numbers here are SYNTHETIC."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from runs.synthetic_runs import write_run

from megatron.runs.likelihoods import BOUND, EXACT, FLOOR, MIXTURE, Likelihoods, Value, VerdictRecord
from megatron.runs.reading import find_runs
from megatron.scaling.report.brackets import bracket_chart, find_likelihoods
from megatron.scaling.report.page import write_report
from megatron.scaling.report.panels import SINGLE, compose
from tests.browser import CHROMIUM, Browser


def value(model: str, estimator: str, kind: str, nll: float, reach: float = 0.06, **more) -> Value:
    return Value(model, estimator, kind, nll, reach / 2, reach, 412, 1, **more)


VALUES = [
    value("ar", "chain rule", EXACT, 3.794),
    value("mdm", "bound, 16 passes", BOUND, 4.301, 0.14),
    value("mdm", "8 orders in the logarithm", MIXTURE, 4.262),
    value("mdm", "entropy, 1 token a pass, blocks of 32, temperature 0.9", EXACT, 4.268, near_ties=12, tokens=20_000),
    value("mdm", "64 orders, tangent", FLOOR, 4.11),
]
VERDICTS = [
    VerdictRecord(
        "ar", "mdm", ["chain rule", "entropy"], "no", 0.41, 0.05, "documents that no choice saw", "exact values"
    ),
    VerdictRecord("mdm", "ar", ["entropy", "chain rule"], "yes", -0.41, 0.05, "all documents", "exact values"),
]
FOUND = Likelihoods(160, 128, VALUES, VERDICTS, near_tie_below=2e-5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("ar", "mdm"):
        write_run(folder / name, name, validations=4)
    return folder


def test_a_report_shows_the_records_beside_its_runs(runs, tmp_path) -> None:
    plain = write_report(find_runs([runs]), tmp_path / "plain").read_text()
    assert "Likelihoods" not in plain
    FOUND.save(runs / "likelihood.json")
    FOUND.save(runs / "mdm/likelihood-48.json")
    try:
        assert [file.name for file in find_likelihoods(find_runs([runs]), [])] == [
            "likelihood.json",
            "likelihood-48.json",
        ]
        text = write_report(find_runs([runs]), tmp_path / "out").read_text()
    finally:
        (runs / "likelihood.json").unlink()
        (runs / "mdm/likelihood-48.json").unlink()
    assert {path.name for path in (tmp_path / "out").glob("brackets*.png")} == {"brackets.png", "brackets_2.png"}
    assert "<b>mdm below ar: no.</b> +0.4100 ± 0.0500 (entropy against chain rule), paired, on documents" in text
    assert "<b>ar below mdm: yes.</b> −0.4100 ± 0.0500" in text
    assert '<td class="number">4.301 ± 0.140</td>' in text and "<td>12 of 20,000</td>" in text
    assert "mdm · bound, 16 passes · upper bound 4.301 ± 0.140" in text, "for those who hear the picture"


def test_marks_say_what_a_value_is() -> None:
    (panel,) = compose(bracket_chart(FOUND)).axes
    handles, labels = panel.get_legend_handles_labels()
    marks = {label: handle.lines[0].get_marker() for handle, label in zip(handles, labels)}
    assert marks == {
        "ar – exact": "o", "mdm – exact": "o", "mdm – upper bound": "<", "mdm – upper bound of the mixture": "<",
        "mdm – lower bound of the mixture": ">",
    }  # fmt: skip
    texts = [text.get_text().replace("\n", " ") for text in panel.texts]
    assert texts[::2] == [f"{own.model} · {own.estimator} · {own.kind}" for own in VALUES]
    assert texts[1::2] == [f"{own.nll:.3f} ± {own.reach_95:.3f}" for own in VALUES]
    low, high = panel.get_xlim()
    sides = [
        np.sort(shade.get_paths()[0].vertices[:, 0])[[0, -1]]
        for shade in panel.collections
        if len(shade.get_paths()[0].vertices) > 3
    ]
    assert np.allclose(sides, [(low, 4.301), (low, 4.262), (4.11, high)]), "shaded is where the truth lies"


def test_what_is_written_lies_within_the_picture_and_apart() -> None:
    """In the page, at the width of a phone: rows as high as their names, nothing cut off, no name over another row."""
    figure = compose(bracket_chart(FOUND))
    figure.set_size_inches(SINGLE[0], bracket_chart(FOUND).panels[0].height)
    figure.legends[0].remove()
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width for box in boxes)
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])


def test_values_without_errors_and_infinite_ones_are_drawn() -> None:
    values = [value("a", "x", EXACT, 4.0, math.nan), value("b", "top-k 1", EXACT, math.inf, math.nan)]
    (panel,) = compose(bracket_chart(Likelihoods(1, 8, values))).axes
    assert [text.get_text() for text in panel.texts] == ["a · x · exact", "4.000", "b · top-k 1 · exact"]
    compose(bracket_chart(Likelihoods(1, 8, [])))


def test_a_damaged_record_is_named(runs) -> None:
    (runs / "ar/likelihood.json").write_text("{}")
    left_out: list[str] = []
    try:
        find_likelihoods(find_runs([runs]), left_out)
        assert "ar/likelihood.json cannot be read" in left_out[0] and len(left_out) == 1
    finally:
        (runs / "ar/likelihood.json").unlink()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_it_fits_phones_tablets_and_desks(runs, tmp_path) -> None:
    FOUND.save(runs / "likelihood.json")
    try:
        page = write_report(find_runs([runs]), tmp_path / "out")
    finally:
        (runs / "likelihood.json").unlink()
    with Browser() as browser:
        for width in (390, 768, 1440):
            browser.open(page.as_uri(), width=width)
            assert browser.run("document.documentElement.scrollWidth") <= width
            box = browser.run("JSON.stringify(document.querySelector('#brackets img').getBoundingClientRect())")
            left, right = (float(re.search(rf'"{side}":([\d.]+)', box).group(1)) for side in ("left", "right"))
            assert left >= 0 and right <= width and right - left >= min(330, width - 40)
