"""``run.json``: what was run, for reports, fits and people."""

from __future__ import annotations

import json
import platform
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megatron.config import config_to_dict
from megatron.config.schema import Config
from megatron.data.blend import parse_blend
from megatron.data.dataset import text_bytes_per_token
from megatron.files import write_atomically
from megatron.model.arithmetic import total_parameters, training_flops
from megatron.objectives import Objective
from megatron.parallel.context import ParallelContext
from megatron.training.resolve import ResolvedRun

PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "apex", "flash-attn", "liger-kernel")


def write_run_record(
    path: Path, resolved: ResolvedRun, objective: Objective, context: ParallelContext, *, parameters: int
) -> None:
    """Write ``run.json``; fields are described in docs/metrics.md.

    Args:
        path: file to write.
        resolved: the run.
        objective: its objective.
        context: this process.
        parameters: N of C = 6·N·D.
    """
    config = resolved.config
    tokens = _train_tokens(config)
    record: dict[str, Any] = {
        "format": 1,
        "objective": config.objective.objective,
        "label": objective.for_eval().label,
        "train_label": objective.label,
        "config": config_to_dict(config),
        "parameters": {**total_parameters(config.model), "for_compute": parameters},
        "unique_tokens": resolved.unique_tokens,
        "train_samples": config.run.train_samples,
        "train_tokens": tokens,
        "epochs": tokens / resolved.unique_tokens if resolved.unique_tokens else 0.0,
        "train_flops": training_flops(parameters, tokens),
        "layout": {
            "world": context.world_size,
            "tp": context.tp_size,
            "pp": context.pp_size,
            "dp": context.dp_size,
        },
        "versions": _versions(),
        "device": torch.cuda.get_device_name() if context.device.type == "cuda" else platform.processor() or "CPU",
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "text_bytes_per_token": _bytes_per_token(resolved),
    }
    write_atomically(path, json.dumps(record, indent=1))


def _train_tokens(config: Config) -> int:
    assert config.run.train_samples is not None
    return config.run.train_samples * config.model.seq_length


def _bytes_per_token(resolved: ResolvedRun) -> float | None:
    prefixes = [prefix for _, prefix in parse_blend(resolved.train_paths or resolved.valid_paths)]
    return text_bytes_per_token(prefixes[0]) if len(prefixes) == 1 else None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # names the CUDA build, which the metadata of PyPI's package do not
    return found
