"""Reading run directories and reporting on them. All runs here are SYNTHETIC (see synthetic_runs.py)."""

from __future__ import annotations

import json
import multiprocessing
import re
from pathlib import Path

import numpy as np
import pytest

from megatron.runs.comparison import comparisons, overfitting, summary_row
from megatron.runs.matching import matched_pairs
from megatron.runs.reading import find_runs, load_run
from megatron.runs.record import MetricsFile, ValidRow, write_evaluation
from megatron.scaling.report.page import write_report
from runs.synthetic_runs import write_run

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


def test_evaluations_that_are_recorded_at_once_are_all_kept(tmp_path):
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=write_evaluations, args=(tmp_path, 10)) for _ in range(5)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    names = {file.name for file in (tmp_path / "evaluations").glob("*.json")}
    assert names == {"step1_nll.json", *(f"step1_nll-{number}.json" for number in range(1, 50))}


def write_evaluations(run_dir, count):
    for _ in range(count):
        write_evaluation(run_dir, {}, name="step1_nll")


def test_torn_last_line_is_dropped(tmp_path):
    folder = write_run(tmp_path / "run", "ar", epochs=5)
    before = load_run(folder)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "valid", "step": 99999, "nl')
    after = load_run(folder)
    assert (after.train, after.valid) == (before.train, before.valid)


def test_damaged_lines_are_named_and_the_rest_is_read(tmp_path):
    """A cut line, a byte that is no UTF-8, a row without a step and one with text for a number: each costs itself only."""
    folder = write_run(tmp_path / "run", "ar", epochs=5)
    whole = load_run(folder)
    lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    lines[3] = lines[3][:20]
    lines[5] = lines[5][:30] + b"\xff" + lines[5][30:]
    lines[7] = b'{"kind": "train", "loss": 3.0}'
    lines[9] = lines[9].replace(b'"samples": ', b'"samples": "many", "was": ')
    lines.insert(11, b"[1, 2]")
    (folder / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    run = load_run(folder)
    assert len(run.train) + len(run.valid) == len(whole.train) + len(whole.valid) - 4
    assert [int(re.findall(r"line (\d+)", text)[0]) for text in run.problems] == [4, 6, 8, 10, 12]
    page = write_report([run], tmp_path / "out").read_text()
    assert "line 8" in page, "the report says what it could not read"


def test_record_behind_a_torn_line_is_found(tmp_path):
    """A killed run leaves half a line; older versions wrote the next record right behind it."""
    folder = write_run(tmp_path / "run", "ar", epochs=5)
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["kind"] == "valid"
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 99, "lo')
        file.write(json.dumps({**row, "step": row["step"] + 1, "nll": 1.5}) + "\n")
    run = load_run(folder)
    assert run.valid[-1].nll == 1.5
    assert "the one behind it is used" in run.problems[0]


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


def test_another_estimator_is_another_curve(tmp_path):
    """Rows that do not name it were drawn with coins: they go on with those that do, and not with exact counts."""
    folder = write_run(tmp_path / "run", "mdm", epochs=5)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    valid = [row for row in lines if row["kind"] == "valid"]
    valid[-1].update(estimator="bernoulli", data="abc")
    valid[-2].update(estimator="exact-count-antithetic", data="abc")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    run = load_run(folder)
    assert {row.kind for row in run.valid} == {"NLL bound (4 bernoulli draws)"} and len(run.valid) == len(valid) - 1
    assert [row.kind for row in run.other_valid] == ["NLL bound (4 exact-count-antithetic draws)"]
    for best in (1.0, 2.0):  # the best of a curve that begins anew is its own
        metrics = MetricsFile(folder, last_step=10**9)
        found = metrics.best(ValidRow(**{**valid[-2], "nll": best, "best": False}))
        assert found is not None and found.nll == min(best, valid[-2]["nll"])
        metrics.close()


def test_an_evaluation_stands_apart_from_the_curve(tmp_path):
    """Evaluations of a finished run, as older versions wrote them over its last point (epoch 0), as a record of their own
    kind and as a file of their own: shown, but neither a point of the curve nor its best."""
    folder = write_run(tmp_path / "run", "ar", epochs=5)
    before = load_run(folder)
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({**row, "epoch": 0.0, "nll": 0.5}) + "\n")
        file.write(json.dumps({**row, "kind": "evaluation", "nll": 0.6}) + "\n")
    (folder / "evaluations").mkdir()
    (folder / "evaluations/full.json").write_text(json.dumps({**row, "nll": 0.7, "data": "other"}))
    (folder / "evaluations/broken.json").write_text("{")
    run = load_run(folder)
    assert (run.valid, run.best) == (before.valid, before.best)
    assert [item.nll for item in run.other_valid] == [0.5, 0.6, 0.7]
    assert "broken.json" in run.problems[0]
    page = write_report([run], tmp_path / "out").read_text()
    assert all(f"{value} ± 0.012" in page for value in ("0.500", "0.600", "0.700"))


