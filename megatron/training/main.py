"""Entry point: command line → configuration → program. Every user mistake ends here as one message."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from megatron.config import parse

PACKAGE = Path(__file__).parents[1]


def main(objective: str, argv: Sequence[str] | None = None) -> int:
    """Run a training program.

    Args:
        objective: objective when ``--objective`` is absent ("ar" or "mdm").
        argv: arguments; default: those of the process.

    Returns:
        Exit status: 0 done (or stopped on request with a checkpoint), 1 the run failed, 2 wrong input, 130 interrupted.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        from megatron.training.resolve import resolve

        config = parse(argv, objective=objective)
        resolved = resolve(config, run_name=f"{config.objective.objective}_{datetime.now():%Y%m%d_%H%M%S}")
    except ValueError as error:
        if is_first:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    try:
        # DeepSpeed takes seconds to import; a wrong flag is reported before.
        from megatron.training.program import Program

        return Program(resolved).run()
    except KeyboardInterrupt:
        return 130  # before the first step, or Ctrl-C twice: nothing is saved
    except (ValueError, OSError, RuntimeError) as error:
        if not _is_expected(error):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ValueError) else 1
    finally:
        _leave()


def _is_expected(error: BaseException) -> bool:
    """Whether this project raised the error for the user to read (anything else keeps its traceback)."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and Path(frame.tb_frame.f_code.co_filename).is_relative_to(PACKAGE)


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
