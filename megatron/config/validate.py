"""Rules between flags.

Every message says what was given, the rule and the fix, and is raised before a process group or a download starts.
"""

from __future__ import annotations

import os
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.config.option import LARGEST_INT, idle_options, spelling
from megatron.config.packages import PACKAGES, is_installed
from megatron.config.schema import Config, RunConfig
from megatron.config.shape import Shape
from megatron.errors import UserError, require

if TYPE_CHECKING:
    from megatron.config.cli import Registry

# Units of options that name a place, and the longest ending that is put after it.
PATHS = {"FILE": "", "DIR": "/manifest.json", "PATH": ".meta.json"}


def validate(config: Config, registry: Registry, options: Any, world_size: int) -> None:
    """Check every rule between fields that the flags alone decide (ranges of single numbers are the options' own).

    Args:
        config: the flags.
        registry: objectives by name.
        options: those of the chosen objective.
        world_size: processes that the launcher started.

    Raises:
        UserError: the first rule that is broken.
    """
    _refuse_idle(config, options)
    _validate_paths(config)
    _validate_model(config)
    _validate_parallel(config, world_size)
    _validate_batch(config, world_size)
    _validate_schedule(config)
    require(
        config.objective.mask_token_id is None or registry[str(config.objective.objective)].needs_mask_token,
        f"--mask-token-id with objective {config.objective.objective}",
        "it masks no token",
        "drop it",
    )
    _validate_run(config.run)
    _validate_gap(config)


def idle_notes(config: Config) -> list[str]:
    """Flags of launch scripts that have no effect in this combination, each with the reason, to be named at start."""
    return [f"{spelling(item)} ({reason})" for item, reason in idle_options(*_sections(config)) if _is_tolerated(item)]


def _refuse_idle(config: Config, options: Any) -> None:
    for item, reason in idle_options(*_sections(config, options)):
        require(
            _is_tolerated(item),
            f"{spelling(item)} would have no effect",
            f"it {reason}",
            "drop it or pass what it needs",
        )


def _is_tolerated(item: Field) -> bool:
    return item.metadata["published"] or bool(item.metadata["no_effect"])


