"""Where one curve goes below another. All runs here are SYNTHETIC (see synthetic_runs.py)."""

from __future__ import annotations

import dataclasses

import pytest

from megatron.runs.crossing import crossing
from megatron.runs.reading import load_run
from runs.synthetic_runs import write_run


def with_curve(run, points: dict[float, float]):
    """The run with another learning curve: {epoch: loss}."""
    rows = [
        dataclasses.replace(run.valid[0], step=int(epoch * 100), epoch=epoch, nll=nll, sums=None)
        for epoch, nll in points.items()
    ]
    return dataclasses.replace(run, valid=tuple(rows))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return load_run(write_run(folder / "ar", "ar")), load_run(write_run(folder / "mdm", "mdm"))


def test_a_curve_crosses_from_its_first_validation_that_stays_below(pair) -> None:
    ar = with_curve(pair[0], {1: 5.0, 4: 4.0, 16: 6.0, 64: 8.0})
    mdm = with_curve(pair[1], {1: 4.9, 2: 6.0, 8: 4.9, 16: 4.5, 64: 3.9})
    found = crossing(ar, mdm)
    assert found.epoch == 8, "4.9 is below AR's 5.0 half way between epochs 4 and 16; the dip at epoch 1 does not count"
    assert found.best_epoch == 64
    assert found.end_epoch == 64
    assert found.end.value == pytest.approx(3.9 - 8.0)
    assert found.end.is_real


def test_curves_without_a_crossing_or_a_common_epoch_say_so(pair) -> None:
    ar = with_curve(pair[0], {1: 5.0, 4: 4.0})
    assert crossing(ar, with_curve(pair[1], {1: 6.0, 4: 5.0})).epoch is None
    longer = crossing(ar, with_curve(pair[1], {2: 6.0, 4: 4.5, 40: 3.5}))
    assert (longer.epoch, longer.best_epoch, longer.end_epoch) == (None, 40, 4)
    apart = crossing(ar, with_curve(pair[1], {10: 3.0}))
    assert (apart.epoch, apart.best_epoch, apart.end) == (None, 10, None)
    assert crossing(ar, with_curve(pair[1], {})).end is None
