"""Runs of others: what becomes of a table or an event log, what is refused, and how they are marked wherever they are shown."""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path

import pytest

from megatron.commands import import_runs, report
from megatron.commands.fit import main as fit
from megatron.errors import Failure, UserError
from megatron.runs.comparison import comparisons, summary_row
from megatron.runs.matching import matched_pairs
from megatron.runs.reading import find_runs
from tests.runs.synthetic_runs import write_run

COMMON = ["--source", "paper X", "--licence", "MIT", "--objective", "ar"]
FIELDS = ["--parameters", "params", "--tokens", "tokens", "--unique-tokens", "unique", "--loss", "loss"]
HEADER = ("run", "params", "tokens", "unique", "loss")


def write_table(path: Path, rows: list[tuple[object, ...]], header: tuple[str, ...] = HEADER) -> str:
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def imported(tmp_path: Path, rows: list[tuple[object, ...]], *more: str, fields: list[str] = FIELDS) -> dict:
    table = write_table(tmp_path / "table.csv", rows)
    import_runs.main([table, "--output", str(tmp_path / "out"), *COMMON, *fields, *more])
    return {run.name: run for run in find_runs([tmp_path / "out"])}


def test_every_row_is_a_finished_run_with_source_and_licence(tmp_path, capsys):
    rows = [("a", "1e8", "4e9", "1e8", 3.9), ("b", "140M", "1B", "2B", 3.5)]
    rows += [("a", "1e8", "4e9", "1e8", 3.95), ("c", 1e8, 1e9, 1e9, "nan")]
    runs = imported(tmp_path, rows)
    assert set(runs) == {"a", "a-2", "b"}, "one name twice is two runs (seeds)"
    a, b = runs["a"], runs["b"]
    assert (a.compute_parameters, a.unique_tokens, a.epochs, a.best.nll, a.best.tokens) == (
        10**8,
        10**8,
        40.0,
        3.9,
        4 * 10**9,
    )
    assert (b.unique_tokens, b.epochs) == (10**9, 1.0), "what is not read is not there"
    assert a.is_finished
    assert a.is_exact
    assert a.train_flops == pytest.approx(6 * 1e8 * 4e9)
    assert a.source == "paper X"
    assert a.info["imported"]["licence"] == "MIT"
    assert len(a.info["imported"]["sha256"]) == 64
    assert "row 4: no finite, positive loss" in capsys.readouterr().out
    assert "(imported: paper X)" in summary_row(a)["Run"]


def test_rows_of_one_name_are_a_curve_when_asked(tmp_path):
    rows = [("a", 1e8, tokens, 1e8, loss) for tokens, loss in ((1e8, 4.0), (2e8, 3.8), (3e8, 3.9))]
    run = imported(tmp_path, rows, "--curve")["a"]
    assert [row.nll for row in run.valid] == [4.0, 3.8, 3.9]
    assert [row.epoch for row in run.valid] == [1.0, 2.0, 3.0]
    assert run.best.step == 2


def test_a_curve_is_in_order_has_one_loss_a_place_and_is_of_one_name_whatever_its_folder(tmp_path):
    def row(name, tokens, loss):
        return (name, 1e8, tokens, 1e8, loss)

    rows = [row("lr=1", 2e8, 3.0), row("lr=1", 1e8, 4.0), row("lr:1", 1e8, 3.9), row("lr:1", 2e8, 2.9)]
    runs = imported(tmp_path, rows, "--curve")
    assert {name: [(v.step, v.tokens, v.nll) for v in run.valid] for name, run in runs.items()} == {
        "lr_1": [(1, 10**8, 4.0), (2, 2 * 10**8, 3.0)],
        "lr_1-2": [(1, 10**8, 3.9), (2, 2 * 10**8, 2.9)],
    }
    with pytest.raises(UserError, match=r"run a has two losses at 1e\+08 tokens"):
        imported(tmp_path / "twice", [row("a", 1e8, 4.0), row("a", 2e8, 3.9), row("a", 1e8, 3.8)], "--curve")


def test_steps_are_numbers_and_one_has_one_loss(tmp_path):
    """What a reader of the run would keep is the last of a step."""
    header = (*HEADER, "step")
    for number, (steps, message) in enumerate(
        {("5", "5"): "two losses at step 5", ("5", "ten"): "step is 'ten'"}.items()
    ):
        rows = [("a", 1e8, tokens, 1e8, 4.0, step) for tokens, step in zip((1e9, 2e9), steps)]
        table = write_table(tmp_path / f"{number}.csv", rows, header)
        with pytest.raises(UserError, match=message):
            import_runs.main([table, "--output", str(tmp_path / "out"), *COMMON, *FIELDS, "--curve"])


