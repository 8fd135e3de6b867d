"""Tensor-parallel layers (Shoeybi et al., arXiv 1909.08053): column, row and vocabulary parallel.

A column-parallel layer keeps its output split, a row-parallel one adds up the partial products, so one attention or
feed-forward block costs one all-reduce in the forward and one in the backward pass.

With sequence parallelism (Korthikanti et al., arXiv 2205.05198, §4.2) each all-reduce is parted: sums are scattered over the
sequence, and gathered before the next column-parallel layer. What lies between, [batch, seq / tp, hidden], is computed and
kept once instead of on every rank. Parameters that are whole on every rank see part of the tokens there, so their gradients
are summed where they arise: all that comes after, accumulation, norm, clipping, update, finds them as it does without. It is
for training alone: evaluation meets sequences of any length, and keeps no activations that it could spare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import FunctionCtx

from megatron.parallel.context import Axis, ParallelContext
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

    context: ParallelContext = ParallelContext()
    seed: int = 1234
    prefix: str = ""
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None
    is_drawn: bool = True

    @classmethod
    def of_shapes(cls, tp_size: int = 1) -> ParameterFactory:
        """Makes a tensor-parallel rank's parameters without memory and numbers, to count them. A meta tensor that is drawn, or
        a ``torch.device("meta")`` around ``arange``, would load torch's compiler, a second at every start."""
        return cls(ParallelContext(tp=Axis(size=tp_size)), device=torch.device("meta"), is_drawn=False)

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


Message = Callable[[torch.Tensor, dist.ProcessGroup], torch.Tensor]
# The collectives that compiled graphs hold: they return at once, and a graph may compute until the wait.
functional = torch.ops._c10d_functional