def test_a_folder_of_evaluations_only_is_welcome(tmp_path):
    """What eval_*.sh of older versions left: a run.json without training data and one validation at epoch 0."""
    write_run(tmp_path / "runs/ar", "ar", epochs=10)
    write_run(tmp_path / "runs/mdm", "mdm", epochs=10)
    folder = write_run(tmp_path / "runs/ar_2026-11-25", "ar", epochs=5)
    info = json.loads((folder / "run.json").read_text())
    info.update(unique_tokens=0, train_samples=0, train_tokens=0, epochs=0.0, train_flops=0.0)
    (folder / "run.json").write_text(json.dumps(info))
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    (folder / "metrics.jsonl").write_text(json.dumps({**row, "epoch": 0.0, "nll": 0.5}) + "\n")
    runs = find_runs([tmp_path / "runs"])
    alone = next(run for run in runs if run.name.startswith("ar_"))
    assert alone.is_evaluation
    assert alone.epochs == 0
    assert summary_row(alone)["Run"].endswith("(evaluation only)")
    page = write_report(runs, tmp_path / "out").read_text()
    assert "0.500 ± 0.012" in page
    assert [(first.name, second.name) for first, second in comparisons(runs)] == [("ar", "mdm")]
    assert [(first.name, second.name) for first, second, _ in matched_pairs(runs)] == [("ar", "mdm")]
    assert write_report([alone], tmp_path / "alone").exists()
    info.pop("epochs")
    (folder / "run.json").write_text(json.dumps(info))
    assert load_run(folder).epochs == 0, "no division by zero unique tokens"


def test_rows_from_before_protocols_were_recorded_stay_in_the_curve(tmp_path):
    folder = write_run(tmp_path / "run", "mdm", epochs=5)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    valid = [row for row in rows if row["kind"] == "valid"]
    for row in valid[-3:]:
        row.update(estimator="bernoulli", data="abc", se_kind="documents", num_documents=12)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = load_run(folder)
    assert len(run.valid) == len(valid)
    assert (run.valid[-1].error_unit, run.valid[0].error_unit) == ("12 documents", "160 samples")
    for row in valid[-2:]:
        row.update(data="other")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(load_run(folder).other_valid) == 3, "two sets of data are two curves"


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
    write_run(tmp_path / "c/a/ar", "ar", epochs=2)
    top = tmp_path.name
    assert [run.name for run in find_runs([tmp_path])] == [f"{top}/a/ar", f"{top}/b/ar", "c/a/ar"]


def test_averaged_weights_are_a_curve_of_their_own_and_may_be_the_best(tmp_path):
    folder = write_run(tmp_path / "ar", "ar", epochs=40)
    plain, lines = load_run(folder), (folder / "metrics.jsonl").read_text().splitlines()
    rows = []
    for row in map(json.loads, lines):  # the averaged weights are better by a hundredth, and written first
        if row["kind"] == "valid":
            rows.append({**row, "kind": "valid_ema", "nll": row["nll"] - 0.01})
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = load_run(folder)
    assert run.valid == plain.valid and run.other_valid == () and not run.problems
    assert [row.step for row in run.averaged] == [row.step for row in run.valid]
    assert run.best is not None and plain.best is not None
    assert (run.best.weights, run.best.step) == ("ema", plain.best.step)
    assert run.best.nll == pytest.approx(plain.best.nll - 0.01)
    assert summary_row(run)["Kind"] == run.best.full_label == "NLL (exact) of the averaged weights"
    turn, before = overfitting(run), overfitting(plain)
    assert turn is not None and before is not None and turn.rise == pytest.approx(before.rise)
    assert "averaged weights" in write_report([run], tmp_path / "report.html").read_text()


def test_a_validation_that_is_being_written_is_none_yet(tmp_path):
    """The row of the averaged weights comes first: who looks between the two, or after a kill there, sees it alone."""
    ar, folder = write_run(tmp_path / "ar", "ar", epochs=2), write_run(tmp_path / "mdm", "mdm", epochs=2)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if row["kind"] == "valid")
    rows = [row for row in rows if row["kind"] == "train" and row["step"] <= first["step"]]
    text = "".join(json.dumps(row) + "\n" for row in [*rows, {**first, "kind": "valid_ema"}])
    (folder / "metrics.jsonl").write_text(text)
    run = load_run(folder)
    assert run.best is None and not run.averaged
    assert write_report([load_run(ar), run], tmp_path / "report").is_file()


def test_averages_without_the_row_of_the_trained_weights_are_measured_again(tmp_path):
    """A kill between the two rows of a validation: it is not complete, and the half is dropped."""
    fields = {"step": 4, "samples": 8, "tokens": 8, "epoch": 1.0, "flops": 1.0, "nll": 2.0, "nll_se": 0.1}
    fields |= {"label": "NLL (exact)", "num_mc": 1, "num_samples": 8, "ppl": 7.4, "bits_per_byte": None, "best": False}
    rows = [{"kind": kind, **fields, "step": step} for step, kind in ((2, "valid_ema"), (2, "valid"), (4, "valid_ema"))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = MetricsFile(tmp_path, last_step=4)
    assert (file.validated, len(file.rows), (tmp_path / "metrics.jsonl").read_text().count("\n")) == ({2}, 2, 2)
    best = file.best(
        *(ValidRow(**{**fields, "nll": nll}, kind=kind) for nll, kind in ((1.0, "valid_ema"), (1.5, "valid")))
    )
    assert best is not None and (best.nll, best.weights) == (1.0, "ema")
    file.close()
