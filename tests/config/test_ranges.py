"""Numbers of the tools: only those in range are taken."""

from __future__ import annotations

import argparse
import ast
import importlib
from pathlib import Path

import pytest

from megatron.commands.running import status_of
from megatron.config.ranges import real, whole
from megatron.errors import UserError

COMMANDS = Path(__file__).resolve().parents[2] / "megatron" / "commands"


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


def numbers_of(path: Path) -> list[tuple[str, str]]:
    """(flag, type) of every option of a program that is read as a number, from its source."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            kinds = [ast.unparse(word.value) for word in node.keywords if word.arg == "type"]
            found += [(str(node.args[0].value), kind) for kind in kinds]
    return found


@pytest.mark.parametrize("path", sorted(COMMANDS.glob("*.py")), ids=lambda path: path.stem)
def test_every_number_of_a_tool_has_a_range(path: Path) -> None:
    assert not [(flag, kind) for flag, kind in numbers_of(path) if kind in ("int", "float")]


ODD = ["nan", "-inf", "1e400", "-1", str(10**30), "9" * 5000, "0x10", "", "1.5x"]
# Program → what it needs besides, and the flags that take numbers.
NUMBERS = {
    "plan": ("--unique-tokens 1e8 --flops 1e19", "--sizes --vocab-size --peak-tflops --devices --mfu"),
    "fit": ("absent", "--bootstrap --seed"),
    "sweep": ("absent.yaml list", "--jobs --devices-per-job --attempts"),
    "report": ("absent", "--serve"),
    "benchmark": ("--num-layers 1", "--steps --warmup"),
    "compare_estimators": ("--load a --text b", "--questions --repeats --answer-tokens --variance-tokens --batch-size"),
    "convert": ("to-hf a b", "--max-shard-size"),
}


@pytest.mark.parametrize("tool", NUMBERS)
def test_odd_numbers_are_refused_by_their_flag(
    tool: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(f"megatron.commands.{tool}")
    needed, flags = NUMBERS[tool]
    for flag in flags.split():
        for value in ODD:
            monkeypatch.setattr("sys.argv", [tool, *needed.split(), f"{flag}={value}"])
            assert status_of(module.main) == 2, (flag, value)
            told = capsys.readouterr().err
            assert flag[2:].removesuffix("s") in told and "error: " in told, (flag, value, told)


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
def test_data_tools_refuse_numbers_out_of_range(tool: str, arguments: str) -> None:
    with pytest.raises(UserError, match="it must be a whole number from"):
        importlib.import_module(f"megatron.commands.{tool}").parse_args(arguments.split())
