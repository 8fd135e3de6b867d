"""What searches found, in words: trials, choices, the budgets on both sides."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.files import replace_file
from megatron.runs.comparison import plus_minus
from megatron.runs.run import Run
from megatron.runs.sums import difference
from megatron.scaling.sweep.search import FINISHED, Search, Trial
from megatron.scaling.sweep.state import is_finished

RESULT_FILE = "search.json"


def describe(search: Search) -> list[str]:
    """Lines about one search: its trials in order, and the choice with its loss on the report half."""
    space, chosen = search.space, search.chosen
    start = ", ".join(f"{item.name} {item.text(index)}" for item, index in zip(space.coordinates, space.origin))
    lines = [
        f"{space.title}: {len(search.trials)} of {space.trials} trials, nats per token on the selection half",
        f"  start: {start}",
    ]
    for number, trial in enumerate(search.trials, 1):
        mark = "*" if trial is chosen else " "
        what = trial.outcome if trial.outcome != FINISHED else ""
        lines.append(f"{mark}{number:3}  {trial.loss:8.4f}  {trial.flops:8.2e} FLOPs  {space.text(trial.point)}"
                     + (f"  ({what})" if what else ""))  # fmt: skip
        if trial.note:
            lines.append(f"        {trial.note}")
    if chosen is None:
        return [*lines, "  no trial has a loss"]
    number = search.trials.index(chosen) + 1
    lines.append(f"  chosen: trial {number}, {chosen.run.folder}")
    lines.append(f"  {_reported(chosen)}")
    for member in search.members:
        lines.append(
            f"  the same with seed {member.seed}{'' if is_finished(member) else ' (missing)'}: {member.folder}"
        )
    if cheaper := cheaper_as_good(search):
        lines.append(
            f"  as good within one standard error, for {cheaper.flops / chosen.flops:.0%} of its FLOPs: "
            f"trial {search.trials.index(cheaper) + 1}"
        )
    if edges := at_edges(search):
        lines.append(f"  at an end of its list: {', '.join(edges)}; values beyond it may be better")
    if untried := never_tried(search):
        lines.append(f"  never tried: {', '.join(untried)}")
    return lines


def budgets(searches: Sequence[Search]) -> list[str]:
    """Whether the searches had the same number of trials, and what each side spent; of a search alone, its number."""
    titles = _titles(searches)
    counts = {title: len(search.trials) for title, search in titles.items()}
    waiting = [f"{title} {counts[title]} of {s.space.trials}" for title, s in titles.items() if not s.is_complete]
    if waiting:
        first = f"not finished: {', '.join(waiting)} trials"
    elif len(counts) == 1:
        first = f"tuned with {searches[0].space.trials} trials; there is no other search that this could be equal to"
    elif len({*counts.values()}) == 1:
        first = f"tuned with equal budgets: {next(iter(counts.values()))} trials each"
    else:
        first = f"tuned with unequal budgets: {', '.join(f'{title} {count} trials' for title, count in counts.items())}"
    spent = ", ".join(f"{title} {sum(t.flops for t in search.trials):.3g}" for title, search in titles.items())
    lines = [first, f"training FLOPs of all trials: {spent}"]
    tuned = {title: {item.name for item in search.space.coordinates} for title, search in titles.items()}
    common = set.intersection(*tuned.values())
    for title, names in tuned.items():
        if names - common:
            lines.append(f"tuned for {title} only: {', '.join(sorted(names - common))}")
    return lines


def cheaper_as_good(search: Search) -> Trial | None:
    """The cheapest finished trial within one standard error of the chosen one, paired on the selection half, where it takes less
    compute than that; None where there is none or no sums are kept."""
    chosen = search.chosen
    if chosen is None or (best := _selection(chosen)) is None:
        return None
    for trial in sorted(search.trials, key=lambda trial: trial.flops):
        if trial.flops >= 0.99 * chosen.flops:
            return None
        if trial.outcome != FINISHED or (other := _selection(trial)) is None:
            continue
        behind = difference(best, other)
        if behind.value <= behind.error:
            return trial
    return None


def at_edges(search: Search) -> list[str]:
    """Coordinates of which the choice has the first or the last value of three or more, with the value."""
    if search.chosen is None:
        return []
    pairs = zip(search.space.coordinates, search.chosen.point)
    return [
        f"{item.name} {item.text(i)}" for item, i in pairs if i in (0, len(item.values) - 1) and len(item.values) > 2
    ]


def never_tried(search: Search) -> list[str]:
    """Values that no trial had."""
    return [
        f"{item.name} {item.text(index)}"
        for number, item in enumerate(search.space.coordinates)
        for index in range(len(item.values))
        if all(trial.point[number] != index for trial in search.trials)
    ]


def write_result(searches: Sequence[Search], folder: Path) -> Path:
    """Write ``search.json`` beside the trials, for other programs; everything in it follows from the run directories."""
    record = {"format": 1, "budgets": budgets(searches), "searches": [_record(search) for search in searches]}
    path = folder / RESULT_FILE
    replace_file(path, json.dumps(record, indent=1))
    return path


def _record(search: Search) -> dict[str, Any]:
    space, chosen = search.space, search.chosen
    result = None if chosen is None or chosen.result is None else chosen.result.result
    trials = [
        {
            "run": str(trial.run.folder),
            "values": {item.name: item.text(index) for item, index in zip(space.coordinates, trial.point)},
            "outcome": trial.outcome,
            "selection_nll": trial.loss if math.isfinite(trial.loss) else None,
            "flops": trial.flops,
            "note": trial.note,
        }
        for trial in search.trials
    ]
    return {
        "search": space.title,
        "objective": space.start.objective,
        "planned_trials": space.trials,
        "trials": trials,
        "chosen": None if chosen is None else str(chosen.run.folder),
        "members": [str(member.folder) for member in search.members],
        "label": None if chosen is None or chosen.result is None else chosen.result.label,
        "report_nll": None if result is None else result.nll,
        "report_nll_se": None if result is None or not math.isfinite(result.nll_se) else result.nll_se,
        "chosen_apart": None if result is None else result.chosen_apart,
    }


def _reported(trial: Trial) -> str:
    run = trial.result
    result = None if run is None else run.result
    if run is None or result is None:
        return "nothing to report"
    half = "on the report half" if result.chosen_apart else "on the documents that chose it, as no halves are known"
    return (
        f"{half}: {plus_minus(result.nll, result.nll_se)} nats/token (± over {result.error_unit}), {result.row.kind}, "
        f"at epoch {result.row.epoch:.3g}"
    )


def _selection(trial: Trial) -> Any:
    """Sums of the selection half at the trial's best validation; None where they are not known."""
    run: Run | None = trial.result
    result = None if run is None else run.result
    if run is None or run.split is None or result is None:
        return None
    return next(chosen for row, chosen, _ in run.split if row == result.row)


def _titles(searches: Sequence[Search]) -> dict[str, Search]:
    """Searches by what sets them apart: the objective, and the start where an objective has several."""
    objectives = [search.space.start.objective for search in searches]
    unique = len({*objectives}) == len(objectives)
    return {(search.space.start.objective.upper() if unique else search.space.title): search for search in searches}
