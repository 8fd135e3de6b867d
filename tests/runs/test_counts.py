"""Counts as people write them."""

from __future__ import annotations

import pytest

from megatron.runs.counts import format_count, parse_count


@pytest.mark.parametrize(("value", "text"), [(912_345, "0.912M"), (100_000, "100k"), (425e6, "425M"), (12, "12")])
def test_format_count(value, text):
    assert format_count(value) == text


@pytest.mark.parametrize(("text", "value"), [("100M", 1e8), ("40k", 4e4), ("1.5B", 1.5e9), ("1e8", 1e8), ("7", 7.0)])
def test_parse_count(text, value):
    assert parse_count(text) == value


@pytest.mark.parametrize(
    "text", ["100X", "M", "", "1 M M", "0.5", "0k", "-1", "nan", "inf", "1e41", "1e-320", "9" * 5000]
)
def test_parse_count_refuses_what_is_none(text):
    with pytest.raises(ValueError, match="is not a count"):
        parse_count(text)
