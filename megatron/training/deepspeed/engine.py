"""The one place that knows DeepSpeed. The loop sees steps; pipelines, ZeRO and accumulation end here."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from io import StringIO
from typing import Any

import torch
import torch.distributed as dist

from megatron.config.schema import Config
from megatron.model.batch import ModelBatch, Targets
from megatron.model.block import TransformerBlock
from megatron.model.gpt import GPTModel, Layer, build_layers
from megatron.model.loss import HeadOutput, sample_losses, weighted_loss
from megatron.objectives.base import Objective
from megatron.parallel.context import ParallelContext
from megatron.parallel.sharding import named_seed
from megatron.training.deepspeed.settings import deepspeed_settings
from megatron.training.optimizer import build_optimizer, learning_rate


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports.

    Attributes:
        loss: [] fp32, mean over the global batch, on the device (reading it synchronises).
        grad_norm: global gradient norm before clipping; infinite when the step was skipped.
        lr: learning rate of the step.
        skipped: whether a NaN or infinite gradient kept the weights from changing.
    """

    loss: torch.Tensor
    grad_norm: float
    lr: float
    skipped: bool


def init_distributed(config: Config) -> ParallelContext:
    """Start the default process group (gloo on CPU, NCCL on CUDA) and lay out the grid.

    Raises:
        ValueError: the number of processes does not fit the parallel sizes.
    """
    _quieten_deepspeed()
    import deepspeed

    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "gloo":
        # On CPU DeepSpeed would compile a shared-memory operator at this point: minutes, and a lock that outlives a kill.
        backend_module = sys.modules["deepspeed.comm.torch"]
        assert hasattr(backend_module, "build_shm_op"), "deepspeed changed; see FACTS on 0.19.8"
        backend_module.build_shm_op = lambda: None  # type: ignore[attr-defined]
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(
        dist_backend=backend,
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(minutes=config.parallel.distributed_timeout_minutes),
    )
    return ParallelContext.create(
        tp_size=config.parallel.tensor_model_parallel_size,
        pp_size=config.parallel.pipeline_model_parallel_size,
        timeout_minutes=config.parallel.distributed_timeout_minutes,
    )


