"""The processes of a program that only reads a model: as many as the launcher started."""

from __future__ import annotations

import torch

from megatron.errors import UserError, require
from megatron.parallel.connection import connect
from megatron.parallel.context import ParallelContext
from megatron.parallel.launch import Launch


def start_processes(tp_size: int) -> ParallelContext:
    """The process groups of a launcher's environment, or a single process.

    Args:
        tp_size: ranks that share a model; the rest are data-parallel.

    Raises:
        UserError: more ranks for a model than there are.
    """
    require(
        tp_size >= 1, f"--tensor-model-parallel-size {tp_size}", "a model is on at least one rank", "correct the number"
    )
    launch = Launch.from_environment()
    if launch.world_size > 1:
        connect(launch)
    elif tp_size > 1 and not torch.distributed.is_initialized():
        raise UserError(
            f"--tensor-model-parallel-size {tp_size} in a single process",
            "the checkpoint's own layout does not matter here",
            f"drop the flag or start {tp_size} processes with torchrun",
        )
    return ParallelContext.create(tp_size=tp_size)
