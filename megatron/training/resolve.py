"""The last step of configuration: what only data, tokenizer and checkpoint can tell. Runs before any process group."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

from megatron.checkpoint.files import checkpoint_tags, damaged_files, read_manifest
from megatron.config.schema import Config, ModelConfig
from megatron.data.blend import parse_blend, read_data_path_file
from megatron.data.dataset import count_unique_tokens
from megatron.data.indexed import read_meta
from megatron.errors import UserError
from megatron.objectives import needs_mask_token
from megatron.training.deepspeed.settings import read_settings_file

# Fields that change tensors or their meaning; everything else may differ between a checkpoint and the run it starts.
ARCHITECTURE = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "ffn_hidden_size",
    "normalization",
    "layernorm_epsilon",
    "swiglu",
    "use_rotary_position_embeddings",
    "rotary_base",
    "disable_bias_linear",
    "untie_embeddings_and_output_weights",
)


@dataclass(frozen=True)
class ResolvedRun:
    """A configuration with nothing left to decide.

    Attributes:
        config: resolved configuration.
        vocab_size: vocabulary before padding.
        train_paths, valid_paths: blends as :func:`megatron.data.dataset.build_dataset` takes them.
        unique_tokens: tokens of one epoch of the training data; 0 without training data.
        run_dir: where the run writes.
    """

    config: Config
    vocab_size: int
    train_paths: list[str]
    valid_paths: list[str]
    unique_tokens: int
    run_dir: Path


def resolve(config: Config, *, run_name: str) -> ResolvedRun:
    """Fill in vocabulary, mask id, lengths and schedules; check data, checkpoint and run directory.

    Args:
        config: from :func:`megatron.config.parse`.
        run_name: folder under ``runs/`` for a run without ``--save``.

    Raises:
        ValueError: three parts: what was given, the rule, the fix.
    """
    if config.parallel.deepspeed_config is not None:
        read_settings_file(Path(config.parallel.deepspeed_config))
    train_paths = _paths(config.data.train_data_path, config.data.train_data_path_file, "train")
    valid_paths = _paths(config.data.valid_data_path, config.data.valid_data_path_file, "valid")
    _check_presence(config, train_paths, valid_paths)
    unique_tokens = count_unique_tokens(train_paths) if train_paths else 0
    if valid_paths:
        count_unique_tokens(valid_paths)  # opens the files, so that damage shows now and not after hours
    vocab_size = resolve_vocab_size(config, (train_paths or valid_paths))
    checkpoint = newest_manifest(config)
    config = replace(config, model=_resolve_model(config, vocab_size, checkpoint))
    config = _resolve_mask_id(config, vocab_size, checkpoint)
    config = _resolve_lengths(config, unique_tokens)
    run_dir = Path(config.run.save) if config.run.save else Path("runs") / run_name
    _check_writable(run_dir)
    return ResolvedRun(config, vocab_size, train_paths, valid_paths, unique_tokens, run_dir)


def _paths(direct: list[str], file: str | None, kind: str) -> list[str]:
    if direct and file:
        raise UserError(
            f"--{kind}-data-path and --{kind}-data-path-file are both given",
            "the data are named once",
            "drop one of them",
        )
    return read_data_path_file(file) if file else list(direct)


def _check_presence(config: Config, train_paths: list[str], valid_paths: list[str]) -> None:
    if not train_paths and not config.run.skip_train:
        raise UserError(
            "no training data",
            "a run needs a prefix of .bin/.idx files",
            "pass --train-data-path or --train-data-path-file (tools/preprocess_data.py makes them)",
        )
    if not valid_paths and (config.run.skip_train or config.run.eval_interval is not None):
        flag = "--skip-train" if config.run.skip_train else "--eval-interval"
        raise UserError(f"{flag} without validation data", "validation needs data", "pass --valid-data-path")


def resolve_vocab_size(config: Config, paths: list[str]) -> int:
    """Vocabulary before padding: from the tokenizer that the flags name, else from what the data record.

    Raises:
        ValueError: neither says.
    """
    data = config.data
    named = data.tokenizer_type or data.vocab_file or data.merge_file or data.tokenizer_model
    if named and data.tokenizer_type != "NullTokenizer":
        from megatron.data.tokenizer import build_tokenizer

        return build_tokenizer(data).vocab_size
    if data.vocab_size is not None:
        return data.vocab_size
    recorded = [meta.get("vocab_size") for _, prefix in parse_blend(paths) if (meta := read_meta(prefix))]
    sizes = {size for size in recorded if size}
    if len(sizes) == 1:
        return sizes.pop()
    raise UserError(
        f"the vocabulary is unknown (the data record {sorted(sizes) or 'none'})",
        "embedding and mask id depend on it",
        "pass --vocab-file and --merge-file, --tokenizer-model, or --tokenizer-type NullTokenizer --vocab-size N",
    )


def newest_manifest(config: Config) -> dict | None:
    """Manifest of the checkpoint that ``--load`` means, judged by sizes alone; None where the run starts fresh."""
    if config.run.load is None:
        return None
    load = Path(config.run.load)
    if (load / "manifest.json").is_file():
        return read_manifest(load)
    if config.run.load_tag not in (None, "latest"):
        return read_manifest(load / str(config.run.load_tag))
    for tag in checkpoint_tags(load):
        if not list(damaged_files(tag, checksums=False)):
            return read_manifest(tag)
    if (load / "latest").is_file():
        return read_manifest(load / (load / "latest").read_text().strip())  # raises: says what is wrong with it
    if config.run.finetune or config.run.skip_train:
        raise UserError(
            f"--load {load} holds no checkpoint", "--finetune and --skip-train need one", "correct the path"
        )
    return None


def _resolve_model(config: Config, vocab_size: int, checkpoint: dict | None) -> ModelConfig:
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    unit = model.make_vocab_size_divisible_by * tp
    padded = model.padded_vocab_size or -(-vocab_size // unit) * unit
    if checkpoint is not None:
        saved = checkpoint["config"]["model"]
        known = {field.name for field in fields(ModelConfig)}
        differing = [n for n in ARCHITECTURE if n in known and n in saved and saved[n] != getattr(model, n)]
        if differing:
            listed = ", ".join(f"{name} {saved[name]} (here {getattr(model, name)})" for name in differing)
            raise UserError(
                f"--load {config.run.load} is a checkpoint of another architecture: {listed}",
                "both must be equal",
                "pass the checkpoint's model flags or another --load",
            )
        _check_objective(config, checkpoint["config"]["objective"]["objective"])
        padded = model.padded_vocab_size or saved["padded_vocab_size"]
        is_widened = config.run.finetune and model.padded_vocab_size is None
        if is_widened and needs_mask_token(config.objective.objective):
            padded = max(padded, -(-(vocab_size + 1) // unit) * unit)  # room for the mask token
    if padded < vocab_size:
        raise UserError(
            f"the padded vocabulary {padded} is below the vocabulary {vocab_size}",
            "every token needs a row",
            "raise --padded-vocab-size or use the tokenizer of the checkpoint",
        )
    if padded % tp:
        raise UserError(
            f"the padded vocabulary {padded} is not divisible by tensor-parallel size {tp}",
            "every rank holds an equal share",
            "choose another --tensor-model-parallel-size",
        )
    return replace(model, padded_vocab_size=padded)


def _check_objective(config: Config, saved: str | None) -> None:
    own = config.objective.objective
    is_fresh = config.run.finetune or config.run.skip_train
    if saved is not None and saved != own and not is_fresh:
        raise UserError(
            f"--load {config.run.load} is a checkpoint of objective {saved}, this run trains {own}",
            "a run continues with its own objective",
            "pass --finetune to start a new run from its weights",
        )


def _resolve_mask_id(config: Config, vocab_size: int, checkpoint: dict | None) -> Config:
    if not needs_mask_token(config.objective.objective):
        return config
    padded = config.model.padded_vocab_size
    assert padded is not None
    # A flag, else the token that the checkpoint was trained with, else the first padding row.
    saved = None if checkpoint is None else checkpoint["config"]["objective"].get("mask_token_id")
    candidates = (config.objective.mask_token_id, saved, vocab_size)
    mask_id = next(candidate for candidate in candidates if candidate is not None)
    if not 0 <= mask_id < padded:
        raise UserError(
            f"the mask id {mask_id} has no row in the padded vocabulary of {padded} (vocabulary {vocab_size})",
            "masked tokens need an embedding",
            f"pass --padded-vocab-size {padded + 128} or --mask-token-id of an unused token",
        )
    return replace(config, objective=replace(config.objective, mask_token_id=mask_id))


def _resolve_lengths(config: Config, unique_tokens: int) -> Config:
    run, optimizer = config.run, config.optimizer
    assert run.global_batch_size
    samples = run.train_samples
    if run.train_epochs is not None:
        samples = round(run.train_epochs * unique_tokens / config.model.seq_length)
    if run.skip_train:
        samples = samples or run.global_batch_size
    assert samples is not None
    steps = samples // run.global_batch_size
    if steps < 1:
        raise UserError(
            f"{samples} training samples are less than one global batch of {run.global_batch_size}",
            "a run has at least one step",
            "train longer or lower --global-batch-size",
        )
    samples = steps * run.global_batch_size
    decay = optimizer.lr_decay_samples or samples
    warmup = optimizer.lr_warmup_samples
    if optimizer.lr_warmup_fraction is not None:
        warmup = int(optimizer.lr_warmup_fraction * decay)
    if warmup >= decay and optimizer.lr_decay_style != "constant":
        raise UserError(
            f"the warm-up of {warmup} samples leaves nothing of the {decay} decay samples",
            "warm-up must be shorter",
            "lower --lr-warmup-samples",
        )
    return replace(
        config,
        run=replace(run, train_samples=samples),
        optimizer=replace(optimizer, lr_decay_samples=decay, lr_warmup_samples=warmup),
    )


def _check_writable(run_dir: Path) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    probe = run_dir / f".probe-{os.getpid()}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"the run directory {run_dir} cannot be written ({error.strerror})",
            "metrics and checkpoints go there",
            "choose another --save or change its permissions",
        ) from error
