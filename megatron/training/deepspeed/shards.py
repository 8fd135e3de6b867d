"""The fragments in DeepSpeed's ZeRO optimizers.

ZeRO keeps fp32 masters and moments in flat partitions over the data-parallel ranks, and links every parameter to its range in
them.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron.parallel.context import ParallelContext
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