def test_sizes_in_a_unit_of_their_own_are_refused(tmp_path):
    """0.07 billion parameters would be none; none have no logarithm."""
    with pytest.raises(UserError, match=r"row 1: params is 0\.07; it is at least 1, and finite; .*params\*1e9"):
        imported(tmp_path, [("a", 0.07, "4e9", "1e8", 3.9)])


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    table = write_table(tmp_path / "table.csv", [("a", 1e8, 1e9, 1e8, 4, 5)], (*HEADER, "loss"))
    with pytest.raises(UserError, match="two columns loss"):
        import_runs.main([table, "--output", str(tmp_path / "out"), *COMMON, *FIELDS])


def test_a_field_is_a_column_a_multiple_of_one_or_a_number(tmp_path):
    rows = [("a", 124, 6 * 124e6 * 1e9, 0, 3.0 / 0.6931471805599453)]
    fields = [
        "--parameters",
        "params*1e6",
        "--flops",
        "tokens",
        "--unique-tokens",
        "all",
        "--loss",
        "loss*0.6931471805599453",
    ]
    run = imported(tmp_path, rows, fields=fields)["a"]
    assert (run.compute_parameters, run.unique_tokens, run.epochs) == (124 * 10**6, 10**9, 1.0)
    assert run.best.nll == pytest.approx(3.0)
    fields = ["--parameters", "1.5M", "--tokens", "3M", "--unique-tokens", "1e6", "--loss", "loss"]
    table = write_table(tmp_path / "other.csv", [("z", 1, 1, 1, 2.0)])
    import_runs.main([table, "--output", str(tmp_path / "more"), *COMMON, *fields])
    [run] = find_runs([tmp_path / "more"])
    assert (run.compute_parameters, run.unique_tokens, run.epochs) == (1_500_000, 10**6, 3.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--loss", "los"], "the columns are run, params, tokens, unique, loss"),
        (["--parameters", "size"], "row 1: size is 'size'"),
        (["--flops", "tokens"], "one of --tokens and --flops"),
        (["--source", " "], "no source"),
        (["--licence", ""], "no licence"),
        (["--objective", "mdm"], "add --label exact or --label bound"),
        (["--name", "who"], "--name who; the columns are"),
    ],
)
def test_wrong_words_are_refused(tmp_path, change, message):
    table = write_table(tmp_path / "table.csv", [("a", 1e8, 4e9, 1e8, 3.9)])
    with pytest.raises(UserError, match=message):
        import_runs.main([table, "--output", str(tmp_path / "out"), *COMMON, *FIELDS, *change])
    assert not (tmp_path / "out").exists()


def test_broken_tables_and_taken_folders_are_refused(tmp_path):
    (tmp_path / "table.csv").write_text("run,params\na,1,2\n")
    with pytest.raises(UserError, match="row 1: more or fewer values"):
        import_runs.main([str(tmp_path / "table.csv"), "--output", str(tmp_path / "out"), *COMMON, *FIELDS])
    imported(tmp_path, [("a", 1e8, 4e9, 1e8, 3.9)])
    with pytest.raises(UserError, match="holds a run"):
        imported(tmp_path, [("a", 1e8, 4e9, 1e8, 3.9)])
    with pytest.raises(UserError, match="run a has two sizes"):
        imported(
            tmp_path,
            [("a", 1e8, 1e8, 1e8, 4.0), ("a", 2e8, 2e8, 1e8, 3.9)],
            "--curve",
            "--output",
            str(tmp_path / "two"),
        )


