"""Intervals: what they print, and when they say that nothing is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron.scaling.interval import Interval


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(3.86612, 3.69612, 4.03612), "3.87 [3.7, 4.04]"),
        (Interval(3.86612, 3.86512, 3.86712), "3.8661 [3.8651, 3.8671]"),
        (Interval(2.1727e18, 1.9912e18, 2.4912e18), "2.17e+18 [1.99e+18, 2.49e+18]"),
        (Interval(2.2, 1.1, 9.7), "2.2 [1.1, 9.7]"),
        (Interval(2.269, 2.219, 3.401e5), "2.3 [2.2, 3.4e+05], not determined"),
        (Interval(1e19, 3e18, math.inf), "1e+19 [3e+18, ∞], not determined"),
        (Interval(4.767e19, math.nan, math.nan), "4.77e+19"),
    ],
)
def test_digits_are_those_that_the_interval_is_worth(interval, text):
    assert str(interval) == text


def test_refits_give_the_interval():
    found = Interval.of(5.0, np.linspace(0, 10, 1001))
    assert (found.low, found.high) == pytest.approx((0.25, 9.75))
    assert math.isnan(Interval.of(5.0, np.array([5.0])).low)
