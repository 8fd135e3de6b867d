"""The engine on torch's ``fully_shard`` (FSDP2): weights, gradients and optimizer state shared out over data-parallel ranks by
rows (Zhao et al., arXiv 2304.11277; per parameter since torch 2.6), the tensor-parallel layers being ours.

A block is gathered before its forward pass, in bf16 where the run is, and again before its backward pass with ZeRO 3; else it
stays whole until the gradients of the step are reduced. What is outside the blocks, embedding, last norm and head, is whole from
the first forward to the last backward operation, because a tied matrix is needed at both ends.

Nothing waits for the device: whether a step is skipped is decided there, by the fused optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from math import ceil
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from megatron.model.gpt import GPTModel
from megatron.parallel.context import ParallelContext
from megatron.parallel.sharding import shard_of
from megatron.training.engine import Batches, Engine, Wishes
from megatron.training.optimizer import build_optimizer
from megatron.training.shards import Place, Shards
from megatron.training.step import StepResult

EPSILON = 1e-6  # of the clipping, as torch and DeepSpeed have it


class FSDP2Engine(Engine):
    """See :class:`Engine`."""

    def _build(self, *, ema_decay: float | None) -> None:
        model = self._plain_model()
        self._keeps_weights = self.config.parallel.zero_stage < 3
        self._units = share_out(model, self.context, is_bf16=self.config.run.bf16, keeps_weights=self._keeps_weights)
        self.module = self.model = model
        self._own = {parameter: own_rows(parameter) for parameter in model.parameters()}
        self.optimizer = build_optimizer([rows for rows in self._own.values() if rows.numel()], self.config.optimizer)
        self.shards = RowShards(self._own, self.optimizer, self.context, units=self._units, ema_decay=ema_decay)

    def _step(self, data: Batches, wishes: Wishes, *, rate: float) -> StepResult:
        self.module.train()
        root = self._units[-1]
        total = torch.zeros((), device=self.context.device)
        for left in reversed(range(self.num_micro_batches)):
            root.set_requires_gradient_sync(not left)
            root.set_reshard_after_backward(not left or not self._keeps_weights)
            loss = self._forward(next(data))
            (loss / self.num_micro_batches).backward()
            total += loss.detach()
        norm, skipped = self._update()
        loss, counts = self._shared(total, wishes())
        return StepResult(loss, norm, skipped, rate, counts)

    @torch.no_grad()
    def _update(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip and step, or skip a NaN or infinite gradient. Returns the norm before clipping, and whether it skipped."""
        for parameter, own in self._own.items():
            gradient, parameter.grad = parameter.grad, None
            own.grad = gradient.to_local() if isinstance(gradient, DTensor) else None
        norm, limit = self._norm(), self.config.optimizer.clip_grad
        skipped = ~norm.isfinite()
        # What torch's GradScaler tells a fused optimizer: whether to leave everything as it is, and the divisor of gradients.
        self.optimizer.found_inf = skipped.float()
        self.optimizer.grad_scale = ((norm + EPSILON) / limit).clamp(min=1) if limit else None
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm.masked_fill(skipped, float("inf")), skipped

    def _norm(self) -> torch.Tensor:
        """Norm of the whole gradient, [] fp32; what tensor-parallel ranks have alike counts once."""
        own = [rows.grad for rows in self._own.values() if rows.grad is not None and self.shards.speaks_for(rows)]
        square = torch.nn.utils.get_total_norm(own).square().to(self.context.device)
        if self.context.world_size > 1:
            dist.all_reduce(square)
        return square.sqrt()


def share_out(model: GPTModel, context: ParallelContext, *, is_bf16: bool, keeps_weights: bool) -> list[FSDPModule]:
    """Shard a model in place: each block, then what is left. A collective call.

    The weights of the first data-parallel rank become those of all, and fp32, one unit at a time.

    Args:
        model: in the precision of the run.
        context: this process.
        is_bf16: compute in bf16; masters and sums of gradients are fp32 in any case.
        keeps_weights: from the forward to the backward pass.

    Returns:
        The units; the last is the model.
    """
    records = {name: shard_of(parameter) for name, parameter in model.named_parameters()}
    mesh = DeviceMesh.from_group(context.replicas(), context.device.type)
    policy = MixedPrecisionPolicy()
    if is_bf16:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    units: list[FSDPModule] = []
    for unit in chain(model.layers, [model]):
        for parameter in unit.parameters():
            if not isinstance(parameter, DTensor):
                if context.dp.size > 1:
                    dist.broadcast(parameter.data, group=context.dp.group, group_src=0)
                parameter.data = parameter.data.float()
        is_freed = unit is not model and not keeps_weights
        units.append(fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=is_freed))
        # A sum that is divided after: gloo's own mean was wrong in torch 2.8 (issue 162338).
        units[-1].set_force_sum_reduction_for_comms(True)
    for name, parameter in model.named_parameters():
        parameter.__dict__.update(shard=records[name])
    return units


class RowShards(Shards):
    """Fragments of rows: a master is this rank's part of one parameter."""

    def __init__(
        self,
        own: Mapping[torch.nn.Parameter, torch.Tensor],
        optimizer: torch.optim.Optimizer,
        context: ParallelContext,
        *,
        units: Sequence[FSDPModule],
        ema_decay: float | None = None,
    ) -> None:
        """Args:
        own: this rank's rows of each sharded parameter, in its memory; none where there are fewer rows than ranks.
        optimizer: steps on them.
        context: this process.
        units: of the model; what they gathered holds until they gather again.
        ema_decay: of the average of the weights; None: none is kept.
        """
        self._own, self._units = own, units
        super().__init__(list(own), optimizer, context, ema_decay=ema_decay)

    def masters(self) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        """This rank's rows, by group."""
        return [(master, group) for group in self.optimizer.param_groups for master in group["params"]]

    def locate(self, parameter: torch.nn.Parameter) -> Place | None:
        """All of its own master."""
        master, whole = self._own[parameter], parameter.shape
        first = self.context.dp.rank * ceil(whole[0] / self.context.dp.size)
        return Place(master, first * whole[1:].numel(), 0, master.numel()) if master.numel() else None

    def refresh(self) -> None:
        """Drop weights that were gathered before; the next pass gathers the new ones."""
        for unit in self._units:
            unit.reshard()


def own_rows(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """This rank's rows of a sharded parameter as a plain one, in the same memory and with the same record."""
    assert isinstance(parameter, DTensor)
    rows = torch.nn.Parameter(parameter.to_local().detach())
    rows.__dict__.update(shard=parameter.__dict__["shard"])
    return rows
