"""What the launcher says of this process: the only reader of RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*.

Importing it imports no torch, so that flags can be checked against the number of processes at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.errors import UserError, require

if TYPE_CHECKING:
    import torch

LAUNCHERS = "start with torchrun, deepspeed or the scripts in examples_scaling/training, which set it"


@dataclass(frozen=True)
class Launch:
    """What a launcher announced to this process. The default is a process alone.

    Attributes:
        rank: index of this process.
        world_size: number of processes.
        local_rank: index of this process on its host, which picks the accelerator.
        master_addr, master_port: where the processes meet; None for a process alone.
        agent_attempt: restart count of a torchrun agent that keeps the meeting place, or None where rank 0 keeps it.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    master_addr: str | None = None
    master_port: int | None = None
    agent_attempt: int | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Launch:
        """Read and check the variables of the launcher.

        Raises:
            UserError: not a whole number, RANK outside the world, or no address to meet at.
        """
        values = os.environ if environment is None else environment
        world_size, rank, local_rank = (
            _integer(values, name, default) for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
        )
        require(world_size >= 1, f"WORLD_SIZE is {world_size}", "it counts the processes", LAUNCHERS)
        is_inside = 0 <= rank < world_size
        require(is_inside, f"RANK is {rank} with WORLD_SIZE {world_size}", "ranks count from 0", LAUNCHERS)
        require(local_rank >= 0, f"LOCAL_RANK is {local_rank}", "it counts the processes of a host from 0", LAUNCHERS)
        if world_size == 1:
            return cls(local_rank=local_rank)
        address, port = values.get("MASTER_ADDR"), _integer(values, "MASTER_PORT", 0)
        if not address:
            raise UserError(f"MASTER_ADDR is missing with WORLD_SIZE {world_size}", "the ranks meet there", LAUNCHERS)
        require(0 < port < 2**16, f"MASTER_PORT is {values.get('MASTER_PORT')}", "a port is in 1 … 65535", LAUNCHERS)
        by_agent = values.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        attempt = _integer(values, "TORCHELASTIC_RESTART_COUNT", 0) if by_agent else None
        return cls(rank, world_size, local_rank, address, port, attempt)

    @property
    def is_first_rank(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    @property
    def supervisor(self) -> int | None:
        """Process that started this one and waits for it, where a launcher did: the parent. None for a process alone."""
        return os.getppid() if self.world_size > 1 or self.agent_attempt is not None else None

    @property
    def meeting_place(self) -> str:
        """``host:port``."""
        return f"{self.master_addr}:{self.master_port}"


def local_device(launch: Launch | None = None) -> torch.device:
    """The accelerator of this local rank, made the current one, or the CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", (launch or Launch.from_environment()).local_rank)
    torch.cuda.set_device(device)
    return device


def _integer(values: Mapping[str, str], name: str, default: int) -> int:
    try:
        return int(values.get(name) or default)
    except ValueError:
        raise UserError(f"{name} is {values[name]!r}", "it is a whole number", LAUNCHERS) from None
