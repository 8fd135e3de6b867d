"""Numbers of the tools: only those in range are taken."""

from __future__ import annotations

import argparse
import importlib

import pytest

from megatron.config.ranges import real, whole


@pytest.mark.parametrize("text", ["-1", "11", "1.5", "nan", "inf", "", "9" * 5000])
def test_whole_numbers_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="it must be a whole number from 0 to 10"):
        whole(0, 10)(text)
    assert [whole(0, 10)(good) for good in ("0", "10")] == [0, 10]


@pytest.mark.parametrize("text", ["0", "-0.1", "0.51", "nan", "inf", "-inf", "x"])
def test_real_numbers_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"it must be a number above 0 and at most 0\.5"):
        real(0, 0.5)(text)
    assert real(0, 0.5)("0.5") == 0.5


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("subset", "--input a --output b --documents 0"),
        ("subset", "--input a --output b --tokens -5"),
        ("subset", "--input a --output b --documents 3 --random --seed -5"),
        ("inspect_data", "a --vocab-size 0"),
        ("inspect_data", "a --eod-id -1"),
        ("inspect_data", "a --vocab-size 99999999999"),
    ],
)
def test_data_tools_refuse_numbers_out_of_range(tool: str, arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(f"megatron.commands.{tool}").parse_args(arguments.split())
    assert "it must be a whole number from" in capsys.readouterr().err
