"""One damaged file among those of many runs is named, and the others are reported. All runs here are SYNTHETIC."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from runs.synthetic_runs import write_run, write_sums
from test_sweep import write_sweep

from megatron.commands import compare, fit, report, sweep
from megatron.errors import UserError
from megatron.runs.reading import find_runs, load_run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name, objective, seed in (("ar", "ar", 1), ("mdm", "mdm", 1), ("again", "mdm", 2)):
        write_run(tmp_path / "runs" / name, objective, seed=seed, validations=10)
    return tmp_path / "runs"


def garble(name: str, value: object) -> Callable[[Path], None]:
    """Another value for a field of run.json."""

    def damage(file: Path) -> None:
        file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))

    return damage


RECORDS: dict[str, Callable[[Path], object]] = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:50]),
    "empty": lambda file: file.write_bytes(b""),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "parameters": garble("parameters", 7),
    "tokens": garble("unique_tokens", float("nan")),
    "samples": garble("train_samples", [1]),
    "epochs": garble("epochs", "many"),
    "section": garble("config", {"run": 3}),
    "branch": garble("branch", "main"),
}


@pytest.mark.parametrize("damage", [name for name in RECORDS if name != "a folder"])
def test_a_run_with_a_damaged_record_is_named_and_the_others_are_compared(
    damage: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RECORDS[damage](runs / "mdm/run.json")
    compare.main([str(runs)])
    told = capsys.readouterr()
    assert told.err.count("not read: ") == 1 and "mdm/run.json" in told.err
    assert "ar: " in told.out and "again: " in told.out and "mdm: " not in told.out
    with pytest.raises(UserError, match=r"mdm/run\.json"):
        load_run(runs / "mdm")


def test_no_run_at_all_is_an_error_that_names_the_damaged(runs: Path) -> None:
    for name in ("ar", "mdm", "again"):
        (runs / name / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"ar/run\.json.*mdm/run\.json.*; a report needs a run that can be read"):
        find_runs([runs], left_out=[])


def test_metrics_that_nobody_may_read_leave_a_run_out(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "mdm/metrics.jsonl").unlink()
    (runs / "mdm/metrics.jsonl").mkdir()  # an error of the system, as for a disk that fails
    compare.main([str(runs)])
    told = capsys.readouterr()
    assert "mdm/metrics.jsonl" in told.err and "again: " in told.out


def test_a_garbled_number_of_the_training_is_a_damaged_line(runs: Path) -> None:
    file = runs / "ar/metrics.jsonl"
    file.write_text(file.read_text().replace('"tokens_per_second": ', '"tokens_per_second": {}, "x": ', 1))
    run = load_run(runs / "ar")
    assert len(run.problems) == 1 and "line 1" in run.problems[0]
    assert run.tokens_per_second() is not None


def test_a_fit_names_the_run_that_it_lacks(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "mdm/run.json").write_text("{")
    fit.main([str(runs), "--points", "curve", "--bootstrap", "2", "--law", "chinchilla"])
    told = capsys.readouterr()
    assert "not read: " in told.err and "mdm/run.json" in told.err
    assert "MDM, NLL bound: 10 losses of 1 runs" in told.out


def test_damaged_sums_are_named_and_the_run_goes_on_without(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ar", "mdm"):
        write_sums(runs / name, halves=True)
    file = sorted((runs / "mdm/validations").iterdir())[-1]
    assert load_run(runs / "mdm").split is not None
    file.write_bytes(file.read_bytes()[:100])
    run = load_run(runs / "mdm")
    assert run.split is None and run.result is not None and not run.result.chosen_apart
    assert run.unreadable == (f"{file} cannot be read (File is not a zip file)",)
    report.main([str(runs), "--output", str(tmp_path / "report")])
    told = capsys.readouterr()
    assert told.err.count("not read: ") == 1 and file.name in told.err
    assert file.name in (tmp_path / "report/report.html").read_text() and "mdm: " in told.out


def test_what_lies_beside_runs_damages_no_report(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = ["ar/downstream.json", "likelihood-1.json", "mdm/generalisation/record.json", "again/run.json"]
    for name in damaged:
        (runs / name).parent.mkdir(exist_ok=True)
        (runs / name).write_text("{")
    report.main([str(runs), "--output", str(tmp_path / "report")])
    told, page = capsys.readouterr(), (tmp_path / "report/report.html").read_text()
    assert told.err.count("not read: ") == len(damaged)
    for name in damaged:
        assert name in told.err and page.count(name) == 1


@pytest.mark.parametrize("name", ["run.json", "sweep.json"])
def test_the_status_of_a_sweep_names_a_damaged_run(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_sweep(tmp_path)
    assert sweep.main([str(file), "run", "--jobs", "2"]) == 0
    first = sorted((tmp_path / "runs").iterdir())[0]
    (first / name).write_text("{")
    capsys.readouterr()
    assert sweep.main([str(file), "status"]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[-1] == "7 finished" and f"{first.name}: " not in told.out
    assert told.err.count("not read: ") == 1 and f"{first.name}/{name}" in told.err
    if name == "run.json":
        assert sweep.main([str(file), "check"]) in (0, 1)
        assert f"{first.name}/{name}" in capsys.readouterr().err