def _sections(config: Config, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
    sections = {section.name: getattr(config, section.name) for section in fields(config)}
    if options is not None:
        sections["options"] = options
    return sections, {item.name: getattr(s, item.name) for s in sections.values() for item in fields(s)}


def _validate_paths(config: Config) -> None:
    """Whether there is something or not, every path can be looked at: asking later would raise whatever the system says."""
    for item, value in (
        (item, getattr(part, item.name)) for part in _sections(config)[0].values() for item in fields(part)
    ):
        if not item.metadata or item.metadata["unit"] not in PATHS or not value:
            continue
        for path in [value] if isinstance(value, str) else value:
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


def _validate_model(config: Config) -> None:
    model = Shape.from_flags(config.model, padded_vocab_size=config.model.padded_vocab_size or 1)
    tp = config.parallel.tensor_model_parallel_size
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        value = getattr(model, name)
        options = ", ".join(str(n) for n in range(1, 65) if value % n == 0)
        require(
            value % tp == 0,
            f"{name} {value} is not divisible by tensor-parallel size {tp}",
            "each tensor-parallel rank holds an equal share",
            f"use --tensor-model-parallel-size {options}",
        )
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
    for flag, backend in (("--attention-backend", model.attention_backend), ("--swiglu-backend", model.swiglu_backend)):
        require(
            is_installed(backend),
            f"{flag} {backend}, but the package {PACKAGES.get(backend)} is not installed",
            "it is an optional accelerator",
            f"run bash install.sh --with {backend}, or drop the flag",
        )
    require(
        model.attention_backend != "flash-attn" or config.run.bf16,
        "--attention-backend flash-attn without --bf16",
        "flash-attn computes in 16 bits",
        "pass --bf16, or drop the flag",
    )


def _validate_parallel(config: Config, world: int) -> None:
    parallel = config.parallel
    num_layers = Shape.from_flags(config.model, padded_vocab_size=1).num_layers
    tp, pp, zero = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.zero_stage
    require(
        world % (tp * pp) == 0,
        f"{world} processes cannot hold tensor-parallel {tp} x pipeline {pp}",
        f"the number of processes must be a multiple of {tp * pp}",
        f"start {tp * pp} or a multiple (torchrun --nproc_per_node, deepspeed --num_gpus), or lower the sizes",
    )
    require(
        zero <= 1 or pp == 1,
        f"--zero-stage {zero} with {pp} pipeline stages",
        "DeepSpeed partitions gradients (2) or weights (3) only without a pipeline",
        "use --zero-stage 1, or --pipeline-model-parallel-size 1",
    )
    require(
        zero <= 2 or tp == 1,
        f"--zero-stage 3 with tensor-parallel size {tp}",
        "weights are partitioned either by ZeRO-3 or by tensor parallelism",
        "use --zero-stage 1 or 2, or --tensor-model-parallel-size 1",
    )
    require(
        not (parallel.no_pipeline_parallel and pp > 1),
        f"--no-pipeline-parallel with --pipeline-model-parallel-size {pp}",
        "the two contradict each other",
        "drop one",
    )
    require(
        pp <= num_layers,
        f"{pp} pipeline stages for {num_layers} layers",
        "each stage needs a block",
        f"use at most {num_layers} stages",
    )
    require(
        not (config.optimizer.cpu_optimizer and pp > 1),
        "--cpu-optimizer with a pipeline",
        "DeepSpeed offloads optimizer state only without a pipeline",
        "use --pipeline-model-parallel-size 1",
    )
    if parallel.deepspeed_config is not None:
        path = Path(parallel.deepspeed_config)
        require(path.is_file(), f"--deepspeed_config {path} does not exist", "it names a JSON file", "correct the path")


def _validate_batch(config: Config, world: int) -> None:
    run, parallel = config.run, config.parallel
    dp = max(1, world // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size))
    unit = run.micro_batch_size * dp
    batch = run.global_batch_size or unit
    require(
        batch % unit == 0,
        f"--global-batch-size {batch} is not divisible by micro batch {run.micro_batch_size} x data-parallel size {dp} = {unit}",
        "every rank runs the same number of micro-batches",
        f"use {max(1, round(batch / unit)) * unit}, or another --micro-batch-size",
    )


def _validate_schedule(config: Config) -> None:
    run, optimizer = config.run, config.optimizer
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
    if optimizer.optimizer == "fusedadam":
        import importlib.util

        require(
            importlib.util.find_spec("apex") is not None,
            "--optimizer fusedadam, but apex is not installed",
            "it uses apex's FusedAdam",
            "use --optimizer adam (torch's fused AdamW) or bash install.sh --with apex",
        )


def _validate_gap(config: Config) -> None:
    parallel = config.parallel
    if config.run.gap_task is None:
        return
    require(
        parallel.pipeline_model_parallel_size == 1 and parallel.zero_stage < 3,
        f"--gap-task with {parallel.pipeline_model_parallel_size} pipeline stages and ZeRO {parallel.zero_stage}",
        "answers are scored by the whole model on every data-parallel rank",
        "drop the flag, use one stage and ZeRO 1 or 2, or run tools/evaluate_downstream.py on checkpoints",
    )
    require(
        Path(config.run.gap_task).is_file(),
        f"--gap-task {config.run.gap_task} is no file",
        "it holds questions, one JSON object a line",
        "correct the path",
    )


def _validate_run(run: RunConfig) -> None:
    require(
        run.eval_iters == "full" or (run.eval_iters.isdecimal() and int(run.eval_iters) <= LARGEST_INT),
        f"--eval-iters {run.eval_iters!r}",
        "it counts validation steps, or is 'full'",
        "pass for instance --eval-iters 10",
    )
