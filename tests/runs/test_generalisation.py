"""The record of seen and unseen documents: its errors, what is paired, what is damaged. Numbers are made up."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron.errors import UserError
from megatron.runs.generalisation import Generalisation, Measured, Point, Protocol, gap_difference
from megatron.runs.record import clear_run
from megatron.statistics import mean_loss

PROTOCOL = Protocol("run", "NLL bound", "bound, 2 passes", 2, 10, {"samples": 40}, {"samples": 40})


def measured(effects: np.ndarray, level: float, *, noise: np.ndarray | None = None, seed: int = 0) -> Measured:
    """A document a sample, of 10 tokens; noise of each sample, if any, is that of its masks."""
    count = len(effects)
    loss = 10 * (level + effects + np.random.default_rng(seed).normal(0, 0.01, count) + (0 if noise is None else noise))
    place = np.arange(count, dtype=np.int32)
    tokens = np.full((3, count), 10, dtype=np.int32)
    return Measured(place, place, tokens, np.stack([loss, loss + 1, loss - 1]), draws=0 if noise is None else 2)


@pytest.fixture
def effects() -> list[np.ndarray]:
    return [*np.random.default_rng(5).normal(0, 0.5, (2, 40))]


def point(effects, gap: float = 0.3, *, level: float = 3.0, noise=None, seed: int = 0) -> Point:
    seen, unseen = (measured(own, level + rise, noise=noise, seed=seed + int(rise > 0))
                    for own, rise in zip(effects, (0.0, gap)))  # fmt: skip
    return Point(seed, 1.0 + seed, seen, unseen)


def test_the_error_of_a_gap_is_that_of_two_sets_of_other_documents(effects) -> None:
    own = point(effects)
    gap, apart = own.gap(), math.hypot(own.loss("seen").error, own.loss("unseen").error)
    assert gap.value == pytest.approx(own.loss("unseen").value - own.loss("seen").value)
    assert gap.error == pytest.approx(apart)
    assert 39 < gap.degrees <= 78, "between those of one set and of both"
    assert gap.num_documents == 80
    assert own.gap(1).value == pytest.approx(gap.value) and own.loss("seen", 1).value == pytest.approx(
        own.loss("seen").value + 0.1
    )


def test_one_set_that_knows_little_says_how_little_is_known(effects) -> None:
    """A document that holds most of the seen tokens leaves few degrees of freedom, however many unseen documents there are."""
    own = point([effects[0], 0.1 * effects[1]])
    tokens = own.seen.tokens.copy()
    tokens[:, 0] = 400
    seen = Measured(own.seen.sample, own.seen.document, tokens, own.seen.loss / own.seen.tokens * tokens)
    skewed = Point(1, 1.0, seen, own.unseen)
    assert skewed.gap().error > skewed.loss("seen").error
    assert skewed.gap().degrees < 4 < 30 < own.gap().degrees


def test_runs_and_checkpoints_are_paired_by_document(effects) -> None:
    """What makes a document hard for both cancels, in each of the two sets."""
    one, other = point(effects, 0.3, seed=2), point(effects, 0.5, level=3.4, seed=7)
    found = gap_difference(one, other)
    assert found.value == pytest.approx(other.gap().value - one.gap().value) == pytest.approx(0.2, abs=0.02)
    assert found.error < 0.1 * math.hypot(one.gap().error, other.gap().error)
    assert gap_difference(one, one).value == 0


def test_a_bin_of_nothing_has_no_gap(effects) -> None:
    own = point(effects)
    empty = Measured(own.seen.sample, own.seen.document, own.seen.tokens * [[1], [1], [0]], own.seen.loss)
    assert math.isnan(Point(1, 1.0, empty, own.unseen).gap(2).value)


def test_a_record_is_read_as_it_was_written_and_goes_on(tmp_path: Path, effects) -> None:
    assert Generalisation.load(tmp_path) is None
    (tmp_path / "other").mkdir()
    for seed in (4, 2):
        Generalisation.begin(tmp_path, PROTOCOL).add(point(effects, seed=seed))
    record = Generalisation.load(tmp_path)
    assert record is not None and record.protocol == PROTOCOL
    assert [(own.step, own.epoch) for own in record.points] == [(2, 3.0), (4, 5.0)]
    assert mean_loss(record.points[0].seen.sums(1)) == point(effects, seed=2).loss("seen", 1)
    Generalisation.begin(tmp_path / "other", PROTOCOL).add(point(effects, seed=2))
    Generalisation.begin(tmp_path / "other", replace(PROTOCOL, seq_length=7))
    assert Generalisation.load(tmp_path / "other") is None, "until the first checkpoint of the new protocol"
    (tmp_path / "generalisation/4.npz").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"4\.npz cannot be read"):
        _ = Generalisation.begin(tmp_path, PROTOCOL).points
    (tmp_path / "generalisation/record.json").write_text(json.dumps({"protocol": {}, "epochs": {}}))
    with pytest.raises(UserError, match=r"record\.json cannot be read"):
        Generalisation.load(tmp_path)
    clear_run(tmp_path)
    assert not (tmp_path / "generalisation").exists(), "--overwrite leaves nothing of another run"
