"""The report page and its figures. All runs here are SYNTHETIC (see synthetic_runs.py)."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from runs.synthetic_runs import write_run

from megatron.runs.reading import find_runs
from megatron.scaling.report.frontier import frontier, iso_loss, pareto
from megatron.scaling.report.page import write_report
from megatron.scaling.report.pairs import crossing_text, pair_numbers_html
from megatron.scaling.report.panels import compose
from megatron.scaling.report.plots import facets, learning_curves
from megatron.scaling.report.tables import evaluations_html, load_downstream

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return write_run(folder / "ar", "ar", epochs=40), write_run(folder / "mdm", "mdm")


def test_report_of_two_runs_is_self_contained(pair, tmp_path):
    scores = {
        "results": {"piqa": {"acc,none": 0.56, "acc_stderr,none": 0.01, "alias": "piqa"}, "empty": {"alias": "x"}}
    }
    (pair[1] / "downstream-100m.json").write_text(json.dumps(scores))
    page = write_report(find_runs(pair), tmp_path / "out").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "0.560 ± 0.010" in page
    assert "NLL (exact)" in page
    assert "NLL bound" in page
    assert "run.train_samples: " in page
    for suffix in ("png", "svg"):
        assert (tmp_path / f"out/learning_curves.{suffix}").stat().st_size > 10_000
    (pair[1] / "downstream-100m.json").unlink()


def test_a_branch_is_shown_as_what_goes_on_from_the_run_that_it_left(tmp_path):
    """By its name and that run's; its curve begins where it left, at the epochs and FLOPs that count from the beginning."""
    for name in ("stable", "decayed"):
        folder = write_run(tmp_path / name, "ar", epochs=40)
        info = json.loads((folder / "run.json").read_text())
        link = {"run_id": "x", "tag": "global_step900", "step": 900}
        if name == "stable":
            info["branches"] = [{"run": str(tmp_path / "decayed"), **link}]
        else:
            more = {"samples": 14_400, "order_samples": info["train_samples"], "changed": {}}
            info["branch"] = {"run": str(tmp_path / "stable"), **link, **more}
        (folder / "run.json").write_text(json.dumps(info))
    page = write_report(find_runs([tmp_path]), tmp_path / "out").read_text()
    assert "decayed (branch of stable at step 900)" in page
    assert "<p>Branches: decayed at step 900.</p>" in page
    assert "branch of stable at step 900" in (tmp_path / "out/learning_curves.svg").read_text()


def test_report_of_a_sweep_has_frontier_and_contours(tmp_path):
    for parameters in (300_000, 900_000, 2_700_000):
        for objective in ("ar", "mdm"):
            write_run(tmp_path / f"runs/{objective}-{parameters}", objective, parameters=parameters, epochs=60)
    write_run(tmp_path / "runs/mdm-other", "mdm", unique=400_000, epochs=20)
    page = write_report(find_runs([tmp_path / "runs"]), tmp_path / "out").read_text()
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        "curves_by_budget.png",
        "pareto.png",
        "iso_loss.png",
    }
    assert page.count("<figure") == 3


def test_runs_on_one_line_of_epochs_and_sizes_have_no_contours(tmp_path):
    """Eight sizes trained for one epoch span no surface; matplotlib's triangulation fails on them."""
    for number in range(1, 9):
        write_run(tmp_path / f"runs/{number}", "ar", parameters=100_000 * number, epochs=1, validations=1)
    runs = find_runs([tmp_path / "runs"])
    assert write_report(runs, tmp_path / "out").is_file() and iso_loss(runs) is None
    write_run(tmp_path / "runs/longer", "ar", epochs=4, validations=3)
    chart = iso_loss(find_runs([tmp_path / "runs"]))
    assert chart is not None
    compose(chart)


def test_budgets_without_a_panel_are_named(tmp_path):
    for number in range(1, 9):
        write_run(tmp_path / str(number), "ar", unique=50_000 * number, epochs=1, validations=2)
    runs = find_runs([tmp_path])
    for chart in (facets(runs), pareto(runs)):
        assert len(chart.panels) == 6 and chart.caption.endswith(" Not drawn: 350k, 400k unique tokens.")


