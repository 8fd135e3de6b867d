"""Configuration → DeepSpeed settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron.config.schema import Config
from megatron.errors import UserError

# A bucket is a buffer of this many elements at most; DeepSpeed's default allocates 2 GB for any model.
MAX_BUCKET_ELEMENTS = 500_000_000


def effective_zero_stage(config: Config) -> int:
    """ZeRO stage that really runs. Stage 0 runs as 1: the same numbers, and gradient clipping across pipeline stages
    is only exact there (DeepSpeed 0.19.8)."""
    return max(1, config.parallel.zero_stage)


def deepspeed_settings(config: Config, *, dp_size: int, num_parameters: int) -> dict[str, Any]:
    """The dictionary for ``deepspeed.initialize``.

    Args:
        config: resolved configuration.
        dp_size: data-parallel ranks.
        num_parameters: parameters on this rank; bounds the communication buffers.

    Raises:
        ValueError: ``--deepspeed_config`` contradicts a flag, or configures what this project owns.
    """
    run, optimizer = config.run, config.optimizer
    assert run.global_batch_size is not None
    bucket = max(1, min(MAX_BUCKET_ELEMENTS, num_parameters))
    zero: dict[str, Any] = {
        "stage": effective_zero_stage(config),
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "contiguous_gradients": True,
        "overlap_comm": config.parallel.pipeline_model_parallel_size == 1,
    }
    if zero["stage"] == 3:
        zero["stage3_prefetch_bucket_size"] = min(50_000_000, bucket)
    if optimizer.cpu_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        zero["overlap_comm"] = False
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
    }
    if run.bf16:
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings if config.parallel.deepspeed_config is None else _merge_file(settings, config)


def _merge_file(settings: dict[str, Any], config: Config) -> dict[str, Any]:
    """Add the user's file; a value that contradicts a flag is refused rather than silently chosen."""
    path = Path(config.parallel.deepspeed_config or "")
    given = read_settings_file(path)
    merged = dict(settings)
    for key, value in given.items():
        if key == "zero_optimization":
            stage = value.get("stage", config.parallel.zero_stage)
            _agree(path, "zero_optimization.stage", stage, config.parallel.zero_stage, "--zero-stage")
            merged[key] = {**settings[key], **{k: v for k, v in value.items() if k != "stage" and v != "auto"}}
        elif key == "bf16":
            _agree(path, "bf16.enabled", value.get("enabled", False), config.run.bf16, "--bf16")
            merged[key] = {**settings.get(key, {}), **value}
        elif key in OWNED and value != "auto":
            _agree(path, key, value, settings[key], OWNED[key])
        elif value != "auto":
            merged[key] = value
    return merged


OWNED = {
    "train_batch_size": "--global-batch-size",
    "train_micro_batch_size_per_gpu": "--micro-batch-size",
    "gradient_accumulation_steps": "--global-batch-size and --micro-batch-size",
    "gradient_clipping": "--clip-grad",
}
REFUSED = {
    "optimizer": "the optimizer is set by --optimizer, --lr, --weight-decay and --adam-*",
    "scheduler": "the schedule is set by --lr-decay-style, --lr-warmup-samples and --min-lr",
}


def read_settings_file(path: Path) -> dict[str, Any]:
    """Read and check the parts of a DeepSpeed JSON file that need no other flag.

    Raises:
        ValueError: not a JSON object, or it configures fp16, an optimizer or a schedule.
    """
    try:
        given = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"--deepspeed_config {path}: {error}", "it must be a JSON file", "correct it") from error
    if not isinstance(given, dict):
        raise UserError(
            f"--deepspeed_config {path} holds a {type(given).__name__}", "it must be a JSON object", "correct it"
        )
    for key, reason in REFUSED.items():
        if key in given:
            raise UserError(f"--deepspeed_config {path} has {key!r}", f"{reason}", "remove it from the file")
    if given.get("fp16", {}).get("enabled", False):
        raise UserError(f"--deepspeed_config {path} enables fp16", "runs are bf16 or fp32", "remove it and pass --bf16")
    return given


def _agree(path: Path, name: str, given: Any, expected: Any, flag: str) -> None:
    if given not in ("auto", expected):
        raise UserError(
            f"--deepspeed_config {path} sets {name} to {given}, the flags to {expected}",
            "they must agree",
            f"change the file or {flag}",
        )
