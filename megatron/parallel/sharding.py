"""How one tensor is split over tensor-parallel ranks: the one description that initialisation, checkpoints,
resharding and export share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron.errors import require
from megatron.randomness import named_seed


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