def test_evaluations_are_marked_by_their_own_label(tmp_path):
    """A folder may hold exact and bounded evaluations of one model."""
    folder = write_run(tmp_path / "dual", "mdm", epochs=2)
    row = next(r for r in map(json.loads, (folder / "metrics.jsonl").open()) if r["kind"] == "valid")
    (folder / "evaluations").mkdir()
    for label in ("NLL (exact)", "NLL bound"):
        record = {**row, "kind": "evaluation", "label": label, "nll": 3.0, "ppl": 20.1, "bits_per_byte": 2.061}
        (folder / f"evaluations/{label.split()[1]}.json").write_text(json.dumps(record))
    page = evaluations_html(find_runs([folder]))
    assert "<td>≤ 20.09</td><td>≤ 2.061</td>" in page and "<td>20.09</td><td>2.061</td>" in page


def test_the_best_of_averaged_weights_is_marked_and_is_what_is_to_be_passed(tmp_path):
    folders = write_run(tmp_path / "ar", "ar"), write_run(tmp_path / "mdm", "mdm", parameters=900_000_000)
    rows = [json.loads(line) for line in (folders[0] / "metrics.jsonl").read_text().splitlines()]
    rows += [{**row, "kind": "valid_ema", "nll": row["nll"] - 2} for row in rows if row["kind"] == "valid"]
    ar, mdm = (find_runs([folder])[0] for folder in folders)
    assert "AR's best is passed" in crossing_text(ar, mdm)
    (folders[0] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ar = find_runs([folders[0]])[0]
    assert "AR's best is not reached" in crossing_text(ar, mdm), "it is that of the average"
    page = pair_numbers_html([ar, mdm])
    assert page.count("<td>NLL (exact) of the averaged weights</td>") == 1 and page.count("<td>NLL (exact)</td>") == 1
    panel = compose(learning_curves([ar])).axes[0]
    assert panel.get_ylim()[0] < ar.best.nll, "the star is in the picture"


def test_frontier_keeps_only_unbeaten_points():
    x, y = frontier(np.array([3.0, 1.0, 2.0, 4.0]), np.array([2.0, 3.0, 3.5, 2.0]))
    assert x.tolist() == [1.0, 3.0]
    assert y.tolist() == [3.0, 2.0]


def test_run_without_any_validation_is_reported(tmp_path):
    folder = write_run(tmp_path / "new", "ar", epochs=2)
    (folder / "metrics.jsonl").unlink()
    page = write_report(find_runs([folder]), tmp_path / "out").read_text()
    assert "No run has been validated yet" in page
    assert "(unfinished)" in page


def test_broken_downstream_file_is_an_error(tmp_path):
    (tmp_path / "downstream.json").write_text("[]")
    with pytest.raises(ValueError, match=r"downstream\.json .* an lm-eval result is JSON with"):
        load_downstream(tmp_path)


def test_program_prints_the_comparison_and_fails_clearly(pair, tmp_path):
    command = [sys.executable, str(ROOT / "tools/report.py")]
    arguments = [*map(str, pair), "--output", str(tmp_path / "out")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "differs in run.train_samples" in done.stdout
    assert (tmp_path / "out/report.html").exists()
    failed = subprocess.run([*command, str(tmp_path / "nothing")], capture_output=True, text=True, timeout=120)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")


def test_frontiers_have_a_panel_a_budget_reach_the_largest_compute_and_a_legend_that_fits(tmp_path):
    """Three objectives on two budgets: AR stops early, but what it reached a larger budget reaches as well."""
    for unique in (50_000, 800_000):
        for objective in ("ar", "mdm", "exact_count_mdm"):
            epochs = 20 if objective == "ar" else 120
            write_run(tmp_path / f"{objective}-{unique}", objective, unique=unique, epochs=epochs, validations=6)
    runs = find_runs([tmp_path])
    figure = compose(pareto(runs))
    figure.canvas.draw()
    assert [panel.get_title(loc="left").split(",")[0] for panel in figure.axes] == [
        "50k unique tokens",
        "800k unique tokens",
    ]
    for panel in figure.axes:
        lines = [line for line in panel.get_lines() if "frontier" in str(line.get_label())]
        assert len(lines) == 3
        assert len({max(line.get_xdata()) for line in lines}) == 1, "all end at the largest compute of the panel"
        labels = [
            label.get_window_extent() for label in panel.get_xticklabels() if label.get_text() and label.get_visible()
        ]
        inside = [box for box in labels if panel.bbox.x0 <= (box.x0 + box.x1) / 2 <= panel.bbox.x1]
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(sorted(inside, key=lambda box: box.x0)))
    for budget in (50_000, 800_000):
        legend = compose(pareto([run for run in runs if run.unique_tokens == budget])).legends[0]
        legend.figure.canvas.draw()
        assert len(legend.get_texts()) == 3
        box = legend.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= legend.figure.bbox.width
