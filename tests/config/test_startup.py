"""``--help`` and wrong flags answer at once: nothing that takes time to import is imported for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
# numpy alone is allowed: objectives prepare batches with it.
HEAVY = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "scipy", "pandas", "matplotlib", "wandb")
PROGRAM = """
import runpy, sys
program, heavy = sys.argv[1], sys.argv[2].split(",")
sys.argv = [program, *sys.argv[3:]]
try:
    runpy.run_path(program, run_name="__main__")
except SystemExit as stop:
    print(f"status {stop.code}; imported {sorted(set(heavy) & set(sys.modules))}")
"""


@pytest.mark.parametrize("program", ["pretrain_mdm.py", "pretrain_gpt.py"])
@pytest.mark.parametrize(
    ("flags", "status"),
    [
        (["--help"], 0),
        (["--hiden-size", "8"], 2),
        (["--train-iters", "10", "--lr", "nan"], 2),  # out of range
        (["--num-layers", "2", "--hidden-size", "60", "--num-attention-heads", "7"], 2),  # flags that do not fit
        (["--objective", "ar", "--mask-token-id", "5"], 2),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, list) else "",
)
def test_nothing_heavy_is_imported(program: str, flags: list[str], status: int) -> None:
    command = [sys.executable, "-c", PROGRAM, str(REPO / program), ",".join(HEAVY), *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout.splitlines()[-1] == f"status {status}; imported []", result.stderr