def _same(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return x.view_as(x)


def _sum(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def _own_part(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's tokens: [batch, seq, hidden] → [batch, seq / tp, hidden]."""
    return x.chunk(group.size(), dim=1)[group.rank()].contiguous()


def _gather(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The tokens of all ranks: [batch, seq / tp, hidden] → [batch, seq, hidden]."""
    return _joined(_gathering(x, group.size(), group.group_name), x.shape[0])


def _scatter_sum(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's tokens of the sum over ranks: [batch, seq, hidden] → [batch, seq / tp, hidden]."""
    return functional.wait_tensor(_scattering_sum(x, group.size(), group.group_name))


def _gathering(x: torch.Tensor, size: int, group: str) -> torch.Tensor:
    """The parts of all ranks on their way, [tp · batch, seq / tp, hidden]."""
    return functional.all_gather_into_tensor(x.contiguous(), size, group)


def _joined(parts: torch.Tensor, batch: int) -> torch.Tensor:
    _, length, hidden = parts.shape
    return functional.wait_tensor(parts).view(-1, batch, length, hidden).transpose(0, 1).reshape(batch, -1, hidden)


def _scattering_sum(x: torch.Tensor, size: int, group: str) -> torch.Tensor:
    """This rank's part of the sum, on its way."""
    batch, seq, hidden = x.shape
    parts = x.view(batch, size, seq // size, hidden).transpose(0, 1)
    return functional.reduce_scatter_tensor(parts.reshape(-1, *parts.shape[2:]), "sum", size, group)


class _Kept(FunctionCtx):
    """What the functions below keep from their forward for their backward pass."""

    group: dist.ProcessGroup
    back: Message
    saved_tensors: tuple[torch.Tensor, ...]


class _Exchange(torch.autograd.Function):
    """One message of the activations in the forward pass, and the transposed one of their gradient in the backward pass."""

    @staticmethod
    def forward(ctx: _Kept, x: torch.Tensor, group: dist.ProcessGroup, there: Message, back: Message) -> torch.Tensor:
        ctx.group, ctx.back = group, back
        return there(x, group)

    @staticmethod
    def backward(ctx: _Kept, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.back(grad, ctx.group), None, None, None


def copy_to_tensor_parallel(x: torch.Tensor, context: ParallelContext) -> torch.Tensor:
    """Identity forward, all-reduce of the gradient backward (the ``f`` of arXiv 1909.08053)."""
    return _Exchange.apply(x, context.tp.group, _same, _sum) if context.tp.size > 1 else x


def reduce_from_tensor_parallel(x: torch.Tensor, context: ParallelContext, *, is_split: bool = False) -> torch.Tensor:
    """Sum over ranks forward, identity backward (the ``g`` of arXiv 1909.08053); with ``is_split`` scattered over the sequence,
    and the gradient gathered (the ``ḡ`` of arXiv 2205.05198)."""
    if context.tp.size == 1:
        return x
    there, back = (_scatter_sum, _gather) if is_split else (_sum, _same)
    return _Exchange.apply(x, context.tp.group, there, back)


class TensorParallelModule(nn.Module):
    """A layer that knows whether the tokens that it is given, or gives, are this rank's part of the sequence.

    Attributes:
        context: this process.
    """

    def __init__(self, context: ParallelContext) -> None:
        super().__init__()
        self.context = context

    @property
    def is_split(self) -> bool:
        """Whether [batch, seq / tp, hidden] lies between the products."""
        return self.context.sequence_parallel and self.training

    def own(self, parameter: torch.Tensor) -> torch.Tensor:
        """A parameter that is whole on every rank, to be applied to its tokens: its gradient is that of all tokens."""
        return copy_to_tensor_parallel(parameter, self.context) if self.is_split else parameter

    def scattered(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's tokens of what every rank has whole, [batch, seq, hidden]; the gradient is whole again."""
        return _Exchange.apply(x, self.context.tp.group, _own_part, _gather) if self.is_split else x

    def gathered(self, x: torch.Tensor) -> torch.Tensor:
        """All tokens [batch, seq, hidden] on every rank, for a use that is the same on each."""
        return _Exchange.apply(x, self.context.tp.group, _gather, _own_part) if self.is_split else x


class _GatheredLinear(torch.autograd.Function):
    """``y = x Wᵀ`` of all tokens, of which each rank has, and keeps, its own: [batch, seq / tp, in] → [batch, seq, out / tp]."""

    @staticmethod
    def forward(ctx: _Kept, x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group = group
        return F.linear(_gather(x, group), weight)

    @staticmethod
    def backward(ctx: _Kept, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight = ctx.saved_tensors
        return *_gathered_linear_backward(grad, x, weight, ctx.group.size(), ctx.group.group_name), None


# One operator, because a compiled graph would find the gathering of the forward pass in it, and keep all tokens for it.
@torch.library.custom_op("megatron::gathered_linear_backward", mutates_args=())
def _gathered_linear_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, size: int, group: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the own tokens and of the weight. All tokens are gathered again behind the product that needs none of
    them, and the gradient of the tokens is scattered behind the other (§4.2.2)."""
    parts = _gathering(x, size, group)
    grad_x = _scattering_sum(grad @ weight, size, group)
    whole = _joined(parts, x.shape[0])
    grad_weight = grad.reshape(-1, weight.shape[0]).t() @ whole.reshape(-1, weight.shape[1])
    return functional.wait_tensor(grad_x), grad_weight


@_gathered_linear_backward.register_fake
def _(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, size: int, group: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


class ColumnParallelLinear(TensorParallelModule):
    """``y = x Wᵀ + b`` with the output channels split over ranks: [batch, seq, in] → [batch, seq, out / tp], from
    [batch, seq / tp, in] with sequence parallelism."""

    def __init__(
        self, factory: ParameterFactory, *, in_size: int, blocks: Sequence[int], std: float, bias: bool
    ) -> None:
        super().__init__(factory.context)
        out_size = sum(blocks)
        self.weight = factory.normal("weight", ShardSpec((out_size, in_size), 0, tuple(blocks)), std)
        self.bias = factory.constant("bias", ShardSpec((out_size,), 0, tuple(blocks)), 0.0) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's output channels; shapes as in the class."""
        if not self.is_split:
            return F.linear(copy_to_tensor_parallel(x, self.context), self.weight, self.bias)
        y = _GatheredLinear.apply(x, self.weight, self.context.tp.group)
        return y if self.bias is None else y + self.bias


class RowParallelLinear(TensorParallelModule):
    """``y = x Wᵀ + b`` with the input channels split over ranks: [batch, seq, in / tp] → [batch, seq, out], summed over ranks;
    to [batch, seq / tp, out] with sequence parallelism."""

    def __init__(self, factory: ParameterFactory, *, in_size: int, out_size: int, std: float, bias: bool) -> None:
        super().__init__(factory.context)
        self.weight = factory.normal("weight", ShardSpec((out_size, in_size), 1, (in_size,)), std)
        self.bias = factory.constant("bias", ShardSpec((out_size,)), 0.0) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks; shapes as in the class."""
        y = reduce_from_tensor_parallel(F.linear(x, self.weight), self.context, is_split=self.is_split)
        # The bias is whole on every rank: added once, after the sum.
        return y if self.bias is None else y + self.own(self.bias)


class VocabParallelEmbedding(TensorParallelModule):
    """Token embedding with the vocabulary split over ranks: ids [batch, seq] → [batch, seq, hidden], or this rank's tokens of it
    with sequence parallelism."""

    def __init__(self, factory: ParameterFactory, *, vocab_size: int, hidden_size: int, std: float) -> None:
        super().__init__(factory.context)
        self.weight = factory.normal("weight", ShardSpec((vocab_size, hidden_size), 0, (vocab_size,)), std)
        self.rows = vocab_size // self.context.tp.size

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the table; shapes as in the class."""
        if self.context.tp.size == 1:
            return F.embedding(ids, self.weight)
        local = ids - self.context.tp.rank * self.rows
        is_elsewhere = (local < 0) | (local >= self.rows)
        rows = F.embedding(local.masked_fill(is_elsewhere, 0), self.weight)
        rows = rows.masked_fill(is_elsewhere.unsqueeze(-1), 0.0)
        return reduce_from_tensor_parallel(rows, self.context, is_split=self.is_split)


def gather_last_dim(x: torch.Tensor, context: ParallelContext) -> torch.Tensor:
    """Concatenate shards along the last axis (inference only: no gradient)."""
    if context.tp.size == 1:
        return x
    shards = [torch.empty_like(x) for _ in range(context.tp.size)]
    dist.all_gather(shards, x.contiguous(), group=context.tp.group)
    return torch.cat(shards, dim=-1)
