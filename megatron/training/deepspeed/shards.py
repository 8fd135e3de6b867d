"""The fragments in DeepSpeed's ZeRO optimizers, and whole matrices out of them.

ZeRO keeps fp32 masters and moments in flat partitions over the data-parallel ranks, and links every parameter to its range in
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron.parallel.context import ParallelContext
from megatron.parallel.sharding import ShardSpec, shard_of
from megatron.training.optimizer import is_hidden_matrix
from megatron.training.shards import Place, Shards


class ZeroShards(Shards):
    """Fragments of flat partitions."""

    def __init__(
        self, module: torch.nn.Module, zero: Any, context: ParallelContext, *, ema_decay: float | None = None
    ) -> None:
        """Args:
        module: the model or this rank's pipeline stage, wrapped by DeepSpeed.
        zero: DeepSpeed's ZeRO optimizer (stage 1, 2, 3 or bf16).
        context: this process.
        ema_decay: of the average of the weights; None: none is kept.
        """
        self.zero = zero
        self.is_zero3 = hasattr(zero, "fp32_partitioned_groups_flat")
        super().__init__(list(module.parameters()), zero.optimizer, context, ema_decay=ema_decay)

    def masters(self) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        """This rank's partitions, each of them one tensor, with their groups."""
        groups = self.optimizer.param_groups
        if not self.is_zero3:
            return [(group["params"][0], group) for group in groups]
        flats, numbers = self.zero.fp32_partitioned_groups_flat, self.zero.sub_group_to_group_id
        return [(flat, groups[numbers[number]]) for number, flat in enumerate(flats)]

    def speaks_for(self, parameter: Any) -> bool:
        """Of a tied matrix, also whether this is the first stage that has it."""
        return not getattr(parameter, "ds_pipe_replicated", False) and super().speaks_for(parameter)

    def locate(self, parameter: Any) -> Place | None:
        """The range of a partition that is linked to the parameter."""
        if self.is_zero3:
            group, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
            part = parameter.ds_tensor.ds_numel
            start = self.context.dp.rank * part
            numel = min(part, parameter.ds_numel - start)  # the last partitions are padded
            return Place(self.zero.fp32_partitioned_groups_flat[group], start, offset, numel) if numel > 0 else None
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
        master = self.optimizer.param_groups[mapping.param_group_index]["params"][0]
        return Place(master, lp.start, hp.start, hp.numel)

    def refresh(self) -> None:
        """Copy the masters into the weights that the model computes with."""
        if not self.is_zero3:
            self.zero.update_lp_params()
            return
        self.zero.checkpoint_event_prologue()  # drops what passes gathered and kept, some for the next pass, small ones for ever
        for low, master in zip(self.zero.fp16_partitioned_groups_flat, self.zero.fp32_partitioned_groups_flat):
            low.data.copy_(master.data)
        self.zero.checkpoint_event_epilogue()  # gathers the small ones again

    def _create_moments(self, steps: int) -> None:
        super()._create_moments(steps)
        if steps and not self.is_zero3:
            self.zero._lazy_init_hp_params_optimizer_state()


class Shard(NamedTuple):
    """One rank's shard of a matrix, in pieces: data-parallel rank, and start, offset and numel in its partition, as in
    :class:`Place`."""

    spec: ShardSpec
    pieces: list[tuple[int, int, int, int]]

    def read(self, partitions: torch.Tensor, tp_size: int) -> torch.Tensor:
        """The shard, from the partitions [dp, n] of all data-parallel ranks."""
        shard = partitions.new_empty(self.spec.local_shape(tp_size))
        for rank, start, offset, numel in self.pieces:
            shard.view(-1)[start : start + numel] = partitions[rank, offset : offset + numel]
        return shard

    def write(self, shard: torch.Tensor, partitions: torch.Tensor) -> None:
        """Put it where :meth:`read` found it."""
        flat = shard.reshape(-1)
        for rank, start, offset, numel in self.pieces:
            partitions[rank, offset : offset + numel] = flat[start : start + numel]


class Matrices:
    """The matrices of every flat partition: whole out of ZeRO's partitions and the shards of tensor parallelism, and back."""

    def __init__(self, shards: Shards, context: ParallelContext) -> None:
        """A collective call.

        Args:
            shards: know where the parameters lie in the partitions of this rank.
            context: this process.
        """
        self._context, flats = context, [master for master, _ in shards.masters()]
        self._shards: dict[torch.Tensor, list[Shard]] = {flat: [] for flat in flats}
        numbers = {flat: number for number, flat in enumerate(flats)}
        own: dict[str, tuple[int, tuple[int, int, int, int]]] = {}
        for parameter in shards.parameters:
            if (located := shards.locate(parameter)) is not None:
                flat, place = located[0], located[1:]
                own[shard_of(parameter).name] = numbers[flat], (context.dp.rank, *place)
        here = context.pp.rank, context.tp.rank
        peers = [found for place, found in context.gather_objects((here, own)) if place == here]
        for parameter in shards.parameters:
            if is_hidden_matrix(parameter):
                record = shard_of(parameter)
                places = [found[record.name] for found in peers if record.name in found]
                self._shards[flats[places[0][0]]].append(Shard(record.spec, [piece for _, piece in places]))

    def apply(
        self, flat: torch.Tensor, values: torch.Tensor, function: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]
    ) -> torch.Tensor:
        """``function`` of the whole matrices of a partition, this rank's part of it; a collective call without a wait.

        Matrices that are stacked in one tensor (query, key and value; gate and up) are told apart. Each is computed by one
        data-parallel rank, and by all of its tensor-parallel ones.

        Args:
            flat: partition of the masters.
            values: [n] what this rank holds in its place.
            function: of some matrices, as many of the same shapes.
        """
        dp, tp = self._context.dp, self._context.tp
        gathered = values.new_empty(dp.size, values.numel()) if dp.size > 1 else values[None]
        if dp.size > 1:
            dist.all_gather_into_tensor(gathered.view(-1), values, group=dp.group)
        made = torch.zeros_like(gathered)
        for shard in self._shards[flat][dp.rank :: dp.size]:
            spec, own = shard.spec, shard.read(gathered, tp.size)
            parts = [own]
            if tp.size > 1 and spec.dim is not None:
                parts = [torch.empty_like(own) for _ in range(tp.size)]
                dist.all_gather(parts, own, group=tp.group)
            whole, dim = spec.combine(parts), spec.dim or 0
            done = torch.cat(function(whole.split(spec.blocks or whole.shape[:1], dim)), dim)
            shard.write(spec.shard(done, tp.rank, tp.size), made)
        if dp.size == 1:
            return made[0]
        mine = torch.empty_like(values)  # every element is one rank's, the others have zeros
        dist.reduce_scatter_tensor(mine, made.view(-1), group=dp.group)
        return mine
