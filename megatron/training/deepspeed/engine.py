"""The engine: model, optimizer and their distribution behind train_step, eval_step, save and load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.checkpoint.reader import CheckpointReader
from megatron.checkpoint.writer import Saving, Staging
from megatron.config.schema import Config
from megatron.config.shape import Shape
from megatron.data.loader import to_device
from megatron.model.batch import ModelBatch
from megatron.model.block import TransformerBlock
from megatron.model.gpt import GPTModel, build_layers
from megatron.objectives.base import Objective
from megatron.parallel.context import ParallelContext
from megatron.parallel.tensor import ParameterFactory
from megatron.randomness import named_seed
from megatron.training.deepspeed.matrices import Matrices
from megatron.training.deepspeed.memory import stages
from megatron.training.deepspeed.pipeline import Mode, build_stage, pipeline_batches
from megatron.training.deepspeed.settings import (
    TensorParallelGroups,
    adopt_process_groups,
    compiles_blocks,
    deepspeed_settings,
    without_compiling,
)
from megatron.training.deepspeed.shards import Shards
from megatron.training.muon import MuonAdamW
from megatron.training.optimizer import build_optimizer
from megatron.training.schedule import learning_rate
from megatron.training.step import Observer, StepResult

Wishes = Callable[[], Sequence[bool]]


class Engine:
    """Model, optimizer and their distribution.

    Attributes:
        module: the plain model, or this rank's stage of the pipeline.
        shards: what this rank holds of weights and optimizer state.
        num_micro_batches: micro-batches of this rank in one step.
    """

    def __init__(
        self, config: Config, objective: Objective, context: ParallelContext, *, observer: Observer | None = None
    ) -> None:
        """Build on connected processes; see :func:`megatron.parallel.connection.connect`.

        Args:
            config: resolved configuration.
            objective: decides the attention mask.
            context: this process.
            observer: watches; the default sees nothing.
        """
        adopt_process_groups(context)
        import deepspeed

        is_split = config.parallel.splits_sequence(config.model.seq_length)
        context = replace(context, sequence_parallel=is_split)

        self.config, self.objective, self.context, self.shape = config, objective, context, Shape.of(config.model)
        self.observer = observer or Observer()
        self.is_pipeline = context.pp.size > 1
        self.mode = Mode(objective, within_documents=config.data.reset_attention_mask)
        module = self._build_module()
        num_parameters = sum(p.numel() for p in module.parameters())
        settings = deepspeed_settings(config, dp_size=context.dp.size, num_parameters=num_parameters)
        self.num_micro_batches: int = settings["gradient_accumulation_steps"]
        optimizer = build_optimizer(module.parameters(), config.optimizer)
        mpu = TensorParallelGroups(context) if context.tp.size > 1 and not self.is_pipeline else None
        with redirect_stdout(StringIO()), without_compiling():  # its bf16 optimizer prints eighteen lines on memory
            self._deepspeed, self._optimizer, _, _ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=settings, mpu=mpu, dist_init_required=False
            )
        self.module = self._deepspeed.module
        decay = None if config.run.skip_train else config.optimizer.ema_decay
        self.shards = Shards(self.module, self._optimizer, context, ema_decay=decay)
        self._staging = Staging() if config.run.async_save else None
        if isinstance(optimizer, MuonAdamW):
            optimizer.matrices = Matrices(self.shards, context)
        self._compile_blocks()
        self.observer.built(self)

    def train_step(
        self,
        data: Iterator[ModelBatch[torch.Tensor]],
        *,
        consumed_samples: int,
        wishes: Wishes = tuple,
    ) -> StepResult:
        """One optimizer step over ``num_micro_batches`` micro-batches. Nothing here waits for the device.

        Args:
            data: this rank's micro-batches; stages in the middle of a pipeline do not read it.
            consumed_samples: samples of the stream before this step; sets learning rate and dropout.
            wishes: what this rank has to say to all, as many on each; asked when the step is queued.
        """
        self.observer.step_begins(self, consumed_samples)
        rate = learning_rate(consumed_samples, self.config.optimizer)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._seed_dropout(consumed_samples)
        run = self._run_pipeline if self.is_pipeline else self._accumulate
        loss, counts = run(self._watched(data), wishes)
        # DeepSpeed decides on the host whether it skips, so it has read this flag already (which waited for the device).
        skipped = bool(getattr(self._optimizer, "overflow", False))
        if self.shards.average is not None and not skipped:
            self.shards.average.update()
        norm = float("inf") if skipped else self._deepspeed.get_global_grad_norm()
        result = StepResult(loss, self._scalar(norm), self._scalar(skipped, torch.bool), rate, counts)
        self.observer.step_ended(result)
        return result

    def eval_step(self, data: Iterator[ModelBatch[torch.Tensor]], *, num_micro_batches: int) -> torch.Tensor:
        """Loss of each token of the next micro-batches, [num_micro_batches · micro_batch, width] fp32 on the CPU: what the
        token adds to the loss of its sample, 0 where it is not in the loss. Tokens past seq_length are copies.

        Meaningful on the last pipeline stage and the same on its tensor-parallel ranks; other stages return an empty
        tensor. Call inside :meth:`evaluating`.
        """
        data = self._watched(data)
        if self.is_pipeline:
            self._deepspeed.total_loss = None  # it would add these vectors to the scalar of the last training step
            losses = self._deepspeed.eval_batch(
                pipeline_batches(data, self.mode, self.context.device),
                reduce_output=None,
                bcast_loss=False,
                num_micro_batches=num_micro_batches,
            )
            losses = losses if self.context.pp.is_last else []
        else:
            with torch.no_grad():
                losses = [self._forward(next(data)) for _ in range(num_micro_batches)]
        return torch.cat(losses).cpu() if losses else torch.empty(0)

    @contextmanager
    def evaluating(self, objective: Objective) -> Iterator[None]:
        """Evaluation mode under another objective's attention mask; training mode is restored on leaving."""
        self._enter(objective, training=False)
        try:
            yield
        finally:
            self._enter(self.objective, training=True)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones, which are back on leaving, bit for bit; a collective call. Without
        an average: the weights as they are."""
        if self.shards.average is None:
            yield
            return
        self.shards.exchange()
        yield
        self.shards.exchange()  # not after an error, which other ranks may not share

    def save(self, run_dir: Path, state: dict[str, Any]) -> Saving:
        """Write a checkpoint of weights and optimizer, or with ``--async-save`` begin to; it is complete once all ranks have
        published it.

        Args:
            run_dir: folder of the run.
            state: fields of the manifest, "step" and "config" among them; see :func:`write_checkpoint`.
        """
        return Saving(
            run_dir,
            fragments=self.shards.fragments_to_save(),
            specs=self.shards.specs(),
            state={**state, **self.shards.updates()},
            context=self.context,
            staging=self._staging,
        )

    def load(self, reader: CheckpointReader, *, with_optimizer: bool) -> None:
        """Overwrite the weights, and with them moments, step count and average, from a checkpoint of any layout.

        Raises:
            UserError: tensors are missing from the checkpoint or have other shapes.
        """
        self.shards.load(reader, with_optimizer=with_optimizer)

    def close(self) -> None:
        """Let go of weights and optimizer, which hooks of DeepSpeed would keep to the end of the process, and with them the
        process groups and their threads. Not after an error: this waits for the device."""
        self._deepspeed.destroy()

    def _build_module(self) -> torch.nn.Module:
        """The plain model, or this rank's stage of the pipeline, from the same list of layers."""
        # DeepSpeed hands on the weights of the first data-parallel rank, in the precision of the run: no other draws any.
        dtype = torch.bfloat16 if self.config.run.bf16 else torch.float32
        root = ParameterFactory(
            self.context,
            self.config.run.seed,
            dtype=dtype,
            device=self.context.device,
            is_drawn=self.context.dp.rank == 0,
        )
        recompute = self.config.parallel.recompute_activations
        if not self.is_pipeline:
            return GPTModel(self.shape, root=root, recompute=recompute).to(self.context.device)
        layers = build_layers(self.shape, root, recompute=recompute)
        blocks = stages(self.shape, self.objective, self.config.parallel)
        return build_stage(layers, self.mode, self.context, self.observer.loss_asked, blocks=blocks)

    def _enter(self, objective: Objective, *, training: bool) -> None:
        self.module.train(training)
        self.mode.objective, self.mode.per_token = objective, not training
        if self.is_pipeline:
            self._deepspeed.reset_activation_shape()  # other tensors travel between stages now

    def _forward(self, batch: ModelBatch[torch.Tensor]) -> torch.Tensor:
        batch, mode = to_device(batch, self.context.device), self.mode
        self.observer.loss_asked(batch.targets)
        return self._deepspeed(batch, mode.mask, mode.objective.loss, per_token=mode.per_token)

    def _run_pipeline(
        self, data: Iterator[ModelBatch[torch.Tensor]], wishes: Wishes
    ) -> tuple[torch.Tensor, torch.Tensor]:
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

    def _accumulate(
        self, data: Iterator[ModelBatch[torch.Tensor]], wishes: Wishes
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.module.train()
        total = torch.zeros((), device=self.context.device)
        for _ in range(self.num_micro_batches):
            loss = self._forward(next(data))
            self._deepspeed.backward(loss)
            self._deepspeed.step()  # updates the weights after the last micro-batch only
            total += loss.detach()
        return self._shared(total, wishes())

    def _shared(self, total: torch.Tensor | None, wishes: Sequence[bool]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss of the global batch, and how many ranks have each wish: one sum over all ranks, of the losses of those that
        have one (the first tensor-parallel rank of the last stage speaks for the others)."""
        sums, context = torch.zeros(1 + len(wishes), device=self.context.device), self.context
        if total is not None and context.pp.is_last and context.tp.rank == 0:
            sums[0] = total.detach() / self.num_micro_batches
        for number, wish in enumerate(wishes, 1):
            if wish:
                sums[number] = 1  # filled in on the device: nothing is copied to it
        if context.world_size > 1:
            dist.all_reduce(sums)
        return sums[0] / context.dp.size, sums[1:]

    def _watched(self, data: Iterator[ModelBatch[torch.Tensor]]) -> Iterator[ModelBatch[torch.Tensor]]:
        for batch in data:
            self.observer.batch_read(batch)
            yield batch

    def _scalar(self, value: float | bool | torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """``value`` as a scalar on the device; nothing waits."""
        if isinstance(value, torch.Tensor):
            return value.detach().to(self.context.device, dtype, non_blocking=True).reshape(())
        return torch.full((), value, dtype=dtype, device=self.context.device)

    def _seed_dropout(self, consumed_samples: int) -> None:
        """Dropout is a function of (seed, step, data-parallel rank, stage), so that a resumed run repeats it; and of the
        tensor-parallel rank where each holds tokens of its own."""
        name = f"dropout:{consumed_samples}:{self.context.dp.rank}:{self.context.pp.rank}"
        name += f":{self.context.tp.rank}" * self.context.sequence_parallel
        torch.manual_seed(named_seed(self.config.run.seed, name))

    def _compile_blocks(self) -> None:
        if compiles_blocks(self.config.parallel, device=self.context.device.type):
            for layer in self.module.modules():
                if isinstance(layer, TransformerBlock):
                    layer.transform = torch.compile(layer.transform, dynamic=False)  # type: ignore[method-assign]
