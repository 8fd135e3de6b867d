"""What the entry point prints of an error: ours as one message, anything else with its traceback; and its status."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from layouts import jobs
from layouts.pool import WorkerPool

from megatron.errors import Failure, UserError


def run_with(error: Exception, argv: list[str]) -> object:
    """``main()`` of a run that raises; its status, or the error that escaped."""
    from megatron.training import train
    from megatron.training.main import main

    with mock.patch.object(train, "train", mock.Mock(side_effect=error)):
        try:
            return main("mdm", argv)
        except Exception as escaped:
            return type(escaped).__name__


@pytest.mark.parametrize(
    ("error", "status"), [(UserError("a", "b", "c"), 2), (Failure("a", "b", "c"), 1), (ValueError("odd"), "ValueError"),
                          (OSError("odd"), "OSError"), (RuntimeError("odd"), "RuntimeError")],
    ids=lambda value: str(value)[:12],
)  # fmt: skip
def test_only_our_own_errors_are_messages(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path, error: Exception, status: object
) -> None:
    """Whoever raised it: a ValueError of our own code is a fault, and keeps its traceback."""
    assert pools(1).run(run_with, error, jobs.flags(token_files, tmp_path / "run")) == [status]
    assert ("error: a; b; c" in pools(1).output(0)) == isinstance(status, int)


def test_wrong_flags_answer_without_torch(token_files: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from megatron.training.main import main; status = main('mdm', ['--lr', 'nan', '--model', '7M']);"
        "sys.exit(0 if status == 2 and 'torch' not in sys.modules else 1)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "error: --lr is nan; it must be" in result.stderr, result.stderr
