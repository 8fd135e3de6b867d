"""Programs that read a model with several processes: they part after success, and nobody waits after an error."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from layouts.pool import Process

from megatron.errors import UserError
from megatron.inference.processes import processes


def tool(error: str) -> int:
    """A tool whose second rank fails while the first waits for it; whoever destroyed a process group would wait for ever."""
    import threading

    import torch.distributed as dist

    from megatron.commands.running import run

    destroy = dist.destroy_process_group
    if error:
        dist.destroy_process_group = lambda *_: threading.Event().wait()  # type: ignore[assignment]

    def main() -> int:
        with processes(1) as context:
            if error and context.rank == 1:
                raise UserError(error, "a rule", "a cure") if error == "wrong" else KeyError(error)
            context.barrier()
        print("parted", destroy is dist.destroy_process_group and not dist.is_initialized())
        return 0

    run(main)


@pytest.mark.parametrize(("error", "statuses"), [("", [0, 0]), ("token 7", [1, 1]), ("wrong", [1, 2])])
def test_a_tool_on_several_processes_ends(error: str, statuses: list[int], tmp_path: Path) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [Process(tool, error, environment={**place, "RANK": str(rank)}) for rank in range(2)]
    assert [rank.wait(60) for rank in ranks] == statuses, [rank.output for rank in ranks]
    first, second = (rank.output.strip() for rank in ranks)
    if not error:
        assert first == second == "parted True"
        return
    first = first.splitlines()[-1]
    said = "KeyError: 'token 7'" if error == "token 7" else "UserError: wrong; a rule; a cure"
    assert first.startswith(f"error: rank 0 lost a peer: rank 1 on {socket.gethostname()} failed ({said})")
    assert second == "" if error == "wrong" else second.endswith(f"\n{said}")  # rank 0 speaks for all


def test_one_process_holds_no_part_of_a_model() -> None:
    with pytest.raises(UserError, match="--tensor-model-parallel-size 2 in a single process"), processes(2):
        pass
