"""Whole matrices out of the flat partitions of ZeRO and the shards of tensor parallelism, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron.parallel.context import ParallelContext
from megatron.parallel.sharding import ShardSpec, shard_of
from megatron.training.muon import is_hidden_matrix
from megatron.training.shards import Shards


class Piece(NamedTuple):
    """Where a range of a shard lies: in the partition of a data-parallel rank."""

    dp_rank: int
    start: int
    offset: int
    numel: int


class Shard(NamedTuple):
    """One rank's shard of a matrix, in pieces."""

    spec: ShardSpec
    pieces: list[Piece]

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
    """The matrices of every flat partition."""

    def __init__(self, shards: Shards, context: ParallelContext) -> None:
        """A collective call.

        Args:
            shards: know where the parameters lie in the partitions of this rank.
            context: this process.
        """
        self._context, flats = context, [master for master, _ in shards.masters()]
        self._shards: dict[torch.Tensor, list[Shard]] = {flat: [] for flat in flats}
        numbers = {flat: number for number, flat in enumerate(flats)}
        own: dict[str, tuple[int, Piece]] = {}
        for parameter in shards.parameters:
            if (located := shards.locate(parameter)) is not None:
                flat, *place = located
                own[shard_of(parameter).name] = numbers[flat], Piece(context.dp.rank, *place)
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
        mine = torch.empty_like(values)
        dist.reduce_scatter_tensor(
            mine, made.view(-1), group=dp.group
        )  # every element is one rank's, the others have zeros
        return mine
