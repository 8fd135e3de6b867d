"""DeepSpeed's engine: ZeRO over data-parallel replicas, and pipelines."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO

import torch

from megatron.model.gpt import build_layers
from megatron.objectives.base import Objective
from megatron.training.deepspeed.pipeline import build_stage, pipeline_batches, stages
from megatron.training.deepspeed.settings import (
    adopt_process_groups,
    deepspeed_settings,
    tensor_parallel_groups,
)
from megatron.training.deepspeed.shards import Matrices, ZeroShards
from megatron.training.engine import Batches, Engine, Wishes
from megatron.training.optimizer import MuonAdamW, build_optimizer
from megatron.training.step import StepResult


class DeepSpeedEngine(Engine):
    """See :class:`Engine`."""

    @property
    def is_pipeline(self) -> bool:
        """Whether the module is a stage."""
        return self.context.pp.size > 1

    def close(self) -> None:
        """Its hooks would keep weights, optimizer and process groups, with their threads, to the end of the process."""
        self._deepspeed.destroy()

    def _build(self, *, ema_decay: float | None) -> None:
        context = self.context
        adopt_process_groups(context)
        import deepspeed

        module = self._stage() if self.is_pipeline else self._plain_model()
        num_parameters = sum(p.numel() for p in module.parameters())
        settings = deepspeed_settings(self.config, dp_size=context.dp.size, num_parameters=num_parameters)
        optimizer = build_optimizer(module.parameters(), self.config.optimizer)
        mpu = tensor_parallel_groups(context) if context.tp.size > 1 and not self.is_pipeline else None
        with redirect_stdout(StringIO()):  # its bf16 optimizer prints eighteen lines on memory
            self._deepspeed, self.optimizer, _, _ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=settings, mpu=mpu, dist_init_required=False
            )
        self.module, self.model = self._deepspeed.module, self._deepspeed
        self.shards = ZeroShards(self.module, self.optimizer, context, ema_decay=ema_decay)
        if isinstance(optimizer, MuonAdamW):
            optimizer.matrices = Matrices(self.shards, context)

    def _stage(self) -> torch.nn.Module:
        """This rank's stage of the pipeline."""
        layers = build_layers(self.shape, self._factory(), recompute=self.config.parallel.recompute_activations)
        blocks = stages(self.shape, self.objective, self.config.parallel)
        return build_stage(layers, self.mode, self.context, self.observer.loss_asked, blocks=blocks)

    def _enter(self, objective: Objective, *, training: bool) -> None:
        super()._enter(objective, training=training)
        if self.is_pipeline:
            self._deepspeed.reset_activation_shape()  # other tensors travel between stages now

    def _step(self, data: Batches, wishes: Wishes, *, rate: float) -> StepResult:
        run = self._run_pipeline if self.is_pipeline else self._accumulate
        loss, counts = run(data, wishes)
        # DeepSpeed decides on the host whether it skips, so it has read this flag already (which waited for the device).
        skipped = bool(getattr(self.optimizer, "overflow", False))
        norm = float("inf") if skipped else self._deepspeed.get_global_grad_norm()
        return StepResult(loss, self._scalar(norm), self._scalar(skipped, torch.bool), rate, counts)

    def _run_pipeline(self, data: Batches, wishes: Wishes) -> tuple[torch.Tensor, torch.Tensor]:
        found: list[tuple[torch.Tensor, torch.Tensor]] = []

        def aggregate() -> torch.Tensor:
            """In place of DeepSpeed's sum over the last stage and broadcast to the others."""
            found.append(self._shared(self._deepspeed.total_loss, wishes()))
            return found[0][0]

        assert hasattr(self._deepspeed, "_aggregate_total_loss"), "deepspeed changed; see FACTS on 0.19.8"
        self._deepspeed._aggregate_total_loss = aggregate
        self._deepspeed.train_batch(pipeline_batches(data, self.mode, self.context.device))
        self._deepspeed.data_iterator = None  # kept, it would keep the loader's workers alive at the end
        return found[0]

    def _accumulate(self, data: Batches, wishes: Wishes) -> tuple[torch.Tensor, torch.Tensor]:
        self.module.train()
        total = torch.zeros((), device=self.context.device)
        for _ in range(self.num_micro_batches):
            loss = self._forward(next(data))
            self._deepspeed.backward(loss)
            self._deepspeed.step()  # updates the weights after the last micro-batch only
            total += loss.detach()
        return self._shared(total, wishes())

    def _losses(self, data: Batches, num_micro_batches: int) -> list[torch.Tensor]:
        if not self.is_pipeline:
            return super()._losses(data, num_micro_batches)
        self._deepspeed.total_loss = None  # it would add these vectors to the scalar of the last training step
        losses = self._deepspeed.eval_batch(
            pipeline_batches(data, self.mode, self.context.device),
            reduce_output=None,
            bcast_loss=False,
            num_micro_batches=num_micro_batches,
        )
        return losses if self.context.pp.is_last else []

    def _scalar(self, value: float | bool | torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """``value`` as a scalar on the device; nothing waits."""
        if isinstance(value, torch.Tensor):
            return value.detach().to(self.context.device, dtype, non_blocking=True).reshape(())
        return torch.full((), value, dtype=dtype, device=self.context.device)
