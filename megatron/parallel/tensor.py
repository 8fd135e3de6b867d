"""Tensor-parallel layers (Shoeybi et al., arXiv 1909.08053): column, row and vocabulary parallel.

A column-parallel layer keeps its output split, a row-parallel one adds up the partial products, so one attention or
feed-forward block costs one all-reduce in the forward and one in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from megatron.parallel.context import ParallelContext
from megatron.parallel.sharding import ShardedParameter, ShardSpec, initial_shard, sharded_parameter


@dataclass(frozen=True)
class ParameterFactory:
    """Makes named parameters: sliced for this rank, seeded by name.

    Attributes:
        context: this process.
        seed: seed of the run.
        prefix: canonical name of the owning layer, such as ``layers.3.mlp``.
        dtype, device: of the parameters; a tensor is drawn in fp32 on the host, and goes there before the next one is made.
        is_drawn: False where another rank's weights will come in their place: there is no telling what they are until then.
    """

    context: ParallelContext
    seed: int
    prefix: str = ""
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None
    is_drawn: bool = True

    def child(self, name: str) -> ParameterFactory:
        """The factory of a sub-module."""
        return replace(self, prefix=f"{self.prefix}.{name}" if self.prefix else name)

    def normal(self, name: str, spec: ShardSpec, std: float) -> nn.Parameter:
        """A parameter drawn from N(0, std)."""
        record, tp = self._record(name, spec), self.context.tp
        if not self.is_drawn:
            return sharded_parameter(
                torch.empty(spec.local_shape(tp.size), dtype=self.dtype, device=self.device), record
            )
        data = initial_shard(spec, name=record.name, std=std, seed=self.seed, tp_rank=tp.rank, tp_size=tp.size)
        return sharded_parameter(data.to(dtype=self.dtype, device=self.device), record)

    def constant(self, name: str, spec: ShardSpec, value: float) -> nn.Parameter:
        """A parameter filled with ``value``."""
        data = torch.full(spec.local_shape(self.context.tp.size), value, dtype=self.dtype, device=self.device)
        return sharded_parameter(data, self._record(name, spec))

    def _record(self, name: str, spec: ShardSpec) -> ShardedParameter:
        return ShardedParameter(f"{self.prefix}.{name}" if self.prefix else name, spec)


def _sum_over(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


class _AllReduce(torch.autograd.Function):
    """All-reduce of the activations in the forward pass, or of the gradient in the backward pass; identity in the other."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, group: dist.ProcessGroup, is_backward: bool) -> torch.Tensor:  # type: ignore[no-untyped-def]
        ctx.group, ctx.is_backward = group, is_backward
        return x.view_as(x) if is_backward else _sum_over(x, group)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[no-untyped-def]
        return _sum_over(grad, ctx.group) if ctx.is_backward else grad, None, None


def copy_to_tensor_parallel(x: torch.Tensor, context: ParallelContext) -> torch.Tensor:
    """Identity forward, all-reduce of the gradient backward (the ``f`` of arXiv 1909.08053)."""
    return _AllReduce.apply(x, context.tp.group, True) if context.tp.size > 1 else x


def reduce_from_tensor_parallel(x: torch.Tensor, context: ParallelContext) -> torch.Tensor:
    """All-reduce forward, identity backward (the ``g`` of arXiv 1909.08053)."""
    return _AllReduce.apply(x, context.tp.group, False) if context.tp.size > 1 else x


class ColumnParallelLinear(nn.Module):
    """``y = x Wᵀ + b`` with the output channels split over ranks: [..., in] → [..., out / tp]."""

    def __init__(
        self, factory: ParameterFactory, *, in_size: int, blocks: Sequence[int], std: float, bias: bool
    ) -> None:
        super().__init__()
        self.context = factory.context
        out_size = sum(blocks)
        self.weight = factory.normal("weight", ShardSpec((out_size, in_size), 0, tuple(blocks)), std)
        self.bias = factory.constant("bias", ShardSpec((out_size,), 0, tuple(blocks)), 0.0) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(copy_to_tensor_parallel(x, self.context), self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """``y = x Wᵀ + b`` with the input channels split over ranks: [..., in / tp] → [..., out], summed over ranks."""

    def __init__(self, factory: ParameterFactory, *, in_size: int, out_size: int, std: float, bias: bool) -> None:
        super().__init__()
        self.context = factory.context
        self.weight = factory.normal("weight", ShardSpec((out_size, in_size), 1, (in_size,)), std)
        self.bias = factory.constant("bias", ShardSpec((out_size,)), 0.0) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = reduce_from_tensor_parallel(F.linear(x, self.weight), self.context)
        # The bias is whole on every rank: added once, after the sum.
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Module):
    """Token embedding with the vocabulary split over ranks: ids [batch, seq] → [batch, seq, hidden]."""

    def __init__(self, factory: ParameterFactory, *, vocab_size: int, hidden_size: int, std: float) -> None:
        super().__init__()
        self.context = factory.context
        self.weight = factory.normal("weight", ShardSpec((vocab_size, hidden_size), 0, (vocab_size,)), std)
        self.rows = vocab_size // self.context.tp.size

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.context.tp.size == 1:
            return F.embedding(ids, self.weight)
        local = ids - self.context.tp.rank * self.rows
        is_elsewhere = (local < 0) | (local >= self.rows)
        rows = F.embedding(local.masked_fill(is_elsewhere, 0), self.weight)
        return reduce_from_tensor_parallel(rows.masked_fill(is_elsewhere.unsqueeze(-1), 0.0), self.context)


def gather_last_dim(x: torch.Tensor, context: ParallelContext) -> torch.Tensor:
    """Concatenate shards along the last axis (inference only: no gradient)."""
    if context.tp.size == 1:
        return x
    shards = [torch.empty_like(x) for _ in range(context.tp.size)]
    dist.all_gather(shards, x.contiguous(), group=context.tp.group)
    return torch.cat(shards, dim=-1)
