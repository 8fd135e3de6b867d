"""Training speed of a model and layout: the measurement behind ``megatron benchmark``."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from megatron.config.option import spelling
from megatron.config.schema import Config
from megatron.config.shape import Shape
from megatron.config.validate import check_packages
from megatron.data.dataset import Pieces
from megatron.data.loader import Share, build_loader, to_device
from megatron.errors import require
from megatron.model.arithmetic import peak_flops
from megatron.model.batch import ModelBatch
from megatron.model.gpt import GPTModel
from megatron.objectives import Objective, build_objective, parse, with_vocabulary
from megatron.objectives.base import flops_per_token
from megatron.parallel.connection import connect
from megatron.parallel.context import ParallelContext
from megatron.parallel.launch import Launch
from megatron.parallel.tensor import ParameterFactory
from megatron.training.engine import build_engine
from megatron.training.optimizer import build_optimizer
from megatron.training.resolve import mask_row, shape_of

VOCAB_SIZE = 50257  # GPT-2
# Of a training's run and data, what a step depends on; all else of them is not heeded.
HEEDED = {"micro_batch_size", "global_batch_size", "bf16", "seed", "num_workers", "reset_attention_mask", "reset_position_ids",
          "eod_mask_loss"}  # fmt: skip
LENGTHS = ("--train-samples", "--train-iters", "--train-epochs")
TRACED = 2  # steps of a trace


class RandomTokens:
    """An endless data set of uniformly random GPT-2 ids."""

    def __init__(self, seq_length: int) -> None:
        self.seq_length = seq_length

    def __getitem__(self, index: int) -> np.ndarray:
        """Sample ``index``: [seq + 1] int64."""
        return np.random.default_rng(index).integers(0, VOCAB_SIZE, self.seq_length + 1)

    def pieces(self, index: int) -> Pieces:
        """Every sample is one document."""
        length = self.seq_length + 1
        return Pieces(np.full(length, index), np.zeros(length, dtype=np.int64))


def benchmark_config(flags: list[str], steps: int, notes: list[str] | None = None) -> Config:
    """The training configuration of a benchmark: published recipe, no dropout unless asked for. ``notes`` receives which of
    the flags it does not heed."""
    defaults = ["--attention-dropout", "0", "--hidden-dropout", "0", "--num-workers", "2"]
    given = {flag.split("=")[0].replace("_", "-") for flag in flags}
    if not given & {"--model", "--num-layers"}:
        defaults += ["--model", "7M"]
    if not given & {*LENGTHS}:
        defaults += ["--train-iters", str(steps)]
    world_size, notes = Launch.from_environment().world_size, [] if notes is None else notes
    origins: dict[str, str] = {}
    config = parse([*defaults, *flags], world_size=world_size, notes=notes, origins=origins)
    require(not config.run.skip_train, "--skip-train", "a benchmark times training steps", "drop the flag")
    known = {item.name: item for part in (config.run, config.data) for item in fields(part)}
    idle = [spelling(known[name]) for name in origins if name in known and name not in HEEDED]
    idle = [flag for flag in idle if flag in given or flag not in LENGTHS]
    if idle:
        notes.append(f"without effect on a benchmark, which saves and reads nothing: {', '.join(idle)}")
    check_packages(config)
    parallel, run = config.parallel, config.run
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    shape = shape_of(config, VOCAB_SIZE, {"padded_vocab_size": None})
    padded = shape.padded_vocab_size
    mask = mask_row(config, VOCAB_SIZE, padded, {})
    batch = run.global_batch_size or run.micro_batch_size * (world_size // (tp * pp))
    return replace(
        config,
        model=shape.recorded(),
        objective=with_vocabulary(config.objective, mask, size=VOCAB_SIZE, padded=padded),
        optimizer=replace(config.optimizer, lr_decay_samples=steps * batch),
        run=replace(run, global_batch_size=batch, train_samples=steps * batch, train_iters=None, train_epochs=None),
    )


def plain_step(config: Config, objective: Objective) -> Callable[[ModelBatch[torch.Tensor]], None]:
    """A training step of the same model without this project's loss: all logits, full softmax, mean over the loss."""
    model = GPTModel(Shape.of(config.model), ParameterFactory(seed=config.run.seed))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device, torch.bfloat16 if config.run.bf16 else torch.float32)
    optimizer = build_optimizer(model.parameters(), config.optimizer)

    def step(batch: ModelBatch[torch.Tensor]) -> None:
        inputs, targets = to_device(batch, device)
        logits = model.logits(inputs, objective.attention_mask).float()
        ce = F.cross_entropy(logits.flatten(0, 1), targets.labels.flatten(), reduction="none")
        loss = (ce * targets.loss_weights.flatten()).sum() / targets.num_tokens.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_grad)
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(action: Callable[[], Any], context: ParallelContext) -> float:
    """Seconds of one action, the device's work included."""
    if context.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    if context.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(
    config: Config, *, steps: int, warmup: int, compare_plain: bool = False, trace: Path | None = None
) -> dict[str, Any]:
    """Time ``steps`` steps after ``warmup`` ones; see the module's docstring. With ``trace``, one more step is recorded."""
    connection = connect(Launch.from_environment(), timeout_minutes=config.parallel.distributed_timeout_minutes)
    context = ParallelContext.create(
        tp_size=config.parallel.tensor_model_parallel_size, pp_size=config.parallel.pipeline_model_parallel_size
    )
    objective = build_objective(config)
    engine = build_engine(config, objective, context)
    assert config.run.global_batch_size
    last = (warmup + steps + TRACED) * config.run.global_batch_size * (2 if compare_plain else 1)
    share, tokens = Share(context.dp, config.run.micro_batch_size, last), RandomTokens(config.model.seq_length)
    loader = build_loader(tokens, objective, share, device=context.device, num_workers=config.data.num_workers)
    plain = plain_step(config, objective) if compare_plain else None
    times: dict[str, list[float]] = {"engine": [], "plain": []}
    with loader as batches:
        for index in range(warmup + steps):
            consumed = index * config.run.global_batch_size
            step = partial(engine.train_step, batches, consumed_samples=consumed)
            times["engine"].append(timed(step, context))
            if plain is not None:
                times["plain"].append(timed(partial(plain, next(batches)), context))
        peak_memory = _peak_memory_gib(context)
        step = partial(engine.train_step, batches, consumed_samples=0)
        costs = None if trace is None else _traced(step, trace, context)
    connection.leave()
    result = report(config, objective, context, {name: values[warmup:] for name, values in times.items() if values})
    return {**result, "peak_memory_gib": peak_memory, **({} if costs is None else {"largest_costs": costs})}


