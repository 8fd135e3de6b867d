"""What the entry point prints of an error: ours as one message, anything else with its traceback; and its status."""

from __future__ import annotations

import subprocess
import sys
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


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_program_around_it_may_start_its_processes_in_another_way(
    method: str, token_files: Path, tmp_path: Path
) -> None:
    argv = jobs.flags(token_files, tmp_path / "run", train_iters=2, num_workers=None)
    code = f"""
if __name__ == "__main__":
    import multiprocessing
    from megatron.commands.pretrain import main
    multiprocessing.set_start_method({method!r})
    raise SystemExit(main("mdm", {argv!r}))
"""
    program = tmp_path / "program.py"
    program.write_text(code)
    result = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "done: 2 steps" in result.stdout


def test_wrong_flags_answer_without_torch(token_files: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from megatron.training.main import main; status = main('mdm', ['--lr', 'nan', '--model', '7M']);"
        "sys.exit(0 if status == 2 and 'torch' not in sys.modules else 1)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "error: --lr is nan; it must be" in result.stderr, result.stderr
