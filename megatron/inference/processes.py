"""The processes of a program that only reads a model: as many as the launcher started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron.errors import require
from megatron.parallel.connection import Connection, connect, is_connected
from megatron.parallel.context import ParallelContext
from megatron.parallel.launch import Launch


@contextmanager
def processes(tp_size: int) -> Iterator[ParallelContext]:
    """The processes of a launcher's environment, or a single one. At the end they part; after an error the others are told, and
    nothing that could wait for them is done: the program is to end (``commands/running.py``).

    Args:
        tp_size: ranks that share a model; the rest are data-parallel.

    Raises:
        UserError: more ranks for a model than there are.
        PeerFailure: another rank is gone.
    """
    require(
        tp_size >= 1, f"--tensor-model-parallel-size {tp_size}", "a model is on at least one rank", "correct the number"
    )
    launch = Launch.from_environment()
    require(
        tp_size == 1 or launch.world_size > 1 or is_connected(),
        f"--tensor-model-parallel-size {tp_size} in a single process",
        "the checkpoint's own layout does not matter here",
        f"drop the flag or start {tp_size} processes with torchrun",
    )
    connection = connect(launch) if launch.world_size > 1 else Connection(launch)
    try:
        yield ParallelContext.create(tp_size=tp_size)
    except BaseException as error:
        failed = connection.peer_failure(error) or error
        connection.leave(failed)
        if failed is error:
            raise
        raise failed from error
    connection.leave()
