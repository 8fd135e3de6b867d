"""What the launcher says of this process: the only reader of RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*.

Importing it imports no torch, so that flags can be checked against the number of processes at once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.errors import UserError, require
from megatron.screen import say, wrapped

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
        chain: processes above this one that started it and wait for it, each with its parent: (child, parent).
        began: when the program did, on the monotonic clock.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    master_addr: str | None = None
    master_port: int | None = None
    agent_attempt: int | None = None
    chain: tuple[tuple[int, int], ...] = field(default=(), compare=False)
    began: float = field(default_factory=time.monotonic, compare=False)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Launch:
        """Read and check the variables of the launcher.

        Raises:
            UserError: not a whole number, RANK outside the world or missing in it, or no address to meet at.
        """
        values = os.environ if environment is None else environment
        world_size, local_rank = _integer(values, "WORLD_SIZE", 1), _integer(values, "LOCAL_RANK", 0)
        require(world_size >= 1, f"WORLD_SIZE is {world_size}", "it counts the processes", LAUNCHERS)
        rank = _integer(values, "RANK", 0 if world_size == 1 else -1)  # of several, not all can be the first
        given = f"RANK is {values.get('RANK') or 'missing'} with WORLD_SIZE {world_size}"
        require(0 <= rank < world_size, given, "ranks count from 0", LAUNCHERS)
        require(local_rank >= 0, f"LOCAL_RANK is {local_rank}", "it counts the processes of a host from 0", LAUNCHERS)
        by_agent = values.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        chain = _chain() if environment is None and (world_size > 1 or by_agent or "CROSS_RANK" in values) else ()
        if world_size == 1:
            return cls(local_rank=local_rank, chain=chain)
        address, port = values.get("MASTER_ADDR"), _integer(values, "MASTER_PORT", 0)
        if not address:
            raise UserError(f"MASTER_ADDR is missing with WORLD_SIZE {world_size}", "the ranks meet there", LAUNCHERS)
        require(0 < port < 2**16, f"MASTER_PORT is {values.get('MASTER_PORT')}", "a port is in 1 … 65535", LAUNCHERS)
        attempt = _integer(values, "TORCHELASTIC_RESTART_COUNT", 0) if by_agent else None
        return cls(rank, world_size, local_rank, address, port, attempt, chain)

    @property
    def is_first_rank(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    @property
    def keeps_meeting_place(self) -> bool:
        """Whether the ranks meet at this process, and not at an agent of torchrun."""
        return self.rank == 0 and self.agent_attempt is None

    @property
    def is_abandoned(self) -> bool:
        """Whether a launcher above this process is gone: nobody else would ever stop it."""
        return any(_parent(child) != parent for child, parent in self.chain)

    @property
    def meeting_place(self) -> str:
        """``host:port``."""
        return f"{self.master_addr}:{self.master_port}"


def complain(error: str, *, is_speaker: bool | None = None) -> None:
    """Say an error once, and last, whoever started this process.

    Our scripts print what the first process to fail leaves in ``MEGATRON_LAST_WORDS`` when everything has ended. torchrun shows
    in its summary what it finds in its own file. Otherwise the error is printed here.

    Args:
        error: the line.
        is_speaker: whether this process prints; default: the first rank does, the others say the same.
    """
    words, summary = os.environ.get("MEGATRON_LAST_WORDS"), os.environ.get("TORCHELASTIC_ERROR_FILE")
    with suppress(OSError):
        if summary:
            Path(summary).write_text(json.dumps({"message": error, "timestamp": int(time.time())}))
        if words:
            with suppress(FileExistsError), open(words, "x", encoding="utf-8", errors="backslashreplace") as file:
                file.write(error + "\n")
            return
    if os.environ.get("RANK", "0") == "0" if is_speaker is None else is_speaker:
        say(wrapped(error) if sys.stderr is not None and sys.stderr.isatty() else error, to_errors=True)


def _chain() -> tuple[tuple[int, int], ...]:
    """The launchers above this process: its parent, and with DeepSpeed, which has two in a row, the one above."""
    own, parent = os.getpid(), os.getppid()
    above = _parent(parent)
    has_two = above is not None and all("deepspeed" in _command(pid) for pid in (parent, above))
    return ((own, parent), (parent, above)) if has_two and above is not None else ((own, parent),)


def _parent(pid: int) -> int | None:
    """Parent of a process; None where it is gone, or where the system does not tell."""
    if pid == os.getpid():
        return os.getppid()
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
    except OSError:
        return None


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def local_device(launch: Launch | None = None) -> torch.device:
    """The accelerator of this local rank, made the current one, or the CPU.

    Raises:
        UserError: this host has fewer accelerators than processes.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    index, count = (launch or Launch.from_environment()).local_rank, torch.cuda.device_count()
    require(
        index < count,
        f"LOCAL_RANK is {index}, and this process sees {count} GPU{'s' * (count > 1)}",
        "every process of a host has a GPU of its own",
        "start no more processes on a host than it has GPUs, and let each see all of them (CUDA_VISIBLE_DEVICES, "
        "--gpus-per-node instead of --gpus-per-task)",
    )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _integer(values: Mapping[str, str], name: str, default: int) -> int:
    try:
        return int(values.get(name) or default)
    except ValueError:
        raise UserError(f"{name} is {values[name]!r}", "it is a whole number", LAUNCHERS) from None