def _traced(step: Callable[[], Any], path: Path, context: ParallelContext) -> list[dict[str, Any]]:
    """Record steps into ``path`` (Chrome's trace format, gzip where it ends so; on a GPU its kernels), and where their time went:
    the ten largest costs by kernel or operator, [{name, share, milliseconds and calls a step}]."""
    from torch.profiler import ProfilerActivity, profile

    is_gpu = context.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]) as profiler:
        for _ in range(TRACED):
            timed(step, context)
    if context.rank == 0:
        profiler.export_chrome_trace(str(path))
    return largest_costs(profiler.key_averages(), is_gpu=is_gpu)


def largest_costs(events: Iterable[Any], *, is_gpu: bool) -> list[dict[str, Any]]:
    """The ten that took longest of a profile's averages. On a GPU kernels alone: an operator has the time of its kernels, too."""
    if is_gpu:
        events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    spent = [(event.self_device_time_total if is_gpu else event.self_cpu_time_total, event) for event in events]
    total = sum(time for time, _ in spent) or 1.0
    largest = sorted(spent, key=lambda each: -each[0])[:10]
    return [
        {"name": event.key[:100], "share": time / total, "ms": time / 1e3 / TRACED, "calls": event.count / TRACED}
        for time, event in largest
    ]


def report(
    config: Config, objective: Objective, context: ParallelContext, times: dict[str, list[float]]
) -> dict[str, Any]:
    """Rates from step times; medians, because single steps of a shared machine vary."""
    flops = flops_per_token(Shape.of(config.model), objective)
    assert config.run.global_batch_size
    seconds = statistics.median(times["engine"])
    tokens_per_second = config.run.global_batch_size * config.model.seq_length / seconds
    per_device = tokens_per_second * flops / context.world_size
    peak = peak_flops(context.device)
    result: dict[str, Any] = {
        "objective": config.objective.objective,
        "model": config.model.model,
        "layout": {"tp": context.tp.size, "pp": context.pp.size, "dp": context.dp.size},
        "precision": "bf16" if config.run.bf16 else "fp32",
        "sequence": config.model.seq_length,
        "global_batch": config.run.global_batch_size,
        "step_seconds": {"median": seconds, "min": min(times["engine"]), "max": max(times["engine"])},
        "steps": len(times["engine"]),
        "tokens_per_second": tokens_per_second,
        "flops_per_token": flops,
        "tflops_per_device": per_device / 1e12,
        "mfu": None if peak is None else per_device / peak,
        "machine": _machine(context),
    }
    if "plain" in times:
        result["plain_step_seconds"] = statistics.median(times["plain"])
        ratios = [plain / own for plain, own in zip(times["plain"], times["engine"])]
        result["times_faster_than_plain"] = statistics.median(ratios)
    return result


def _peak_memory_gib(context: ParallelContext) -> float:
    """GPU memory allocated at most, or on CPU the process's largest resident set."""
    if context.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _machine(context: ParallelContext) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if context.device.type == "cuda" else f"{platform.machine()} CPU"
    return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