class Engine:
    """Model, optimizer and their distribution behind four verbs: train, evaluate, save, load."""

    def __init__(self, config: Config, objective: Objective, context: ParallelContext) -> None:
        import deepspeed

        self.config, self.objective, self.context = config, objective, context
        self.is_pipeline = context.pp_size > 1
        module = _build_module(config, objective, context)
        num_parameters = sum(p.numel() for p in module.parameters())
        settings = deepspeed_settings(config, dp_size=context.dp_size, num_parameters=num_parameters)
        self.num_micro_batches: int = settings["gradient_accumulation_steps"]
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(module.parameters(), config.optimizer),
            config=settings,
            mpu=None if self.is_pipeline else _GroupsForDeepSpeed(context),
            dist_init_required=False,
        )
        self.module = self.deepspeed.module
        self._compile_blocks()

    def train_step(self, data: Iterator[ModelBatch], *, consumed_samples: int) -> StepResult:
        """One optimizer step over ``num_micro_batches`` micro-batches.

        Args:
            data: this rank's micro-batches; stages in the middle of a pipeline do not read it.
            consumed_samples: samples of the stream before this step; sets learning rate and dropout.
        """
        rate = learning_rate(consumed_samples, self.config.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._seed_dropout(consumed_samples)
        if self.is_pipeline:
            loss = self.deepspeed.train_batch(_pipeline_batches(data))
        else:
            loss = self._accumulate(data)
        norm = self.deepspeed.get_global_grad_norm()
        skipped = bool(getattr(self.optimizer, "overflow", False))
        return StepResult(loss.detach(), float("inf") if skipped or norm is None else float(norm), rate, skipped)

    def eval_step(self, data: Iterator[ModelBatch], *, num_micro_batches: int) -> torch.Tensor:
        """Loss of each sample of the next micro-batches, [num_micro_batches · micro_batch] fp32 on the CPU.

        Meaningful on the last pipeline stage and the same on its tensor-parallel ranks; other stages return an empty
        tensor. Call inside :meth:`evaluating`.
        """
        if self.is_pipeline:
            self.deepspeed.total_loss = None  # it would add these vectors to the scalar of the last training step
            losses = self.deepspeed.eval_batch(
                _pipeline_batches(data), reduce_output=None, bcast_loss=False, num_micro_batches=num_micro_batches
            )
            losses = losses if self.context.pp_rank == self.context.pp_size - 1 else []
        else:
            with torch.no_grad():
                losses = [
                    self.deepspeed(next(data).to(self.context.device), reduction="sample")
                    for _ in range(num_micro_batches)
                ]
        return torch.cat(losses).cpu() if losses else torch.empty(0)

    @contextmanager
    def evaluating(self, objective: Objective) -> Iterator[None]:
        """Evaluation mode under another objective's attention mask; training mode is restored on leaving."""
        self._set_mode(objective, training=False)
        try:
            yield
        finally:
            self._set_mode(self.objective, training=True)

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Parameters that this rank owns: a tied copy on a later stage belongs to the first one."""
        return (p for p in self.module.parameters() if not getattr(p, "ds_pipe_replicated", False))

    def _set_mode(self, objective: Objective, *, training: bool) -> None:
        self.module.train(training)
        for layer in self.module.modules():
            if isinstance(layer, TransformerBlock):
                layer.mask = objective.attention_mask
        if self.is_pipeline:
            reduce = weighted_loss if training else sample_losses
            self.module.loss_fn = _PipelineLoss(reduce, self.context)
            self.deepspeed.reset_activation_shape()  # other tensors travel between stages now

    def _accumulate(self, data: Iterator[ModelBatch]) -> torch.Tensor:
        self.module.train()
        total = torch.zeros((), device=self.context.device)
        for _ in range(self.num_micro_batches):
            loss = self.deepspeed(next(data).to(self.context.device))
            self.deepspeed.backward(loss)
            self.deepspeed.step()  # updates the weights after the last micro-batch only
            total += loss.detach()
        total /= self.num_micro_batches
        if self.context.dp_size > 1:
            dist.all_reduce(total, group=self.context.dp_group)
            total /= self.context.dp_size
        return total

    def _seed_dropout(self, consumed_samples: int) -> None:
        """Dropout is a function of (seed, step, data-parallel rank, stage), so that a resumed run repeats it."""
        context = self.context
        name = f"dropout:{consumed_samples}:{context.dp_rank}:{context.pp_rank}"
        torch.manual_seed(named_seed(self.config.run.seed, name))

    def _compile_blocks(self) -> None:
        wanted = self.config.parallel.compile
        if wanted or (wanted is None and self.context.device.type == "cuda"):
            for layer in self.module.modules():
                if isinstance(layer, TransformerBlock):
                    layer.transform = torch.compile(layer.transform, dynamic=False)  # type: ignore[method-assign]


class _PipelineLoss:
    """``loss_fn(outputs, labels)`` of DeepSpeed's last stage."""

    def __init__(self, reduce: Any, context: ParallelContext) -> None:
        self.reduce, self.context = reduce, context
        self.__name__ = reduce.__name__

    def __call__(self, output: HeadOutput, targets: Targets) -> torch.Tensor:
        return self.reduce(output, targets, self.context)


def _build_module(config: Config, objective: Objective, context: ParallelContext) -> torch.nn.Module:
    """The plain model, or this rank's stage of the pipeline, from the same list of layers."""
    options: dict[str, Any] = {
        "mask": objective.attention_mask,
        "seed": config.run.seed,
        "recompute": config.parallel.recompute_activations,
    }
    if context.pp_size == 1:
        return GPTModel(config.model, context, **options).to(context.device)
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    layers = build_layers(config.model, context, **options)
    topology = PipeModelDataParallelTopology(num_pp=context.pp_size, num_mp=context.tp_size, num_dp=context.dp_size)
    with redirect_stdout(StringIO()):  # it prints its partition
        return PipelineModule(
            layers=[*(_pipeline_spec(layer) for layer in layers), _matrix_in_graph],
            topology=topology,
            loss_fn=_PipelineLoss(weighted_loss, context),
            partition_method="type:TransformerBlock",
            activation_checkpoint_interval=0,  # blocks recompute themselves
        )


def _pipeline_spec(layer: Layer) -> Any:
    from deepspeed.pipe import LayerSpec, TiedLayerSpec

    if layer.tied_to is None:
        return LayerSpec(layer.module, **layer.arguments)
    attribute = ["word_embeddings.weight"]
    return TiedLayerSpec(
        layer.tied_to, layer.module, forward_fn=layer.forward, tied_weight_attr=attribute, **layer.arguments
    )


def _matrix_in_graph(output: HeadOutput) -> HeadOutput:
    """The last layer of a pipeline: the output matrix as a node of the graph instead of a bare parameter.

    When the first gradient reaches an output of the module, DeepSpeed 0.19.8 zeroes the bf16 gradients of the last
    micro-batch. A bare parameter is no node that it could watch: it has its gradient by then, and would lose it.
    """
    hidden, matrix = output
    return hidden, matrix.view_as(matrix)


def _pipeline_batches(data: Iterator[ModelBatch]) -> Iterator[tuple[Any, Targets]]:
    """Micro-batches in the form of DeepSpeed's pipeline: (inputs of the first stage, labels of the last)."""
    for batch in data:
        yield batch.inputs, batch.targets


class _GroupsForDeepSpeed:
    """The methods that DeepSpeed asks of a Megatron ``mpu``, answered by the context."""

    def __init__(self, context: ParallelContext) -> None:
        self.context = context
        # DeepSpeed wants real groups, also of size one.
        self._tp = context.tp_group or _own_group(context, context.tp_size)
        self._dp = context.dp_group or _own_group(context, context.dp_size)

    def get_model_parallel_rank(self) -> int:
        return self.context.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self.context.tp_size

    def get_model_parallel_group(self) -> Any:
        return self._tp

    def get_data_parallel_rank(self) -> int:
        return self.context.dp_rank

    def get_data_parallel_world_size(self) -> int:
        return self.context.dp_size

    def get_data_parallel_group(self) -> Any:
        return self._dp

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group


def _own_group(context: ParallelContext, size: int) -> Any:
    assert size == 1
    own = None
    for rank in range(context.world_size):
        group = dist.new_group([rank])
        own = group if rank == context.rank else own
    return own


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _quieten_deepspeed() -> None:
    """Leave warnings and errors; DeepSpeed's information lines bury the progress of a run."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    # DeepSpeed broadcasts tied weights, which are leaves, once at start-up; torch warns about their gradient.
    warnings.filterwarnings("ignore", message="c10d::broadcast_")
    import deepspeed  # noqa: F401  (its import resets the level)

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
