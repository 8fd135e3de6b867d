"""Rules between flags.

Every message says what was given, the rule and the fix, and is raised before a process group or a download starts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import Field, fields
from math import gcd
from pathlib import Path
from typing import Any

from megatron.config.option import LARGEST, PACKAGES, check_range, default_of, idle_options, is_installed, spelling
from megatron.config.schema import OF_TRAINING, Config, DataConfig, RunConfig
from megatron.config.shape import Shape
from megatron.errors import UserError, require

# Units of options that name a place, and the longest ending that is put after it.
PATHS = {"FILE": "", "DIR": "/manifest.json", "PATH": ".meta.json", "RUN:TAG": "/manifest.json"}


def validate(config: Config, options: Any, *, needs_mask_token: bool, world_size: int) -> None:
    """Check every range, and every rule between fields that the flags alone decide.

    Args:
        config: the flags.
        options: those of the chosen objective.
        needs_mask_token: whether that objective masks.
        world_size: processes that the launcher started.

    Raises:
        UserError: the first rule that is broken.
    """
    flags = _flags(config, options)
    for item, value in flags:
        check_range(item, value)
    for item, reason in idle_options(flags):
        is_tolerated = item.metadata["published"]
        require(is_tolerated, f"{spelling(item)} would have no effect", f"it {reason}", "drop it or pass what it needs")
    _validate_engine(config)
    _validate_paths(flags)
    _validate_data(config.data)
    shape = Shape.from_flags(config.model, padded_vocab_size=config.model.padded_vocab_size or 1)
    _validate_model(shape)
    _validate_layout(config, shape, world_size)
    _validate_run(config)
    require(
        config.objective.mask_token_id is None or needs_mask_token,
        f"--mask-token-id with objective {config.objective.objective}",
        "it masks no token",
        "drop it",
    )


def check_packages(config: Config) -> None:
    """Check that the accelerators which a run asks for are here, as they need not be where it is planned.

    Raises:
        UserError: one is not.
    """
    for item, value in ((item, value) for item, value in _flags(config) if value in item.metadata["choices"]):
        require(
            is_installed(value),
            f"{spelling(item)} {value}, but the package {PACKAGES.get(value)} is not installed",
            "it is an optional accelerator",
            f"run bash install.sh --with {value.replace('fusedadam', 'apex')}, or drop the flag",
        )


def idle_notes(config: Config) -> list[str]:
    """Flags of launch scripts that have no effect in this combination, by the reason, to be named at start."""
    flags = _flags(config)
    idle = {spelling(item): reason for item, reason in idle_options(flags) if item.metadata["published"]}
    if config.run.skip_train:
        given = [item for item, value in flags if item.name in OF_TRAINING and value != default_of(item)]
        idle |= {spelling(item): "needs no --skip-train" for item in given}
    by_reason = {reason: [name for name in idle if idle[name] == reason] for reason in idle.values()}
    return [f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()]


def _flags(config: Config, *options: Any) -> list[tuple[Field, Any]]:
    """Every flag and its value."""
    sections = (*(getattr(config, section.name) for section in fields(config)), *options)
    return [(item, getattr(part, item.name)) for part in sections for item in fields(part) if item.metadata]


def _validate_paths(flags: Sequence[tuple[Field, Any]]) -> None:
    """Whether there is something or not, every path can be looked at: asking later would raise whatever the system says."""
    named = [(item, value) for item, value in flags if item.metadata["unit"] in PATHS and value is not None]
    for item, value in named:
        for path in [value] if isinstance(value, str) else value:
            fix = "drop the flag, or set the variable that it comes from"
            require(path, f"{spelling(item)} ''", "it names a place of the file system", fix)
            try:
                os.stat(path + PATHS[item.metadata["unit"]])
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                shown = path if len(path) <= 80 else f"{path[:80]}…"
                raise UserError(
                    f"{spelling(item)} {shown} cannot be looked at ({error.strerror})",
                    "it names a place of the file system",
                    "correct the path or its permissions",
                ) from error


def _validate_model(model: Shape) -> None:
    require(
        model.num_attention_heads % model.num_query_groups == 0,
        f"--num-query-groups {model.num_query_groups} does not divide {model.num_attention_heads} query heads",
        "every key/value head serves the same number of query heads",
        "choose a divisor",
    )
    require(
        model.kv_channels % 2 == 0 or not model.use_rotary_position_embeddings,
        f"--kv-channels {model.kv_channels} is odd",
        "rotary embeddings rotate pairs of channels",
        "choose an even number",
    )
    require(
        model.max_position_embeddings >= model.seq_length,
        f"--max-position-embeddings {model.max_position_embeddings} is below --seq-length {model.seq_length}",
        "every token needs a position",
        f"pass at least {model.seq_length}",
    )
    require(
        model.attention_backend not in PACKAGES or model.attention_dropout == 0.0,
        f"--attention-backend {model.attention_backend} with --attention-dropout {model.attention_dropout:g}",
        "FlashAttention 3 and 4 have no dropout",
        "pass --attention-dropout 0, or drop the backend",
    )


def _validate_layout(config: Config, model: Shape, world: int) -> None:
    """Processes, the shares of the model that they hold, and those of the batch."""
    run, parallel = config.run, config.parallel
    tp, pp, zero = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.zero_stage
    shared = {name: getattr(model, name) for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size")}
    options = ", ".join(str(n) for n in range(1, 65) if gcd(*shared.values()) % n == 0)
    for name, value in shared.items():
        require(
            value % tp == 0,
            f"{name} {value} is not divisible by tensor-parallel size {tp}",
            "each tensor-parallel rank holds an equal share",
            f"use --tensor-model-parallel-size {options}",
        )
    require(
        not parallel.sequence_parallel or model.seq_length % tp == 0,
        f"--sequence-parallel with --seq-length {model.seq_length} and tensor-parallel size {tp}",
        "each tensor-parallel rank holds an equal part of every sequence",
        f"use --seq-length {model.seq_length // tp * tp or tp}, or drop the flag",
    )
    require(
        world % (tp * pp) == 0,
        f"{world} processes cannot hold tensor-parallel {tp} x pipeline {pp}",
        f"the number of processes must be a multiple of {tp * pp}",
        f"start {tp * pp} or a multiple (torchrun --nproc-per-node {tp * pp}), or lower the sizes",
    )
    require(
        zero <= 1 or pp == 1,
        f"--zero-stage {zero} with {pp} pipeline stages",
        "DeepSpeed partitions gradients (2) or weights (3) only without a pipeline",
        "use --zero-stage 1, or --pipeline-model-parallel-size 1",
    )
    require(
        zero <= 2 or tp == 1 or parallel.engine == "fsdp2",
        f"--zero-stage 3 with tensor-parallel size {tp}",
        "DeepSpeed partitions weights either by ZeRO-3 or by tensor parallelism",
        "use --zero-stage 1 or 2, --tensor-model-parallel-size 1, or --engine fsdp2",
    )
    require(
        pp <= model.num_layers,
        f"{pp} pipeline stages for {model.num_layers} layers",
        "each stage needs a block",
        f"use at most {model.num_layers} stages",
    )
    dp = world // (tp * pp)
    unit = run.micro_batch_size * dp
    batch = run.global_batch_size or unit
    require(
        batch % unit == 0,
        f"--global-batch-size {batch} is not divisible by micro batch {run.micro_batch_size} x data-parallel size {dp} = {unit}",
        "every rank runs the same number of micro-batches",
        f"use {max(1, round(batch / unit)) * unit}, or another --micro-batch-size",
    )


def _validate_engine(config: Config) -> None:
    """What the engine on FSDP2 does not do."""
    parallel, optimizer = config.parallel, config.optimizer
    pp = parallel.pipeline_model_parallel_size
    for is_given, given, rule, fix in (
        (pp > 1, f"{pp} pipeline stages", "it shares out whole models", "use --pipeline-model-parallel-size 1"),
        (optimizer.optimizer != "adam", f"--optimizer {optimizer.optimizer}",
         "it steps with torch's fused AdamW on rows of the matrices", "use --optimizer adam"),
        (optimizer.cpu_optimizer, "--cpu-optimizer", "it keeps optimizer state on the device", "drop it"),
        (config.run.gap_task is not None, "--gap-task",
         "answers are scored by the whole model on every data-parallel rank", "use tools/evaluate_downstream.py on checkpoints"),
    ):  # fmt: skip
        fix = f"{fix}, or pass --engine deepspeed"
        require(parallel.engine != "fsdp2" or not is_given, f"--engine fsdp2 with {given}", rule, fix)


def _validate_data(data: DataConfig) -> None:
    for kind in ("train", "valid"):
        require(
            not (getattr(data, f"{kind}_data_path") and getattr(data, f"{kind}_data_path_file")),
            f"--{kind}-data-path and --{kind}-data-path-file are both given",
            "the data are named once",
            "drop one of them",
        )


def _validate_branch(run: RunConfig) -> None:
    for other in ("skip_train", "finetune"):
        require(
            run.branch_from is None or not getattr(run, other),
            f"--branch-from with --{other.replace('_', '-')}",
            "a branch trains on from a checkpoint, with its optimizer state",
            "drop one of them",
        )


def _validate_run(config: Config) -> None:
    """Length, schedule, validation and the files that the run reads."""
    run, optimizer, parallel = config.run, config.optimizer, config.parallel
    lengths = [name for name in ("train_samples", "train_iters", "train_epochs") if getattr(run, name) is not None]
    require(
        run.skip_train or len(lengths) == 1,
        f"the length of training is given {len(lengths)} times ({', '.join(lengths) or 'nowhere'})",
        "a run has one length",
        "pass one of --train-samples, --train-iters and --train-epochs",
    )
    require(
        optimizer.min_lr <= optimizer.lr,
        f"--min-lr {optimizer.min_lr} is above --lr {optimizer.lr}",
        "the rate decays from --lr to --min-lr",
        "lower --min-lr",
    )
    require(
        optimizer.lr_warmup_fraction is None or optimizer.lr_warmup_samples == 0,
        "both --lr-warmup-samples and --lr-warmup-fraction",
        "the warm-up has one length",
        "drop one",
    )
    _validate_branch(run)
    require(
        optimizer.optimizer != "muon" or not optimizer.cpu_optimizer,
        "--optimizer muon with --cpu-optimizer",
        "whole matrices are brought together and iterated on the device",
        "drop one of them",
    )
    require(
        run.eval_iters == "full"
        or (run.eval_iters.isdecimal() and len(run.eval_iters) < 17 and int(run.eval_iters) <= LARGEST),
        f"--eval-iters {run.eval_iters[:99]!r}",
        "it counts validation steps, or is 'full'",
        "pass for instance --eval-iters 10",
    )
    require(
        run.gap_task is None or (parallel.pipeline_model_parallel_size == 1 and parallel.zero_stage < 3),
        f"--gap-task with {parallel.pipeline_model_parallel_size} pipeline stages and ZeRO {parallel.zero_stage}",
        "answers are scored by the whole model on every data-parallel rank",
        "drop the flag, use one stage and ZeRO 1 or 2, or run tools/evaluate_downstream.py on checkpoints",
    )
    for flag, is_given in (("--save-best", run.save_best), ("--skip-train", run.skip_train)):
        given, fix = f"{flag} without validation: --eval-iters 0", f"raise --eval-iters, or drop {flag}"
        require(run.eval_iters.strip("0") or not is_given, given, "it needs a validation", fix)
    require(
        config.data.valid_data_path or config.data.valid_data_path_file or not run.save_best,
        "--save-best without validation data",
        "the best checkpoint is that of the best validation",
        "pass --valid-data-path, or drop it",
    )
    for flag, file, content in (
        ("--deepspeed_config", parallel.deepspeed_config, "settings"),
        ("--gap-task", run.gap_task, "questions, one JSON object a line"),
    ):
        is_there = file is None or Path(file).is_file()
        require(is_there, f"{flag}: a file {file} does not exist", f"it holds {content}", "correct the path")
