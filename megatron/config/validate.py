"""Rules between fields. ``fill_defaults`` computes what follows from the flags alone, ``validate`` only raises.

Every message says what was given, the rule and the fix, and is raised before a process group or a download starts.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from megatron.config.presets import PRESETS, swiglu_width
from megatron.config.schema import Config, ModelConfig, ObjectiveConfig, RunConfig
from megatron.errors import UserError

PRESET_FIELDS = ("hidden_size", "kv_channels", "num_attention_heads", "num_layers")


def fill_defaults(config: Config) -> Config:
    """The configuration with derived numbers in place of ``None``, as far as the flags determine them."""
    model = fill_model(config.model)
    objective = config.objective
    run = config.run
    if run.global_batch_size is None:
        run = replace(run, global_batch_size=run.micro_batch_size * data_parallel_size(config))
    if run.train_iters is not None and run.train_samples is None:
        run = replace(run, train_samples=run.train_iters * (run.global_batch_size or 1))
    return replace(config, model=model, objective=objective, run=run)


def fill_model(model: ModelConfig) -> ModelConfig:
    """Derived shapes of the model: from the preset, then from hidden size and heads."""
    values = {name: getattr(model, name) for name in PRESET_FIELDS}
    if model.model is not None:
        if model.model not in PRESETS:
            raise UserError(
                f"--model {model.model!r} is not a preset",
                f"presets are {', '.join(PRESETS)}",
                "choose one of them or give --num-layers, --hidden-size and --num-attention-heads",
            )
        preset = PRESETS[model.model]._asdict()
        values = {name: preset[name] if value is None else value for name, value in values.items()}
    missing = [name for name in PRESET_FIELDS if values[name] is None and name != "kv_channels"]
    if missing:
        flags = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise UserError(
            f"the model has no {flags}", "a model needs a preset or explicit sizes", f"pass --model 7M or {flags}"
        )
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    assert hidden is not None and heads is not None
    if values["kv_channels"] is None:
        if hidden % heads:
            raise UserError(
                f"--hidden-size {hidden} is not divisible by --num-attention-heads {heads}",
                "channels per head must be a whole number",
                "change one of them or pass --kv-channels",
            )
        values["kv_channels"] = hidden // heads
    ffn = model.ffn_hidden_size or (swiglu_width(hidden) if model.swiglu else 4 * hidden)
    return replace(
        model,
        **values,
        ffn_hidden_size=ffn,
        num_query_groups=model.num_query_groups or heads,
        max_position_embeddings=model.max_position_embeddings or model.seq_length,
    )


def world_size() -> int:
    """Processes of this run, as the launcher announced them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def data_parallel_size(config: Config) -> int:
    """Processes left for data parallelism."""
    parallel = config.parallel
    return max(1, world_size() // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size))


def validate(config: Config) -> None:
    """Check every rule that the flags alone decide.

    Raises:
        ValueError: the first rule that is broken.
    """
    _positive(config)
    _validate_model(config)
    _validate_parallel(config)
    _validate_batch(config)
    _validate_schedule(config)
    _validate_objective(config)
    _validate_run(config.run)
    _validate_gap(config)


def _require(condition: object, given: str, rule: str, fix: str) -> None:
    if not condition:
        raise UserError(f"{given}", f"{rule}", f"{fix}")


def _positive(config: Config) -> None:
    checks = {
        "model": ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
                  "ffn_hidden_size", "seq_length", "make_vocab_size_divisible_by"),
        "parallel": ("tensor_model_parallel_size", "pipeline_model_parallel_size"),
        "run": ("micro_batch_size", "global_batch_size", "train_samples", "train_iters", "save_interval", "keep_last",
                "log_interval", "eval_interval", "num_mc"),
    }  # fmt: skip
    for section, names in checks.items():
        for name in names:
            value = getattr(getattr(config, section), name)
            flag = "--" + name.replace("_", "-")
            _require(value is None or value > 0, f"{flag} is {value}", "it must be positive", f"pass {flag} 1 or more")


