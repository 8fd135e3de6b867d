"""Which part of the model and of the data this process holds. Passed explicitly; there is no global state."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class ParallelContext:
    """Coordinates of one process in the (pipeline, data, tensor) grid, its process groups and its device.

    Ranks are laid out with tensor innermost, then data, then pipeline, so that tensor-parallel peers share a node:
    ``rank = (pp_rank * dp_size + dp_rank) * tp_size + tp_rank``. Groups of size one are ``None``.
    """

    rank: int = 0
    world_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    tp_group: dist.ProcessGroup | None = None
    dp_group: dist.ProcessGroup | None = None
    pp_group: dist.ProcessGroup | None = None
    control_group: dist.ProcessGroup | None = None  # gloo over all ranks: small host-side messages
    device: torch.device = torch.device("cpu")

    @property
    def is_first_rank(self) -> bool:
        """True on the one process that writes shared files and prints."""
        return self.rank == 0

    @classmethod
    def create(cls, *, tp_size: int = 1, pp_size: int = 1, timeout_minutes: float = 30.0) -> ParallelContext:
        """Build the groups over the initialised default process group (or return the single-process context).

        Args:
            tp_size: tensor-parallel ranks.
            pp_size: pipeline stages.
            timeout_minutes: limit of one host-side control message.
        """
        if not dist.is_initialized():
            return cls(device=local_device())
        rank, world_size = dist.get_rank(), dist.get_world_size()
        if world_size % (tp_size * pp_size):
            raise ValueError(
                f"{world_size} processes cannot hold tp {tp_size} x pp {pp_size}: the world size must be a multiple of "
                f"{tp_size * pp_size}; start more processes or lower --tensor-/--pipeline-model-parallel-size"
            )
        dp_size = world_size // (tp_size * pp_size)
        grid = torch.arange(world_size).view(pp_size, dp_size, tp_size)
        pp_rank, dp_rank, tp_rank = (int(index) for index in (grid == rank).nonzero()[0])
        timeout = datetime.timedelta(minutes=timeout_minutes)
        return cls(
            rank=rank,
            world_size=world_size,
            tp_rank=tp_rank,
            tp_size=tp_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
            pp_rank=pp_rank,
            pp_size=pp_size,
            tp_group=_group_along(grid, 2, rank),
            dp_group=_group_along(grid, 1, rank),
            pp_group=_group_along(grid, 0, rank),
            control_group=dist.new_group(backend="gloo", timeout=timeout),
            device=local_device(),
        )

    def any_rank(self, flags: list[bool]) -> list[bool]:
        """For every flag, whether it is set on any process (host-side, so the device is not synchronised)."""
        if self.control_group is None:
            return flags
        tensor = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control_group)
        return [bool(flag) for flag in tensor]

    def gather_objects(self, value: object) -> list:
        """``value`` of every process, in rank order, on every process."""
        if self.control_group is None:
            return [value]
        gathered: list = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=self.control_group)
        return gathered

    def barrier(self) -> None:
        """Wait for every process."""
        if self.control_group is not None:
            dist.barrier(group=self.control_group)


def local_device() -> torch.device:
    """The accelerator of this local rank, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _group_along(grid: torch.Tensor, dim: int, rank: int) -> dist.ProcessGroup | None:
    """Create all groups along one axis of the grid (a collective call) and return the one that holds ``rank``."""
    own = None
    if grid.shape[dim] > 1:
        for line in grid.movedim(dim, -1).reshape(-1, grid.shape[dim]).tolist():
            group = dist.new_group(line)
            own = group if rank in line else own
    return own
