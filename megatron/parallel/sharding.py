"""How one tensor is split over tensor-parallel ranks: the one description that initialisation, checkpoints,
resharding and export share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from megatron.errors import require
from megatron.randomness import named_seed


class Rectangle(NamedTuple):
    """Elements that one shard shares with another, of another split: ``rows`` runs of ``width`` elements of the flattened shards.

    Attributes:
        start, stride: first element of the first run, and from run to run, in the shard that is asked for.
        rank: of the shard in the other split.
        source_start, source_stride: the same in that one.
    """

    rows: int
    width: int
    start: int
    stride: int
    rank: int
    source_start: int
    source_stride: int


@dataclass(frozen=True)
class ShardSpec:
    """Split of a tensor of ``full_shape`` along ``dim``.

    A tensor may be several matrices stacked along ``dim`` (query, key and value; gate and up). ``blocks`` holds their
    lengths; each is split on its own, so that a rank's shard is again a stack of the same matrices.

    Attributes:
        full_shape: shape of the whole tensor.
        dim: axis of the split, or None for a tensor that every rank holds whole.
        blocks: lengths along ``dim`` of the stacked matrices; they add up to ``full_shape[dim]``.
    """

    full_shape: tuple[int, ...]
    dim: int | None = None
    blocks: tuple[int, ...] = ()

    def local_shape(self, tp_size: int) -> tuple[int, ...]:
        """Shape of one rank's shard."""
        if self.dim is None:
            return self.full_shape
        shape = list(self.full_shape)
        shape[self.dim] //= tp_size
        return tuple(shape)

    def shard(self, full: torch.Tensor, tp_rank: int, tp_size: int) -> torch.Tensor:
        """The part of ``full`` that ``tp_rank`` of ``tp_size`` holds."""
        require(
            tuple(full.shape) == self.full_shape,
            f"a tensor has shape {tuple(full.shape)}",
            f"this model expects {self.full_shape}",
            "pass the model flags that the tensor was made with",
        )
        if self.dim is None or tp_size == 1:
            return full
        parts = [block.chunk(tp_size, self.dim)[tp_rank] for block in full.split(self.blocks, self.dim)]
        return torch.cat(parts, self.dim) if len(parts) > 1 else parts[0].contiguous()

    def combine(self, shards: list[torch.Tensor]) -> torch.Tensor:
        """The whole tensor from the shards of all ranks, in rank order. The inverse of :meth:`shard`."""
        if self.dim is None or len(shards) == 1:
            return shards[0]
        local_blocks = [block // len(shards) for block in self.blocks]
        pieces = [shard.split(local_blocks, self.dim) for shard in shards]
        return torch.cat([piece[i] for i in range(len(local_blocks)) for piece in pieces], self.dim)

    def rectangles(self, tp_rank: int, tp_size: int, first: int, last: int, *, saved_size: int) -> Iterator[Rectangle]:
        """Where elements ``first`` … ``last`` − 1 of a flattened shard lie in the flattened shards of another split.

        Args:
            tp_rank, tp_size: which shard.
            first, last: a range of its elements.
            saved_size: number of shards in the other split.
        """
        if self.dim is None or tp_size == saved_size:
            yield Rectangle(1, last - first, first, last - first, tp_rank, first, last - first)
            return
        inner = prod(self.full_shape[self.dim + 1 :])
        width, saved_width = (self.full_shape[self.dim] // size * inner for size in (tp_size, saved_size))
        for row, rows, low, high in _rows(first, last, width):
            for start, rank, source, length in self._overlaps(tp_rank, tp_size, saved_size):
                begin, end = max(low, start * inner), min(high, (start + length) * inner)
                if begin < end:
                    there = row * saved_width + source * inner + begin - start * inner
                    yield Rectangle(rows, end - begin, row * width + begin, width, rank, there, saved_width)

    def _overlaps(self, tp_rank: int, tp_size: int, saved_size: int) -> Iterator[tuple[int, int, int, int]]:
        """Along ``dim``, what a shard shares with those of another split: first index, their rank, first index there, length."""
        before = saved_before = 0  # lengths in a shard of the blocks so far
        for block in self.blocks:
            own, saved = block // tp_size, block // saved_size
            position, end = tp_rank * own, (tp_rank + 1) * own
            while position < end:
                rank, there = divmod(position, saved)
                length = min(end - position, saved - there)
                yield before + position - tp_rank * own, rank, saved_before + there, length
                position += length
            before, saved_before = before + own, saved_before + saved


def _rows(first: int, last: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """A flat range of a matrix of rows of ``width`` as at most three blocks: (first row, rows, first column, end column)."""
    row, column = divmod(first, width)
    end_row, end_column = divmod(last, width)
    if row == end_row:
        yield row, 1, column, end_column
        return
    if column:
        yield row, 1, column, width
        row += 1
    if row < end_row:
        yield row, end_row - row, 0, width
    if end_column:
        yield end_row, 1, 0, end_column


@dataclass(frozen=True)
class ShardedParameter:
    """What a parameter is a part of.

    Attributes:
        name: name of the whole tensor, the same in every layout and in checkpoints.
        spec: its shape and split.
    """

    name: str
    spec: ShardSpec


def shard_of(parameter: torch.Tensor) -> ShardedParameter:
    """The record of a parameter of this project's model."""
    record = parameter.__dict__["shard"]
    assert isinstance(record, ShardedParameter)
    return record


def sharded_parameter(data: torch.Tensor, record: ShardedParameter) -> torch.nn.Parameter:
    """A parameter with its record, ``data`` being this rank's part."""
    parameter = torch.nn.Parameter(data)
    is_split = data.shape != torch.Size(record.spec.full_shape)
    # DeepSpeed counts the squared gradient of a replicated tensor once, of a split one on every rank.
    parameter.__dict__.update(shard=record, tensor_model_parallel=is_split)
    return parameter


def initial_shard(spec: ShardSpec, *, name: str, std: float, seed: int, tp_rank: int, tp_size: int) -> torch.Tensor:
    """This rank's part of an N(0, std) tensor that is generated whole, so that every layout starts equal (fp32)."""
    generator = torch.Generator().manual_seed(named_seed(seed, name))
    full = torch.empty(spec.full_shape).normal_(0.0, std, generator=generator)
    return spec.shard(full, tp_rank, tp_size).clone()