def _validate_model(config: Config) -> None:
    from megatron.model.kernels import PACKAGES, is_installed

    model, tp = config.model, config.parallel.tensor_model_parallel_size
    assert model.num_attention_heads and model.num_query_groups and model.kv_channels and model.ffn_hidden_size
    assert model.max_position_embeddings
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        value = getattr(model, name)
        options = ", ".join(str(n) for n in range(1, 65) if value % n == 0)
        _require(
            value % tp == 0,
            f"{name} {value} is not divisible by tensor-parallel size {tp}",
            "each tensor-parallel rank holds an equal share",
            f"use --tensor-model-parallel-size {options}",
        )
    _require(
        model.num_attention_heads % model.num_query_groups == 0,
        f"--num-query-groups {model.num_query_groups} does not divide {model.num_attention_heads} query heads",
        "every key/value head serves the same number of query heads",
        "choose a divisor",
    )
    _require(
        model.kv_channels % 2 == 0 or not model.use_rotary_position_embeddings,
        f"--kv-channels {model.kv_channels} is odd",
        "rotary embeddings rotate pairs of channels",
        "choose an even number",
    )
    _require(
        model.max_position_embeddings >= model.seq_length,
        f"--max-position-embeddings {model.max_position_embeddings} is below --seq-length {model.seq_length}",
        "every token needs a position",
        f"pass at least {model.seq_length}",
    )
    for name in ("attention_dropout", "hidden_dropout"):
        value = getattr(model, name)
        _require(0 <= value < 1, f"{name} is {value}", "a dropout probability is in [0, 1)", "choose for instance 0.1")

    for flag, backend in (("--attention-backend", model.attention_backend), ("--swiglu-backend", model.swiglu_backend)):
        _require(
            is_installed(backend),
            f"{flag} {backend}, but the package {PACKAGES.get(backend)} is not installed",
            "it is an optional accelerator",
            f"run bash install.sh --with {backend}, or drop the flag",
        )
    _require(
        model.attention_backend != "flash-attn" or config.run.bf16,
        "--attention-backend flash-attn without --bf16",
        "flash-attn computes in 16 bits",
        "pass --bf16, or drop the flag",
    )


def _validate_parallel(config: Config) -> None:
    parallel, model = config.parallel, config.model
    tp, pp, zero = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.zero_stage
    world = world_size()
    _require(
        world % (tp * pp) == 0,
        f"{world} processes cannot hold tensor-parallel {tp} x pipeline {pp}",
        f"the number of processes must be a multiple of {tp * pp}",
        f"start {tp * pp} or a multiple (torchrun --nproc_per_node, deepspeed --num_gpus), or lower the sizes",
    )
    _require(zero in (0, 1, 2, 3), f"--zero-stage {zero}", "ZeRO has stages 0 to 3", "choose one of them")
    _require(
        zero <= 1 or pp == 1,
        f"--zero-stage {zero} with {pp} pipeline stages",
        "DeepSpeed partitions gradients (2) or weights (3) only without a pipeline",
        "use --zero-stage 1, or --pipeline-model-parallel-size 1",
    )
    _require(
        zero <= 2 or tp == 1,
        f"--zero-stage 3 with tensor-parallel size {tp}",
        "weights are partitioned either by ZeRO-3 or by tensor parallelism",
        "use --zero-stage 1 or 2, or --tensor-model-parallel-size 1",
    )
    _require(
        not (parallel.no_pipeline_parallel and pp > 1),
        f"--no-pipeline-parallel with --pipeline-model-parallel-size {pp}",
        "the two contradict each other",
        "drop one",
    )
    assert model.num_layers
    _require(
        pp <= model.num_layers,
        f"{pp} pipeline stages for {model.num_layers} layers",
        "each stage needs a block",
        f"use at most {model.num_layers} stages",
    )
    _require(
        not (config.optimizer.cpu_optimizer and pp > 1),
        "--cpu-optimizer with a pipeline",
        "DeepSpeed offloads optimizer state only without a pipeline",
        "use --pipeline-model-parallel-size 1",
    )
    if parallel.deepspeed_config is not None:
        path = Path(parallel.deepspeed_config)
        _require(
            path.is_file(), f"--deepspeed_config {path} does not exist", "it names a JSON file", "correct the path"
        )


