"""Reading run directories and reporting on them. All runs here are SYNTHETIC (see synthetic_runs.py)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from runs.synthetic_runs import write_run

from megatron.runs.comparison import comparisons, conclusion, differences, overfitting, plus_minus, summary_row
from megatron.runs.reading import find_runs, format_count, load_run, parse_count
from megatron.scaling.report import plots
from megatron.scaling.report.page import load_downstream, write_report

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return write_run(folder / "ar", "ar", epochs=40), write_run(folder / "mdm", "mdm")


def test_reads_what_was_written(pair):
    run = load_run(pair[0])
    assert run.objective == "ar"
    assert run.is_exact
    assert run.is_finished
    assert run.seed == 1234
    assert run.best is not None
    assert run.best.nll == run.column("nll").min()
    assert not load_run(pair[1]).is_exact


def test_torn_last_line_is_dropped(tmp_path):
    folder = write_run(tmp_path / "run", "ar", epochs=5)
    before = load_run(folder)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "valid", "step": 99999, "nl')
    after = load_run(folder)
    assert (after.train, after.valid) == (before.train, before.valid)


def test_broken_line_in_the_middle_is_named(tmp_path):
    folder = write_run(tmp_path / "run", "ar", epochs=5)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[3] = lines[3][:20]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"line 4 is not JSON"):
        load_run(folder)


def test_rows_written_again_after_a_resume_replace_the_old(tmp_path):
    folder = write_run(tmp_path / "run", "ar", epochs=5)
    row = json.loads(next(line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"valid"' in line))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({**row, "nll": 1.25}) + "\n")
    assert [v.nll for v in load_run(folder).valid if v.step == row["step"]] == [1.25]


def test_validation_with_other_draws_does_not_enter_the_curve(tmp_path):
    folder = write_run(tmp_path / "run", "mdm", epochs=5)
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({**row, "num_mc": 128, "nll": 0.5}) + "\n")
    run = load_run(folder)
    assert min(run.column("nll")) > 1
    assert [v.nll for v in run.other_valid] == [0.5]


def test_null_losses_are_not_the_best(tmp_path):
    folder = write_run(tmp_path / "run", "ar", epochs=5)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = max(index for index, row in enumerate(lines) if row["kind"] == "valid")
    lines[last].update(nll=None, nll_se=None, ppl=None)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    run = load_run(folder)
    assert run.best is not None
    assert np.isnan(run.valid[-1].nll)
    assert overfitting(run) is not None


def test_missing_and_foreign_folders(tmp_path):
    with pytest.raises(ValueError, match=r"no run\.json"):
        load_run(tmp_path)
    with pytest.raises(ValueError, match=r"no run\.json"):
        find_runs([tmp_path])
    (tmp_path / "run.json").write_text('{"format": 7}')
    with pytest.raises(ValueError, match="format 7"):
        load_run(tmp_path)


def test_runs_of_one_name_get_their_folder(tmp_path):
    write_run(tmp_path / "a/ar", "ar", epochs=2)
    write_run(tmp_path / "b/ar", "ar", epochs=2)
    assert [run.name for run in find_runs([tmp_path, tmp_path / "a"])] == ["a/ar", "b/ar"]


def test_overfitting_needs_a_rise_beyond_the_error(pair, tmp_path):
    ar, mdm = (overfitting(load_run(path)) for path in pair)
    assert ar is not None
    assert ar.rises
    assert 8 < ar.best.epoch < 22
    assert mdm is not None
    assert mdm.at_end
    assert not mdm.rises
    folder = write_run(tmp_path / "noisy", "ar", epochs=40)
    text = (folder / "metrics.jsonl").read_text().replace('"nll_se": 0.012', '"nll_se": 0.5')
    (folder / "metrics.jsonl").write_text(text)
    noisy = overfitting(load_run(folder))
    assert noisy is not None
    assert not noisy.rises


def test_matched_pair_check_finds_only_what_differs(tmp_path):
    first = load_run(write_run(tmp_path / "ar", "ar", epochs=10))
    second = load_run(write_run(tmp_path / "mdm", "mdm", epochs=10))
    assert differences(first, second) == []
    file = tmp_path / "mdm/run.json"
    info = json.loads(file.read_text())
    info["config"]["optimizer"]["lr"] = 3e-3
    info["config"]["run"]["micro_batch_size"] = 4
    file.write_text(json.dumps(info))
    found = differences(first, load_run(tmp_path / "mdm"))
    assert [str(item) for item in found if not item.layout] == ["optimizer.lr: 0.001 against 0.003"]
    assert [item.field for item in found if item.layout] == ["run.micro_batch_size"]


def test_conclusion_says_which_is_ahead_and_that_a_bound_is_one_sided(pair, tmp_path):
    text = " ".join(conclusion(find_runs(pair)))
    assert "AR is ahead" in text
    assert "upper bound" in text
    assert "not a matched pair" in text
    assert "far below the scale" in text
    better = write_run(tmp_path / "mdm", "mdm", parameters=900_000_000)
    text = " ".join(conclusion(find_runs([pair[0], better])))
    assert "MDM is ahead" in text
    assert "at least that" in text


def test_a_loss_that_is_no_likelihood_is_not_ranked(pair, tmp_path):
    runs = find_runs([*pair, write_run(tmp_path / "maskgit", "maskgit", parameters=9_000_000)])
    assert [second.objective for _, second in comparisons(runs)] == ["mdm"]
    assert any("no likelihood: maskgit" in text for text in conclusion(runs))


def test_summary_marks_bounds(pair):
    assert summary_row(load_run(pair[1]))["Perplexity"].startswith("≤")
    assert not summary_row(load_run(pair[0]))["Perplexity"].startswith("≤")
    assert "4 draws" in summary_row(load_run(pair[1]))["Kind"]


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


def test_frontier_keeps_only_unbeaten_points():
    x, y = plots.frontier(np.array([3.0, 1.0, 2.0, 4.0]), np.array([2.0, 3.0, 3.5, 2.0]))
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
    with pytest.raises(ValueError, match="not an lm-eval result"):
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


@pytest.mark.parametrize(("value", "text"), [(912_345, "0.912M"), (100_000, "100k"), (425e6, "425M"), (12, "12")])
def test_format_count(value, text):
    assert format_count(value) == text


@pytest.mark.parametrize(("text", "value"), [("100M", 1e8), ("40k", 4e4), ("1.5B", 1.5e9), ("1e8", 1e8), ("7", 7.0)])
def test_parse_count(text, value):
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["100X", "M", "", "1 M M"])
def test_parse_count_refuses_what_is_none(text):
    with pytest.raises(ValueError, match="is not a count"):
        parse_count(text)


def test_plus_minus_shows_the_digits_of_the_error():
    assert plus_minus(3.71, 0.004) == "3.7100 ± 0.0040"
    assert plus_minus(3.71, float("nan")) == "3.710"
