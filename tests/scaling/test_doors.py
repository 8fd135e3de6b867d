"""The four programs answer --help without what they need for their work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

ASK_FOR_HELP = """
import importlib, sys
for name in ("plan", "report", "fit", "sweep"):
    try:
        importlib.import_module(f"megatron.commands.{name}").main(["--help"])
    except SystemExit as end:
        assert end.code == 0, name
heavy = {"torch", "scipy", "matplotlib", "numpy", "yaml"} & sys.modules.keys()
assert not heavy, heavy
"""

NAMES = """
from megatron.commands.fit import LAW_NAMES, POINTS
from megatron.scaling.laws import LAWS
from megatron.scaling.observations import CHOICES
assert LAW_NAMES == tuple(LAWS)
assert POINTS == CHOICES
import megatron.runs.replicates, megatron.runs.conclusion, megatron.scaling.solve
import sys
heavy = {"torch", "scipy", "matplotlib"} & sys.modules.keys()
assert not heavy, heavy
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_help_imports_nothing_heavy():
    run(ASK_FOR_HELP)


def test_names_on_the_command_line_are_those_of_the_library_and_fits_need_numpy_only():
    run(NAMES)
