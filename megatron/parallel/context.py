"""Which part of the model and of the data this process holds. Passed explicitly; there is no global state."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh

from megatron.errors import require
from megatron.parallel.launch import local_device

# Outermost first: tensor-parallel ranks are neighbours and share a node, stages are farthest apart. Without the axes of
# size one it is the order of DeepSpeed's PipeModelDataParallelTopology (a test compares them).
AXES = ("pp", "dp", "ep", "cp", "tp")


@dataclass(frozen=True)
class Axis:
    """One axis of the grid, as one process sees it.

    Attributes:
        rank: coordinate of this process.
        size: processes along the axis.
        group: those processes; None where there is but one.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def is_last(self) -> bool:
        """Whether this process ends the axis."""
        return self.rank == self.size - 1


@dataclass(frozen=True)
class ParallelContext:
    """Place of one process in the grid, and its device. The default is a process alone on the CPU.

    Attributes:
        rank: of all processes; ``rank = ((((pp · dp_size) + dp) · ep_size + ep) · cp_size + cp) · tp_size + tp``.
        world_size: number of all processes.
        pp: pipeline stages.
        dp: data-parallel replicas.
        ep: experts (of size one: no layer has any).
        cp: parts of a sequence (of size one).
        tp: tensor-parallel shards.
        sequence_parallel: between the products that they share, each of these holds a part of the sequence; only with two
            or more of them.
        control_group: gloo over all ranks, for small host-side messages; None for a process alone.
        device: accelerator of this process, or the CPU.
    """

    rank: int = 0
    world_size: int = 1
    pp: Axis = field(default=Axis())
    dp: Axis = field(default=Axis())
    ep: Axis = field(default=Axis())
    cp: Axis = field(default=Axis())
    tp: Axis = field(default=Axis())
    sequence_parallel: bool = False
    control_group: dist.ProcessGroup | None = None
    device: torch.device = torch.device("cpu")

    @classmethod
    def create(
        cls, *, tp_size: int = 1, pp_size: int = 1, device: torch.device | None = None, timeout_minutes: float = 30.0
    ) -> ParallelContext:
        """Lay the grid over the initialised default process group (or over a process alone). A collective call.

        One device mesh makes the groups, of the axes that are longer than one: one group an axis for each process.

        Args:
            tp_size: tensor-parallel ranks.
            pp_size: pipeline stages.
            device: of this process; default: the accelerator of its local rank, or the CPU.
            timeout_minutes: limit of one host-side control message.

        Raises:
            UserError: the number of processes is no multiple of tp × pp.
        """
        device = device or local_device()
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        require(
            world_size % (tp_size * pp_size) == 0,
            f"{world_size} processes cannot hold tensor-parallel {tp_size} x pipeline {pp_size}",
            f"the number of processes must be a multiple of {tp_size * pp_size}",
            "start more processes or lower --tensor-model-parallel-size or --pipeline-model-parallel-size",
        )
        if world_size == 1:
            return cls(device=device)
        sizes = {"pp": pp_size, "dp": world_size // (tp_size * pp_size), "ep": 1, "cp": 1, "tp": tp_size}
        names = tuple(name for name in AXES if sizes[name] > 1)
        mesh = init_device_mesh(device.type, tuple(sizes[name] for name in names), mesh_dim_names=names)
        axes = {name: Axis(mesh.get_local_rank(name), sizes[name], mesh.get_group(name)) for name in names}
        timeout = datetime.timedelta(minutes=timeout_minutes)
        control_group = dist.new_group(backend="gloo", timeout=timeout)
        return cls(rank=rank, world_size=world_size, control_group=control_group, device=device, **axes)  # type: ignore[arg-type]

    @property
    def is_first_rank(self) -> bool:
        """True on the one process that writes shared files and prints."""
        return self.rank == 0

    def gather_objects(self, value: object, *, everywhere: bool = True) -> list:
        """``value`` of every process, in rank order, on every process or the first alone; the others get an empty list then."""
        if self.control_group is None:
            return [value]
        gathered: list = [None] * self.world_size if everywhere or self.is_first_rank else []
        if everywhere:
            dist.all_gather_object(gathered, value, group=self.control_group)
        else:
            dist.gather_object(value, gathered or None, group=self.control_group)
        return gathered

    def barrier(self) -> None:
        """Wait for every process."""
        if self.control_group is not None:
            dist.barrier(group=self.control_group)

    def replicas(self) -> dist.ProcessGroup:
        """The data-parallel group, a real one also of one process: engines ask for it. A collective call: one split of the world
        where NCCL is bound to a device, else every process helps to make each group."""
        group, lines = self.dp.group, [[rank] for rank in range(self.world_size)]
        if self.world_size == 1:
            group = dist.group.WORLD
        elif group is None and getattr(dist.group.WORLD, "bound_device_id", None) is not None:
            group = distributed_c10d.split_group(split_ranks=lines)
        elif group is None:
            group = [dist.new_group(line) for line in lines][self.rank]
        assert isinstance(group, dist.ProcessGroup)
        return group


class Poll:
    """A question to the hosts of all ranks that waits for nobody: the answer is that to the call before, so the exchange runs
    while the device computes. Collective calls: every rank makes the same ones in the same order."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._asked: tuple[torch.Tensor, dist.Work] | None = None

    def ask(self, *flags: bool) -> list[bool] | None:
        """Whether any rank said so, flag by flag; None at the first call."""
        own = torch.tensor(flags, dtype=torch.uint8)
        work = dist.all_reduce(own, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        before, self._asked = self._asked, (own, work)
        if before is None:
            return None
        before[1].wait()
        return [bool(flag) for flag in before[0]]

    def end(self) -> None:
        """Take in the last answer: every rank asked once more than it heard."""
        if self._asked is not None:
            self._asked[1].wait()
