"""Which losses of which runs a law is fitted to."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from megatron.errors import UserError
from megatron.scaling.observations import observe


def run(name: str, *losses: float, **changes: Any) -> Any:
    """A run with a validation every twentieth of an epoch of 1,000 tokens."""
    rows = [SimpleNamespace(nll=loss, tokens=50 * step, epoch=0.05 * step) for step, loss in enumerate(losses, 1)]
    fields = {"source": "", "objective": "mdm", "is_likelihood": True, "is_evaluation": False, "label": "NLL bound",
              "is_finished": True, "unique_tokens": 1000, "compute_parameters": 7.0, "averaged": ()}  # fmt: skip
    return SimpleNamespace(name=name, valid=tuple(rows), **{**fields, **changes})


RUNS = [
    run("falls and rises", 5.0, 3.0, 4.0),
    run("diverged at last", 5.0, 4.5, math.inf),
    run("goes on", 6.0, 5.5, is_finished=False),
    run("judged", 1.0, is_evaluation=True),
    run("no likelihood", 0.5, is_likelihood=False, objective="maskgit"),
]


@pytest.mark.parametrize(
    ("which", "losses", "tokens", "groups", "skipped"),
    [
        ("final", [4.0, 4.5], [150, 100], [0, 1], ("goes on (not finished)",)),
        ("best", [3.0, 4.5, 5.5], [100, 100, 100], [0, 1, 2], ()),
        ("curve", [3.0, 4.0, 4.5, 5.5], [100, 150, 100, 100], [0, 0, 1, 2], ()),
    ],
)
def test_each_choice_takes_its_validations(
    which: str, losses: list[float], tokens: list[int], groups: list[int], skipped: tuple[str, ...]
) -> None:
    (found,) = observe(RUNS, which)
    assert (found.losses.tolist(), found.points.tokens.tolist(), found.groups.tolist()) == (losses, tokens, groups)
    assert (found.objective, found.label, found.skipped) == ("mdm", "NLL bound", skipped)


def test_one_objective_has_one_kind_of_number() -> None:
    with pytest.raises(UserError, match=r"runs of mdm are labelled NLL \(exact\), NLL bound"):
        observe([*RUNS, run("exact", 3.0, label="NLL (exact)")])
    with pytest.raises(UserError, match="known are final, best, curve"):
        observe(RUNS, "last")


def test_imported_runs_stand_apart_and_first() -> None:
    found = observe([*RUNS, run("theirs", 2.0, source="a paper")])
    assert [(own.source, own.losses.tolist()) for own in found] == [("a paper", [2.0]), ("", [4.0, 4.5])]