def test_a_tensorboard_log_is_a_curve(tmp_path):
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter(str(tmp_path / "logs" / "old run"))
    for step in (0, 100, 200, 300):
        writer.add_scalar("lm loss", 9.0 - step / 100, step)
        if step:
            writer.add_scalar("lm loss validation", 5.0 - step / 200, step)
    writer.close()
    fields = [
        "--parameters",
        "1M",
        "--tokens",
        "step*4096",
        "--unique-tokens",
        "204800",
        "--loss",
        "lm loss validation",
    ]
    import_runs.main([str(tmp_path / "logs"), "--output", str(tmp_path / "out"), *COMMON, *fields])
    [run] = find_runs([tmp_path / "out"])
    assert run.name == "old_run"
    assert [(row.step, row.tokens, row.epoch) for row in run.valid] == [
        (100, 409600, 2.0),
        (200, 819200, 4.0),
        (300, 1228800, 6.0),
    ]
    assert [row.nll for row in run.valid] == pytest.approx([4.5, 4.0, 3.5])
    with pytest.raises(UserError, match="leave --curve out"):
        import_runs.main([str(tmp_path / "logs"), "--output", str(tmp_path / "no"), *COMMON, *fields, "--curve"])


def test_a_log_may_begin_before_the_first_step_and_no_further(tmp_path):
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter(str(tmp_path / "logs" / "old"))
    writer.add_scalar("loss", 9.0, 0)
    writer.close()
    fields = ["--parameters", "1M", "--tokens", "step*4096", "--loss", "loss"]
    words = [str(tmp_path / "logs"), "--output", str(tmp_path / "out"), *COMMON, *fields, "--unique-tokens"]
    with pytest.raises(UserError, match="run old has no training tokens"):
        import_runs.main([*words, "all"])
    import_runs.main([*words, "1e5"])
    assert [(row.step, row.tokens, row.epoch) for row in find_runs([tmp_path / "out"])[0].valid] == [(0, 0, 0.0)]


def test_logs_whose_folders_share_a_name_are_runs_of_their_own_and_a_taken_one_stops_all(tmp_path):
    for name, loss in (("run1", 5.0), ("run2", 4.0)):
        writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter(str(tmp_path / "logs" / name / "tb"))
        writer.add_scalar("loss", loss, 100)
        writer.close()
    fields = ["--parameters", "1M", "--tokens", "step*4096", "--unique-tokens", "204800", "--loss", "loss"]
    words = [str(tmp_path / "logs"), "--output", str(tmp_path / "out"), *COMMON, *fields]
    import_runs.main(words)
    assert {run.name: run.best.nll for run in find_runs([tmp_path / "out"])} == {"run1-tb": 5.0, "run2-tb": 4.0}
    shutil.rmtree(tmp_path / "out" / "run1-tb")
    with pytest.raises(UserError, match="run2-tb holds a run"):
        import_runs.main(words)
    assert not (tmp_path / "out" / "run1-tb").exists()


def test_without_tensorboard_the_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    with pytest.raises(Failure, match="pip install tensorboard"):
        import_runs.main([str(tmp_path / "logs"), "--output", str(tmp_path / "out"), *COMMON, *FIELDS])


def test_fits_and_reports_keep_imported_runs_apart_and_say_so(tmp_path, capsys):
    rows = [
        (f"r{n}-{d}", n, d, d, 1.7 + 400 / n**0.34 + 410 / d**0.28) for n in (1e7, 1e8, 1e9) for d in (1e9, 1e10, 1e11)
    ]
    theirs = imported(tmp_path, rows)
    for index, unique in enumerate((10**9, 10**5)):
        write_run(tmp_path / f"own{index}", "mdm", unique=unique, epochs=2.0)
    write_run(tmp_path / "ar", "ar", unique=10**5, epochs=2.0)
    runs = find_runs([tmp_path])
    assert [pair[1].name for pair in comparisons(runs)] == ["own1"], (
        "theirs on the same amount of other data is no partner"
    )
    assert {pair[0].name for pair in matched_pairs(runs)} == {"ar"}
    capsys.readouterr()
    fit(
        [
            str(tmp_path / "out"),
            "--law",
            "chinchilla",
            "--bootstrap",
            "20",
            "--published",
            "hoffmann",
            "--output",
            str(tmp_path / "f.json"),
        ]
    )
    said = capsys.readouterr().out
    assert "9 losses of 9 runs imported from paper X" in " ".join(said.split())
    assert "published hoffmann: R²" in said
    report.main(
        [
            str(tmp_path / "out"),
            str(tmp_path / "ar"),
            "--fits",
            str(tmp_path / "f.json"),
            "--output",
            str(tmp_path / "page"),
        ]
    )
    page = (tmp_path / "page/report.html").read_text(encoding="utf-8")
    for text in ("(imported: paper X)", "Imported from: paper X", "Licence: MIT", "AR (imported: paper X)"):
        assert text in page
    assert len(theirs) == 9
