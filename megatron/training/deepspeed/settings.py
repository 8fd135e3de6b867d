"""What DeepSpeed is told: the process that it runs in, and its settings, from the configuration and a user's file."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatron.config.schema import Config
from megatron.errors import require
from megatron.files import read_object
from megatron.parallel.context import ParallelContext

# A bucket is a buffer of this many elements at most; DeepSpeed's default allocates 2 GB for any model.
MAX_BUCKET_ELEMENTS = 500_000_000


def deepspeed_settings(config: Config, *, dp_size: int, num_parameters: int) -> dict[str, Any]:
    """The dictionary for ``deepspeed.initialize``.

    Args:
        config: resolved configuration.
        dp_size: data-parallel ranks.
        num_parameters: parameters on this rank; bounds the communication buffers.

    Raises:
        UserError: ``--deepspeed_config`` contradicts a flag, or configures what this project owns.
    """
    run, optimizer = config.run, config.optimizer
    assert run.global_batch_size is not None
    bucket = max(1, min(MAX_BUCKET_ELEMENTS, num_parameters))
    zero: dict[str, Any] = {
        # Stage 0 runs as 1: the same numbers, and clipping across pipeline stages is only exact there (DeepSpeed 0.19.8).
        "stage": max(1, config.parallel.zero_stage),
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "contiguous_gradients": True,
        "overlap_comm": config.parallel.pipeline_model_parallel_size == 1 and not optimizer.cpu_optimizer,
    }
    if zero["stage"] == 3:
        zero["stage3_prefetch_bucket_size"] = min(50_000_000, bucket)
    if optimizer.cpu_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    settings: dict[str, Any] = {
        "train_batch_size": run.global_batch_size,
        "train_micro_batch_size_per_gpu": run.micro_batch_size,
        "gradient_accumulation_steps": run.global_batch_size // (run.micro_batch_size * dp_size),
        "steps_per_print": 2**31,
        "gradient_clipping": optimizer.clip_grad,
        "zero_optimization": zero,
        # The optimizer is torch's own: no operator is compiled at start-up.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "pipeline": {"use_reentrant": False},
        # It synchronises the device twice a micro-batch; step times are measured in the loop.
        "timers": {"throughput": {"enabled": False}},
    }
    if config.parallel.splits_sequence(config.model.seq_length):
        # By default DeepSpeed takes the activations of tensor-parallel ranks for equal, and lets each send a share of them.
        settings["pipeline"] |= {"pipe_partitioned": False, "grad_partitioned": False}
    if run.bf16:
        # Each gradient goes into the fp32 sum as soon as it is made, so no bf16 copy of all of them lives until the step.
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings if config.parallel.deepspeed_config is None else _merge_file(settings, config)


# What a file may set: how a run communicates, reports and uses memory, not what it trains. These have members,
SECTIONS = {
    *("zero_optimization", "bf16", "data_types", "pipeline", "timers", "activation_checkpointing", "aio", "checkpoint"),
    *("tensorboard", "wandb", "csv_monitor", "comet", "comms_logger", "flops_profiler"),
}
# and these have none.
VALUES = {
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level", "disable_python_gc"),
    *("communication_data_type", "seq_parallel_communication_data_type", "disable_allgather", "dataloader_drop_last"),
    *("prescale_gradients", "gradient_predivide_factor"),
}
# Values inside a section that must agree with ours: the flag or the reason, by path.
OWNED = {
    "train_batch_size": "--global-batch-size",
    "train_micro_batch_size_per_gpu": "--micro-batch-size",
    "gradient_accumulation_steps": "--global-batch-size and --micro-batch-size",
    "gradient_clipping": "--clip-grad",
    "zero_optimization.stage": "--zero-stage",
    "bf16.enabled": "--bf16",
    "pipeline.use_reentrant": "nothing (blocks recompute themselves)",
    "data_types.grad_accum_dtype": "nothing (gradients add up in fp32)",
    "zero_allow_untested_optimizer": "nothing (the optimizer is torch's)",
    "zero_force_ds_cpu_optimizer": "nothing (the optimizer is torch's)",
    # Without them a step with a NaN or infinite gradient would be taken.
    "bf16.check_grad_overflow": "nothing (such steps are skipped)",
    "zero_optimization.compute_grad_norm": "nothing (such steps are skipped)",
}
OWNED_IF_SPLIT = dict.fromkeys(("pipeline.pipe_partitioned", "pipeline.grad_partitioned"), "--no-sequence-parallel")
REFUSED = {
    "optimizer": "the optimizer is set by --optimizer, --lr, --weight-decay and --adam-*",
    "scheduler": "the schedule is set by --lr-decay-style, --lr-warmup-samples and --min-lr",
    "curriculum_learning": "every sample is seen whole, in the order of the data plan",
    "data_efficiency": "every sample is seen whole, in the order of the data plan",
    "compression_training": "weights are trained as they are",
    "zero_optimization.zenflow": "every gradient counts in its own step",
    "bf16.bf16_master_weights_and_grads": "masters and moments are fp32",
    "bf16.bf16_optimizer_states": "masters and moments are fp32",
}


SUBSECTIONS = {"zero_optimization.offload_optimizer", "zero_optimization.offload_param"}
SIZES = ("_size", "_threshold", "_parameters")  # endings of what is a number of bytes or elements


def read_settings_file(path: Path, *, bf16: bool) -> dict[str, Any]:
    """Read and check the parts of a DeepSpeed JSON file that need no other flag.

    Values "auto" and null are left to us, so they are dropped; so are sections that are switched off, and fp16, which runs as
    bf16.

    Args:
        path: the file.
        bf16: whether the run is.

    Raises:
        UserError: not a JSON object, or it changes what is trained.
    """
    rule = "--deepspeed_config must be a JSON object"
    given = read_object(path, rule=rule, fix="correct it", parse_constant=_refuse_constant)
    half = given.pop("fp16", None)
    is_half = (half.get("enabled") if isinstance(half, dict) else half) not in (False, None, "auto")
    told = f"--deepspeed_config {path} enables fp16"
    require(bf16 or not is_half, told, "fp16 runs as bf16 here", "pass --bf16, or --fp16")
    if is_half and _is_off(given.get("bf16")):  # a file of fp16 switches it off
        given.pop("bf16", None)
    known = SECTIONS | VALUES | OWNED.keys()
    given = {key: value for key, value in _without_auto(given).items() if key in known or not _is_off(value)}
    unknown = dict.fromkeys(given.keys() - known, "a setting that is not known here may change what is trained")
    reasons, stated = unknown | REFUSED, _by_path(given)
    wrong = [name for name in stated if name in reasons and not _is_off(stated[name])]
    rule, named = ", ".join(dict.fromkeys(reasons[name] for name in wrong)), ", ".join(map(repr, wrong))
    fix = f"remove {'them' if wrong[1:] else 'it'} from the file"
    require(not wrong, f"--deepspeed_config {path} has {named}", rule, fix)
    kinds = {name: name in SECTIONS | SUBSECTIONS for name in stated if name in given.keys() | SUBSECTIONS}
    odd = [name for name, is_section in kinds.items() if isinstance(stated[name], dict) != is_section]
    sizes = {name: value for name, value in stated.items() if name.endswith(SIZES)}
    odd += [name for name, size in sizes.items() if not (type(size) in (int, float) and 0 <= size < float("inf"))]
    told = ", ".join(f"{name} as {stated[name]!r}" for name in odd)
    rule = "a section is an object, nothing else is one, and a size is a number from 0"
    require(not odd, f"--deepspeed_config {path} has {told}", rule, "correct it, or leave it out")
    return given


def _merge_file(settings: dict[str, Any], config: Config) -> dict[str, Any]:
    """Add the user's file; a value that contradicts a flag is refused rather than silently chosen."""
    path = Path(config.parallel.deepspeed_config or "")
    given = read_settings_file(path, bf16=config.run.bf16)
    stated = _by_path(given)
    expected = {
        **_by_path(settings),
        "zero_optimization.stage": config.parallel.zero_stage,  # stage 0 runs as 1
        "bf16.enabled": config.run.bf16,
        "bf16.check_grad_overflow": True,
        "zero_optimization.compute_grad_norm": True,
    }
    owned = OWNED | (OWNED_IF_SPLIT if config.parallel.splits_sequence(config.model.seq_length) else {})
    wrong = [name for name in owned if stated.get(name) is not None and not _agree(stated[name], expected.get(name))]
    told = " and ".join(f"{name} to {stated[name]}, the flags to {expected.get(name)}" for name in wrong)
    fix = f"change the file or {' and '.join(owned[name] for name in wrong)}"
    require(not wrong, f"--deepspeed_config {path} sets {told}", "they must agree", fix)
    merged = dict(settings)
    for key, value in given.items():
        merged[key] = {**settings.get(key, {}), **value} if isinstance(value, dict) else value
    merged["zero_optimization"]["stage"] = settings["zero_optimization"]["stage"]
    return merged


