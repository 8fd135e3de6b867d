"""What a rank holds of weights and optimizer state, as fragments: the bridge between DeepSpeed's ZeRO optimizers and the
layout-free checkpoint.

ZeRO keeps fp32 masters and moments in flat partitions over the data-parallel ranks. DeepSpeed links every parameter to
its range in them; those ranges are the fragments, so saving moves nothing between ranks and loading writes in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron.checkpoint.files import Fragment
from megatron.checkpoint.reader import CheckpointReader
from megatron.errors import UserError
from megatron.parallel.context import ParallelContext
from megatron.parallel.sharding import ShardSpec, shard_of

MOMENTS = ("exp_avg", "exp_avg_sq")


class Shards:
    """Fragments of one rank's model and optimizer."""

    def __init__(self, module: torch.nn.Module, optimizer: Any, context: ParallelContext) -> None:
        """Args:
        module: the model or this rank's pipeline stage, wrapped by DeepSpeed.
        optimizer: DeepSpeed's ZeRO optimizer (stage 1, 2, 3 or bf16).
        context: this process.
        """
        self.module, self.optimizer, self.context = module, optimizer, context
        self.is_zero3 = hasattr(optimizer, "fp32_partitioned_groups_flat")

    def specs(self) -> dict[str, ShardSpec]:
        """Shape and split of every tensor on this rank, by canonical name."""
        return {record.name: record.spec for record in map(shard_of, self.module.parameters())}

    def fragments_to_save(self) -> list[Fragment]:
        """What this rank alone must write: of a tensor that several ranks hold, the first one's."""
        moments = MOMENTS if self.optimizer_steps() > 0 else ()
        return [
            fragment
            for parameter in self.module.parameters()
            if self._is_writer(parameter)
            for fragment in self._fragments(parameter, ("weight", *moments))
        ]

    def load(self, reader: CheckpointReader, *, with_optimizer: bool) -> None:
        """Overwrite weights, and with them moments and step count, from a checkpoint of any layout.

        Raises:
            UserError: tensors are missing from the checkpoint or have other shapes.
        """
        for name, spec in self.specs().items():
            saved = reader.specs.get(name)
            if saved is None or saved.full_shape != spec.full_shape:
                found = "no such tensor" if saved is None else f"shape {saved.full_shape}"
                raise UserError(
                    f"checkpoint {reader.path}: {name}: {found}, this model has {spec.full_shape}",
                    "architectures must be equal",
                    "pass the model flags of the checkpoint (see its manifest.json)",
                )
        if with_optimizer:
            self._create_moments(int(reader.manifest["optimizer_steps"]))
        kinds = ("weight", *MOMENTS) if with_optimizer and self.optimizer_steps() > 0 else ("weight",)
        for parameter in self.module.parameters():
            for fragment in self._fragments(parameter, kinds):
                reader.read(fragment)
        self._refresh_model_weights()

    def optimizer_steps(self) -> int:
        """Updates made so far (skipped ones do not count)."""
        steps = [state["step"] for state in self.optimizer.optimizer.state.values() if "step" in state]
        return int(steps[0]) if steps else 0

    def _is_writer(self, parameter: torch.nn.Parameter) -> bool:
        is_tied_copy = getattr(parameter, "ds_pipe_replicated", False)
        is_split = shard_of(parameter).spec.dim is not None
        return not is_tied_copy and (is_split or self.context.tp.rank == 0)

    def _fragments(self, parameter: Any, kinds: tuple[str, ...]) -> Iterator[Fragment]:
        located = self._locate(parameter)
        if located is None:
            return
        flat, start, offset, numel = located
        whole, tp = shard_of(parameter), self.context.tp
        tp_rank, tp_size = (tp.rank, tp.size) if whole.spec.dim is not None else (0, 1)
        for kind in kinds:
            source = flat if kind == "weight" else self.optimizer.optimizer.state[flat][kind]
            data = source.detach().narrow(0, offset, numel)
            yield Fragment(kind, whole.name, tp_rank, tp_size, start, data)

    def _locate(self, parameter: Any) -> tuple[torch.Tensor, int, int, int] | None:
        """Flat fp32 partition, first element of the parameter in it, its offset there, and the number of elements."""
        if self.is_zero3:
            group, offset, _ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            part = parameter.ds_tensor.ds_numel
            start = self.context.dp.rank * part
            numel = min(part, parameter.ds_numel - start)  # the last partitions are padded
            return (self.optimizer.fp32_partitioned_groups_flat[group], start, offset, numel) if numel > 0 else None
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
        return self._flat_partitions()[mapping.param_group_index], lp.start, hp.start, hp.numel

    def _flat_partitions(self) -> list[torch.Tensor]:
        if self.is_zero3:
            return self.optimizer.fp32_partitioned_groups_flat
        return [group["params"][0] for group in self.optimizer.optimizer.param_groups]

    def _create_moments(self, steps: int) -> None:
        """Give every partition the state that ``steps`` updates would have left, still zero."""
        if steps == 0:
            return
        optimizer = self.optimizer.optimizer
        for flat in self._flat_partitions():
            # Fused AdamW keeps the step beside the parameters.
            step = torch.tensor(float(steps), dtype=torch.float32, device=flat.device)
            optimizer.state[flat] = {"step": step, **{key: torch.zeros_like(flat) for key in MOMENTS}}
        for group in optimizer.param_groups:
            if "step" in group:  # apex counts per group
                group["step"] = steps
        if not self.is_zero3:
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _refresh_model_weights(self) -> None:
        """Copy the masters into the weights that the model computes with."""
        if not self.is_zero3:
            self.optimizer.update_lp_params()
            return
        for low, master in zip(
            self.optimizer.fp16_partitioned_groups_flat, self.optimizer.fp32_partitioned_groups_flat
        ):
            low.data.copy_(master.data)
        persistent = self.optimizer.persistent_parameters
        if persistent:  # small tensors that ZeRO-3 keeps whole: drop the old copy, gather the new one
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)