def _validate_batch(config: Config) -> None:
    run, dp = config.run, data_parallel_size(config)
    assert run.global_batch_size
    unit = run.micro_batch_size * dp
    _require(
        run.global_batch_size % unit == 0,
        f"--global-batch-size {run.global_batch_size} is not divisible by micro batch {run.micro_batch_size} x "
        f"data-parallel size {dp} = {unit}",
        "every rank runs the same number of micro-batches",
        f"use {max(1, round(run.global_batch_size / unit)) * unit}, or another --micro-batch-size",
    )


def _validate_schedule(config: Config) -> None:
    run, optimizer = config.run, config.optimizer
    lengths = [name for name in ("train_samples", "train_iters", "train_epochs") if getattr(run, name) is not None]
    if run.train_iters is not None and run.train_samples == run.train_iters * (run.global_batch_size or 1):
        lengths.remove("train_samples")
    _require(
        run.skip_train or len(lengths) == 1,
        f"the length of training is given {len(lengths)} times ({', '.join(lengths) or 'nowhere'})",
        "a run has one length",
        "pass one of --train-samples, --train-iters and --train-epochs",
    )
    _require(optimizer.lr > 0, f"--lr is {optimizer.lr}", "the peak rate is positive", "choose for instance 2e-4")
    _require(
        0 <= optimizer.min_lr <= optimizer.lr,
        f"--min-lr {optimizer.min_lr} is not between 0 and --lr {optimizer.lr}",
        "the rate decays from --lr to --min-lr",
        "lower --min-lr",
    )
    _require(
        optimizer.lr_warmup_fraction is None or optimizer.lr_warmup_samples == 0,
        "both --lr-warmup-samples and --lr-warmup-fraction",
        "the warm-up has one length",
        "drop one",
    )
    for name in ("adam_beta1", "adam_beta2"):
        value = getattr(optimizer, name)
        _require(0 <= value < 1, f"{name} is {value}", "a moment decay is in [0, 1)", "choose for instance 0.9")
    if optimizer.optimizer == "fusedadam":
        import importlib.util

        _require(
            importlib.util.find_spec("apex") is not None,
            "--optimizer fusedadam, but apex is not installed",
            "it uses apex's FusedAdam",
            "use --optimizer adam (torch's fused AdamW) or bash install.sh --with apex",
        )


# Flags that belong to some objectives only.
OBJECTIVE_FLAGS = {
    "independent_t": ("mdm", "maskgit", "exact_count_mdm", "block_diffusion"),
    "noise_schedule": ("mdm", "maskgit", "block_diffusion"),
    "ar_ratio": ("mdm",),
    "low_noise_start": ("mdm",),
    "random_length_ratio": ("mdm",),
    "block_size": ("block_diffusion",),
    "input_mask_ratio": ("masked_input_ar",),
    "num_order_list": ("permuted_ar",),
    "use_order_list": ("permuted_ar",),
    "use_predefined_order": ("permuted_ar",),
    "randmask_ratio": ("masked_attention_ar",),
}


