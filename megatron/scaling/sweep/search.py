"""One search: coordinate descent from one run of the grid, a trial at a time, each an ordinary run of the sweep.

Nothing is kept but the run directories of the trials: what has been tried, what is best and what comes next follow from them
alone, so that a search that was killed goes on with the trials, and to the choice, of one that was left alone. Choices are
made on the selection half of the validation documents (``megatron.statistics.half_of``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from megatron.files import replace_file
from megatron.runs.record import DIVERGED
from megatron.runs.run import Run, Validation
from megatron.scaling.sweep.hopeless import Curve, given_up_at
from megatron.scaling.sweep.runner import Chain, last_line
from megatron.scaling.sweep.space import Point, Space
from megatron.scaling.sweep.state import claim, is_finished, read_attempts, read_result, same_run
from megatron.scaling.sweep.sweep_run import SweepRun
from megatron.statistics import mean_loss

FINISHED, GIVEN_UP, FAILED = "finished", "given up", "diverged"
GIVEN_UP_FILE = "given_up.json"


@dataclass(frozen=True)
class Trial:
    """A trial that is over.

    Attributes:
        point: its place.
        run: its directory and flags.
        result: what is in the directory.
        outcome: FINISHED, GIVEN_UP or FAILED.
        loss: the lowest loss on the selection half, nats per token; infinite where there is none.
        flops: training compute up to where it counts.
        note: why it was given up or has no loss; "".
        curve: its validations as far as they count.
    """

    point: Point
    run: SweepRun
    result: Run | None
    outcome: str
    loss: float
    flops: float
    note: str
    curve: Curve


class Search:
    """A search and its trials so far.

    Args:
        space: where it looks.
        gives_up: whether it stops trials without hope.
        say: where lines about trials go.
    """

    def __init__(self, space: Space, *, gives_up: bool = True, say: Callable[[str], None] = print) -> None:
        self.space, self.gives_up, self.say = space, gives_up, say
        self.trials: list[Trial] = []
        self._point: Point = space.origin
        self._seen: tuple[str, int] = ("", 0)

    @property
    def is_complete(self) -> bool:
        """Whether all trials are done; the further seeds may not be."""
        return len(self.trials) == self.space.trials

    @property
    def members(self) -> list[SweepRun]:
        """The choice with each of the further seeds; empty before the search is complete."""
        chosen = self.chosen if self.is_complete else None
        return (
            []
            if chosen is None
            else [same_run(self.space.run_at(chosen.point, seed=seed)) for seed in self.space.seeds]
        )

    @property
    def best(self) -> Trial | None:
        """The trial of lowest loss, the earliest of equals; None before the first."""
        return min(self.trials, key=lambda trial: trial.loss, default=None)

    @property
    def chosen(self) -> Trial | None:
        """The best trial, if it has a loss at all."""
        return self.best if self.best is not None and math.isfinite(self.best.loss) else None

    def chain(self) -> Chain:
        """The search as the runner takes it."""
        return Chain(self._runs(), self._outcome, self._watch if self.gives_up else None)

    def catch_up(self) -> SweepRun | None:
        """Judge the trials that are over. Returns the run that is missing next; None where the search is complete."""
        while not self.is_complete:
            self._point = self._next_point()
            run = same_run(self.space.run_at(self._point))
            trial = self._judge(run)
            if trial is None:
                return run
            self.trials.append(trial)
        return None

    def _runs(self) -> Iterator[SweepRun]:
        """One trial after the other; the end where one was stopped or failed for another reason than its settings."""
        last = ""
        while (run := self.catch_up()) is not None and run.name != last:
            claim(run)
            number, last = len(self.trials) + 1, run.name
            self.say(f"{self.space.title}: trial {number} of {self.space.trials}: {self.space.text(self._point)}")
            yield run
        for run in self.members:
            claim(run)
            self.say(f"{self.space.title}: the choice with seed {run.seed}")
            yield run

    def _next_point(self) -> Point:
        best = before = self.space.origin
        lowest = math.inf
        for trial in self.trials:
            if trial.loss < lowest:
                best, before, lowest = trial.point, best, trial.loss
        tried = [trial.point for trial in self.trials]
        point = self.space.next_point(tried, best, before) if tried else self.space.origin
        assert point is not None, "a space has at least as many points as a search has trials"
        return point

    def _judge(self, run: SweepRun) -> Trial | None:
        """What came of the trial at the current point; None while it is not over."""
        result = read_result(run)
        curve = curve_of(result)
        if self.gives_up and (given := self._given_up(run, result, curve)) is not None:
            number, note = given
            return self._trial(run, result, curve.until(number), outcome=GIVEN_UP, note=note)
        if is_finished(run):
            note = "" if np.isfinite(curve.loss).any() else "no finite validation"
            return self._trial(run, result, curve, outcome=FAILED if note else FINISHED, note=note)
        log = run.folder / "log.txt"
        if read_attempts(run) and log.exists() and DIVERGED in (said := last_line(log)):
            return self._trial(run, result, curve, outcome=FAILED, note=said.removeprefix("error: "))
        return None

    def _trial(self, run: SweepRun, result: Run | None, curve: Curve, *, outcome: str, note: str) -> Trial:
        finite = curve.loss[np.isfinite(curve.loss)]
        loss = float(finite.min()) if finite.size and outcome != FAILED else math.inf
        rows = (
            [] if result is None else [*result.train, *({"flops": row.flops, "step": row.step} for row in result.valid)]
        )
        if outcome == GIVEN_UP and result is not None:
            last = result.valid[len(curve.loss) - 1].step
            rows = [row for row in rows if int(row["step"]) <= last]
        flops = max((float(row["flops"]) for row in rows), default=0.0)
        return Trial(self._point, run, result, outcome, loss, flops, note, curve)

    def _given_up(self, run: SweepRun, result: Run | None, curve: Curve) -> tuple[int, str] | None:
        """At which validation the trial was given up, and why: as recorded, or by the rule."""
        best, file = self.chosen, run.folder / GIVEN_UP_FILE
        if best is None or result is None:
            return None
        if file.exists():
            record = json.loads(file.read_bytes())
            number = sum(row.step <= int(record["step"]) for row in result.valid)
            if number and best.loss <= float(record["against"]):  # else another search gave it up, against a better one
                return number, str(record["reason"])
        return given_up_at(curve, [trial.curve for trial in self.trials if trial.outcome == FINISHED])

    def _outcome(self, run: SweepRun) -> str:
        if self.is_complete:  # a member
            return FINISHED if is_finished(run) else ""
        trial = self._judge(run)
        return "" if trial is None else trial.outcome + (f": {trial.note}" if trial.note else "")

    def _watch(self, run: SweepRun) -> None:
        """Give the running trial up where it has no hope: write down why, and have it stopped."""
        file = run.folder / "metrics.jsonl"
        seen = (run.name, file.stat().st_size if file.exists() else 0)
        if self.chosen is None or self.is_complete or seen == self._seen:
            return
        self._seen = seen
        result = read_result(run)
        given = self._given_up(run, result, curve_of(result))
        if given is None or result is None:
            return
        number, reason = given
        record = {"format": 1, "step": result.valid[number - 1].step, "against": self.chosen.loss, "reason": reason}
        replace_file(run.folder / GIVEN_UP_FILE, json.dumps(record, indent=1))
        run.stop_file.touch()


def curve_of(result: Run | None) -> Curve:
    """The validations of a run on the selection half, on all documents where the halves are not known; of several at a step (of
    weights as trained and averaged) the best."""
    if result is None:
        return Curve(np.array([]), np.array([]), np.array([]), np.array([]), unique_tokens=0)
    rows = [(row, row.nll) for row in result.validations]
    if result.split is not None:
        rows = [(row, mean_loss(chosen).value) for row, chosen, _ in result.split]
    best: dict[int, tuple[Validation, float]] = {}
    for row, loss in rows:
        if row.step not in best or loss < best[row.step][1]:
            best[row.step] = row, loss
    points = [best[step] for step in sorted(best)]
    planned = max(1, result.samples_planned)
    return Curve(
        share=np.array([row.samples / planned for row, _ in points]),
        tokens=np.array([float(row.tokens) for row, _ in points]),
        loss=np.array([loss for _, loss in points]),
        rate=np.array([_decay(result, row.step) for row, _ in points]),
        unique_tokens=result.unique_tokens,
    )


def _decay(result: Run, step: int) -> float:
    """Learning rate at a step as a share of its peak so far; 1 where the log does not say."""
    rates = [float(row["lr"]) for row in result.train if row.get("lr") is not None and int(row["step"]) <= step]
    return rates[-1] / max(rates) if rates and max(rates) > 0 else 1.0