def _agree(value: Any, expected: Any) -> bool:
    """Whether both are equal; ``true`` is no 1."""
    return value == expected and isinstance(value, bool) == isinstance(expected, bool)


def _without_auto(value: Any) -> Any:
    """The value without the members that are "auto" or null, at any depth."""
    if not isinstance(value, dict):
        return value
    return {key: _without_auto(member) for key, member in value.items() if member not in ("auto", None)}


def _by_path(settings: dict[str, Any]) -> dict[str, Any]:
    """Sections, and the values within them as "section.name"."""
    found = dict(settings)
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= {f"{key}.{name}": member for name, member in value.items()}
    return found


def _is_off(value: Any) -> bool:
    return value in (False, None) or (isinstance(value, dict) and value.get("enabled", True) is False)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def adopt_process_groups(context: ParallelContext) -> None:
    """Hand the default process group to DeepSpeed, quietly, and without compiling anything."""
    os.environ.setdefault("DS_ACCELERATOR", context.device.type)
    os.environ.setdefault("LOCAL_RANK", str(context.device.index or 0))
    # DeepSpeed broadcasts tied weights, which are leaves, once at start-up; torch warns about their gradient.
    warnings.filterwarnings("ignore", message="c10d::broadcast_")
    import deepspeed

    # Its own Muon, which it imports with an engine and nothing here uses: to compile that would load torch's compiler, a second
    # at every start.
    compiling, torch.compile = torch.compile, lambda *_, **__: lambda function: function  # type: ignore[assignment]
    import deepspeed.runtime.zero.muon.original_muon

    torch.compile = compiling
    # Its information lines bury the progress of a run; its import resets the level.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    if context.device.type == "cpu":
        # On CPU DeepSpeed would compile a shared-memory operator at this point: minutes, and a lock that outlives a kill.
        backend_module = sys.modules["deepspeed.comm.torch"]
        assert hasattr(backend_module, "build_shm_op"), "deepspeed changed; see FACTS on 0.19.8"
        backend_module.build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(
        dist_backend="gloo" if context.device.type == "cpu" else "nccl", auto_mpi_discovery=False, verbose=False
    )


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of DeepSpeed's is for users: not its warning about optimizers that are not its own, as Muon's is."""
    return "untested optimizer" not in record.getMessage()


def tensor_parallel_groups(context: ParallelContext) -> SimpleNamespace:
    """What DeepSpeed asks of a Megatron ``mpu``: ``get_model_parallel_rank()`` and so on. Without tensor parallelism it needs
    none."""
    dp = replace(context.dp, group=context.replicas())
    answers: dict[str, Any] = {}
    for name, axis in (("model", context.tp), ("tensor_model", context.tp), ("data", dp)):
        values = {"rank": axis.rank, "world_size": axis.size, "group": axis.group}
        answers |= {f"get_{name}_parallel_{part}": (lambda value=value: value) for part, value in values.items()}
    return SimpleNamespace(**answers)
