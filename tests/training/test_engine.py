"""What engines share."""

from __future__ import annotations

import pytest

from megatron.objectives import parse
from megatron.training.engine import compiles_blocks

BASE = ["--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4"]
BASE += ["--train-iters", "10", "--micro-batch-size", "2", "--global-batch-size", "8"]


@pytest.mark.parametrize(
    ("flags", "device", "expected"),
    [
        ([], "cpu", False),
        ([], "cuda", True),
        (["--zero-stage", "2"], "cuda", True),
        (["--zero-stage", "3"], "cuda", False),
        (["--zero-stage", "3", "--compile"], "cuda", True),
        (["--zero-stage", "3", "--engine", "fsdp2"], "cuda", True),
        (["--engine", "fsdp2"], "cpu", False),
        (["--no-compile"], "cuda", False),
    ],
)
def test_blocks_are_compiled_where_no_hook_breaks_their_graphs(flags: list[str], device: str, expected: bool) -> None:
    assert compiles_blocks(parse([*BASE, *flags]).parallel, device=device) is expected
