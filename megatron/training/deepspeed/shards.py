"""What a rank holds of weights and optimizer state, as fragments: the bridge between DeepSpeed's ZeRO optimizers and the
layout-free checkpoint.

ZeRO keeps fp32 masters and moments in flat partitions over the data-parallel ranks. DeepSpeed links every parameter to
its range in them; those ranges are the fragments, so saving moves nothing between ranks and loading writes in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron.checkpoint.files import AVERAGE_UPDATES, Fragment
from megatron.checkpoint.reader import CheckpointReader
from megatron.config.schema import AVERAGE, WEIGHT
from megatron.errors import UserError
from megatron.parallel.context import ParallelContext
from megatron.parallel.sharding import ShardSpec, shard_of
from megatron.training.deepspeed.average import Average
from megatron.training.optimizer import MOMENTS


class Shards:
    """Fragments of one rank's model and optimizer.

    Attributes:
        average: of the weights, where one is kept.
    """

    def __init__(
        self, module: torch.nn.Module, optimizer: Any, context: ParallelContext, *, ema_decay: float | None = None
    ) -> None:
        """Args:
        module: the model or this rank's pipeline stage, wrapped by DeepSpeed.
        optimizer: DeepSpeed's ZeRO optimizer (stage 1, 2, 3 or bf16).
        context: this process.
        ema_decay: of the average of the weights; None: none is kept.
        """
        self.module, self.optimizer, self.context = module, optimizer, context
        self.is_zero3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
        self.average = None if ema_decay is None else Average(self.flat_partitions(), ema_decay)

    def specs(self) -> dict[str, ShardSpec]:
        """Shape and split of every tensor on this rank, by canonical name."""
        return {record.name: record.spec for record in map(shard_of, self.module.parameters())}

    def fragments_to_save(self) -> list[Fragment]:
        """What this rank alone must write: of a tensor that several ranks hold, the first one's."""
        return [
            fragment
            for parameter in self.module.parameters()
            if self._is_writer(parameter)
            for fragment in self._fragments(parameter)
        ]

    def load(self, reader: CheckpointReader, *, with_optimizer: bool) -> None:
        """Overwrite weights, and with them moments, step count and average, from a checkpoint of any layout. An average that is
        not there starts from the weights.

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
        is_averaged = with_optimizer and AVERAGE_UPDATES in reader.manifest
        wanted = {WEIGHT: True, AVERAGE: is_averaged}
        for parameter in self.module.parameters():
            for fragment in self._fragments(parameter):
                if wanted.get(fragment.kind, with_optimizer):
                    reader.read(fragment)
        self._refresh_model_weights()
        if self.average is not None and is_averaged:
            self.average.num_updates = int(reader.manifest[AVERAGE_UPDATES])
        elif self.average is not None:
            self.average.restart()

    def optimizer_steps(self) -> int:
        """Updates made so far (skipped ones do not count)."""
        steps = [state["step"] for state in self.optimizer.optimizer.state.values() if "step" in state]
        return int(steps[0]) if steps else 0

    def updates(self) -> dict[str, int]:
        """Updates so far, of the weights and of their average, as the manifest counts them."""
        averaged = {} if self.average is None else {AVERAGE_UPDATES: self.average.num_updates}
        return {"optimizer_steps": self.optimizer_steps(), **averaged}

    def exchange(self) -> None:
        """Give the model the averaged weights, or those that it had back; a collective call."""
        assert self.average is not None
        self.average.exchange()
        self._refresh_model_weights()

    def _is_writer(self, parameter: torch.nn.Parameter) -> bool:
        is_tied_copy = getattr(parameter, "ds_pipe_replicated", False)
        is_split = shard_of(parameter).spec.dim is not None
        return not is_tied_copy and (is_split or self.context.tp.rank == 0)

    def _fragments(self, parameter: Any) -> Iterator[Fragment]:
        """What this rank holds of a parameter, of every kind."""
        located = self.locate(parameter)
        if located is None:
            return
        flat, start, offset, numel = located
        whole, tp = shard_of(parameter), self.context.tp
        tp_rank, tp_size = (tp.rank, tp.size) if whole.spec.dim is not None else (0, 1)
        for kind, source in self._held(flat).items():
            data = source.detach().narrow(0, offset, numel)
            yield Fragment(kind, whole.name, tp_rank, tp_size, start, data)

    def _held(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """A flat partition of the masters and what is kept beside it, by kind."""
        state = self.optimizer.optimizer.state.get(flat, {})
        moments = {kind: state[kind] for kind in MOMENTS if kind in state}
        return {WEIGHT: flat, **moments, **({} if self.average is None else {AVERAGE: self.average.of(flat)})}

    def locate(self, parameter: Any) -> tuple[torch.Tensor, int, int, int] | None:
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
        return self.flat_partitions()[mapping.param_group_index], lp.start, hp.start, hp.numel

    def flat_partitions(self) -> list[torch.Tensor]:
        """This rank's partitions of the fp32 masters, each of them one tensor."""
        if self.is_zero3:
            return self.optimizer.fp32_partitioned_groups_flat
        return [group["params"][0] for group in self.optimizer.optimizer.param_groups]

    def _create_moments(self, steps: int) -> None:
        """Give every partition the state that ``steps`` updates would have left, still zero."""
        if steps == 0:
            return
        optimizer = self.optimizer.optimizer
        for number, flat in enumerate(self.flat_partitions()):
            group = optimizer.param_groups[self.optimizer.sub_group_to_group_id[number] if self.is_zero3 else number]
            # Fused AdamW keeps the step beside the parameters.
            step = torch.tensor(float(steps), dtype=torch.float32, device=flat.device)
            optimizer.state[flat] = {"step": step, **{kind: torch.zeros_like(flat) for kind in group["moments"]}}
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
