"""Searches: coordinate descent under equal budgets, from run directories alone."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs.synthetic_runs import write_run

from megatron.errors import UserError
from megatron.runs.reading import load_run
from megatron.scaling.report.tables import searches_html
from megatron.scaling.sweep.definition import load_sweep
from megatron.scaling.sweep.runner import Runner
from megatron.scaling.sweep.search import FAILED, FINISHED, GIVEN_UP, Search, curve_of
from megatron.scaling.sweep.space import Coordinate, Space
from megatron.scaling.sweep.state import read_attempts
from megatron.scaling.sweep.verdict import at_edges, budgets, cheaper_as_good, describe, write_result

ROOT = Path(__file__).resolve().parents[2]
IS_STORM = os.environ.get("STORM") == "1"
PROGRAM = [sys.executable, str(ROOT / "tools/sweep.py")]
SWEEP: dict[str, Any] = {
    "name": "test",
    "grid": {
        "objective": ["ar", "mdm"],
        "model": {"small": {"num-layers": 2, "hidden-size": 64, "num-attention-heads": 4}},
        "unique_tokens": [100],
        "epochs": [2],
        "seed": [1],
    },
    "search": {
        "trials": 6,
        "coordinates": {"lr": [0.001, 0.01, 0.1], "weight-decay": [0.1, 1, 2, 4], "epochs": [1, 2, 4]},
    },
    "data": {100: "corpus-100"},
    "flags": {"lr": 0.001, "weight-decay": 0.1, "seq-length": 10, "valid-data-path": "v", "eval-interval": 2},
    "launcher": [sys.executable, str(ROOT / "tests/scaling/fake_trainer.py")],
}


def write(folder: Path, **changes: Any) -> Path:
    """A sweep file; a change may name a place within a block by a dot."""
    data = json.loads(json.dumps(SWEEP)) | {"data": SWEEP["data"], "output": str(folder / "runs")}
    for key, value in changes.items():
        place = data
        *blocks, last = key.split("__")
        for block in blocks:
            place = place[block]
        place[last] = value
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def searched(path: Path, *, jobs: int = 1) -> list[Search]:
    sweep = load_sweep(path)
    searches = [Search(space, gives_up=sweep.gives_up, say=lambda text: None) for space in sweep.spaces]
    runner = Runner(sweep, jobs=jobs, say=lambda text: None)
    results = runner.follow([search.chain() for search in searches])
    assert {"failed", "stopped"}.isdisjoint(results.values())
    return searches


def read(path: Path) -> list[Search]:
    """What the run directories alone say."""
    searches = [Search(space, say=lambda text: None) for space in load_sweep(path).spaces]
    for search in searches:
        search.catch_up()
    return searches


def shown(search: Search) -> list[tuple]:
    return [(trial.run.name, trial.outcome, trial.loss, trial.flops, trial.note) for trial in search.trials]


def space_of(sizes: list[int], origin: tuple[int, ...]) -> Space:
    coordinates = tuple(
        Coordinate(f"c{n}", tuple({f"c{n}": value} for value in range(size))) for n, size in enumerate(sizes)
    )
    return Space(load_sweep_start(), coordinates, origin, trials=1)


def load_sweep_start() -> Any:
    return None  # the start plays no part in the order of points


def descend(space: Space, loss: Any, number: int) -> list[tuple[int, ...]]:
    tried, best, before = [space.origin], space.origin, space.origin
    while len(tried) < number and (point := space.next_point(tried, best, before)) is not None:
        tried.append(point)
        if loss(point) < loss(best):
            best, before = point, best
    return tried


def test_a_coordinate_is_followed_as_long_as_it_helps_then_the_next() -> None:
    space = space_of([5, 4], (1, 1))
    tried = descend(space, lambda p: (p[0] - 3) ** 2 + (p[1] - 0) ** 2, 8)
    assert tried == [(1, 1), (2, 1), (3, 1), (4, 1), (3, 2), (3, 0), (4, 0), (2, 0)]


def test_no_trial_is_lost_where_no_neighbour_is_left_and_none_is_made_twice() -> None:
    space = space_of([3, 3], (1, 1))
    tried = descend(space, lambda p: abs(p[0] - 1) + abs(p[1] - 1), 9)
    assert sorted(tried) == sorted(itertools.product(range(3), range(3)))
    assert {sum(map(abs, (p - 1 for p in point))) for point in tried[1:5]} == {1}, "neighbours come first"
    assert space.next_point(tried, (1, 1), (1, 1)) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": {"trials": 3}}, "search is .*; it is trials, coordinates"),
        ({"search__coordinates": {"lr": 0.001}}, "search is "),
        ({"search__trials": 99}, "search.trials of ar is 99; its coordinates have 36 points; "),
        ({"search__trials": 2.5}, "search.trials of ar 2.5 is in the file"),
        ({"search__coordinates__lr": [0.01, 0.1]}, "has lr 0.001; a search starts at a value of lr: 0.01, 0.1; "),
        ({"search__coordinates__lr": [0.001, 0.001]}, "the coordinate lr has the values 0.001, 0.001; it has two or more"),
        ({"search__coordinates__seed": [1, 2]}, "the coordinate seed sets seed; the grid or the sweep sets these"),
        ({"search__coordinates__hidden-size": [64, 96]}, "the coordinate hidden-size sets hidden-size; "),
        ({"search__coordinates__lr": [{"lr": 0.001}, {"lr": 0.01, "min-lr": 0}]}, "name the same flags in every value"),
        ({"search__coordinates__epochs": [2, -1]}, "must be positive"),
        ({"search__coordinates__epochs": {"adm": [1, 2]}}, "search is "),
        ({"search__coordinates__epochs": {"dual": [1, 2]}}, "search gives epochs for dual; the grid has ar, mdm; "),
        ({"search__trials": {"ar": 2, "mdm": 2, "dual": 2}}, "search gives trials for dual; "),
        ({"search__trials": True}, "search.trials of ar True is in the file"),
        ({"search__coordinates__lr": []}, "the coordinate lr has the values ; it has two or more"),
        ({"search__coordinates__rate": [{"lr": 0.001}, {"lr": 0.01}]}, "two coordinates set lr; "),
        ({"search__coordinates__weight-decay": [0.1, -1]}, "weight-decay -1 in the search of ar-.*: --weight-decay is -1"),
        ({"search__coordinates__weight-decay": [0.1, "abc"]}, "weight-decay abc in the search of ar-"),
        ({"search__coordinates__train-iters": [None, 5]}, "train-iters 5 in the search of ar-"),
        ({"search__coordinates__valid-data-path": ["v", "corpus-100"]}, "changes valid_data_path; all trials are judged"),
        ({"search__coordinates__seq-length": [10, 20]}, "changes seq_length; "),
        ({"search__coordinates__eval-iters": [10, 20], "flags__eval-iters": 10}, "changes eval_iters; "),
        ({"search__coordinates__num-mc": [1, 2], "flags__num-mc": 1}, "changes num_mc; "),
        ({"search__coordinates__global-batch-size": [8, 16], "flags__global-batch-size": 8},
         "changes samples of a validation step; .*eval-iters: full"),
        ({"grid__epochs": {"ar": [2]}}, "grid.epochs has none for mdm"),
        ({"search__coordinates__ema-decay": [None, 0.9, 0.99, "0.999"]},
         "ema-decay 0.9 and 0.99 and 0.999 in the search of ar-small-100-2ep-seed1; in 40 updates the decay rises to 0.8163"),
    ],
)  # fmt: skip
def test_what_no_search_can_be_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_sweep(write(tmp_path, **changes))


def test_values_by_objective_of_several_flags_and_without_a_flag(tmp_path: Path) -> None:
    coordinates = {
        "lr": [{"lr": 0.001, "min-lr": 0.0001}, {"lr": 0.01, "min-lr": 0.001}],
        "ema-decay": [None, 0.9],
        "epochs": {"mdm": [2, 8]},
    }
    path = write(
        tmp_path, search__coordinates=coordinates, search__trials={"ar": 3, "mdm": 4}, **{"flags__min-lr": 1e-4}
    )
    ar, mdm = load_sweep(path).spaces
    assert [item.name for item in ar.coordinates] == ["lr", "ema-decay"]
    assert (ar.trials, mdm.trials) == (3, 4)
    run = mdm.run_at((1, 1, 1))
    assert run.name == "mdm-small-100-8ep-seed1-lr0.01-ema-decay0.9"
    assert run.epochs == run.flags["train-epochs"] == 8 and run.flops == 4 * mdm.start.flops
    assert mdm.most_flops == 4 * run.flops
    assert "--ema-decay" not in mdm.start.arguments()
    assert mdm.run_at(mdm.origin) == mdm.start


def test_trials_are_run_directories_of_the_sweep_chosen_on_one_half_and_reported_on_the_other(tmp_path: Path) -> None:
    path = write(tmp_path)
    ar, mdm = searched(path, jobs=2)
    assert [name for name, *_ in shown(ar)] == [
        f"ar-small-100-{rest}"
        for rest in (
            "2ep-seed1", "2ep-seed1-lr0.01", "2ep-seed1-lr0.1", "2ep-seed1-lr0.01-weight-decay1",
            "2ep-seed1-lr0.01-weight-decay2", "4ep-seed1-lr0.01-weight-decay1",
        )
    ]  # fmt: skip
    assert [trial.outcome for trial in ar.trials] == [FINISHED, FINISHED, GIVEN_UP, FINISHED, GIVEN_UP, FINISHED]
    assert len(mdm.trials) == 6
    chosen = ar.chosen
    assert chosen is not None and chosen.result is not None and chosen.result.result is not None
    assert chosen.run.flags["weight-decay"] == 1, "2 is best on the report half, which has no say"
    assert chosen.result.result.chosen_apart
    assert chosen.result.result.nll == pytest.approx(chosen.loss + 0.01, abs=1e-6)
    text = "\n".join(describe(ar))
    assert "on the report half: 4.0" in text and "*  4 " in text
    assert budgets([ar, mdm])[0] == "tuned with equal budgets: 6 trials each"
    spent = sum(trial.flops for trial in ar.trials)
    assert budgets([ar, mdm])[1] == f"training FLOPs of all trials: AR {spent:.3g}, MDM {spent:.3g}"
    record = json.loads(write_result([ar, mdm], tmp_path).read_text())
    assert record["searches"][0]["chosen"] == str(chosen.run.folder) and record["budgets"] == budgets([ar, mdm])
    assert [shown(search) for search in read(path)] == [shown(ar), shown(mdm)]
    again = subprocess.run([*PROGRAM, str(path), "search"], capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and "started" not in again.stdout, again.stdout + again.stderr
    assert "tuned with equal budgets: 6 trials each" in again.stdout


def test_optima_on_plateaus_and_at_edges_are_named(tmp_path: Path) -> None:
    """A tenth of a hundredth is within the error of two documents; four times the compute is not for nothing."""
    coordinates = {"lr": [0.0001, 0.001, 0.0099], "epochs": [1, 4]}
    path = write(tmp_path, search__coordinates=coordinates, search__trials=4, grid__objective=["ar"], grid__epochs=[4],
                 flags__lr=0.0099)  # fmt: skip
    (search,) = searched(path)
    assert search.chosen is search.trials[0]
    assert at_edges(search) == ["lr 0.0099"]
    cheaper = cheaper_as_good(search)
    assert cheaper is not None and cheaper.run.epochs == 1
    text = "\n".join(describe(search))
    assert "as good within one standard error, for 25% of its FLOPs: trial" in text
    assert "at an end of its list: lr 0.0099; values beyond it may be better" in text
    assert "never tried: lr 0.0001" in text


def test_different_budgets_are_named(tmp_path: Path) -> None:
    searches = searched(
        write(tmp_path, search__trials={"ar": 2, "mdm": 3}, search__coordinates__epochs={"mdm": [2, 4]})
    )
    assert budgets(searches)[0] == "tuned with unequal budgets: AR 2 trials, MDM 3 trials"
    assert budgets(searches)[2] == "tuned for MDM only: epochs"
    searches[1].trials.pop()
    assert budgets(searches)[0] == "not finished: MDM 2 of 3 trials"


def test_one_search_of_a_file_at_a_time_keeps_what_is_known_of_the_others(tmp_path: Path) -> None:
    """As the tasks of an array job do, of which each writes the result."""
    path = write(tmp_path, search__trials=2)
    for only, said in (("ar", "not finished: MDM 0 of 2 trials"), ("mdm", "tuned with equal budgets: 2 trials each")):
        command = [*PROGRAM, str(path), "search", "--only", only]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr
        record = json.loads((tmp_path / "runs/search.json").read_text())
        assert record["budgets"][0] == said and len(record["searches"]) == 2


def test_the_report_of_runs_of_a_search_says_with_which_budgets(tmp_path: Path) -> None:
    (search,) = searched(write(tmp_path, search__trials=2, grid__objective=["ar"]))
    trial = search.trials[0].run.folder
    assert searches_html([load_run(trial)]) == ""
    for trials, said in (
        ({"ar": 2, "mdm": 2}, "equal budgets: 2 trials each"),
        ({"ar": 2, "mdm": 3}, "AR 2 trials, MDM 3 "),
    ):
        both = searched(write(tmp_path, search__trials=trials))
        write_result(both, tmp_path / "runs")
        page = searches_html([load_run(trial)])
        assert said in page and "ar-small-100-2ep-seed1-lr0.01" in page
    (tmp_path / "runs/search.json").write_text('{"budgets": [], "searches": [{}]}')
    assert searches_html([load_run(trial)]) == ""


def test_a_diverged_trial_counts_and_says_so_and_is_not_started_again(tmp_path: Path) -> None:
    path = write(tmp_path, search__coordinates={"lr": [0.001, 1]}, search__trials=2, grid__objective=["ar"])
    (search,) = searched(path)
    trial = search.trials[1]
    assert (trial.outcome, trial.loss, trial.flops) == (FAILED, float("inf"), 11.0)
    assert "11 steps in a row had a NaN or infinite gradient" in trial.note
    assert [record["returncode"] for record in read_attempts(trial.run)] == [None, 1]
    assert search.chosen is search.trials[0]
    assert "inf" in "\n".join(describe(search)) and "(diverged)" in "\n".join(describe(search))
    assert shown(read(path)[0]) == shown(search)


def test_a_trial_that_the_world_broke_is_no_trial(tmp_path: Path) -> None:
    path = write(tmp_path, search__trials=2)
    broken = subprocess.run(
        [*PROGRAM, str(path), "search", "--attempts", "1"], capture_output=True, text=True, timeout=120,
        env={**os.environ, "FAKE_FAIL": "mdm"},
    )  # fmt: skip
    assert broken.returncode == 1, broken.stdout
    assert "failed: mdm-small-100-2ep-seed1" in broken.stderr
    assert "not finished: MDM 0 of 2 trials" in broken.stdout
    done = subprocess.run([*PROGRAM, str(path), "search"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "tuned with equal budgets: 2 trials each" in done.stdout, done.stderr


def test_a_trial_without_hope_is_stopped_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"search__coordinates": {"weight-decay": [0.1, 4]}, "search__trials": 2, "grid__objective": ["ar"]}
    path = write(tmp_path, grid__epochs=[10], **changes)
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.07")
    (search,) = searched(path)
    monkeypatch.delenv("FAKE_STEP_SECONDS")
    first, second = search.trials
    assert (first.outcome, second.outcome) == (FINISHED, GIVEN_UP)
    assert "the law of its own curve reaches" in second.note
    assert 0.5 <= second.curve.share[-1] < 0.8
    assert second.result is not None and not second.result.is_finished, "it was stopped, not judged afterwards"
    assert shown(read(path)[0]) == shown(search)
    whole = write(tmp_path / "patient", grid__epochs=[10], search__give_up=False, **changes)
    (patient,) = searched(whole)
    assert [trial.outcome for trial in patient.trials] == [FINISHED, FINISHED]
    # Who looks only afterwards finds the same place: the rule knows the validations up to there alone.
    judged = Search(load_sweep(whole).spaces[0], say=lambda text: None)
    judged.catch_up()
    assert [row[1:] for row in shown(judged)] == [row[1:] for row in shown(search)]
    assert second.loss > first.loss and patient.chosen is not None and patient.chosen.run.name == first.run.name


def test_a_plan_is_done_with_its_last_whole_batch(tmp_path: Path) -> None:
    """What is over of it would leave a share of training that never comes, and finished trials would be given up."""
    run = load_run(write_run(tmp_path / "run"))
    assert int(run.info["train_samples"]) % 16
    assert curve_of(run).share[-1] == 1


def test_the_choice_is_trained_again_with_other_seeds(tmp_path: Path) -> None:
    path = write(tmp_path, search__seeds=[7, 8], search__trials=2, grid__objective=["ar"])
    (search,) = searched(path)
    names = [f"ar-small-100-2ep-seed{seed}-lr0.01" for seed in (7, 8)]
    assert [member.name for member in search.members] == names
    assert all(f"with seed {seed}: {tmp_path}" in "\n".join(describe(search)) for seed in (7, 8))
    assert [member.flags["seed"] for member in search.members] == [7, 8]
    assert budgets([search])[0].startswith("tuned with 2 trials; there is no other search")
    assert json.loads(write_result([search], tmp_path).read_text())["searches"][0]["members"] == [
        str(tmp_path / "runs" / name) for name in names
    ]
    with pytest.raises(UserError, match=r"search.seeds has 1, 1; they differ from each other and from 1"):
        load_sweep(write(tmp_path, search__seeds=[1, 1]))


def test_a_run_of_the_same_configuration_is_taken_whatever_its_name(tmp_path: Path) -> None:
    path = write(tmp_path, search__trials=3, grid__objective=["ar"])
    (first,) = searched(path)
    (tmp_path / "runs" / first.trials[1].run.name).rename(tmp_path / "runs" / "by-hand")
    (second,) = searched(path)
    assert [trial.run.folder.name for trial in second.trials] == [
        first.trials[0].run.name,
        "by-hand",
        first.trials[2].run.name,
    ]
    assert [trial.loss for trial in second.trials] == [trial.loss for trial in first.trials]
    assert len((tmp_path / "runs/by-hand/starts.txt").read_text().split()) == 1


def test_a_search_that_cannot_go_on_fails_in_words_and_the_other_goes_on(tmp_path: Path) -> None:
    path = write(tmp_path, search__trials=1)
    sweep = load_sweep(path)
    first = sweep.runs[0].folder
    first.mkdir(parents=True)
    (first / "run.json").write_text("{}")
    done = subprocess.run([*PROGRAM, str(path), "search"], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr and f"{first.name}: failed: {first}/run.json has format None" in done.stdout
    assert f"{sweep.runs[1].name}: finished" in done.stdout


def test_a_value_that_is_there_in_two_spellings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the coordinate lr has the values 1e-3, 0\.001, 0\.01; it has two or more"):
        load_sweep(write(tmp_path, search__trials=3, search__coordinates={"lr": ["1e-3", 0.001, 0.01]}))