def _validate_objective(config: Config) -> None:
    from megatron.objectives import OBJECTIVES

    objective = config.objective
    name = objective.objective
    _require(
        name in OBJECTIVES,
        f"--objective {name!r}",
        f"an objective is one of {', '.join(OBJECTIVES)}",
        "correct the name",
    )
    _validate_owners(objective)
    for field in ("ar_ratio", "randmask_ratio", "input_mask_ratio", "random_length_ratio"):
        value = getattr(objective, field)
        flag = "--" + field.replace("_", "-")
        _require(0 <= value <= 1, f"{flag} is {value}", "a probability is in [0, 1]", "correct it")
    _require(
        0 < objective.low_noise_ratio <= 1,
        f"--low-noise-ratio is {objective.low_noise_ratio}",
        "times are scaled by a factor in (0, 1]",
        "correct it",
    )
    _require(
        name != "permuted_ar" or (objective.num_order_list or 0) >= 1,
        f"--num-order-list is {objective.num_order_list}",
        "training over permuted orders needs at least one order",
        "pass --num-order-list N",
    )
    for owner, field in {"masked_attention_ar": "randmask_ratio", "masked_input_ar": "input_mask_ratio"}.items():
        flag = "--" + field.replace("_", "-")
        _require(
            name != owner or getattr(objective, field) > 0,
            f"--objective {owner} without {flag}",
            "it would be plain AR",
            f"pass {flag} above 0, or --objective ar",
        )
    power = objective.noise_schedule_power
    _require(
        power is None or (power > 0 and objective.noise_schedule == "polynomial"),
        f"--noise-schedule-power {power} with --noise-schedule {objective.noise_schedule}",
        "it is the positive power of the polynomial schedule",
        "pass --noise-schedule polynomial, or drop it",
    )
    _validate_block_size(name == "block_diffusion", objective.block_size, config.model.seq_length)


def _validate_owners(objective: ObjectiveConfig) -> None:
    """A flag of another objective would have no effect."""
    name = objective.objective
    for field, owners in OBJECTIVE_FLAGS.items():
        flag = "--" + field.replace("_", "-")
        _require(
            not getattr(objective, field) or name in owners,
            f"{flag} with objective {name}",
            f"it belongs to {', '.join(owners)}",
            f"drop it or pass --objective {owners[0]}",
        )


def _validate_block_size(is_needed: bool, block_size: int | None, seq_length: int) -> None:
    _require(
        not is_needed or block_size is not None,
        "--objective block_diffusion without --block-size",
        "a block has a size",
        "pass --block-size N, a divisor of the sequence length",
    )
    _require(
        block_size is None or (block_size >= 1 and seq_length % block_size == 0),
        f"--block-size {block_size} does not divide --seq-length {seq_length}",
        "a sequence is whole blocks",
        f"choose a divisor of {seq_length}",
    )


def _validate_gap(config: Config) -> None:
    parallel = config.parallel
    if config.run.gap_task is None:
        return
    _require(
        parallel.pipeline_model_parallel_size == 1 and parallel.zero_stage < 3,
        f"--gap-task with {parallel.pipeline_model_parallel_size} pipeline stages and ZeRO {parallel.zero_stage}",
        "answers are scored by the whole model on every data-parallel rank",
        "drop the flag, use one stage and ZeRO 1 or 2, or run tools/evaluate_downstream.py on checkpoints",
    )
    _require(
        Path(config.run.gap_task).is_file(),
        f"--gap-task {config.run.gap_task} is no file",
        "it holds questions, one JSON object a line",
        "correct the path",
    )


def _validate_run(run: RunConfig) -> None:
    _require(
        run.eval_iters == "full" or run.eval_iters.isdigit(),
        f"--eval-iters {run.eval_iters!r}",
        "it counts validation steps, or is 'full'",
        "pass for instance --eval-iters 10",
    )
    _require(
        run.load_tag is None or run.load is not None,
        "--load-tag without --load",
        "a tag names a checkpoint inside the folder of --load",
        "pass --load",
    )
    _require(
        not run.finetune or run.load is not None,
        "--finetune without --load",
        "finetuning starts from the weights of a checkpoint",
        "pass --load",
    )
    _require(
        run.save_interval is None or run.save is not None,
        "--save-interval without --save",
        "checkpoints go to the folder of --save",
        "pass --save",
    )
