"""The engine: what a run asks of model, optimizer and their distribution, and what is the same whoever distributes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.checkpoint.reader import CheckpointReader
from megatron.checkpoint.writer import Saving, Staging
from megatron.config.schema import Config, ParallelConfig
from megatron.config.shape import Shape
from megatron.data.loader import to_device
from megatron.model.batch import ModelBatch
from megatron.model.block import TransformerBlock
from megatron.model.gpt import GPTModel
from megatron.model.mask import AttentionMask, within_segments
from megatron.objectives.base import Objective
from megatron.parallel.context import ParallelContext
from megatron.parallel.tensor import ParameterFactory
from megatron.randomness import named_seed
from megatron.training.schedule import learning_rate
from megatron.training.shards import Shards
from megatron.training.step import Observer, StepResult

Batches = Iterator[ModelBatch[torch.Tensor]]
Wishes = Callable[[], Sequence[bool]]


@dataclass
class Mode:
    """What the model computes at the moment. The engine changes it.

    Attributes:
        objective: gives attention mask and loss.
        within_documents: keep attention within documents, whatever the objective's mask.
        per_token: a loss for every token instead of the scalar training loss.
    """

    objective: Objective
    within_documents: bool
    per_token: bool = False

    @property
    def mask(self) -> AttentionMask:
        """Which keys a query sees."""
        mask = self.objective.attention_mask
        return within_segments(mask) if self.within_documents else mask


class Engine(ABC):
    """Model, optimizer and their distribution.

    Attributes:
        module: the plain model, or this rank's stage of the pipeline.
        model: the same as it is called, wrapped where the engine does so.
        optimizer: its groups are told the rate of every step.
        shards: what this rank holds of weights and optimizer state.
        num_micro_batches: micro-batches of this rank in one step.
    """

    module: torch.nn.Module
    model: Callable[..., Any]
    optimizer: Any
    shards: Shards

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
        is_split, run = config.parallel.splits_sequence(config.model.seq_length), config.run
        self.config, self.objective, self.shape = config, objective, Shape.of(config.model)
        self.context = replace(context, sequence_parallel=is_split)
        self.observer = observer or Observer()
        self.mode = Mode(objective, within_documents=config.data.reset_attention_mask)
        assert run.global_batch_size is not None
        self.num_micro_batches = run.global_batch_size // (run.micro_batch_size * context.dp.size)
        self._staging = Staging() if run.async_save else None
        self._build(ema_decay=None if run.skip_train else config.optimizer.ema_decay)
        if compiles_blocks(config.parallel, device=context.device.type):
            for layer in self.module.modules():
                if isinstance(layer, TransformerBlock):
                    layer.transform = torch.compile(layer.transform, dynamic=False)  # type: ignore[method-assign]
        self.observer.built(self)

    def train_step(self, data: Batches, *, consumed_samples: int, wishes: Wishes = tuple) -> StepResult:
        """One optimizer step over ``num_micro_batches`` micro-batches. Nothing here waits for the device.

        Args:
            data: this rank's micro-batches; stages in the middle of a pipeline do not read it.
            consumed_samples: samples of the stream before this step; sets learning rate and dropout.
            wishes: what this rank has to say to all, as many on each; asked when the step is queued.
        """
        self.observer.step_begins(self, consumed_samples)
        rate = learning_rate(consumed_samples, self.config.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._seed_dropout(consumed_samples)
        result = self._step(self._watched(data), wishes, rate=rate)
        if self.shards.average is not None:
            self.shards.average.update(result.skipped)
        self.observer.step_ended(result)
        return result

    def eval_step(self, data: Batches, *, num_micro_batches: int) -> torch.Tensor:
        """Loss of each token of the next micro-batches, [num_micro_batches · micro_batch, width] fp32 on the CPU: what the
        token adds to the loss of its sample, 0 where it is not in the loss. Tokens past seq_length are copies.

        Meaningful on the last pipeline stage and the same on its tensor-parallel ranks; other stages return an empty
        tensor. Call inside :meth:`evaluating`.
        """
        losses = self._losses(self._watched(data), num_micro_batches)
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
            state: fields of the manifest, "step" and "config" among them; see :class:`Saving`.
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

    def close(self) -> None:  # noqa: B027 (few have such)
        """Let go of weights, optimizer and process groups that would outlive the engine. Not after an error: this may wait for
        the device."""

    @abstractmethod
    def _build(self, *, ema_decay: float | None) -> None:
        """Make module, model, optimizer and shards."""

    @abstractmethod
    def _step(self, data: Batches, wishes: Wishes, *, rate: float) -> StepResult:
        """Forward and backward passes of all micro-batches, and the update with the rate, which the groups have already."""

    def _factory(self) -> ParameterFactory:
        """Makes weights in the precision of the run. Only the first data-parallel rank draws any: the engine hands them on."""
        return ParameterFactory(
            self.context,
            self.config.run.seed,
            dtype=torch.bfloat16 if self.config.run.bf16 else torch.float32,
            device=self.context.device,
            is_drawn=self.context.dp.rank == 0,
        )

    def _plain_model(self) -> GPTModel:
        recompute = self.config.parallel.recompute_activations
        return GPTModel(self.shape, self._factory(), recompute=recompute).to(self.context.device)

    def _enter(self, objective: Objective, *, training: bool) -> None:
        self.module.train(training)
        self.mode.objective, self.mode.per_token = objective, not training

    def _losses(self, data: Batches, num_micro_batches: int) -> list[torch.Tensor]:
        """Losses of the tokens of each micro-batch."""
        with torch.no_grad():
            return [self._forward(next(data)) for _ in range(num_micro_batches)]

    def _forward(self, batch: ModelBatch[torch.Tensor]) -> torch.Tensor:
        batch, mode = to_device(batch, self.context.device), self.mode
        self.observer.loss_asked(batch.targets)
        return self.model(batch, mode.mask, mode.objective.loss, per_token=mode.per_token)

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

    def _watched(self, data: Batches) -> Batches:
        for batch in data:
            self.observer.batch_read(batch)
            yield batch

    def _seed_dropout(self, consumed_samples: int) -> None:
        """Dropout is a function of (seed, step, data-parallel rank, stage), so that a resumed run repeats it; and of the
        tensor-parallel rank where each holds tokens of its own."""
        name = f"dropout:{consumed_samples}:{self.context.dp.rank}:{self.context.pp.rank}"
        name += f":{self.context.tp.rank}" * self.context.sequence_parallel
        torch.manual_seed(named_seed(self.config.run.seed, name))


def compiles_blocks(parallel: ParallelConfig, *, device: str) -> bool:
    """Whether blocks are compiled: as the flag says, else on CUDA where no hooks of DeepSpeed's ZeRO 3, which gather the
    parameters of every layer, break their graphs; FSDP2 gathers those of a block before it."""
    if parallel.compile is not None:
        return parallel.compile
    return device == "cuda" and (parallel.zero_stage < 3 or parallel.engine == "fsdp2")


def build_engine(
    config: Config, objective: Objective, context: ParallelContext, *, observer: Observer | None = None
) -> Engine:
    """The engine that ``--engine`` names; see :class:`Engine`. A run needs the packages of its own engine alone."""
    if config.parallel.engine == "fsdp2":
        from megatron.training.fsdp2.engine import FSDP2Engine

        return FSDP2Engine(config, objective, context, observer=observer)
    from megatron.training.deepspeed.engine import DeepSpeedEngine

    return DeepSpeedEngine(config, objective, context, observer=observer)
